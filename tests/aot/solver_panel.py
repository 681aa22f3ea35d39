"""Compiles the solver's large program for an accelerator that is not there, and counts its launches.

    python tests/aot/solver_panel.py h100

A process of its own, as compile.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

NO_LAUNCH = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "fusion-done"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    options = parser.parse_args()
    from compile import lower_for, start_jax

    start_jax(None)
    import jax
    import jax.numpy as jnp
    import targets

    from spqr_jax.solver import panels
    from spqr_jax.solver.columns import ColumnSpec, RowChoices
    from spqr_jax.solver.grid import GridSpec

    spec = ColumnSpec(GridSpec(3, 16, "search", at_once=True), 16, outliers=True, leave_one_out=True, compensate=True)
    size, rows = spec.panel(4096), spec.chunk

    def array(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    specs = [array(size, rows), array(size, size), array(size, dtype=jnp.bool_), RowChoices(array(rows), array(rows))]
    lowered = lower_for(targets.device(options.target), lambda *a: panels._solve_panel.__wrapped__(*a, spec), specs)
    compiled = lowered.compile()
    inside, outside = launches(compiled.as_text())
    result = {
        "groups": size // spec.group_size,
        "launches_per_group": len(inside),
        "launches_outside": len(outside),
        "dividing": [name for name in inside if "divide" in name and "subtract" in name],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    print(json.dumps(result))


def launches(text: str) -> tuple[list[str], list[str]]:
    """Names of what the body of the only loop launches, and of what the program launches beside it."""
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ \()", text)
    bodies = {m[1]: part for part in parts if (m := re.match(r"(?:ENTRY )?%([\w.-]+) \(", part))}
    [entry] = [part for part in parts if part.startswith("ENTRY")]
    [loop] = re.findall(r" while\(.*body=%([\w.-]+)", text)
    return _launched(bodies[loop]), _launched(entry)


def _launched(part: str) -> list[str]:
    found = re.findall(r"^  (?:ROOT )?%([\w.-]+) = (?:\(.*?\)\)?|\S+) ([\w-]+)\(", part, re.MULTILINE)
    return [name for name, kind in found if kind not in NO_LAUNCH]


if __name__ == "__main__":
    main()
