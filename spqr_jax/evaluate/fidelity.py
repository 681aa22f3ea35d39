"""How far a quantized model's predictions are from the dense model's, token by token.

Perplexity says whether the right token became less likely on average. What else
changed, it hides: this compares the whole distributions. The statistics are those of
llama.cpp's ``llama-perplexity --kl-divergence``, over every predicted token of a window
(llama.cpp takes the second half of each), and the flips of "Accuracy is not all you
need" (arXiv 2407.09141).

Letters: p, q the dense and the quantized model's distribution of one next token.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spqr_jax.errors import DataError, ModelError
from spqr_jax.evaluate.passes import Steps, final_residuals, window_groups
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Decoder, Outer, logits
from spqr_jax.models.dense import head_part
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.stream.finite import not_finite
from spqr_jax.stream.windows import checked_windows

_HEAD_CHUNK = 128  # positions whose logits, of both models, are held at once

SURE = 0.5
"""The probability from which on the dense model is called sure of its likeliest token."""
KL_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
DELTA_P_PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


Array = jax.Array | np.ndarray


class TokenStatistics(NamedTuple):
    """Of each predicted token, [windows, tokens] each."""

    kl: Array  # f32, KL(p ‖ q) in nats
    dense_loss: Array  # f32, -ln p of the true token
    loss: Array  # f32, -ln q of the true token
    dense_top: Array  # f32, the probability of the dense model's likeliest token
    same_top: Array  # bool, both models think the same token likeliest
    dense_right: Array  # bool, the dense model's likeliest token is the true one
    right: Array  # bool, the same of the quantized model


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Result of :func:`compare`. Losses in nats, shares and probabilities 0..1.

    Attributes:
      tokens, windows: how much was compared.
      dense_perplexity, perplexity: of the two models.
      loss_increase: mean loss above the dense model's, ln(perplexity / dense_perplexity).
      loss_increase_stderr: its standard error, from the paired differences of windows
        (nan for one window).
      kl_mean, kl_stderr, kl_max: KL(p ‖ q); the standard error from the spread of windows.
      kl_percentiles: by percentile, `KL_PERCENTILES`.
      same_top: share of tokens whose likeliest candidate is the same in both.
      same_top_stderr: from the spread of windows.
      sure: share of tokens whose likeliest candidate the dense model gives at least
        `SURE`; on the others it is close to a draw, and little turns it.
      same_top_sure: share of these whose likeliest candidate is the same in both (nan if
        there are none).
      delta_p_mean, delta_p_rms: of q - p of the true token.
      delta_p_percentiles: by percentile, `DELTA_P_PERCENTILES`.
      lost: share of tokens that the dense model predicts and the quantized one does not.
      gained: the other way round.
      dense_window_losses, window_losses, window_kl: of each window, float64 [windows].
      seconds: wall-clock time, compilation included.
    """

    tokens: int
    windows: int
    dense_perplexity: float
    perplexity: float
    loss_increase: float
    loss_increase_stderr: float
    kl_mean: float
    kl_stderr: float
    kl_max: float
    kl_percentiles: dict[float, float]
    same_top: float
    same_top_stderr: float
    sure: float
    same_top_sure: float
    delta_p_mean: float
    delta_p_rms: float
    delta_p_percentiles: dict[float, float]
    lost: float
    gained: float
    dense_window_losses: np.ndarray
    window_losses: np.ndarray
    window_kl: np.ndarray
    seconds: float

    @property
    def perplexity_ratio(self) -> float:
        """perplexity / dense_perplexity."""
        return math.exp(self.loss_increase)

    @property
    def perplexity_ratio_stderr(self) -> float:
        """Standard error of `perplexity_ratio`, to first order in that of `loss_increase`."""
        return self.perplexity_ratio * self.loss_increase_stderr

    @property
    def perplexity_stderr(self) -> float:
        """Standard error of `perplexity`, from the spread of windows (nan for one)."""
        return self.perplexity * _stderr(self.window_losses)

    @property
    def flips(self) -> float:
        """Share of tokens whose prediction went from right to wrong or from wrong to right."""
        return self.lost + self.gained

    def to_json(self) -> dict[str, Any]:
        """A JSON-serializable dictionary of all figures, the derived ones included."""
        values = dataclasses.asdict(self)
        for name in ("kl_percentiles", "delta_p_percentiles"):
            values[name] = {f"{percent:g}": value for percent, value in values[name].items()}
        for name in ("dense_window_losses", "window_losses", "window_kl"):
            values[name] = values[name].tolist()
        derived = ("perplexity_ratio", "perplexity_ratio_stderr", "flips")
        return values | {name: getattr(self, name) for name in derived} | {"stderr": self.perplexity_stderr}


@partial(jax.jit, static_argnums=(0, 1))
def _token_statistics(
    dense_config: DecoderConfig,
    config: DecoderConfig,
    outers: tuple[Outer, Outer],
    residuals: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
) -> TokenStatistics:
    """The statistics of tokens 2..n of each sequence; logits are made and dropped chunk by chunk."""
    length = tokens.shape[1] - 1
    chunk = min(_HEAD_CHUNK, length)
    padded = -(-length // chunk) * chunk
    dense_hidden, hidden = (jnp.pad(r[:, :-1], ((0, 0), (0, padded - length), (0, 0))) for r in residuals)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, padded - length)))

    def body(first: jax.Array) -> TokenStatistics:
        def part(array: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, first, chunk, axis=1)

        return _compare_logits(
            logits(dense_config, outers[0], part(dense_hidden)), logits(config, outers[1], part(hidden)), part(targets)
        )

    chunks = lax.map(body, jnp.arange(0, padded, chunk))  # [chunks, windows, chunk] each
    return TokenStatistics(*(jnp.moveaxis(a, 0, 1).reshape(len(tokens), padded)[:, :length] for a in chunks))


def _compare_logits(dense: jax.Array, quantized: jax.Array, targets: jax.Array) -> TokenStatistics:
    """f32 [..., vocab] twice, int32 [...] -> statistics [...].

    KL is summed as Σ p ln(p/q) - p + q, whose terms are none of them negative: so no
    cancellation makes a small divergence negative.
    """
    log_p, log_q = jax.nn.log_softmax(dense), jax.nn.log_softmax(quantized)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kl = jnp.sum(p * (log_p - log_q) - p + q, axis=-1)
    top, dense_top = jnp.argmax(quantized, axis=-1), jnp.argmax(dense, axis=-1)

    def of_target(log: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log, targets[..., None], axis=-1)[..., 0]

    return TokenStatistics(
        jnp.maximum(kl, 0.0),
        -of_target(log_p),
        -of_target(log_q),
        jnp.max(p, axis=-1),
        top == dense_top,
        dense_top == targets,
        top == targets,
    )


def compare(
    dense: Decoder,
    quantized: Decoder,
    windows: np.ndarray,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Runs both models over the same windows, which do not see each other, in one pass.

    A quantized model stays packed, as in `perplexity`. The residual streams of both models take up to 1 GiB.

    Args:
      dense: what is compared with, usually the model before it was quantized.
      quantized: any model of the same vocabulary.
      windows: int32 [windows, length], length >= 2.
      batch_size: windows at a time.
      progress: called with (steps done, steps in all). A step is one window through one block of one model, or through
        both output heads.

    Raises:
      ModelError: the vocabularies differ in size.
      DataError: windows that one of the models cannot take.
      NotFiniteError: a model's loss is no number; says where in it that begins.
    """
    vocabularies = dense.config.vocab_size, quantized.config.vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"the models have vocabularies of {vocabularies[0]} and {vocabularies[1]} tokens: only distributions over "
            "the same tokens can be compared"
        )
    windows = checked_windows(checked_windows(windows, dense.config), quantized.config)
    begun = time.perf_counter()
    models = (dense, quantized)
    steps = Steps(len(windows) * (sum(model.config.num_layers for model in models) + 1), progress)
    parts: list[TokenStatistics] = []
    for batches in window_groups(windows, batch_size, sum(model.config.hidden_size for model in models)):
        parts += _group_statistics(models, batches, steps)
        _refuse_infinite(parts, models, windows)
    together = TokenStatistics(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return summarize(together, time.perf_counter() - begun)


def _group_statistics(
    models: tuple[Decoder, Decoder], batches: Sequence[np.ndarray], steps: Steps
) -> list[TokenStatistics]:
    """The statistics of each batch of a group, in NumPy arrays."""
    residuals = [final_residuals(model, batches, steps) for model in models]
    heads = [
        head_part(model.config, model.outer, streams[0].dtype) for model, streams in zip(models, residuals, strict=True)
    ]
    parts = []
    for batch, *streams in zip(batches, *residuals, strict=True):
        configs = models[0].config, models[1].config
        part = _token_statistics(*configs, tuple(heads), tuple(streams), jnp.asarray(batch))
        parts.append(TokenStatistics(*(np.asarray(array) for array in part)))
        steps.advance(len(batch))
    return parts


def _refuse_infinite(parts: Sequence[TokenStatistics], models: tuple[Decoder, Decoder], windows: np.ndarray) -> None:
    for name, model, field in zip(("dense", "quantized"), models, ("dense_loss", "loss"), strict=True):
        losses = np.concatenate([getattr(part, field) for part in parts])
        if bad := np.flatnonzero(~np.isfinite(losses).all(axis=1)).tolist():
            raise not_finite(
                f"the {name} model's loss of window {bad[0]}", TreeSource(model), windows[bad[0] : bad[0] + 1]
            )


def summarize(statistics: TokenStatistics, seconds: float = math.nan) -> Fidelity:
    """The figures that token statistics [windows, tokens] come to, summed in float64.

    Raises:
      DataError: a model gave numbers that are not finite.
    """
    kl, dense_loss, loss, dense_top = (np.asarray(a, np.float64) for a in statistics[:4])
    same, dense_right, right = (np.asarray(a, bool) for a in statistics[4:])
    sure = dense_top >= SURE
    if not all(np.all(np.isfinite(a)) for a in (kl, dense_loss, loss)):
        raise DataError(
            "a model's predictions are not finite on this text: its activations overflow, or its weights are damaged"
        )
    delta_p = np.exp(-loss) - np.exp(-dense_loss)
    increase = loss.mean(1) - dense_loss.mean(1)

    def percentiles(values: np.ndarray, which: tuple[float, ...]) -> dict[float, float]:
        return dict(zip(which, np.percentile(values, which).tolist(), strict=True))

    return Fidelity(
        tokens=kl.size,
        windows=len(kl),
        dense_perplexity=float(np.exp(dense_loss.mean())),
        perplexity=float(np.exp(loss.mean())),
        loss_increase=float(increase.mean()),
        loss_increase_stderr=_stderr(increase),
        kl_mean=float(kl.mean()),
        kl_stderr=_stderr(kl.mean(1)),
        kl_max=float(kl.max()),
        kl_percentiles=percentiles(kl, KL_PERCENTILES),
        same_top=float(same.mean()),
        same_top_stderr=_stderr(same.mean(1)),
        sure=float(sure.mean()),
        same_top_sure=float(same[sure].mean()) if sure.any() else math.nan,
        delta_p_mean=float(delta_p.mean()),
        delta_p_rms=float(np.sqrt(np.mean(np.square(delta_p)))),
        delta_p_percentiles=percentiles(delta_p, DELTA_P_PERCENTILES),
        lost=float(np.mean(dense_right & ~right)),
        gained=float(np.mean(right & ~dense_right)),
        dense_window_losses=dense_loss.mean(1),
        window_losses=loss.mean(1),
        window_kl=kl.mean(1),
        seconds=seconds,
    )


def _stderr(by_window: np.ndarray) -> float:
    """Standard error of the mean over windows; nan for one, of which nothing is known."""
    return float(by_window.std(ddof=1) / math.sqrt(len(by_window))) if len(by_window) > 1 else math.nan
