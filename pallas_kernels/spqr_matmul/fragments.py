"""The "fragments" layout of the tensor-core kernel: what one warp reads at a time lies together.

A *tile* is 16 rows. A *step* is 16 rows x 256 columns of a tile: one warp reads it at a
time, into registers. Columns are padded to whole steps, rows to whole tiles. Padding has
statistics of zero, so its weights are zero. `formats.Format` gives the number of words.

Row i of a tile is row 8 h + r: h in 0..1, r in 0..7. Column j of a step is in block
b = j // 16; inside of it, j % 16 = 8 v + 2 c + e: v and e in 0..1, c in 0..3. A lane of a warp
is 4 r + c. These are the places of operand A of ``mma.m16n8k16``. Words are int32,
and e picks the 16-bit half of a word: e = 1 is the upper one.

The words of a step, in this order:

  codes         `width` planes of [32 lanes (r, c), 4 words (v, h)]: lane 4 r + c, word h + 2 v.
                Block b's code is in each half e, at `Format.field(b)`.
  statistics    g is the group of a step: 16 groups of 16 columns, or 8 of 32.
    nibbles, 16 groups (96 words); g = 8 v + 2 c + e:
                [32 lanes (r, c), 2 words (h)]: a byte at bit 8 v + 16 e, scale code + 16 * zero code
                [4 (c), 2 (v), 4 (ss, sz, zs, zz)]: float16 in half e; the same for all rows
    nibbles, 8 groups (48 words); g = 2 c + e:
                [32 lanes (r, c)]: a byte at bit 8 h + 16 e
                [4 (c), 4 (ss, sz, zs, zz)]: float16 in half e
    halves, 16 groups (256 words); g = 8 v + 2 c + e:
                scale, then zero point: each [32 lanes (r, c), 4 words (v, h)], word h + 2 v,
                float16 in half e: operand A of ``mma.m16n8k16``
    halves, 8 groups (128 words); g = 2 c + e:
                [32 lanes (r, c), 4 words]: scale of h = 0, of h = 1, zero point of h = 0, of h = 1,
                float16 in half e: operands A of ``mma.m16n8k8``

With nibbles, scale = ss (scale code - sz) and zero = zs (zero code - zz). A weight is
scale * (code - zero), plus its outlier.

A *stack* is `count` matrices of one shape. If all its tiles have one format, `words` is
[count, tiles, steps, step_words]. If not, `words` is flat, and `spans` int32 [count, tiles, 2]
gives for each tile the offset of its first word, in units of 16 words, and the index of its
format; a tile's steps follow each other. `entries` holds the outliers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.spqr_matmul.fields import run_codes
from pallas_kernels.spqr_matmul.formats import BLOCK, BLOCKS, STEP_COLUMNS, TILE, Format


def num_steps(columns: int) -> int:
    """Steps that hold so many columns."""
    return -(-columns // STEP_COLUMNS)


def num_tiles(rows: int) -> int:
    """Tiles that hold so many rows."""
    return -(-rows // TILE)
