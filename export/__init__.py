"""From a checkpoint to a checked bundle: ONNX graphs, the parity gate, INT8. Imports neither of the other stages."""
