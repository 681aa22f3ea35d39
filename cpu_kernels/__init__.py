"""Matrix products with packed SpQR weights on a CPU: C++ behind XLA's FFI, raw arrays in and out.

`pack` turns a matrix's canonical parts into the layout that the kernels read
(`csrc/matrix.h`), `matmul` multiplies by it, `matmul_all` by several, `take_rows`
reads rows of it; `attend` is one token's attention over a cache of keys and values.
The library is compiled when the package is installed, if there is a C++ compiler, or
later with ``python -m cpu_kernels``.
"""

from cpu_kernels.api import matmul, matmul_all, take_rows, to_dense
from cpu_kernels.attention import attend, can_attend
from cpu_kernels.library import (
    KERNELS_VARIABLE,
    LibraryError,
    chosen_kernels,
    kernel_names,
    why_unavailable,
)
from cpu_kernels.packed import FORMATS, TILE, Packed, pack

__all__ = [
    "FORMATS",
    "KERNELS_VARIABLE",
    "TILE",
    "LibraryError",
    "Packed",
    "attend",
    "can_attend",
    "chosen_kernels",
    "kernel_names",
    "matmul",
    "matmul_all",
    "pack",
    "take_rows",
    "to_dense",
    "why_unavailable",
]
