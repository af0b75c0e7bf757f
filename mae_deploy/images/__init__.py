"""Finding, reading and preprocessing images in NumPy and Pillow. Must not import torch."""
