"""Quantization of a modality-split decoder."""
