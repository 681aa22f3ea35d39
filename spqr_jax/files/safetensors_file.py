"""Safetensors files of a directory: which of them are the model, and one tensor at a time out of them.

The format: 8 bytes with the length of the header, the header in JSON (type, shape and
place of each tensor), the numbers (https://github.com/huggingface/safetensors). The
package `safetensors` checks the header; the numbers are read from their place, because
its NumPy reader knows no float8.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes  # of jax
import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries
from spqr_jax.files.json_file import parse_json, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")

KINDS: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
"""The format's names of types that are read."""

_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_SHOWN = 5  # names in a message


@dataclasses.dataclass(frozen=True)
class _Tensor:
    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsReader:
    """The tensors of a model directory. A file is opened anew for each tensor, and never stays mapped.

    Read are, as transformers does: model.safetensors, else the files that its index names
    (`modeling_utils.py`); where there is neither, every other *.safetensors but adapters
    and Mistral's `consolidated` ones.

    Args:
      directory: with the files.
      weights_file: the file of weights, or an index, that config.json asks for by name.

    Raises:
      ModelError: files that are missing, damaged or no weights of a model.
    """

    def __init__(self, directory: Path, weights_file: str | None = None) -> None:
        self.label = str(directory)
        names = _names_in(directory)
        self.adapters = [name for name in ADAPTERS if name in names]
        files, index = _weight_files(directory, names, weights_file)
        self._tensors: dict[str, _Tensor] = {}
        for path in files:
            for name, tensor in _read_header(path).items():
                if name in index and directory / index[name] != path:
                    continue  # a copy: the index takes the tensor from elsewhere
                if name in self._tensors:
                    raise ModelError(
                        f"{directory}: tensor {name} is in both {self._tensors[name].path.name} and {path.name}: "
                        f"keep the files of one model only, or rename its file to {WEIGHTS}"
                    )
                self._tensors[name] = tensor
        if lacking := [name for name in index if name not in self._tensors]:
            raise ModelError(
                f"{directory}: {weights_file or INDEX} names {len(lacking)} tensors that are not in its files "
                f"({_some(lacking)}): fetch the files and the index again"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def files(self) -> list[Path]:
        """The files that tensors are read from."""
        return sorted({tensor.path for tensor in self._tensors.values()})

    def kinds(self) -> dict[str, str]:
        """Each tensor's type, one of `KINDS`."""
        return {name: tensor.kind for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: Any = None) -> np.ndarray:
        """One tensor, an array of its own; `dtype` None for the file's."""
        tensor = self._tensors[name]
        count = math.prod(tensor.shape)
        try:
            with tensor.path.open("rb") as file:
                file.seek(tensor.offset)
                values = np.fromfile(file, KINDS[tensor.kind], count)
        except OSError as error:
            raise ModelError(f"{tensor.path} cannot be read: {error.strerror}") from None
        if values.size != count:
            raise ModelError(f"{tensor.path} became shorter after it was opened: tensor {name} is cut off")
        values = values.reshape(tensor.shape)
        with np.errstate(over="ignore"):  # infinities are reported by whoever looks at the values
            return values if dtype is None else values.astype(dtype, copy=False)


def refuse_adapter(directory: Path) -> None:
    """A directory that holds a LoRA adapter alone, without a model's configuration or weights, is refused."""
    names = _names_in(directory)
    if ("adapter_config.json" in names or set(ADAPTERS) & set(names)) and "config.json" not in names:
        raise _adapter_alone(directory)


# ---- which files -------------------------------------------------------------------------------


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error.strerror}") from None


def _weight_files(directory: Path, names: list[str], asked: str | None) -> tuple[list[Path], Mapping[str, str]]:
    """The files of weights, and tensor -> file where an index says so."""
    if asked is not None and not _stays_inside(asked):
        raise ModelError(f"{directory}: config.json names {asked!r} as the weights: expected a file in this directory")
    name = asked or next((name for name in (WEIGHTS, INDEX) if name in names), None)
    if name is None:
        return [directory / name for name in _unnamed_files(directory, names)], {}
    if not name.endswith(".json"):
        return [directory / name], {}
    index = _read_index(directory / name)
    files = sorted(set(index.values()))
    if missing := [file for file in files if not os.path.lexists(directory / file)]:
        raise ModelError(f"{directory}: {name} names files that are missing: {', '.join(missing)}: fetch them")
    return [directory / file for file in files], index


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, as an index has it; a file's name must not lead out of the directory."""
    entries = read_object(path)
    if "weight_map" not in entries:
        raise entries.lacks("weight_map", "an object that maps each tensor to its file")
    files = entries.nested("weight_map")
    index = {tensor: files.text(tensor) for tensor in files}
    for tensor, file in index.items():
        if not _stays_inside(file):
            files.refuse(tensor, "the name of a file in the same directory")
    if not index:
        entries.refuse("weight_map", "at least one tensor and its file")
    return index


def _stays_inside(file: str) -> bool:
    """By its name alone: the hub's client has links in place of files, which lead elsewhere."""
    windows = PureWindowsPath(file)
    leaves = PurePosixPath(file).is_absolute() or windows.drive or windows.root or ".." in windows.parts
    return bool(file.strip()) and not leaves and "\0" not in file


def _unnamed_files(directory: Path, names: list[str]) -> list[str]:
    """What to read where there is neither model.safetensors nor an index."""
    tensors = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    models = [name for name in tensors if name not in ADAPTERS]
    usual = [name for name in models if not name.startswith("consolidated")]
    if usual:
        _refuse_missing_shards(directory, usual)
        return usual
    if models:
        raise ModelError(
            f"{directory} has weights only in {_some(models)}, which uses Mistral's own tensor names: also fetch "
            f"{WEIGHTS} (or its shards and {INDEX})"
        )
    if set(ADAPTERS) & set(names):
        raise _adapter_alone(directory)
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
    if pickles:
        raise ModelError(
            f"{directory} has no *.safetensors file, only {_some(pickles)}. Pickle files are not read, because reading "
            "one can run any program: save the model again with transformers' save_pretrained, or fetch a copy that "
            "has safetensors"
        )
    if files := [name for name in names if name.lower().endswith(".gguf")]:
        raise ModelError(f"{directory} has no *.safetensors file, but {_some(files)}: give that file as the model")
    raise ModelError(
        f"{directory} has no *.safetensors file; other weight formats, such as pickles, are not read: fetch {WEIGHTS}"
    )


def _refuse_missing_shards(directory: Path, names: list[str]) -> None:
    """model-00001-of-00003.safetensors asks for two more files."""
    for match in filter(None, map(_SHARD.fullmatch, names)):
        count = int(match[3])
        wanted = {f"{match[1]}-{number:05d}-of-{match[3]}.safetensors" for number in range(1, min(count, 9999) + 1)}
        if missing := sorted(wanted - set(names)):
            raise ModelError(f"{directory}: of {count} weight files, these are missing: {_some(missing)}: fetch them")


def _adapter_alone(directory: Path) -> ModelError:
    return ModelError(
        f"{directory} holds a LoRA adapter, not a model: merge it into its base model first (peft: merge_and_unload, "
        "then save_pretrained), and give the directory of the merged model"
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


# ---- one file ----------------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, _Tensor]:
    """What a file holds, once `safetensors` has checked that the header is whole and covers the file."""
    import safetensors

    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
            _refuse_no_tensors(path, start)
            with safetensors.safe_open(path, framework="numpy"):
                pass
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = parse_json(file.read(length), str(path))
    except FileNotFoundError:
        what = "is a link to a missing file" if path.is_symlink() else "is missing"
        raise ModelError(f"{path} {what}: fetch it again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}: fetch the file again") from None
    header.pop("__metadata__", None)
    entries, tensors = Entries(header, str(path)), {}
    for name in header:
        entry = entries.nested(name)
        begin = entry.integers("data_offsets", most=1 << 62)[0]
        shape = tuple(entry.integers("shape", most=1 << 62))
        tensors[name] = _Tensor(path, entry.text("dtype"), shape, 8 + length + begin)
    for name, tensor in tensors.items():
        if tensor.kind not in KINDS:
            raise ModelError(f"{path}: tensor {name} has the type {tensor.kind}, expected one of {', '.join(KINDS)}")
    return tensors


def _refuse_no_tensors(path: Path, start: bytes) -> None:
    if not start:
        raise ModelError(f"{path} is empty: fetch the file again")
    if start == _POINTER:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' in the cloned repository, or fetch the "
            "file from the hub"
        )
