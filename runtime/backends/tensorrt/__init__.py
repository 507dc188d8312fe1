"""Native TensorRT as a backend."""
