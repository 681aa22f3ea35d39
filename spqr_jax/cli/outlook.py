"""What a command says at its start, and at its end: what it will do, how long it takes, what to try next.

All of it goes to stderr, so that results on stdout stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.text import Text as Styled

from spqr_jax.cli.display import errors, say
from spqr_jax.config import SpQRConfig
from spqr_jax.forecast import (
    Machine,
    Text,
    Work,
    about_bytes,
    about_seconds,
    kept_programs,
    measure_machine,
    measuring,
    memory,
    seconds,
)
from spqr_jax.forecast.memory_plan import plan_memory
from spqr_jax.forecast.quantizing import quantize_work
from spqr_jax.forecast.words import about_count
from spqr_jax.job.driver import quantizable_paths
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import weight_shapes
from spqr_jax.resolve import OpenedModel, default_dtype
from spqr_jax.stream.outer import outer_memory
from spqr_jax.tune.config import TuneConfig

_LONG_COMPILATION = 10.0  # seconds from which on the line says how much of it is compilation
_METHODS = {"spqr": "SpQR", "gptq": "GPTQ", "reference": "the original SpQR's choices", "rtn": "round to nearest"}


@dataclasses.dataclass(frozen=True)
class Outlook:
    """A forecast that has been said.

    Attributes:
      seconds: of the whole command, on this machine as busy as it is now.
      bytes: peak memory.
      key: of the run's compiled programs.
    """

    seconds: float
    bytes: float
    key: str

    def end(self, next_command: str, note: str | None = None) -> None:
        """The command has done its work: says what there is to know, if anything, and what to try next."""
        kept_programs.note_kept(self.key)
        if note is not None:
            say(note)
        say_next(next_command)

    def to_json(self) -> dict[str, float]:
        """Entries for a command's JSON, beside what it really took."""
        return {"forecast_seconds": self.seconds, "forecast_bytes": self.bytes}


def say_next(next_command: str) -> None:
    """The last line of a command."""
    say(f"next: {next_command}")


# ---- one function for each command ------------------------------------------------------


def before_quantize(
    opened: OpenedModel,
    method: str,
    config: SpQRConfig,
    calibration: dict[str, Any] | None,
    tuning: TuneConfig | None,
    dtype: str | None,
) -> Outlook:
    """Says what `spqr quantize` will do; `calibration` is what `read_calibration` keeps about its windows."""
    model, dtype = opened.source.config, dtype or default_dtype()
    text = Text(0, 2) if calibration is None else Text(calibration["windows"], calibration["seqlen"])
    shapes = weight_shapes(model)
    paths = quantizable_paths(model, config)
    count = sum(math.prod(shapes[path]) for path in paths)
    what = f"quantizing {len(paths)} matrices ({about_count(count)} weights) with {describe_method(method, config)}"
    if calibration is not None:
        what += f", calibrated on {describe_text(text, calibration['data'])}"
    if tuning is not None:
        what += f"; then tuning ({tuning.objective})"
    advice = ["a smaller --nsamples", "a smaller --seqlen"] if calibration is not None else []
    return _announce(
        what,
        quantize_work(model, config, text, tuning),
        plan_memory(model, config, text, tuning, itemsize(dtype)).host_bytes,
        dtype,
        kept_programs.run_key("quantize", model, kept_programs.program_settings(config), text.seqlen, tuning, dtype),
        [*advice, *_smaller_dtype(dtype)],
    )


def before_perplexity(opened: OpenedModel, tokens: Any, data: str, batch_size: int, dtype: str | None) -> Outlook:
    """Says what `spqr perplexity` will do with int32 tokens [windows, length]."""
    model, text, dtype = opened.source.config, Text(*tokens.shape), dtype or default_dtype()
    return _announce(
        f"measuring the perplexity of {opened.label} on {describe_text(text, data)}",
        measuring.perplexity_work(model, text, opened.quantized),
        memory.perplexity_bytes(
            model, text, batch_size, itemsize(dtype), opened.quantized, outer_memory(opened.source)
        ),
        dtype,
        kept_programs.run_key("perplexity", model, text.seqlen, batch_size, dtype),
        ["a smaller --seqlen", *_smaller_batch(batch_size), *_smaller_dtype(dtype)],
    )


def before_compare(
    dense: OpenedModel, opened: OpenedModel, tokens: Any, data: str, batch_size: int, dtype: str | None
) -> Outlook:
    """Says what `spqr compare` will do with int32 tokens [windows, length]."""
    text, dtype = Text(*tokens.shape), dtype or default_dtype()
    models = dense.source.config, opened.source.config
    outers = outer_memory(dense.source), outer_memory(opened.source)
    return _announce(
        f"comparing {opened.label} with {dense.label} on {describe_text(text, data)}",
        measuring.compare_work(*models, text),
        memory.compare_bytes(*models, text, batch_size, itemsize(dtype), outers),
        dtype,
        kept_programs.run_key("compare", models, text.seqlen, batch_size, dtype),
        ["a smaller --seqlen", *_smaller_batch(batch_size), *_smaller_dtype(dtype)],
    )


def before_analyze(original: OpenedModel, calibration: dict[str, Any], dtype: str | None) -> Outlook:
    """Says what `spqr analyze` will do with the dense model."""
    model, dtype = original.source.config, dtype or default_dtype()
    text = Text(calibration["windows"], calibration["seqlen"])
    return _announce(
        f"analyzing the weights of {original.label} on {describe_text(text, calibration['data'])}",
        measuring.analyze_work(model, text),
        memory.analyze_bytes(model, text, itemsize(dtype)),
        dtype,
        kept_programs.run_key("analyze", model, text.seqlen, dtype),
        ["a smaller --nsamples", "a smaller --seqlen", *_smaller_dtype(dtype)],
    )


def before_bench(
    rivals: Sequence[tuple[DecoderConfig, float, bool]], prompt: int, new: int, turns: int, rate: float
) -> None:
    """Says how long `spqr bench` takes: one turn more than asked for, to warm up, and compilation.

    Args:
      rivals: sizes, bytes of weights, and whether they are packed, of each.
      prompt, new: tokens read and decoded in a turn.
      turns: of each rival.
      rate: bytes per second of memory.
    """
    machine = measure_machine()
    total = 0.0
    for model, weight_bytes, packed in rivals:
        reading = seconds(measuring.reading_work(model, Text(1, prompt)), machine, compiled=True)
        total += (turns + 1) * (reading + measuring.decode_seconds(weight_bytes, packed, new, rate))
        total += machine.slowness * measuring.BENCH_PROGRAMS
    say(f"{turns + 1} turns of {len(rivals)} model{'s' * (len(rivals) > 1)}: {about_seconds(total)}")


def before_eval(opened: OpenedModel, tasks: str, limit: float | None, dtype: str | None) -> None:
    """Says what `spqr eval` will do. How long it takes depends on the questions, which the harness has yet to read."""
    model, dtype = opened.source.config, dtype or default_dtype()
    some = Text(224, 128)  # so many tokens that what a run costs once does not count
    machine = measure_machine((dtype,))
    rate = some.tokens / max(seconds(measuring.reading_work(model, some), machine, dtype, compiled=True), 1e-9)
    questions = (
        "all questions" if limit is None else f"{limit:g} a task" if limit >= 1 else f"{limit:.0%} of the questions"
    )
    say(f"answering questions of {tasks} with {opened.label}: {questions}")
    say(f"this machine ({machine.name}) reads about {_two_digits(rate)} tokens per second; a bar shows the time left")


# ---- words ------------------------------------------------------------------------------


def describe_method(method: str, config: SpQRConfig) -> str:
    """ "SpQR at 4.3 stored bits per weight", "GPTQ and 3-bit codes"."""
    name = _METHODS.get(method, method)
    if config.target_bits is not None:
        return f"{name} at {config.target_bits:g} stored bits per weight"
    return f"{name} and {config.bits}-bit codes"


def describe_text(text: Text, data: str) -> str:
    """ "16 windows of 1024 tokens of pydoc"."""
    return f"{text.windows} window{'s' * (text.windows != 1)} of {text.seqlen} tokens of {data}"


def cost_line(took: float, peak: float, machine: Machine, compiling: float) -> str:
    """ "about 3 minutes and 2.9 GB of memory on this machine (cpu, 2 cores)"."""
    line = f"{about_seconds(took)} and {about_bytes(peak)} of memory on this machine ({machine.name})"
    if machine.platform != "cpu":
        line += "; this is a guess: such forecasts were checked on CPUs only"
    if compiling >= _LONG_COMPILATION:
        line += f"; {about_seconds(compiling)} of it to compile programs, which are kept for the next run"
    return line


def low_memory(peak: float, machine: Machine, advice: Sequence[str]) -> str | None:
    """A warning where the forecast needs more memory than is free, with what takes less; None where there is enough."""
    if machine.free_bytes is None or peak <= machine.free_bytes:
        return None
    message = (
        f"only {about_bytes(machine.free_bytes)} of memory is free: the run may be slow, or the system may stop it"
    )
    return f"{message}. To use less: {', '.join(advice)}" if advice else message


def itemsize(dtype: str) -> int:
    """Bytes of a number of this type."""
    return 4 if dtype == "float32" else 2


def _smaller_dtype(dtype: str) -> list[str]:
    return ["--dtype bfloat16"] if dtype == "float32" else []


def _smaller_batch(batch_size: int) -> list[str]:
    return ["a smaller --batch-size"] if batch_size > 1 else []


def _two_digits(value: float) -> int:
    unit = 10 ** max(0, len(str(int(value))) - 2)
    return int(unit * round(value / unit))


def _announce(what: str, work: Work, peak: float, dtype: str, key: str, advice: Sequence[str]) -> Outlook:
    """Measures this machine, says the two lines, and warns of low memory."""
    machine = measure_machine(tuple(dict.fromkeys((dtype, *(("bfloat16",) if work.bfloat16 else ())))))
    compiled = kept_programs.are_kept(key)
    took = seconds(work, machine, dtype, compiled)
    say(what)
    say(cost_line(took, peak, machine, 0.0 if compiled else machine.slowness * work.programs))
    if (warning := low_memory(peak, machine, advice)) is not None:
        errors.print(Styled.assemble(("warning:", "bold yellow"), " ", warning), soft_wrap=True)
    return Outlook(took, peak, key)
