"""Measuring what quantization did to a model."""
