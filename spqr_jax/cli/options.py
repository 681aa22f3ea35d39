"""Command-line options shared by several commands, and how they become a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import jax

from spqr_jax.cli.help import CALIBRATION, COMPUTATION, OUTPUT, TEXT, argument, flag, option
from spqr_jax.config import BASELINES, DEFAULT_PRESET, SpQRConfig
from spqr_jax.data import DATA_HELP
from spqr_jax.data.mixture import MIXED
from spqr_jax.errors import SpQRError
from spqr_jax.output import check_file
from spqr_jax.resolve import DTYPES, MODEL_HELP
from spqr_jax.rules import LayerRule
from spqr_jax.stream.mesh import parse_mesh as mesh_of
from spqr_jax.tune.config import Tune, TuneConfig

Model = Annotated[str, argument("MODEL", f"The model: {MODEL_HELP}.")]


def checked_file(path: Path | None) -> Path | None:
    """Says before the work that a result could not be written."""
    if path is not None:
        check_file(path)
    return path


_DEFAULT_TEXT = "wikitext2, or pydoc without a network"
_DEFAULT_CALIBRATION = "mixed: prose, code, conversations, and with a network other languages"

Out = Annotated[Path, option(OUTPUT, "DIR", "Directory to write.")]
Overwrite = Annotated[bool, flag(OUTPUT, "--overwrite", "Replace the output if it exists.")]
Resume = Annotated[
    bool, flag(OUTPUT, "--resume", "Go on with a run that was stopped. Give the other options as before.")
]
Restart = Annotated[bool, flag(OUTPUT, "--restart", "Remove what a stopped run has saved, and begin again.")]
Mesh = Annotated[
    str | None,
    option(
        COMPUTATION,
        "MESH",
        "Devices to quantize on, such as data=4 or data=4,rows=2. auto: all.",
        show_default="one device",
    ),
]
Hosts = Annotated[
    str | None,
    option(
        COMPUTATION,
        "HOSTS",
        "Run on several machines, the same command on each: ADDRESS:PORT,COUNT,INDEX. auto: as the cluster says.",
        show_default="this one",
    ),
]
Json = Annotated[
    Path | None, option(OUTPUT, "FILE", "Also write the result to this JSON file.", "--json", callback=checked_file)
]
Dtype = Annotated[
    str | None,
    option(
        COMPUTATION,
        "TYPE",
        f"Type of the dense weights: {', '.join(DTYPES)}.",
        show_default="float32 on a CPU, bfloat16 on a GPU or TPU",
    ),
]
Data = Annotated[str | None, option(TEXT, "TEXT", f"The text to measure on: {DATA_HELP}.", show_default=_DEFAULT_TEXT)]
SeqLen = Annotated[int, option(TEXT, "N", "Tokens per window.", min=2)]
Calibration = Annotated[
    list[str] | None,
    option(
        CALIBRATION,
        "TEXT",
        f"The calibration text: {MIXED}, {DATA_HELP}. Repeat the option to mix texts. TEXT=WEIGHT sets a weight: "
        "'--calib wikitext2 --calib code.jsonl=2' takes two windows of code.jsonl for each window of wikitext2.",
        show_default=_DEFAULT_CALIBRATION,
    ),
]
Windows = Annotated[int, option(CALIBRATION, "N", "Number of windows of calibration text.", "--nsamples", min=1)]
CalibrationSeqLen = Annotated[int, option(CALIBRATION, "N", "Tokens per window.", "--seqlen", min=2)]
CalibrationSeed = Annotated[int, option(CALIBRATION, "N", "Seed for the random choice of windows.", "--seed", min=0)]

_DIGITS = re.compile("[0-9]{1,9}")


def parse_mesh(text: str | None) -> jax.sharding.Mesh | None:
    """Devices by axes: ``data=4,rows=2``, or ``auto`` for all of them along ``data``; None for one device.

    Raises:
      SpQRError: the text says something else, or there are fewer devices.
    """
    if text is None:
        return None
    return mesh_of(text)


def parse_rule(text: str) -> LayerRule:
    """``PATTERN=skip`` or ``PATTERN=BITS``."""
    pattern, separator, action = text.rpartition("=")
    if separator and pattern and action == "skip":
        return LayerRule(pattern, skip=True)
    if separator and pattern and _DIGITS.fullmatch(action):
        return LayerRule(pattern, bits=int(action))
    raise SpQRError(f"rule {text!r}: expected PATTERN=skip or PATTERN=BITS, such as 'down_proj=4'")


_CALIBRATED = {"damping", "drift_correction", "calibration_dtype", "order", "input_shards", "sequential", "target_bits"}
"""Options that say how calibration text is used."""


def _whole_number(option: str, text: str, otherwise: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise SpQRError(f"{option}: expected a number or {otherwise}, got {text!r}")
    return int(text)


def build_config(method: str, preset: str | None = None, **given: Any) -> SpQRConfig:
    """The preset or method, changed by the options that were given (those not None).

    SpQR without bits, threshold or target is the default preset.
    """
    methods: dict[str, Callable[..., SpQRConfig]] = {
        "spqr": SpQRConfig,
        "gptq": SpQRConfig.gptq,
        "rtn": SpQRConfig.rtn,
        "reference": SpQRConfig.reference,
        **{name: partial(SpQRConfig.baseline, name) for name in BASELINES},
    }
    if method not in methods:
        raise SpQRError(f"method must be one of {', '.join(methods)}, got {method!r}")
    if preset is not None and method != "spqr":
        raise SpQRError(f"--preset works with --method spqr only, not with --method {method}")
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("group_size") == 0:
        changes["group_size"] = None
    if method == "rtn" and (unused := _CALIBRATED & set(changes)):
        raise SpQRError(f"--method rtn does not use {', '.join(sorted(unused))}: leave it out")
    if (head := changes.get("head_bits")) is not None:
        changes["head_bits"] = None if head == "none" else _whole_number("--head-bits", head, "'none'")
    bits = changes.pop("bits", None)
    widths: tuple[int, ...] = ()
    if bits not in (None, "auto"):
        widths = tuple(_whole_number("--bits", one, "several, such as 3,4, or 'auto'") for one in bits.split(","))
        changes |= {"bit_choices": widths} | ({"bits": widths[0]} if len(widths) == 1 else {})
    if method == "spqr" and not {"target_bits", "bits", "outlier_threshold"} & set(changes):
        preset = preset or DEFAULT_PRESET
    if (bits == "auto" or len(widths) > 1) and preset is None and "target_bits" not in changes:
        raise SpQRError(f"--bits {bits} lets spqr choose widths to reach a size: give --target-bits or --preset")
    return SpQRConfig.preset(preset, **changes) if preset else methods[method](**changes)


def build_tuning(objective: str, **given: Any) -> TuneConfig | None:
    """How to train, changed by the options that were given (those not None); None for not at all."""
    if objective not in get_args(Tune):
        raise SpQRError(f"--tune must be one of {', '.join(get_args(Tune))}, got {objective!r}")
    changes = {name: value for name, value in given.items() if value is not None}
    if objective == "none":
        if changes:
            options = ", ".join(f"--tune-{name.replace('_', '-')}" for name in sorted(changes))
            raise SpQRError(f"{options}: add --tune logits or --tune blocks, or leave it out")
        return None
    return TuneConfig(objective=cast(Any, objective), **changes)
