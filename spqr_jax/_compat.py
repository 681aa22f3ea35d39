"""What differs between the versions and systems we support, in one place.

Python 3.11 with JAX 0.10 and Python >= 3.12 with the newest JAX both work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import mmap
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax


def orbax_v1() -> ModuleType:
    """Orbax's version-1 API, which moves out of ``experimental`` in newer releases."""
    try:
        return importlib.import_module("orbax.checkpoint.v1")
    except ModuleNotFoundError:
        return importlib.import_module("orbax.checkpoint.experimental.v1")


@contextlib.contextmanager
def orbax_of_one_process(context: Any) -> Iterator[Any]:
    """An Orbax context in which this process reads and writes for itself, without waiting for others.

    Orbax compares the path that all processes save to, whichever processes the context names as active. It would wait
    for those that do not save. For the time of the context it counts one process.
    """
    if jax.process_count() == 1:
        with context:
            yield context
        return
    here = jax.process_index()
    context.multiprocessing.primary_host = here
    context.multiprocessing.active_processes = {here}
    context.multiprocessing.barrier_sync_key_prefix = f"process{here}"
    counting: list[Any] = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("orbax.checkpoint") and name.endswith("synchronization.multihost")
    ]
    counts = [module.process_count for module in counting]
    try:
        for module in counting:
            module.process_count = lambda: 1
        with context:
            yield context
    finally:
        for module, count in zip(counting, counts, strict=True):
            module.process_count = count


_COMMAND_BUFFERS = "xla_gpu_enable_command_buffer"
_GRAPH_KINDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"


def compile_as_graph(lowered: Any) -> Any:
    """Compiles a lowered program; on a GPU its loops become parts of one CUDA graph.

    XLA's default is a graph for each turn of a loop, which the host launches turn by turn. XLA_FLAGS win: a user who
    sets ``--xla_gpu_enable_command_buffer`` there gets that. A version of XLA that does not know one of the kinds of
    operations compiles with its defaults.
    """
    if jax.default_backend() != "gpu" or _COMMAND_BUFFERS in os.environ.get("XLA_FLAGS", ""):
        return lowered.compile()
    try:
        return lowered.compile(compiler_options={_COMMAND_BUFFERS: _GRAPH_KINDS})
    except jax.errors.JaxRuntimeError as error:
        if _COMMAND_BUFFERS not in str(error):
            raise
        return lowered.compile()


_SMALL_FACTOR = 4096  # inputs of a Hessian from which on several threads factor it noticeably faster


def few_lapack_threads(widest: int) -> None:
    """Lets LAPACK work with one thread where all matrices are small. Call it before the first factorization.

    The threads of OpenBLAS, which SciPy brings and JAX calls, wait for work in a busy loop. Between small
    factorizations this takes more CPU seconds than all of them. A value of OPENBLAS_NUM_THREADS that is set already
    stays, and once SciPy's library is loaded this has no effect.

    Args:
      widest: inputs of the widest matrix.
    """
    if widest < _SMALL_FACTOR:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@functools.lru_cache
def multiplies_bfloat16() -> bool:
    """Whether JAX's default device has instructions for products of bfloat16 matrices. A CPU's flags tell."""
    if jax.default_backend() != "cpu":
        return True
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    return False


def give_back_memory(beyond: int = 0) -> None:
    """Returns what was freed to the system, where the C library keeps it otherwise (glibc's `malloc_trim`).

    Args:
      beyond: bytes that may be kept: less is left alone, because what is returned costs new pages when it is needed
        again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function; TypeError: Windows
        library = ctypes.CDLL(None)
        if not beyond or _kept_bytes(library) > beyond:
            library.malloc_trim(0)


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES.split())


def _kept_bytes(library: ctypes.CDLL) -> float:
    """Resident bytes that nobody has asked the C library for; infinite where that is not known.

    With them counts what is resident without it, such as compiled code.
    """
    try:
        library.mallinfo2.restype = _Mallinfo
        used = library.mallinfo2()
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (AttributeError, OSError):
        return math.inf
    return (resident - shared) * mmap.PAGESIZE - used.uordblks - used.hblkhd


_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's `mallopt`


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, until `give_back_memory`, where it is glibc.

    Else it maps and unmaps memory for each call of a program: a fifth of the CPU seconds of quantizing is then spent
    in the system on new pages. For the process of a command; call it before JAX starts its threads.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_TRIM_THRESHOLD, 2**30), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            mallopt(parameter, value)


def start_distributed(timeout: int, **settings: Any) -> None:
    """`jax.distributed.initialize`, with collective operations between processes on CPUs, too; seconds to wait.

    JAX is to leave to us what happens when another process has died, and when SIGTERM comes.
    """
    for option, value in (("jax_enable_recoverability", True), ("jax_enable_preemption_service", False)):
        with contextlib.suppress(AttributeError):
            jax.config.update(option, value)
    if jax.config._read("jax_cpu_collectives_implementation") in (None, "", "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(initialization_timeout=timeout, **settings)


class Notes:
    """Short texts that all processes can read. The coordinator, in process 0, keeps them."""

    _FOLDER = "spqr/"

    @staticmethod
    def _coordinator() -> Any:
        from jax._src import distributed  # not public in any version

        return distributed.global_state.client

    @classmethod
    def write(cls, name: str, text: bytes) -> None:
        """Keeps a text under a name such as ``folder/name``, in place of an earlier one."""
        cls._coordinator().key_value_set_bytes(cls._FOLDER + name, text, allow_overwrite=True)

    @classmethod
    def wait(cls, name: str, seconds: float) -> bytes | None:
        """A text, once it is there; None if it did not come in time."""
        try:
            text: bytes = cls._coordinator().blocking_key_value_get_bytes(cls._FOLDER + name, round(1000 * seconds))
            return text
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None

    @classmethod
    def meet(cls, name: str, seconds: float) -> None:
        """Returns once all processes are here; raises if they did not come in time."""
        cls._coordinator().wait_at_barrier(cls._FOLDER + name, round(1000 * seconds))

    @classmethod
    def outlast(cls) -> None:
        """In the process that keeps the notes: returns once all other processes have left.

        If it goes while another one is about to leave, XLA aborts that one.
        """
        cls._coordinator().get_live_nodes(list(range(jax.process_count())))  # waits for those that are still connected

    @classmethod
    def folder(cls, name: str) -> dict[str, bytes]:
        """All texts of a folder, by name."""
        texts = cls._coordinator().key_value_dir_get_bytes(f"{cls._FOLDER}{name}/")
        return {key.rpartition("/")[2]: text for key, text in texts}
