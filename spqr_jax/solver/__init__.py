"""SpQR for one weight matrix: plain arrays in, one `SpQRArray` out.

Nothing here knows a model, a file or a progress bar. Read `solve.py` first; the
parts are in the order of the paper: `hessian.py` (what the inputs look like),
`grid.py` (fitting scales and zeros, both levels), `outliers.py` (which weights
to leave out of a fit) and `columns.py` (the loop over the columns). `drift.py`
moves a weight beforehand, if what it reads has changed since it was trained.
"""

from spqr_jax.solver.drift import correct_drift, cross_gram
from spqr_jax.solver.hessian import Hessian, accumulate_hessian, accumulate_in_stack, empty_hessian
from spqr_jax.solver.panel_hessian import PanelHessian
from spqr_jax.solver.solve import LayerStats, Solved, quantize_weights, solved_as

__all__ = [
    "Hessian",
    "LayerStats",
    "PanelHessian",
    "Solved",
    "accumulate_hessian",
    "accumulate_in_stack",
    "correct_drift",
    "cross_gram",
    "empty_hessian",
    "quantize_weights",
    "solved_as",
]
