"""``--save-plan`` and ``--use-plan``."""

from __future__ import annotations

from pathlib import Path

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.events import Event, Events
from spqr_jax.models.config import DecoderConfig
from spqr_jax.planning.budget import Plan
from spqr_jax.planning.plan_file import read_plan, write_plan
from spqr_jax.terminal.display import say


def given_plan(path: Path | None, model: DecoderConfig, config: SpQRConfig) -> Plan | None:
    """The plan of ``--use-plan``; None without one.

    Raises:
      SpQRError: there is no target, or the file is no plan for this run.
    """
    if path is None:
        return None
    if config.target_bits is None:
        raise SpQRError("--use-plan works with a target only: give --preset or --target-bits, and no --bits alone")
    return read_plan(path, model, config)


def saving_plan(events: Events, path: Path | None, config: SpQRConfig) -> Events:
    """The same events; the plan that one of them brings is written to ``--save-plan``.

    Raises:
      SpQRError: there is no target, so there will be no plan.
    """
    if path is None:
        return events
    if config.target_bits is None:
        raise SpQRError("--save-plan works with a target only: give --preset or --target-bits, and no --bits alone")

    def told(event: Event) -> None:
        events(event)
        if isinstance(event.detail, Plan):
            write_plan(path, event.detail, config)
            say(f"{path}: the plan; use it again with --use-plan, also for another target")

    return told
