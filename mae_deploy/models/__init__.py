"""Encoder, decoder, classifier, and reading weights made elsewhere."""
