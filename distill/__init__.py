"""Distillation of a large encoder into a small student. Imports neither of the other stages."""
