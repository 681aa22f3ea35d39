"""How a product is cut on a device: what was measured there if anything was, else a rule.

`tuned.json` beside this file maps device kind, kernel and problem to a configuration. The
rules fill a GPU. `mosaic_config` takes the cut that `mosaic.estimate` expects to be fastest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallas_kernels.spqr_matmul import lanes, rows
from pallas_kernels.spqr_matmul.device import Target
from pallas_kernels.spqr_matmul.formats import TILE
from pallas_kernels.spqr_matmul.mosaic import estimate
from pallas_kernels.spqr_matmul.mosaic.plan import MosaicConfig, Plan
from pallas_kernels.spqr_matmul.pieces import Piece

TABLE = Path(__file__).with_name("tuned.json")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a configuration depends on besides the device."""

    batch: int
    out: int
    inner: int
    bits: int
    group_size: int

    @property
    def key(self) -> str:
        """Its name in the table."""
        return f"{self.batch}x{self.out}x{self.inner}:b{self.bits}g{self.group_size}"


def problem(piece: Piece, batch: int) -> Problem:
    """What the configuration of a product depends on."""
    return Problem(batch, *piece.shape, piece.bits, piece.group_size)


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """How `triton` cuts the work.

    Attributes:
      blocks: blocks of 128 rows that one warp has; they share the activations' loads.
      splits: warps that share these rows, each with its own columns.
    """

    blocks: int
    splits: int


@functools.cache
def table() -> dict[str, Any]:
    """{device kind: {kernel: {problem: {field: value}}}}; empty where nothing was measured."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def _found(kernel: str, device: Target, problem: Problem) -> dict[str, int] | None:
    return table().get(device.kind, {}).get(kernel, {}).get(problem.key)


def triton_config(device: Target, problem: Problem) -> TritonConfig:
    """For `triton`: sixteen warps a multiprocessor."""
    if found := _found("triton", device, problem):
        return TritonConfig(**found)
    blocks = rows.padded_rows(problem.out, rows.BLOCK) // rows.BLOCK
    steps = rows.padded_inner(problem.inner, problem.group_size) // (rows.GROUPS * problem.group_size)
    return TritonConfig(blocks=1, splits=_splits(16 * device.cores, blocks, steps))


def mosaic_config(device: Target, plan: Plan) -> MosaicConfig:
    """For `mosaic_gpu`: of the cuts that fit, the one with the least estimate.

    Args:
      device: what it is for.
      plan: of the product; its `config` is not read.
    """
    if values := table().get(device.kind, {}).get("mosaic_gpu", {}).get(mosaic_key(plan)):
        return MosaicConfig(**values)
    best = min(mosaic_cuts(device, plan), key=lambda cut: estimate.microseconds(cut, device))
    return best.config


def mosaic_key(plan: Plan) -> str:
    """The name of a product in the table."""
    widths = ",".join(f"{f.width}/{f.groups}/{f.statistics}" for f in plan.formats)
    return f"{plan.n}x{plan.rows}x{plan.columns}:{widths}"


def mosaic_cuts(device: Target, plan: Plan) -> Iterator[Plan]:
    """Plans that a device can run: tiles of a thread block, warps, clusters, steps ahead, chunks."""
    tiles = plan.rows // TILE
    clusters = (1, 2, 4, 8) if device.capability >= (9, 0) else (1,)
    for cluster, warps, depth in itertools.product(clusters, (4, 8, 12, 16), (1, 2, 3, 4)):
        for per_block in range(1, min(warps, tiles) + 1):
            config = MosaicConfig(-(-tiles // per_block), warps, cluster, depth, early=4 if plan.n > 4 else 8)
            cut = dataclasses.replace(plan, config=config)
            cut = _in_chunks(cut, device)
            if cut.why_impossible() or cluster > cut.steps or estimate.spills(cut):
                continue
            if depth == 1 or depth <= -(-cut.chunk // cut.split):  # no more ahead than there are
                yield cut


def _in_chunks(plan: Plan, device: Target) -> Plan:
    """The plan with as few and as equal chunks as shared memory allows."""
    for chunks in range(1, plan.part + 1):
        cut = dataclasses.replace(plan, config=dataclasses.replace(plan.config, chunk=-(-plan.part // chunks)))
        if cut.shared_bytes + estimate.RESERVED_SHARED <= device.shared_bytes:
            break
    return cut


VMEM_BYTES = 12 << 20
"""Of a TPU core's vector memory XLA lets a kernel have 16 MiB; the rest is for what the compiler spills."""


def tpu_depth(problem: Problem, block: int) -> int:
    """For `tpu`: column blocks of a grid step, up to four as vector memory allows; more hide a step's start and end."""
    columns = lanes.padded_inner(problem.inner, problem.group_size) // (lanes.GROUPS * problem.group_size)
    batch = 8 if problem.batch <= 8 else 16

    def fits(depth: int) -> bool:
        form = {"bits": problem.bits, "group_size": problem.group_size, "block": block, "batch": batch}
        return columns % depth == 0 and lanes.vmem_bytes(**form, depth=depth) <= VMEM_BYTES

    return next((depth for depth in (4, 3, 2) if fits(depth)), 1)


def _splits(wanted: int, blocks: int, steps: int) -> int:
    return max(1, min(-(-wanted // blocks), steps // 2))
