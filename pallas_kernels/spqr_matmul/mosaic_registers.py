"""From the words of a block to the operands of ``mma``, register by register.

Mosaic GPU has no bit casts between widths, no gathers and no shuffles of its own, so this
part is written in MLIR, as what each of a warpgroup's 128 threads does. The layout of
the words (`fragments`) makes it short: a thread loads 128 bits that are its own operand.
`interpreted_*` are the same functions in jax.numpy, for the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.spqr_matmul import fragments
from pallas_kernels.spqr_matmul.fields import STEPS, fields

# What older JAX has not, and what has no types of its own.
plgpu: Any = mosaic_gpu
arith, ir, llvm, nvvm, vector = (getattr(mgpu.utils, name) for name in ("arith", "ir", "llvm", "nvvm", "vector"))
Value = Any
"""One MLIR value: what a thread has in a register."""

LHS = plgpu.Layout.MMA_LHS(jnp.float16)
RHS = plgpu.Layout.MMA_RHS(jnp.float16)
ACC = plgpu.Layout.MMA_ACC(jnp.float16)
ROW = ACC.reduce(1)

_AND_OR = 0xEA  # lop3's table for (a & b) | c


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> Value:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value - (1 << 32) if value >= 1 << 31 else value))


def _pair(word: Value) -> Value:
    """A 32-bit word as two float16."""
    return llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), word)


def _and_or(word: Value, mask: int, bits: int) -> Value:
    """(word & mask) | bits in one instruction; the compiler makes two, because both constants are immediates."""
    text = f"lop3.b32 $0, $1, {mask}, {bits}, {_AND_OR};"
    return llvm.inline_asm(_i32(), [word], text, "=r,r", has_side_effects=False)


def _shifted(word: Value, shift: int) -> Value:
    return arith.shrui(word, _constant(shift)) if shift else word


def _splat(value: float) -> Value:
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    return arith.constant(pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(ir.F16Type.get(), value)))


def _load(ref: Value, index: Value, words: int) -> list[Value]:
    """`words` int32 of shared memory from `index` on, in one load of 32, 64 or 128 bits."""
    kind = ir.VectorType.get((words,), _i32())
    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], _i32())
    loaded = llvm.load(kind, pointer, alignment=4 * words)
    return [vector.extract(loaded, [], [i]) for i in range(words)]


def _thread() -> tuple[Value, Value, Value]:
    """(index in the warpgroup, warp, column of threads in the warp's 8 by 4)."""
    thread = arith.andi(mgpu.utils.thread_idx(), _constant(127))
    return thread, arith.shrui(thread, _constant(5)), arith.andi(thread, _constant(3))


def _times(value: Value, factor: int) -> Value:
    return arith.muli(value, _constant(factor))


def _array(registers: Sequence[Value], layout: Any, shape: tuple[int, ...]) -> mgpu.FragmentedArray:
    tiled = layout.to_mgpu()
    values = np.empty(len(registers), object)
    values[:] = list(registers)
    return mgpu.FragmentedArray(_registers=values.reshape(tiled.registers_shape(shape)), _layout=tiled, _is_signed=None)


def _operand_a(planes: list[list[Value]], step: int, bits: int) -> mgpu.FragmentedArray:
    """The codes of one step, exactly, as float16 [64, 16]; `planes` are already shifted copies by (plane, shift)."""
    field = fields(bits)[step]
    registers = []
    for word in range(4):
        if field is None:
            registers.append(arith.subf(_pair(_and_or(_spare(planes, word), 0x70007, 0x64006400)), _splat(1024.0)))
            continue
        mask = ((1 << bits) - 1) << field.position
        raw = _and_or(_shifted(planes[field.plane][word], field.shift), mask * 0x10001, field.exponent * 0x10001)
        registers.append(arith.subf(_pair(raw), _splat(float(field.offset))))
    # words are (v, h), the operand's registers too
    return _array(registers, LHS, (fragments.ROWS, STEPS))


def _spare(planes: list[list[Value]], word: int) -> Value:
    """The highest bits of three planes' half-words as three-bit codes from bit 0 and from bit 16 on."""
    low = arith.shrui(planes[0][word], _constant(2))
    middle = arith.shrui(planes[1][word], _constant(1))
    merged = _select(low, middle, 0x20002000)
    merged = _select(merged, planes[2][word], 0x60006000)
    return arith.shrui(merged, _constant(13))


def _select(a: Value, b: Value, mask: int) -> Value:
    """Bits of `a` where `mask` has ones, else of `b`."""
    return llvm.inline_asm(_i32(), [a, b], f"lop3.b32 $0, {mask}, $1, $2, 0xCA;", "=r,r,r", has_side_effects=False)


def _statistics(ref: Value) -> tuple[list[Value], list[Value]]:
    """Scales, and scales times zero points, as operand registers (v, h)."""
    thread, warp, column = _thread()
    codes = _load(ref, _times(thread, 2), 2)
    tile = arith.addi(_times(arith.addi(_times(warp, 4), column), 8), _constant(2 * fragments.LINE))
    stats = [_load(ref, tile, 4), _load(ref, arith.addi(tile, _constant(4)), 4)]
    scales, products = [], []
    for v in (0, 1):
        ss, sz, zs, zz = (_pair(word) for word in stats[v])
        for h in (0, 1):
            word = _shifted(codes[h], 8 * v)
            scale_code = arith.subf(_pair(_and_or(word, 0xF000F, 0x64006400)), _splat(1024.0))
            zero_code = arith.subf(_pair(_and_or(word, 0xF000F0, 0x54005400)), _splat(64.0))
            scale = arith.mulf(ss, arith.subf(scale_code, sz))
            scales.append(scale)
            products.append(arith.mulf(scale, arith.mulf(zs, arith.subf(zero_code, zz))))
    return scales, products


def _row_scale(scales: list[Value], group: int) -> mgpu.FragmentedArray:
    """A group's scales by row, float32 [64], from the threads that made them."""
    v, inside = divmod(group, 8)
    source, e = divmod(inside, 2)
    registers = []
    for h in (0, 1):
        word = llvm.bitcast(_i32(), scales[2 * v + h])
        lanes_of_four = _constant(0x1C1F)
        word = nvvm.shfl_sync(_constant(0xFFFFFFFF), word, _constant(source), lanes_of_four, nvvm.ShflKind.idx)
        half = vector.extract(_pair(word), [], [e])
        wide = arith.extf(ir.F32Type.get(), half)
        registers.append(vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), wide))
    return _array(registers, ROW, (fragments.ROWS,))


def unpack(codes: Any, statistics: Any, *, bits: int, parts: int) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """A block in shared memory to registers.

    Args:
      codes: ref int32 [4 * bits * parts, 128].
      statistics: ref int32 [3, 128].
      bits: of a code.
      parts: columns a group / 16.

    Returns:
      The codes of each step as operand A, float16 [64, 16], 16 * parts of them; the scales
      of each group by row, float32 [64], 16 of them; the products of scale and zero point
      as operand A, float16 [64, 16].
    """
    operand = plgpu.ShapeDtypeStruct((fragments.ROWS, STEPS), jnp.float16, layout=LHS)
    by_row = plgpu.ShapeDtypeStruct((fragments.ROWS,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=([operand] * (STEPS * parts), [by_row] * fragments.GROUPS, operand),
    )
    def body(ctx: Any, codes: Value, statistics: Value) -> Any:
        del ctx
        thread, _, _ = _thread()
        mine = _times(thread, 4)
        operands = []
        for part in range(parts):
            first = part * bits * 4 * fragments.LINE
            planes = [_load(codes, arith.addi(mine, _constant(first + p * 4 * fragments.LINE)), 4) for p in range(bits)]
            operands += [_operand_a(planes, step, bits) for step in range(STEPS)]
        scales, products = _statistics(statistics)
        rows = [_row_scale(scales, group) for group in range(fragments.GROUPS)]
        return operands, rows, _array(products, LHS, (fragments.ROWS, fragments.GROUPS))

    return body(codes, statistics)


def activations(ref: Any, *, pairs: int, rows: int) -> list[jax.Array]:
    """Activations in shared memory to operand B.

    Args:
      ref: int32 [lines, 128], from its start [pairs, rows, 16] words.
      pairs: of steps.
      rows: of activations, a divisor of 8. Columns of the operand past them repeat them.

    Returns:
      2 * pairs times float16 [16, 8].
    """
    operand = plgpu.ShapeDtypeStruct((STEPS, 8), jnp.float16, layout=RHS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[operand] * (2 * pairs))
    def body(ctx: Any, ref: Value) -> Any:
        del ctx
        thread, _, _ = _thread()
        mine = _times(arith.andi(thread, _constant(4 * rows - 1)), 4)
        operands = []
        for pair in range(pairs):
            words = _load(ref, arith.addi(mine, _constant(pair * 16 * rows)), 4)
            operands += [_array([_pair(w) for w in words[2 * p : 2 * p + 2]], RHS, (STEPS, 8)) for p in (0, 1)]
        return operands

    return body(ref)


def store(ref: Any, total: jax.Array, *, columns: int) -> None:
    """Writes the first columns of a product to global memory.

    Args:
      ref: float32 [64, columns].
      total: float32 [64, 8], as `mma` leaves it.
      columns: 1, 2, 4 or 8.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ACC))
    def body(ctx: Any, ref: Value, total: Any) -> None:
        del ctx
        thread, warp, column = _thread()
        row = arith.andi(arith.shrui(thread, _constant(2)), _constant(7))
        first = arith.addi(_times(warp, 16), row)
        last = _constant(max(columns // 2, 1))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, column, last)):
            for h, pair in enumerate(total.registers.flat):
                at = arith.addi(_times(arith.addi(first, _constant(8 * h)), columns), _times(column, 2))
                pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], ir.F32Type.get())
                llvm.store(
                    vector.extract(pair, [], [0]) if columns == 1 else pair, pointer, alignment=min(columns, 2) * 4
                )

    body(ref, total)


# ---- the same for the interpreter -----------------------------------------------------------------------------------


def interpreted_unpack(
    codes: Any, statistics: Any, *, bits: int, parts: int
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """`unpack` in jax.numpy."""
    lines = codes[...]
    operands = []
    for part in range(parts):
        steps = fragments.codes_of(lines[4 * bits * part : 4 * bits * (part + 1)], bits)
        operands += [code.astype(jnp.float16) for code in steps]
    scale, zero = fragments.statistics_of(statistics[...], jnp.float16)
    return operands, [scale[:, g].astype(jnp.float32) for g in range(fragments.GROUPS)], scale * zero


def interpreted_activations(ref: Any, *, pairs: int, rows: int) -> list[jax.Array]:
    """`activations` in jax.numpy."""
    words = ref[...].reshape(-1)[: pairs * rows * 16].reshape(pairs, rows, 4, 2, 2)  # n, c, p, v
    words = jnp.tile(words, (1, 8 // rows, 1, 1, 1))
    halves = jnp.stack([words & 0xFFFF, jax.lax.shift_right_logical(words, 16)], axis=-1).astype(jnp.uint16)
    values = jax.lax.bitcast_convert_type(halves, jnp.float16)  # pairs, n, c, p, v, e
    values = values.transpose(0, 3, 4, 2, 5, 1).reshape(2 * pairs, STEPS, 8)  # pairs, p, (v, c, e), n
    return list(values)


def interpreted_store(ref: Any, total: jax.Array, *, columns: int) -> None:
    """`store` in jax.numpy."""
    ref[...] = total[:, :columns]
