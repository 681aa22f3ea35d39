"""What a job has done so far, kept in a journal where there is one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from spqr_jax.array import SpQRArray
from spqr_jax.job.block_solver import BlockPlace
from spqr_jax.methods.report import LayerReport
from spqr_jax.planning.budget import Plan
from spqr_jax.planning.curves import Measured
from spqr_jax.planning.record import curve_from_json, curve_to_json, plan_from_json, plan_to_json
from spqr_jax.planning.sensitivity import MeasuringPlace
from spqr_jax.stream.sums import SumsPlace

_ARRAY_LEAVES = (
    "codes", "scale_codes", "zero_codes", "tile_stats", "outlier_cols", "outlier_values", "outlier_row_ptr", "perm",
)  # fmt: skip
_ARRAY_SIZES = ("shape", "bits", "group_size", "stats_group_size", "scale_bits", "zero_bits")


class StateKeeper(Protocol):
    """As `spqr_jax.journal.Journal`."""

    @property
    def state(self) -> dict[str, Any] | None: ...

    def put(self, arrays: Mapping[str, np.ndarray]) -> str: ...

    def get(self, digest: str) -> dict[str, np.ndarray]: ...

    def commit(self, state: dict[str, Any]) -> None: ...


class JobState:
    """The entries of a job's state: read when it goes on, saved at its safe points.

    Entries: ``phase`` (plan, blocks, tune, done) and ``seconds`` of all runs so far. In phase plan ``measured`` (what
    `Measured` holds). After it ``plan``, ``blocks`` (part of the result -> digest), ``layers`` (reports), ``ledger``,
    ``activations`` (digests of the text's streams, and the number of blocks that it is behind) and, inside the block or
    the head that comes next, ``partial`` (what `BlockPlace` holds). In phase tune ``tuning`` (what `TuningPlace` holds)
    and ``result`` (digests of trained parts).

    Args:
      journal: keeps it; None to keep nothing.
    """

    def __init__(self, journal: StateKeeper | None) -> None:
        self._journal = journal
        self._begun = time.perf_counter()
        self.entries: dict[str, Any] = dict(journal.state or {}) if journal is not None else {}
        self._seconds_before = float(self.entries.get("seconds", 0.0))

    @property
    def is_kept(self) -> bool:
        """Whether `save` saves anything."""
        return self._journal is not None

    @property
    def phase(self) -> str:
        return str(self.entries.get("phase", "plan"))

    @property
    def seconds(self) -> float:
        """Wall-clock time of this run and of those that it goes on with."""
        return self._seconds_before + time.perf_counter() - self._begun

    def save(self, **changes: Any) -> None:
        """Changes entries and makes them safe; an entry that is None is dropped."""
        self.entries |= {**changes, "seconds": self.seconds}
        self.entries = {name: value for name, value in self.entries.items() if value is not None}
        if self._journal is not None:
            self._journal.commit(self.entries)

    # ---- arrays and large JSON, in parts of the journal -------------------------------------

    def put_arrays(self, arrays: Iterable[Any]) -> str:
        return self._put({f"{index:06d}": array for index, array in enumerate(arrays)})

    def get_arrays(self, digest: str) -> list[np.ndarray]:
        assert self._journal is not None
        return [array for _, array in sorted(self._journal.get(digest).items())]

    def _put(self, arrays: Mapping[str, Any]) -> str:
        assert self._journal is not None
        return self._journal.put({name: np.asarray(array) for name, array in arrays.items()})

    def _put_json(self, value: Any) -> str:
        return self.put_arrays([np.frombuffer(json.dumps(value).encode(), np.uint8)])

    def _get_json(self, digest: str) -> Any:
        (text,) = self.get_arrays(digest)
        return json.loads(text.tobytes())

    # ---- what a job saves -------------------------------------------------------------------

    def save_measured(self, measured: Measured, with_activations: bool) -> None:
        """Saves where the measuring pass is.

        Args:
          measured: the place.
          with_activations: also what later blocks need of the way forward. Without it nothing is saved on that way, and
            a pass that goes on makes it again.
        """
        place = measured.place
        if place.forward and not with_activations:
            return
        before: list[str] = []
        if with_activations:  # of each block the same at each save
            before = self.entries.get("measured", {}).get("before", [])[: len(place.before)]
            before = before + [self.put_arrays(streams) for streams in list(place.before)[len(before) :]]
        self.save(
            phase="plan",
            measured={
                "forward": place.forward, "index": place.index, "streams": self.put_arrays(place.streams),
                "before": before, "curves": self._put_json([curve_to_json(curve) for curve in measured.curves]),
            },
        )  # fmt: skip

    def measured(self) -> Measured | None:
        """What the measuring pass has come to; None where it has not begun."""
        if (kept := self.entries.get("measured")) is None:
            return None
        curves = tuple(curve_from_json(curve) for curve in self._get_json(kept["curves"]))
        before = [self.get_arrays(digest) for digest in kept["before"]]
        place = MeasuringPlace(kept["forward"], kept["index"], self.get_arrays(kept["streams"]), before)
        return Measured(curves, place)

    def put_plan(self, plan: Plan) -> str | None:
        return self._put_json(plan_to_json(plan)) if self.is_kept else None

    def plan(self) -> Plan | None:
        """The plan of a run that has made one."""
        digest = self.entries.get("plan")
        return None if digest is None else plan_from_json(self._get_json(digest))

    def put_place(self, place: BlockPlace) -> dict[str, Any]:
        """Saves a place's arrays, but those that the last save has, and gives the entry ``partial``."""
        before = self.entries.get("partial", {"solved": {}, "sums": {}})
        solved = {name: before["solved"].get(name) or self._put_weight(weight) for name, weight in place.solved.items()}
        sums: dict[str, Any] = {"stage": place.sums.stage, "part": place.sums.part, "chunks": list(place.sums.chunks)}
        if place.sums.arrays:
            is_saved = before["sums"].items() > sums.items()
            sums["arrays"] = before["sums"]["arrays"] if is_saved else self.put_arrays(place.sums.arrays)
        return {"solved": solved, "starved": dict(place.starved), "sums": sums}

    def place(self) -> BlockPlace | None:
        """Where an earlier run was inside the block, or the head, that comes next; None to begin with it."""
        if (kept := self.entries.get("partial")) is None:
            return None
        solved = {name: self._get_weight(entry) for name, entry in kept["solved"].items()}
        sums = kept["sums"]
        arrays = tuple(self.get_arrays(sums["arrays"])) if "arrays" in sums else ()
        return BlockPlace(
            SumsPlace(sums["stage"], sums["part"], tuple(sums["chunks"]), arrays), solved, kept["starved"]
        )

    def _put_weight(self, weight: SpQRArray) -> dict[str, Any]:
        leaves = {name: leaf for name in _ARRAY_LEAVES if (leaf := getattr(weight, name)) is not None}
        return {"arrays": self._put(leaves), **{name: getattr(weight, name) for name in _ARRAY_SIZES}}

    def _get_weight(self, entry: Mapping[str, Any]) -> SpQRArray:
        assert self._journal is not None
        leaves = {name: jnp.asarray(leaf) for name, leaf in self._journal.get(entry["arrays"]).items()}
        out, inner = entry["shape"]
        sizes = {name: entry[name] for name in _ARRAY_SIZES} | {"shape": (out, inner)}
        return SpQRArray(**{**dict.fromkeys(_ARRAY_LEAVES), **leaves, **sizes})

    def save_tuning(self, done: int, arrays: Sequence[Any], result: dict[str, str]) -> None:
        self.save(phase="tune", tuning={"done": done, "arrays": self.put_arrays(arrays)}, result=result)

    def tuning_place(self) -> tuple[int, list[np.ndarray]] | None:
        """Steps of tuning that are done, and its arrays; None where it has not begun."""
        kept = self.entries.get("tuning")
        return None if kept is None else (kept["done"], self.get_arrays(kept["arrays"]))

    def layers(self) -> list[LayerReport]:
        """Reports of the weights in finished blocks."""
        return [LayerReport.from_json(layer) for layer in self.entries.get("layers", [])]

    def blocks(self) -> dict[str, str]:
        """Finished parts of the result."""
        return dict(self.entries.get("blocks", {}))


def layers_to_json(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layer) for layer in layers]
