"""Models that SpQR quantized: checkpoints of ours, Hugging Face's format, folders of the original."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.models.families import FAMILIES
from spqr_jax.models.weights import Decoder
from support.fuzz.mutate_torch import Coo, torch_bytes
from support.fuzz.seeds.small import new_folder, small_config, small_model, write_json


@cache
def _quantized() -> Decoder:
    from support.arrays import random_quantized

    return random_quantized(small_model(small_config(num_layers=1)))


def checkpoints(folder: Path) -> None:
    from spqr_jax.checkpoint import save

    stats = {"model": "tiny", "calibration": {"data": "pydoc", "windows": 4}}
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "quantized", _quantized(), SpQRConfig(), provenance=stats)


def spqr_directories(folder: Path) -> None:
    from spqr_jax.formats.directory import HFDirectory
    from spqr_jax.formats.export import export_hf_spqr
    from spqr_jax.stream.blocks import TreeSource

    folder.mkdir(parents=True, exist_ok=True)
    with HFDirectory(folder / "llama") as out:
        export_hf_spqr(TreeSource(_quantized()), out)


def spqr_words(folder: Path) -> None:
    from safetensors.numpy import save_file

    from spqr_jax.formats.hf_spqr import pack_words
    from support.arrays import random_array

    for number, (shape, share) in enumerate([((32, 48), 0.05), ((16, 16), 0.0), ((64, 32), 0.3)]):
        tensors = pack_words(random_array(shape, outliers=share, seed=number)).tensors()
        save_file(tensors, new_folder(folder / str(number)) / "words.safetensors")
        write_json(folder / str(number), "shape.json", list(shape))


def _saved_matrix(array: Any) -> dict[str, Any]:
    """What the original's engine would have saved of a matrix."""
    from spqr_jax.packing import unpack_codes
    from support.arrays import dense

    out, inner = array.shape
    names = [f"quant_layer_{kind}_qq_{part}" for kind in ("scale", "zero") for part in ("scale", "zero")]
    saved: dict[str, Any] = {
        "quant_weights": unpack_codes(np.asarray(array.codes), array.bits)[:, :inner].astype(np.int8)
    }
    saved |= {name: [] for name in ("quant_layer_scale", "quant_layer_zeros", *names)}
    stats = np.asarray(array.tile_stats)
    for group in range(stats.shape[1]):
        if array.quantized_stats:
            for name, words in (("scale", array.scale_codes), ("zeros", array.zero_codes)):
                codes = unpack_codes(np.asarray(words), 3)[group].reshape(-1, 16).astype(np.int8)
                saved[f"quant_layer_{name}"].append(codes)
            for index, name in enumerate(names):
                saved[name].append(stats[:, group, index : index + 1])
        else:
            saved["quant_layer_scale"].append(stats[:, group, :1])
            saved["quant_layer_zeros"].append(stats[:, group, 1:])
    rows, cols, _ = dataclasses.replace(array, perm=None).to_coo()
    values = dense(dataclasses.replace(array, perm=None), np.float32)[rows, cols]
    return saved | {
        "outliers_matrix": Coo(np.stack([rows, cols]).astype(np.int64), values, (out, inner)),
        "perm": np.asarray(array.perm).astype(np.int64),
        "weight_shape": (out, inner),
        "groupsize": array.group_size,
        "blocksize": 128,
        "keep_last_columns": 0,
    }


def legacy_matrices(folder: Path) -> None:
    from support.arrays import random_array

    forms: list[dict[str, Any]] = [{}, {"stats_bits": None}, {"outliers": 0.0}]
    for number, form in enumerate(forms):
        data = torch_bytes(_saved_matrix(random_array((32, 32), seed=number, **form)))
        (new_folder(folder / str(number)) / "matrix").write_bytes(data)


def legacy_folders(folder: Path) -> None:
    """A folder that the original wrote, with the config.json of its model in ``base``."""
    from spqr_jax.array import SpQRArray
    from spqr_jax.models.hf import hf_config, hf_tensors

    model, saved = _quantized(), new_folder(folder / "llama")
    rest = dict(hf_tensors(small_model(model.config)))
    for tensor, row in FAMILIES["llama"].table.expand(model.config).items():
        _, _, place = row.paths[0].partition("layers.")
        layer, _, name = place.partition(".")
        if name and isinstance(array := model.layers[int(layer)][name], SpQRArray):
            module = tensor.removesuffix(".weight").partition(f".{layer}.")[2]
            (new_folder(saved / layer) / module).write_bytes(torch_bytes(_saved_matrix(array)))
            del rest[tensor]
    (saved / "not_quantized_weights.pt").write_bytes(torch_bytes(rest))
    arguments = {"wbits": 3, "groupsize": 16, "qq_scale_bits": 3, "qq_zero_bits": 3, "qq_groupsize": 16,
                 "outlier_threshold": 0.2, "percdamp": 1.0, "permutation_order": "act_order"}  # fmt: skip
    (saved / "args.pt").write_bytes(torch_bytes(arguments))
    write_json(saved / "base", "config.json", hf_config(model.config))
