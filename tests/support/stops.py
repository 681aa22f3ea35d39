"""Runs that are stopped at a safe point."""

from __future__ import annotations

import re

from spqr_jax import Event
from spqr_jax.checkpoint import CheckpointSource, content_digest
from spqr_jax.events import SafePoint


class Stop(Exception):
    """What stops a run here; Ctrl-C is another exception."""


class StopAfter:
    """Stops a run at the `count`-th safe point of a phase whose note has the pattern `note`, once all is saved."""

    def __init__(self, phase: str, count: int, note: str = "") -> None:
        self._phase, self._left, self._note = phase, count, note

    def __call__(self, event: Event) -> None:
        if event.phase == self._phase and isinstance(event.detail, SafePoint) and re.search(self._note, event.note):
            self._left -= 1
            if not self._left:
                event.detail.save()
                raise Stop


def report_of(path):
    """All that two runs must have in common which were to write the same checkpoint."""
    source = CheckpointSource(path)
    return content_digest(path, verify=True), source.layer_stats, source.quantization, source.provenance
