"""Models of Llama-7B's shape, with random weights or with shapes instead, and their programs of generation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
from accelerator import OUTLIERS, Shape

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import entries
from pallas_kernels.spqr_matmul.formats import STEP_COLUMNS, TILE, format_of
from spqr_jax.generate import _decode, _prefill, _Progress, _Rest
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.ready import BlockStack, ReadyDecoder, empty_cache, make_ready
from spqr_jax.models.weights import Block, Decoder, abstract_decoder, joint_name, random_decoder, same_input_names
from spqr_jax.products.pallas import PallasMatrix
from spqr_jax.sampling import Sampling

LLAMA_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=2048,
    tied_head=False,
)
SMALL = dataclasses.replace(
    LLAMA_7B, vocab_size=256, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=4, head_dim=64
)
GROUP_SIZE = 16
HEAD_BITS, HEAD_GROUP_SIZE = 8, 32  # of the output head, as presets quantize it
MIXED_BITS = (2, 3, 4)

_DAMPING = np.array([0.02, 1, 1, 1], np.float16)  # of the scales alone

JoinedMatrix = Callable[[Sequence[Shape], Sequence[Sequence[int]]], spqr_matmul.Prepared]
"""From the shapes of joined matrices, and the bits of each in each layer, their stack."""


def shape(size: str, layers: int, context: int) -> DecoderConfig:
    """Llama-7B with other numbers of layers and positions, or (``small``) a model for a test."""
    return dataclasses.replace({"7b": LLAMA_7B, "small": SMALL}[size], num_layers=layers, max_positions=context)


# ---- models -------------------------------------------------------------------------------------


def random_model(config: DecoderConfig, form: str, implementation: str) -> ReadyDecoder:
    """A model on the device. The layers' matrices are copies of few, which changes no time.

    Args:
      form: ``dense`` (bfloat16), ``mixed``, or bits per code (``3 bits``); then the head has 8 bits.
      implementation: of products with packed weights: ``mosaic_gpu`` or ``xla``, which read stacks.
    """
    if form == "dense":
        return make_ready(random_decoder(config, 0, jnp.bfloat16))
    outer = random_decoder(dataclasses.replace(config, num_layers=1), 0, jnp.bfloat16).outer
    layout = accelerator.LAYOUTS[implementation]

    @functools.cache
    def prepared(shapes: tuple[Shape, ...], bits: tuple[int, ...]) -> spqr_matmul.Prepared:
        joint = enumerate(zip(shapes, bits, strict=True))
        parts = [accelerator.random_part(each, b, GROUP_SIZE, seed) for seed, (each, b) in joint]
        # smaller weights than random products need: a residual stream that stays finite over many layers
        parts = [dataclasses.replace(part, tile_stats=part.tile_stats * _DAMPING) for part in parts]
        parts = [dataclasses.replace(part, values=part.values * _DAMPING[0]) for part in parts]
        return spqr_matmul.prepare(layout, parts, accelerator.random_order(shapes[0].inner))

    def joined(shapes: Sequence[Shape], bits: Sequence[Sequence[int]]) -> spqr_matmul.Prepared:
        return spqr_matmul.stack([prepared(tuple(shapes), tuple(of_layer)) for of_layer in bits])

    head = accelerator.random_part(_head_shape(config), HEAD_BITS, HEAD_GROUP_SIZE)
    outer = dataclasses.replace(outer, lm_head=PallasMatrix(spqr_matmul.prepare(layout, [head])))
    return ReadyDecoder(outer, (_stack(config, form, joined, _ones),), config)


def abstract_model(config: DecoderConfig, form: str) -> ReadyDecoder:
    """The same with a ShapeDtypeStruct in place of each array."""
    if form == "dense":
        model: Decoder = abstract_decoder(config, jnp.bfloat16)
        return ReadyDecoder(model.outer, model.layers, config)
    outer = abstract_decoder(dataclasses.replace(config, num_layers=1), jnp.bfloat16).outer
    head = abstract_stack([_head_shape(config)], [[HEAD_BITS]], HEAD_GROUP_SIZE, ordered=False)
    outer = dataclasses.replace(outer, lm_head=PallasMatrix(head))
    return ReadyDecoder(outer, (_stack(config, form, abstract_stack, jax.ShapeDtypeStruct),), config)


def _head_shape(config: DecoderConfig) -> Shape:
    return Shape(config.vocab_size, config.hidden_size)


def _ones(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype)


def _stack(config: DecoderConfig, form: str, joined: JoinedMatrix, plain: Callable[..., Any]) -> BlockStack:
    """All blocks as `make_ready` stacks them: q, k and v joined, and gate and up; norms with the layers in front."""
    layers, kind = config.num_layers, BlockKind()
    block = abstract_decoder(dataclasses.replace(config, num_layers=1), jnp.bfloat16).layers[0]
    groups = same_input_names(config, kind)
    first_of = {names[0]: names for names in groups}
    partners = {name for names in groups for name in names}
    weights: dict[str, Any] = {}
    for place, name in enumerate(block):
        if name in partners and name not in first_of:
            continue
        names = first_of.get(name, (name,))
        leaves = [block[partner] for partner in names]
        if len(leaves[0].shape) == 1:
            weights[name] = plain((layers, *leaves[0].shape), leaves[0].dtype)
            continue
        bits = [[_bits(form, layer + place + part) for part in range(len(names))] for layer in range(layers)]
        stack = joined([Shape(*leaf.shape) for leaf in leaves], bits)
        weights[joint_name(names) if len(names) > 1 else name] = PallasMatrix(stack)
    return BlockStack(Block(weights, kind), plain((layers,), jnp.bool_), layers)


def _bits(form: str, number: int) -> int:
    return MIXED_BITS[number % len(MIXED_BITS)] if form == "mixed" else int(form.split()[0])


def abstract_stack(
    shapes: Sequence[Shape], bits: Sequence[Sequence[int]], group_size: int = GROUP_SIZE, ordered: bool = True
) -> spqr_matmul.Prepared:
    """A stack in the layout for tensor cores, as shapes; as many outliers as a random matrix has on average."""
    count, inner = len(bits), shapes[0].inner
    steps, tiles = -(-inner // STEP_COLUMNS), [-(-each.out // TILE) for each in shapes]
    formats = [[format_of(b, group_size, second_level=True) for b in of_layer] for of_layer in bits]
    union = tuple(sorted({form for of_layer in formats for form in of_layer}))
    rows = TILE * sum(tiles)
    outliers = entries.capacity(int(OUTLIERS * inner * sum(each.out for each in shapes)))
    if len(union) == 1:
        words, spans = (count, sum(tiles), steps, union[0].step_words), None
    else:
        sizes = [n * form.step_words for of_layer in formats for n, form in zip(tiles, of_layer, strict=True)]
        words, spans = (steps * sum(sizes),), _int32(count, sum(tiles), 2)
    return spqr_matmul.Prepared(
        words=_int32(*words),
        spans=spans,
        entries=_int32(count, outliers),
        starts=_int32(count, 4 * rows + 1),
        order=_int32(count, inner) if ordered else None,
        pieces=(),
        parts=tuple(each.out for each in shapes),
        inner=inner,
        formats=union,
        layout="fragments",
    )


def _int32(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.int32)


# ---- programs -----------------------------------------------------------------------------------


def programs(params: ReadyDecoder, *, batch: int, prompt: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """{name: (function, arguments)} of prefill and decoding; all arguments but `params` are shapes."""
    config, spec = params.config, jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: empty_cache(params, batch, config.max_positions, jnp.bfloat16))
    scalar, key = spec((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    draw = jax.eval_shape(lambda: Sampling().draw(config.vocab_size))
    rest = _Rest(spec((batch,), jnp.int32), key, spec((1,), jnp.int32), draw)

    def progress(tokens: int) -> _Progress:
        return _Progress(spec((batch, tokens), jnp.int32), scalar, spec((batch,), jnp.bool_))

    return {
        "prefill": (_prefill.__wrapped__, (params, cache, progress(prompt), rest)),
        "decode": (_decode.__wrapped__, (params, cache, progress(1), rest, scalar)),
    }
