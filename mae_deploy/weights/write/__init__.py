"""Weights as other projects load them, checked there before they are left behind."""
