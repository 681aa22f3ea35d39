"""Sensitivities of a whole model, block by block."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.analysis.sensitivity_map import line_pooled, sensitivity_map
from spqr_jax.analysis.structure import HeadAxis, Structures, find_structures
from spqr_jax.config import SpQRConfig
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import STAGES, Block, matrix_names
from spqr_jax.solver.hessian import quadratic_form
from spqr_jax.solver.solve import factor_hessian
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.stages import rounded_linear

_MAP_CELLS = 192  # cells of a map's longer side
_quadratic_form = jax.jit(quadratic_form)
COLUMN_BINS = 32
"""Parts that a matrix's columns are cut into for `WeightAnalysis.by_column`."""


@dataclasses.dataclass(frozen=True)
class WeightAnalysis:
    """Of one matrix.

    Attributes:
      path: such as ``layers.3.q_proj``.
      shape: (out, in).
      cost: the sum of all its weights' sensitivities, as a share of ‖W X‖²: what rounding
        them all would cost if nothing made up for it but for each weight alone.
      structures: patterns among the costliest.
      by_column: share of the cost in each of `COLUMN_BINS` parts of the columns, in the
        order in which the solver visits them.
      sensitivity_map: float32, line-pooled; None if no map of it was asked for.
    """

    path: str
    shape: tuple[int, int]
    cost: float
    structures: Structures
    by_column: tuple[float, ...]
    sensitivity_map: np.ndarray | None = None

    @property
    def block(self) -> int:
        """Index of its block."""
        return int(self.path.split(".")[1])

    @property
    def kind(self) -> str:
        """Its name within the block."""
        return self.path.split(".", 2)[2]


@dataclasses.dataclass(frozen=True)
class ModelAnalysis:
    """Of all matrices of a model's blocks, in their order."""

    weights: tuple[WeightAnalysis, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-serializable, without the maps; `from_json` reads it back."""
        return {
            "weights": [
                {name: value for name, value in dataclasses.asdict(weight).items() if name != "sensitivity_map"}
                for weight in self.weights
            ]
        }

    def maps(self) -> dict[str, np.ndarray]:
        """The maps there are, by path."""
        return {weight.path: weight.sensitivity_map for weight in self.weights if weight.sensitivity_map is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any], maps: dict[str, np.ndarray]) -> ModelAnalysis:
        """Reads what `to_json` and `maps` gave."""
        weights = []
        for entry in values["weights"]:
            found: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in entry["structures"].items()}
            weights.append(
                WeightAnalysis(
                    entry["path"],
                    (entry["shape"][0], entry["shape"][1]),
                    entry["cost"],
                    Structures(**found),
                    tuple(entry["by_column"]),
                    maps.get(entry["path"]),
                )
            )
        return cls(tuple(weights))


def analyze(
    source: BlockSource,
    batches: Iterable[Any],
    config: SpQRConfig,
    *,
    maps: str = "",
    events: Events = ignore,
) -> ModelAnalysis:
    """Sensitivities and patterns of every matrix that `config` would quantize, on the dense model's activations.

    Args:
      source: the dense model, read one block at a time.
      batches: int32 [batch, seq] of token ids.
      config: how it would be quantized.
      maps: regular expression; matrices whose path it matches get a map. The first, middle
        and last block's if empty.
      events: told of each matrix, as phase "analyzing".
    """
    model = source.config
    activations = Activations(model, source.outer(), batches, rounded_linear)
    with_map = re.compile(maps or default_maps(model.num_layers))
    paths = [f"layers.{index}.{name}" for index, kind in enumerate(model.kinds) for name in matrix_names(model, kind)]
    steps = Steps("analyzing", sum(config.for_path(path) is not None for path in paths), events)
    weights: list[WeightAnalysis] = []

    def visit(index: int, block: Block) -> None:
        for weight in _analyze_block(model, activations, index, block, config, with_map):
            weights.append(weight)
            steps.advance(note=weight.path)

    sweep.forward(source, visit)
    return ModelAnalysis(tuple(weights))


def default_maps(blocks: int) -> str:
    """A pattern for the first, middle and last block's matrices."""
    chosen = sorted({0, blocks // 2, blocks - 1})
    return rf"^layers\.({'|'.join(map(str, chosen))})\."


def _analyze_block(
    model: DecoderConfig,
    activations: Activations,
    index: int,
    block: Block,
    config: SpQRConfig,
    with_map: re.Pattern[str],
) -> Iterator[WeightAnalysis]:
    for stage in range(len(STAGES)):
        for names, hessian, _ in activations.calibrate(stage, block):
            factors: dict[tuple[str, float, int], Any] = {}
            matrix = hessian.matrix()
            for name in names:
                path = f"layers.{index}.{name}"
                own = config.for_path(path)
                if own is None:
                    continue
                key = (own.order, own.damping, own.input_shards)
                factor = factors.setdefault(key, None) or factor_hessian(matrix, own)
                factors[key] = factor
                w = block[name].astype(jnp.float32)
                costs = sensitivity_map(w, factor, own)
                dense = 0.5 * float(_quadratic_form(w, matrix))
                axis, rotary = _heads_of(model, name)
                ordered = costs if factor.perm is None else costs[:, np.asarray(factor.perm)]
                yield WeightAnalysis(
                    path,
                    (int(w.shape[0]), int(w.shape[1])),
                    float(costs.sum(dtype=np.float64)) / dense if dense > 0 else 0.0,
                    find_structures(costs, head_dim=model.head_dim, head_axis=axis, rotary=rotary),
                    _by_column(ordered),
                    _map(costs) if with_map.search(path) else None,
                )
        activations.advance(stage, block)


def _heads_of(model: DecoderConfig, name: str) -> tuple[HeadAxis | None, bool]:
    """Along which axis a matrix's attention heads lie, and whether rotary embedding turns its rows."""
    if name in ("q_proj", "k_proj"):
        return "rows", model.rope_theta is not None and model.rotated == model.head_dim
    if name == "v_proj":
        return "rows", False
    return ("columns", False) if name == "o_proj" else (None, False)


def _by_column(costs: np.ndarray) -> tuple[float, ...]:
    columns = costs.sum(axis=0, dtype=np.float64)
    total = columns.sum()
    parts = np.array_split(columns, COLUMN_BINS)
    return tuple(float(part.sum() / total) if total > 0 else 0.0 for part in parts)


def _map(costs: np.ndarray) -> np.ndarray:
    out, inner = costs.shape
    scale = min(1.0, _MAP_CELLS / max(out, inner))
    return line_pooled(costs, max(1, round(scale * out)), max(1, round(scale * inner)))
