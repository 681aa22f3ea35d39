"""What the scripts that make tables share: results kept row by row, commands measured, Markdown."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spqr_jax import SpQRError


def file_name(label: str, *settings: Any) -> str:
    """A name that changes with anything that changes the result."""
    what = json.dumps(settings, sort_keys=True)
    prefix = re.sub(r"[^\w.]+", "-", label)
    return f"{prefix}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def kept_or_made(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished row's result, or a new one, which is written whole or not at all."""
    if path.is_file():
        return json.loads(path.read_text())
    values = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)
    return values


def measured(command: Sequence[str]) -> dict[str, float]:
    """Runs a command in a process of its own; its wall-clock and CPU seconds, and peak memory in GiB.

    Raises:
      SpQRError: it failed.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SpQRError(f"`{shlex.join(command)}` failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {
        "wall_seconds": time.perf_counter() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss * unit / 2**30,
    }


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table, the first `left` columns to the left, the rest to the right."""
    ruler = "|" + "---|" * left + "---:|" * (len(columns) - left)
    head, *body = ("| " + " | ".join(line) + " |" for line in [columns, *lines])
    return "\n".join([head, ruler, *body]) + "\n"


def with_table(text: str, name: str, table: str) -> str:
    """A page's text with another table between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


def report_outdated(is_same: Mapping[Path, bool], script: str) -> int:
    """Says which pages and pictures were made from other figures; 1 if there are some, an exit status."""
    for place in (place for place, same in is_same.items() if not same):
        print(f"{place} was made from other figures: run {script}", file=sys.stderr)
    return 0 if all(is_same.values()) else 1
