"""How a model is made INT8 or FP8: the one policy of the exporter and of a student that learns with it."""
