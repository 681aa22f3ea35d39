"""Attention of one token over a cache of keys and values that all layers share, for accelerators.

Raw arrays in and out: `attend` picks the kernel for NVIDIA GPUs or XLA's operations.
"""

from __future__ import annotations

from pallas_kernels.attention.api import attend, why_unsupported
from pallas_kernels.attention.plan import Plan, choose_plan
from pallas_kernels.attention.xla import attend_by_xla

__all__ = ["Plan", "attend", "attend_by_xla", "choose_plan", "why_unsupported"]
