"""Models of one's own: any function that applies its matrices through ``linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, SpQRError
from spqr_jax.events import Events
from spqr_jax.methods import quantize_weights
from spqr_jax.methods.report import Reporter
from spqr_jax.solver import Hessian, accumulate_hessian, empty_hessian
from spqr_jax.stream.stages import InputRecorder

Forward = Callable[[Any, Any, Callable[[str, Any, jax.Array], jax.Array]], Any]


def quantize_forward(
    params: Any, batches: Iterable[Any] | None, config: SpQRConfig, forward: Forward, events: Events
) -> Any:
    if config.target_bits is not None:
        raise SpQRError(
            "target_bits needs a backward pass through a Decoder's blocks, which forward=fn does not have: "
            "set bits and outlier_threshold instead, or give rules for individual weights"
        )
    leaves, tree = jax.tree.flatten(params)
    batches = iter(batches if batches is not None else ())
    first = next(batches, None)
    if first is None:
        raise DataError("no calibration batches: forward=fn needs at least one, also to find the model's weights")
    groups, leaf_of, widths = _trace_forward(forward, leaves, tree, first)

    @jax.jit
    def accumulate(leaves: list[Any], batch: Any, hessians: list[Hessian]) -> list[Hessian]:
        recorder = _ForwardRecorder(leaves)
        forward(jax.tree.unflatten(tree, leaves), batch, recorder)
        return [accumulate_hessian(h, x) for h, x in zip(hessians, recorder.inputs, strict=True)]

    hessians: list[Any] = [None] * len(groups)
    if config.needs_calibration:
        hessians = accumulate(leaves, first, [empty_hessian(width) for width in widths])
        for batch in batches:
            hessians = accumulate(leaves, batch, hessians)
    configs = {name: chosen for name in leaf_of if (chosen := config.for_path(name)) is not None}
    report = Reporter(len(configs), events)
    for names, hessian in zip(groups, hessians, strict=True):
        for name in filter(configs.__contains__, names):
            solved = quantize_weights([leaves[leaf_of[name]]], hessian, [configs[name]])[0]
            leaves[leaf_of[name]] = solved.array
            report(name, solved.array, solved.stats)
    return jax.tree.unflatten(tree, leaves)


class _ForwardRecorder(InputRecorder):
    """Applies the dense weights, since the model goes on after them, and knows each weight's leaf."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        super().__init__()
        self._index = {id(leaf): index for index, leaf in enumerate(leaves)}
        self.leaf_of: dict[str, int] = {}

    def __call__(self, name: str, w: Any, x: jax.Array) -> jax.Array:
        if name in self.leaf_of:
            raise SpQRError(f"linear was called twice with the path {name!r}: give each weight its own path")
        if id(w) not in self._index:
            raise SpQRError(f"linear({name!r}): the weight is not a leaf of params; pass it unchanged, [out, in]")
        self.leaf_of[name] = self._index[id(w)]
        super().__call__(name, w, x)
        return jax.numpy.matmul(x, w.T)


def _trace_forward(
    forward: Forward, leaves: list[Any], tree: Any, batch: Any
) -> tuple[list[list[str]], dict[str, int], list[int]]:
    """Which paths there are, their leaves, and how they share inputs; no arithmetic is done."""
    found: list[_ForwardRecorder] = []

    def trace(leaves: list[Any], batch: Any) -> None:
        found.append(_ForwardRecorder(leaves))
        forward(jax.tree.unflatten(tree, leaves), batch, found[-1])

    jax.eval_shape(trace, leaves, batch)
    recorder = found[-1]
    return recorder.groups, recorder.leaf_of, [x.shape[-1] for x in recorder.inputs]
