"""``--nsamples`` and ``--max-minutes``: how much text a run calibrates on."""

from __future__ import annotations

import dataclasses
import re

from spqr_jax.cli.display import say
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.forecast import Text, measure_machine, seconds
from spqr_jax.forecast.amount import TOKENS_AN_INPUT, enough_windows, widest_input, windows_within
from spqr_jax.forecast.quantizing import quantize_work
from spqr_jax.models.config import DecoderConfig
from spqr_jax.resolve import default_dtype
from spqr_jax.tune.config import TuneConfig

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Amount:
    """What the user said.

    Attributes:
      windows: a number, or None for as many as the model needs.
      seqlen: tokens of each.
      max_minutes: with None windows, that the run may take by its forecast; None for any time.
    """

    windows: int | None
    seqlen: int
    max_minutes: float | None

    @classmethod
    def parse(cls, nsamples: str, seqlen: int, max_minutes: float | None) -> Amount:
        """From the options.

        Raises:
          SpQRError: they are no numbers, or contradict each other.
        """
        if nsamples == AUTO:
            return cls(None, seqlen, max_minutes)
        if not re.fullmatch("[0-9]{1,9}", nsamples) or int(nsamples) == 0:
            raise SpQRError(f"--nsamples: expected a number of windows, 1 or more, or {AUTO}; got {nsamples!r}")
        if max_minutes is not None:
            raise SpQRError("--max-minutes chooses the number of windows: leave out --nsamples, or --max-minutes")
        return cls(int(nsamples), seqlen, None)

    def text(self, model: DecoderConfig, config: SpQRConfig, tuning: TuneConfig | None, dtype: str | None) -> Text:
        """The windows to take; says so where they are fewer than the model needs.

        Raises:
          SpQRError: the time is too short for any text.
        """
        enough = enough_windows(model, self.seqlen)
        windows = enough if self.windows is None else self.windows
        if self.max_minutes is not None:
            windows = self._within(self.max_minutes, enough, model, config, tuning, dtype or default_dtype())
            say(f"--max-minutes {self.max_minutes:g} allows {windows} windows: --nsamples {windows} repeats this run")
        if windows < enough:
            name, width, share = widest_input(model)
            tokens = windows * self.seqlen * share / width
            say(
                f"{tokens:.2g} tokens for each of the {width} inputs of {name}: a first try. The model will be better "
                f"with {TOKENS_AN_INPUT}, which --nsamples {AUTO} takes ({enough} windows)"
            )
        return Text(windows, self.seqlen)

    def _within(
        self,
        minutes: float,
        most: int,
        model: DecoderConfig,
        config: SpQRConfig,
        tuning: TuneConfig | None,
        dtype: str,
    ) -> int:
        machine = measure_machine(tuple(dict.fromkeys((dtype, "bfloat16"))))

        def seconds_of(text: Text) -> float:
            return seconds(quantize_work(model, config, text, tuning), machine, dtype, compiled=False)

        windows = windows_within(most, self.seqlen, 60 * minutes, seconds_of)
        if windows is None:
            least = seconds_of(Text(1, self.seqlen)) / 60
            raise SpQRError(
                f"--max-minutes {minutes:g}: with one window this run takes about {least:.1f} minutes; allow more"
            )
        return windows
