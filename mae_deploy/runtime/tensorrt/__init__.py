"""TensorRT from 8.6 to 11: building plans, checking them, running them. Must not import torch."""
