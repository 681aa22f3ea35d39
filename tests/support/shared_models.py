"""Tiny quantized models that eight devices can share, and what their processes report."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spqr_jax import Decoder, DecoderConfig
from spqr_jax.array import SpQRArray
from spqr_jax.config import SHARED_INPUTS
from spqr_jax.layout import column_dtype
from spqr_jax.models.decoder import random_decoder
from support import ROOT
from support.arrays import random_array
from support.problems import TINY

_LLAMA = dataclasses.replace(
    TINY, num_heads=8, num_kv_heads=2, hidden_size=128, intermediate_size=256, vocab_size=250, num_layers=1
)
_GEMMA = dataclasses.replace(
    _LLAMA, num_layers=2, num_kv_heads=1, tied_head=True, post_norms=True, qk_norm=True, norm_offset=1.0,
    embedding_scale=0.2, sliding_window=4, local_layers=(0,), local_rope_theta=1000.0, logit_softcap=30.0,
    activation="gelu_tanh", query_scale=0.2,
)  # fmt: skip
_EXPERTS = dataclasses.replace(
    _LLAMA, num_kv_heads=8, num_experts=4, experts_per_token=2, expert_size=128, qkv_bias=True, o_bias=True
)
CONFIGS: dict[str, DecoderConfig] = {"llama": _LLAMA, "gemma": _GEMMA, "experts": _EXPERTS}


def shared_model(name: str, shards: int) -> Decoder:
    """Random quantized weights; those whose inputs devices share are ordered within `shards` ranges."""
    model = random_decoder(CONFIGS[name], seed=0)
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)

    def quantized(path: Any, leaf: jax.Array, seed: int) -> Any:
        name = path[-1].name
        if leaf.ndim != 2 or name == "router":
            return leaf
        return in_ranges(random_array(leaf.shape, seed=seed), shards if name.endswith(SHARED_INPUTS) else 1)

    return jax.tree.unflatten(tree, [quantized(path, leaf, seed) for seed, (path, leaf) in enumerate(leaves)])


def in_ranges(array: SpQRArray, ranges: int) -> SpQRArray:
    """The array with its inputs in a random order within equal ranges."""
    rng, size = np.random.default_rng(0), array.shape[1] // ranges
    order = np.concatenate([size * index + rng.permutation(size) for index in range(ranges)])
    return dataclasses.replace(array, perm=order.astype(column_dtype(array.shape[1])))


def processes(script: str, devices: int, *arguments: Any, count: int = 1) -> list[dict[str, Any]]:
    """Runs a script of tests/parallel in `count` processes of so many virtual CPU devices; what each reports last."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    path = Path(__file__).resolve().parents[1] / "parallel" / script
    started = [
        subprocess.Popen(
            [sys.executable, str(path), *map(str, arguments), *([str(number)] if count > 1 else [])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    reports = []
    try:
        for process in started:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
            reports.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return reports
