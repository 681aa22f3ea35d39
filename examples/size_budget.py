"""Quantize a model to a size that you choose, and see where the bits went.

Usage:
    python examples/size_budget.py                      # the demo model at 4.1 stored bits per weight
    python examples/size_budget.py MODEL --bits 3.5

`target_bits` is a budget for the decoder blocks. Each matrix gets 2, 3 or 4 bits, so that the loss rises least.
"""

import argparse

import jax
import numpy as np

import spqr_jax
from spqr_jax.data import calibration_windows, load_tokens

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="demo")
parser.add_argument("--bits", type=float, default=4.1, help="stored bits per weight")
options = parser.parse_args()
params, tokenizer = spqr_jax.load_model(options.model)


def encode(text):
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


length = min(1024, params.config.max_positions)  # tokens in one window of calibration text
windows = calibration_windows(load_tokens("pydoc", "calibration", encode), length, count=16, seed=0)
config = spqr_jax.SpQRConfig(target_bits=options.bits, head_bits=8)
small = spqr_jax.quantize(params, spqr_jax.batched(windows), config)

kinds = {}  # "q_proj" -> its weights in all blocks
for path, weight in jax.tree.leaves_with_path(small, is_leaf=spqr_jax.is_quantized):
    kinds.setdefault(path[-1].name, []).append(weight)
for name, weights in kinds.items():
    size = sum(weight.size for weight in weights)
    num_bytes = sum(w.stored_bytes if spqr_jax.is_quantized(w) else w.nbytes for w in weights)
    print(f"{name:16} {8 * num_bytes / size:6.2f} bits per weight, {num_bytes / 1e6:8.3f} MB")
