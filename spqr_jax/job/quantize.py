"""The public verb: a model and calibration text in, a quantized model out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spqr_jax.checkpoint import load
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.events import Events, ignore
from spqr_jax.job.directory import quantize_to
from spqr_jax.job.forward import Forward, quantize_forward
from spqr_jax.job.job import Job
from spqr_jax.models.decoder import Decoder
from spqr_jax.output import AlreadyFinished, Claim
from spqr_jax.planning.budget import Plan
from spqr_jax.stream.blocks import ModelSource, TreeSink, TreeSource
from spqr_jax.tune.config import TuneConfig


def quantize(
    params: Any,
    batches: Iterable[Any] | None = None,
    config: SpQRConfig | None = None,
    *,
    tuning: TuneConfig | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    resume: bool = False,
    plan: Plan | None = None,
    mesh: Mesh | None = None,
    events: Events = ignore,
    forward: Forward | None = None,
) -> Any:
    """Quantizes a model's weight matrices.

    Args:
      params: a `Decoder`; a `ModelSource`, which is read one block at a time; or any pytree together with ``forward``.
      batches: calibration text: any iterable of token ids, int32 [batch, seq]. With ``forward``: any iterable
        of batches that it takes. Round-to-nearest needs none.
      config: how to quantize; None for `SpQRConfig.preset`'s default, or with ``forward`` for `SpQRConfig` without
        arguments.
      tuning: how to train scales, zero points and outlier values afterwards; None for not at all.
      out: a directory to write, block by block; None to keep the result in memory only. It appears under its name when
        it is complete, and holds what ``spqr quantize`` would write.
      overwrite: replace an existing ``out``, once the new one is complete.
      tokenizer: a transformers tokenizer to keep in ``out``, or None.
      provenance: a dictionary of JSON values, kept in ``out``, that tells where the model comes from. The target and
        the tuning are added.
      resume: go on with an unfinished run that was to write ``out``. It must be given the same model, text and
        configuration, and its result has the same bytes as without the stop.
      plan: how to spend ``config.target_bits``, made before; None to measure and plan now.
      mesh: devices that calibration is spread over; None for one device.
      events: is told of each step: of ``measuring``, ``quantizing`` and ``tuning``. While quantizing, an `Event`'s
        ``detail`` is the `LayerReport` of a weight. It may raise an exception to stop.
      forward: runs a model of your own, ``forward(params, batch, linear)``. It must apply each matrix that you want
        quantized, a leaf [out, in] of ``params``, as ``linear(path, w, x)``; you choose the paths. All Hessians come
        from one pass through the dense model and are in memory together; ``config.sequential`` has no effect.

    Returns:
      The same tree with a `SpQRArray` in place of each quantized matrix; with ``out``, as `load` reads it. To run a
      model of your own, call
      ``forward`` with ``linear=lambda path, w, x: spqr_jax.linear(w, x)``.

    Raises:
      DataError: the method needs calibration text and there is none, or the text cannot be used.
      NotFiniteError: activations of the text are infinite or NaN. The message says at which weight this begins.
      CheckpointError: ``out`` cannot be written, or exists already.
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
        return quantize_forward(params, batches, config or SpQRConfig(), forward, events)
    source = _as_source(params)
    config = config or SpQRConfig.preset()
    if out is None:
        sink = TreeSink(source.config)
        Job(source, sink, batches, config, tuning, plan, mesh=mesh).run(events)
        return sink.params()
    try:
        with Claim(out, overwrite, run="resume" if resume else "new") as claim:
            place, _ = quantize_to(
                claim, source, batches, config, tuning=tuning, plan=plan,
                tokenizer=tokenizer, provenance=provenance, mesh=mesh, events=events,
            )  # fmt: skip
    except AlreadyFinished:  # the run was killed when its result had got its name
        place = Path(out)
    return load(place)


def _as_source(model: Any) -> ModelSource:
    if isinstance(model, Decoder):
        return TreeSource(model)
    if hasattr(model, "block") and hasattr(model, "outer"):
        return model
    raise SpQRError(
        f"params is a {type(model).__name__}: expected a Decoder (see spqr_jax.load_model); "
        "for your own model, give its forward function, forward=fn"
    )
