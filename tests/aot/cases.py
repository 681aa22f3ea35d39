"""What is compiled: kernels, targets and problems, and the budgets that each must keep."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
BUDGETS = HERE / "budgets.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel for one target; `options` go to compile.py."""

    target: str
    kernel: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in budgets.json."""
        return " ".join([self.target, self.kernel, *self.options])


SIZE = ("--out", "11008", "--inner", "4096")


def _cases() -> list[Case]:
    gpus = ("a100", "rtx4090", "h100", "b200")
    cases = [Case(gpu, "mosaic_gpu", (*SIZE, "--batch", batch)) for gpu in gpus for batch in ("1", "8", "16")]
    cases += [Case(gpu, "triton", ("--splits", "16")) for gpu in gpus]
    cases += [
        Case("h100", "mosaic_gpu", (*SIZE, "--bits", "2")),
        Case("h100", "mosaic_gpu", (*SIZE, "--bits", "4")),
        Case("h100", "mosaic_gpu", (*SIZE, "--group-size", "32")),
        Case("h100", "mosaic_gpu", (*SIZE, "--bits", "4", "--group-size", "128", "--halves")),
        Case("h100", "mosaic_gpu", (*SIZE, "--batch", "64")),
        Case("h100", "triton", ("--splits", "16", "--batch", "2")),
        Case("a100", "triton", ("--splits", "16", "--bits", "4", "--group-size", "32")),
    ]
    cases += [Case(tpu, "tpu", ("--batch", batch)) for tpu in ("v5e", "v6e") for batch in ("8", "16")]
    cases += [Case(name, "xla", ("--batch", "512", "--out", "8192", "--inner", "4096")) for name in ("h100", "v5e")]
    return cases


CASES = _cases()


def compiled(case: Case, *extra: str) -> dict[str, Any]:
    """Runs compile.py.

    Raises:
      RuntimeError: it fails; the end of what it wrote.
    """
    command = [sys.executable, str(HERE / "compile.py"), case.target, case.kernel, *case.options, *extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{case.name}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compiled_all(cases: list[Case]) -> dict[str, dict[str, Any] | Exception]:
    """All of them, one a core at a time; an exception where one failed."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {case.name: pool.submit(compiled, case) for case in cases}
    return {name: future.exception() or future.result() for name, future in futures.items()}  # type: ignore[misc]


def form_programs() -> dict[str, str]:
    """The PTX of the forms in `product`, by name.

    Raises:
      RuntimeError: one does not compile.
    """
    from product import FORMS

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        targets = sorted({form.target for form in FORMS.values()})
        list(pool.map(lambda target: compiled(Case(target, "mosaic_gpu"), "--forms", folder), targets))
        return {name: (Path(folder) / f"{i}.ptx").read_text() for i, name in enumerate(FORMS)}


def _readable(content: dict[str, Any]) -> str:
    """JSON with a list on a line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def budget(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result is held to: less is better of all but `weights_per_bundle`."""
    kept = (
        "registers",
        "shared_bytes",
        "instructions_per_weight",
        "bundles",
        "temporary_bytes",
        "weights_per_bundle",
        "wide_loads",
    )
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in result.items() if key in kept}


def main() -> None:
    """Writes the budgets anew: python tests/aot/cases.py [--emulated, only those of executed programs]"""
    old = json.loads(BUDGETS.read_text())
    results = {} if "--emulated" in sys.argv else compiled_all(CASES)
    failed = [f"{name}: {result}" for name, result in results.items() if isinstance(result, Exception)]
    if failed:
        raise SystemExit("\n".join(failed))
    budgets = {name: budget(result) for name, result in results.items()}  # type: ignore[arg-type]
    from executed import measured, run
    from product import FORMS

    programs, emulated = form_programs(), {}
    for name, ptx in programs.items():
        emulated[name] = measured(run(FORMS[name], ptx)[1])
    BUDGETS.write_text(_readable({"proven": {}, "cases": budgets or old["cases"], "emulated": emulated}))


if __name__ == "__main__":
    main()
