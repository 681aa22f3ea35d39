"""The table of readers: what each is given, how that is changed, what the product does with it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import DataError
from support.fuzz import planted
from support.fuzz.mutate_bytes import INTEGERS, mutate_bytes
from support.fuzz.mutate_gguf import mutate_gguf
from support.fuzz.mutate_json import mutate_json
from support.fuzz.mutate_safetensors import mutate_safetensors
from support.fuzz.mutate_torch import mutate_npz, mutate_torch

SECONDS = 2.0
"""Of the processor's time that an input may take."""

Files = Mapping[str, bytes]
Changes = dict[str, bytes | None]
"""Files of an input that differ from its variant's; None for one that is not there."""
Mutator = Callable[[bytes, random.Random, bytes], bytes]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way into the product.

    Attributes:
      name: for the command line.
      seeds: a key of `seeds.MAKERS`.
      share: of a thousand inputs, those that go to this reader; 0 for one that is run by name only.
      change: files of a variant, a source of chance, and another variant of the same kind, to what differs.
      read: reads a folder, as the command line or a library's user would.
      names_file: whether a message must name the folder or a file in it; requests have none.
      seconds: of the processor's time that an input may take.
    """

    name: str
    seeds: str
    share: int
    change: Callable[[Files, random.Random, Files], Changes]
    read: Callable[[Path], Any]
    names_file: bool = True
    seconds: float = SECONDS


# ---- which file, and how ----------------------------------------------------------------------------


def change_one(mutators: Mapping[str, Mutator]) -> Callable[[Files, random.Random, Files], Changes]:
    """Changes one file, by the first mutator whose key its name ends with; files without one stay."""

    def change(files: Files, rng: random.Random, other: Files) -> Changes:
        names = [name for name in sorted(files) if any(name.endswith(end) for end in mutators)]
        name = rng.choice(names)
        if rng.random() < 0.002:
            return {name: rng.choice((None, b""))}
        mutate = next(mutate for end, mutate in mutators.items() if name.endswith(end))
        return {name: mutate(files[name], rng, other.get(name, b""))}

    return change


def change_checkpoint(files: Files, rng: random.Random, other: Files) -> Changes:
    """Our own JSON half of the time, else any file of Orbax's; some are lost."""
    ours = [name for name in sorted(files) if b'"format_version"' in files[name]]
    name = rng.choice(ours if rng.random() < 0.5 else sorted(files))
    if rng.random() < 0.03:
        return {name: None}
    try:
        json.loads(files[name])
    except ValueError:
        return {name: mutate_bytes(files[name], rng, files[rng.choice(sorted(files))])}
    return {name: mutate_json(files[name], rng)}


_SHAPES = ([0, 16], [16, 16], [48, 32], [32, 48], [17, 16], [16], [], [2**31, 2**31], [-16, 16], [16, 2**16], [1, 2, 3])


def change_words(files: Files, rng: random.Random, other: Files) -> Changes:
    """Numbers, types and sizes of the tensors, in a file that is sound as such."""
    from safetensors.numpy import load, save

    tensors = load(files["words.safetensors"])
    shape: Any = json.loads(files["shape.json"])
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(tensors))
        array, change = tensors[name].copy(), rng.randrange(6)
        if change < 3 and array.size:
            at = rng.randrange(array.size)
            array.reshape(-1).view(np.uint8)[at * array.itemsize + rng.randrange(array.itemsize)] = rng.randrange(256)
        elif change == 3:
            array = array.astype(rng.choice(("f4", "f2", "i8", "i4", "u1", "u4", "?")))
        elif change == 4:
            array = rng.choice((array[:-1], array.repeat(2), array[None], array[:0], array[::-1].copy()))
        elif rng.random() < 0.3:
            shape = rng.choice(_SHAPES)
        elif array.size and array.dtype.kind in "iu":
            number = np.int64(rng.choice(INTEGERS) % 2**63).astype(array.dtype)
            array.reshape(-1)[rng.randrange(array.size)] = number
        tensors[name] = np.ascontiguousarray(array)
    return {"words.safetensors": save(tensors), "shape.json": json.dumps(shape).encode()}


# ---- what reads it ----------------------------------------------------------------------------------


def read_config(folder: Path) -> Any:
    from spqr_jax.files import read_object
    from spqr_jax.models.families import family_of_hf

    values = read_object(folder / "config.json")
    return family_of_hf(values).from_hf(values)


def read_model(folder: Path) -> Any:
    """As the command line opens a model: weights of all parts, no tokenizer."""
    from spqr_jax.resolve import open_model

    path = min(folder.glob("*.gguf"), default=folder)
    source = open_model(str(path), "float32").source
    return source.outer(), [source.block(index) for index in range(source.config.num_layers)]


def read_safetensors(folder: Path) -> Any:
    from spqr_jax.files.safetensors_file import SafetensorsReader

    reader = SafetensorsReader(folder)
    return [reader.read(name, np.float32) for name in reader.shapes()]


def read_quantized(folder: Path) -> Any:
    from spqr_jax.files import read_object
    from spqr_jax.models.quantized import open_tensors

    reader = open_tensors(folder, read_object(folder / "config.json"))
    return [reader.read(name, np.float32) for name in reader.shapes()]


def read_tokenizer(folder: Path) -> Any:
    from spqr_jax.cli.stream import encode_prompts
    from spqr_jax.models.tokenizer import encode_stream, load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = encode_stream(tokenizer, "A text, 12 words\nand naïve 日本 <end>")
    with contextlib.suppress(DataError):  # of a prompt that a damaged tokenizer makes no tokens of
        encode_prompts(tokenizer, ["A prompt"], chat=False)
    return tokenizer.decode(ids)


def read_gguf_tokenizer(folder: Path) -> Any:
    from spqr_jax.models.gguf import GGUFFile
    from spqr_jax.models.tokenizer import encode_stream, gguf_tokenizer

    tokenizer = gguf_tokenizer(GGUFFile(min(folder.glob("*.gguf"), default=folder / "model.gguf")))
    return tokenizer.decode(encode_stream(tokenizer, "the text <s>"))


@functools.cache
def _tokenizer_in(folder: Path) -> Any:
    from spqr_jax.models.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def read_chat(folder: Path) -> Any:
    """The template alone is new: tokenizers are slow to read."""
    from spqr_jax.cli.stream import encode_chat

    tokenizer = _tokenizer_in(folder)
    path = folder / "chat_template.jinja"
    template = path.read_bytes().decode("utf-8", "replace") if path.exists() else None
    roles = ["user", "assistant", "user"]
    return encode_chat(tokenizer, [{"role": role, "content": "Some words, {{ x }}."} for role in roles], template)


def read_words(folder: Path) -> Any:
    from safetensors.numpy import load

    from spqr_jax.formats.hf_spqr import WordMatrix, unpack_words

    tensors = load((folder / "words.safetensors").read_bytes())
    return unpack_words(WordMatrix(**tensors, shape=tuple(json.loads((folder / "shape.json").read_bytes()))))


def read_matrix(folder: Path) -> Any:
    from spqr_jax.formats.legacy import array_from_saved
    from spqr_jax.formats.torch_file import read_torch_file

    saved = read_torch_file(folder / "matrix")
    return array_from_saved(saved, 3, 3 if folder.name != "1" else 16)


def read_legacy(folder: Path) -> Any:
    from spqr_jax.formats.legacy import LegacySource

    source = LegacySource(folder, folder / "base", np.float32)
    return source.settings(), source.outer(), [source.block(index) for index in range(source.config.num_layers)]


def read_data(folder: Path) -> Any:
    from spqr_jax.data import load_tokens

    path = next(iter(sorted(folder.glob("data.*"))), folder / "data.npy")

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    return load_tokens(str(path), "calibration", encode, lambda messages: str([each["content"] for each in messages]))


def read_result_file(folder: Path) -> Any:
    from spqr_jax.cli.report import read_result

    return read_result(folder / "result.json")


def read_analysis(folder: Path) -> Any:
    from spqr_jax.report import read_run

    return read_run(folder, [])


def read_rule(folder: Path) -> Any:
    from spqr_jax.cli.options import parse_rule
    from spqr_jax.config import SpQRConfig

    path = folder / "rule.txt"
    text = path.read_bytes() if path.exists() else b""
    rule = parse_rule(text.decode("utf-8", "surrogateescape"))  # as a shell's argument arrives
    return [SpQRConfig(rules=(rule,)).for_path(path) for path in ("layers.11.experts.3.down_proj", "lm_head")]


def _request(folder: Path) -> Any:
    """Values as a program would have read them; a text that is no JSON was never a request."""
    try:
        return json.loads((folder / "request.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}


def read_quantization(folder: Path) -> Any:
    from spqr_jax.config import SpQRConfig

    return SpQRConfig.from_json(_request(folder))


def read_decoder_config(folder: Path) -> Any:
    from spqr_jax.models.config import DecoderConfig
    from spqr_jax.models.weights import weight_shapes

    return weight_shapes(DecoderConfig.from_json(_request(folder)))


def read_prompts(folder: Path) -> Any:
    """The checks before anything is compiled."""
    from spqr_jax.models.config import DecoderConfig
    from spqr_jax.models.prompts import checked_prompts

    request = _request(folder)
    if not isinstance(request, dict) or not isinstance(request.get("max_new_tokens"), int):
        return None
    config = DecoderConfig(64, 32, 32, 2, 2, 1, 16, 1e-5, 1e4, 64, False)
    return checked_prompts(request.get("prompts", []), config, request["max_new_tokens"])


# ---- the table --------------------------------------------------------------------------------------

_JSON = {"config.json": mutate_json}
_GGUF = {".gguf": mutate_gguf}
_DIRECTORY = {
    "config.json": mutate_json,
    "index.json": mutate_json,
    ".safetensors": mutate_safetensors,
}
_LEGACY = {"args.pt": mutate_torch, "base/config.json": mutate_json, ".pt": mutate_torch, "_proj": mutate_torch}
_TOKENIZER = {".json": mutate_json, ".jinja": mutate_bytes}
_DATA = {".npy": mutate_bytes, ".json": mutate_json, ".txt": mutate_bytes, ".jsonl": mutate_bytes, ".csv": mutate_bytes,
         ".parquet": mutate_bytes}  # fmt: skip
_REQUEST = {".json": mutate_json}

READERS: Sequence[Reader] = (
    Reader("config", "hf_configs", 220, change_one(_JSON), read_config),
    Reader("directory", "hf_directories", 30, change_one(_DIRECTORY), read_model),
    Reader("safetensors", "safetensors_files", 90, change_one(_DIRECTORY), read_safetensors),
    Reader("quantized", "quantized_directories", 40, change_one(_DIRECTORY), read_quantized),
    Reader("tokenizer", "tokenizers", 5, change_one(_TOKENIZER), read_tokenizer),
    Reader(
        "chat", "chat_templates", 15, change_one({".jinja": mutate_bytes}), read_chat, names_file=False, seconds=12.0
    ),
    Reader("gguf", "gguf_files", 150, change_one(_GGUF), read_model),
    Reader("gguf-tokenizer", "gguf_files", 18, change_one(_GGUF), read_gguf_tokenizer),
    Reader("checkpoint", "checkpoints", 2, change_checkpoint, read_model),
    Reader("spqr-words", "spqr_words", 70, change_words, read_words, names_file=False),
    Reader("spqr-directory", "spqr_directories", 10, change_one(_DIRECTORY), read_model),
    Reader("torch-matrix", "legacy_matrices", 80, change_one({"matrix": mutate_torch}), read_matrix, names_file=False),
    Reader("torch-folder", "legacy_folders", 10, change_one(_LEGACY), read_legacy),
    Reader("data", "data_files", 70, change_one(_DATA), read_data),
    Reader("result", "results", 40, change_one(_REQUEST), read_result_file),
    Reader("analysis", "analyses", 20, change_one({".json": mutate_json, ".npz": mutate_npz}), read_analysis),
    Reader("rule", "rules", 30, change_one({".txt": mutate_bytes}), read_rule, names_file=False),
    Reader("quantization", "quantizations", 50, change_one(_REQUEST), read_quantization, names_file=False),
    Reader("decoder-config", "decoder_configs", 40, change_one(_REQUEST), read_decoder_config, names_file=False),
    Reader("prompts", "prompts", 11, change_one(_REQUEST), read_prompts, names_file=False),
    *(
        Reader(f"planted-{kind}", "rules", 0, change_one({".txt": mutate_bytes}), read, kind != "fine", seconds=0.2)
        for kind, read in planted.READS.items()
    ),
)
BY_NAME = {reader.name: reader for reader in READERS}
