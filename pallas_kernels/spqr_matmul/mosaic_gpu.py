"""Tensor cores: decode and multiply for up to 16 rows of activations, through Pallas's Mosaic GPU backend."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.spqr_matmul import fragments
from pallas_kernels.spqr_matmul import mosaic_registers as registers
from pallas_kernels.spqr_matmul.fields import STEPS
from pallas_kernels.spqr_matmul.mosaic_registers import plgpu
from pallas_kernels.spqr_matmul.tuning import MosaicConfig

MAX_BATCH = 16
COLUMNS = 8  # of one mma: rows of activations


def multiply(
    codes: jax.Array,
    statistics: jax.Array,
    x: jax.Array,
    *,
    bits: int,
    group_size: int,
    config: MosaicConfig,
    tma: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """The dense part times activations that are already in the order of the packed columns.

    Args:
      codes, statistics: as `fragments.pack` makes them.
      x: float16 [batch, 16 * group_size * column blocks], at most 16 rows, magnitudes up to 1.
      tma: whether the GPU has a tensor memory accelerator (compute capability 9 and up);
        others copy with ``cp.async``.
      interpret: the kernel as `plgpu.force_gpu_interpret_mode` can run it.

    Returns:
      float32 [splits, tiles of 8 rows of x, 64 * row blocks, columns], to be added up over
      the splits; columns are the batch, or 8, rounded up to a power of two, and what stands
      past the batch is of no use.
    """
    rows, cols = codes.shape[:2]
    per_split = -(-cols // config.splits)
    shape = _Shape(x.shape[0], cols, per_split, group_size // STEPS)
    words = fragment_x(x, group_size, config.splits * per_split)
    return plgpu.kernel(
        functools.partial(_kernel, bits=bits, shape=shape, config=config, tma=tma, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(
            (config.splits, shape.tiles, rows * fragments.ROWS, _columns(shape.batch)), jnp.float32
        ),
        grid=(rows // config.row_blocks, config.splits),
        grid_names=("rows", "split"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(codes, statistics, words)


@dataclasses.dataclass(frozen=True)
class _Shape:
    batch: int
    cols: int
    per_split: int
    parts: int  # steps a group

    @property
    def tiles(self) -> int:
        """Products of one operand A: columns of a tile are rows of activations."""
        return -(-self.batch // COLUMNS)

    @property
    def pairs(self) -> int:
        """Pairs of steps whose activations a block needs; the last holds the sums of the groups."""
        return STEPS * self.parts // 2 + 1


def _columns(batch: int) -> int:
    """Rows of activations that are stored for a tile: the batch, or 8, rounded up to a power of two."""
    return min(1 << (batch - 1).bit_length(), COLUMNS)


def fragment_x(x: jax.Array, group_size: int, blocks: int) -> jax.Array:
    """Activations as operands B, with the sums of each group.

    Args:
      x: float16 [batch, columns].
      blocks: of columns to make; those past the end are zeros.

    Returns:
      int32 [blocks, tiles, lines, 128]; a tile's words are [pairs of steps, rows, 16], and
      padding up to whole lines, four at a time.
    """
    batch, inner = x.shape
    columns, tiles = _columns(batch), -(-batch // COLUMNS)
    x = jnp.pad(x, ((0, tiles * columns - batch), (0, blocks * fragments.GROUPS * group_size - inner)))
    x = x.reshape(tiles, columns, blocks, fragments.GROUPS, group_size)
    sums = x.astype(jnp.float32).sum(-1)
    high = sums.astype(jnp.float16)
    low = (sums - high.astype(jnp.float32)).astype(jnp.float16)
    sums = jnp.stack([high, low], axis=-2).reshape(tiles, columns, blocks, 2 * STEPS)
    x = jnp.concatenate([x.reshape(tiles, columns, blocks, -1), sums], axis=-1)
    # columns of two steps are (p, v, c, e), places (c, p, v, e)
    x = x.reshape(tiles, columns, blocks, -1, 2, 2, 4, 2).transpose(2, 0, 3, 1, 6, 4, 5, 7)
    words = lax.bitcast_convert_type(x, jnp.int32).reshape(blocks, tiles, -1)
    lines = fragments.activation_lines(group_size, batch)
    words = jnp.pad(words, ((0, 0), (0, 0), (0, lines * fragments.LINE - words.shape[-1])))
    return words.reshape(blocks, tiles, lines, fragments.LINE)


def _kernel(
    codes: Any,
    statistics: Any,
    words: Any,
    out: Any,
    *,
    bits: int,
    shape: _Shape,
    config: MosaicConfig,
    tma: bool,
    interpret: bool,
) -> None:
    row, split = lax.axis_index("rows"), lax.axis_index("split")
    zero = plgpu.layout_cast(jnp.zeros((fragments.ROWS, COLUMNS), jnp.float32), registers.ACC)
    step = functools.partial(_step, zero=zero, bits=bits, shape=shape, tma=tma, interpret=interpret)

    def block_at(block: int, i: jax.Array) -> tuple[Any, ...]:
        # The last split may reach past the end: there it reads a block again, and zeros for activations.
        return row * config.row_blocks + block, jnp.minimum(split * shape.per_split + i, shape.cols - 1), 0, 0

    def spec(block_shape: tuple[int | None, ...], index: Any) -> Any:
        return plgpu.BlockSpec(block_shape, index, oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    store = registers.interpreted_store if interpret else registers.store
    blocks = range(config.row_blocks)
    totals = plgpu.emit_pipeline(
        step,
        grid=(shape.per_split,),
        in_specs=[
            spec((None, *words.shape[1:]), lambda i: (split * shape.per_split + i, 0, 0, 0)),
            *(spec((None, None, *codes.shape[2:]), functools.partial(block_at, block)) for block in blocks),
            *(spec((None, None, *statistics.shape[2:]), functools.partial(block_at, block)) for block in blocks),
        ],
        max_concurrent_steps=config.stages,
        init_carry=((zero,) * shape.tiles,) * config.row_blocks,
    )(words, *[codes] * config.row_blocks, *[statistics] * config.row_blocks)
    for block, tiles in enumerate(totals):
        rows = pl.ds((row * config.row_blocks + block) * fragments.ROWS, fragments.ROWS)
        for tile, total in enumerate(tiles):
            store(out.at[split, tile, rows], total, columns=_columns(shape.batch))


def _step(
    _: Any, words: Any, *blocks_and_sums: Any, zero: jax.Array, bits: int, shape: _Shape, tma: bool, interpret: bool
) -> Any:
    *blocks, sums = blocks_and_sums
    codes, statistics = blocks[: len(sums)], blocks[len(sums) :]
    unpack = registers.interpreted_unpack if interpret else registers.unpack
    activations = registers.interpreted_activations if interpret else registers.activations
    mma = _interpreted_mma if interpret else plgpu.mma
    columns = _columns(shape.batch)
    b = [activations(words.at[tile], pairs=shape.pairs, rows=columns) for tile in range(shape.tiles)]
    new = []
    for block, totals in enumerate(sums):
        a, scales, products = unpack(codes[block], statistics[block], bits=bits, parts=shape.parts)
        totals = list(totals)
        for group in range(fragments.GROUPS):
            scale = lax.broadcast_in_dim(scales[group], (fragments.ROWS, COLUMNS), (0,))
            for tile in range(shape.tiles):
                acc = zero
                for i in range(group * shape.parts, (group + 1) * shape.parts):
                    acc = mma(acc, a[i], b[tile][i])
                totals[tile] = totals[tile] + scale * acc
        # scale * (code - zero) summed over a group's columns: the second term needs the sum of x only
        new.append(tuple(t - mma(mma(zero, products, y[-2]), products, y[-1]) for t, y in zip(totals, b, strict=True)))
    if tma:
        plgpu.commit_smem()  # what was read here is overwritten by the next copy, which is another proxy's
    return tuple(new)


def _interpreted_mma(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
