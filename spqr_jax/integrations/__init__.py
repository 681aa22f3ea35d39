"""Models of other libraries, quantized as they are: `spqr_jax.integrations.nnx` and `.linen`."""
