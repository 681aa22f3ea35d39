"""GGUF files of the Llama family, any tensor type that the `gguf` package dequantizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.names import Name, TensorSource

_ROPE_FACTORS = "rope_freqs.weight"


def _halves_from_pairs(heads: int, w: np.ndarray) -> np.ndarray:
    """Undoes llama.cpp's order of Q and K rows.

    It rotates neighbouring rows (0,1), (2,3), ... of a head together; we, as
    Hugging Face, rotate row i with row i + head_dim/2.
    """
    pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
    return pairs.swapaxes(1, 2).reshape(w.shape)


_BLOCK = r"blk\.(\d+)\."

GGUF_TABLE = (
    Name(r"token_embd\.weight", "embed_tokens"),
    Name(r"output_norm\.weight", "final_norm"),
    Name(r"output\.weight", "lm_head"),
    Name(_BLOCK + r"attn_norm\.weight", r"layers.\1.attention_norm"),
    Name(_BLOCK + r"attn_q\.weight", r"layers.\1.q_proj", lambda w, c: _halves_from_pairs(c.num_heads, w)),
    Name(_BLOCK + r"attn_k\.weight", r"layers.\1.k_proj", lambda w, c: _halves_from_pairs(c.num_kv_heads, w)),
    Name(_BLOCK + r"attn_v\.weight", r"layers.\1.v_proj"),
    Name(_BLOCK + r"attn_output\.weight", r"layers.\1.o_proj"),
    Name(_BLOCK + r"ffn_norm\.weight", r"layers.\1.mlp_norm"),
    Name(_BLOCK + r"ffn_(gate|up|down)\.weight", r"layers.\1.\2_proj"),
    Name(r"rope_freqs\.weight", None),  # goes into the configuration
)


class GGUFFile:
    """An open GGUF file: its key-value header and its tensors, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.label = str(path)
        try:
            self._reader = gguf.GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except Exception as error:  # the package raises many kinds on a damaged file
            raise ModelError(f"{path} cannot be read as GGUF: {error or type(error).__name__}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """A header entry, or `default`."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self.label}: tensor {name} has type {tensor.tensor_type.name}, which cannot be dequantized here"
            ) from None
        return values.reshape(self.shapes()[name])


def config_from_gguf(file: GGUFFile) -> DecoderConfig:
    """Maps the header of a GGUF file.

    Raises:
      ModelError: another architecture than ``llama``, or entries that are missing.
    """
    architecture = file.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{file.label}: GGUF architecture {architecture!r} is not supported; supported: 'llama'")
    needed = {}
    for ours, key in {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_layers": "block_count",
        "num_heads": "attention.head_count",
        "norm_eps": "attention.layer_norm_rms_epsilon",
        "max_positions": "context_length",
    }.items():
        needed[ours] = file.get(f"llama.{key}")
    missing = [name for name, value in needed.items() if value is None]
    if missing or "token_embd.weight" not in file.shapes():
        raise ModelError(f"{file.label}: the GGUF header lacks {', '.join(missing) or 'token_embd.weight'}")
    if (scaling := file.get("llama.rope.scaling.type", "none")) not in ("none", "linear"):
        raise ModelError(f"{file.label}: rotary scaling {scaling!r} is not supported")
    head_dim = file.get("llama.rope.dimension_count") or needed["hidden_size"] // needed["num_heads"]
    factors = None
    if _ROPE_FACTORS in file.shapes():
        factors = tuple(float(f) for f in file.read(_ROPE_FACTORS))
    elif scaling == "linear":
        factors = (float(file.get("llama.rope.scaling.factor", 1.0)),) * (head_dim // 2)
    ends = [file.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]  # of a text, of a turn
    return DecoderConfig(
        **needed,
        vocab_size=file.shapes()["token_embd.weight"][0],
        num_kv_heads=file.get("llama.attention.head_count_kv", needed["num_heads"]),
        head_dim=head_dim,
        rope_theta=float(file.get("llama.rope.freq_base", 10000.0)),
        tied_head="output.weight" not in file.shapes(),
        rope_factors=factors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def open_gguf(file: GGUFFile, dtype: Any) -> TensorSource:
    """A lazily read model from an open GGUF file, weights in `dtype`."""
    return TensorSource(file, GGUF_TABLE, config_from_gguf(file), dtype)
