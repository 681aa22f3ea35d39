"""A directory's name, claimed before the work for it begins."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from spqr_jax.errors import CheckpointError, SpQRError
from spqr_jax.output import leftovers
from spqr_jax.output.flush import flush_folder, flush_tree
from spqr_jax.output.interruptions import interruptions_wait
from spqr_jax.output.lock import NameLock
from spqr_jax.output.run_folder import (
    CHECKPOINT,
    Run,
    discard_run,
    end_finished,
    has_state,
    kept_run,
    note_name,
    refuse_alive,
    run_folder,
    take_run,
)
from spqr_jax.output.space import FULL, describe_free, errno_of, free_bytes, readable_size, why_not

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class AlreadyFinished(CheckpointError):
    """A run is to go on whose result has got its name."""


class Claim:
    """A name that this process holds, with a hidden directory beside it to write to.

    What would keep the result from being written is found at once: a name that is taken, too long or held by
    another run, a place that is read-only or not there. A context manager; leaving it, or `release`, removes
    what did not get its name. Also removes or restores what runs that were killed left, and warns of it.

    Args:
      path: of the directory. A link stands for what it points to.
      overwrite: replace an existing directory, once the new one is whole.
      run: for work that can go on after it was stopped: what to do with an unfinished run of this name. The
        directory to write to is then in the run's folder, which stays once a state is in it (`spqr_jax.journal`).

    Attributes:
      path: as given; after `give_name`, where the result lies.
      partial: where to write.
      run: folder of the run, or None.

    Raises:
      AlreadyFinished: `run` is "resume", and the run had given the result its name when it was killed.
      CheckpointError: with the reason.
    """

    def __init__(self, path: Path | str, overwrite: bool = False, *, run: Run | None = None) -> None:
        self.path, self._overwrite = Path(path), overwrite
        with explained(self.path):
            self._target = Path(os.path.realpath(path))
        held = self._held = _Held()
        self._finalizer = weakref.finalize(self, held.release)
        self.run: Path | None = None
        notes: list[str] = []
        try:
            with interruptions_wait(), explained(self.path, self._target):
                if not leftovers.are_beside(self._target):  # which are cleaned up first
                    refuse_existing(self.path, overwrite)
                _make_folders(self._target.parent, held)
                held.lock = NameLock(self._target)
                self._take(run, held, held.lock, notes)
            for note in notes:
                warnings.warn(note, stacklevel=2)
        except BaseException as error:
            self.release()
            if notes and isinstance(error, SpQRError):
                raise type(error)("; ".join([str(error), *notes])) from None
            raise

    def _take(self, run: Run | None, held: _Held, lock: NameLock, notes: list[str]) -> None:
        """Cleans up what killed runs left, and makes the directory to write to."""
        if run is not None and not lock.is_first:
            raise CheckpointError(f"this process is writing to {self._target} already: wait until it has ended")
        if run is not None and not lock.works:
            refuse_alive(self._target)
        result = None
        if lock.is_first and (lock.works or run is not None):
            result, done = end_finished(self._target)
            notes += done
        if lock.is_first and lock.works:
            notes += leftovers.clean_up(self._target)
        if result is not None and run == "resume":
            raise AlreadyFinished(f"{result} is finished already")
        refuse_existing(self.path, self._overwrite)  # another run may have ended before we got the lock
        if run is None:
            if has_state(run_folder(self._target)):
                notes.append(kept_run(run_folder(self._target), self._target))
            self.partial = held.partial = leftovers.make_hidden(self._target, leftovers.PARTIAL)
        else:
            notes += take_run(self._target, run)
            self.run = held.run = run_folder(self._target)
            self.partial = self.run / CHECKPOINT

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.release()

    def release(self) -> None:
        """Removes what did not get its name, and lets others have the name. A run that can go on stays."""
        with interruptions_wait():
            self._finalizer()
        if self._held.is_kept:
            self._held.is_kept = False
            assert self.run is not None
            warnings.warn(kept_run(self.run, self.path), stacklevel=2)

    def need(self, num_bytes: float) -> None:
        """Refuses a result that there is no room for.

        Raises:
          CheckpointError: fewer than `num_bytes` are free.
        """
        free = free_bytes(self.partial)
        if free is not None and num_bytes > free:
            raise CheckpointError(
                f"{self.path} needs about {readable_size(num_bytes)}, but only {describe_free(self.partial)}: free "
                "some space, or choose another place"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What the system or another library raises in here becomes one message.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            yield
        except (SpQRError, MemoryError):
            raise
        except Exception as error:  # Orbax, tensorstore, safetensors and tokenizers raise many kinds
            raise self.failure(error) from None

    def failure(self, error: BaseException) -> CheckpointError:
        """The error of a result that could not be written."""
        kept = self.run is not None and has_state(self.run)
        lost = "" if kept else "; nothing was saved"
        return CheckpointError(f"cannot write {self.path}: {why_not(error, self.partial)}{lost}")

    def is_failure(self, error: BaseException | None) -> bool:
        """Whether an error that arose elsewhere is one of writing here."""
        if not isinstance(error, OSError):
            return False
        name = error.filename if isinstance(error.filename, str) else os.fspath(error.filename or "")
        return errno_of(error) in (*FULL, errno.EFBIG) or str(name).startswith(str(self.run or self.partial))

    def give_name(self) -> Path:
        """Makes the directory appear under its name, with all that was written on the disk.

        Where something is there by now and may not be replaced, the result gets the next free name beside it,
        and a warning says so.

        Returns:
          Where it lies.

        Raises:
          CheckpointError: it cannot be written.
        """
        note = ""
        with interruptions_wait(), self.writing():
            if self.run is None:
                leftovers.remove_mark(self.partial)
            self.partial.chmod(0o755)  # mkdtemp's own is for this user alone
            flush_tree(self.partial)
            if self._overwrite and os.path.lexists(self._target):
                self._replace()
            else:
                note = self._take_free_name()
            flush_folder(self._target.parent)
            if self.run is not None:
                flush_folder(self.run)
                discard_run(self.run)
                self._held.run = None
        if note:
            warnings.warn(note, stacklevel=2)
        return self.path

    def _replace(self) -> None:
        old = leftovers.make_hidden(self._target, leftovers.OLD)
        self._note_name(self._target, old.name)
        try:
            os.rename(self._target, old / "old")
            os.rename(self.partial, self._target)
        except BaseException:
            if os.path.lexists(old / "old"):
                os.rename(old / "old", self._target)
            leftovers.remove(old)
            raise
        flush_folder(self._target.parent)
        leftovers.discard_old(self._target, old)

    def _note_name(self, target: Path, old: str | None = None) -> None:
        """What the next run needs to know if this one is killed while the result gets its name."""
        if self.run is not None:
            note_name(self.run, target.name, old)

    def _take_free_name(self) -> str:
        target, count = self._target, 1
        while True:
            try:
                if not os.path.lexists(target):
                    self._note_name(target)
                    os.rename(self.partial, target)
                    break
            except OSError as error:  # it appeared since
                if error.errno not in _TAKEN:
                    raise
            count += 1
            target = self._target.with_name(f"{self._target.name}-{count}")
        if count == 1:
            return ""
        taken, self.path = self.path, target
        return f"another process wrote {taken} during this run: the result of this run is in {target}"


class _Held:
    """What a claim holds, and how to give it back; knows no claim, so that one that is forgotten is given back, too."""

    def __init__(self) -> None:
        self.lock: NameLock | None = None
        self.partial: Path | None = None
        self.run: Path | None = None
        self.is_kept = False
        self.new_folders: list[Path] = []
        self._process = os.getpid()

    def release(self) -> None:
        if os.getpid() != self._process:  # a fork's
            return
        if self.partial is not None:
            leftovers.remove(self.partial)
        if self.run is not None:
            self.is_kept = has_state(self.run)
            if not self.is_kept:
                leftovers.remove(self.run)
        if self.lock is not None:
            self.lock.release()
        for folder in reversed(self.new_folders):
            with contextlib.suppress(OSError):  # not empty: the result lies there
                folder.rmdir()


def refuse_existing(path: Path | str, overwrite: bool, *, directory: bool = True) -> None:
    """Says at once what would keep a result from getting its name.

    Raises:
      CheckpointError: `path` exists and `overwrite` is not set, or cannot be replaced: it is a file where a directory
        is to be (or the other way round), or a folder that more depends on than a result.
    """
    path, place, here = Path(path), Path(os.path.realpath(path)), Path.cwd()
    if not os.path.lexists(place):  # a link that leads nowhere yet is as good as nothing
        return
    if path.exists() and path.is_dir() != directory:
        raise CheckpointError(
            f"{path} is {'not a directory' if directory else 'a directory'}: choose another name for the result"
        )
    if not overwrite:
        raise CheckpointError(
            f"{path} exists already: choose another {_kind(directory)}, or replace it "
            "(--overwrite; in Python, overwrite=True)"
        )
    if directory and (place in (here, *here.parents) or place in (Path.home(), *Path.home().parents)):
        raise CheckpointError(
            f"{path} is the current directory, your home directory or a parent of them, and is not replaced: choose "
            "another"
        )


def _kind(directory: bool) -> str:
    return "directory" if directory else "file"


@contextlib.contextmanager
def explained(path: Path, place: Path | None = None) -> Iterator[None]:
    """Errors of the system become one message on `path`; `place` is what it resolves to.

    Raises:
      CheckpointError: with the reason.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {why_not(error, place or path.absolute())}") from None
    except SpQRError:
        raise
    except ValueError as error:  # of a NUL in a name
        raise CheckpointError(f"cannot write {str(path)!r}: {error}; choose another name") from None


def _make_folders(folder: Path, held: _Held) -> None:
    missing = []
    while not folder.exists() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another run was quicker
            new.mkdir()
            flush_folder(new.parent)
            held.new_folders.append(new)
