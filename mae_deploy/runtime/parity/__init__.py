"""Whether an engine computes what PyTorch computed: comparison, checks, invariances."""
