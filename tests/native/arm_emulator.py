"""Runs a static 64-bit ARM program for Linux, one thread of it, in the unicorn emulator.

Enough of Linux for a C++ program that computes and prints; system calls beyond that fail with ENOSYS.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import unicorn
from unicorn import arm64_const as arm

_PAGE = 0x1000
_MAPS, _HEAP, _STACK, _MEGABYTE = 0x5000_0000_0000, 0x6000_0000_0000, 0x7F00_0000_0000, 1 << 20
_FP, _ASIMD, _DOTPROD = 1 << 0, 1 << 1, 1 << 20  # of the hardware's abilities, as Linux tells them
_ENOSYS, _NOT_A_TERMINAL = 38, 25


@dataclasses.dataclass
class Finished:
    """What a program printed, and its exit status (None if it was cut off)."""

    output: str = ""
    status: int | None = None


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _load(machine: unicorn.Uc, program: bytes) -> tuple[int, int, int]:
    """Maps the program's segments; returns its entry, and where and how many its headers are."""
    entry, headers = struct.unpack_from("<QQ", program, 24)
    count = struct.unpack_from("<H", program, 56)[0]
    mapped, header_address = set(), 0
    for i in range(count):
        kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", program, headers + 56 * i)
        if kind != 1:  # PT_LOAD
            continue
        for page in range(address // _PAGE * _PAGE, address + in_memory, _PAGE):
            if page not in mapped:
                machine.mem_map(page, _PAGE)
                mapped.add(page)
        machine.mem_write(address, program[offset : offset + in_file])
        if offset <= headers < offset + in_file:
            header_address = address + headers - offset
    return entry, header_address, count


def _fill_stack(machine: unicorn.Uc, arguments: list[str], entry: int, headers: int, count: int) -> None:
    """Arguments and what else Linux leaves on the stack of a new program."""
    machine.mem_map(_STACK, 8 * _MEGABYTE)
    at, words = _STACK + 8 * _MEGABYTE - _PAGE, [len(arguments)]
    for argument in arguments:
        machine.mem_write(at, argument.encode() + b"\0")
        words.append(at)
        at += len(argument) + 1
    words += [0, 0]  # the arguments' end, no environment
    random = at  # 16 bytes, zeros
    known = {3: headers, 4: 56, 5: count, 6: _PAGE, 9: entry, 16: _FP | _ASIMD | _DOTPROD, 25: random, 0: 0}
    words += [word for pair in known.items() for word in pair]
    top = (_STACK + 7 * _MEGABYTE - 8 * len(words)) // 16 * 16
    machine.mem_write(top, struct.pack(f"<{len(words)}Q", *words))
    machine.reg_write(arm.UC_ARM64_REG_SP, top)


class _Linux:
    """Answers system calls. Every look at the clock moves it on by 10 ms."""

    def __init__(self, finished: Finished) -> None:
        self._finished, self._maps, self._heap, self._looks = finished, _MAPS, _HEAP, 0

    def __call__(self, machine: unicorn.Uc, _interrupt: int, _: object) -> None:
        number = machine.reg_read(arm.UC_ARM64_REG_X8)
        given = [machine.reg_read(arm.UC_ARM64_REG_X0 + i) for i in range(3)]
        machine.reg_write(arm.UC_ARM64_REG_X0, self._answer(machine, number, *given) % (1 << 64))

    def _answer(self, machine: unicorn.Uc, number: int, first: int, second: int, third: int) -> int:
        match number:
            case 64:  # write
                self._finished.output += machine.mem_read(second, third).decode(errors="replace")
                return third
            case 66:  # writev
                pieces = struct.iter_unpack("<QQ", bytes(machine.mem_read(second, 16 * third)))
                return sum(self._answer(machine, 64, first, *piece) for piece in pieces)
            case 93 | 94:  # exit
                self._finished.status = first
                machine.emu_stop()
                return 0
            case 113:  # clock_gettime
                self._looks += 1
                machine.mem_write(second, struct.pack("<qq", self._looks // 100, self._looks % 100 * 10_000_000))
                return 0
            case 214:  # brk
                self._heap = first or self._heap
                return self._heap
            case 215:  # munmap
                machine.mem_unmap(first, _whole_pages(second))
                return 0
            case 222:  # mmap
                found, self._maps = self._maps, self._maps + _whole_pages(second) + _PAGE
                machine.mem_map(found, _whole_pages(second))
                return found
            case 29:  # ioctl
                return -_NOT_A_TERMINAL
            case 96 | 98 | 101 | 115 | 135 | 226:  # thread address, futex, sleeps, signal mask, mprotect
                return 0
        return -_ENOSYS


def run(path: Path, *arguments: str) -> Finished:
    """Runs the program to its end.

    Raises:
      unicorn.UcError: it did what no sound program does, such as reading memory that is not there.
    """
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    entry, headers, count = _load(machine, path.read_bytes())
    machine.mem_map(_HEAP, 64 * _MEGABYTE)
    _fill_stack(machine, [path.name, *arguments], entry, headers, count)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point may be used
    finished = Finished()
    machine.hook_add(unicorn.UC_HOOK_INTR, _Linux(finished))
    machine.emu_start(entry, 0)
    return finished
