"""A job whose result is a directory: it grows block by block, and gets its name when it is whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spqr_jax.checkpoint import CheckpointFolder, CheckpointSink
from spqr_jax.config import SpQRConfig
from spqr_jax.events import Events, ignore
from spqr_jax.job.job import Job, JobReport
from spqr_jax.job.kept import Kept, Store
from spqr_jax.journal import Journal, identity_of
from spqr_jax.models.decoder import Block, Outer
from spqr_jax.output import Claim
from spqr_jax.output.run_folder import has_state
from spqr_jax.planning.budget import Plan
from spqr_jax.stream.blocks import ModelSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES
from spqr_jax.tune.config import TuneConfig

_UNTUNED = "untuned"


def quantize_to(
    claim: Claim,
    source: ModelSource,
    batches: Iterable[Any] | None,
    config: SpQRConfig,
    *,
    tuning: TuneConfig | None = None,
    plan: Plan | None = None,
    tokenizer: Any = None,
    files: Mapping[str, bytes] | None = None,
    provenance: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    events: Events = ignore,
    spill: Spill | None = None,
    hessian_bytes: int = EXPERT_HESSIAN_BYTES,
) -> tuple[Path, JobReport]:
    """Quantizes a model into a directory.

    Args:
      claim: on the directory. Where it has the folder of a run, the state is saved there at safe points, and a state
        that is there is gone on with.
      source, batches, config, tuning, plan: as `Job` takes them.
      tokenizer: a transformers tokenizer to keep with the model, or None.
      files: path in the directory -> content of more files to keep with the model.
      provenance: JSON values that tell where the model comes from; the target and the tuning are added.
      events: told of each step.
      spill, hessian_bytes: as `Job` takes them.

    Returns:
      Where the directory lies, and what was done.

    Raises:
      CheckpointError: it cannot be written.
      SpQRError: as `Job.run`.
    """
    kept = {**(provenance or {}), "tuned": None if tuning is None else dataclasses.asdict(tuning)}
    if config.target_bits is not None:
        kept["target_bits"] = config.target_bits
    batches = None if batches is None else list(batches)
    with CheckpointSink(claim, source.config, config, tokenizer=tokenizer, provenance=kept, files=files) as sink:
        state = None if claim.run is None else _kept(claim.run, sink, source, batches, config, tuning)
        job = Job(
            source, sink, batches, config, tuning, plan, kept=state, mesh=mesh, spill=spill, hessian_bytes=hessian_bytes
        )
        report = job.run(events)
    return sink.path, report


class _NoSink:
    """Takes a model's parts and drops them."""

    def put_outer(self, outer: Outer) -> None: ...

    def put_block(self, index: int, block: Block) -> None: ...

    def record(self, path: str, stats: dict[str, float]) -> None: ...

    def describe(self, quantization: SpQRConfig) -> None: ...


def take_part(
    source: ModelSource,
    batches: Iterable[Any] | None,
    config: SpQRConfig,
    *,
    mesh: Mesh | None,
    spill: Spill | None = None,
    hessian_bytes: int = EXPERT_HESSIAN_BYTES,
) -> None:
    """What every process but the first does while the first runs `quantize_to`: the same, but it writes nothing."""
    Job(source, _NoSink(), batches, config, mesh=mesh, spill=spill, hessian_bytes=hessian_bytes).run()


def _kept(
    folder: Path,
    sink: CheckpointSink,
    source: ModelSource,
    batches: Sequence[Any] | None,
    config: SpQRConfig,
    tuning: TuneConfig | None,
) -> Kept:
    """What the run in this folder keeps; with tuning, quantized blocks go to a folder of their own first."""
    settings = None if tuning is None else dataclasses.asdict(tuning)
    identity = identity_of(source.identity(), batches, config.to_json(), settings)
    journal = Journal(folder, identity, resume=has_state(folder))
    blocks: Store = sink if tuning is None else CheckpointFolder(folder / _UNTUNED, source.config, config)
    return Kept(journal, blocks, sink, folder)
