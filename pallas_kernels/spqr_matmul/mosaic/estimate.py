"""What a product in one launch is expected to take on a device: the measure by which `tuning` chooses how to cut it.

The counts are of machine instructions compiled for an H100, see docs/explanation/kernels.md. The estimate is there to
rank plans, not to predict times.
"""

from __future__ import annotations

import math

from pallas_kernels.spqr_matmul.device import Target
from pallas_kernels.spqr_matmul.formats import BLOCKS, STEP_COLUMNS, TILE
from pallas_kernels.spqr_matmul.mosaic.plan import Plan

REGISTERS = 65536
"""Of a multiprocessor, for all its threads."""

RESERVED_SHARED = 2048
"""Bytes of shared memory that a thread block takes beside what a plan counts, at most."""

_ISSUED = 3.2  # instructions of a warp that a multiprocessor issues in a clock: 4 at most
_DEPENDENT = 3.0  # clocks between instructions of a warp that wait for each other
_CLOCKS = 1700.0  # a microsecond
_BANDWIDTH = 23500.0  # bytes a microsecond and multiprocessor, that memory gives to all together
_MOST_BANDWIDTH = 40000.0  # that one multiprocessor loads at most
_UNDER_WAY = 45000.0  # bytes of a multiprocessor, for all of the bandwidth
_OVERLAP = 0.9  # of the instructions, while memory is loaded
_WAIT = 1.2  # microseconds until a thread block's first words are there
_CLUSTER = 0.4  # microseconds that a cluster's barriers take
_OUTLIERS = 0.01  # of the weights


def registers(plan: Plan) -> int:
    """Registers of a thread, about; more than there are would be spilled."""
    words = max(4 * f.width + {6: 10, 16: 8}[f.statistics_words // f.groups] for f in plan.formats)
    sums = 4 * plan.tiles_b * (1 if plan.wide else 2)
    operands = 32 * plan.tiles_b if 1 < plan.n <= 16 else 16
    return 40 + plan.config.depth * words + sums + operands + (90 if plan.scattered else 0)


def early(plan: Plan) -> int:
    """Outliers of a thread that are worth loading ahead: most of those it will have, few where x has many rows."""
    a_thread = _OUTLIERS * plan.part * STEP_COLUMNS * TILE * plan.tiles / plan.threads
    return min(math.ceil(1.3 * a_thread), 12 if plan.n == 1 else 4)


def spills(plan: Plan) -> bool:
    """Whether a thread needs more registers than it can have."""
    return registers(plan) > min(REGISTERS // plan.threads // 8 * 8, 255)


def resident(plan: Plan, target: Target) -> int:
    """Thread blocks that a multiprocessor has at a time."""
    by_registers = REGISTERS // (plan.threads * min(max(registers(plan), 64), REGISTERS // plan.threads))
    return max(1, min(by_registers, target.shared_bytes // (plan.shared_bytes + RESERVED_SHARED)))


def _step_instructions(plan: Plan) -> float:
    """Of one warp for 16 rows and 256 columns."""
    if plan.wide:
        return 300 + 24 * plan.tiles_b + (300 if plan.scattered else 0)
    return 223 if plan.n == 1 else 190 + 106 * plan.tiles_b


def _instructions(plan: Plan) -> float:
    """Of all warps of a thread block."""
    config, warps = plan.config, plan.config.warps
    largest = math.ceil(plan.part / plan.warps_a_row) * math.ceil(plan.n * plan.warps_a_row / warps) * 20 * warps
    prepare = math.ceil(plan.part * BLOCKS * plan.n / plan.threads) * (70 if plan.wide else 110) * warps
    outliers = (
        0 if plan.scattered else _OUTLIERS * plan.part * STEP_COLUMNS * TILE * plan.tiles / 32 * (16 + 6 * plan.n)
    )
    busy = plan.tiles * plan.split
    steps = plan.chunks * math.ceil(plan.chunk / plan.split) * busy * _step_instructions(plan)
    end = math.ceil(TILE * plan.tiles * plan.n / plan.threads) * (40 + 4 * plan.split + 10 * config.cluster) * warps
    return largest + prepare + outliers + steps + end


def microseconds(plan: Plan, target: Target) -> float:
    """The estimate, without the launch itself."""
    config = plan.config
    together = resident(plan, target)
    blocks = config.blocks * config.cluster
    turns = math.ceil(blocks / (target.cores * together))
    a_core = min(together, math.ceil(blocks / target.cores))
    of_block = _instructions(plan) / _CLOCKS
    instructions = max(of_block * a_core / _ISSUED, of_block / (plan.tiles * plan.split) * _DEPENDENT)
    # a step's operand B and, where they are added to weights, its outliers: passes of 128 bytes
    passes = 32 * plan.tiles_b + (140 if plan.scattered else 0) if plan.n > 1 else 8
    shared = plan.part * plan.tiles * passes * a_core / _CLOCKS
    word_bytes = 4 * max(f.step_words for f in plan.formats)
    loaded = plan.part * plan.tiles * word_bytes * a_core / _MOST_BANDWIDTH
    memory = plan.steps * plan.all_tiles * word_bytes / (_BANDWIDTH * target.cores)
    # bandwidth needs enough words under way
    under_way = a_core * config.warps * min(config.depth, math.ceil(plan.part / plan.split)) * word_bytes
    memory *= max(1.0, _UNDER_WAY / under_way)
    work = max(memory, turns * max(loaded, instructions, shared)) + (1 - _OVERLAP) * turns * instructions
    return turns * _WAIT + work + (_CLUSTER if config.cluster > 1 else 0.0)
