"""The options of ``spqr quantize`` alone, in the panels of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spqr_jax.cli.amount import AUTO
from spqr_jax.cli.help import CALIBRATION, COMPUTATION, NOTHING, OUTPUT, flag, option
from spqr_jax.cli.options import checked_file
from spqr_jax.config import BASELINES, DEFAULT_PRESET, DEFAULT_STEPS, PRESETS
from spqr_jax.forecast.amount import TOKENS_AN_INPUT

SIZE, TUNING = "Size and quality", "Tuning afterwards"
SOLVER, MORE_CALIBRATION = "Solver (for experts)", "Calibration (for experts)"

_PRESET_BITS = {name: preset["target_bits"] for name, preset in PRESETS.items()}

# ---- size and quality -----------------------------------------------------------------------------

Preset = Annotated[
    str | None,
    option(
        SIZE,
        "NAME",
        "Size of the model, in stored bits per weight: "
        f"{', '.join(f'{name} ({bits})' for name, bits in _PRESET_BITS.items())}.",
        show_default=f"{DEFAULT_PRESET}, unless you set --target-bits, --bits or --outlier-threshold",
    ),
]
TargetBits = Annotated[
    float | None,
    option(SIZE, "BITS", "Average stored bits per weight. spqr measures which weights need more bits than others."),
]
Bits = Annotated[
    str | None,
    option(
        SIZE,
        "BITS",
        "Bits per code, 2 to 8. With a preset or target, a list to choose from, such as 3,4, or auto (2,3,4).",
        show_default="chosen by the preset or target, else 3",
    ),
]
OutlierThreshold = Annotated[
    float | None,
    option(
        SIZE,
        "TAU",
        "Relative threshold for outliers. A lower one keeps more weights in 16 bits; inf keeps none.",
        show_default="chosen by the preset or target, else 0.2 for spqr and reference",
    ),
]
HeadBits = Annotated[
    str | None,
    option(
        SIZE,
        "BITS",
        "Bits per code of the output head, or none to leave it dense. A tied head is also the embedding.",
        show_default="8 with a preset, else none",
    ),
]
Rule = Annotated[
    list[str] | None,
    option(
        SIZE,
        "RULE",
        "PATTERN=skip leaves weights dense, PATTERN=BITS sets their bits. PATTERN is a regular expression for a "
        "weight's path, such as 'down_proj'. Repeatable; the first match decides.",
    ),
]

# ---- calibration text -----------------------------------------------------------------------------

Amount = Annotated[
    str,
    option(
        CALIBRATION,
        "N",
        f"Number of windows of calibration text. {AUTO}: {TOKENS_AN_INPUT} tokens for each input of the widest matrix.",
        "--nsamples",
        show_default=AUTO,
    ),
]
MaxMinutes = Annotated[
    float | None,
    option(
        CALIBRATION,
        "MINUTES",
        f"With --nsamples {AUTO}: less text, so that the run takes about so many minutes at most.",
        "--max-minutes",
        min=0.0,
        show_default="no limit",
    ),
]

# ---- tuning ---------------------------------------------------------------------------------------

TuneObjective = Annotated[
    str,
    option(
        TUNING,
        "HOW",
        "Train scales, zero points and outlier values after quantization. blocks: match each block's output. logits: "
        "match the dense model's predictions. none: do not train.",
    ),
]
TuneEpochs = Annotated[
    int | None, option(TUNING, "N", "How many times to go through the calibration text.", min=1, show_default="2")
]
TuneLearningRate = Annotated[
    float | None,
    option(TUNING, "RATE", "Highest learning rate, relative to each parameter's size.", show_default="0.0005"),
]

# ---- solver ---------------------------------------------------------------------------------------

Method = Annotated[
    str,
    option(
        SOLVER,
        "NAME",
        "spqr, gptq, rtn (round to nearest), reference (the original SpQR code's settings), or another method to "
        f"compare with: {', '.join(BASELINES)}.",
    ),
]
Steps = Annotated[
    int | None,
    option(
        SOLVER,
        "N",
        "Steps of the methods that learn.",
        min=1,
        show_default=", ".join(f"{name} {steps}" for name, steps in DEFAULT_STEPS.items()),
    ),
]
GroupSize = Annotated[
    int | None,
    option(
        SOLVER,
        "N",
        "Consecutive inputs that share a scale and a zero point, a multiple of 8. 0: one group per row.",
        show_default="16 for spqr, rtn and reference, else 64",
    ),
]
StatsBits = Annotated[
    int | None,
    option(
        SOLVER,
        "BITS",
        "Bits of each scale and zero point, 2 to 8. 16: 16-bit floats.",
        show_default="3 for spqr and reference, else 16",
    ),
]
StatsGroupSize = Annotated[
    int | None,
    option(
        SOLVER,
        "N",
        "Consecutive rows whose scales and zero points are quantized together, a multiple of 8.",
        show_default="16",
    ),
]
Order = Annotated[
    str | None,
    option(
        SOLVER,
        "ORDER",
        "Order in which inputs are quantized: activation (largest activations first) or identity (as stored).",
        show_default="activation for spqr, gptq and reference, else identity",
    ),
]
InputShards = Annotated[
    int | None,
    option(
        SOLVER,
        "N",
        "Order the inputs of o_proj and down_proj within N equal ranges, so that N devices (or a divisor of N) can "
        "generate with the model together.",
        min=1,
        show_default="1",
    ),
]
Fit = Annotated[
    str | None,
    option(
        SOLVER,
        "FIT",
        "How scales are fitted: search (least error), minmax (full range) or reference (as in the original SpQR code).",
        show_default="minmax for gptq and rtn, reference for reference, else search",
    ),
]
Damping = Annotated[
    float | None,
    option(
        SOLVER,
        "X",
        "Damping: this fraction of the mean of the Hessian's diagonal is added to the diagonal.",
        show_default="0.1 for spqr, 1 for reference, else 0.01",
    ),
]
DriftCorrection = Annotated[
    float | None,
    option(
        MORE_CALIBRATION,
        "X",
        "Before a weight is quantized, correct it for the errors of earlier layers: 0 (not at all) to 1 (fully).",
        show_default="0",
    ),
]
Sequential = Annotated[
    bool | None,
    option(
        MORE_CALIBRATION,
        NOTHING,
        "Calibrate later weights of a block on activations from its quantized earlier weights.",
        show_default="on, except for reference",
    ),
]
CalibrationDtype = Annotated[
    str | None,
    option(
        MORE_CALIBRATION,
        "TYPE",
        "Type of the matrix products during calibration: bfloat16, float32, or auto for the one that your "
        "processor has instructions for.",
        show_default="float32 for reference, else auto",
    ),
]

# ---- before the work ------------------------------------------------------------------------------

OutUnlessPlanning = Annotated[Path | None, option(OUTPUT, "DIR", "Directory to write.", "--out", show_default=False)]
PlanOnly = Annotated[
    bool,
    flag(
        OUTPUT,
        "--plan",
        "Show sizes, memory and time of this run, and do nothing else. MODEL may be a config.json: no weights needed.",
    ),
]
SavePlan = Annotated[
    Path | None,
    option(
        MORE_CALIBRATION,
        "FILE",
        "Write what the plan for a target has measured of each weight to this JSON file.",
        "--save-plan",
        callback=checked_file,
        show_default=False,
    ),
]
UsePlan = Annotated[
    Path | None,
    option(
        MORE_CALIBRATION,
        "FILE",
        "Plan from such a file, for the same or another target, and measure nothing anew.",
        "--use-plan",
        show_default=False,
    ),
]
MachineName = Annotated[
    str | None,
    option(
        OUTPUT,
        "NAME",
        "With --plan: another machine, such as H100, 8xH100, 2x8xH100 (two hosts) or v5e-256.",
        "--machine",
        show_default="this machine",
    ),
]
MaxMemory = Annotated[
    str | None,
    option(
        COMPUTATION,
        "SIZE",
        "Most memory to plan for, of the host and of each device, such as 4GiB. To keep to it, spqr keeps activations "
        "on disk. The result has the same bytes, unless spqr says that it takes smaller chunks of text.",
        "--max-memory",
        show_default="no limit",
    ),
]
