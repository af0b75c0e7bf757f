"""What an encoder is worth: features, k-NN, linear probes, comparisons, accuracy. Trains no encoder."""
