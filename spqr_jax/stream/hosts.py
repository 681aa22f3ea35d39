"""Several processes that quantize together: how they join, what the first tells the others, and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spqr_jax._compat import Notes, start_distributed
from spqr_jax.errors import SpQRError
from spqr_jax.events import Event, Events, SafePoint

_START = 300  # seconds in which all processes must have started
_LOOK = 0.5  # seconds between two looks at the other processes
_SILENCE = 20.0  # seconds without a sign of life after which a process counts as gone
_GRACE = 20.0  # seconds that a process has to end by itself once another has failed
_NOTE = 1 << 16  # bytes up to which a message is a note; longer ones go from device to device
_HOW_TO_GO_ON = "If a state was saved, the same commands with --resume go on."
_PIECE = 1 << 22  # bytes of a long message that are sent at a time

T = TypeVar("T")


class StoppedTogether(KeyboardInterrupt):
    """Ctrl-C or termination of one process, at a safe point, in all of them."""


class Together:
    """Processes that run the same job on one mesh. All make the same calls of `from_first`, in the same order.

    The first process alone has the disk with the state and the result. What it reads or decides reaches the others
    through `from_first`. With one process each call is the plain call.

    Args:
      count: number of processes.
    """

    def __init__(self, count: int = 1) -> None:
        self._count, self._messages = count, itertools.count()
        self._works_alone = False
        self._shared_error: BaseException | object = object()

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages: there are no others, or it is process 0."""
        return self._count == 1 or jax.process_index() == 0

    @property
    def is_shared(self) -> bool:
        """Whether the others take part in what this process does now."""
        return self._count > 1 and not self._works_alone

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises in the first process, in every process. The others do not run it.

        They wait as long as it takes. Inside `work` the first process is alone: calls of `from_first` there are plain.

        Args:
          work: returns what `pickle` takes; arrays arrive on the default device.
        """
        if not self.is_shared:
            return work()
        number = next(self._messages)
        if self.is_first:
            outcome = self._outcome(work)
            _send(number, _pickled(outcome))
        else:
            outcome = pickle.loads(_received(number))
        is_error, value = outcome
        if is_error:
            self._shared_error = value
            raise value
        result: T = value
        return result

    def _outcome(self, work: Callable[[], Any]) -> tuple[bool, Any]:
        self._works_alone = True
        try:
            return False, work()
        except KeyboardInterrupt:
            return True, StoppedTogether()
        except Exception as error:
            return True, error
        finally:
            self._works_alone = False

    def stopping(self, events: Events, is_asked: Callable[[], bool]) -> Events:
        """Events that stop all processes at the same safe point.

        Args:
          events: told of each event, in this process.
          is_asked: whether the first process is to stop.

        Raises:
          StoppedTogether: from the events, in every process.
        """

        def told(event: Event) -> None:
            if self.is_shared and isinstance(event.detail, SafePoint):
                if self.from_first(is_asked):
                    event.detail.save()
                    self._shared_error = StoppedTogether()
                    raise self._shared_error
                event = dataclasses.replace(event, detail=None)  # a signal that came since waits for the next one
            events(event)

        return told

    @contextlib.contextmanager
    def watched(self, is_asked: Callable[[], bool], ask: Callable[[], None]) -> Iterator[None]:
        """While it runs, no process waits in vain for another: an error of one ends all of them, with a message.

        A process that fails tells the others. One that cannot heed it, as it waits inside a computation for what the
        failed process should have sent, is ended after 20 seconds. A process that gives no sign of life for 20 seconds
        has failed, too.

        Args:
          is_asked: whether this process was asked to stop, by a signal.
          ask: asks the first process to stop, as a signal would; called there if another one was asked.
        """
        if self._count == 1:
            yield
            return
        watch = _Watch(self._count, is_asked, ask)
        try:
            yield
            self.from_first(lambda: None)  # none leaves while another may still need it
        except BaseException as error:
            if self._shared_error in (error, error.__context__):  # all processes have it
                _leave_together(watch)
                raise
            watch.tell(f"process {jax.process_index()} failed: {type(error).__name__}: {error}")
            watch.close()
            if isinstance(error, jax.errors.JaxRuntimeError):
                reason = next(iter(str(error).splitlines()), "").rpartition("dispatching computation: ")[2]
                raise SpQRError(f"another process has ended, or the connection to it broke ({reason})") from error
            raise
        _leave_together(watch)


ALONE = Together()
"""One process."""


def start_hosts(text: str) -> Together:
    """Joins this process to others that run the same command. Nothing of JAX may have run before.

    Args:
      text: ``auto``, where JAX finds the others by itself (SLURM, Cloud TPU, MPI); or ``ADDRESS:PORT,COUNT,INDEX``:
        where process 0 listens, how many processes there are, and which of them this is.

    Raises:
      SpQRError: it is neither, or the others did not come.
    """
    settings: dict[str, object] = {}
    if text != "auto":
        parts = text.rsplit(",", 2)
        if len(parts) != 3 or ":" not in parts[0] or not parts[1].isdigit() or not parts[2].isdigit():
            raise SpQRError(f"--hosts {text}: give auto, or ADDRESS:PORT,COUNT,INDEX, as in 10.0.0.1:8476,2,0")
        count, index = int(parts[1]), int(parts[2])
        if not 0 <= index < count:
            raise SpQRError(f"--hosts {text}: the processes are counted from 0 to {count - 1}, and this is {index}")
        settings = {"coordinator_address": parts[0], "num_processes": count, "process_id": index}
    try:
        start_distributed(_START, **settings)
    except (RuntimeError, ValueError) as error:
        raise SpQRError(f"--hosts {text}: the processes did not come together: {error}") from None
    return Together(jax.process_count())


# ---- messages ---------------------------------------------------------------------------------


def _pickled(outcome: tuple[bool, Any]) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception:
        if not outcome[0]:
            raise
        return pickle.dumps((True, SpQRError(f"the first process failed: {outcome[1]}")))


def _send(number: int, message: bytes) -> None:
    if len(message) <= _NOTE:
        Notes.write(f"message/{number}", b"=" + message)
        return
    Notes.write(f"message/{number}", b"#%d" % len(message))
    for first in range(0, len(message), _PIECE):
        _passed_on(np.frombuffer(message[first : first + _PIECE], np.uint8))


def _received(number: int) -> bytes:
    note = None
    while note is None:  # as long as it takes: the watch ends this process if the first one is gone
        note = Notes.wait(f"message/{number}", 1.0)
    if note[:1] == b"=":
        return note[1:]
    length = int(note[1:])
    pieces = [_passed_on(np.zeros(0, np.uint8)) for _ in range(0, length, _PIECE)]
    return b"".join(piece.tobytes() for piece in pieces)[:length]


def _passed_on(piece: np.ndarray) -> np.ndarray:
    """A piece of the first process's, in every process. All pieces have one length: one program sends them."""
    padded = np.zeros(_PIECE, np.uint8)
    padded[: len(piece)] = piece
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))


# ---- the end ----------------------------------------------------------------------------------


def _leave_together(watch: _Watch) -> None:
    watch.close()
    with contextlib.suppress(Exception):  # another one may be gone by now
        Notes.meet("end", _GRACE)  # the first one, which keeps the notes, is the last to go
        if jax.process_index() == 0:
            Notes.outlast()
        jax.distributed.shutdown()


class _Watch:
    """A thread that looks twice a second how the other processes are, and ends this one if one of them has failed."""

    def __init__(self, count: int, is_asked: Callable[[], bool], ask: Callable[[], None]) -> None:
        self._index, self._closed = jax.process_index(), threading.Event()
        self._is_asked, self._ask = is_asked, ask
        self._beats = {str(index): (b"", time.monotonic()) for index in range(count) if index != self._index}
        self._thread = threading.Thread(target=self._look, daemon=True, name="other processes")
        self._thread.start()

    def tell(self, message: str) -> None:
        """Tells the others that this process has failed."""
        with contextlib.suppress(Exception):  # they may be gone
            Notes.write(f"failed/{self._index}", message.encode(errors="replace"))

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        for beat in itertools.count():
            if self._closed.wait(_LOOK):
                return
            try:
                problem, grace = self._problem(beat)
            except Exception as error:  # the first process is gone, which keeps the notes
                problem, grace = f"the first process does not answer: {error}", _GRACE
            if problem:
                print(f"spqr: {problem}; all processes end. {_HOW_TO_GO_ON}", file=sys.stderr, flush=True)
                if not self._closed.wait(grace):
                    os._exit(1)
                return

    def _problem(self, beat: int) -> tuple[str, float]:
        """What is wrong with another process, and how long this one may take to end; empty for nothing."""
        Notes.write(f"alive/{self._index}", b"%d" % beat)
        if self._is_asked():
            Notes.write(f"stop/{self._index}", b"")
        if self._index == 0 and Notes.folder("stop"):
            self._ask()
        for index, message in Notes.folder("failed").items():
            if index in self._beats:
                return message.decode(), _GRACE
        beats, now = Notes.folder("alive"), time.monotonic()
        for index, (last, since) in self._beats.items():
            if beats.get(index, b"") != last:
                self._beats[index] = (beats[index], now)
            elif now - since > _SILENCE:
                return f"process {index} has given no sign of life for {_SILENCE:.0f} seconds", 0.0
        return "", 0.0
