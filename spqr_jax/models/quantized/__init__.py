"""Hugging Face models that others quantized: read as dense ones, each weight dequantized when it is asked for."""

from spqr_jax.models.quantized.reader import open_tensors

__all__ = ["open_tensors"]
