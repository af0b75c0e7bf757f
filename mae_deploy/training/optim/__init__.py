"""Parameter groups and optimisers."""
