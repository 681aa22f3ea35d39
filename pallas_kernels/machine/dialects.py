"""MLIR types, and PTX instructions given as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as _utils

# Any: what the modules hold differs between versions of JAX, and they have no types of their own.
utils: Any = _utils
arith, gpu, ir, llvm, scf, vector = (getattr(utils, name) for name in ("arith", "gpu", "ir", "llvm", "scf", "vector"))


def i16() -> Any:
    return ir.IntegerType.get_signless(16)


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    return ir.F32Type.get()


def f16x2() -> Any:
    return ir.VectorType.get((2,), ir.F16Type.get())


def instruction(kind: Any, operands: Sequence[Any], text: str, constraints: str, *, pinned: bool = False) -> Any:
    """One PTX instruction with one MLIR result; `pinned` ones are neither moved past each other nor dropped."""
    return llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=pinned)


def statement(text: str, operands: Sequence[Any] = (), constraints: str = "") -> None:
    """One PTX instruction without a result, for what it does; no access to memory is moved past it."""
    constraints = f"{constraints},~{{memory}}" if constraints else "~{memory}"
    instruction(ir.Type.parse("!llvm.void"), operands, text, constraints, pinned=True)


def several(count: int, kind: Any, operands: Sequence[Any], text: str, constraints: str, pinned: bool) -> list[Any]:
    if count == 1:
        return [instruction(kind, operands, text, constraints, pinned=pinned)]
    struct = llvm.StructType.get_literal([kind] * count)
    packed = instruction(struct, operands, text, constraints, pinned=pinned)
    return [llvm.extractvalue(kind, packed, [i]) for i in range(count)]
