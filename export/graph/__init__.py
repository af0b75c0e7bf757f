"""ONNX graphs of our networks, written node by node. Knows no bundle, no engine and no calibration."""
