"""Files that `torch.save` wrote, read without torch and without trusting them.

Such a file is a zip archive: a pickle, and beside it the raw bytes of each tensor's
storage. A pickle can call anything; here it is read as data (`spqr_jax.formats.pickled`),
and the names that it may look up are a handful, each of which leads to a function below.
Nothing takes more memory than the file is large: members are not compressed, and tensors
are views of their storages.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import CheckpointError
from spqr_jax.formats.pickled import Name, read_pickle

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


_NAMES = {f"torch.{name}": Name(name) for name in (*_STORAGES, *_DTYPES)}


class SparseTensor:
    """A sparse matrix as it is saved: indices int64 [2, entries], values [entries], its shape."""

    def __init__(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> None:
        self.indices, self.values, self.shape = indices, values, shape


def read_torch_file(path: Path) -> Any:
    """What `torch.save` was given: containers of numbers, texts, `SparseTensor`s and NumPy arrays (read-only).

    Raises:
      CheckpointError: damaged, of another format, or asking for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path.stat().st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is not a file of torch.save's zip format (torch 1.6 and later): it is damaged or too old"
        ) from None
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]!r}") from None


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            "its zip members are compressed, which torch never does: unzip it, and zip it again with 'zip -0'"
        )
    if sum(max(member.file_size, member.compress_size) for member in members) > size:
        raise CheckpointError(f"its zip members claim more bytes than the {size} bytes of the file: is it damaged?")
    names = [member.filename for member in members]
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"it contains {len(pickles)} files named data.pkl, expected one")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "byteorder" in names and archive.read(folder + "byteorder") != b"little":
        raise CheckpointError("it was written on a big-endian machine, which is not supported")
    storages: dict[str, bytes] = {}

    def load(saved: Any) -> np.ndarray:
        """A storage, which the pickle names as ("storage", type, key, place, size)."""
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage":
            raise CheckpointError("it refers to something that is not a storage")
        kind, key = saved[1:3]
        if not isinstance(kind, Name) or kind.name not in _STORAGES or not isinstance(key, str):
            raise CheckpointError("it refers to a storage of an unknown type")
        if (name := f"{folder}data/{key}") not in names:
            raise CheckpointError(f"it lacks the storage {key[:50]!r}")
        if key not in storages:
            storages[key] = archive.read(name)
        return np.frombuffer(storages[key], _STORAGES[kind.name])

    return read_pickle(archive.read(pickles[0]), _FUNCTIONS, _NAMES, load)


# ---- what the pickle may call -------------------------------------------------------------------


def _tensor(*arguments: Any) -> np.ndarray:
    """A view of a storage: (storage, offset, size, strides, ...), counted in elements."""
    if len(arguments) < 4 or not isinstance(arguments[0], np.ndarray) or not all(map(_sizes, arguments[2:4])):
        raise CheckpointError("a tensor does not consist of a storage, an offset, sizes and strides")
    storage, offset, size, stride = arguments[:4]
    if not _sizes((offset,)) or len(size) != len(stride) or len(size) > _MOST_AXES or storage.ndim != 1:
        raise CheckpointError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    elements, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        elements, last = elements * n, last + (n - 1) * step
    if last >= storage.size:
        raise CheckpointError(f"a tensor reaches beyond its storage of {storage.size} elements")
    if elements > storage.size:
        raise CheckpointError(f"a tensor has {elements} elements in a storage of {storage.size}")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _sizes(value: Any) -> bool:
    """Whether a value is a tuple or list of sizes."""
    return isinstance(value, (tuple, list)) and all(type(n) is int and 0 <= n <= _MOST for n in value)


def _parameter(*arguments: Any) -> np.ndarray:
    if not arguments or not isinstance(arguments[0], np.ndarray):
        raise CheckpointError("a parameter has no tensor")
    return arguments[0]


def _sparse_tensor(*arguments: Any) -> SparseTensor:
    """(layout, data): indices, values and shape, or row pointers, columns, values and shape."""
    layout, data = arguments if len(arguments) == 2 else (None, None)
    parts = {"torch.sparse_coo": 3, "torch.sparse_csr": 4}.get(layout if isinstance(layout, str) else "", 0)
    if not parts or not isinstance(data, (tuple, list)) or len(data) < parts:
        raise CheckpointError("a sparse tensor does not have the layout torch.sparse_coo or torch.sparse_csr")
    *arrays, shape = data[:parts]
    if not all(isinstance(part, np.ndarray) for part in arrays) or not _sizes(shape) or len(shape) != 2:
        raise CheckpointError("a sparse tensor does not consist of tensors and two sizes")
    *places, values = arrays
    if any(part.dtype.kind != "i" for part in places) or values.ndim != 1:
        raise CheckpointError("a sparse tensor has indices that are not integers, or values with more than one axis")
    indices = (
        places[0].astype(np.int64) if layout == "torch.sparse_coo" else _csr_indices(places[0], places[1], shape[0])
    )
    if indices.shape != (2, values.size):
        raise CheckpointError(f"a sparse tensor has {values.size} values and indices of shape {indices.shape}")
    return SparseTensor(indices, values, (shape[0], shape[1]))


def _csr_indices(pointers: np.ndarray, columns: np.ndarray, rows: int) -> np.ndarray:
    """int64 [2, entries]: of row pointers [rows + 1], which rise from 0 to the number of columns."""
    rising = pointers.shape == (rows + 1,) and columns.ndim == 1 and np.all(pointers[1:] >= pointers[:-1])
    if not rising or pointers[0] != 0 or pointers[-1] != columns.size:
        raise CheckpointError("a sparse tensor has row pointers that do not rise from 0 to the number of its columns")
    return np.stack([np.repeat(np.arange(rows), np.diff(pointers)), columns.astype(np.int64)])


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise CheckpointError("a dictionary is created with arguments, expected none")
    return {}


def _shape(*arguments: Any) -> tuple[int, ...]:
    if len(arguments) != 1 or not _sizes(arguments[0]):
        raise CheckpointError("a torch.Size is invalid")
    return tuple(arguments[0])


def _layout(*arguments: Any) -> str:
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise CheckpointError("a layout has no name")
    return arguments[0]


_MOST, _MOST_AXES = 2**48, 8  # of a size or stride; of a tensor
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch.Size": _shape,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_sparse_tensor": _sparse_tensor,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse_tensor,
    "torch.serialization._get_layout": _layout,
}
