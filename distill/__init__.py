"""Distillation of a large MAE encoder into a small student."""
