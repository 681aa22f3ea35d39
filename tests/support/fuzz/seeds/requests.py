"""Data, results and requests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.models.families import FAMILIES
from support.fuzz.seeds.small import new_folder, small_config, write_json

TEXTS = ["A line of text.", "Another, with numbers 12 345 and naïve 日本 🙂.", "", "  blanks  "]


def data_files(folder: Path) -> None:
    """Token ids and texts in every form that is read, or looks like one."""
    ids = np.arange(400) % 64
    for name, value in {
        "stream": ids,
        "windows": ids.reshape(4, 100).astype(np.int32),
        "small": ids.astype("u1"),
    }.items():
        np.save(new_folder(folder / name) / "data.npy", value)
    (new_folder(folder / "text") / "data.txt").write_text("\n\n".join(TEXTS * 5), encoding="utf-8")
    lines = [json.dumps({"text": text, "meta": {"n": 1}}) for text in TEXTS]
    lines += [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in TEXTS]
    (new_folder(folder / "jsonl") / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (new_folder(folder / "csv") / "data.csv").write_text(
        "id,text\n" + "\n".join(f'{i},"{t}"' for i, t in enumerate(TEXTS))
    )
    write_json(folder / "json", "data.json", [{"text": text} for text in TEXTS])
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:  # not a package that we ask for
        return
    table = pyarrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, new_folder(folder / "parquet") / "data.parquet")


def results(folder: Path) -> None:
    perplexity = {
        "model": "x",
        "data": "pydoc",
        "perplexity": 12.5,
        "windows": 4,
        "seqlen": 128,
        "bits": {"ideal": 3.1},
    }
    write_json(folder / "perplexity", "result.json", perplexity)
    tasks = {"model": "x", "results": {"piqa": {"acc,none": 0.7, "acc_stderr,none": 0.01, "alias": "piqa"}}}
    write_json(folder / "tasks", "result.json", tasks)


def analyses(folder: Path) -> None:
    """What `spqr analyze` writes, of a dense model and of a quantized one."""
    from spqr_jax.analysis import ModelAnalysis
    from spqr_jax.analysis.model import COLUMN_BINS, WeightAnalysis
    from spqr_jax.analysis.structure import Structures
    from spqr_jax.report import write_analysis

    structures = Structures(0.3, (1, 5), (), (0,), 0.7, (2,), {"rows": 0.4, "columns": 0.0, "unstructured": 0.6})
    bins = (1.0 / COLUMN_BINS,) * COLUMN_BINS
    drawn = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    weights = [WeightAnalysis(f"layers.{i}.q_proj", (32, 32), 0.01, structures, bins, drawn) for i in range(2)]
    setting = {"dense": "x", "calibration": {"data": "pydoc", "windows": 4, "seqlen": 32, "seed": 0}, "seconds": 1.5,
               "config": SpQRConfig().to_json(), "command": "spqr analyze x"}  # fmt: skip
    layer = {"shape": [32, 32], "bits": 3, "ideal_bits": 3.5, "stored_bits": 4.0, "outlier_percent": 1.0}
    summary = {"ideal_bits": 3.5, "stored_bits": 4.0, "outlier_percent": 1.0, "head_bits": None, "bytes": 1000,
               "quantized_bytes": 800, "dense_bytes": 4000, "quantization": SpQRConfig().to_json(),
               "provenance": {"model": "x", "method": "spqr", "calibration": setting["calibration"]},
               "layers": {"layers.0.q_proj": layer | {"output_error": 0.1}}}  # fmt: skip
    for name, told in {"dense": None, "quantized": summary}.items():
        write_analysis(new_folder(folder / name), "x", ModelAnalysis(tuple(weights)), told, setting)


def rules(folder: Path) -> None:
    for number, text in enumerate(["down_proj=4", r"layers\.(0|1)\..*=skip", "^lm_head$=8", "[qk]_proj=2", "a=b=3"]):
        (new_folder(folder / str(number)) / "rule.txt").write_text(text)


def quantizations(folder: Path) -> None:
    from spqr_jax.rules import LayerRule

    configs = {
        "spqr": SpQRConfig(),
        "preset": SpQRConfig.preset("4bit"),
        "gptq": SpQRConfig.gptq(),
        "rules": SpQRConfig(rules=(LayerRule("down_proj", bits=4, outlier_threshold=0.5), LayerRule("q", skip=True))),
        "brecq": SpQRConfig.baseline("brecq", steps=3),
    }
    for name, config in configs.items():
        write_json(folder / name, "request.json", config.to_json())


def decoder_configs(folder: Path) -> None:
    for family in FAMILIES:
        write_json(folder / family, "request.json", small_config(family).to_json())
    stretched = small_config(rope_factors=(1.0,) * 4, rope_dim=8, rope_scale=1.2)
    write_json(folder / "stretched", "request.json", stretched.to_json())


def prompts(folder: Path) -> None:
    write_json(folder / "two", "request.json", {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 5})
