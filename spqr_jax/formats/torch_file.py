"""Files that `torch.save` wrote, read without torch and without trusting them.

Such a file is a zip archive: a pickle, and beside it the raw bytes of each tensor's
storage. A pickle can call anything; this one may build dictionaries, lists, tuples,
numbers, texts and tensors. Its opcodes are checked before a single one is carried
out, and the names that it may look up are a handful, each of which leads to a
function below.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import CheckpointError

_OPCODES = frozenset(
    (
        "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE",
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING",
        "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
        "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
        "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE",
        "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE",
    )
)  # fmt: skip
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


class SparseTensor:
    """A sparse tensor as it is saved: indices int [2, entries], values [entries], its shape."""

    def __init__(self, indices: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> None:
        self.indices, self.values, self.shape = indices, values, shape


def _tensor(storage: np.ndarray, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> np.ndarray:
    size, stride = tuple(size), tuple(stride)
    if any(n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise CheckpointError(f"a tensor of size {size} and strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if last >= storage.size:
        raise CheckpointError(f"a tensor of size {size} reaches beyond its storage of {storage.size}")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False).copy()


def _parameter(data: np.ndarray, *rest: Any) -> np.ndarray:
    return data


def _sparse_tensor(layout: str, data: Sequence[Any]) -> SparseTensor:
    indices, values, shape = data[:3]
    if layout == "torch.sparse_csr":
        pointers, columns, values, shape = data[:4]
        indices = np.stack([np.repeat(np.arange(len(pointers) - 1), np.diff(pointers)), columns])
    elif layout != "torch.sparse_coo":
        raise CheckpointError(f"a sparse tensor of layout {layout!r}")
    return SparseTensor(np.asarray(indices), np.asarray(values), tuple(shape))


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse_tensor,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse_tensor,
    ("torch.serialization", "_get_layout"): str,
}


class _Name(str):
    """A storage type or dtype, by its name: nothing that could be called."""


class _Unpickler(pickle.Unpickler):
    """Builds tensors and containers."""

    def __init__(self, data: bytes, storages: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and (name in _STORAGES or name in _DTYPES):
            return _Name(name)
        raise CheckpointError(f"it asks for {module}.{name}, which is no part of a saved tensor")

    def persistent_load(self, saved: Any) -> Any:
        if not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage" or saved[1] not in _STORAGES:
            raise CheckpointError(f"it refers to something that is no storage: {str(saved)[:100]}")
        return np.frombuffer(self._storages(str(saved[2])), _STORAGES[saved[1]])


def read_torch_file(path: Path) -> Any:
    """What `torch.save` was given: containers of numbers, texts, NumPy arrays and `SparseTensor`s.

    Raises:
      CheckpointError: damaged, of another format, or asking for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError("it holds no data.pkl")
            folder = pickles[0].removesuffix("data.pkl")
            if folder + "byteorder" in names and archive.read(folder + "byteorder") != b"little":
                raise CheckpointError("it was written on a big-endian machine")
            data = archive.read(pickles[0])
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name not in _OPCODES:
                    raise CheckpointError(f"its pickle does something else than build containers: {opcode.name}")
                del argument
            return _Unpickler(data, lambda key: archive.read(f"{folder}data/{key}")).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is not a file of torch.save's zip format (torch 1.6 and later): damaged, or too old"
        ) from None
    except Exception as error:  # a damaged pickle fails in many ways
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
