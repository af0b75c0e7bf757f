"""Masked autoencoder pretraining, and what judges and uses a pretrained encoder: fine-tuning, reconstruction."""
