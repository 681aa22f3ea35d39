"""What a job has done so far, kept in a journal where there is one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from spqr_jax.methods.report import LayerReport
from spqr_jax.planning.budget import Measured, Plan
from spqr_jax.planning.record import curve_from_json, curve_to_json, plan_from_json, plan_to_json
from spqr_jax.planning.sensitivity import BackwardPlace


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
    `Measured` holds). After it ``plan``, ``blocks`` (part of the result -> digest), ``layers`` (reports), ``ledger``
    and ``activations`` (digests of streams, or "remake"). In phase tune ``tuning`` (what `TuningPlace` holds) and
    ``result`` (digests of trained parts).

    Args:
      journal: keeps it; None to keep nothing.
    """

    def __init__(self, journal: StateKeeper | None) -> None:
        self._journal = journal
        self._begun = self._saved = time.perf_counter()
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

    @property
    def since_saved(self) -> float:
        """Seconds since the last save, or since the beginning."""
        return time.perf_counter() - self._saved

    def save(self, **changes: Any) -> None:
        """Changes entries and makes them safe; an entry that is None is dropped."""
        self.entries |= {**changes, "seconds": self.seconds}
        self.entries = {name: value for name, value in self.entries.items() if value is not None}
        if self._journal is not None:
            self._journal.commit(self.entries)
        self._saved = time.perf_counter()

    # ---- arrays and large JSON, in parts of the journal -------------------------------------

    def put_arrays(self, arrays: Iterable[Any]) -> str:
        assert self._journal is not None
        return self._journal.put({f"{index:06d}": np.asarray(array) for index, array in enumerate(arrays)})

    def get_arrays(self, digest: str) -> list[np.ndarray]:
        assert self._journal is not None
        return [array for _, array in sorted(self._journal.get(digest).items())]

    def _put_json(self, value: Any) -> str:
        return self.put_arrays([np.frombuffer(json.dumps(value).encode(), np.uint8)])

    def _get_json(self, digest: str) -> Any:
        (text,) = self.get_arrays(digest)
        return json.loads(text.tobytes())

    # ---- what a job saves -------------------------------------------------------------------

    def save_measured(self, measured: Measured) -> None:
        place = {"index": measured.place.index, "gradients": self.put_arrays(measured.place.gradients)}
        curves = self._put_json([curve_to_json(curve) for curve in measured.curves])
        self.save(phase="plan", measured={"curves": curves, **place})

    def measured(self) -> Measured | None:
        """What the measuring pass has come to; None where it has not begun."""
        if (kept := self.entries.get("measured")) is None:
            return None
        curves = tuple(curve_from_json(curve) for curve in self._get_json(kept["curves"]))
        return Measured(curves, BackwardPlace(kept["index"], tuple(self.get_arrays(kept["gradients"]))))

    def put_plan(self, plan: Plan) -> str | None:
        return self._put_json(plan_to_json(plan)) if self.is_kept else None

    def plan(self) -> Plan | None:
        """The plan of a run that has made one."""
        digest = self.entries.get("plan")
        return None if digest is None else plan_from_json(self._get_json(digest))

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
