"""INT8 and FP8 in an exported graph: calibration, ranges, and the search for the fastest mix within the budget."""
