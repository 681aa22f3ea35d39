"""The methods that SpQR is compared with, each for one weight matrix: W and H in, an `SpQRArray` out.

All minimize the same layer error Σ_r (w_r-ŵ_r) H (w_r-ŵ_r)ᵀ, on the same kind of grid, and
give the same kind of array; they differ in how they look for the codes:

- `obq.py`: one weight at a time, the cheapest first (exact greedy order).
- `adaround.py`: whether to round up or down, learned by gradient descent.
- `adaquant.py`: weights, scales and zero points learned by straight-through gradients.
- `bit_split.py`: one bit of all codes at a time, by coordinate descent.

Round to nearest and GPTQ are configurations of the solver itself (`SpQRConfig.rtn`,
`SpQRConfig.gptq`); BRECQ, which looks at a whole block, is `brecq.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.methods.adaquant import solve_adaquant
from spqr_jax.methods.adaround import solve_adaround
from spqr_jax.methods.bit_split import solve_bit_split
from spqr_jax.methods.obq import solve_obq

Solve = Callable[[jax.Array, jax.Array, SpQRArray, SpQRConfig], SpQRArray]
"""(W f32 [out, in], H f32 [in, in] as it is, W rounded to nearest, configuration) -> W quantized."""

SOLVERS: dict[str, Solve] = {
    "obq": solve_obq,
    "adaround": solve_adaround,
    "adaquant": solve_adaquant,
    "bit-split": solve_bit_split,
}

__all__ = ["SOLVERS", "Solve"]
