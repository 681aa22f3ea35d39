"""The programs of generation for a model that is not there: shapes instead of weights.

Used by gpu_program.py, which compiles them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.spqr_matmul import Prepared, fragments, outliers
from spqr_jax.generate import _decode, _prefill, _Progress, _Rest, empty_cache
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import abstract_decoder
from spqr_jax.sampling import Sampling

LLAMA_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=2048,
    tied_head=False,
)
SMALL = dataclasses.replace(
    LLAMA_7B, vocab_size=256, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=4, head_dim=64
)
OUTLIERS = 0.01


def shape(size: str, layers: int, context: int) -> DecoderConfig:
    """Llama-7B with other numbers of layers and positions, or (``small``) a model for a test."""
    return dataclasses.replace({"7b": LLAMA_7B, "small": SMALL}[size], num_layers=layers, max_positions=context)


def programs(
    config: DecoderConfig, form: str, *, batch: int, prompt: int, device: Any, implementation: str | None
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """{name: (function, arguments as shapes)} of prefill and decoding.

    Args:
      form: ``dense``, ``mixed``, or bits per code (``3 bits``).
      device: to compile for, None for the one of this machine.
    """
    spec = jax.ShapeDtypeStruct
    params = abstract_decoder(config, jnp.bfloat16)
    if form != "dense":
        params = quantized(params, form)
    cache = jax.eval_shape(lambda: empty_cache(config, batch, config.max_positions, jnp.bfloat16))
    scalar, key = spec((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    draw = jax.eval_shape(lambda: Sampling().draw(config.vocab_size))
    rest = _Rest(spec((batch,), jnp.int32), key, spec((1,), jnp.int32), draw)

    def progress(tokens: int) -> _Progress:
        return _Progress(spec((batch, tokens), jnp.int32), scalar, spec((batch,), jnp.bool_))

    return {
        "prefill": (_prefill.__wrapped__, (params, cache, progress(prompt), rest)),
        "decode": (_decode.__wrapped__, (params, cache, progress(1), rest, scalar)),
    }


def quantized(params: Any, form: str) -> Any:
    """The model's shapes with packed matrices in its blocks."""
    widths = (2, 3, 4) if form == "mixed" else (int(form.split()[0]),)
    count = 0

    def packed(leaf: Any) -> Any:
        nonlocal count
        if len(leaf.shape) != 2:
            return leaf
        count += 1
        return packed_shape(leaf.shape, widths[count % len(widths)])

    return dataclasses.replace(params, layers=tuple(jax.tree.map(packed, block) for block in params.layers))


def packed_shape(matrix: tuple[int, int], bits: int, group: int = 16) -> Prepared:
    """A packed matrix [out, in], as shapes."""
    out, inner = matrix
    spec = jax.ShapeDtypeStruct
    chunks = out * (int(inner * OUTLIERS) // outliers.CHUNK + 1)
    sparse = outliers.Outliers(
        columns=spec((outliers.CHUNK, chunks), jnp.uint16),
        values=spec((outliers.CHUNK, chunks), jnp.float16),
        merges=(),
        starts=spec((out + 1,), jnp.int32),
        chunk_starts=None,
        widest=24,
        row_chunks=24,
        tile_chunks=chunks * outliers.TILE_ROWS // out,
    )
    blocks = fragments.num_blocks(out, inner, group)
    arrays = (
        spec((*blocks, fragments.code_lines(bits, group), fragments.LINE), jnp.int32),
        spec((*blocks, fragments.STATISTICS_LINES, fragments.LINE), jnp.int32),
    )
    order = spec((inner,), jnp.int32)
    return Prepared(arrays, sparse, order, (out, inner), bits, group, "fragments", fragments.ROWS, f"of {inner}")
