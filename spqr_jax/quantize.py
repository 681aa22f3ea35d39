"""The public verb: a model and calibration text in, a quantized model out."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from spqr_jax.array import SpQRArray
from spqr_jax.blocks import BlockSink, BlockSource, TreeSink, TreeSource
from spqr_jax.budget import Ledger, Plan, plan_budget
from spqr_jax.calibrate import Activations, InputRecorder, rounded_linear, stage_groups
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, NotFiniteError, SpQRError
from spqr_jax.models.decoder import STAGES, Block, Decoder, matrix_names, plain_linear
from spqr_jax.models.finite import advice
from spqr_jax.solver import (
    Hessian,
    LayerStats,
    Solved,
    accumulate_hessian,
    correct_drift,
    empty_hessian,
    quantize_weights,
)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What quantizing one weight did; `quantize` passes one to ``on_layer`` for each weight.

    Attributes:
      path: path of the weight, such as ``layers.3.down_proj``.
      shape: (out, in).
      bits: bits of a weight code.
      stats: error, outliers and size.
      seconds: time since the last report, calibration included.
    """

    path: str
    shape: tuple[int, int]
    bits: int
    stats: LayerStats
    seconds: float


_LEAST_DAMPING = 0.01  # that is multiplied for experts which few tokens reach
_TRIES = 6  # times that weights are solved at most to keep to a budget

OnLayer = Callable[[LayerReport], None]
Forward = Callable[[Any, Any, Callable[[str, Any, jax.Array], jax.Array]], Any]


def quantize(
    params: Any,
    calib_batches: Iterable[Any] | None = None,
    config: SpQRConfig | None = None,
    *,
    forward: Forward | None = None,
    on_layer: OnLayer | None = None,
) -> Any:
    """Quantizes a model's weight matrices.

    Args:
      params: a `Decoder`, or any pytree together with ``forward``.
      calib_batches: calibration text: any iterable of token ids, int32 [batch, seq]. With ``forward``: any iterable
        of batches that it takes. Round-to-nearest needs none.
      config: how to quantize; None for `SpQRConfig.preset`'s default, or with ``forward`` for `SpQRConfig` without
        arguments.
      forward: runs a model of your own, ``forward(params, batch, linear)``. It must apply each matrix that you want
        quantized, a leaf [out, in] of ``params``, as ``linear(path, w, x)``; you choose the paths. All Hessians come
        from one pass through the dense model and are in memory together; ``config.sequential`` has no effect.
      on_layer: called after each weight.

    Returns:
      The same tree with a `SpQRArray` in place of each quantized matrix. To run a model of your own, call
      ``forward`` with ``linear=lambda path, w, x: spqr_jax.linear(w, x)``.

    Raises:
      DataError: the method needs calibration text and there is none, or the text cannot be used.
      NotFiniteError: activations of the text are infinite or NaN. The message says at which weight this begins.
      SpQRError: the model or the configuration cannot be used.

    Example:
      A model that `load_model` returned:

      >>> windows = np.arange(192, dtype=np.int32).reshape(6, 32)  # your text, as token ids
      >>> batches = spqr_jax.batched(windows, tokens_per_batch=64)
      >>> small = spqr_jax.quantize(model, batches, spqr_jax.SpQRConfig(bits=3))
      >>> small.layers[0].q_proj.bits
      3

      A model of your own:

      >>> params = {"up": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> def forward(params, batch, linear):
      ...     return linear("up", params["up"], batch)
      >>> batches = [jax.random.normal(jax.random.key(1), (256, 32))]
      >>> small = spqr_jax.quantize(params, batches, forward=forward)
      >>> y = forward(small, batches[0], lambda path, w, x: spqr_jax.linear(w, x))
      >>> y.shape
      (256, 64)
    """
    if forward is not None:
        return _quantize_forward(params, calib_batches, config or SpQRConfig(), forward, on_layer)
    if not isinstance(params, Decoder):
        raise SpQRError(
            f"params is a {type(params).__name__}: expected a Decoder (see spqr_jax.load_model); "
            "for your own model, give its forward function, forward=fn"
        )
    sink = TreeSink(params.config)
    quantize_blocks(TreeSource(params), sink, calib_batches, config or SpQRConfig.preset(), on_layer=on_layer)
    return sink.params()


def quantizable_paths(source: BlockSource, config: SpQRConfig) -> list[str]:
    """Paths of the weights that `config` would quantize, in order."""
    kinds = enumerate(source.config.kinds)
    paths = [f"layers.{index}.{name}" for index, kind in kinds for name in matrix_names(source.config, kind)]
    paths = [path for path in paths if config.for_path(path) is not None]
    return paths if config.for_head(source.config.head_path) is None else [*paths, source.config.head_path]


def quantize_blocks(
    source: BlockSource,
    sink: BlockSink,
    calib_batches: Iterable[Any] | None,
    config: SpQRConfig,
    *,
    on_layer: OnLayer | None = None,
    plan: Plan | None = None,
) -> None:
    """Takes a model from a source to a sink, block by block, quantizing on the way.

    Only one block's dense weights and the activations of the calibration text
    are held. Arguments and errors as :func:`quantize`; `plan` is one made before
    for `config.target_bits`, or None to make it now.
    """
    outer = source.outer()
    report = Reporter(on_layer)
    activations, ledger = None, None
    if config.needs_calibration:
        if calib_batches is None:
            raise DataError("this configuration needs calibration batches; SpQRConfig.rtn() needs none")
        calib_batches = list(calib_batches)
        if plan is None and config.target_bits is not None:
            plan = plan_budget(source, calib_batches, config)
        if plan is not None:
            config, ledger = plan.config(config), Ledger(plan)
        linear = rounded_linear if config.calibration_dtype == "bfloat16" else plain_linear
        activations = Activations(source.config, outer, calib_batches, linear)
    solver = _BlockSolver(config, report, ledger, activations)
    whole_blocks = None
    if config.solver == "brecq":
        from spqr_jax.brecq import BlockReconstruction  # it needs optax

        assert calib_batches is not None
        whole_blocks = BlockReconstruction(source, list(calib_batches), config, report)
    head = source.config.head_path
    own = config.for_head(head)
    calibrates_head = own is not None and own.needs_calibration
    for index in range(source.config.num_layers):
        block, prefix = source.block(index), f"layers.{index}."
        last = index + 1 == source.config.num_layers and not calibrates_head
        if whole_blocks is not None and activations is not None:
            block = whole_blocks.solve(activations, block, prefix)
        elif activations is None:
            block = solver.solve(block, matrix_names(source.config, block.kind), prefix, None)[0]
        elif config.sequential:
            block = solver.sequential(activations, block, prefix, last)
        else:
            block = solver.parallel(activations, block, prefix, last)
        solver.warn_of_starved(prefix)
        sink.put_block(index, block)
    if own is not None:
        hessian = activations.head_hessian(outer) if activations is not None and calibrates_head else None
        try:
            solved = quantize_weights([getattr(outer, head)], hessian, [own])[0]
        except DataError as error:
            raise NotFiniteError(f"inputs of {head}: {error}; {advice(getattr(outer, head).dtype)}") from None
        report(head, solved.array, solved.stats)
        outer = dataclasses.replace(outer, **{head: solved.array})
    sink.put_outer(outer)


class Reporter:
    """Tells `on_layer` of each weight, with the time since the last."""

    def __init__(self, on_layer: OnLayer | None) -> None:
        self._on_layer, self._last = on_layer, time.perf_counter()

    def __call__(self, path: str, array: SpQRArray, stats: LayerStats) -> None:
        now = time.perf_counter()
        if self._on_layer is not None:
            self._on_layer(LayerReport(path, array.shape, array.bits, stats, now - self._last))
        self._last = now


class _BlockSolver:
    """Quantizes the weights of a block.

    Args:
      config: what to do.
      report: told of each weight.
      ledger: keeps to a budget, or None where there is none.
      activations: the calibration text before the first block, or None.
    """

    def __init__(
        self, config: SpQRConfig, report: Reporter, ledger: Ledger | None, activations: Activations | None
    ) -> None:
        self._config, self._report, self._ledger = config, report, ledger
        self.starved: dict[str, int] = {}  # experts of the block at hand that few tokens reached, and how many
        # The same text on its way through the dense model.
        self._dense = activations.copy() if activations is not None and config.corrects_drift else None

    def sequential(self, activations: Activations, block: Block, prefix: str, last: bool) -> Block:
        """Each stage sees activations that have passed the block's earlier, quantized stages."""
        original = dense = block  # dense: what the activations run through, quantized weights dequantized
        for stage in range(len(STAGES)):
            hessians = activations.hessians(stage, dense)
            drifts: Sequence[jax.Array | None] = [None] * len(hessians)
            if self._dense is not None:
                drifts = activations.drifts(stage, dense, self._dense, original, hessians)
            groups = stage_groups(activations.config, block.kind, stage)
            for (names, _), hessian, drift in zip(groups, hessians, drifts, strict=True):
                block, dense = self.solve(block, names, prefix, hessian, dense, drift)
            if not (last and stage + 1 == len(STAGES)):
                activations.advance(stage, dense)
                if self._dense is not None:
                    self._dense.advance(stage, original)
        return block

    def parallel(self, activations: Activations, block: Block, prefix: str, last: bool) -> Block:
        """All of the block's weights see activations of the block as it was."""
        ahead, hessians = activations.copy(), []
        for stage in range(len(STAGES)):
            hessians.append(ahead.hessians(stage, block))
            if stage + 1 < len(STAGES):
                ahead.advance(stage, block)
        dense = block
        for stage, stage_hessians in enumerate(hessians):
            groups = stage_groups(activations.config, block.kind, stage)
            for (names, _), hessian in zip(groups, stage_hessians, strict=True):
                block, dense = self.solve(block, names, prefix, hessian, dense)
        if not last:
            for stage in range(len(STAGES)):
                activations.advance(stage, dense)
        return block

    def solve(
        self,
        block: Block,
        names: Sequence[str],
        prefix: str,
        hessian: Hessian | None,
        dense: Block | None = None,
        drift: jax.Array | None = None,
    ) -> tuple[Block, Block]:
        """Quantizes weights that read one input, those of one width together, once they are moved to make up for drift.

        Returns:
          The block with `SpQRArray`s, and `dense` with what they dequantize to.
        """
        dense = block if dense is None else dense
        together: dict[int, list[str]] = {}
        configs = {name: own for name in names if (own := self._config.for_path(prefix + name)) is not None}
        if hessian is not None and names[0].startswith("experts."):
            configs = self._damped_by_need(configs, hessian)
        for name in configs:
            together.setdefault(getattr(block, name).shape[1], []).append(name)
        for members in together.values():
            weights = [getattr(block, name) for name in members]
            if drift is not None:
                assert hessian is not None
                weights = correct_drift(weights, hessian.matrix(), drift, self._config.drift_correction)
            try:
                solved = self._quantize(weights, hessian, {prefix + name: configs[name] for name in members})
            except DataError as error:  # of its Hessian; blocks come in order, so here it begins
                raise NotFiniteError(f"inputs of {prefix}{members[0]}: {error}; {advice(weights[0].dtype)}") from None
            block = block.replace({n: one.array for n, one in zip(members, solved, strict=True)})
            values = {n: one.dense.astype(getattr(dense, n).dtype) for n, one in zip(members, solved, strict=True)}
            dense = dense.replace(values)
            for name, one in zip(members, solved, strict=True):
                self._report(prefix + name, one.array, one.stats)
        return block, dense

    def _damped_by_need(self, configs: dict[str, SpQRConfig], hessian: Hessian) -> dict[str, SpQRConfig]:
        """More damping for an expert that fewer tokens reach than it has inputs: its Hessian knows too few directions.

        With no tokens at all the Hessian is the identity, and its weights are rounded to nearest.
        """
        tokens, width = float(hessian.tokens), hessian.gram.shape[0]
        if tokens >= width:
            return configs
        self.starved |= {name.split(".")[1]: int(tokens) for name in configs}
        more = width / max(tokens, 1.0)
        return {n: dataclasses.replace(c, damping=max(c.damping, _LEAST_DAMPING) * more) for n, c in configs.items()}

    def warn_of_starved(self, prefix: str) -> None:
        """Once a block: the experts that calibration text hardly reached."""
        if self.starved:
            listed = ", ".join(f"{expert} ({tokens})" for expert, tokens in self.starved.items())
            warnings.warn(
                f"{prefix.rstrip('.')}: these experts see few calibration tokens (number in parentheses): {listed}. "
                "They are quantized with more damping; use more calibration text (--nsamples)",
                stacklevel=2,
            )
            self.starved = {}

    def _quantize(
        self, weights: Sequence[jax.Array], hessian: Hessian | None, configs: dict[str, SpQRConfig]
    ) -> list[Solved]:
        ledger = self._ledger
        if ledger is None:
            return quantize_weights(weights, hessian, list(configs.values()))
        factor: float | None = ledger.factor()
        tried: list[tuple[float, dict[str, SpQRArray]]] = []
        while factor is not None and len(tried) < _TRIES:
            own = [dataclasses.replace(c, outlier_threshold=factor * c.outlier_threshold) for c in configs.values()]
            solved = quantize_weights(weights, hessian, own)
            tried.append((factor, {path: one.array for path, one in zip(configs, solved, strict=True)}))
            factor = ledger.next_factor(tried)
        for path, one in zip(configs, solved, strict=True):
            ledger.spend(path, one.array)
        return solved


# ---- models of one's own ----------------------------------------------------------------


def _quantize_forward(
    params: Any, batches: Iterable[Any] | None, config: SpQRConfig, forward: Forward, on_layer: OnLayer | None
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
    report = Reporter(on_layer)
    for names, hessian in zip(groups, hessians, strict=True):
        for name in names:
            own = config.for_path(name)
            if own is not None:
                solved = quantize_weights([leaves[leaf_of[name]]], hessian, [own])[0]
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
