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
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import DataError, ModelError
from spqr_jax.evaluate.passes import final_residuals, stream_numbers, window_groups
from spqr_jax.evaluate.perplexity import next_tokens
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.models.decoder import Decoder, Outer
from spqr_jax.stream.blocks import BlockSource, as_source
from spqr_jax.stream.finite import not_finite
from spqr_jax.stream.head import Seen, see_two
from spqr_jax.stream.outer import lean_outer
from spqr_jax.stream.windows import checked_windows

_Two = tuple[BlockSource, BlockSource]
_Outers = tuple[Outer, Outer]

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


class DenseStreams:
    """The dense model's residual streams after its last block, for a text that several models are compared on.

    The second comparison then takes little more than half the time.

    Args:
      most: bytes of streams that are kept, float32 [windows, length, hidden]. Streams beyond them are computed anew.
    """

    def __init__(self, most: int = 2**30) -> None:
        self._left = most
        self._streams: dict[tuple[Any, ...], list[jax.Array]] = {}

    def of(self, model: BlockSource, outer: Outer, batches: Sequence[np.ndarray], steps: Steps) -> list[jax.Array]:
        """As `final_residuals` gives them for these batches."""
        key = tuple((batch.shape, batch.tobytes()) for batch in batches)
        if key in self._streams:
            steps.advance(model.config.num_layers * sum(map(len, batches)))
            return self._streams[key]
        streams = final_residuals(model, outer, batches, steps)
        if (nbytes := sum(stream.nbytes for stream in streams)) <= self._left:
            self._left -= nbytes
            self._streams[key] = streams
        return streams


def compare(
    dense: Decoder | BlockSource,
    quantized: Decoder | BlockSource,
    windows: np.ndarray,
    *,
    batch_size: int = 1,
    events: Events = ignore,
    streams: DenseStreams | None = None,
) -> Fidelity:
    """Runs both models over the same windows, which do not see each other, in one pass.

    Both models are read one block at a time, and a quantized one stays packed, as in `perplexity`. So do the residual
    streams: those of both models together take what `perplexity` allows for the larger one.

    Args:
      dense: what is compared with, usually the model before it was quantized.
      quantized: any model of the same vocabulary.
      windows: int32 [windows, length], length >= 2.
      batch_size: windows at a time.
      events: told of each batch, as phase "scoring". A step is one window through one block of one model, or through
        both output heads.
      streams: read and filled; one for each dense model. None keeps nothing.

    Raises:
      ModelError: the vocabularies differ in size.
      DataError: windows that one of the models cannot take.
      NotFiniteError: a model's loss is no number; says where in it that begins.
    """
    models = as_source(dense), as_source(quantized)
    configs = models[0].config, models[1].config
    vocabularies = configs[0].vocab_size, configs[1].vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"the models have vocabularies of {vocabularies[0]} and {vocabularies[1]} tokens: only distributions over "
            "the same tokens can be compared"
        )
    windows = checked_windows(checked_windows(windows, configs[0]), configs[1])
    begun = time.perf_counter()
    outers = lean_outer(models[0]), lean_outer(models[1])
    steps = Steps("scoring", len(windows) * (sum(config.num_layers for config in configs) + 1), events)
    parts: list[TokenStatistics] = []
    hidden_sizes, most = sum(config.hidden_size for config in configs), max(map(stream_numbers, configs))
    for batches in window_groups(windows, batch_size, hidden_sizes, most):
        part = _group_statistics(models, outers, batches, steps, streams or DenseStreams(most=0))
        _refuse_infinite(part, models, windows, sum(len(before.kl) for before in parts))
        parts.append(part)
    together = TokenStatistics(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return summarize(together, time.perf_counter() - begun)


def _group_statistics(
    models: _Two, outers: _Outers, batches: Sequence[np.ndarray], steps: Steps, kept: DenseStreams
) -> TokenStatistics:
    """The statistics of a group's predicted tokens, in NumPy arrays [windows, tokens]."""
    streams = kept.of(models[0], outers[0], batches, steps), final_residuals(models[1], outers[1], batches, steps)
    targets = [next_tokens(batch) for batch in batches]
    configs = models[0].config, models[1].config
    pairs = list(zip(*streams, strict=True))
    seen = see_two(configs, outers, pairs, [jnp.asarray(true) for true in targets])
    steps.advance(sum(map(len, batches)))
    parts = [_statistics(*part, true) for part, true in zip(seen, targets, strict=True)]
    return TokenStatistics(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _statistics(dense: Seen, quantized: Seen, kl: jax.Array, targets: np.ndarray) -> TokenStatistics:
    """Of a batch; the last position of a window predicts nothing."""
    everything = TokenStatistics(
        jnp.maximum(kl, 0.0),
        dense.loss,
        quantized.loss,
        dense.top,
        dense.likeliest == quantized.likeliest,
        dense.likeliest == targets,
        quantized.likeliest == targets,
    )
    return TokenStatistics(*(np.asarray(array)[:, :-1] for array in everything))


def _refuse_infinite(part: TokenStatistics, models: _Two, windows: np.ndarray, first: int) -> None:
    """Refuses statistics of a group whose first window is `first`."""
    for name, model, losses in zip(("dense", "quantized"), models, (part.dense_loss, part.loss), strict=True):
        if bad := np.flatnonzero(~np.isfinite(losses).all(axis=1)).tolist():
            window = first + bad[0]
            raise not_finite(f"the {name} model's loss of window {window}", model, windows[window : window + 1])


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
