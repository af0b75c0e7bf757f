"""Export: visible-token graphs in ONNX, the parity gate, and the bundle."""
