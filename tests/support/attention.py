"""Problems of attention at one position, and what is right, in NumPy and float64."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Form:
    """A small problem: sizes as `pallas_kernels.attention.attend` describes them."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    length: int = 128
    start: int = 77
    first: tuple[int, ...] = (0,)
    rotated: int | None = None  # all
    softcap: float | None = None
    scale: float = 0.125
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    layers: int = 2
    layer: int = 1

    @property
    def turned(self) -> int:
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def static(self) -> dict:
        return {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rotated": self.turned,
            "scale": self.scale,
            "softcap": self.softcap,
        }


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What `attend` takes; tables are None where nothing is rotated."""

    qkv: np.ndarray
    cos: np.ndarray | None
    sin: np.ndarray | None
    keys: np.ndarray
    values: np.ndarray
    layer: np.ndarray
    first: np.ndarray
    start: np.ndarray

    def __iter__(self):
        return iter(getattr(self, field.name) for field in dataclasses.fields(self))


def arrays_of(form: Form, *, unread: float = np.nan) -> Arrays:
    """Random arrays; the cache has `unread` where nothing may be read."""
    rng = np.random.default_rng(0)
    dtype, cache_dtype = (np.dtype(jnp.dtype(name)) for name in (form.dtype, form.cache_dtype))
    qkv = rng.standard_normal((form.batch, (form.heads + 2 * form.kv_heads) * form.head_dim)).astype(dtype)
    angle = rng.uniform(0, 6, (form.batch, form.turned // 2))
    tables = [f(angle).astype(np.float32) if form.turned else None for f in (np.cos, np.sin)]
    shape = (form.layers, form.batch, form.kv_heads, form.length, form.head_dim)
    keys, values = (rng.standard_normal(shape).astype(cache_dtype) for _ in range(2))
    first = np.resize(np.array(form.first, np.int32), form.batch)
    for cache in (keys, values):
        cache[:, :, :, form.start :] = unread
        for text, begin in enumerate(first):
            cache[form.layer, text, :, : max(begin, 0)] = unread
    return Arrays(qkv, *tables, keys, values, np.int32(form.layer), first, np.int32(form.start))


def expected(form: Form, given: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output [batch, heads, head_dim] in float64, and the cache after the step."""
    x = given.qkv.astype(np.float32).reshape(form.batch, -1, form.head_dim)
    q, k, v = np.split(x, (form.heads, form.heads + form.kv_heads), axis=1)
    q, k = (_rotated(a, given.cos, given.sin) for a in (q, k))
    keys, values = given.keys.copy(), given.values.copy()
    keys[form.layer, :, :, form.start] = k.astype(keys.dtype)
    values[form.layer, :, :, form.start] = v.astype(values.dtype)
    out = np.zeros((form.batch, form.heads, form.head_dim))
    for text in range(form.batch):
        seen = slice(min(max(given.first[text], 0), form.start), form.start + 1)
        for head in range(form.heads):
            kv_head = head // (form.heads // form.kv_heads)
            of_keys, of_values = (a[form.layer, text, kv_head, seen].astype(np.float64) for a in (keys, values))
            scores = form.scale * of_keys @ q[text, head].astype(np.float64)
            if form.softcap is not None:
                scores = form.softcap * np.tanh(scores / form.softcap)
            weights = np.exp(scores - scores.max())
            out[text, head] = weights @ of_values / weights.sum()
    return out, keys, values


def _rotated(x: np.ndarray, cos: np.ndarray | None, sin: np.ndarray | None) -> np.ndarray:
    """In float32, each operation rounded."""
    if cos is None or sin is None:
        return x
    half = cos.shape[1]
    a, b, rest = np.split(x, (half, 2 * half), axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def bits(array: np.ndarray) -> np.ndarray:
    """Floating-point numbers as whole numbers, so that NaNs compare."""
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest relative error of an output head."""
    got = np.asarray(got).astype(np.float64).reshape(wanted.shape)
    return float((np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())
