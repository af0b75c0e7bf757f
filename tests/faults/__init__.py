"""Faults that are planted into bundles, devices and inputs, to measure what the checks find."""
