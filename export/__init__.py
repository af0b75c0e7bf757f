"""From a checkpoint to a proven bundle: ONNX graphs, the parity gate, INT8. Imports neither of the other stages."""
