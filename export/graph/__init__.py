"""ONNX graphs of the vision tower and the decoder, written node by node."""
