"""`mae-deploy stream-eval`: what a stream's features are worth beside what else the same cost would buy."""
