"""A job whose result is a directory: it grows block by block, and gets its name when it is whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spqr_jax.checkpoint import CheckpointFolder, CheckpointSink
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError
from spqr_jax.events import Events, ignore
from spqr_jax.job.job import Job, JobReport
from spqr_jax.job.kept import Kept
from spqr_jax.job.shared import SharedState, SharedStore
from spqr_jax.journal import Journal, differences, identity_of
from spqr_jax.output import Claim
from spqr_jax.output.run_folder import has_state
from spqr_jax.planning.budget import Plan
from spqr_jax.planning.record import plan_to_json
from spqr_jax.stream.blocks import ModelSource
from spqr_jax.stream.hosts import ALONE, Together
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
    together: Together = ALONE,
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
      mesh, together: as `Job` takes them. Where there are several processes this is for the first one, and the claim
        has the folder of a run; the others call `take_part`.
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
        state = None
        if claim.run is not None:
            identity = _identity(source, batches, config, tuning, plan)
            _refuse_unlike(together, identity)
            state = _kept(claim.run, sink, source, identity, config, tuning, together)
        report = Job(
            source, sink if state is None else state.result, batches, config, tuning, plan,
            kept=state, mesh=mesh, together=together, spill=spill, hessian_bytes=hessian_bytes,
        ).run(events)  # fmt: skip
    return sink.path, report


def take_part(
    source: ModelSource,
    batches: Iterable[Any] | None,
    config: SpQRConfig,
    *,
    together: Together,
    mesh: Mesh | None,
    tuning: TuneConfig | None = None,
    plan: Plan | None = None,
    events: Events = ignore,
    spill: Spill | None = None,
    hessian_bytes: int = EXPERT_HESSIAN_BYTES,
) -> None:
    """What every process but the first does while the first runs `quantize_to`, with the same arguments.

    It writes nothing. What an earlier run has finished comes from the first process.
    """
    batches = None if batches is None else list(batches)
    _refuse_unlike(together, _identity(source, batches, config, tuning, plan))
    together.from_first(lambda: None)  # the first one opens the journal
    store = SharedStore(together, None)
    kept = Kept(SharedState(together, None), store, store, Path(), together)
    Job(
        source, store, batches, config, tuning, plan,
        kept=kept, mesh=mesh, together=together, spill=spill, hessian_bytes=hessian_bytes,
    ).run(events)  # fmt: skip


def _identity(
    source: ModelSource,
    batches: Sequence[Any] | None,
    config: SpQRConfig,
    tuning: TuneConfig | None,
    plan: Plan | None,
) -> dict[str, str]:
    settings = None if tuning is None else dataclasses.asdict(tuning)
    given = None if plan is None else plan_to_json(plan)
    return identity_of(source.identity(), batches, config.to_json(), settings, given)


def _refuse_unlike(together: Together, identity: dict[str, str]) -> None:
    """Raises `DataError` in a process that was given other things than the first one."""
    if unlike := differences(together.from_first(lambda: identity), identity):
        raise DataError(f"this process differs from the first one in {' and in '.join(unlike)}: give all the same")


def _kept(
    folder: Path,
    sink: CheckpointSink,
    source: ModelSource,
    identity: dict[str, str],
    config: SpQRConfig,
    tuning: TuneConfig | None,
    together: Together,
) -> Kept:
    """What the run in this folder keeps; with tuning, quantized blocks go to a folder of their own first."""
    opened: list[Journal] = []  # which does not travel to the other processes
    together.from_first(lambda: opened.append(Journal(folder, identity, resume=has_state(folder))))
    result = SharedStore(together, sink)
    untuned = None if tuning is None else CheckpointFolder(folder / _UNTUNED, source.config, config)
    blocks = result if untuned is None else SharedStore(together, untuned)
    return Kept(SharedState(together, opened[0]), blocks, result, folder, together)
