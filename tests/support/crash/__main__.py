"""Kills `spqr quantize` again and again, goes on, and compares the results: scripts/crash."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from spqr_jax.checkpoint import content_digest
from spqr_jax.models.decoder import random_decoder
from support import ROOT
from support.crash import power_cut, recorder
from support.model_files import write_model_and_ids
from support.problems import TINY

COMMAND = [
    "quantize", "model", "--out", "q", "--target-bits", "4.5", "--calib", "ids.npy", "--nsamples", "4",
    "--seqlen", "32", "--tune", "logits", "--tune-epochs", "2",
]  # fmt: skip
MOST_KILLS = 4  # of one run
_FINISHED_BLOCK = re.compile(r"\.q\.run/untuned/layers/\d{5}")  # those of the result come all at once, at the end


@dataclasses.dataclass
class Bench:
    """Where the runs happen, and what an undisturbed run does.

    Attributes:
      folder: of all runs.
      library: see `recorder.compile_shim`; None without a C compiler.
      digests: of the undisturbed result, without and with ``--overwrite``.
      seconds: that an undisturbed run takes.
      calls: that an undisturbed run makes which a kill can be aimed at.
      records: the changes of an undisturbed run on the disk.
    """

    folder: Path
    library: Path | None
    digests: dict[bool, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    calls: int = 0
    records: list[recorder.Record] = dataclasses.field(default_factory=list)

    def place(self, name: str) -> Path:
        """A new folder with the inputs of a run."""
        place = self.folder / name
        place.mkdir()
        for entry in ("model", "ids.npy"):
            (place / entry).symlink_to(self.folder / "inputs" / entry)
        return place


def start(place: Path, overwrite: bool, resume: bool, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "spqr_jax", *COMMAND, *["--overwrite"] * overwrite, *["--resume"] * resume]
    paths = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=place, env=os.environ | paths | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def prepare(folder: Path) -> Bench:
    """Makes the inputs, and lets the command run undisturbed."""
    (folder / "inputs").mkdir()
    write_model_and_ids(folder / "inputs", random_decoder(TINY, seed=0))
    bench = Bench(folder, recorder.compile_shim(folder))
    undisturbed(bench, "first", False)  # compiles
    for overwrite in (False, True):
        place = undisturbed(bench, f"undisturbed-{overwrite}", overwrite)
        bench.digests[overwrite] = content_digest(place / "q")
        assert left(place) == [], left(place)
    return bench


def undisturbed(bench: Bench, name: str, overwrite: bool) -> Path:
    place, log = bench.place(name), bench.folder / f"{name}.log"
    if overwrite:
        lay_old(place)
    begun = time.monotonic()
    environment = {} if bench.library is None else recorder.recording(bench.library, place, log)
    process = start(place, overwrite, False, environment)
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed with {process.returncode}: {errors}")
    bench.seconds = time.monotonic() - begun
    if log.exists() and not overwrite:
        bench.records = recorder.read_log(log, place)
        bench.calls = recorder.calls(bench.records)
    return place


def lay_old(place: Path) -> None:
    """Something for ``--overwrite`` to replace."""
    (place / "q").mkdir()
    (place / "q" / "old").write_text("old")


def left(place: Path) -> list[str]:
    """What lies beside the inputs and the result."""
    return sorted({path.name for path in place.iterdir()} - {"model", "ids.npy", "q"})


def has_ended(status: int, errors: str) -> bool:
    return status == 0 or (status == 2 and ("finished already" in errors or "q exists already" in errors))


@dataclasses.dataclass
class Attempt:
    """One process: how it was stopped, if it was, and how it ended."""

    aim: str
    status: int
    errors: str
    solved: list[str]
    """Places of the blocks that it finished, in order."""


def attempt(bench: Bench, place: Path, overwrite: bool, resume: bool, disturb: bool, chance: random.Random) -> Attempt:
    """Starts the command and kills it at random, if `disturb`."""
    log = bench.folder / f"{place.name}.log"
    log.unlink(missing_ok=True)
    environment, aim, wait = {}, "none", None
    if bench.library is not None:
        environment = recorder.recording(bench.library, place, log)
    if disturb:
        kinds = ["time"] * 4 + ["SIGTERM", "SIGINT"] + ["call"] * 6 * (bench.library is not None)
        aim = chance.choice(kinds)
        if aim == "call":
            environment |= recorder.killing(bench.library, place, chance.randint(1, bench.calls))
        else:
            wait = chance.uniform(0, bench.seconds)
    process = start(place, overwrite, resume, environment)
    try:
        errors = process.communicate(timeout=wait)[1]
    except subprocess.TimeoutExpired:
        process.send_signal({"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(aim, signal.SIGKILL))
        errors = process.communicate(timeout=600)[1]
    records = recorder.read_log(log, place) if log.exists() else []
    solved = [r.second for r in records if r.kind == "rename" and _FINISHED_BLOCK.fullmatch(r.second)]
    return Attempt(aim, process.returncode, errors, solved)


def killed_run(bench: Bench, number: int, seed: int) -> tuple[list[str], Counter[str]]:
    """One run that is killed until it may end: what is wrong, and how it was stopped."""
    chance = random.Random(f"{seed} {number}")
    place, overwrite = bench.place(f"run-{number}"), chance.random() < 0.25
    if overwrite:
        lay_old(place)
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    finished: set[str] = set()
    resume = False
    for count in range(MOST_KILLS + 1):
        disturb = count == 0 or (count < MOST_KILLS and chance.random() < 0.5)
        done = attempt(bench, place, overwrite, resume, disturb, chance)
        counts[done.aim if done.status < 0 or done.status == 130 else "ended"] += 1
        again = sorted(finished & set(done.solved))
        if len(again) > 1:
            wrong.append(f"{again} were done again")
        finished |= set(done.solved)
        if has_ended(done.status, done.errors):
            break
        if done.status not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130):
            wrong.append(f"status {done.status}: {done.errors[-500:]}")
            break
        if done.status == 130 and not (place / ".q.run").exists() and left(place):
            wrong.append(f"a run that was interrupted left {left(place)}")
        if not (place / ".q.run").exists() or not any((place / ".q.run").glob("state-*.json")):
            finished = set()  # nothing to go on with
        resume = True
    else:
        wrong.append("it did not end")
    wrong += compare(bench, place, overwrite)
    (bench.folder / f"{place.name}.log").unlink(missing_ok=True)
    if not wrong:
        shutil.rmtree(place)
    return wrong, counts


def compare(bench: Bench, place: Path, overwrite: bool) -> list[str]:
    """What is wrong with a result."""
    wrong = [f"{name} was left" for name in left(place)]
    try:
        if content_digest(place / "q") != bench.digests[overwrite]:
            wrong.append("the result differs from that of the undisturbed run")
    except Exception as error:
        wrong.append(f"the result cannot be read: {error}")
    return wrong


def power_cut_run(bench: Bench, number: int, seed: int) -> tuple[list[str], Counter[str]]:
    """Goes on after a power cut during an undisturbed run: what is wrong, and that it ended."""
    chance = random.Random(f"{seed} power {number}")
    place = bench.place(f"cut-{number}")
    records = [r for r in bench.records if not r.path.startswith(("model", "ids.npy"))]
    count = chance.randint(0, len(records))
    power_cut.write_tree(place, power_cut.disk_after(records, count).after_power_cut(chance))
    process = start(place, False, True, {})
    errors = process.communicate()[1]
    wrong = [] if has_ended(process.returncode, errors) else [f"status {process.returncode}: {errors[-500:]}"]
    wrong += compare(bench, place, False)
    if not wrong:
        shutil.rmtree(place)
    return [f"after {count} of {len(records)} changes: {problem}" for problem in wrong], Counter({"after a cut": 1})


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="that are killed and gone on with")
    parser.add_argument("--cuts", type=int, default=None, help="power cuts; by default a quarter of --runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--only", type=int, default=None, help="this run alone")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="spqr-crash-"))
    bench = prepare(folder)
    print(f"an undisturbed run takes {bench.seconds:.1f} s and changes {bench.calls} names or flushes", flush=True)
    runs = range(arguments.runs) if arguments.only is None else [arguments.only]
    cuts = range(arguments.runs // 4 if arguments.cuts is None else arguments.cuts)
    cuts = cuts if bench.records and arguments.only is None else range(0)
    problems, counts = [], Counter()
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        killed = {pool.submit(killed_run, bench, number, arguments.seed): f"run {number}" for number in runs}
        cut = {pool.submit(power_cut_run, bench, number, arguments.seed): f"power cut {number}" for number in cuts}
        names = {**killed, **cut}
        for done in concurrent.futures.as_completed(names):
            wrong, stops = done.result()
            counts += stops
            for problem in wrong:
                problems.append(f"{names[done]}: {problem}")
                print(problems[-1], flush=True)
    print(json.dumps({"runs": len(runs), "power cuts": len(cuts), "attempts": counts, "problems": len(problems)}))
    if problems:
        print(f"what is wrong lies in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
