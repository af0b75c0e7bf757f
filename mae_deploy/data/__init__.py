"""Training data: decoding, augmentation and the order of the images. Imports neither models nor the runtime."""
