"""How a quantized model is trained. Apart from the training itself, which needs optax."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from spqr_jax.errors import SpQRError

Tune = Literal["none", "blocks", "logits"]


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How to train.

    Attributes:
      objective: ``blocks`` or ``logits``.
      epochs: times the text is gone through (``blocks``: by each block).
      learning_rate: the highest, reached after a few steps, in shares of a
        parameter's size; from there it falls to 0 along a cosine.
      batch_tokens: about how many tokens a step should see.
      seed: of the order of the batches.

    Raises:
      SpQRError: a value outside its range.
    """

    objective: Literal["blocks", "logits"] = "logits"
    epochs: int = 2
    learning_rate: float = 5e-4
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("blocks", "logits"):
            raise SpQRError(f"objective must be blocks or logits, got {self.objective!r}")
        if self.epochs < 1 or self.batch_tokens < 1:
            raise SpQRError(f"epochs and batch_tokens must be at least 1, got {self.epochs} and {self.batch_tokens}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SpQRError(f"learning_rate must be positive, got {self.learning_rate}")
