"""One input: it is made, read, and judged.

Fine is a result or a `SpQRError`. A fault is any other exception, time, memory, or a message that helps nobody.
"""

from __future__ import annotations

import dataclasses
import random
import resource
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import spqr_jax
from spqr_jax.errors import SpQRError
from support.fuzz.readers import Changes, Files, Reader

MEMORY_FLOOR = 256 << 20
"""Bytes that an input may take beyond three times its files' size: threads, buffers and what libraries keep."""
LONGEST_MESSAGE = 2000
"""Characters of a message."""

_PACKAGE = str(Path(spqr_jax.__file__).parent)
_MEMORY_WORDS = ("MemoryError", "Unable to allocate", "bad_alloc", "Cannot allocate memory")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What went wrong with an input.

    Attributes:
      reader, seed, number: the input.
      kind: an exception's type, or ``time``, ``memory``, ``message ...``, ``crash``, ``hang``; ``sound file`` for
        one that was not changed and is not read.
      place: deepest line of the package that was reached, where that is known.
      message: of the exception.
    """

    reader: str
    seed: int
    number: int
    kind: str
    place: str
    message: str

    @property
    def group(self) -> tuple[str, str, str]:
        return self.reader, self.kind, self.place


class _TooSlow(BaseException):
    """Raised by the clock; no reader catches it."""


def _too_slow(number: int, frame: Any) -> None:
    raise _TooSlow


class Bench:
    """A reader with its sound files, in a folder of its own; inputs are put there one after the other."""

    def __init__(self, reader: Reader, seeds: Path, scratch: Path, seed: int) -> None:
        self.reader, self._seed = reader, seed
        self._variants: dict[str, Files] = {}
        for variant in sorted(path for path in (seeds / reader.seeds).iterdir() if path.is_dir()):
            paths = sorted(path for path in variant.rglob("*") if path.is_file())
            self._variants[variant.name] = {str(p.relative_to(variant)): p.read_bytes() for p in paths}
        self._scratch = scratch / reader.name
        self._changed: tuple[str, Changes] = "", {}
        for name, files in self._variants.items():
            for file, data in files.items():
                _put(self._scratch / name / file, data)

    def warm_up(self) -> list[Fault]:
        """Reads every sound variant, which loads libraries and fills caches; those that are not read."""
        faults = []
        for name in self._variants if self.reader.share else ():
            try:
                self.reader.read(self._scratch / name)
            except Exception as error:
                message = f"{name}: {type(error).__name__}: {_printable(str(error))[:300]}"
                faults.append(Fault(self.reader.name, self._seed, 0, "sound file", place_of(error), message))
        return faults

    def input(self, number: int) -> tuple[str, Changes]:
        """A variant and what is changed in it: the same for the same reader, seed and number."""
        rng = random.Random(f"{self.reader.name} {self._seed} {number}")
        names = sorted(self._variants)
        name = rng.choice(names)
        return name, self.reader.change(self._variants[name], rng, self._variants[rng.choice(names)])

    def place(self, number: int) -> tuple[Path, int]:
        """Puts an input where it is read: its folder, and bytes in it."""
        name, changes = self.input(number)
        for file, data in changes.items():
            _put(self._scratch / name / file, data)
        self._changed = name, changes
        files = {**self._variants[name], **changes}
        return self._scratch / name, sum(len(data) for data in files.values() if data is not None)

    def restore(self) -> None:
        """Puts the sound files back."""
        name, changes = self._changed
        for file in changes:
            _put(self._scratch / name / file, self._variants[name].get(file))

    def judge(self, number: int) -> Fault | None:
        """Makes and reads one input."""
        folder, size = self.place(number)
        found = judged_read(self.reader, folder, size)
        if found is not None and found[0] == "time":  # the machine may have been busy: once more
            found = judged_read(self.reader, folder, size)
        self.restore()
        return None if found is None else Fault(self.reader.name, self._seed, number, *found)


def judged_read(reader: Reader, folder: Path, size: int) -> tuple[str, str, str] | None:
    """Reads a folder under limits: None where all is well, else kind, place and message of the fault."""
    begun = time.process_time()
    try:
        with_limits(size, reader.seconds)
        try:
            reader.read(folder)
        finally:
            without_limits()
    except SpQRError as error:
        if (problem := _message_problem(reader, folder, str(error))) is not None:
            return problem, place_of(error), str(error)[:300]
    except _TooSlow as error:
        return "time", place_of(error), f"more than {reader.seconds:g} s"
    except MemoryError as error:
        return "memory", place_of(error), f"more than 3 times {size} bytes and {MEMORY_FLOOR >> 20} MiB: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        return type(error).__name__, place_of(error), _printable(str(error))[:300]
    if time.process_time() - begun > reader.seconds + 0.5:  # the clock's signal was swallowed
        return "time", "", f"more than {reader.seconds:g} s"
    return None


def _message_problem(reader: Reader, folder: Path, message: str) -> str | None:
    if any(word in message for word in _MEMORY_WORDS):
        return "memory"
    if message != _printable(message):
        return "message that cannot be printed"
    if len(message) > LONGEST_MESSAGE:
        return "message too long"
    names = [str(folder), *(path.name for path in folder.iterdir() if "." in path.name)]
    if reader.names_file and not any(name in message for name in names):
        return "message without a file"
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def place_of(error: BaseException) -> str:
    """Deepest line of the package in an error's traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame.f_code.co_filename.startswith(_PACKAGE)]
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__) if frame in ours]
    if not ours:
        return ""
    return f"spqr_jax{ours[-1].f_code.co_filename.removeprefix(_PACKAGE)}:{lines[-1]} {ours[-1].f_code.co_name}"


def with_limits(size: int, seconds: float) -> None:
    with open("/proc/self/statm", "rb") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + MEMORY_FLOOR + 3 * size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def without_limits() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
        return
    try:
        path.write_bytes(data)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def grouped(faults: list[Fault]) -> Mapping[tuple[str, str, str], list[Fault]]:
    """Faults by reader, kind and place, in the order of numbers."""
    groups: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: (fault.reader, fault.number)):
        groups.setdefault(fault.group, []).append(fault)
    return groups
