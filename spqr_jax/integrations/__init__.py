"""Models of other libraries, quantized as they are: `spqr_jax.integrations.nnx` and `.linen`; and the harness."""

from __future__ import annotations

from typing import Any

from spqr_jax.errors import SpQRError


def import_harness() -> Any:
    """The adapter's module, which imports the harness.

    Raises:
      SpQRError: the harness is not installed.
    """
    try:
        from spqr_jax.integrations import harness
    except ImportError as error:
        raise SpQRError(f"the LM Evaluation Harness is not installed ({error}): pip install 'spqr-jax[eval]'") from None
    return harness
