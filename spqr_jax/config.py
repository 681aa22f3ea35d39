"""What to do to a model: one frozen configuration, its presets and per-layer rules.

SpQR, GPTQ and round-to-nearest are one loop (see ``spqr_jax.solver``). They
differ only in the values below, so every comparison between them is a
comparison of two configurations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from spqr_jax.errors import SpQRError
from spqr_jax.files.entries import Entries, shown
from spqr_jax.files.fields import read_fields

Order = Literal["activation", "identity"]
Fit = Literal["search", "minmax", "reference"]
CalibrationDtype = Literal["bfloat16", "float32"]
Solver = Literal["columns", "obq", "adaround", "adaquant", "bit-split", "brecq"]

UNQUANTIZED_STATS_BITS = 16
"""`stats_bits` of a model whose scales and zeros are kept as 16-bit floats."""


BASELINES = tuple(solver for solver in get_args(Solver) if solver != "columns")
"""Other methods' ways to look for codes, to compare with (`spqr_jax.solver.baselines`, `spqr_jax.brecq`)."""

DEFAULT_STEPS = {"adaround": 300, "adaquant": 300, "bit-split": 4, "brecq": 100}
"""Steps of those that go on for as long as one likes."""

PRESETS: dict[str, dict[str, Any]] = {
    "near-lossless": {"target_bits": 4.75, "bit_choices": (4,), "head_bits": 8},
    "4bit": {"target_bits": 4.3, "head_bits": 8},
    "3bit": {"target_bits": 3.75, "head_bits": 8},
    "smallest": {"target_bits": 3.25, "head_bits": 8},
}
"""Points on the line between size and quality: changes to `SpQRConfig`'s defaults. Targets leave the head out."""

DEFAULT_PRESET = "4bit"
"""What a model is quantized with if nothing is said."""


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """Changes the configuration of the weights whose path matches.

    Attributes:
      pattern: regular expression, searched in a weight's path such as
        ``layers.3.down_proj``. The first rule that matches decides.
      skip: leave these weights dense.
      bits: code bits for these weights, or None for the model's own.
      outlier_threshold: relative threshold for these weights, or None.
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


@dataclasses.dataclass(frozen=True)
class SpQRConfig:
    """How a model is quantized. Defaults are SpQR at 3 bits with one outlier threshold; see also `preset`.

    Attributes:
      bits: bits a weight code, 2..8.
      group_size: consecutive inputs that share one scale and zero (the paper's
        beta1), a multiple of 8; None for one group per output row.
      stats_bits: bits of a quantized scale or zero, 2..8; 16 keeps both as
        16-bit floats (no second level).
      stats_group_size: consecutive output rows that share one second-level fit
        (the paper's beta2), a multiple of 8.
      outlier_threshold: relative threshold tau above which a weight is kept
        apart; ``math.inf`` for no outliers.
      order: ``activation`` visits inputs by falling mean square activation,
        ``identity`` as they are.
      damping: share of the mean diagonal added to the Hessian's diagonal.
      compensate: push each column's rounding error onto the columns that
        remain. False is round-to-nearest, which needs no calibration text.
      sequential: a block's later weights see activations that have passed its
        earlier, already quantized ones.
      calibration_dtype: what the matrix products that calibration text goes through
        round their factors to; sums and everything else stay float32. ``bfloat16`` is
        faster where the processor has instructions for it.
      drift_correction: share of the way, 0..1, that weights are moved before they are
        quantized to make up for what quantizing the layers before them did to their
        inputs (`spqr_jax.solver.drift`). Takes part in sequential calibration only,
        and a second, dense forward pass; 0 for none.
      fit: how a group's scale and zero are found. ``search`` looks for the range
        with the least error in the weights as they will be dequantized;
        ``minmax`` takes the range as it is and fits the zero to the rounded
        scale; ``reference`` is the original implementation's min-max, flaws
        included, to reproduce its numbers.
      leave_one_out: leave weights out of a group's fit that fit better alone (the
        paper's outlier candidates). False finds outliers by their rounding error only,
        "simplified outliers" in the original.
      head_bits: code bits of the output head (path ``lm_head``; a tied one is the
        embedding, path ``embed_tokens``, which then serves quantized on both sides),
        2..8; None leaves it dense. See `for_head`.
      target_bits: stored bits a weight that the quantized blocks should come to; what
        widths and outlier thresholds this takes is found by measuring (see
        `spqr_jax.budget`), and `bits` and `outlier_threshold` play no part. None for
        one width and one threshold throughout.
      bit_choices: code bits that a target may be met with; one for that width alone.
      solver: how codes are looked for: ``columns``, the loop that SpQR, GPTQ and
        round-to-nearest are; or one of `BASELINES`, see `baseline`.
      steps: of solvers that go on for as long as one likes: gradient steps, for
        ``brecq`` those of a block, for ``bit-split`` sweeps over a matrix; None for
        `DEFAULT_STEPS`.
      rules: per-layer exceptions, first match wins.
    """

    bits: int = 3
    group_size: int | None = 16
    stats_bits: int = 3
    stats_group_size: int = 16
    outlier_threshold: float = 0.2
    order: Order = "activation"
    damping: float = 0.1
    compensate: bool = True
    sequential: bool = True
    calibration_dtype: CalibrationDtype = "bfloat16"
    drift_correction: float = 0.0
    fit: Fit = "search"
    leave_one_out: bool = True
    head_bits: int | None = None
    target_bits: float | None = None
    bit_choices: tuple[int, ...] = (2, 3, 4)
    solver: Solver = "columns"
    steps: int | None = None
    rules: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "bit_choices", tuple(sorted(set(self.bit_choices))))
        for problem in self._problems():
            raise SpQRError(problem)

    def _problems(self) -> list[str]:
        problems = []
        choices = [("bit_choices", bits) for bits in self.bit_choices]
        head = ("head_bits", self.head_bits)
        for name, bits in [
            ("bits", self.bits),
            head,
            *choices,
            *((f"rule {shown(r.pattern)}: bits", r.bits) for r in self.rules),
        ]:
            if bits is not None and not 2 <= bits <= 8:
                problems.append(f"{name} must lie in 2..8, got {bits}")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            problems.append(f"group_size must be a multiple of 8, or None for one group per row, got {self.group_size}")
        if self.stats_bits != UNQUANTIZED_STATS_BITS and not 2 <= self.stats_bits <= 8:
            problems.append(f"stats_bits must lie in 2..8, or be 16 for 16-bit floats, got {self.stats_bits}")
        if self.stats_group_size < 8 or self.stats_group_size % 8:
            problems.append(f"stats_group_size must be a multiple of 8, got {self.stats_group_size}")
        if not self.outlier_threshold > 0:
            problems.append(f"outlier_threshold must be positive, or inf for no outliers, got {self.outlier_threshold}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            problems.append(f"damping must be a finite number >= 0, got {self.damping}")
        if not 0 <= self.drift_correction <= 1:
            problems.append(f"drift_correction must lie in 0..1, got {self.drift_correction}")
        for name, kind in (("order", Order), ("fit", Fit), ("calibration_dtype", CalibrationDtype), ("solver", Solver)):
            if getattr(self, name) not in get_args(kind):
                problems.append(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if not self.bit_choices:
            problems.append("bit_choices is empty: give at least one bit width")
        if self.target_bits is not None and not (self.compensate and 2 <= self.target_bits <= 16):
            problems.append(
                f"target_bits must lie in 2..16 and needs compensate=True, got {self.target_bits} and "
                f"compensate={self.compensate}"
            )
        if not self.compensate and self.outliers:
            problems.append("outliers need error compensation: with compensate=False, set outlier_threshold=inf")
        return problems + self._baseline_problems()

    def _baseline_problems(self) -> list[str]:
        problems = []
        if self.steps is not None and (self.steps < 1 or self.solver not in DEFAULT_STEPS):
            problems.append(
                f"steps must be at least 1 and works only with the solvers {', '.join(DEFAULT_STEPS)}; got "
                f"steps={self.steps} for {self.solver}"
            )
        if self.solver == "columns":
            return problems
        if self.outliers or self.target_bits is not None:
            problems.append(f"{self.solver} supports neither outliers nor target_bits: set outlier_threshold=inf")
        if self.order != "identity" or not self.compensate or self.corrects_drift:
            problems.append(f"{self.solver} needs order='identity', compensate=True and no drift_correction")
        if self.solver in ("adaquant", "bit-split") and self.quantized_stats:
            problems.append(f"{self.solver} learns its scales as 16-bit floats: set stats_bits=16")
        return problems

    @property
    def outliers(self) -> bool:
        """Whether any weight may be kept apart."""
        return math.isfinite(self.outlier_threshold)

    @property
    def quantized_stats(self) -> bool:
        """Whether scales and zeros are quantized themselves."""
        return self.stats_bits != UNQUANTIZED_STATS_BITS

    @property
    def solver_steps(self) -> int:
        """Steps of a solver that goes on for as long as one likes; 0 for the others."""
        return DEFAULT_STEPS.get(self.solver, 0) if self.steps is None else self.steps

    @property
    def corrects_drift(self) -> bool:
        """Whether weights are moved to make up for drifted inputs."""
        return self.sequential and self.needs_calibration and self.drift_correction > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing needs Hessians, and so calibration text."""
        return self.compensate

    @classmethod
    def preset(cls, name: str = DEFAULT_PRESET, **changes: Any) -> SpQRConfig:
        """One of `PRESETS`, with changes.

        Raises:
          SpQRError: there is no such preset.
        """
        if name not in PRESETS:
            raise SpQRError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def gptq(cls, bits: int = 3, group_size: int | None = 64, **changes: Any) -> SpQRConfig:
        """GPTQ (arXiv 2210.17323): no outliers, no second level, plain min-max groups."""
        base: dict[str, Any] = {"stats_bits": 16, "outlier_threshold": math.inf, "damping": 0.01, "fit": "minmax"}
        return cls(bits=bits, group_size=group_size, **(base | changes))

    @classmethod
    def rtn(cls, bits: int = 3, group_size: int | None = 16, **changes: Any) -> SpQRConfig:
        """Round to nearest: GPTQ without the error compensation, so without calibration."""
        base: dict[str, Any] = {"compensate": False, "order": "identity", "sequential": False}
        return cls.gptq(bits, group_size, **(base | changes))

    @classmethod
    def baseline(cls, solver: Solver, bits: int = 3, group_size: int | None = 64, **changes: Any) -> SpQRConfig:
        """One of `BASELINES`: scales with the least squared error to begin with, no outliers, no second level."""
        base: dict[str, Any] = {"solver": solver, "order": "identity", "fit": "search"}
        return cls.gptq(bits, group_size, **(base | changes))

    @classmethod
    def reference(cls, **changes: Any) -> SpQRConfig:
        """The public PyTorch SpQR's own choices, to reproduce its numbers."""
        base: dict[str, Any] = {"fit": "reference", "sequential": False, "damping": 1.0}
        base |= {"calibration_dtype": "float32"}
        return cls(**(base | changes))

    def for_path(self, path: str) -> SpQRConfig | None:
        """The configuration of the weight at `path`, or None to leave it dense."""
        for rule in self.rules:
            if re.search(rule.pattern, path):
                if rule.skip:
                    return None
                changes: dict[str, Any] = {}
                if rule.bits is not None:
                    changes["bits"] = rule.bits
                if rule.outlier_threshold is not None:
                    changes["outlier_threshold"] = rule.outlier_threshold
                return dataclasses.replace(self, **changes)
        return self

    def for_head(self, path: str) -> SpQRConfig | None:
        """The configuration of the output head at `path`, or None to leave it dense.

        With up to 4 bits the head is treated as any other weight. With more it is
        rounded to nearest in groups of 32: no calibration, no outliers, and with 8
        bits (8.4 stored) no loss that could be measured.
        """
        if self.head_bits is None:
            return None
        base = dataclasses.replace(self, bits=self.head_bits)
        if self.solver == "brecq":  # the head is no block: AdaRound, which BRECQ is within one
            base = dataclasses.replace(base, solver="adaround")
        if self.head_bits > 4:
            base = SpQRConfig.rtn(self.head_bits, 32, fit="search", stats_bits=3, rules=self.rules)
        return base.for_path(path)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary; `from_json` reads it back."""
        values = dataclasses.asdict(self)
        values["rules"] = list(values["rules"])
        values["bit_choices"] = list(values["bit_choices"])
        if not self.outliers:
            values["outlier_threshold"] = None  # JSON has no infinity
        for rule in values["rules"]:
            if rule["outlier_threshold"] == math.inf:
                rule["outlier_threshold"] = "inf"
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], label: str = "the quantization config") -> SpQRConfig:
        """Reads what `to_json` wrote.

        Raises:
          SpQRError: an unknown or unusable entry; names `label`.
        """
        entries = Entries(values if isinstance(values, Mapping) else {"config": values}, label, error=SpQRError)
        if not isinstance(values, Mapping):
            entries.refuse("config", "an object with entries")
        changed = {name: value for name, value in values.items() if name not in ("quantize_head", "rules")}
        if "quantize_head" in values and entries.flag("quantize_head"):  # what `head_bits` was before
            changed["head_bits"] = entries.integer("bits")
        no_outliers = "outlier_threshold" in changed and changed["outlier_threshold"] is None  # JSON has no infinity
        if no_outliers:
            del changed["outlier_threshold"]
        fields = read_fields(cls, changed, label, SpQRError) | ({"outlier_threshold": math.inf} if no_outliers else {})
        if not isinstance(entries.raw("rules") or [], (list, tuple)):
            entries.refuse("rules", "a list")
        with entries.blamed():
            rules = [_rule_from_json(rule, f"{label}: a rule") for rule in entries.raw("rules") or ()]
            return cls(**fields, rules=tuple(rules))


def _rule_from_json(values: Any, label: str) -> LayerRule:
    if isinstance(values, Mapping) and values.get("outlier_threshold") == "inf":
        finite = {name: value for name, value in values.items() if name != "outlier_threshold"}
        return LayerRule(**read_fields(LayerRule, finite, label, SpQRError), outlier_threshold=math.inf)
    return LayerRule(**read_fields(LayerRule, values, label, SpQRError))
