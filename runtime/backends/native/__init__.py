"""The native core: the decoder on the CPU without ONNX Runtime, on weights that are mapped and never copied."""
