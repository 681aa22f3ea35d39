"""Products with dense and quantized weights.

`linear`, `linear_all` and `take_rows` take any weight. `prepare` brings quantized weights into the layout of the best
backend for the device; `BACKENDS` is the table of backends.
"""

from spqr_jax.products.functions import linear, linear_all, prepare, prepare_for, take_rows
from spqr_jax.products.prepared import PreparedMatrix
from spqr_jax.products.table import (
    BACKENDS,
    Backend,
    Implementation,
    backend_named,
    default_implementation,
    why_no_kernels,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Implementation",
    "PreparedMatrix",
    "backend_named",
    "default_implementation",
    "linear",
    "linear_all",
    "prepare",
    "prepare_for",
    "take_rows",
    "why_no_kernels",
]
