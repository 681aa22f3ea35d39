"""What is static of one attention step."""

from __future__ import annotations

import dataclasses
from typing import Any

MASKED = -1e30
"""The maximum of scores where there is no key: finite, so that a difference of two is no NaN."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes, factors and dtypes, as :func:`pallas_kernels.attention.attend` describes them."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    rotated: int
    scale: float
    softcap: float | None
    dtype: Any
    cache_dtype: Any

    @property
    def share(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.head_dim * self.cache_dtype.itemsize
