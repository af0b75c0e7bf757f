"""From a folder of unlabelled images to a vision backbone on an edge device."""

__version__ = "0.1.0"
