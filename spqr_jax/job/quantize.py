"""The public verb: a model and calibration text in, a quantized model out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.job.driver import quantize_blocks
from spqr_jax.job.forward import Forward, quantize_forward
from spqr_jax.job.report import OnLayer
from spqr_jax.models.decoder import Decoder
from spqr_jax.stream.blocks import TreeSink, TreeSource


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
        return quantize_forward(params, calib_batches, config or SpQRConfig(), forward, on_layer)
    if not isinstance(params, Decoder):
        raise SpQRError(
            f"params is a {type(params).__name__}: expected a Decoder (see spqr_jax.load_model); "
            "for your own model, give its forward function, forward=fn"
        )
    sink = TreeSink(params.config)
    quantize_blocks(TreeSource(params), sink, calib_batches, config or SpQRConfig.preset(), on_layer=on_layer)
    return sink.params()
