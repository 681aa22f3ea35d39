"""Which weights matter, and what patterns they form (the paper's section 3).

`sensitivity_map.py` says what rounding each weight of a matrix costs, `structure.py`
finds rows, columns, heads and rotary pairs among the costliest, `model.py` goes through
a model.
"""

from spqr_jax.analysis.model import ModelAnalysis, WeightAnalysis, analyze
from spqr_jax.analysis.sensitivity_map import line_pooled, sensitivity_map
from spqr_jax.analysis.structure import Structures, find_structures

__all__ = [
    "ModelAnalysis",
    "Structures",
    "WeightAnalysis",
    "analyze",
    "find_structures",
    "line_pooled",
    "sensitivity_map",
]
