"""Networks only: encoder, autoencoder, classifier, masking, positions. Reads and writes no files."""
