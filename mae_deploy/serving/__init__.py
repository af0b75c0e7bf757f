"""Files for servers: Triton's model repositories and DeepStream's configurations. Must not import torch."""
