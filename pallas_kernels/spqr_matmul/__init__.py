"""Products with packed SpQR weights on GPUs and TPUs: Pallas kernels, raw arrays in and out.

`prepare` turns matrices into the layout that a kernel reads, `stack` joins those of several
layers. `matmul` and `matmul_parts` multiply by them, `take_rows` and `dequantize` read them.
Needs jax alone.
"""

from pallas_kernels.spqr_matmul.api import (
    IMPLEMENTATIONS,
    dequantize,
    matmul,
    matmul_parts,
    take_rows,
    why_no_kernel,
    why_no_mosaic,
    why_no_triton,
)
from pallas_kernels.spqr_matmul.device import Target, target
from pallas_kernels.spqr_matmul.formats import TILE, Format
from pallas_kernels.spqr_matmul.part import LAYOUTS, Layout, Part, why_unsupported
from pallas_kernels.spqr_matmul.prepared import Prepared, prepare, stack

__all__ = [
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "TILE",
    "Format",
    "Layout",
    "Part",
    "Prepared",
    "Target",
    "dequantize",
    "matmul",
    "matmul_parts",
    "prepare",
    "stack",
    "take_rows",
    "target",
    "why_no_kernel",
    "why_no_mosaic",
    "why_no_triton",
    "why_unsupported",
]
