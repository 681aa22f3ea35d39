"""A job whose result is a directory: it grows block by block, and gets its name when it is whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spqr_jax.checkpoint import CheckpointSink
from spqr_jax.config import SpQRConfig
from spqr_jax.events import Events, ignore
from spqr_jax.job.job import Job, JobReport
from spqr_jax.output import Claim
from spqr_jax.planning.budget import Plan
from spqr_jax.stream.blocks import BlockSource
from spqr_jax.stream.spill import Spill
from spqr_jax.stream.stages import EXPERT_HESSIAN_BYTES

if TYPE_CHECKING:
    from spqr_jax.tune import TuneConfig


def quantize_to(
    claim: Claim,
    source: BlockSource,
    batches: Iterable[Any] | None,
    config: SpQRConfig,
    *,
    tuning: TuneConfig | None = None,
    plan: Plan | None = None,
    tokenizer: Any = None,
    files: Mapping[str, bytes] | None = None,
    provenance: dict[str, Any] | None = None,
    events: Events = ignore,
    spill: Spill | None = None,
    hessian_bytes: int = EXPERT_HESSIAN_BYTES,
) -> tuple[Path, JobReport]:
    """Quantizes a model into a directory.

    Args:
      claim: on the directory.
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
    with CheckpointSink(claim, source.config, config, tokenizer=tokenizer, provenance=kept, files=files) as sink:
        report = Job(source, sink, batches, config, tuning, plan, spill=spill, hessian_bytes=hessian_bytes).run(events)
    return sink.path, report
