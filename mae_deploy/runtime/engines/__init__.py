"""The interface of an engine, ONNX Runtime and OpenVINO. Knows no bundle."""
