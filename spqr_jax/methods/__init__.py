"""SpQR and the methods that it is compared with, behind one function.

`choose.py` takes weights that read one input and solves each by the method that its configuration names:
SpQR, GPTQ and round-to-nearest by `spqr_jax.solver`, the others by the files here (`table.py` lists them).
"""

from spqr_jax.methods.choose import check_shards, quantize_weight, quantize_weights

__all__ = ["check_shards", "quantize_weight", "quantize_weights"]
