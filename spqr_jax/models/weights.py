"""A model's weights as pytrees, and which there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.errors import ModelError
from spqr_jax.models.config import BlockKind, DecoderConfig

Weight = Any
"""A jax.Array [out, in], an SpQRArray or a ShapeDtypeStruct."""


@jax.tree_util.register_pytree_with_keys_class
class Block(Mapping[str, Weight]):
    """The weights of one decoder block by name, in the order of their use. Immutable; see `replace`.

    ``block.q_proj`` and ``block["q_proj"]`` are the same. Matrices are [out, in]. A name that the block does not have
    raises `AttributeError` or `KeyError`.

    Attributes:
      kind: the block's kind; static, part of the tree's structure.
    """

    def __init__(self, weights: Mapping[str, Weight], kind: BlockKind = BlockKind()) -> None:
        self._weights, self.kind = dict(weights), kind

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __getattr__(self, name: str) -> Weight:
        if name.startswith("_") or name not in self._weights:
            raise AttributeError(f"this block has no weight {name!r}")
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"Block({self._weights!r}, {self.kind})"

    def joined(self, names: Sequence[str]) -> Weight | None:
        """The one weight of a prepared block that holds these matrices, rows stacked; None if they are apart."""
        return self._weights.get(joint_name(names)) if len(names) > 1 else None

    def biases(self, names: Sequence[str]) -> list[Weight | None]:
        """The biases of matrices; None for one that has none."""
        return [self._weights.get(name + "_bias") for name in names]

    def replace(self, changes: Mapping[str, Weight]) -> Block:
        """A copy of the block with other weights under existing names.

        Args:
          changes: new weights by name.

        Returns:
          The new block.

        Raises:
          ModelError: the block has no weight of that name.
        """
        if unknown := [name for name in changes if name not in self._weights]:
            raise ModelError(f"a block has no weight {', '.join(unknown)}; it has {', '.join(self._weights)}")
        return Block({**self._weights, **changes}, self.kind)

    def tree_flatten(self) -> tuple[tuple[Weight, ...], Any]:
        return tuple(self._weights.values()), (tuple(self._weights), self.kind)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Weight], ...], Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), weight) for name, weight in self._weights.items())
        return children, (tuple(self._weights), self.kind)

    @classmethod
    def tree_unflatten(cls, structure: Any, weights: Any) -> Block:
        names, kind = structure
        return cls(dict(zip(names, weights, strict=True)), kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """The weights outside of the blocks.

    Attributes:
      embed_tokens: token embeddings [vocab, hidden].
      final_norm: gain of the last norm [hidden].
      lm_head: output head [vocab, hidden]; None if the embedding serves as output head (a tied head).
      final_norm_bias: bias of the last norm [hidden], or None.
      embed_positions: learned position embeddings [learned_positions, hidden], or None.
    """

    embed_tokens: Weight
    final_norm: Weight
    lm_head: Weight | None = None
    final_norm_bias: Weight | None = None
    embed_positions: Weight | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A whole model, a pytree.

    Attributes:
      outer: the weights outside of the blocks: embeddings, last norm, output head.
      layers: the blocks, first to last.
      config: sizes and options; static, part of the tree's structure.
    """

    outer: Outer
    layers: tuple[Block, ...]
    config: DecoderConfig = dataclasses.field(metadata={"static": True})


OUTER_NAMES = tuple(field.name for field in dataclasses.fields(Outer))


def block_shapes(config: DecoderConfig, kind: BlockKind) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight of a block, in the order in which they are used."""
    hidden, width, kv_width = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {}

    def add_norm(name: str, wanted: bool = True) -> None:
        if wanted:
            shapes[name] = (hidden,)
            if config.norm == "layer":
                shapes[name + "_bias"] = (hidden,)

    def add_matrix(name: str, out: int, inner: int, bias: bool) -> None:
        shapes[name] = (out, inner)
        if bias:
            shapes[name + "_bias"] = (out,)

    add_norm("attention_norm")
    add_matrix("q_proj", width, hidden, config.qkv_bias)
    add_matrix("k_proj", kv_width, hidden, config.qkv_bias)
    add_matrix("v_proj", kv_width, hidden, config.qkv_bias)
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    add_matrix("o_proj", hidden, width, config.o_bias)
    add_norm("attention_post_norm", config.post_norms)
    add_norm("mlp_norm", not config.shared_norm)
    if kind.sparse:
        shapes["router"] = (config.num_experts, hidden)
    prefixes = expert_prefixes(config) if kind.sparse else ("",)
    inner = config.expert_size if kind.sparse else config.intermediate_size
    for prefix in prefixes:
        if config.gated:
            add_matrix(prefix + "gate_proj", inner, hidden, config.mlp_bias)
        add_matrix(prefix + "up_proj", inner, hidden, config.mlp_bias)
        add_matrix(prefix + "down_proj", hidden, inner, config.mlp_bias)
    add_norm("mlp_post_norm", config.post_norms)
    return shapes


def expert_prefixes(config: DecoderConfig) -> tuple[str, ...]:
    """What the names of each expert's weights begin with."""
    return tuple(f"experts.{index}." for index in range(config.num_experts))


def matrix_names(config: DecoderConfig, kind: BlockKind) -> tuple[str, ...]:
    """A block's matrices in the order in which they are quantized, stage by stage; a router is none of them."""
    found = [name for name, shape in block_shapes(config, kind).items() if len(shape) == 2 and name != "router"]
    return tuple(sorted(found, key=lambda name: name.endswith("down_proj")))


def joint_name(names: Sequence[str]) -> str:
    """The name in a prepared block of matrices that are joined because they read one input."""
    return "+".join(names)


def same_input_names(config: DecoderConfig, kind: BlockKind) -> list[tuple[str, ...]]:
    """The matrices of a block that read one input, several at a time: q, k and v; gate and up of each MLP."""
    groups: list[tuple[str, ...]] = [("q_proj", "k_proj", "v_proj")]
    if config.gated:
        prefixes = expert_prefixes(config) if kind.sparse else ("",)
        groups += [(prefix + "gate_proj", prefix + "up_proj") for prefix in prefixes]
    return groups


def outer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight outside of the blocks."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab_size, hidden), "final_norm": (hidden,)}
    if not config.tied_head:
        shapes["lm_head"] = (config.vocab_size, hidden)
    if config.norm == "layer":
        shapes["final_norm_bias"] = (hidden,)
    if config.learned_positions is not None:
        shapes["embed_positions"] = (config.learned_positions, hidden)
    return shapes


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every weight of a model."""
    shapes = outer_shapes(config)
    for index, kind in enumerate(config.kinds):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in block_shapes(config, kind).items()}
    return shapes


def abstract_block(config: DecoderConfig, kind: BlockKind, dtype: Any = jnp.float32) -> Block:
    """A block with a ShapeDtypeStruct for each weight."""
    shapes = block_shapes(config, kind)
    return Block({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}, kind)


def abstract_decoder(config: DecoderConfig, dtype: Any = jnp.float32) -> Decoder:
    """The model's tree with a ShapeDtypeStruct for each weight."""
    spec = partial(jax.ShapeDtypeStruct, dtype=dtype)
    outer = Outer(**{name: spec(shape) for name, shape in outer_shapes(config).items()})
    return Decoder(outer, tuple(abstract_block(config, kind, dtype) for kind in config.kinds), config)


def random_decoder(config: DecoderConfig, seed: int, dtype: Any = jnp.float32) -> Decoder:
    """A model with random weights of a sensible size, for tests and benchmarks."""
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_decoder(config, dtype))
    keys = jax.random.split(jax.random.key(seed), len(paths))

    def draw(path: Any, leaf: Any, key: jax.Array) -> jax.Array:
        value = jax.random.normal(key, leaf.shape, leaf.dtype)
        if leaf.ndim == 2:
            return value * leaf.shape[-1] ** -0.5
        around = 0.0 if path[-1].name.endswith("_bias") else 1.0 - config.norm_offset
        return around + 0.1 * value

    return jax.tree.unflatten(tree, [draw(path, leaf, key) for (path, leaf), key in zip(paths, keys, strict=True)])
