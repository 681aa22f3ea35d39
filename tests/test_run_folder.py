"""Runs that can go on: their folder beside the name, and how the result gets the name from there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest

from spqr_jax import CheckpointError, ModelError, load_model
from spqr_jax.atomic import AtomicDirectory
from spqr_jax.journal import Journal
from spqr_jax.output import AlreadyFinished, Claim, lock
from spqr_jax.output.leftovers import make_hidden

SAME = {"model": "a" * 64}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_after_a_commit(path, how="new", overwrite=False):
    """A run that fails when it has committed a state."""

    class Stop(Exception):
        pass

    def run():
        with Claim(path, overwrite, run=how) as held, AtomicDirectory(held) as directory:
            (directory.partial / "text").write_text("first")
            journal = Journal(held.run, SAME, resume=how == "resume")
            journal.commit({"count": ((journal.state or {}).get("count", 0)) + 1})
            raise Stop

    says = r"what was finished of .*q is kept in .*\.q\.run: run the same .* --resume"
    with pytest.warns(UserWarning, match=says), pytest.raises(Stop):
        run()


def finish(path, how, overwrite=False):
    with Claim(path, overwrite, run=how) as held, AtomicDirectory(held) as directory:
        journal = Journal(held.run, SAME, resume=how == "resume")
        state = journal.state
        if state is None:
            (directory.partial / "text").write_text("second")
    journal.close(done=True)
    return state


# ---- the usual course ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["new", "resume", "restart"])
def test_a_run_that_is_not_stopped_leaves_the_result_alone(tmp_path, how):
    assert finish(tmp_path / "deep" / "q", how) is None
    assert names(tmp_path / "deep") == ["q"]
    assert names(tmp_path / "deep" / "q") == ["text"]
    assert (tmp_path / "deep" / "q").stat().st_mode & 0o777 == 0o755


def test_a_stopped_run_goes_on(tmp_path):
    stop_after_a_commit(tmp_path / "q")
    assert names(tmp_path) == [".q.run"]
    stop_after_a_commit(tmp_path / "q", "resume")
    assert finish(tmp_path / "q", "resume") == {"count": 2}
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "text").read_text() == "first"


def test_a_stopped_run_is_refused_or_begun_again(tmp_path):
    stop_after_a_commit(tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"an unfinished run is in .*\.q\.run: --resume .* --restart"):
        finish(tmp_path / "q", "new")
    assert names(tmp_path) == [".q.run"]
    with pytest.warns(UserWarning, match=r"removed .*\.q\.run, an unfinished run"):
        assert finish(tmp_path / "q", "restart") is None
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "text").read_text() == "second"


def test_nothing_is_left_of_a_run_that_failed_before_its_first_commit(tmp_path):
    def fail():
        with Claim(tmp_path / "deep" / "q", run="new") as held, AtomicDirectory(held):
            Journal(held.run, SAME, resume=False).put({})
            raise RuntimeError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError):
            fail()
    assert names(tmp_path) == []


def test_a_run_that_is_forgotten_stays(tmp_path):
    held = Claim(tmp_path / "q", run="new")
    Journal(held.run, SAME, resume=False).commit({"count": 1})
    del held
    assert names(tmp_path) == [".q.run"]


def test_another_command_for_the_same_name_says_that_a_run_is_there(tmp_path):
    stop_after_a_commit(tmp_path / "q")
    with pytest.raises(ModelError, match=r"no model found .*an unfinished run is in .*\.q\.run"):
        load_model(str(tmp_path / "q"))
    with pytest.warns(UserWarning, match=r"what was finished of .*q is kept in"), AtomicDirectory(tmp_path / "q"):
        pass
    assert names(tmp_path) == [".q.run", "q"]
    with pytest.raises(CheckpointError, match="exists already"):
        finish(tmp_path / "q", "resume")
    assert finish(tmp_path / "q", "resume", overwrite=True) == {"count": 1}
    assert names(tmp_path) == ["q"]


def test_an_error_of_writing_does_not_say_that_nothing_was_saved(tmp_path):
    def fail():
        with Claim(tmp_path / "q", run="new") as held, AtomicDirectory(held):
            Journal(held.run, SAME, resume=False).commit({})
            raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="is kept in"), pytest.raises(CheckpointError, match="No space") as error:
        fail()
    assert "nothing was saved" not in str(error.value)


# ---- whose folder it is -------------------------------------------------------------------------


def mark(folder, host, process=7, **more):
    folder.mkdir(exist_ok=True)
    text = json.dumps({"written by": "spqr-jax", "host": host, "process": process, **more})
    (folder / ".spqr-unfinished").write_text(text)


def test_a_run_of_another_host_is_said(tmp_path):
    stop_after_a_commit(tmp_path / "q")
    mark(tmp_path / ".q.run", "elsewhere")
    with pytest.raises(CheckpointError, match=r"unfinished run on elsewhere \(process 7\) is in"):
        finish(tmp_path / "q", "new")
    with pytest.warns(UserWarning, match=r"was begun on elsewhere \(process 7\): make sure that it has ended there"):
        finish(tmp_path / "q", "resume")
    assert names(tmp_path) == ["q"]


def test_a_run_of_another_host_that_has_only_begun(tmp_path):
    mark(tmp_path / ".q.run", "elsewhere")
    with pytest.raises(CheckpointError, match=r"a run on elsewhere \(process 7\) has begun in .* and finished nothing"):
        finish(tmp_path / "q", "new")
    assert names(tmp_path) == [".q.run"]
    with pytest.warns(UserWarning, match="left by a run that was killed"):
        finish(tmp_path / "q", "restart")
    assert names(tmp_path) == ["q"]


@pytest.mark.parametrize("how", ["new", "resume", "restart"])
def test_what_is_not_the_folder_of_a_run_is_never_touched(tmp_path, how):
    (tmp_path / ".q.run").mkdir()
    (tmp_path / ".q.run" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="is not the folder of a run: remove it, or choose another name"):
        finish(tmp_path / "q", how)
    (tmp_path / ".p.run").write_text("")
    with pytest.raises(CheckpointError, match="is not a directory"):
        finish(tmp_path / "p", how)
    assert names(tmp_path) == [".p.run", ".q.run"]
    assert names(tmp_path / ".q.run") == ["mine"]


def test_a_process_sees_its_own_run(tmp_path):
    with Claim(tmp_path / "q", run="new"), pytest.raises(CheckpointError, match=r"process is writing to .*q alr"):
        Claim(tmp_path / "q", run="resume")
    assert names(tmp_path) == []


@pytest.mark.parametrize("how", ["new", "resume", "restart"])
def test_without_locks_a_living_process_is_not_disturbed(tmp_path, monkeypatch, how):
    monkeypatch.setattr(lock, "_lock", lambda descriptor: False)
    stop_after_a_commit(tmp_path / "q")
    mark(tmp_path / ".q.run", socket.gethostname(), os.getppid())
    with pytest.raises(CheckpointError, match=r"may still be writing to .* has no locks"):
        finish(tmp_path / "q", how)
    mark(tmp_path / ".q.run", socket.gethostname(), 2**22 + 1)  # more than Linux gives
    if how != "new":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finish(tmp_path / "q", how)
        assert names(tmp_path) == ["q"]


RUN = """
import sys
from spqr_jax.atomic import AtomicDirectory
from spqr_jax.journal import Journal
from spqr_jax.output import Claim
with Claim(sys.argv[1], run="resume") as held, AtomicDirectory(held) as directory:
    Journal(held.run, {"model": "a" * 64}, resume=True).commit({"count": 1})
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_of_another_process_is_not_touched_until_it_was_killed(tmp_path):
    command = [sys.executable, "-c", RUN, tmp_path / "q"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for how in ("new", "resume", "restart"):
            with pytest.raises(CheckpointError, match=f"run .process {other.pid} on .* is writing to .*q: wait for it"):
                Claim(tmp_path / "q", run=how)
        other.send_signal(signal.SIGKILL)
    assert finish(tmp_path / "q", "resume") == {"count": 1}
    assert names(tmp_path) == ["q"]


# ---- the moment in which the name is given ------------------------------------------------------


def killed_at(step, path, overwrite):
    """Whether a run in a process that is killed at its `step`-th call that changes a name came that far."""
    process = os.fork()
    if process:
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])
    calls = 0

    def deadly(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    finish(path, "resume", overwrite)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_step_of_the_end_loses_nothing(tmp_path, overwrite):
    step, ended = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            folder = tmp_path / str(step)
            folder.mkdir()
            if overwrite:
                (folder / "q").mkdir()
                (folder / "q" / "text").write_text("old")
            with Claim(folder / "q", overwrite, run="new") as held:
                (held.partial / "text").write_text("first")
                Journal(held.run, SAME, resume=False).commit({"count": 1})
            if not killed_at(step, folder / "q", overwrite):
                break
            text = (folder / "q" / "text").read_text() if (folder / "q").exists() else None
            try:
                state = finish(folder / "q", "resume", overwrite)
                ended.append("went on" if state == {"count": 1} else "began anew")
            except AlreadyFinished:
                ended.append("was finished")
            except CheckpointError as error:
                ended.append("exists" if "exists already" in str(error) else str(error))
            assert names(folder) == ["q"], step
            if ended[-1] == "began anew":  # it replaces what was finished
                assert (text, (folder / "q" / "text").read_text()) == ("first", "second"), step
            else:
                assert (folder / "q" / "text").read_text() == "first", step
            step += 1
    assert step > 15
    last = "began anew" if overwrite else "exists"  # the folder's mark is gone by then, with all that was in it
    assert set(ended) == {"went on", "was finished", last}
    assert ended[-3:].count(last) == ended.count(last)


def test_a_finished_run_whose_result_was_moved_does_not_count(tmp_path):
    stop_after_a_commit(tmp_path / "q")
    mark(tmp_path / ".q.run", socket.gethostname(), name="q", old=None)
    os.rename(tmp_path / ".q.run" / "checkpoint", tmp_path / "moved")
    with pytest.warns(UserWarning, match="its run had finished .*q but it is not there any more"):
        assert finish(tmp_path / "q", "resume") is None
    assert names(tmp_path) == ["moved", "q"]


def test_a_new_run_after_a_finished_one_finds_the_name_taken(tmp_path):
    stop_after_a_commit(tmp_path / "q")
    mark(tmp_path / ".q.run", socket.gethostname(), name="q", old=None)
    os.rename(tmp_path / ".q.run" / "checkpoint", tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"q exists already.*removed .*\.q\.run: its run had finished"):
        finish(tmp_path / "q", "new")
    assert names(tmp_path) == ["q"]


def test_a_hidden_directory_without_content_is_cleaned_up(tmp_path):
    """A kill between the making of the directory and its mark."""
    hidden = make_hidden(tmp_path / "q", "partial")
    (hidden / ".spqr-unfinished").unlink()
    with pytest.warns(UserWarning, match="left by a run that was killed"):
        finish(tmp_path / "q", "new")
    assert names(tmp_path) == ["q"]
