"""Quantize a Flax NNX model of your own, without changing its code, and run it under jit.

Usage:
    python examples/flax_model.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

from spqr_jax import LayerReport, LayerRule, SpQRConfig
from spqr_jax.integrations import nnx as spqr_nnx


class Classifier(nnx.Module):
    """Any model of `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and whatever else."""

    def __init__(self, width, classes, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.down(jax.nn.gelu(self.up(self.norm(x)))))


def show(event):
    if isinstance(layer := event.detail, LayerReport):
        print(f"{layer.path:6} {layer.stats.stored_bits:.2f} stored bits, error {layer.stats.output_error:.3f}")


model = Classifier(width=64, classes=16, rngs=nnx.Rngs(0))
*batches, x = (jax.random.normal(jax.random.key(i), (128, 64)) for i in range(9))  # x is not seen in calibration
config = SpQRConfig(bits=3, rules=(LayerRule("head", bits=8),))  # 3 bits, and 8 for the last layer
small = spqr_nnx.quantize(model, batches, config, events=show)

run = nnx.jit(lambda model, x: model(x))
before, after = run(model, x), run(spqr_nnx.prepare(small), x)  # `prepare` packs weights for the fastest kernels here
print(f"relative error of the model's outputs: {jnp.linalg.norm(after - before) / jnp.linalg.norm(before):.3f}")
