"""Kernels for accelerators, written with Pallas. They know arrays only, and need jax alone."""
