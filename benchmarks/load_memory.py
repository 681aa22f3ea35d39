#!/usr/bin/env python3
"""Measures the peak memory of reading a model: random weights in the shapes of Qwen2.5-1.5B.

    python benchmarks/load_memory.py              # safetensors (bfloat16) and GGUF (Q8_0), as bfloat16 and float32
    python benchmarks/load_memory.py --layers 4   # smaller

A separate process reads each file whole. Its peak resident memory includes Python and JAX. The last column divides it
by the size of the weights in the type that they are read as.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from timings import LoadRow, add_csv_options, check_csv, save

from spqr_jax.formats.directory import HFDirectory
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import FAMILIES
from spqr_jax.models.hf import hf_config
from spqr_jax.models.weights import weight_shapes
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect
from spqr_jax.terminal.display import table

QWEN = DecoderConfig(
    family="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_positions=32768,
    tied_head=True,
    qkv_bias=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def weights(config: DecoderConfig, names: Any) -> Any:
    """Yields (tensor name, random float32 values), one tensor at a time."""
    rng, shapes = np.random.default_rng(0), weight_shapes(config)
    for tensor, row in names.expand(config).items():
        shape = shapes[row.paths[0]]
        block = rng.standard_normal((min(shape[0], 256), *shape[1:]), np.float32) * 0.02
        yield tensor, np.tile(block, (-(-shape[0] // len(block)), *[1] * (len(shape) - 1)))[: shape[0]]


def write_safetensors(path: Path, config: DecoderConfig) -> None:
    with HFDirectory(path, shard_bytes=1 << 30) as out:
        for tensor, values in weights(config, FAMILIES[config.family].table):
            out.add({tensor: values.astype(jnp.bfloat16)})
        out.write_json("config.json", hf_config(config))


def write_gguf(path: Path, config: DecoderConfig) -> None:
    writer = gguf.GGUFWriter(path, "qwen2", use_temp_file=True)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor, values in weights(config, FAMILIES[config.family].gguf[0].table):
        if values.ndim == 2:
            writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(model: str, dtype: str) -> None:
    """Reads a model, then prints the bytes of its weights and the peak memory of this process."""
    params = collect(open_model(model, dtype).source)
    jax.block_until_ready(params)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"bytes": size, "peak": peak * unit}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=QWEN.num_layers, help="fewer layers take less time and disk space"
    )
    parser.add_argument("--read", nargs=2, metavar=("MODEL", "DTYPE"), help=argparse.SUPPRESS)
    add_csv_options(parser, "load_memory.csv")
    given = parser.parse_args()
    check_csv(parser, given.csv, LoadRow)
    if given.read:
        return read(*given.read)
    config = dataclasses.replace(QWEN, num_layers=given.layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"safetensors, bfloat16": Path(folder) / "m", "GGUF, Q8_0": Path(folder) / "m.gguf"}
        write_safetensors(files["safetensors, bfloat16"], config)
        write_gguf(files["GGUF, Q8_0"], config)
        for label, path in files.items():
            for dtype in ("bfloat16", "float32"):
                command = [sys.executable, __file__, "--read", str(path), dtype]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                size, peak = (result[name] / 2**30 for name in ("bytes", "peak"))
                rows.append(
                    {
                        "layers": given.layers,
                        "file": label,
                        "read_as": dtype,
                        "weights_gib": size,
                        "peak_gib": peak,
                        "ratio": peak / size,
                    }
                )
    columns = ["file", "read as", "weights GiB", "peak GiB", "peak / weights"]
    lines = [
        [row["file"], row["read_as"], *(f"{row[name]:.2f}" for name in ("weights_gib", "peak_gib", "ratio"))]
        for row in rows
    ]
    table(f"Qwen2.5-1.5B's shapes, {given.layers} layers", columns, lines)
    save(given.csv, LoadRow, given, rows)


if __name__ == "__main__":
    main()
