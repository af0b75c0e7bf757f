"""Weights in files: reading them from anywhere, loading them into networks, writing them for others."""
