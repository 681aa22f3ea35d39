"""Measure how much perplexity a quantized model lost, on the same windows as the dense model.

Usage:
    python examples/quantize_and_save.py                # writes the folder `small`
    python examples/evaluate.py demo small

Part of the error of the two perplexities is the choice of windows. It cancels in the paired difference.
"""

import argparse

import numpy as np

import spqr_jax
from spqr_jax.data import evaluation_windows, load_tokens

parser = argparse.ArgumentParser()
parser.add_argument("dense", nargs="?", default="demo")
parser.add_argument("quantized", nargs="?", default="small")
parser.add_argument("--data", default="pydoc", help="a text file, or the name of a corpus")
options = parser.parse_args()
dense, tokenizer = spqr_jax.load_model(options.dense)
small, _ = spqr_jax.load_model(options.quantized)


def encode(text):
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


length = min(1024, dense.config.max_positions)
windows = evaluation_windows(load_tokens(options.data, "evaluation", encode), length, limit=10)
before = spqr_jax.perplexity(dense, windows)
after = spqr_jax.perplexity(small, windows)
print(f"dense      perplexity {before.perplexity:.3f} ± {before.stderr:.3f}")
print(f"quantized  perplexity {after.perplexity:.3f} ± {after.stderr:.3f}")

increase = after.window_losses - before.window_losses  # nats per token, one number for each window
stderr = increase.std(ddof=1) / np.sqrt(len(increase))
print(f"increase   {increase.mean():.4f} ± {stderr:.4f} nats per token, {before.windows} windows of {length} tokens")
