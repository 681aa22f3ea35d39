"""Seconds of `spqr quantize` on devices that are not here: operations and bytes counted, divided by published rates.

No device was measured. Reading and writing on the host was, on one core. Each part says how it is shared among
devices: the text's chunks and a Hessian's panels of columns among all, a matrix's rows in whole pieces of 512,
factorizations not at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import NamedTuple

from spqr_jax.config import SpQRConfig
from spqr_jax.forecast.machines import Cluster
from spqr_jax.forecast.memory_plan import CHUNK_TOKENS, PACKED_BYTES, is_blocked
from spqr_jax.forecast.passes import (
    Text,
    Work,
    block_sizes,
    block_total,
    expert_share,
    gram_operations,
    input_groups,
    kind_counts,
    model_weights,
    outer_weights,
)
from spqr_jax.forecast.quantizing import calibration_work, head_work, plan_work, rounds, solver_work, tuning_work
from spqr_jax.models.config import DecoderConfig
from spqr_jax.solver import mesh_columns
from spqr_jax.solver.blocked_factor import PANEL as BLOCKED_PANEL
from spqr_jax.solver.hessian import gram_panels
from spqr_jax.tune.config import TuneConfig

ROWS_AT_ONCE = 4096
"""Rows of a matrix that an accelerator solves together, as in `spqr_jax.solver.columns`."""
JAX_SHARE = 0.75
"""Of a GPU's memory, which JAX takes at its start."""
PANEL = 128
"""Columns of a panel of the loop, as there."""
PANEL_LAUNCHES = 258
"""Kernels of a panel: 8263 for the 32 panels of 4096x4096, counted in the compiled programs (performance.md)."""
# Assumed: parts of the published rates that kinds of work reach.
_REACHED = {"dense": 0.6, "bfloat16": 0.6, "float32": 0.7, "gram": 0.7, "rounded_gram": 0.7, "attention": 0.15}
_FACTOR_REACHED = {"gpu": 0.3, "tpu": 0.1}
_DISK = 1e9  # bytes per second to and from a host's disk; assumed
_HOST_SECONDS_A_WEIGHT = 8.4e-9  # to read (2.3) and to pack and write (6.1) it; measured on one core (AMD, Zen 4)
_MESH_SECONDS_A_WEIGHT = 0.8e-9  # to take over a mesh's results; measured on one core, in memory that was used before
_RESULT_BYTES = 8  # a solved weight: code, value, residual, flag
_MOVED_BYTES = 20.4  # of a weight: results (8) to the host; value twice, code and outliers (12) back; packed (0.4)
_SOLVED_AGAIN = 1.6  # times that weights are solved to keep to a target, as in `quantizing.py`

Costs = dict[str, float]
"""Seconds by what they are for."""


def cluster_costs(
    model: DecoderConfig, config: SpQRConfig, text: Text, tuning: TuneConfig | None, cluster: Cluster, dtype: str
) -> tuple[Costs, Costs]:
    """Seconds of the whole run, and of one of its blocks (the mean), part by part."""
    itemsize = 4 if dtype == "float32" else 2
    waves = _waves(text, cluster.devices)
    blocks: Costs = {}
    if config.needs_calibration:
        work = calibration_work(model, config, text)
        forward = dataclasses.replace(work, gram=0.0, rounded_gram=0.0)
        blocks["forward passes"] = waves * _seconds(forward, cluster, dtype)
        blocks["Hessians"] = _gram_seconds(model, config, text, cluster)
        solver = solver_work(model, config, text)
        blocks["factorization"] = _seconds(Work(factor=solver.factor), cluster, dtype)  # every device does all
        blocks["between devices"] = _exchanged_bytes(model, config, text, cluster, itemsize) / cluster.link
        if cluster.devices > 1:
            blocks["between host and devices"] = _bus_bytes(model, cluster, itemsize) / cluster.device.from_host
        blocks["column loop"] = _loop_seconds(model, config, cluster)
    weights = block_total(model)
    blocks["reading and writing"] = _host_seconds(weights, itemsize, cluster)
    whole = dict(blocks)
    if config.target_bits is not None:
        plan = dataclasses.replace(plan_work(model, config, text), searched=0.0, plain=0.0)
        trials = _loop_seconds(model, config, dataclasses.replace(cluster, devices=1)) / _SOLVED_AGAIN
        reading = 2 * weights * itemsize / _DISK
        whole["planning"] = _seconds(plan, cluster, dtype) + trials + reading
    whole["output head"] = _seconds(head_work(model, config, text), cluster, dtype) + _host_seconds(
        outer_weights(model), itemsize, cluster
    )
    if tuning is not None:
        whole["tuning"] = waves * _seconds(tuning_work(model, tuning, text), cluster, dtype)
    return whole, {name: cost / model.num_layers for name, cost in blocks.items()}


def _waves(text: Text, devices: int) -> float:
    """Part of the time of one device that chunks take on several: a device without a chunk waits."""
    chunks = _chunks(text)
    return math.ceil(chunks / devices) / chunks


def _chunks(text: Text) -> int:
    return max(1, math.ceil(text.windows / max(1, CHUNK_TOKENS // max(text.seqlen, 1))))


def _seconds(work: Work, cluster: Cluster, dtype: str) -> float:
    """Of products on one device; weights that are visited, read or written are counted elsewhere."""
    device = cluster.device
    rates = {"bfloat16": device.bfloat16, "float32": device.float32}
    of_weights = rates["float32" if dtype == "float32" else "bfloat16"]
    by_kind = {
        "dense": of_weights,
        "bfloat16": device.bfloat16,
        "rounded_gram": device.bfloat16,
        "attention": of_weights,
    }
    reached = _REACHED | {"factor": _FACTOR_REACHED[device.platform]}
    return sum(getattr(work, kind) / (part * by_kind.get(kind, device.float32)) for kind, part in reached.items())


class _Group(NamedTuple):
    """Matrices that read one input: `times` that such a group is in the model, their rows together, the input's width,
    and the part of the tokens that passes them."""

    times: int
    rows: int
    width: int
    share: float


def _groups(model: DecoderConfig) -> list[_Group]:
    counts: Counter[tuple[int, int, float]] = Counter()
    for kind, count in kind_counts(model):
        shapes = block_sizes(model, kind)
        for names, width in input_groups(model, kind):
            counts[sum(shapes[name][0] for name in names), width, expert_share(model, names[0])] += count
    return [_Group(count, *group) for group, count in counts.items()]


def _gram_seconds(model: DecoderConfig, config: SpQRConfig, text: Text, cluster: Cluster) -> float:
    """Panels of columns, each from the diagonal on; no more devices work than there are panels."""
    total = 0.0
    rate = cluster.device.bfloat16 if rounds(config) else cluster.device.float32
    for count, _, width, share in _groups(model):
        panels = len(gram_panels(width))
        of_one = math.ceil(panels / cluster.devices) / panels  # panels of the device that has the most
        operations = gram_operations(width, 1) + (2.0 * width**2 if config.corrects_drift else 0.0)
        total += count * share * text.tokens * operations * of_one / (_REACHED["gram"] * rate)
    return total


def _loop_seconds(model: DecoderConfig, config: SpQRConfig, cluster: Cluster) -> float:
    """The column loops: kernels that are launched one after the other, and the products of panels."""
    total = 0.0
    for count, rows, width, _ in _groups(model):
        at_once = ROWS_AT_ONCE if cluster.devices == 1 else mesh_columns.ROWS_AT_ONCE
        pieces = math.ceil(rows / (at_once * cluster.devices))
        launches = pieces * math.ceil(width / PANEL) * PANEL_LAUNCHES
        products = 2.0 * pieces * at_once * width**2 / (_REACHED["float32"] * cluster.device.float32)
        total += count * (launches * cluster.device.launch + products)
    return total * (_SOLVED_AGAIN if config.target_bits is not None else 1.0)


def _exchanged_bytes(model: DecoderConfig, config: SpQRConfig, text: Text, cluster: Cluster, itemsize: int) -> float:
    """What a device receives: inputs of all chunks, a block's rows for each wave of chunks, and factors of Hessians;
    with several hosts also panels of Hessians, and rows of results. Nothing on one device."""
    total, waves = 0.0, math.ceil(_chunks(text) / cluster.devices)
    for count, rows, width, share in _groups(model):
        inputs = share * text.tokens * width * itemsize
        of_hosts = 4.0 * width**2 + _RESULT_BYTES * rows * width if cluster.hosts > 1 else 0.0
        total += count * (inputs + waves * itemsize * rows * width + 4.0 * width**2 + of_hosts)
    return total * (cluster.devices - 1) / cluster.devices * (2 if config.corrects_drift else 1)


def _bus_bytes(model: DecoderConfig, cluster: Cluster, itemsize: int) -> float:
    """Between a host and its first device, on a mesh: weights before and after their columns are solved, and Hessians.

    A Hessian that is factored through host memory passes once for each of its panels.
    """
    total = 0.0
    for count, rows, width, _ in _groups(model):
        matrices = 2.0  # the Hessian's panels, and the Hessian
        if is_blocked(width, JAX_SHARE * cluster.device.memory):
            matrices += 4.0 + math.ceil(width / BLOCKED_PANEL)
        total += count * (matrices * 4.0 * width**2 + (_MOVED_BYTES + 2 * itemsize) * rows * width)
    return total


def _host_seconds(weights: float, itemsize: int, cluster: Cluster) -> float:
    """Weights from the disk to a host's devices, each its rows; packed and written to the disk again."""
    to_devices = itemsize / (cluster.device.from_host * cluster.hosts)
    on_host = _HOST_SECONDS_A_WEIGHT + _MESH_SECONDS_A_WEIGHT * (cluster.devices > 1)
    return weights * ((itemsize + PACKED_BYTES) / _DISK + to_devices + on_host)


def model_bytes(model: DecoderConfig, itemsize: int) -> float:
    """Of a dense model."""
    return float(model_weights(model) * itemsize)
