"""Compiles the library: ``python -m cpu_kernels``. Also run when the package is installed.

For the running processor's family, not for the one processor: kernels for AVX2 and
AVX-512 are all in the library, and are chosen when it runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = [
    *("-O2", "-ftree-vectorize", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized"),  # GCC's own AVX-512 headers set the last one off
]


class BuildError(RuntimeError):
    """No compiler, no headers, or the compiler failed."""


def compiler() -> list[str]:
    """The C++ compiler: what CXX says, else g++, clang++ or c++.

    Raises:
      BuildError: there is none.
    """
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler: install g++ or clang++, or name one in the environment variable CXX")


def headers() -> str:
    """Folder of XLA's FFI headers, which jaxlib brings.

    Raises:
      BuildError: jaxlib is not installed.
    """
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        raise BuildError("jaxlib is not installed, but its headers are needed")
    return str(Path(found.origin).parent / "include")


def ffi_version(include: str) -> tuple[int, int]:
    """Version of XLA's FFI that the headers in a folder describe."""
    text = (Path(include) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise BuildError(f"the headers in {include} do not define the version of XLA's FFI")
    return int(major[1]), int(minor[1])


def library_name(version: tuple[int, int]) -> str:
    """File name of the library for a version of XLA's FFI; newer versions load older libraries."""
    return f"_spqr_cpu_ffi{version[0]}_{version[1]}.so"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr or done.stdout}")


def build(
    target: Path,
    sources: list[Path] | None = None,
    flags: list[str] | None = None,
    shared: bool = True,
    kept: Path | None = None,
) -> None:
    """Compiles `sources` to `target`, which is replaced only if all went well.

    Args:
      target: the library, or with shared=False a program.
      sources: by default all of the library's.
      flags: further ones, after the usual.
      shared: whether to make a shared library.
      kept: a folder whose objects, made from the same files by the same commands, are taken, and where these
        stay for the next build. Those that depend on jaxlib's headers are always compiled.

    Raises:
      BuildError: with the compiler's words.
    """
    program = compiler()
    sources = sources or sorted(SOURCES.glob("*.cc"))
    command = [*program, *FLAGS, *(flags or []), f"-I{SOURCES}"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:

        def compile_source(source: Path) -> Path:
            if kept is None or b"xla/ffi" in source.read_bytes():
                fresh = Path(folder) / f"{source.stem}.o"
                _run([*command, "-isystem", headers(), "-c", str(source), "-o", str(fresh)])
                return fresh
            keeping = kept / f"{source.stem}-{_digest([*command, str(source)])[:16]}.o"
            if not keeping.exists():
                fresh = keeping.with_suffix(f".{os.getpid()}")  # complete before it gets its name
                _run([*command, "-c", str(source), "-o", str(fresh)])
                os.replace(fresh, keeping)
            return keeping

        if kept is not None:
            kept.mkdir(exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, sources))
        made = Path(folder) / target.name
        link = ["-shared"] if shared else []
        _run([*program, *(flags or []), *link, "-pthread", *map(str, objects), "-o", str(made)])
        os.replace(made, target)
    for old in set(kept.glob("*.o")) - set(objects) if kept is not None else ():
        old.unlink(missing_ok=True)


def _digest(command: list[str]) -> str:
    """Of what a library is made from, and how: a library (an object) with the same one need not be made again."""
    sources = sorted(SOURCES.glob("*.cc")) + sorted(SOURCES.glob("*.h"))
    content = b"".join(path.read_bytes() for path in sources) + Path(__file__).read_bytes()
    return hashlib.sha256(content + " ".join(command).encode()).hexdigest()


def build_library(folder: Path) -> Path:
    """Compiles the library into `folder`; one made from the same sources, there or beside this file, is taken instead.

    Raises:
      BuildError: as `build`.
    """
    name, digest = library_name(ffi_version(headers())), _digest(compiler()).encode()
    target, made_before = folder / name, Path(__file__).parent / name
    for path in (target, made_before):
        if path.is_file() and digest in path.read_bytes():  # ffi.cc puts it there
            if path != target:
                shutil.copy(path, target)
            return target
    build(target, flags=[f'-DSPQR_DIGEST="{digest.decode()}"'], kept=Path(__file__).parent / ".build-objects")
    return target


def main() -> None:
    """Builds the library where it is looked for."""
    try:
        target = build_library(Path(__file__).parent)
    except BuildError as error:
        sys.exit(f"cpu_kernels: not built. {error}")
    print(f"built {target}")
