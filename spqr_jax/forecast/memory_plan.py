"""What `spqr quantize` holds at once, part by part: in a host's memory, in each device's, and on the disk.

Parts come from shapes. Those that are programs, libraries and freed memory that a process keeps were measured as peak
resident size on CPUs; what an accelerator's runtime takes beside our arrays is assumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from spqr_jax.config import SpQRConfig
from spqr_jax.forecast.passes import Text, block_sizes, block_total, block_weights, input_groups, outer_weights
from spqr_jax.forecast.quantizing import plan_text, rounds
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.decoder import STAGES
from spqr_jax.stream.activations import HELD_BYTES, HELD_SHARE
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES, stage_groups
from spqr_jax.tune.config import TuneConfig

FLOAT32, BFLOAT16 = 4, 2
CHUNK_TOKENS = 1024
"""Tokens of a chunk of text, or one window where that is longer."""

# Measured on CPUs: docs/explanation/performance.md, "Memory", and the demo model's peaks (tests/whole_model).
_RUNTIME = 0.45e9  # Python, JAX, compiled programs
_QUANTIZE_PROGRAMS = 0.15e9  # more of them, and what their compilation leaves
_CALIBRATION_PROGRAMS = 0.3e9  # those of calibration and the column loop
_PLAN_PROGRAMS = 0.4e9  # those of the measuring pass, and freed memory of it that stays with the process
_TUNING_PROGRAMS = 0.6e9  # those of a training step
COLUMN_BYTES = 36  # a weight in the column loop: weight, error, visited, value, residual, flag, code, and their copies
ROUND_BYTES = 24  # a weight that is rounded to nearest: 22 for Gemma 3 270M's head of 168 M weights, with 8 bits
_ROUND_IN_PARTS_BYTES = 15  # the same for a head on a CPU, some rows at a time: 14.8 for that head
OUTER_COPIES = 2.6  # of the embedding and head while they are read or written; Gemma 3 270M
_FACTOR_COPIES = 5  # matrix, damped, reversed, factor, inverse
_BLOCKED_COPIES = 2  # of a Hessian that is factored through host memory: matrix and inverse factor
_BLOCKED_PANELS = 4  # of 2048 columns, that the device holds then
BLOCKED_HOST = 3  # matrices that the host holds then
_GRADIENT_COPIES = 3  # of what a block computes, in its gradient
_TUNED_BYTES = 1.6  # a weight in training: its code, and its share of statistics, outliers and optimizer state
PACKED_BYTES = 0.6
"""Bytes of a quantized weight."""
_LOGITS = 128  # positions whose logits a gradient of the loss holds
SPILLED_CHUNKS = 3  # of activations on disk: the one at hand, the next, and the last on its way out
# Assumed: never measured.
ACCELERATOR_HOST = 1.5e9  # of a process: a GPU's or TPU's libraries and page-locked buffers
ACCELERATOR_DEVICE = 1.0e9  # of a device: context, programs, workspace of libraries

Parts = dict[str, float]
"""Bytes by what they are for."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run's arrays are.

    Attributes:
      devices: of all processes together.
      processes: one on each host.
      on_host: whether devices are the hosts' own processors, and their memory the hosts'.
      device_memory: bytes that JAX may use of one device; None where that is not known.
    """

    devices: int = 1
    processes: int = 1
    on_host: bool = True
    device_memory: float | None = None

    @property
    def local_devices(self) -> int:
        """Devices of one process."""
        return max(1, self.devices // self.processes)


@dataclasses.dataclass(frozen=True)
class Thrift:
    """What a run does to hold less.

    Attributes:
      spill: keep activations on disk.
      chunk_tokens: tokens of a chunk of text, at least one window.
      hessian_bytes: of the Hessians of experts that are summed at once, at least one.
    """

    spill: bool = False
    chunk_tokens: int = CHUNK_TOKENS
    hessian_bytes: int = EXPERT_HESSIAN_BYTES


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a run needs at its peak.

    Attributes:
      host: of one process; with `Layout.on_host` this is all there is.
      device: of one device; empty with `Layout.on_host`.
      disk: of the whole run, the result included.
      phase: which part of the run has the peak, such as ``solving``.
    """

    host: Parts
    device: Parts
    disk: Parts
    phase: str

    @property
    def host_bytes(self) -> float:
        """All of `host`."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> float:
        """All of `device`."""
        return sum(self.device.values())

    def fits(self, limit: float) -> bool:
        """Whether neither a host nor a device needs more than so many bytes."""
        return max(self.host_bytes, self.device_bytes) <= limit


def plan_memory(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    tuning: TuneConfig | None,
    itemsize: int,
    layout: Layout = Layout(),
    thrift: Thrift = Thrift(),
    result_bytes: float = 0.0,
) -> MemoryPlan:
    """What `spqr quantize` holds on one device at its peak: what it holds throughout, and the largest phase on top.

    `spqr_jax.forecast.mesh_memory` has the same for several devices.

    Args:
      model, config, text, tuning: as `quantize_work`.
      itemsize: bytes of a dense weight.
      layout: one device.
      thrift: what is done to hold less.
      result_bytes: of the checkpoint.
    """
    disk = disk_bytes(model, config, text, tuning, itemsize, thrift, result_bytes)
    phases = one_device_phases(model, config, text, tuning, itemsize, layout, thrift)
    phase = max(phases, key=lambda name: all_of(phases[name]))
    programs = program_bytes(config, tuning)
    if layout.on_host:
        return MemoryPlan({"runtime and programs": programs, **phases[phase]}, {}, disk, phase)
    host = accelerator_host(model, config, text, itemsize, layout, thrift, programs)
    width = widest_input(model)
    if layout.device_memory is not None and is_blocked(width, layout.device_memory - phases["solving"]["blocks"]):
        host["factorization"] = float(BLOCKED_HOST * FLOAT32 * width**2)
    return MemoryPlan(host, {"runtime and programs": ACCELERATOR_DEVICE, **phases[phase]}, disk, phase)


def accelerator_host(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    itemsize: int,
    layout: Layout,
    thrift: Thrift,
    programs: float,
) -> Parts:
    """What a process holds in its host's memory throughout, where its devices have memory of their own."""
    host = {
        "runtime and programs": programs + ACCELERATOR_HOST,
        "embedding and head": OUTER_COPIES * outer_weights(model) * itemsize,
        "blocks": (2 * itemsize + 2 * PACKED_BYTES) * largest_block(model),  # read and read ahead; packed and written
    }
    if thrift.spill:
        chunk = SPILLED_CHUNKS * chunk_activations(model, config, text, itemsize, thrift)
        host["activations"] = layout.local_devices * chunk
    return host


def disk_bytes(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    tuning: TuneConfig | None,
    itemsize: int,
    thrift: Thrift,
    result_bytes: float,
) -> Parts:
    """What the whole run writes."""
    disk = {"result": result_bytes}
    if thrift.spill and config.needs_calibration:
        disk["activations"] = calibration_bytes(model, config, text, itemsize)
    if tuning is not None:
        disk["blocks before tuning"] = PACKED_BYTES * block_total(model)
    return disk


def program_bytes(config: SpQRConfig, tuning: TuneConfig | None) -> float:
    total = _RUNTIME + _QUANTIZE_PROGRAMS + _CALIBRATION_PROGRAMS * config.needs_calibration
    learns = tuning is not None or config.solver == "brecq"
    return total + _PLAN_PROGRAMS * (config.target_bits is not None) + _TUNING_PROGRAMS * learns


def one_device_phases(
    model: DecoderConfig,
    config: SpQRConfig,
    text: Text,
    tuning: TuneConfig | None,
    itemsize: int,
    layout: Layout,
    thrift: Thrift,
) -> dict[str, Parts]:
    """What one device holds in each phase."""
    outer = {"embedding and head": float(outer_weights(model) * itemsize)}
    blocks = {"blocks": 3.0 * largest_block(model) * itemsize}  # original, dequantized and next
    flow: Parts = {}
    if config.needs_calibration:
        flow = activation_parts(model, config, text, itemsize, layout, thrift)
        flow["one chunk"] = chunk_bytes(model, text, thrift)
    held = all_of({**outer, **blocks, **flow})
    room = math.inf if layout.device_memory is None else layout.device_memory - held
    solving = max((_solving(model, config, kind, thrift, room) for kind in set(model.kinds)), key=all_of)
    phases = {
        "solving": {**outer, **blocks, **flow, **solving},
        "reading and writing the embedding": {"embedding and head": OUTER_COPIES * outer["embedding and head"]},
    }
    if (head := config.for_head(model.head_path)) is not None:
        head_input = {name: size for name, size in flow.items() if name == "activations" and head.needs_calibration}
        a_weight = _ROUND_IN_PARTS_BYTES if layout.on_host and not head.needs_calibration else ROUND_BYTES
        in_loop = float(a_weight * model.vocab_size * model.hidden_size)
        phases["output head"] = {**outer, **head_input, "output head": in_loop}
    if config.target_bits is not None:
        phases["planning"] = {**outer, **blocks, **planning_parts(model, config, text, itemsize, thrift)}
    if tuning is not None:
        phases["tuning"] = {**outer, **blocks, **training_parts(model, text, itemsize)}
    if config.solver == "brecq":
        phases["solving"]["gradients"] = gradient_bytes(model, chunk_tokens(text, thrift))
    return phases


def all_of(parts: Parts) -> float:
    return sum(parts.values())


# ---- sizes --------------------------------------------------------------------------------


def widest_input(model: DecoderConfig) -> int:
    """Inputs of the matrix of a block that has the most."""
    return max(width for kind in set(model.kinds) for _, width in input_groups(model, kind))


def largest_block(model: DecoderConfig) -> int:
    """Weights of the largest block."""
    return max(block_weights(model, kind) for kind in set(model.kinds))


def widest_inner(model: DecoderConfig) -> int:
    """Width of the widest activations between two stages of a block, a token."""
    experts = model.experts_per_token * model.expert_size if model.num_experts else 0
    dense = model.intermediate_size if any(not kind.sparse for kind in model.kinds) else 0
    return max(model.num_heads * model.head_dim, dense, experts)


def calibration_bytes(
    model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int, most_inner: float = math.inf
) -> float:
    """The residual stream of all windows, and what the stage at hand made of it; twice with a correction of drift.

    Args:
      model, config, text: what is quantized, how and on what.
      itemsize: bytes of a number in the residual stream.
      most_inner: bytes of what the MLP makes that are held, unless half the residual stream is more.
    """
    times = 2 if config.corrects_drift or not config.sequential or config.solver == "brecq" else 1
    importance = 2 * model.num_layers * model.hidden_size if config.solver == "brecq" else 0  # bfloat16
    inner = BFLOAT16 if rounds(config) else itemsize
    stream = text.tokens * model.hidden_size * itemsize
    of_attention = text.tokens * model.num_heads * model.head_dim * inner
    of_mlp = min(text.tokens * widest_inner(model) * inner, max(most_inner, HELD_SHARE * stream))
    return times * (stream + max(of_attention, of_mlp)) + text.tokens * importance


def chunk_tokens(text: Text, thrift: Thrift) -> int:
    """Tokens of one chunk: whole windows."""
    windows = max(1, thrift.chunk_tokens // max(text.seqlen, 1))
    return min(windows * text.seqlen, max(text.tokens, 1))


def chunk_activations(model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int, thrift: Thrift) -> float:
    return calibration_bytes(model, config, Text(1, chunk_tokens(text, thrift)), itemsize)


def activation_parts(
    model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int, layout: Layout, thrift: Thrift
) -> Parts:
    """A device's share of the chunks; on disk, three chunks at a time. In one device's memory a part is made twice."""
    if layout.devices == 1 and not thrift.spill and config.solver != "brecq":
        return {"activations": calibration_bytes(model, config, text, itemsize, most_inner=HELD_BYTES)}
    chunk = chunk_activations(model, config, text, itemsize, thrift)
    chunks = math.ceil(text.tokens / chunk_tokens(text, thrift)) if text.tokens else 0
    held = math.ceil(chunks / layout.devices)
    return {"activations": chunk * (min(held, SPILLED_CHUNKS) if thrift.spill else held)}


def chunk_bytes(model: DecoderConfig, text: Text, thrift: Thrift) -> float:
    """What a stage makes of one chunk on its way: queries, keys, values, scores of some queries, gate and up."""
    tokens = chunk_tokens(text, thrift)
    heads = model.num_heads + 2 * model.num_kv_heads
    a_token = 4 * model.hidden_size + 3 * widest_inner(model) + 2 * heads * model.head_dim
    scores = 2 * model.num_heads * min(512, text.seqlen) * text.seqlen * max(1, tokens // max(text.seqlen, 1))
    return float(FLOAT32 * (tokens * a_token + scores))


def _solving(model: DecoderConfig, config: SpQRConfig, kind: BlockKind, thrift: Thrift, room: float) -> Parts:
    """One stage's Hessians, and the factorization and column loop of the matrices that read one input."""
    stages = (_stage(model, config, kind, stage, thrift, room) for stage in range(len(STAGES)))
    return max(stages, key=all_of)


def _stage(model: DecoderConfig, config: SpQRConfig, kind: BlockKind, stage: int, thrift: Thrift, room: float) -> Parts:
    shapes, groups = block_sizes(model, kind), stage_groups(model, kind, stage)
    parts: Parts = {}
    if config.needs_calibration:
        width = max(width for _, width in groups)
        copies = 2 if config.corrects_drift else 1
        sums = _hessian_bytes((width for _, width in groups), groups[0][0][0].startswith("experts."), thrift)
        parts["Hessians"] = copies * sums
        parts["factorization"] = factor_bytes(width, room)
    loop = COLUMN_BYTES if config.needs_calibration else ROUND_BYTES
    weights = max(width * sum(shapes[name][0] for name in names) for names, width in groups)
    return {**parts, "column loop": float(loop * weights)}


def is_blocked(width: int, room: float) -> bool:
    """Whether a Hessian is factored panel by panel through host memory, as there is no room for all copies of it."""
    return (_FACTOR_COPIES + 1) * FLOAT32 * width**2 > room


def factor_bytes(width: int, room: float) -> float:
    if is_blocked(width, room):
        return float(FLOAT32 * (_BLOCKED_COPIES * width**2 + _BLOCKED_PANELS * 2048 * width))
    return float(_FACTOR_COPIES * FLOAT32 * width**2)


def _hessian_bytes(widths: Iterable[int], experts: bool, thrift: Thrift) -> float:
    """Of the Hessians that are summed at once: all of a dense stage, of experts as many as are allowed."""
    hessians = [float(FLOAT32 * width**2) for width in widths]
    return min(sum(hessians), max(max(hessians), thrift.hessian_bytes)) if experts else sum(hessians)


def planning_parts(model: DecoderConfig, config: SpQRConfig, text: Text, itemsize: int, thrift: Thrift) -> Parts:
    """Activations before every block, the gradient of one block and one chunk, and the trials of one stage."""
    seen = plan_text(text)
    kept_size = BFLOAT16 if rounds(config) else itemsize
    kept = (model.num_layers + 1) * seen.tokens * model.hidden_size * kept_size
    if thrift.spill:
        kept = SPILLED_CHUNKS * chunk_tokens(text, thrift) * model.hidden_size * kept_size
    kept += seen.tokens * model.hidden_size * itemsize
    gradient = {
        "Hessians": 2 * max(_block_hessians(model, kind, thrift) for kind in set(model.kinds)),
        "gradients": gradient_bytes(model, chunk_tokens(text, thrift)),
    }
    windows = max(1, chunk_tokens(text, thrift) // max(text.seqlen, 1))
    logits = {"logits": float(3 * FLOAT32 * min(_LOGITS, text.seqlen) * windows * model.vocab_size)}
    kinds = set(model.kinds)
    trials = max((_solving(model, config, kind, thrift, math.inf) for kind in kinds), key=all_of)
    largest: Parts = max([gradient, logits, trials], key=all_of)
    return {"activations": float(kept), **largest}


def _block_hessians(model: DecoderConfig, kind: BlockKind, thrift: Thrift) -> float:
    """All Hessians of a block; experts that do the same share one here."""
    widths: dict[tuple[str, ...], int] = {}
    for stage in range(len(STAGES)):
        for names, width in stage_groups(model, kind, stage):
            widths[tuple(name.rpartition(".")[2] for name in names)] = width
    return float(sum(FLOAT32 * width**2 for width in widths.values()))


def gradient_bytes(model: DecoderConfig, tokens: int) -> float:
    """What a block computes of one chunk of text, kept for its gradient, and the gradient."""
    attention = model.num_heads + 2 * model.num_kv_heads
    a_token = 4 * model.hidden_size + 2 * attention * model.head_dim + 4 * widest_inner(model)
    return float(_GRADIENT_COPIES * FLOAT32 * tokens * a_token)


def training_parts(model: DecoderConfig, text: Text, itemsize: int) -> Parts:
    """The whole quantized model as it is trained, the text at both ends of both models, one block's gradients."""
    weights = block_total(model)
    tokens = max(text.seqlen, CHUNK_TOKENS)
    inputs = (model.num_layers + 1) * tokens * model.hidden_size * FLOAT32
    return {
        "model in training": (_TUNED_BYTES + PACKED_BYTES) * weights,
        "activations": float(3 * text.tokens * model.hidden_size * itemsize + inputs),
        "gradients": 6 * FLOAT32 * largest_block(model) + gradient_bytes(model, tokens),
        "rounded output head": float(BFLOAT16 * model.vocab_size * model.hidden_size),
    }
