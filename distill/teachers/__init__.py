"""Frozen networks that a student learns from: encoders of ours, timm's models, exported bundles."""
