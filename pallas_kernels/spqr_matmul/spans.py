"""Words of tiles in several formats: one flat array, and where each tile's words begin."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.spqr_matmul.formats import UNIT, Format

Section = tuple[Any, Any, tuple[Format, ...]]
"""Words, spans (None if `words` is [count, tiles, steps, step_words]) and formats, as `Prepared` has them."""


def concatenated(sections: Sequence[Section], *, axis: int) -> Section:
    """Joins along the axis of the stack, 0, or of the tiles, 1."""
    first = sections[0][2]
    if all(spans is None and formats == first for _, spans, formats in sections):
        words = [words for words, *_ in sections]
        return (_joined(words, axis=axis) if len(words) > 1 else words[0]), None, first
    union = tuple(sorted({form for _, _, formats in sections for form in formats}))
    first_unit, shifted = 0, []
    for words, spans, formats in sections:
        offsets, kinds = _spans(words, formats) if spans is None else np.moveaxis(np.asarray(spans, np.int64), -1, 0)
        renamed = np.array([union.index(form) for form in formats])[kinds]
        shifted.append(np.stack([offsets + first_unit, renamed], axis=-1))
        first_unit += words.size // UNIT
    if first_unit > np.iinfo(np.int32).max:
        raise ValueError(f"a stack of {first_unit * UNIT * 4 >> 30} GiB is more than its offsets can address (128 GiB)")
    return (
        _joined([words for words, *_ in sections], axis=None),
        jax.device_put(np.concatenate(shifted, axis=axis).astype(np.int32)),
        union,
    )


@functools.partial(jax.jit, static_argnames="axis")
def _joined(words: list[jax.Array], *, axis: int | None) -> jax.Array:
    """Concatenated along an axis, or flat."""
    return jnp.concatenate(words if axis is not None else [w.reshape(-1) for w in words], axis=axis or 0)


def _spans(words: Any, formats: tuple[Format, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and formats of tiles that all have one, int64 [count, tiles]."""
    count, tiles, steps, _ = words.shape
    units = steps * formats[0].step_words // UNIT
    offsets = np.arange(count * tiles, dtype=np.int64).reshape(count, tiles) * units
    return offsets, np.zeros_like(offsets)
