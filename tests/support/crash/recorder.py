"""The library `shim.c` for processes that are to be watched or killed, and the log that it writes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

KINDS = ("", "create", "write", "truncate", "sync", "rename", "unlink", "mkdir", "link", "symlink")
_HEAD = struct.Struct("=IIIIQQQ")


def compile_shim(folder: Path) -> Path | None:
    """The library, made in `folder`; None without a C compiler or on another system than Linux."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or not Path("/proc/self/fd").is_dir():
        return None
    library = folder / "shim.so"
    command = [compiler, "-O1", "-fPIC", "-shared", "-o", library, Path(__file__).with_name("shim.c"), "-lpthread"]
    subprocess.run(command, check=True)
    return library


def recording(library: Path, watched: Path, log: Path) -> dict[str, str]:
    """Environment of a process whose changes below `watched` are written to `log`."""
    return {"LD_PRELOAD": str(library), "CRASH_FOLDER": os.path.realpath(watched), "CRASH_LOG": str(log)}


def killing(library: Path, watched: Path, call: int) -> dict[str, str]:
    """Environment of a process that dies before its `call`-th change of names, or flush, below `watched`."""
    return {"LD_PRELOAD": str(library), "CRASH_FOLDER": os.path.realpath(watched), "CRASH_KILL": str(call)}


@dataclasses.dataclass(frozen=True)
class Record:
    """One change. `path` and `second` are relative to the watched folder; a symlink's `second` is its target."""

    kind: str
    inode: int
    offset: int
    path: str
    second: str
    data: bytes


def read_log(log: Path, watched: Path) -> list[Record]:
    """All changes, in the order in which they took effect."""
    data, place, records = log.read_bytes(), 0, []
    base = os.path.realpath(watched)
    while place < len(data):
        kind, first, second, _, inode, offset, size = _HEAD.unpack_from(data, place)
        place += _HEAD.size
        pieces = []
        for length in (first, second, size):
            pieces.append(data[place : place + length])
            place += length
        paths = [piece.decode("utf-8", "surrogateescape") for piece in pieces[:2]]
        names = [os.path.relpath(path, base) if path.startswith("/") else path for path in paths]
        records.append(Record(KINDS[kind], inode, offset, names[0], names[1], pieces[2]))
    return records


def record_runs(folder: Path, module: str, *runs: list[str]) -> tuple[list[Record], Path]:
    """The changes of a driver's runs, one after the other with these arguments, and the folder that they changed.

    Skips the test where nothing can be recorded.
    """
    library = compile_shim(folder)
    if library is None:
        pytest.skip("recording needs a C compiler and Linux")
    watched, log = folder / "watched", folder / "log"
    watched.mkdir()
    environment = os.environ | recording(library, watched, log)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for arguments in runs:
        subprocess.run([sys.executable, "-m", module, watched / "q", *arguments], env=environment, check=True)
    return read_log(log, watched), watched


def calls(records: list[Record]) -> int:
    """How many of the changes count for `killing`."""
    return sum(record.kind not in ("write", "truncate") for record in records)
