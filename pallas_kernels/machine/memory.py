"""Device memory and shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pallas_kernels.machine.dialects import (
    arith,
    f32,
    i16,
    i32,
    i64,
    instruction,
    ir,
    llvm,
    several,
    statement,
    utils,
    vector,
)
from pallas_kernels.machine.values import Bool, Float, Word, plain_word

STREAMED = ".nc.L1::no_allocate"
"""Read once, and not written while the kernel runs."""
CONSTANT = ".nc"
"""Not written while the kernel runs."""
PLAIN = ""
"""May have been written by the launch before, where the launches overlap."""


class Address:
    """A place in device memory, 64 bits."""

    __slots__ = ("mlir",)

    def __init__(self, mlir: Any) -> None:
        self.mlir = mlir

    @staticmethod
    def of(ref: Any) -> Address:
        """Where a buffer that the kernel was given begins."""
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), utils.memref_ptr(ref))
        return Address(llvm.ptrtoint(i64(), pointer))

    def at(self, index: Word | int, size: int = 4) -> Address:
        """This place plus index * size bytes, in 64 bits; the index is unsigned."""
        if isinstance(index, int):
            offset = arith.constant(i64(), ir.IntegerAttr.get(i64(), index * size))
        else:
            factor = arith.constant(i64(), ir.IntegerAttr.get(i64(), size))
            offset = arith.muli(arith.extui(i64(), index.mlir), factor)
        return Address(arith.addi(self.mlir, offset))

    def times(self, index: Word, size: Word | int) -> Address:
        """This place plus the 64-bit product of two unsigned words."""
        wide = [arith.extui(i64(), plain_word(v)) for v in (index, size)]
        return Address(arith.addi(self.mlir, arith.muli(*wide)))


def load(
    address: Address, words: int = 1, *, when: Bool | None = None, offset: int = 0, policy: str = STREAMED
) -> list[Word]:
    """1, 2 or 4 words from device memory, aligned to their size; zeros where `when` does not hold.

    The load stays where it is written: the compiler must not move it behind the work that it is to overlap with.
    """
    names = [f"${i}" for i in range(words)]
    kind, target = ("b32", names[0]) if words == 1 else (f"v{words}.b32", "{" + ",".join(names) + "}")
    text = f"ld.global{policy}.{kind} {target}, [${words}+{offset}];"
    operands, constraints = [address.mlir], ["=r"] * words + ["l"]
    if when is not None:
        zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
        text = f"{zeros} @${words + 1} {text}"
        operands.append(when.mlir)
        constraints = ["=&r"] * words + ["l", "b"]  # the zeros are written before the address is read
    return [Word(v) for v in several(words, i32(), operands, text, ",".join(constraints), True)]


def load_half(address: Address, *, when: Bool | None = None, policy: str = STREAMED) -> Word:
    """16 bits from device memory, zero-extended; zero where `when` does not hold. Stays where it is written."""
    text, operands, constraints = f"ld.global{policy}.b16 $0, [$1];", [address.mlir], "=h,l"
    if when is not None:
        text, operands, constraints = f"mov.b16 $0, 0; @$2 {text}", [*operands, when.mlir], "=&h,l,b"
    return Word(arith.extui(i32(), instruction(i16(), operands, text, constraints, pinned=True)))


def store(address: Address, values: Sequence[Word], *, when: Bool | None = None) -> None:
    """1, 2 or 4 words to device memory, where `when` holds."""
    names = [f"${i}" for i in range(len(values))]
    kind, source = ("b32", names[0]) if len(values) == 1 else (f"v{len(values)}.b32", "{" + ",".join(names) + "}")
    text = f"st.global.{kind} [${len(values)}], {source};"
    operands, constraints = [v.mlir for v in values] + [address.mlir], ["r"] * len(values) + ["l"]
    if when is not None:
        text, operands, constraints = f"@${len(operands)} {text}", [*operands, when.mlir], [*constraints, "b"]
    statement(text, operands, ",".join(constraints))


def store_half(address: Address, value: Word, *, when: Bool | None = None) -> None:
    """The low 16 bits of a word to device memory, where `when` holds."""
    text, operands, constraints = "st.global.b16 [$1], $0;", [arith.trunci(i16(), value.mlir), address.mlir], "h,l"
    if when is not None:
        text, operands, constraints = f"@$2 {text}", [*operands, when.mlir], constraints + ",b"
    statement(text, operands, constraints)


def wait_for_launch_before() -> None:
    """Where launches may overlap: what the launch before wrote may be read after this, and the next may start."""
    statement("griddepcontrol.wait;")
    statement("griddepcontrol.launch_dependents;")


class Shared:
    """Words of a buffer in shared memory, by index; `first` is the buffer's word that index 0 stands for."""

    def __init__(self, ref: Any, first: int = 0) -> None:
        self._base = utils.getelementptr(utils.memref_ptr(ref), [first], i32())

    def _pointer(self, index: Word | int, kind: Any) -> Any:
        return utils.getelementptr(self._base, [plain_word(index)], kind)

    def load(self, index: Word | int, words: int = 1) -> list[Word]:
        """1, 2 or 4 words from an index that they are aligned at."""
        if words == 1:
            return [Word(llvm.load(i32(), self._pointer(index, i32()), alignment=4))]
        kind = ir.VectorType.get((words,), i32())
        loaded = llvm.load(kind, self._pointer(index, i32()), alignment=4 * words)
        return [Word(vector.extract(loaded, [], [i])) for i in range(words)]

    def store(self, index: Word | int, values: Sequence[Word]) -> None:
        """1, 2 or 4 words to an index that they are aligned at."""
        pointer, plain = self._pointer(index, i32()), [v.mlir for v in values]
        if len(plain) > 1:
            kind = ir.VectorType.get((len(plain),), i32())
            llvm.store(vector.from_elements(kind, plain), pointer, alignment=4 * len(plain))
        else:
            llvm.store(plain[0], pointer, alignment=4)

    def load_half(self, index: Word) -> Float:
        """A float16 by its index in halves of words, as a float32."""
        f16 = ir.F16Type.get()
        return Float(arith.extf(f32(), llvm.load(f16, self._pointer(index, f16), alignment=2)))

    def store_half(self, index: Word, value: Float) -> None:
        """A float32 rounded to float16, by its index in halves of words."""
        f16 = ir.F16Type.get()
        llvm.store(arith.truncf(f16, value.mlir), self._pointer(index, f16), alignment=2)

    def store_half_bits(self, index: Word, value: Word, when: Bool) -> None:
        """The low 16 bits of a word, by index in halves of words, where `when` holds."""
        i16_ = i16()
        pointer = llvm.ptrtoint(i32(), self._pointer(index, i16_))
        operands = [pointer, arith.trunci(i16_, value.mlir), when.mlir]
        statement("@$2 st.shared.b16 [$0], $1;", operands, "r,h,b")

    def load_from_cluster(self, rank: Word | int, index: Word) -> Word:
        """A word of the same buffer in the cluster's thread block `rank`."""
        generic = llvm.addrspacecast(llvm.PointerType.get(), self._pointer(index, i32()))
        mine = llvm.ptrtoint(i64(), generic)
        theirs = instruction(i64(), [mine, plain_word(rank)], "mapa.u64 $0, $1, $2;", "=l,l,r")
        return Word(instruction(i32(), [theirs], "ld.relaxed.cluster.b32 $0, [$1];", "=r,l", pinned=True))
