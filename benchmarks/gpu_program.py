#!/usr/bin/env python3
"""Compiles the programs that generate text with a model of Llama-7B's shape, and says what they cost before they run.

    scripts/gpu_program --layers 2 32                  for an H100 that is not there
    scripts/gpu_program --layers 32 --mixed --batch 16
    scripts/gpu_program --device --layers 32           for this machine's GPU

Two programs: prefill of 32 tokens, and decoding. For each: seconds to lower and to compile (by the clock, and of all
processors together), bytes of arguments and temporary memory, and the launches of one step: those of a layer, and all
others. Weights are shapes only: nothing is allocated. Launches are counted in the optimized HLO; a trace on a device
may show more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "aot")]

PROMPT = 32
"""Tokens that prefill reads."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--mixed", action="store_true", help="also a budget: matrices of different bits per weight")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=2048, help="positions in the KV cache")
    parser.add_argument("--size", choices=["7b", "small"], default="7b", help="small: for a test")
    parser.add_argument("--target", default="h100", help="a100, rtx4090, h100 or b200")
    parser.add_argument("--device", action="store_true", help="compile for the device of this machine instead")
    parser.add_argument("--dense", action="store_true", help="also the dense bfloat16 model")
    parser.add_argument("--text", type=Path, help="folder for the optimized HLO")
    parser.add_argument("--json", type=Path, help="file for the figures, one JSON object a line; it is added to")
    return parser.parse_args()


def device_of(given: argparse.Namespace) -> Any:
    """The device to compile for; None for the default device of this machine."""
    if given.device:
        return None
    from compile import start_jax

    start_jax(None)
    import targets

    return targets.device(given.target)


def figures(device: Any, function: Any, values: tuple[Any, ...], layers: int, text: Path | None) -> dict[str, Any]:
    """Lowers and compiles one program, of which `values` are the arguments (shapes will do)."""
    import launches

    begun, begun_cpu = time.perf_counter(), sum(os.times()[:4])
    lowered = lowered_for(device, function, values)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end, end_cpu = time.perf_counter(), sum(os.times()[:4])
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if text is not None:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(hlo)
    return {
        "lower_seconds": round(middle - begun, 2),
        "compile_seconds": round(end - middle, 2),
        "cpu_seconds": round(end_cpu - begun_cpu, 2),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    } | step_launches(launches.program(hlo), layers)


def step_launches(program: Any, layers: int) -> dict[str, Any]:
    """Launches of one step. If the layers are unrolled, those of a layer are an average over everything."""
    import launches

    layer = program.loop_of(layers)
    loops = list(program.all_loops())
    around = program.entry if not loops or loops[0] is layer else loops[0].body
    if layer is None:
        return {"unrolled": True, "step_launches": len(around), "kinds": launches.kinds(around)}
    return {
        "unrolled": False,
        "layer_launches": len(layer.body),
        "layer_kernels": sum(launch.is_kernel for launch in layer.body),
        "outside_launches": len(around),
        "step_launches": layers * len(layer.body) + len(around),
        "kinds": launches.kinds(layer.body),
        "layer": [[launch.kind, launch.name, launch.shape] for launch in layer.body],
    }


def lowered_for(device: Any, function: Any, values: tuple[Any, ...]) -> Any:
    """Lowers for a device that is not there, or (None) for the one that is."""
    import jax

    if device is None:
        return jax.jit(function, donate_argnums=(1,)).lower(*values)
    from compile import lower_for

    return lower_for(device, function, values, donate_argnums=(1,))


def main() -> int:
    given = arguments()
    device = device_of(given)
    import generate_program
    from page import markdown

    forms = [f"{given.bits} bits", *(["mixed"] if given.mixed else []), *(["dense"] if given.dense else [])]
    lines = []
    for layers in given.layers:
        for form in forms:
            for batch in given.batch:
                config = generate_program.shape(given.size, layers, given.context)
                params = generate_program.abstract_model(config, form)
                programs = generate_program.programs(params, batch=batch, prompt=PROMPT)
                for name, (function, values) in programs.items():
                    label = f"{name}, {layers} layers, {form}, batch {batch}"
                    text = given.text / f"{label.replace(', ', '-').replace(' ', '')}.hlo" if given.text else None
                    entry = {"program": name, "layers": layers, "form": form, "batch": batch, "size": given.size}
                    entry |= figures(device, function, values, layers, text)
                    if given.json:
                        with given.json.open("a") as file:
                            file.write(json.dumps(entry) + "\n")
                    lines.append(_line(entry))
                    print(
                        f"{label}: lowered {entry['lower_seconds']} s, compiled {entry['compile_seconds']} s",
                        flush=True,
                    )
    target = "this device" if given.device else f"{given.target}, without one"
    header = ["program", "layers", "form", "batch", "lower s", "compile s", "CPU s of both", "arguments MB"]
    header += ["temporary MB", "launches a layer", "others", "a step"]
    print(f"\ncompiled for {target}:\n\n{markdown(header, lines, 3)}")
    return 0


def _line(entry: dict[str, Any]) -> list[str]:
    others = entry.get("outside_launches", "")
    return [
        *(str(entry[key]) for key in ("program", "layers", "form", "batch")),
        *(str(entry[key]) for key in ("lower_seconds", "compile_seconds", "cpu_seconds")),
        *(f"{(entry[key] or 0) / 1e6:.2f}" for key in ("argument_bytes", "temporary_bytes")),
        str(entry.get("layer_launches", "unrolled")),
        str(others),
        str(entry["step_launches"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
