"""How much larger a loss is on unseen text than on the text that a plan is made from.

A plan's trials are solved with the Hessian H of a short text, and their loss is measured with the same H. Error
compensation has fitted H's noise, too, so on other text the loss is larger: 1.4 times with 3.5 tokens for each input,
2.3 times with 1.3 tokens, six times with 0.4. Without a correction a plan promises too little,
and gives too few bits to the matrices with many inputs.

In a few blocks each weight is therefore also tried with the Hessian of one half of the text, and measured with that of
the other half. The logarithm of the ratio of the two losses is the weight's *gap* G. For n tokens in place of a half's
m it is about G·(m/n)^0.8, and most of it is what the loss on its own text is too small by: three quarters. The two
figures are measured (docs/explanation/quality.md, "What a plan promises").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from spqr_jax.models.config import DecoderConfig
from spqr_jax.planning.curves import WeightCurve
from spqr_jax.stream.blocks import role

_FALL = 0.8  # a gap falls as this power of the number of tokens
_OF_SEEN = 0.75  # share of the gap that the loss on the text itself is too small by


def for_unseen_text(
    curves: Sequence[WeightCurve], config: DecoderConfig, planned: int, calibrated: int
) -> list[WeightCurve]:
    """The curves with the factors by which their losses are too small.

    Args:
      curves: of a whole model; those of some blocks have a `gap`. Without any, nothing changes.
      config: of the model.
      planned: tokens that the plan is made from.
      calibrated: tokens that the model will be quantized with.
    """
    gaps: dict[str, list[float]] = {}
    for curve in curves:
        if curve.gap is not None:
            gaps.setdefault(_role(curve), []).append(curve.gap)
    factors = {}
    for name, measured in gaps.items():
        tokens = float(calibrated)
        if name.startswith("experts."):  # a plan has one Hessian for all of them, calibration one for each
            tokens *= config.experts_per_token / config.num_experts
        factors[name] = factor_for(sum(measured) / len(measured), planned, tokens)
    return [dataclasses.replace(curve, factor=factors.get(_role(curve), 1.0)) for curve in curves]


def factor_for(gap: float, planned: int, calibrated: float) -> float:
    """What a loss on unseen text is of that on a plan's own.

    Args:
      gap: between two halves of the plan's text.
      planned, calibrated: tokens of the plan's text, and of the text that the weight is then calibrated on.
    """
    seen, unseen = ((planned / 2 / max(tokens, 1.0)) ** _FALL for tokens in (planned, calibrated))
    return math.exp(gap * (_OF_SEEN * seen + (1 - _OF_SEEN) * min(unseen, 1.0)))


def _role(curve: WeightCurve) -> str:
    return role(curve.path.split(".", 2)[2])
