"""Instructions that read and write memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.memory import SHARED, gather, scatter
from support.ptx.operations import operation
from support.ptx.parsing import Program, PtxError
from support.ptx.values import UNSIGNED, address, listed, source, target, width

Match = re.Match[str]
Action = Callable[..., Any]
_KIND = r"(?P<kind>[bus](?:8|16|32|64)|f32|f64)"
_SPACE = r"(?:\.(?P<space>global|shared(?:::cta|::cluster)?))?"
_HINTS = (  # where caches keep it: no value depends on that
    r"(?:\.L1::(?:evict_normal|evict_unchanged|evict_first|evict_last|no_allocate))?"
    r"(?:\.L2::(?:evict_normal|evict_first|evict_last))?(?P<policy>\.L2::cache_hint)?(?:\.L2::(?:64|128|256)B)?"
)


def in_shared(machine: Any, lanes: Any, addresses: np.ndarray, space: str | None) -> np.ndarray | None:
    """Addresses in shared memory (as `Shared.places` takes them); None where they are in device memory."""
    if space == "global":
        if (addresses >= SHARED).any():
            raise PtxError("an address of shared memory where one of device memory is needed")
        return None
    if space is not None:
        if space == "shared::cta" and (addresses >> 24).any():
            raise PtxError("an address of another block's shared memory")
        return addresses
    where = addresses >= SHARED
    if where.all():
        return addresses - SHARED
    if where.any():
        raise PtxError("some addresses are in shared memory, others are not")
    return None


def read_memory(
    machine: Any,
    lanes: Any,
    addresses: np.ndarray,
    space: str | None,
    dtype: np.dtype,
    count: int,
    what: tuple[str, str],
) -> np.ndarray:
    """[count, threads]; `what` is the instruction's text and opcode."""
    size = dtype.itemsize * count
    offsets = in_shared(machine, lanes, addresses, space)
    if offsets is not None:
        places = machine.access_shared(lanes, offsets, size, what[0], write=False)
        return gather(machine.shared.raw, places, dtype, count)
    places, buffers = machine.device.places(addresses, size, what[0])
    if ".nc" in what[1] and any(machine.device.written[buffer] for buffer in buffers):
        raise PtxError(f"a buffer that this kernel writes is read as if nothing did: {what[0]}")
    machine.ready(lanes, buffers, what[0])
    if machine.counter is not None:
        machine.counter.device(what[1], machine.numbers(lanes), places, size)
    return gather(machine.device.raw, places, dtype, count)


def write_memory(
    machine: Any,
    lanes: Any,
    addresses: np.ndarray,
    space: str | None,
    values: list[np.ndarray],
    what: tuple[str, str],
) -> None:
    """As :func:`read_memory`; `values` has one array for each element of an access."""
    size = values[0].itemsize * len(values)
    offsets = in_shared(machine, lanes, addresses, space)
    if offsets is not None:
        places = machine.access_shared(lanes, offsets, size, what[0], write=True)
        return scatter(machine.shared.raw, places, values)
    places, buffers = machine.device.places(addresses, size, what[0])
    machine.ready(lanes, buffers, what[0])
    for buffer in buffers:
        machine.device.written[buffer] = True
    if machine.counter is not None:
        machine.counter.device(what[1], machine.numbers(lanes), places, size)
    return scatter(machine.device.raw, places, values)


@operation(r"ld\.param(?:::entry)?\.(?P<kind>[bus](?:32|64)|f32)", 2)
def _parameter(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    name = operands[1].strip("[] ")
    if name not in program.parameters:
        raise PtxError(f"no parameter {name}")
    write, index, bits = target(program, operands[0], match["kind"]), program.parameters.index(name), UNSIGNED

    def act(machine: Any, lanes: Any) -> None:
        if index >= len(machine.parameters):
            raise PtxError(f"nothing was given for the parameter {name}")
        from support.ptx.values import from_bits

        raw = np.array([machine.parameters[index] % (1 << width(match["kind"]))], bits[width(match["kind"])])
        write(machine, lanes, from_bits(raw, match["kind"]))

    return act


def _vector(match: Match, names: list[str]) -> None:
    count = int(match["vector"][2:]) if match["vector"] else 1
    if len(names) != count:
        raise PtxError(f"{count} registers are needed")
    if width(match["kind"]) * count > 128:
        raise PtxError("more than 128 bits")


@operation(
    rf"ld(?:\.(?:volatile|relaxed\.(?:cta|cluster|gpu|sys)|weak))?{_SPACE}(?P<cache>\.ca|\.cg|\.cs|\.lu|\.cv)?"
    rf"(?P<nc>\.nc)?{_HINTS}(?P<vector>\.v2|\.v4)?\.{_KIND}",
    *(2, 3),
)
def _load(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind, space, names = match["kind"], match["space"], listed(operands[0])
    _vector(match, names)
    if (len(operands) == 3) != bool(match["policy"]) or (match["nc"] and space != "global"):
        raise PtxError("form")
    at = address(program, operands[1])
    writes = [target(program, name, kind, extend=True) for name in names]
    signed = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width(kind) // 8}")
    text = (f"{match[0]} {', '.join(operands)}", match[0])

    def act(machine: Any, lanes: Any) -> None:
        raw = read_memory(machine, lanes, at(machine, lanes), space, UNSIGNED[width(kind)], len(writes), text)
        for write, value in zip(writes, raw, strict=True):
            write(machine, lanes, value.view(np.float32 if kind == "f32" else np.float64 if kind == "f64" else signed))

    return act


@operation(
    rf"st(?:\.(?:volatile|relaxed\.(?:cta|cluster|gpu|sys)|weak))?{_SPACE}(?:\.wb|\.cg|\.cs|\.wt)?"
    rf"{_HINTS}(?P<vector>\.v2|\.v4)?\.{_KIND}",
    *(2, 3),
)
def _store(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    kind, space, names = f"b{width(match['kind'])}", match["space"], listed(operands[1])
    _vector(match, names)
    if (len(operands) == 3) != bool(match["policy"]):
        raise PtxError("form")
    at = address(program, operands[0])
    reads = [source(program, name, kind, narrow=True) for name in names]
    text = (f"{match[0]} {', '.join(operands)}", match[0])

    def act(machine: Any, lanes: Any) -> None:
        addresses = at(machine, lanes)
        values = [np.broadcast_to(read(machine, lanes), addresses.shape) for read in reads]
        write_memory(machine, lanes, addresses, space, values, text)

    return act


# ---- copies that arrive later ----


@operation(r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global(\.L2::cache_hint)?(?:\.L2::(?:64|128|256)B)?", 3, 4)
def _copy(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """Reads now; the values are there when the thread has waited for its group."""
    if len(operands) == 4 and not match[2]:
        raise PtxError("a source size")
    to, of, size = address(program, operands[0]), address(program, operands[1]), int(operands[2])
    if size not in ((4, 8, 16) if match[1] == "ca" else (16,)):
        raise PtxError(f"a copy of {size} bytes")
    text = (f"{match[0]} {', '.join(operands)}", match[0])

    def act(machine: Any, lanes: Any) -> None:
        values = read_memory(machine, lanes, of(machine, lanes), "global", np.dtype(np.uint32), size // 4, text)
        machine.copies.start(machine.numbers(lanes), to(machine, lanes), values, text)

    return act


class Copies:
    """What ``cp.async`` of every thread has under way."""

    def __init__(self, threads: int):
        self._group = np.zeros(threads, np.int64)  # that a thread's next copy belongs to
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, str]]] = []

    def start(self, threads: np.ndarray, to: np.ndarray, values: np.ndarray, text: tuple[str, str]) -> None:
        """A copy, into the open group of each thread."""
        self._waiting.append((threads, self._group[threads].copy(), to, values, text))

    def commit(self, threads: np.ndarray) -> None:
        """Closes the open groups."""
        self._group[threads] += 1

    def wait(self, machine: Any, threads: np.ndarray, pending: int | None) -> None:
        """All but the last `pending` groups arrive; with None also those that are open."""
        finished = np.full(len(self._group), -1)
        finished[threads] = self._group[threads] if pending is None else self._group[threads] - pending - 1
        left = []
        for of, group, to, values, text in self._waiting:
            done = group <= finished[of]
            if done.any():
                write_memory(machine, of[done], to[done], "shared", list(values[:, done]), text)
            if not done.all():
                keep = ~done
                left.append((of[keep], group[keep], to[keep], values[:, keep], text))
        self._waiting = left


@operation(r"cp\.async\.commit_group", 0)
def _commit(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return lambda machine, lanes: machine.copies.commit(machine.numbers(lanes))


@operation(r"cp\.async\.wait_group", 1)
def _wait_group(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    pending = int(operands[0])
    return lambda machine, lanes: machine.copies.wait(machine, machine.numbers(lanes), pending)


@operation(r"cp\.async\.wait_all", 0)
def _wait_all(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return lambda machine, lanes: machine.copies.wait(machine, machine.numbers(lanes), None)


# ---- matrices of 8 x 8 halves ----


@operation(r"ldmatrix\.sync\.aligned\.m8n8\.x(1|2|4)(\.trans)?\.shared(?:::cta)?\.b16", 2, together=True)
def _load_matrix(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    """Lane 8i + r has the address of row r of matrix i; lane 4r + c gets elements 2c and 2c + 1 of row r."""
    count, names = int(match[1]), listed(operands[0])
    if len(names) != count:
        raise PtxError(f"{count} registers are needed")
    at, text = address(program, operands[1]), (f"{match[0]} {', '.join(operands)}", match[0])
    writes = [target(program, name, "b32") for name in names]

    def act(machine: Any, lanes: Any) -> None:
        threads = machine.numbers(lanes)
        senders = threads.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        rows = at(machine, lanes).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        raw = read_memory(machine, senders, rows, "shared", np.dtype(np.uint16), 8, text)
        matrices = raw.T.reshape(-1, count, 8, 8)
        if match[2]:
            matrices = matrices.swapaxes(2, 3)
        for i, write in enumerate(writes):
            pairs = np.ascontiguousarray(matrices[:, i]).view(np.uint32)
            write(machine, lanes, pairs.reshape(-1))

    return act


# ---- what changes no value here ----


@operation(r"prefetch(?:u)?\.(?:global\.)?L[12](?:::evict_(?:last|normal))?", 1)
@operation(r"fence\.(?:sc|acq_rel)\.(?:cta|cluster|gpu|sys)", 0)
@operation(r"fence\.proxy\.(?:alias|async(?:\.(?:global|shared::cta|shared::cluster))?)", 0)
@operation(r"fence\.mbarrier_init\.release\.cluster", 0)
@operation(r"membar\.(?:cta|gl|sys)", 0)
@operation(r"griddepcontrol\.launch_dependents", 0)
@operation(r"nanosleep\.u32", 1)
@operation(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32", 1, together=True)
def _nothing(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    return lambda machine, lanes: None


@operation(r"griddepcontrol\.wait", 0)
def _grid_wait(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    def act(machine: Any, lanes: Any) -> None:
        machine.waited[lanes] = True

    return act


@operation(r"createpolicy\.fractional\.L2::evict_(?:last|first|normal|unchanged)(?:\.L2::evict_\w+)?\.b64", 1, 2)
def _policy(program: Program, match: Match, operands: tuple[str, ...]) -> Action:
    write = target(program, operands[0], "b64")
    return lambda machine, lanes: write(machine, lanes, np.zeros(1, np.uint64))
