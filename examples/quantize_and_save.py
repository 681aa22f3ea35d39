"""Quantize a model with calibration text of your own, and save the result.

Usage:
    python examples/quantize_and_save.py                              # the demo model, Python's documentation as text
    python examples/quantize_and_save.py MODEL --text my.txt --out small

MODEL is a GGUF file, a Hugging Face directory, a hub id or "demo".
"""

import argparse

import numpy as np

import spqr_jax
from spqr_jax.data import calibration_windows, load_tokens

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="demo")
parser.add_argument("--text", default="pydoc", help="a text file, or the name of a corpus")
parser.add_argument("--preset", default="4bit", help="near-lossless, 4bit, 3bit or smallest")
parser.add_argument("--out", default="small", help="a new folder for the quantized model")
options = parser.parse_args()
params, tokenizer = spqr_jax.load_model(options.model)


def encode(text):
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def show(event):
    if isinstance(layer := event.detail, spqr_jax.LayerReport):
        stats = layer.stats
        print(f"{layer.path:24} {layer.bits} bits, {stats.stored_bits:.2f} stored, error {stats.output_error:.3f}")


length = min(1024, params.config.max_positions)  # tokens in one window of calibration text
windows = calibration_windows(load_tokens(options.text, "calibration", encode), length, count=16, seed=0)
config = spqr_jax.SpQRConfig.preset(options.preset)
spqr_jax.quantize(params, spqr_jax.batched(windows), config, out=options.out, tokenizer=tokenizer, events=show)
print("saved in", options.out)
