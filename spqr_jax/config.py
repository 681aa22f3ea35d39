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

from spqr_jax._compat import multiplies_bfloat16
from spqr_jax.errors import SpQRError
from spqr_jax.files.entries import Entries, shown
from spqr_jax.files.fields import read_fields
from spqr_jax.rules import LayerRule

Order = Literal["activation", "identity"]
Fit = Literal["search", "minmax", "reference"]
CalibrationDtype = Literal["auto", "bfloat16", "float32"]
Solver = Literal["columns", "obq", "adaround", "adaquant", "bit-split", "brecq"]

UNQUANTIZED_STATS_BITS = 16
"""`stats_bits` of a model whose scales and zeros are kept as 16-bit floats."""


BASELINES = tuple(solver for solver in get_args(Solver) if solver != "columns")
"""Other methods' ways to look for codes, to compare with (`spqr_jax.methods`, `spqr_jax.methods.brecq`)."""

SHARED_INPUTS = ("o_proj", "down_proj")
"""Ends of the paths of weights whose inputs devices share when several generate together."""

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
class SpQRConfig:
    """How a model is quantized. The defaults are SpQR with 3-bit codes and one outlier threshold; see also `preset`.

    Attributes:
      bits: bits of a weight code, 2..8.
      group_size: consecutive inputs that share one scale and zero point (beta1 in the paper), a multiple of 8. None for
        one group per output row.
      stats_bits: bits of a quantized scale or zero point, 2..8. 16 keeps both as 16-bit floats (no second level).
      stats_group_size: consecutive output rows that share one second-level fit (beta2 in the paper), a multiple of 8.
      outlier_threshold: relative threshold tau; a weight above it is kept as an outlier. ``math.inf`` for no outliers.
      order: ``activation`` quantizes inputs in order of falling mean square activation, ``identity`` in their original
        order.
      input_shards: number of equal ranges of inputs of ``o_proj`` and ``down_proj`` that are ordered each by itself,
        range after range. Up to so many devices can then share these matrices (`spqr_jax.shard`): their number must
        divide it. 1 orders all inputs together. It has no effect with ``order="identity"``, which any number of
        devices can share.
      damping: added to the Hessian's diagonal, relative to the mean of the diagonal.
      compensate: correct each column's rounding error in the columns that are not quantized yet. False is
        round-to-nearest, which needs no calibration text.
      sequential: calibrate the later weights of a block on activations that passed through its earlier, already
        quantized weights.
      calibration_dtype: type to which matrix products round their factors when calibration text passes through the
        model, Hessians included. Sums and everything else stay float32. ``bfloat16`` is faster if the processor has
        instructions for it, ``float32`` if not; ``auto`` is the faster one (see `resolved`).
      drift_correction: 0..1. Before a weight is quantized, move it this far towards making up for the changed inputs
        that quantizing the earlier layers caused (`spqr_jax.solver.drift`). It works with sequential calibration only
        and needs a second, dense forward pass. 0 for none.
      fit: how the scale and zero point of a group are found. ``search`` looks for the range with the least error of the
        dequantized weights. ``minmax`` takes the full range and fits the zero point to the rounded scale.
        ``reference`` is the min-max of the original implementation, flaws included, to reproduce its numbers.
      leave_one_out: leave a weight out of its group's fit if the group fits better without it (the paper's outlier
        candidates). False finds outliers by their rounding error only ("simplified outliers" in the original).
      head_bits: bits of a code of the output head, 2..8; None leaves it dense. Its path is ``lm_head``. A tied head is
        the embedding, path ``embed_tokens``, which then serves quantized on both sides. See `for_head`.
      target_bits: stored bits per weight of the quantized blocks. Bits and outlier thresholds of all weights are then
        chosen by measurement, and ``bits`` and ``outlier_threshold`` have no effect. None for one width and one
        threshold.
      bit_choices: widths of codes, in bits, to choose from for ``target_bits``.
      solver: how codes are found. ``columns`` is the loop of SpQR, GPTQ and round-to-nearest. The others are methods to
        compare with, see `baseline`.
      steps: number of steps of an iterative solver. For ``adaround`` and ``adaquant``: gradient steps (300 by default);
        for ``brecq``: gradient steps of a block (100); for ``bit-split``: sweeps over a matrix (4). None for the
        default.
      rules: exceptions for some weights. The first rule that matches is used.

    Raises:
      SpQRError: a value is out of range, or values contradict each other.

    Example:
      >>> more_bits = spqr_jax.LayerRule("down_proj", bits=4)
      >>> stays_dense = spqr_jax.LayerRule("layers.0.", skip=True)
      >>> config = spqr_jax.SpQRConfig(bits=3, rules=(stays_dense, more_bits))
      >>> config.for_path("layers.1.down_proj").bits
      4
      >>> config.for_path("layers.0.q_proj") is None
      True
    """

    bits: int = 3
    group_size: int | None = 16
    stats_bits: int = 3
    stats_group_size: int = 16
    outlier_threshold: float = 0.2
    order: Order = "activation"
    input_shards: int = 1
    damping: float = 0.1
    compensate: bool = True
    sequential: bool = True
    calibration_dtype: CalibrationDtype = "auto"
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
        if self.input_shards < 1:
            problems.append(f"input_shards must be at least 1, got {self.input_shards}")
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
        """Whether there may be outliers."""
        return math.isfinite(self.outlier_threshold)

    @property
    def quantized_stats(self) -> bool:
        """Whether scales and zero points are quantized too."""
        return self.stats_bits != UNQUANTIZED_STATS_BITS

    @property
    def solver_steps(self) -> int:
        """Number of steps of an iterative solver; 0 for the others."""
        return DEFAULT_STEPS.get(self.solver, 0) if self.steps is None else self.steps

    @property
    def corrects_drift(self) -> bool:
        """Whether weights are moved to make up for changed inputs."""
        return self.sequential and self.needs_calibration and self.drift_correction > 0

    @property
    def needs_calibration(self) -> bool:
        """Whether the method needs calibration text."""
        return self.compensate

    def resolved(self) -> SpQRConfig:
        """The same configuration, with the type that this device multiplies faster for ``calibration_dtype="auto"``."""
        if self.calibration_dtype != "auto":
            return self
        return dataclasses.replace(self, calibration_dtype="bfloat16" if multiplies_bfloat16() else "float32")

    @classmethod
    def preset(cls, name: str = DEFAULT_PRESET, **changes: Any) -> SpQRConfig:
        """A tested point between size and quality.

        Each preset sets ``target_bits``, the stored bits per weight of the blocks, and an 8-bit output head:

        * ``near-lossless``: 4.75 bits, with 4-bit codes only;
        * ``4bit``: 4.3 bits;
        * ``3bit``: 3.75 bits;
        * ``smallest``: 3.25 bits.

        Args:
          name: of the preset.
          changes: other values for attributes of `SpQRConfig`.

        Raises:
          SpQRError: there is no such preset, or a change cannot be used.

        Example:
          >>> spqr_jax.SpQRConfig.preset("3bit").target_bits
          3.75
          >>> spqr_jax.SpQRConfig.preset("3bit", head_bits=4).head_bits
          4
        """
        if name not in PRESETS:
            raise SpQRError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def gptq(cls, bits: int = 3, group_size: int | None = 64, **changes: Any) -> SpQRConfig:
        """GPTQ (arXiv 2210.17323): no outliers, no second level, min-max groups.

        Args:
          bits: bits of a weight code.
          group_size: consecutive inputs that share one scale and zero point; None for one group per row.
          changes: other values for attributes of `SpQRConfig`.

        Raises:
          SpQRError: a value cannot be used.
        """
        base: dict[str, Any] = {"stats_bits": 16, "outlier_threshold": math.inf, "damping": 0.01, "fit": "minmax"}
        return cls(bits=bits, group_size=group_size, **(base | changes))

    @classmethod
    def rtn(cls, bits: int = 3, group_size: int | None = 16, **changes: Any) -> SpQRConfig:
        """Round-to-nearest: GPTQ without error compensation. It needs no calibration text.

        Args:
          bits: bits of a weight code.
          group_size: consecutive inputs that share one scale and zero point; None for one group per row.
          changes: other values for attributes of `SpQRConfig`.

        Raises:
          SpQRError: a value cannot be used.
        """
        base: dict[str, Any] = {"compensate": False, "order": "identity", "sequential": False}
        return cls.gptq(bits, group_size, **(base | changes))

    @classmethod
    def baseline(cls, solver: Solver, bits: int = 3, group_size: int | None = 64, **changes: Any) -> SpQRConfig:
        """Another method to compare with. It starts from scales with the least squared error of the weights.

        There are no outliers and no second level.

        Args:
          solver: ``obq`` (arXiv 2208.11580), ``adaround`` (arXiv 2004.10568), ``adaquant`` (arXiv 2006.10518),
            ``bit-split`` or ``brecq`` (arXiv 2102.05426).
          bits: bits of a weight code.
          group_size: consecutive inputs that share one scale and zero point; None for one group per row.
          changes: other values for attributes of `SpQRConfig`.

        Raises:
          SpQRError: a value cannot be used.
        """
        base: dict[str, Any] = {"solver": solver, "order": "identity", "fit": "search"}
        return cls.gptq(bits, group_size, **(base | changes))

    @classmethod
    def reference(cls, **changes: Any) -> SpQRConfig:
        """The choices of the public PyTorch implementation of SpQR, to reproduce its numbers.

        Args:
          changes: other values for attributes of `SpQRConfig`.

        Raises:
          SpQRError: a value cannot be used.
        """
        base: dict[str, Any] = {"fit": "reference", "sequential": False, "damping": 1.0}
        base |= {"calibration_dtype": "float32"}
        return cls(**(base | changes))

    def for_path(self, path: str) -> SpQRConfig | None:
        """The configuration of one weight, after the rules.

        Args:
          path: of the weight, such as ``layers.3.down_proj``.

        Returns:
          The configuration; None to leave the weight dense.
        """
        for rule in self.rules:
            if re.search(rule.pattern, path):
                if rule.skip:
                    return None
                changes: dict[str, Any] = {}
                if rule.bits is not None:
                    changes["bits"] = rule.bits
                if rule.outlier_threshold is not None:
                    changes["outlier_threshold"] = rule.outlier_threshold
                return dataclasses.replace(self.for_inputs(path), **changes)
        return self.for_inputs(path)

    def for_inputs(self, path: str) -> SpQRConfig:
        """The configuration with `input_shards` 1, unless the weight at `path` reads inputs that devices share."""
        if self.input_shards == 1 or path.endswith(SHARED_INPUTS):
            return self
        return dataclasses.replace(self, input_shards=1)

    def for_head(self, path: str) -> SpQRConfig | None:
        """The configuration of the output head, after the rules.

        Up to 4 bits, the head is treated as any other weight. With more bits it is rounded to nearest in groups of 32,
        without calibration and outliers. With 8 bits (8.4 stored) the loss was too small to measure.

        Args:
          path: of the head, ``lm_head`` or ``embed_tokens``.

        Returns:
          The configuration; None to leave the head dense.
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
        """A dictionary of JSON values. `from_json` reads it back."""
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
        """Reads the result of `to_json`.

        Args:
          values: the dictionary.
          label: name of the source in error messages.

        Raises:
          SpQRError: an entry is unknown or cannot be used.
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
