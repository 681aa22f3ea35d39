"""The report of a check on a device: one JSON object a line, written as soon as it is known."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Report:
    """Adds lines of one part of the check to a file, and prints them.

    Attributes:
      path: the file; it is only added to.
      part: name of the part.
      begun: `time.time()` when the whole check began.
    """

    path: Path
    part: str
    begun: float

    def line(self, **values: Any) -> None:
        """Adds a line with these values; floats are rounded to 5 digits."""
        entry = {"part": self.part, "at": round(time.time() - self.begun, 1)} | _rounded(values)
        with self.path.open("a") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        shown = {key: value for key, value in entry.items() if key not in ("part", "at", "kernels")}
        text = ", ".join(f"{key} {value}" for key, value in shown.items())
        print(f"[{entry['at']:6.1f}] {self.part}: {text}"[:600], flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a report; a line that was cut off is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
