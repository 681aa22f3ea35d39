"""What a decoder is made of, as static configuration.

One description covers all families: each option is something the forward pass
does or leaves out. `spqr_jax.models.families` maps other people's files to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import LARGEST, is_number, shown
from spqr_jax.files.fields import read_fields

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

MOST_LAYERS, MOST_EXPERTS, MOST_HEAD_DIM = 4096, 4096, 65536
MOST_LAYERS_TIMES_EXPERTS = 50_000
"""More than any model has (Kimi K2: 61 x 384). A damaged file that tells of more would take seconds and gigabytes
for the names of its weights alone."""


class BlockKind(NamedTuple):
    """What may differ between the blocks of one model. Blocks of one kind share compiled programs.

    Attributes:
      local: whether attention sees a sliding window only. None in a stack of blocks that differ in this, where it is
        data.
      sparse: whether the MLP is a mixture of experts.
    """

    local: bool | None = False
    sparse: bool = False


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes, constants and options of a decoder.

    Attributes:
      vocab_size: number of tokens in the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width of a dense MLP.
      num_layers: number of blocks.
      num_heads: number of query heads.
      num_kv_heads: number of key-value heads.
      head_dim: width of a head.
      norm_eps: added to the mean square (``rms``) or to the variance (``layer``) in every norm.
      rope_theta: base of the rotary frequencies; None for no rotary embedding.
      max_positions: longest sequence of the model, in tokens.
      tied_head: whether the embedding serves as output head.
      rope_factors: divisor of each rotary frequency, for scaled contexts; None for no scaling.
      bos_token_id: token that begins a text, or None.
      eos_token_ids: tokens that end a text.
      family: the model's family, a key of `spqr_jax.models.families.FAMILIES`; its names are used when the model is
        written.
      norm: ``rms`` or ``layer``; ``layer`` has a bias.
      norm_offset: added to the stored gain of every RMS norm.
      activation: activation function of the MLP.
      gated: whether the MLP is down(act(gate x) · up x); otherwise it is down(act(up x)).
      parallel: whether attention and MLP both read the block's input, and their results are added.
      shared_norm: with ``parallel``, whether both share one norm.
      post_norms: whether the results of attention and MLP are normalized before they are added to the residual stream.
      qk_norm: whether queries and keys are normalized, head by head, before the rotary embedding.
      qkv_bias: whether the query, key and value products have a bias.
      o_bias: whether the attention's output product has a bias.
      mlp_bias: whether the MLP's products have a bias.
      query_scale: factor on attention scores; None for head_dim^-1/2.
      attention_softcap: s in s · tanh(score / s), applied to attention scores; None for no cap.
      logit_softcap: s in s · tanh(logit / s), applied to logits; None for no cap.
      embedding_scale: factor on token embeddings, rounded to their type; None for 1.
      learned_positions: number of rows of the position embeddings; None for no such table.
      position_offset: row of that table for the first position.
      rope_dim: number of leading dimensions of a head that are rotated; None for all.
      rope_scale: factor on the rotary cosines and sines.
      sliding_window: number of keys that a query of a local block sees, its own key included; None for no window.
      local_layers: indices of the local blocks.
      local_rope_theta: base of the rotary frequencies of local blocks, not scaled; None for that of the other blocks.
      num_experts: number of experts of each sparse MLP; 0 for a dense model.
      experts_per_token: number of experts that read a token.
      expert_size: width of an expert.
      normalize_experts: whether the weights of a token's experts are scaled to add up to 1.
      dense_layers: indices of the blocks with a dense MLP, in a model with experts.

    Raises:
      ModelError: a value is out of range, or values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float | None
    max_positions: int
    tied_head: bool
    rope_factors: tuple[float, ...] | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    family: str = "llama"
    norm: Norm = "rms"
    norm_offset: float = 0.0
    activation: Activation = "silu"
    gated: bool = True
    parallel: bool = False
    shared_norm: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    learned_positions: int | None = None
    position_offset: int = 0
    rope_dim: int | None = None
    rope_scale: float = 1.0
    sliding_window: int | None = None
    local_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalize_experts: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for problem in self._size_problems():  # first: the others compute with sizes
            raise ModelError(problem)
        for problem in self._problems():
            raise ModelError(problem)

    def _size_problems(self) -> Iterator[str]:
        """Values that are no numbers, or out of every model's range."""
        for name, (least, most) in self._ranges().items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                yield f"{name} must be a whole number from {least} to {most}, got {shown(value)}"
        for name, positive in _REALS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not is_number(value) or not math.isfinite(value) or (positive and not value > 0):
                yield f"{name} must be a finite number{' above 0' * positive}, got {shown(value)}"
        for name, kind in (("norm", Norm), ("activation", Activation)):
            if getattr(self, name) not in get_args(kind):
                yield f"{name} must be one of {', '.join(get_args(kind))}, got {shown(getattr(self, name))}"
        for factor in self.rope_factors or ():
            if not is_number(factor) or not math.isfinite(factor) or not factor > 0:
                yield f"rope_factors must be finite numbers above 0, got {shown(factor)}"
        for name in ("local_layers", "dense_layers", "eos_token_ids"):
            values = getattr(self, name)
            if len(values) > MOST_LAYERS:
                yield f"{name} must hold at most {MOST_LAYERS} numbers, but has {len(values)}"
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
                    yield f"{name} must hold whole numbers from 0 to {LARGEST}, got {shown(value)}"

    def _ranges(self) -> dict[str, tuple[int, int]]:
        """Least and greatest value of each whole number."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "max_positions")
        experts = (1, LARGEST) if self.num_experts else (0, LARGEST)
        return dict.fromkeys(sizes, (1, LARGEST)) | {
            "num_layers": (1, MOST_LAYERS),
            "head_dim": (1, MOST_HEAD_DIM),
            "rope_dim": (1, MOST_HEAD_DIM),
            "bos_token_id": (0, LARGEST),
            "learned_positions": (1, LARGEST),
            "position_offset": (0, LARGEST),
            "sliding_window": (1, LARGEST),
            "num_experts": (0, MOST_EXPERTS),
            "experts_per_token": (0, MOST_EXPERTS),
            "expert_size": experts,
        }

    def _problems(self) -> list[str]:
        problems = []
        if self.num_heads * self.head_dim > LARGEST:
            problems.append(f"{self.num_heads} heads of size {self.head_dim} exceed {LARGEST} in total")
        if self.num_layers * self.num_experts > MOST_LAYERS_TIMES_EXPERTS:
            problems.append(
                f"{self.num_experts} experts in each of {self.num_layers} layers exceed "
                f"{MOST_LAYERS_TIMES_EXPERTS} in total"
            )
        if self.rotated > self.head_dim:
            problems.append(f"rope_dim must be at most the head size, {self.head_dim}, got {self.rotated}")
        if self.num_heads % self.num_kv_heads:
            problems.append(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.rope_theta is not None and self.rotated % 2:
            problems.append(f"rotary embedding needs an even head size, got {self.rotated}")
        if self.rope_factors is not None and len(self.rope_factors) != self.rotated // 2:
            problems.append(f"expected {self.rotated // 2} rotary factors, got {len(self.rope_factors)}")
        if self.learned_positions is not None and self.learned_positions < self.max_positions + self.position_offset:
            problems.append(
                f"{self.learned_positions} learned positions are too few for {self.max_positions} tokens "
                f"that start at row {self.position_offset}"
            )
        if self.local_layers and not self.sliding_window:
            problems.append("local_layers need a sliding_window")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            problems.append(
                f"experts_per_token must lie in 1..{self.num_experts}, the number of experts, got "
                f"{self.experts_per_token}"
            )
        return problems

    @property
    def rotated(self) -> int:
        """Number of leading dimensions of a head that the rotary embedding rotates."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    @property
    def head_path(self) -> str:
        """Path of the output head, ``lm_head``, or ``embed_tokens`` with a tied head."""
        return "embed_tokens" if self.tied_head else "lm_head"

    def kind(self, index: int) -> BlockKind:
        """The kind of one block.

        Args:
          index: of the block, from 0.

        Returns:
          Whether it is local, and whether it is sparse.
        """
        return BlockKind(index in self.local_layers, bool(self.num_experts) and index not in self.dense_layers)

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """The kind of every block."""
        return tuple(self.kind(index) for index in range(self.num_layers))

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values. `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], label: str = "the decoder configuration") -> DecoderConfig:
        """Reads the result of `to_json`.

        Args:
          values: the dictionary.
          label: name of the source in error messages.

        Returns:
          The configuration.

        Raises:
          ModelError: unknown entries, values of another type, or values that contradict each other.
        """
        fields = read_fields(cls, values, label)
        try:
            return cls(**fields)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from None


_REALS = {
    "norm_eps": True,
    "rope_theta": True,
    "norm_offset": False,
    "query_scale": False,
    "attention_softcap": True,
    "logit_softcap": True,
    "embedding_scale": False,
    "rope_scale": False,
    "local_rope_theta": True,
}
"""Fields that are real numbers, and whether these must be above 0."""

_MAY_BE_NONE = {
    *("rope_theta", "bos_token_id", "query_scale", "attention_softcap", "logit_softcap", "embedding_scale"),
    *("learned_positions", "rope_dim", "sliding_window", "local_rope_theta"),
}
