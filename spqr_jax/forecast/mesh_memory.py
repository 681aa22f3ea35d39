"""What `spqr quantize --mesh` holds at once: on a device, on the first device of a process, and on a host.

The embedding, the output head and blocks are in host memory. A device holds its rows of a block, its chunks of text
and its panels of Hessians. The first device of each process factors Hessians, and puts matrices together and takes
them apart; the others hold no more than it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from spqr_jax.config import SpQRConfig
from spqr_jax.forecast.memory_plan import (
    ACCELERATOR_DEVICE,
    BLOCKED_HOST,
    COLUMN_BYTES,
    FLOAT32,
    OUTER_COPIES,
    ROUND_BYTES,
    Layout,
    MemoryPlan,
    Parts,
    Thrift,
    accelerator_host,
    activation_parts,
    all_of,
    chunk_bytes,
    chunk_tokens,
    disk_bytes,
    factor_bytes,
    gradient_bytes,
    is_blocked,
    largest_block,
    one_device_phases,
    program_bytes,
    widest_input,
)
from spqr_jax.forecast.passes import Text, block_sizes, outer_weights
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import STAGES
from spqr_jax.solver.hessian import gram_panels
from spqr_jax.solver.mesh_columns import ROWS_AT_ONCE
from spqr_jax.stream.stages import stage_groups
from spqr_jax.tune.config import TuneConfig

_PASSED_CHUNKS = 2  # of inputs that go round among devices: the one at hand, and the one that is sent
_BLOCKS = 2  # of which a device has its rows: the one at hand, and the one with the weights that were solved last
_SIDE_BY_SIDE = 3  # copies in float32 of matrices that read one input: transposed, in the order of visit, joined
_LIST_BYTES = 15  # a weight of a matrix whose outliers are listed
_JUDGED = 3  # copies in float32 of a matrix whose error is computed: dequantized, dense, and a product with the Hessian
_HOST_BYTES = 17  # a weight that is solved: float32, its results, and what it dequantizes to


class _Matrices(NamedTuple):
    """Matrices that read one input: their rows, all of them and of the largest; and inputs."""

    rows: int
    largest: int
    width: int


def plan_mesh_memory(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    tuning: TuneConfig | None,
    itemsize: int,
    layout: Layout,
    thrift: Thrift = Thrift(),
    result_bytes: float = 0.0,
) -> MemoryPlan:
    """As `plan_memory`, for several devices."""
    disk = disk_bytes(model, config, text, tuning, itemsize, thrift, result_bytes)
    device = _device_phases(model, config, text, tuning, itemsize, layout, thrift)
    solved = _HOST_BYTES * max(matrices.rows * matrices.width for matrices in _all_matrices(model, config))
    programs = program_bytes(config, tuning)
    phase = max(device, key=lambda name: all_of(device[name]))
    host: Parts
    if layout.on_host:
        host = {"runtime and programs": programs, "embedding and head": OUTER_COPIES * outer_weights(model) * itemsize}
        host |= {"blocks in host memory": 2.0 * itemsize * largest_block(model), "solved weights": float(solved)}
        times = {name: layout.local_devices * size for name, size in device[phase].items()}
        return MemoryPlan({**host, **times}, {}, disk, phase)
    host = accelerator_host(model, config, text, itemsize, layout, thrift, programs)
    host["solved weights"] = float(solved)
    if config.needs_calibration:
        copies = (
            BLOCKED_HOST if is_blocked(widest_input(model), _room(model, config, text, itemsize, layout, thrift)) else 2
        )
        host["Hessian"] = float(copies * FLOAT32 * widest_input(model) ** 2)
    return MemoryPlan(host, {"runtime and programs": ACCELERATOR_DEVICE, **device[phase]}, disk, phase)


def _held(model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int, layout: Layout, thrift: Thrift) -> Parts:
    """What a device holds throughout the blocks."""
    copies = _BLOCKS * (2 if config.corrects_drift else 1)
    held: Parts = {"blocks": copies * largest_block(model) * itemsize / layout.devices}
    if config.needs_calibration:
        held |= activation_parts(model, config, text, itemsize, layout, thrift)
    return held


def _room(model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int, layout: Layout, thrift: Thrift) -> float:
    """Bytes of a device that a factorization may take."""
    if layout.device_memory is None:
        return math.inf
    return layout.device_memory - all_of(_held(model, config, text, itemsize, layout, thrift))


def _device_phases(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    tuning: TuneConfig | None,
    itemsize: int,
    layout: Layout,
    thrift: Thrift,
) -> dict[str, Parts]:
    """What the first device of a process holds in each phase."""
    held = _held(model, config, text, itemsize, layout, thrift)
    room = _room(model, config, text, itemsize, layout, thrift)
    stages = [(kind, stage) for kind in set(model.kinds) for stage in range(len(STAGES))]
    phases: dict[str, Parts] = {}
    if config.needs_calibration:
        calibrating = [_calibrating(model, config, text, itemsize, layout, thrift, *where) for where in stages]
        phases["calibrating"] = held | max(calibrating, key=all_of)
    solving: list[Parts] = []
    for kind, stage in stages:
        sums = _sums(model, config, layout, thrift, kind, stage) if config.needs_calibration else 0.0
        for matrices in _matrices(model, kind, stage):
            solving.append({"Hessians": sums, **_solving(matrices, config, itemsize, layout, room)})
    phases["solving"] = held | max(solving, key=all_of)
    if config.solver == "brecq":
        phases["solving"]["gradients"] = gradient_bytes(model, chunk_tokens(text, thrift))
    if (head := config.for_head(model.head_path)) is not None:
        matrix = _Matrices(model.vocab_size, model.vocab_size, model.hidden_size)
        activations = {name: size for name, size in held.items() if name == "activations" and head.needs_calibration}
        phases["output head"] = {**activations, **_solving(matrix, head, itemsize, layout, room)}
    alone = one_device_phases(model, config, text, tuning, itemsize, Layout(), thrift)
    return phases | {name: parts for name, parts in alone.items() if name in ("planning", "tuning")}


# ---- parts ----------------------------------------------------------------------------------


def _matrices(model: DecoderConfig, kind: BlockKind, stage: int) -> list[_Matrices]:
    shapes = block_sizes(model, kind)
    groups = [([shapes[name][0] for name in names], width) for names, width in stage_groups(model, kind, stage)]
    return [_Matrices(sum(rows), max(rows), width) for rows, width in groups]


def _all_matrices(model: DecoderConfig, config: SpQRConfig) -> list[_Matrices]:
    """Of blocks and the head."""
    stages = [(kind, stage) for kind in set(model.kinds) for stage in range(len(STAGES))]
    matrices = [matrices for where in stages for matrices in _matrices(model, *where)]
    if config.for_head(model.head_path) is not None:
        matrices.append(_Matrices(model.vocab_size, model.vocab_size, model.hidden_size))
    return matrices


def _sums(
    model: DecoderConfig, config: SpQRConfig, layout: Layout, thrift: Thrift, kind: BlockKind, stage: int
) -> float:
    """Sums of a stage's Hessians: panels of each, or whole Hessians of experts by turns; and as many of drift."""
    groups, copies = stage_groups(model, kind, stage), 2 if config.corrects_drift else 1
    if not groups[0][0][0].startswith("experts."):
        panels = (-(-len(gram_panels(width)) // layout.devices) * gram_panels(width)[0][1] for _, width in groups)
        return float(copies * FLOAT32 * sum(rows * width for rows, (_, width) in zip(panels, groups, strict=True)))
    hessian = FLOAT32 * groups[0][1] ** 2
    together = min(len(groups), max(1, thrift.hessian_bytes * layout.devices // hessian))
    return float(copies * hessian * -(-together // layout.devices))


def _calibrating(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    itemsize: int,
    layout: Layout,
    thrift: Thrift,
    kind: BlockKind,
    stage: int,
) -> Parts:
    """A stage's matrices are whole on a device while a chunk passes them."""
    matrices = _matrices(model, kind, stage)
    width = max(matrix.width for matrix in matrices)
    return {
        "matrices of a stage": float(itemsize * sum(matrix.rows * matrix.width for matrix in matrices)),
        "one chunk": chunk_bytes(model, text, thrift),
        "Hessians": _sums(model, config, layout, thrift, kind, stage),
        "inputs from other devices": float(_PASSED_CHUNKS * FLOAT32 * chunk_tokens(text, thrift) * width),
    }


def _solving(matrices: _Matrices, config: SpQRConfig, itemsize: int, layout: Layout, room: float) -> Parts:
    """The largest step of the first device: factorization, or what follows while a Hessian and its factor are held."""
    rows, largest, width = matrices
    rows_at_once = min(rows, -(-rows // layout.devices)) if layout.on_host else ROWS_AT_ONCE
    calibrated = config.needs_calibration
    steps = {
        "column loop": float((COLUMN_BYTES if calibrated else ROUND_BYTES) * rows_at_once * width),
        "outlier list": float(_LIST_BYTES * largest * width) if calibrated and config.outliers else 0.0,
        "output error": float((itemsize + FLOAT32 * (_JUDGED if calibrated else 1)) * largest * width),
    }
    if not calibrated:
        name = max(steps, key=lambda step: steps[step])
        return {name: steps[name]}
    steps["matrices side by side"] = float((itemsize + (_SIDE_BY_SIDE - 1) * FLOAT32) * rows * width)
    held, factor = FLOAT32 * (2.0 * width**2 + rows * width), factor_bytes(width, room)
    name = max(steps, key=lambda step: steps[step])
    if factor > held + steps[name]:
        return {"factorization": factor}
    return {"Hessian, factor and weights": held, name: steps[name]}
