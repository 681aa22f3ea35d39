#!/usr/bin/env python3
"""Two rivals that need no solver: AWQ's scaling and HQQ's half-quadratic rounding, put into a float32 model.

    scripts/rivals_scaled.py demo awq-model awq --bits 4 --group-size 64 --calib IDS.npy --nsamples 16 --seqlen 1024
    scripts/rivals_scaled.py demo hqq-model hqq --bits 4 --group-size 64

Writes a Hugging Face directory, without a tokenizer, of the weights that the codes stand for. Both methods have groups
along the inputs with a 16-bit scale each. The zero point has the bits of a code in AWQ, 16 bits in HQQ. AWQ's channel
scales go into the operation before a matrix and take no bytes.

AWQ (arXiv 2306.00978), from second moments: inputs that matter are multiplied by s before rounding and divided by it
afterwards, s = rms(x)^a, one a in 0..1 for the matrices that read one input; then each group's range is clipped. Both
are chosen by Σ (w-ŵ) H (w-ŵ)ᵀ. Like its authors' code, it does not scale what `o_proj` reads where heads share values,
and does not clip q and k.

HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023) needs no text: the zero
point of each group minimizes |w-ŵ|^0.7 by alternating steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from spqr_jax import SpQRError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, matrix_names
from spqr_jax.models.hf import write_hf
from spqr_jax.resolve import open_model
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import collect
from spqr_jax.stream.stages import stage_groups
from spqr_jax.stream.windows import batched
from spqr_jax.terminal.display import say
from spqr_jax.texts import read_calibration

_RATIOS = 20  # values of a in 0..0.95
_CLIPS = 11  # shares of a group's range, 1..0.5
_UNCLIPPED = ("q_proj", "k_proj")
_STEPS, _POWER, _STIFFNESS, _GROWTH = 20, 0.7, 10.0, 1.01  # of HQQ; its authors' values


def bits_per_weight(method: str, bits: int, group_size: int) -> float:
    """Stored bits a weight, group statistics included."""
    return bits + (16 + (16 if method == "hqq" else bits)) / group_size


def _grouped(w: jax.Array, size: int) -> jax.Array:
    """[out, in] -> [out, groups, size]; `in` is a multiple of the size."""
    return w.reshape(w.shape[0], -1, size)


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16).astype(jnp.float32)


@partial(jax.jit, static_argnums=(1, 2))
def nearest(w: jax.Array, bits: int, size: int, share: jax.Array | float = 1.0) -> jax.Array:
    """W [out, in] rounded on the min-max grid of each group, or of a `share` of its range ([out, groups, 1])."""
    grouped, maxq = _grouped(w, size), 2.0**bits - 1
    low = jnp.minimum(jnp.min(grouped, axis=-1, keepdims=True), 0.0) * share
    high = jnp.maximum(jnp.max(grouped, axis=-1, keepdims=True), 0.0) * share
    scale = _half(jnp.maximum((high - low) / maxq, 1e-7))
    zero = jnp.clip(jnp.round(-low / scale), 0.0, maxq)
    codes = jnp.clip(jnp.round(grouped / scale) + zero, 0.0, maxq)
    return (scale * (codes - zero)).reshape(w.shape)


@jax.jit
def loss(miss: jax.Array, h: jax.Array) -> jax.Array:
    """Σ_r m_r H m_rᵀ."""
    return jnp.sum((miss @ h) * miss)


@partial(jax.jit, static_argnums=(2, 3))
def scaled_loss(w: jax.Array, h: jax.Array, bits: int, size: int, scale: jax.Array) -> jax.Array:
    """The loss of W [out, in] rounded as W·s, with `scale` s [in]."""
    return loss(w - nearest(w * scale, bits, size) / scale, h)


@partial(jax.jit, static_argnums=(2, 3))
def clipped(w: jax.Array, h: jax.Array, bits: int, size: int) -> jax.Array:
    """W rounded, each group on that share of its range which loses least by its own block of H."""
    groups = w.shape[1] // size
    blocks = jnp.stack([h[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)])

    def group_loss(share: jax.Array) -> jax.Array:
        miss = _grouped(w - nearest(w, bits, size, share), size)
        return jnp.einsum("rgi,gij,rgj->rg", miss, blocks, miss)

    shares = jnp.linspace(1.0, 0.5, _CLIPS)
    best = jnp.argmin(jax.lax.map(group_loss, shares), axis=0)
    return nearest(w, bits, size, shares[best][..., None])


def awq(names: Sequence[str], weights: Sequence[jax.Array], h: jax.Array, bits: int, size: int) -> list[jax.Array]:
    """Matrices [out, in] that read one input with Hessian H."""
    rms = jnp.sqrt(jnp.maximum(jnp.diagonal(h) / 2, 1e-12))
    scale = jnp.ones_like(rms)
    shared_values = names == ("o_proj",) and weights[0].shape[0] != weights[0].shape[1]
    if not shared_values:
        candidates = []
        for step in range(_RATIOS):
            powers = jnp.maximum(rms ** (step / _RATIOS), 1e-4)
            candidates.append(powers / jnp.sqrt(jnp.max(powers) * jnp.min(powers)))
        losses = [sum(float(scaled_loss(w, h, bits, size, s)) for w in weights) for s in candidates]
        scale = candidates[min(range(_RATIOS), key=losses.__getitem__)]
    scaled_h = h / scale / scale[:, None]
    return [
        (nearest(w * scale, bits, size) if name in _UNCLIPPED else clipped(w * scale, scaled_h, bits, size)) / scale
        for name, w in zip(names, weights, strict=True)
    ]


@partial(jax.jit, static_argnums=(1, 2))
def hqq(w: jax.Array, bits: int, size: int) -> jax.Array:
    """W [out, in] with zero points that minimize Σ |w-ŵ|^p; a matrix's steps end where its mean error grows."""
    grouped, maxq = _grouped(w, size), 2.0**bits - 1
    low, high = jnp.min(grouped, axis=-1, keepdims=True), jnp.max(grouped, axis=-1, keepdims=True)
    scale = _half(jnp.maximum((high - low) / maxq, 1e-7))

    def codes(zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(grouped / scale + zero), 0.0, maxq)

    def step(state: tuple[jax.Array, ...], index: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        zero, best, least, done = state
        q = codes(zero)
        miss = grouped - scale * (q - zero)
        error = jnp.mean(jnp.abs(miss))
        stiffness = _STIFFNESS * _GROWTH**index
        size_of = jnp.abs(miss)
        kept = jnp.sign(miss) * jnp.maximum(size_of - jnp.maximum(size_of, 1e-12) ** (_POWER - 1) / stiffness, 0.0)
        after = jnp.mean(q - (grouped - kept) / scale, axis=-1, keepdims=True)
        better = ~done & (error < least)
        return (
            jnp.where(better, after, zero),
            jnp.where(better, zero, best),
            jnp.where(better, error, least),
            done | ~better,
        ), None

    begin = (-low / scale, -low / scale, jnp.float32(jnp.inf), jnp.bool_(False))
    (_, best, _, _), _ = jax.lax.scan(step, begin, jnp.arange(_STEPS, dtype=jnp.float32))
    zero = _half(best)
    return (scale * (codes(zero) - zero)).reshape(w.shape)


def quantized_block(
    config: DecoderConfig, block: Block, text: Activations | None, method: str, bits: int, size: int
) -> Block:
    """A block with rounded matrices; `text` is taken through the dense block."""
    if text is None:
        return block.replace({name: hqq(block[name], bits, size) for name in matrix_names(config, block.kind)})
    changed = {}
    for stage in range(len(STAGES)):
        for (names, _), hessian in zip(
            stage_groups(config, block.kind, stage), text.hessians(stage, block), strict=True
        ):
            rounded = awq(names, [block[name] for name in names], hessian.matrix(), bits, size)
            changed |= dict(zip(names, rounded, strict=True))
        text.advance(stage, block)
    return block.replace(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a GGUF file, a Hugging Face directory or hub id")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("method", choices=("awq", "hqq"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calib", action="append", help="calibration text; as for spqr quantize")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    opened = open_model(given.model, "float32", say)
    config, text = opened.source.config, None
    widths = {config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size}
    if any(width % given.group_size for width in widths):
        raise SpQRError(
            f"rows of {sorted(widths)} weights cannot be cut into groups of {given.group_size}: choose a divisor"
        )
    if given.method == "awq":
        windows, _ = read_calibration(given.calib, opened, given.seqlen, given.nsamples, given.seed)
        text = Activations(config, opened.source.outer(), batched(windows))
    params, blocks = collect(opened.source), []
    sweep.forward(
        opened.source,
        lambda index, block: blocks.append(
            quantized_block(config, block, text, given.method, given.bits, given.group_size)
        ),
    )
    write_hf(given.out, dataclasses.replace(params, layers=tuple(blocks)))


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"rivals_scaled: {error}")
