"""TensorRT engines from the graphs of a bundle; needs no torch."""
