"""Training what is continuous in a quantized model against the dense one; its codes stay as they are.

`objectives.py` has the two objectives, `form.py` what a block looks like in training.
"""

from spqr_jax.tune.objectives import Tune, TuneConfig, tune

__all__ = ["Tune", "TuneConfig", "tune"]
