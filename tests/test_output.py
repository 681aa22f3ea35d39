"""Results: claimed before the work, whole or not there, and what runs that were killed left."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from spqr_jax import CheckpointError, ModelError, SpQRError, load_model, save
from spqr_jax.atomic import AtomicDirectory
from spqr_jax.checkpoint import CheckpointSource
from spqr_jax.formats.directory import HFDirectory
from spqr_jax.output import Claim, check_file, claim, lock, refuse_existing, space, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text="new", overwrite=False):
    with AtomicDirectory(path, overwrite) as directory:
        (directory.partial / "text").write_text(text)
    return directory.path


# ---- before the work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file/q", "file is not a directory"),
        ("file/deep/q", "file is not a directory"),
        ("file", "is not a directory"),
        ("/proc/q", "nothing can be created in /proc"),
        ("/dev/null/q", "/dev/null is not a directory"),
        ("/dev/full", "not a directory"),
        ("x" * 256, "File name too long"),
        ("deep/" * 900 + "q", "File name too long"),
        ("a\0b", "null"),
        ("loop", "exists already"),
        (".", "exists already"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, place, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=says) as error:
        Claim(place)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["file", "loop"]


def test_a_read_only_place_is_refused_with_the_system_s_words(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(CheckpointError, match="q: Read-only file system"):
        Claim(tmp_path / "q")


@pytest.mark.parametrize("place", [".", "..", "../here", "/"])
def test_the_folder_one_is_in_is_never_replaced(tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="not replaced"):
        Claim(place, overwrite=True)


def test_folders_above_stay_only_with_a_result(tmp_path):
    Claim(tmp_path / "a" / "b" / "q").release()
    assert names(tmp_path) == []
    write(tmp_path / "a" / "b" / "q")
    assert names(tmp_path / "a" / "b") == ["q"]


def test_a_claim_that_is_forgotten_is_given_back(tmp_path):
    Claim(tmp_path / "q")
    gc.collect()
    assert names(tmp_path) == []


def test_no_room_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "free_bytes", lambda path: 1_100_000_000)
    monkeypatch.setattr(space, "free_bytes", lambda path: 1_100_000_000)
    with Claim(tmp_path / "q") as held:
        held.need(1e9)
        with pytest.raises(CheckpointError, match=r"q needs about 3.2 GB, but only 1.1 GB are free on /"):
            held.need(3.2e9)
    monkeypatch.setattr(claim, "free_bytes", lambda path: None)  # a system that does not say
    with Claim(tmp_path / "q") as held:
        held.need(1e30)


# ---- while it is written ------------------------------------------------------------------------


@contextmanager
def largest_file(num_bytes):
    """As a full disk: the system refuses to write more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_checkpoint(path, model):
    save(path, model, overwrite=True)


def write_tensors(path, model):
    with HFDirectory(path, overwrite=True) as directory:
        directory.add({"w": np.zeros(20_000, np.float32)})


def write_json(path, model):
    with HFDirectory(path, overwrite=True) as directory:
        directory.write_json("config.json", {"values": list(range(20_000))})


@pytest.mark.parametrize("writer", [write_checkpoint, write_tensors, write_json])
def test_what_cannot_be_written_is_one_message_and_leaves_what_was_there(tmp_path, tiny_model, writer, capfd):
    write(tmp_path / "q", "old")
    with largest_file(15_000), pytest.raises(CheckpointError, match="q: File too large") as error:
        writer(tmp_path / "q", tiny_model)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "text").read_text() == "old"


def test_a_disk_that_fills_up_says_how_much_is_free(tmp_path):
    def fill():
        with AtomicDirectory(tmp_path / "q"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match=r"q: No space left on device; .*B are free on /.*free some space"):
        fill()
    assert names(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path):
    def fail():
        with AtomicDirectory(tmp_path / "q"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a model's file")

    with pytest.raises(FileNotFoundError):
        fail()
    assert names(tmp_path) == []


def test_brackets_in_a_path_are_no_pattern(tmp_path, tiny_model):
    save(tmp_path / "[all]" / "q*[red]", tiny_model)
    np.testing.assert_array_equal(
        CheckpointSource(tmp_path / "[all]" / "q*[red]").outer().embed_tokens, tiny_model.outer.embed_tokens
    )


# ---- two at once --------------------------------------------------------------------------------


def test_of_two_in_one_process_the_later_gets_a_name_beside(tmp_path):
    def write_slowly():
        with AtomicDirectory(tmp_path / "q") as slow:
            (slow.partial / "text").write_text("slow")
            assert write(tmp_path / "q", "quick") == tmp_path / "q"
        return slow.path

    with pytest.warns(
        UserWarning, match=r"another process wrote .*q during this run: the result of this run is in .*q-2"
    ):
        assert write_slowly() == tmp_path / "q-2"
    assert {name: (tmp_path / name / "text").read_text() for name in names(tmp_path)} == {"q": "quick", "q-2": "slow"}


def test_save_says_where_the_model_lies(tmp_path, tiny_model, monkeypatch):
    def appear(held):
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / "mine").write_text("")
        return []

    monkeypatch.setattr(claim, "flush_tree", appear)
    with pytest.warns(UserWarning, match="q-2"):
        assert save(tmp_path / "q", tiny_model) == tmp_path / "q-2"
    assert names(tmp_path / "q") == ["mine"]


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 77 on elsewhere", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_waited_for_not_written_over(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path / ".q.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=r"run \(process 77 on elsewhere\) is writing to .*q: wait"):
                Claim(tmp_path / "q", overwrite)
        write(tmp_path / "other")
        holder.kill()
    write(tmp_path / "q")
    assert names(tmp_path) == ["other", "q"]


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(fcntl, "flock", refuse)
    partial = leave(tmp_path, "partial", host=socket.gethostname())
    write(tmp_path / "q")
    assert names(tmp_path) == [partial.name, "q"]  # who knows whether its run is alive


# ---- what killed runs leave ---------------------------------------------------------------------


def leave(folder, kind, host=None, name="q", random="abcd_123"):
    path = folder / f".{name}.{kind}-{random}"
    (path / "layers").mkdir(parents=True)
    (path / "layers" / "data").write_bytes(bytes(2_000_000))
    if host is not None:
        (path / ".spqr-unfinished").write_text(json.dumps({"written by": "spqr-jax", "host": host}))
    return path


KILLED = """
import os, signal, sys
from spqr_jax.output import Claim
held = Claim(sys.argv[1])
(held.partial / "data").write_bytes(bytes(1_000_000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_named_and_removed(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "q"], check=False)
    assert len(names(tmp_path)) == 2  # its directory and its lock
    with pytest.raises(ModelError, match=r"no model found .*an unfinished result is in .*\.q\.partial-"):
        load_model(str(tmp_path / "q"))
    with pytest.raises(CheckpointError, match=r"does not exist; an unfinished result"):
        CheckpointSource(tmp_path / "q")
    with pytest.warns(UserWarning, match=r"removed .*\.q\.partial-.* \(1.0 MB\), left by a run that was killed"):
        write(tmp_path / "q")
    assert names(tmp_path) == ["q"]


def test_what_is_not_known_to_be_ours_and_dead_is_left_alone(tmp_path):
    here = socket.gethostname()
    kept = [
        leave(tmp_path, "partial"),
        leave(tmp_path, "partial", host="another machine", random="bbbbbbbb"),
        leave(tmp_path, "partial", host=here, name="q.partial-1"),
        leave(tmp_path, "partial", host=here, name="qq"),
        leave(tmp_path, "partial", host=here, random="too-long-to-be-ours"),
        leave(tmp_path, "old", host=here),
    ]
    with pytest.warns(UserWarning, match="killed run on this or another machine: remove it") as notes:
        write(tmp_path / "q")
    assert len(notes) == 3
    assert names(tmp_path) == sorted([path.name for path in kept] + ["q"])


def test_a_model_that_was_laid_aside_is_put_back(tmp_path):
    old = leave(tmp_path, "old", host=socket.gethostname())
    (old / "old").mkdir()
    (old / "old" / "text").write_text("the user's")
    with pytest.raises(CheckpointError, match=r"q exists already.*q was restored: a run was killed"):
        write(tmp_path / "q")
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "text").read_text() == "the user's"


def test_a_model_that_was_laid_aside_is_kept_where_another_took_its_name(tmp_path):
    old = leave(tmp_path, "old", host=socket.gethostname())
    (old / "old").mkdir()
    (tmp_path / "q").mkdir()
    with pytest.warns(UserWarning, match="look at both"):
        write(tmp_path / "q", overwrite=True)
    assert names(tmp_path) == [old.name, "q"]


# ---- the moment in which the name is given -------------------------------------------------------


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_directory_is_replaced_waits(tmp_path, monkeypatch, step, number):
    write(tmp_path / "q", "old")
    rename, steps = os.rename, []

    def interrupted(source, target):
        if len(steps) == step:
            os.kill(os.getpid(), number)
        steps.append(target)
        rename(source, target)

    def stop(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    handler = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "q", "new", overwrite=True)
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, handler)
    assert len(steps) == 3
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "text").read_text() == "new"


def test_the_old_one_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write(tmp_path / "q", "old")
    rename = os.rename

    def fail(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "q", "new", overwrite=True)
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "text").read_text() == "old"


def test_a_link_stands_for_what_it_points_to(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "q").symlink_to(tmp_path / "large disk" / "q")
    for text in ("first", "second"):
        write(tmp_path / "q", text, overwrite=True)
        assert (tmp_path / "large disk" / "q" / "text").read_text() == text
    assert (tmp_path / "q").is_symlink()
    assert names(tmp_path) == ["large disk", "q"]


# ---- single files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("folder", "it is a directory"),
        ("nowhere/x.json", "there is no directory"),
        ("file/x.json", "there is no directory"),
        ("/proc/x.json", "nothing can be created in /proc"),
        ("x" * 256, "File name too long"),
        ("a\0b", "null"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, place, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SpQRError, match=says):
        check_file(tmp_path.__class__(place))
    assert names(tmp_path) == ["file", "folder"]


def test_a_file_is_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o640)
    check_file(path)
    assert path.read_text() == "old"
    with largest_file(15_000), pytest.raises(SpQRError, match=r"x\.json: File too large"):
        write_file(path, "x" * 20_000)
    assert path.read_text() == "old"
    write_file(path, "caf\udce9")  # a file's name in Latin-1
    assert path.read_text() == "caf\\udce9"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["x.json"]
    with pytest.raises(CheckpointError, match="exists already: choose another file"):
        refuse_existing(path, False, directory=False)


def test_a_device_is_written_to_and_stays(tmp_path):
    check_file(tmp_path.__class__("/dev/null"))
    write_file(tmp_path.__class__("/dev/null"), "text")
    with pytest.raises(SpQRError, match="/dev/full: No space left on device"):
        write_file(tmp_path.__class__("/dev/full"), "text")
