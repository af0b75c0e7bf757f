"""Masked autoencoder pretraining, fine-tuning and reconstruction pictures. Imports neither of the other stages."""
