"""Products with packed SpQR weights on GPUs and TPUs: Pallas kernels, raw arrays in and out.

`prepare` turns a matrix's parts into the layout that a kernel reads, `matmul` multiplies by
it, `matmul_all` by several, `take_rows` reads rows of it. Needs jax alone.
"""

from pallas_kernels.spqr_matmul.api import IMPLEMENTATIONS, matmul, matmul_all, why_no_mosaic, why_no_triton
from pallas_kernels.spqr_matmul.device import Target, target
from pallas_kernels.spqr_matmul.prepared import LAYOUTS, Layout, Prepared, prepare, why_unsupported
from pallas_kernels.spqr_matmul.xla import take_rows

__all__ = [
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "Layout",
    "Prepared",
    "Target",
    "matmul",
    "matmul_all",
    "prepare",
    "take_rows",
    "target",
    "why_no_mosaic",
    "why_no_triton",
    "why_unsupported",
]
