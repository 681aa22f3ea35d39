"""Listeners for the events of long work."""

from __future__ import annotations

from spqr_jax import Event, LayerReport


class LayerReports:
    """Collects what quantizing each weight did."""

    def __init__(self) -> None:
        self.layers: list[LayerReport] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event.detail, LayerReport):
            self.layers.append(event.detail)
