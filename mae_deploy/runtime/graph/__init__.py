"""What an ONNX graph would compute, read before an engine runs it: its operators, and the sizes of what they make."""
