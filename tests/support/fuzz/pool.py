"""Processes that read inputs, and a watch over them: one that dies or hangs is replaced, its input recorded."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.fuzz import seeds
from support.fuzz.judge import Bench, Fault
from support.fuzz.readers import BY_NAME, Reader

HANG_SECONDS = 20.0
"""On the wall, after which a process that reads one input is ended: it hangs where no signal reaches it."""
_START_SECONDS = 300.0  # to import what a reader needs and to read its sound files
_MOST_LOST = 20  # processes that one reader may cost before it is given up
_SAID_EVERY = 60.0  # seconds: how far the run is
_ROUNDS = 400  # parts of a run, each with a share of every reader's inputs
_STARTING = -1

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
    "RUST_BACKTRACE": "0", "TQDM_DISABLE": "1",
}  # fmt: skip


@dataclasses.dataclass
class Task:
    """Inputs `first` to `end` - 1 of a reader."""

    reader: str
    first: int
    end: int


@dataclasses.dataclass
class Outcome:
    """What a run has seen.

    Attributes:
      inputs, seconds: of each reader.
      faults: all of them.
      given_up: readers that cost too many processes.
    """

    inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    faults: list[Fault] = dataclasses.field(default_factory=list)
    given_up: set[str] = dataclasses.field(default_factory=set)

    def add(self, reader: str, inputs: int, seconds: float) -> None:
        self.inputs[reader] = self.inputs.get(reader, 0) + inputs
        self.seconds[reader] = self.seconds.get(reader, 0.0) + seconds


def tasks_of(readers: Iterable[Reader], count: int) -> Iterator[Task]:
    """Parts of a run of about `count` inputs, such that readers take turns."""
    readers = list(readers)
    shares = sum(reader.share for reader in readers)
    totals = {
        reader.name: -(-count * reader.share // shares) if shares else count // len(readers) for reader in readers
    }
    rounds = min(_ROUNDS, max(1, count // 100))
    for part in range(rounds):
        for name, total in totals.items():
            first, end = total * part // rounds, total * (part + 1) // rounds
            if first < end:
                yield Task(name, first, end)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """In memory, where the system has such a place."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="spqr-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_seeds(readers: Iterable[Reader], folder: Path) -> Path:
    """Makes the sound files of these readers."""
    for name in dict.fromkeys(reader.seeds for reader in readers):
        seeds.MAKERS[name](folder / name)
    return folder


# ---- in a process of its own --------------------------------------------------------------------------


def _serve(channel: Any, journal: Any, folder: Path, scratch: Path, seed: int) -> None:
    """Judges what tasks ask for; writes to the journal what it is at."""
    log = os.open(scratch.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    warnings.simplefilter("ignore")
    benches: dict[str, Bench] = {}
    while (message := channel.recv()) is not None:
        try:
            channel.send(_work(message, channel, journal, benches, (folder, scratch, seed)))
        except Exception:  # of the fuzzer itself
            channel.send(("broken", traceback.format_exc()))
            return


def _work(
    task: Task, channel: Any, journal: Any, benches: dict[str, Bench], place: tuple[Path, Path, int]
) -> tuple[str, int, float]:
    """Carries out a task; faults are told at once."""
    if task.reader not in benches:
        journal[0], journal[1] = _STARTING, time.monotonic_ns()
        benches[task.reader] = Bench(BY_NAME[task.reader], *place)
        for fault in benches[task.reader].warm_up():
            channel.send(("fault", fault))
    begun = time.perf_counter()
    for number in range(task.first, task.end):
        journal[0], journal[1] = number, time.monotonic_ns()
        if (fault := benches[task.reader].judge(number)) is not None:
            channel.send(("fault", fault))
    return "done", task.end - task.first, time.perf_counter() - begun


class _Process:
    """One of the processes, as the watch sees it."""

    def __init__(self, context: Any, folder: Path, scratch: Path, seed: int) -> None:
        self.journal = context.RawArray("q", 2)
        self.journal[0], self.journal[1] = _STARTING, time.monotonic_ns()
        self.channel, theirs = context.Pipe()
        self.log = scratch.with_suffix(".log")
        arguments = (theirs, self.journal, folder, scratch, seed)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        self.journal[1] = time.monotonic_ns()
        if self.journal[0] != _STARTING:
            self.journal[0] = task.first
        self.channel.send(task)

    def hangs(self) -> bool:
        limit = _START_SECONDS if self.journal[0] == _STARTING else HANG_SECONDS
        return self.task is not None and time.monotonic_ns() - self.journal[1] > limit * 1e9

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.channel.close()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " | ".join(lines[-3:])[-300:]


class Pool:
    """Runs tasks in processes.

    Args:
      folder: with the seeds.
      scratch: where inputs are put.
      seed: of the run.
    """

    def __init__(self, folder: Path, scratch: Path, seed: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._folder, self._scratch, self._seed = folder, scratch, seed
        self._started = 0
        self._lost: dict[str, int] = {}
        self._seconds = float("inf")
        self.outcome = Outcome()

    def run(self, tasks: Iterable[Task], processes: int, seconds: float = float("inf")) -> Outcome:
        """Runs them all, or until the processes have read for so many seconds each, or Ctrl-C."""
        waiting, self._seconds = deque(tasks), processes * seconds
        workers = [self._start() for _ in range(processes)]
        try:
            for worker in workers:
                self._feed(worker, waiting)
            said = time.monotonic()
            while busy := [worker for worker in workers if worker.task is not None]:
                if time.monotonic() > said + _SAID_EVERY:
                    said = time.monotonic()
                    count = sum(self.outcome.inputs.values())
                    print(f"fuzz: {count} inputs, {len(self.outcome.faults)} faults", flush=True)
                ready = multiprocessing.connection.wait([worker.channel for worker in busy], timeout=0.5)
                for worker in busy:
                    if worker.channel in ready:
                        self._hear(worker, workers, waiting)
                    elif worker.hangs():
                        self._replace(worker, workers, waiting, "hang")
        except KeyboardInterrupt:
            print("fuzz: interrupted", flush=True)
        finally:
            for worker in workers:
                worker.end()
        return self.outcome

    def _start(self) -> _Process:
        self._started += 1
        os.environ.update(_ENVIRONMENT)
        return _Process(self._context, self._folder, self._scratch / f"{self._started}", self._seed)

    def _feed(self, worker: _Process, waiting: deque[Task]) -> None:
        worker.task = None
        while waiting and sum(self.outcome.seconds.values()) < self._seconds:
            task = waiting.popleft()
            if task.reader not in self.outcome.given_up:
                worker.give(task)
                return

    def _hear(self, worker: _Process, workers: list[_Process], waiting: deque[Task]) -> None:
        assert worker.task is not None
        try:
            message = worker.channel.recv()
        except (EOFError, ConnectionError):
            self._replace(worker, workers, waiting, "crash")
            return
        if message[0] == "broken":
            raise RuntimeError(f"the fuzzer itself failed with {worker.task}:\n{message[1]}")
        if message[0] == "fault":
            self.outcome.faults.append(message[1])
            return
        self.outcome.add(worker.task.reader, message[1], message[2])
        self._feed(worker, waiting)

    def _replace(self, worker: _Process, workers: list[_Process], waiting: deque[Task], kind: str) -> None:
        """Records the input that a process was at, and lets another one go on behind it."""
        task, number = worker.task, int(worker.journal[0])
        assert task is not None
        worker.end()
        if number == _STARTING:
            raise RuntimeError(f"{kind} before the first input of {task.reader}: {worker.last_words()}")
        status = worker.process.exitcode
        words = f"exit status {status}: {worker.last_words()}" if kind == "crash" else f"more than {HANG_SECONDS:g} s"
        self.outcome.faults.append(Fault(task.reader, self._seed, number, kind, "", words))
        self.outcome.add(task.reader, number + 1 - task.first, 0.0)
        self._lost[task.reader] = self._lost.get(task.reader, 0) + 1
        if self._lost[task.reader] >= _MOST_LOST:
            self.outcome.given_up.add(task.reader)
        elif number + 1 < task.end:
            waiting.appendleft(Task(task.reader, number + 1, task.end))
        workers[workers.index(worker)] = fresh = self._start()
        self._feed(fresh, waiting)
