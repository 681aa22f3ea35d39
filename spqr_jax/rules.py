"""Another configuration for some of a model's weights."""

from __future__ import annotations

import dataclasses
import re

from spqr_jax.errors import SpQRError
from spqr_jax.files.entries import shown


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """Another configuration for the weights whose path matches.

    Attributes:
      pattern: regular expression, searched in a weight's path such as ``layers.3.down_proj``. The first rule that
        matches is used.
      skip: leave these weights dense.
      bits: bits of a code for these weights; None for the model's value.
      outlier_threshold: relative threshold for these weights; None for the model's value.

    Raises:
      SpQRError: ``pattern`` is not a regular expression.
    """

    pattern: str
    skip: bool = False
    bits: int | None = None
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:  # the latter two: too large, too deep
            raise SpQRError(f"layer rule {shown(self.pattern)} is not a regular expression: {error}") from None
