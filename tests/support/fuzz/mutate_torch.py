"""Files as torch.save writes them, made without torch, and changes to their pickles and to the archive."""

from __future__ import annotations

import dataclasses
import io
import pickletools
import random
import struct
import warnings
import zipfile
from typing import Any

import numpy as np

from support.fuzz.mutate_bytes import INTEGERS, mutate_bytes, packed_integer

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "int8": "CharStorage"}


@dataclasses.dataclass
class Coo:
    """A sparse matrix to be written."""

    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, ...]


class _Writer:
    """Protocol 2, as torch writes it."""

    def __init__(self) -> None:
        self.out, self.storages = bytearray(b"\x80\x02"), list[bytes]()

    def put(self, value: Any) -> None:
        out = self.out
        if value is None or isinstance(value, bool):
            out += b"N" if value is None else b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            out += b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"\x8a\x08" + struct.pack("<q", value)
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            out += b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        elif isinstance(value, dict):
            out += b"}("
            for key, item in value.items():
                self.put(key)
                self.put(item)
            out += b"u"
        elif isinstance(value, list):
            out += b"]("
            for item in value:
                self.put(item)
            out += b"e"
        elif isinstance(value, tuple):
            out += b"("
            for item in value:
                self.put(item)
            out += b"t"
        elif isinstance(value, Coo):
            self._name("torch._utils", "_rebuild_sparse_tensor")
            out += b"("
            self._call("torch.serialization", "_get_layout", "torch.sparse_coo")
            self.put((value.indices, value.values, value.shape, True))
            out += b"tR"
        else:
            self._tensor(np.ascontiguousarray(value))

    def _name(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()

    def _call(self, module: str, name: str, *arguments: Any) -> None:
        self._name(module, name)
        self.put(arguments)
        self.out += b"R"

    def _tensor(self, value: np.ndarray) -> None:
        self._name("torch._utils", "_rebuild_tensor_v2")
        self.out += b"(("
        self.put("storage")
        self._name("torch", _STORAGES[str(value.dtype)])
        for item in (str(len(self.storages)), "cpu", value.size):
            self.put(item)
        self.out += b"tQ"
        self.storages.append(value.tobytes())
        steps = tuple(step // value.itemsize for step in value.strides)
        for item in (0, value.shape, steps, False):
            self.put(item)
        self._call("collections", "OrderedDict")
        self.out += b"tR"


def torch_bytes(value: Any) -> bytes:
    """A file that holds containers, numbers, texts, arrays and `Coo`s."""
    writer = _Writer()
    writer.put(value)
    storages = {f"data/{index}": data for index, data in enumerate(writer.storages)}
    return zip_bytes({"data.pkl": bytes(writer.out) + b".", "byteorder": b"little", **storages})


def zip_bytes(members: dict[str, bytes], compressed: bool = False, folder: str = "archive/") -> bytes:
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(folder + name), data, compress_type=kind)
    return file.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}


# ---- changes ------------------------------------------------------------------------------------

_NAMES = (
    ("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor"), ("torch", "float16"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "FloatStorage"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_sparse_csr_tensor"), ("os", "system"),
    ("torch.serialization", "_get_layout"), ("torch", "nn"), ("builtins", "eval"), ("torch", "ByteStorage"),
)  # fmt: skip
_PIECES = (
    b"r\xff\xff\xff\x7f", b"p9999999999\n", b"q\x01", b"h\x01", b"j\xff\xff\xff\xff", b"g0\n", b"\x94", b"0", b"1",
    b"(", b"t", b"l", b"d", b"s", b"u", b"a", b"e", b"R", b"Q", b"b", b"\x81", b"\x93", b".", b"N", b"]", b"}", b")",
    b"\x85", b"\x86", b"\x87", b"\x88", b"I999999999999\n", b"L" + b"9" * 5000 + b"L\n", b"\x8b\xff\xff\xff\x7f",
    b"Fnan\n", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8,
    b"V\\ud800\n", b"\x80\x05",
    b"X\x01\x00\x00\x00a", b"K\x00", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"((" * 20, b")" + b"\x85" * 3000,
    b"]" * 2000, b")q\x07" + b"h\x07h\x07\x86q\x07" * 60,
)  # fmt: skip


def mutate_torch(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    if rng.random() < 0.12:
        return mutate_bytes(data, rng, other)
    members = members_of(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.75:
            members["data.pkl"] = mutate_pickle(members.get("data.pkl", b"."), rng)
        else:
            _change_members(members, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        return zip_bytes(members, compressed=rng.random() < 0.02)


def mutate_npz(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """NumPy's archives of arrays: one of these, with its header, is changed and compressed again."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng, other)
    members = members_of(data)
    name = rng.choice(sorted(members))
    sizes = rng.choice(("(8, 8)", "(64,)", "(1099511627776, 8)", "(-1, 8)", "(8, 8, 0)", "(0, 8)"))
    if rng.random() < 0.3:
        members[name] = members[name].replace(b"(8, 8)", sizes.encode())
    else:
        members[name] = mutate_bytes(members[name], rng)
    if rng.random() < 0.1:
        members[rng.choice(("x", "layers.0.q_proj.npy", "layers.-1.npy", "../a.npy"))] = members.pop(name)
    return zip_bytes(members, compressed=True, folder="")


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Changes by opcodes; of bytes, where the pickle is no longer one."""
    try:
        starts = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:  # changed before
        return mutate_bytes(data, rng)
    pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces))
        change = rng.randrange(6)
        if change == 0:
            pieces[at] = b""
        elif change == 1:
            pieces.insert(at, rng.choice(pieces))
        elif change == 2:
            pieces[at] = rng.choice(pieces)
        elif change == 3:
            pieces.insert(at, rng.choice(_PIECES))
        else:
            pieces[at] = _other_argument(pieces[at], rng)
    return b"".join(pieces)


def _other_argument(piece: bytes, rng: random.Random) -> bytes:
    kind = piece[:1]
    if kind in (b"J", b"M", b"K", b"\x8a"):
        value = rng.choice((*INTEGERS, -1))
        return b"J" + packed_integer(value, 4) if rng.random() < 0.5 else b"\x8a\x08" + packed_integer(value, 8)
    if kind == b"c":
        return "c{}\n{}\n".format(*rng.choice(_NAMES)).encode()
    if kind == b"X":
        text = rng.choice((b"storage", b"0", b"1", b"cpu", b"", b"torch.sparse_csr", b"a" * 300, b"\xff"))
        return b"X" + packed_integer(len(text), 4) + text
    return rng.choice(_PIECES)


def _change_members(members: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice(list(members))
    change = rng.randrange(6)
    if change == 0:
        del members[name]
    elif change == 1:
        members[name] = members[name][: rng.randrange(len(members[name]) + 1)]
    elif change == 2:
        members[rng.choice(("data/0", "data.pkl", "byteorder", "../x", "x/data.pkl", ""))] = members.pop(name)
    elif change == 3:
        members[name + "x"] = members[name]
    else:
        members[name] = mutate_bytes(members[name], rng)
    if not members:
        members["data.pkl"] = b"."
