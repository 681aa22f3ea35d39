"""The command line of scripts/fuzz."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from spqr_jax.errors import SpQRError
from support.fuzz.judge import Bench, grouped, judged_read
from support.fuzz.pool import Outcome, Pool, make_seeds, scratch_folder, tasks_of
from support.fuzz.readers import BY_NAME, READERS, Reader


def main() -> int:
    options = _options()
    readers = [BY_NAME[name] for name in options.reader] if options.reader else [r for r in READERS if r.share]
    if options.only is not None:
        return _only(readers[0], options.seed, options.only)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves nothing behind, and reports
    begun = time.perf_counter()
    with scratch_folder() as folder:
        make_seeds(readers, folder / "seeds")
        print(f"fuzz: sound files after {time.perf_counter() - begun:.0f} s", flush=True)
        pool = Pool(folder / "seeds", folder, options.seed)
        tasks = list(tasks_of(readers, options.count))
        outcome = pool.run(tasks, options.processes, options.seconds or float("inf"))
    _report(outcome, time.perf_counter() - begun, options.seed)
    return 1 if outcome.faults or outcome.given_up else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/fuzz", description="Damaged inputs for every reader: docs/explanation/reliability.md."
    )
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs in all (1000000)")
    parser.add_argument("--seconds", type=float, help="stop after each process has read for so long")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=list(BY_NAME), help="these alone; repeatable")
    parser.add_argument(
        "--only", type=int, metavar="N", help="input N of one reader: where it lies and what comes of it"
    )
    options = parser.parse_args()
    if options.only is not None and len(options.reader or ()) != 1:
        parser.error("--only goes with one --reader")
    return options


def _only(reader: Reader, seed: int, number: int) -> int:
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="spqr-fuzz-only-"))
    bench = Bench(reader, make_seeds([reader], folder / "seeds"), folder, seed)
    bench.warm_up()
    place, size = bench.place(number)
    changed = ", ".join(bench.input(number)[1])
    print(f"{place} ({changed} changed, {size} bytes in all)", flush=True)
    found = judged_read(reader, place, size)
    try:
        if found is None or found[0] not in ("time", "memory"):
            reader.read(place)
            print("it is read")
    except SpQRError as error:
        print(f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode())
    except BaseException:
        traceback.print_exc()
    print("fine" if found is None else "fault: " + ", ".join(found))
    return int(found is not None)


def _report(outcome: Outcome, seconds: float, seed: int) -> None:
    for name in sorted(outcome.inputs, key=list(BY_NAME).index):
        inputs, spent = outcome.inputs[name], outcome.seconds[name]
        faults = sum(fault.reader == name for fault in outcome.faults)
        note = ", given up" if name in outcome.given_up else ""
        each = 1e6 * spent / max(inputs, 1)
        print(f"  {name:16} {inputs:8d} inputs {spent:7.1f} s {each:9.0f} µs each  {faults} faults{note}")
    groups = grouped(outcome.faults)
    for (reader, kind, place), faults in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = faults[0]
        message = " ".join(first.message.split())[:160].encode("utf-8", "backslashreplace").decode()
        print(f"\n{len(faults)} × {reader}: {kind} at {place or 'no line of the package'}: {message}")
        print(f"    scripts/fuzz --reader {reader} --seed {seed} --only {first.number}")
    total = sum(outcome.inputs.values())
    print(f"\nfuzz: {total} inputs in {seconds:.0f} s, {len(outcome.faults)} faults in {len(groups)} groups")


if __name__ == "__main__":
    sys.exit(main())
