"""Kills `spqr quantize` again and again, goes on, and compares the results: scripts/crash."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import queue
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from spqr_jax.checkpoint import content_digest
from spqr_jax.models.decoder import random_decoder
from support.crash import power_cut, recorder
from support.crash.forks import Forks, Request, errors_of
from support.model_files import write_model_and_ids
from support.problems import TINY

COMMAND = [
    "quantize", "model", "--out", "q", "--target-bits", "4.5", "--rule", "k_proj|v_proj|gate_proj=skip",
    "--calib", "ids.npy", "--nsamples", "4", "--seqlen", "512", "--tune", "logits", "--tune-epochs", "2",
]  # fmt: skip
SAVE_EVERY = (0.0, 60.0)  # seconds: at each safe point, inside blocks too; as users do, here after blocks only
MOST_KILLS = 4  # of one run
_LONGEST = 300.0  # seconds that a run may take
_FINISHED_BLOCK = re.compile(r"\.q\.run/untuned/layers/\d{5}")  # those of the result come all at once, at the end
# All matrices have one shape, and one reads an input where two or three could: so there are few programs.
MODEL = dataclasses.replace(
    TINY, hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=2, head_dim=16, max_positions=512
)


@dataclasses.dataclass
class Bench:
    """Where the runs happen, and what an undisturbed run does.

    Attributes:
      folder: of all runs.
      library: see `recorder.compile_shim`; None without a C compiler.
      forks: that are idle; each runs one command at a time.
      digests: of the undisturbed result, without and with ``--overwrite``.
      seconds: that an undisturbed run takes, by seconds between saves.
      calls: that an undisturbed run makes which a kill can be aimed at, by seconds between saves.
      records: the changes on the disk of an undisturbed run that saves at each safe point.
    """

    folder: Path
    library: Path | None
    forks: queue.Queue[Forks]
    digests: dict[bool, str] = dataclasses.field(default_factory=dict)
    seconds: dict[float, float] = dataclasses.field(default_factory=dict)
    calls: dict[float, int] = dataclasses.field(default_factory=dict)
    records: list[recorder.Record] = dataclasses.field(default_factory=list)

    def place(self, name: str) -> Path:
        """A new folder with the inputs of a run."""
        place = self.folder / name
        place.mkdir()
        for entry in ("model", "ids.npy"):
            (place / entry).symlink_to(self.folder / "inputs" / entry)
        return place

    def log(self, place: Path) -> Path | None:
        """Where the changes in a folder are recorded."""
        return None if self.library is None else place.with_name(f"{place.name}.log")

    def run(
        self,
        place: Path,
        overwrite: bool,
        resume: bool,
        save_every: float,
        *,
        kill_call: int = 0,
        signal_after: tuple[int, float] | None = None,
    ) -> tuple[int, str]:
        """Runs the command in a folder: its status, and what it said.

        Args:
          place, overwrite, resume, save_every: how.
          kill_call: see `Request`.
          signal_after: a signal to send, and after how many seconds.
        """
        arguments = [*COMMAND, *["--overwrite"] * overwrite, *["--resume"] * resume]
        log = self.log(place)
        request = Request(str(place), arguments, None if log is None else str(log), kill_call, save_every)
        forks = self.forks.get()
        try:
            process = forks.start(request)
            status = forks.wait(None if signal_after is None else signal_after[1])
            if status is None:
                os.kill(process, signal_after[0])
                status = forks.wait(_LONGEST)
            if status is None:
                os.kill(process, signal.SIGABRT)
                status = forks.wait()
        finally:
            self.forks.put(forks)
        return status, errors_of(place).read_text()


def prepare(folder: Path, processes: int) -> Bench:
    """Makes the inputs, and lets the command run undisturbed."""
    (folder / "inputs").mkdir()
    write_model_and_ids(folder / "inputs", random_decoder(MODEL, seed=0))
    library, forks = recorder.compile_shim(folder), queue.Queue()
    for _ in range(processes):
        forks.put(Forks(library))
    bench = Bench(folder, library, forks)
    for overwrite, save_every in ((True, 60.0), (False, 0.0)):  # the first one compiles, if no earlier one has
        undisturbed(bench, overwrite, save_every)
    bench.seconds[60.0] = min(bench.seconds.values())
    return bench


def undisturbed(bench: Bench, overwrite: bool, save_every: float) -> None:
    place = bench.place(f"undisturbed-{overwrite}")
    if overwrite:
        lay_old(place)
    begun = time.monotonic()
    status, errors = bench.run(place, overwrite, False, save_every)
    if status:
        raise SystemExit(f"the undisturbed run failed with {status}: {errors}")
    bench.seconds[save_every] = time.monotonic() - begun
    bench.digests[overwrite] = content_digest(place / "q")
    assert left(place) == [], left(place)
    if (log := bench.log(place)) is not None:
        records = recorder.read_log(log, place)
        bench.calls[save_every] = recorder.calls(records)
        bench.records = records  # the last run's


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


def attempt(
    bench: Bench, place: Path, overwrite: bool, resume: bool, save_every: float, disturb: bool, chance: random.Random
) -> Attempt:
    """Starts the command and kills it at random, if `disturb`."""
    log, aim, call, signal_after = bench.log(place), "none", 0, None
    if log is not None:
        log.unlink(missing_ok=True)
    if disturb:
        aim = chance.choice(["time"] * 4 + ["SIGTERM", "SIGINT"] + ["call"] * 6 * (log is not None))
        if aim == "call":
            call = chance.randint(1, bench.calls[save_every])
        else:
            number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(aim, signal.SIGKILL)
            signal_after = (number, chance.uniform(0, bench.seconds[save_every]))
    status, errors = bench.run(place, overwrite, resume, save_every, kill_call=call, signal_after=signal_after)
    records = recorder.read_log(log, place) if log is not None and log.exists() else []
    solved = [r.second for r in records if r.kind == "rename" and _FINISHED_BLOCK.fullmatch(r.second)]
    return Attempt(aim, status, errors, solved)


def killed_run(bench: Bench, number: int, seed: int) -> tuple[list[str], Counter[str]]:
    """One run that is killed until it may end: what is wrong, and how it was stopped."""
    chance = random.Random(f"{seed} {number}")
    place, overwrite = bench.place(f"run-{number}"), chance.random() < 0.25
    save_every = chance.choice(SAVE_EVERY)
    if overwrite:
        lay_old(place)
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    finished: set[str] = set()
    resume = False
    for count in range(MOST_KILLS + 1):
        disturb = count == 0 or (count < MOST_KILLS and chance.random() < 0.5)
        done = attempt(bench, place, overwrite, resume, save_every, disturb, chance)
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
    if not wrong:
        remove(bench, place)
    return wrong, counts


def remove(bench: Bench, place: Path) -> None:
    shutil.rmtree(place)
    for file in (bench.log(place), errors_of(place)):
        if file is not None:
            file.unlink(missing_ok=True)


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
    status, errors = bench.run(place, False, True, chance.choice(SAVE_EVERY))
    wrong = [] if has_ended(status, errors) else [f"status {status}: {errors[-500:]}"]
    wrong += compare(bench, place, False)
    if not wrong:
        remove(bench, place)
    return [f"after {count} of {len(records)} changes: {problem}" for problem in wrong], Counter({"after a cut": 1})


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="that are killed and gone on with")
    parser.add_argument("--cuts", type=int, default=None, help="power cuts; by default a quarter of --runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at the same time")
    parser.add_argument("--only", type=int, default=None, help="this run alone")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="spqr-crash-"))
    begun, bench = time.monotonic(), prepare(folder, arguments.processes)
    calls = ", ".join(f"{count} (saves every {seconds:g} s)" for seconds, count in bench.calls.items())
    seconds = bench.seconds[SAVE_EVERY[0]]
    print(f"an undisturbed run takes {seconds:.1f} s; it changes names or flushes files {calls} times", flush=True)
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
    used = 0.0
    while not bench.forks.empty():
        forks = bench.forks.get()
        forks.close()
        used += forks.processor_seconds
    totals = {"runs": len(runs), "power cuts": len(cuts), "attempts": counts, "problems": len(problems)}
    seconds = {"seconds": round(time.monotonic() - begun), "processor seconds": round(used)}
    print(json.dumps({**totals, **seconds}))
    if problems:
        print(f"what is wrong lies in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
