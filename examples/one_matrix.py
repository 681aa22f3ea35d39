"""Quantize one matrix by hand: SpQR moves the weights further than rounding does, and the outputs less.

Usage:
    python examples/one_matrix.py
"""

import math

import jax
import jax.numpy as jnp

import spqr_jax

keys = jax.random.split(jax.random.key(0), 3)
weight = 0.05 * jax.random.t(keys[0], 4.0, (96, 128))  # [out, in]; some weights are large
mixing = jnp.eye(128) + jax.random.normal(keys[1], (128, 128)) / 8
inputs = jax.random.normal(keys[2], (1024, 128)) @ mixing  # [tokens, in]; the inputs are correlated

hessian = spqr_jax.empty_hessian(128)  # which directions of the input matter
for batch in jnp.split(inputs, 4):  # add as many batches of activations as you have
    hessian = spqr_jax.accumulate_hessian(hessian, batch)

methods = {
    "round to nearest": spqr_jax.SpQRConfig.rtn(bits=3, stats_bits=3, fit="search"),
    "SpQR, no outliers": spqr_jax.SpQRConfig(bits=3, outlier_threshold=math.inf),
    "SpQR": spqr_jax.SpQRConfig(bits=3, outlier_threshold=0.2),
}
exact = spqr_jax.linear(weight, inputs)  # [tokens, out]
for name, config in methods.items():
    array = spqr_jax.quantize_weight(weight, hessian, config)
    weight_error = jnp.linalg.norm(array.to_dense() - weight) / jnp.linalg.norm(weight)
    output_error = jnp.linalg.norm(spqr_jax.linear(array, inputs) - exact) / jnp.linalg.norm(exact)
    print(f"{name:18} error of the weights {weight_error:.4f}, of the outputs {output_error:.4f}", end="; ")
    print(f"{array.ideal_bits:.2f} ideal and {array.stored_bits:.2f} stored bits per weight")

rows, columns, values = array.to_coo()  # the outliers of the last one
print(f"{len(values)} outliers; the first: row {rows[0]}, column {columns[0]}, adds {values[0]:.4f}")
