"""Models written for other programs: dense, or in Hugging Face's SpQR format, one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spqr_jax.errors import SpQRError
from spqr_jax.events import Events, Steps, ignore
from spqr_jax.files import Entries
from spqr_jax.formats.directory import HFDirectory
from spqr_jax.formats.hf_spqr import BITS, TILE, pack_words, why_unsupported
from spqr_jax.models.families import FAMILIES
from spqr_jax.models.hf import exported_config
from spqr_jax.models.names import AS_IT_IS, Row
from spqr_jax.models.weights import OUTER_NAMES, Block
from spqr_jax.quantized import is_quantized
from spqr_jax.stream import sweep
from spqr_jax.stream.blocks import BlockSource


def _for_each_part(source: BlockSource, write: Callable[[dict[str, Any]], None], events: Events) -> None:
    """Calls `write` with the weights outside of the blocks, then with those of each block, by their paths."""
    steps = Steps("exporting", source.config.num_layers + 1, events)
    outer = source.outer()
    write({n: w for n in OUTER_NAMES if (w := getattr(outer, n)) is not None})
    del outer
    steps.advance(note="embedding and head")

    def write_block(index: int, block: Block) -> None:
        write({f"layers.{index}.{name}": weight for name, weight in block.items()})
        steps.advance(note=f"block {index}")

    sweep.forward(source, write_block)


def _dense(path: str, weight: Any, dtype: Any) -> np.ndarray:
    """A weight in `dtype`, which must be able to hold it."""
    values = np.asarray(weight.to_dense() if is_quantized(weight) else weight, np.float32)
    with np.errstate(over="ignore"):  # what does not fit is refused below
        cast = values.astype(dtype)
    if not np.all(np.isfinite(cast)):
        raise SpQRError(
            f"{path} has values up to {np.abs(values).max():.3g}, beyond {np.dtype(dtype)}'s range; "
            "use --format dense with --dtype bfloat16"
        )
    return cast


def _tensors(rows: dict[str, Row], weights: dict[str, Any], source: BlockSource, dtype: Any) -> dict[str, np.ndarray]:
    """Dense tensors of the rows, whose weights are all there."""
    config = source.config
    return {
        tensor: row.packing.join([_dense(path, weights[path], dtype) for path in row.paths], config)
        for tensor, row in rows.items()
    }


def _rows_by_path(source: BlockSource) -> dict[str, tuple[str, Row]]:
    """First path of each row -> (tensor, row)."""
    table = FAMILIES[source.config.family].table
    return {row.paths[0]: (tensor, row) for tensor, row in table.expand(source.config).items()}


def export_dense(
    source: BlockSource,
    out: HFDirectory,
    dtype: Any = np.float16,
    events: Events = ignore,
    origin: Entries | None = None,
) -> None:
    """Writes a model's weights, dequantized, and its config.json.

    Args:
      source: the model, quantized or dense.
      out: takes them.
      dtype: of the tensors.
      events: told of each part, as phase "exporting".
      origin: the config.json that the model came with, whose form is kept; None for a new one.

    Raises:
      SpQRError: a value is too large for `dtype`.
    """
    rows = _rows_by_path(source)

    def write(weights: dict[str, Any]) -> None:
        tensors = {tensor: row for path in weights if path in rows for tensor, row in [rows[path]]}
        out.add(_tensors(tensors, weights, source, dtype))

    _for_each_part(source, write, events)
    out.write_json("config.json", exported_config(source.config, dtype, origin))


def export_hf_spqr(
    source: BlockSource,
    out: HFDirectory,
    events: Events = ignore,
    origin: Entries | None = None,
) -> None:
    """Writes a model in Hugging Face's SpQR format; weights outside of blocks, and those left dense, in float16.

    Args:
      source: the quantized model.
      out: takes it.
      events: told of each part, as phase "exporting".
      origin: as in `export_dense`.

    Raises:
      SpQRError: the format cannot hold the model, with the reason and what to choose instead.
    """
    _refuse_family(source)
    rows = _rows_by_path(source)
    shapes: dict[str, int] = {}
    dense: list[str] = []

    def write(weights: dict[str, Any]) -> None:
        for path, weight in weights.items():
            if path not in rows:
                continue  # a further path of a row that is written with its first
            tensor, row = rows[path]
            in_words = is_quantized(weight) and path.startswith("layers.")
            if not in_words:
                out.add(_tensors({tensor: row}, weights, source, np.float16))
                dense.append(tensor)
                continue
            if why := why_unsupported(weight):
                raise SpQRError(f"the Hugging Face SpQR format cannot hold {path}: {why}")
            if path + "_bias" in weights:
                raise SpQRError(f"the Hugging Face SpQR format cannot hold {path}: it has a bias; use --format dense")
            module = tensor.removesuffix(".weight")
            parts = {f"{module}.{name}": value for name, value in pack_words(weight).tensors().items()}
            shapes.update({f"{name}.shape": int(value.shape[0]) for name, value in parts.items()})
            out.add(parts)

    _for_each_part(source, write, events)
    if not shapes:
        raise SpQRError("no weight of this model is quantized: quantize it first, or use --format dense")
    if source.config.tied_head:
        dense.append("lm_head.weight")
    out.write_json(
        "config.json", exported_config(source.config, np.float16, origin) | _quantization_entries(shapes, dense)
    )


def _refuse_family(source: BlockSource) -> None:
    config = source.config
    fused = [row for _, row in _rows_by_path(source).values() if row.paths[0].startswith("layers.")]
    reason = ""
    if config.num_experts:
        reason = "transformers keeps experts in one tensor, not in linear layers"
    elif any(row.packing is not AS_IT_IS and len(row.paths) > 1 for row in fused):
        reason = f"{config.family} keeps Q, K and V in one matrix, which would have to be quantized as one matrix"
    if reason:
        raise SpQRError(f"the Hugging Face SpQR format cannot hold this model: {reason}; use --format dense")


def _quantization_entries(shapes: dict[str, int], dense: list[str]) -> dict[str, Any]:
    """What config.json says of the format. Modules left dense stand there by both of the names that are looked for."""
    modules = [name for tensor in dense for name in (tensor, tensor.removesuffix(".weight")) if "norm" not in name]
    norms = [tensor for tensor in dense if "norm" in tensor]
    return {
        "quantization_config": {
            "quant_method": "spqr",
            "bits": BITS,
            "beta1": TILE,
            "beta2": TILE,
            "modules_to_not_convert": [*modules, *norms],
            "shapes": shapes,
        },
    }
