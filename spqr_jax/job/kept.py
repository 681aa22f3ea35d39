"""Where quantizing is, saved at its safe points: after each block, and once a minute inside blocks and the head.

Finished blocks are on the disk at once. The text behind them, and what is half done inside a block, is saved once a
minute: a run that goes on takes the text through the blocks since.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from spqr_jax.config import SpQRConfig
from spqr_jax.events import Event, Events, Remark, SafePoint
from spqr_jax.job.block_solver import BlockPlace, BlockSolver, KeepPlace
from spqr_jax.job.pace import Pace
from spqr_jax.job.state import JobState, StateKeeper, layers_to_json
from spqr_jax.methods.report import Reporter
from spqr_jax.models.decoder import Block
from spqr_jax.output import readable_size
from spqr_jax.planning.ledger import Ledger
from spqr_jax.stream import sweep
from spqr_jax.stream.activations import Activations
from spqr_jax.stream.blocks import BlockSink, BlockSource
from spqr_jax.stream.hosts import ALONE, Together
from spqr_jax.stream.sums import SumsPlace

_SAVED_ACTIVATIONS = 1 << 30  # bytes beyond which activations are made again, not saved
DISK_SHARE = 0.1  # of the free space that activations, or the sums inside a block, may take
NO_ROOM = "they would take more than a tenth of the free disk space"


class ResultSink(BlockSink, Protocol):
    """Takes a quantized model's parts, and what is kept with them."""

    def record(self, path: str, stats: dict[str, float]) -> None:
        """Keeps what quantizing a weight did; before its block, or the outer weights, are put."""
        ...

    def describe(self, quantization: SpQRConfig) -> None:
        """Keeps how the model was quantized; before the outer weights are put."""
        ...


class Store(ResultSink, BlockSource, Protocol):
    """A sink that can be read back, also by a later run: a growing checkpoint."""

    def digests(self) -> dict[str, str]: ...

    def adopt(self, digests: Mapping[Any, str]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a job that can go on after a stop needs.

    Attributes:
      journal: keeps its state.
      blocks: takes quantized blocks as they are finished: the sink itself, or with tuning a folder beside it.
      result: the sink.
      folder: of the run; how much room there is decides what is saved.
      together: the processes that do the job. The first one has the folder, and decides for all.
    """

    journal: StateKeeper
    blocks: Store
    result: Store
    folder: Path
    together: Together = ALONE

    def has_room(self, num_bytes: float) -> bool:
        """Whether arrays are small beside the free space. The journal may hold three versions of them at a time."""
        return self.together.from_first(lambda: num_bytes <= DISK_SHARE * shutil.disk_usage(self.folder).free)


@dataclasses.dataclass
class QuantizingKeeper:
    """Saves where quantizing is, and brings a run that goes on to where an earlier one was.

    Attributes:
      kept, state: of the job.
      activations: the text; None without calibration.
      solver: of the blocks.
      report: told of each weight.
      ledger: of a plan, or None.
      events: told of each safe point.
      spilled: whether activations are on the disk because memory is short.
    """

    kept: Kept
    state: JobState
    activations: Activations | None
    solver: BlockSolver
    report: Reporter
    ledger: Ledger | None
    events: Events
    spilled: bool = False

    def __post_init__(self) -> None:
        self._saves_streams = self._choose_streams()
        self._sums_are_too_large = False
        self._pace_of_streams, self._pace_inside = Pace(self.kept.together), Pace()

    def go_on(self, source: BlockSource, reads_end: bool) -> tuple[int, BlockPlace | None]:
        """Brings everything to where an earlier run was.

        Args:
          source: the dense model.
          reads_end: whether the head reads the text behind all blocks.

        Returns:
          The first block that is left, or the number of blocks where only the head is, and the place inside.
        """
        finished = sum(part.isdigit() for part in self.state.blocks())
        if self.ledger is not None and (spent := self.state.entries.get("ledger")) is not None:
            self.ledger.restore(spent)
        if self.activations is not None and (reads_end or finished < source.config.num_layers):
            self._bring_text(source, finished)
        return finished, self.state.place()

    def _bring_text(self, source: BlockSource, finished: int) -> None:
        """Brings the text behind the finished blocks: from where it was saved, through the blocks since."""
        saved = self.state.entries.get("activations", {"blocks": 0, "streams": []})
        for stream, digest in zip(self._streams(), saved["streams"], strict=False):
            stream.restore(self.state.get_arrays(digest))

        def replay(index: int, block: Block) -> None:
            self.solver.replay(self.activations, block, self.kept.blocks.block(index))
            if self._saves_streams:
                self._pace_of_streams.save_if_due(lambda: self.state.save(activations=self._put_text(index + 1)))
            self.events(Event("reading", index + 1, finished, f"block {index} again", SafePoint()))

        sweep.forward(source, replay, first=saved["blocks"], end=finished)

    def after_block(self, index: int, last: bool) -> None:
        """A block is on the disk: saves this, and the text behind it if it is time.

        Args:
          index: of the block.
          last: nothing reads the text behind it.
        """
        if last:
            self.activations = None  # the head, the largest matrix, needs their memory

        def save_streams() -> None:
            self._save(activations=self._put_text(index + 1), partial=None)

        if last or not self._saves_streams:
            self._save(partial=None)
            self._tell(f"block {index}", None)
        elif self._pace_of_streams.save_if_due(save_streams):
            self._tell(f"block {index}", None)
        else:
            self._save(partial=None)
            self._tell(f"block {index}", save_streams)

    def after_head(self, phase: str) -> None:
        """The outer weights are on the disk: saves this, and the phase that comes next, in one step."""
        self._save(phase, activations=None, partial=None)

    def inside(self, index: int) -> KeepPlace | None:
        """What saves places inside a block, or inside the head; None where none can be saved."""
        if self.kept.together.is_shared:  # all would have to agree on each moment, and gather the sums
            return None

        def keep(place: BlockPlace) -> None:
            def save() -> None:
                self._save(partial=self.state.put_place(self._with_room(place)))

            is_saved = self._pace_inside.save_if_due(save)
            self._tell(f"inside block {index}", None if is_saved else save)

        return keep

    def inside_head(self, sums: SumsPlace) -> None:
        """Saves a place inside the head's Hessian, if it is time."""
        if (keep := self.inside(-1)) is not None:
            keep(BlockPlace(sums))

    # ---- helpers ----------------------------------------------------------------------------

    def _save(self, phase: str = "blocks", **changes: Any) -> None:
        self.state.save(
            phase=phase,
            blocks=self.kept.blocks.digests(),
            layers=layers_to_json(self.report.layers),
            ledger=None if self.ledger is None else self.ledger.state(),
            **changes,
        )

    def _put_text(self, blocks: int) -> dict[str, Any]:
        """Saves the text behind so many blocks, and gives the entry ``activations``."""
        return {
            "blocks": blocks,
            "streams": [self.state.put_arrays(stream.residuals()) for stream in self._streams()],
        }

    def _tell(self, note: str, unsaved: Callable[[], None] | None) -> None:
        """A safe point: `unsaved` saves what is not saved yet."""
        detail = SafePoint() if unsaved is None else SafePoint(unsaved)
        self.events(Event("quantizing", len(self.report.layers), self.report.total, note, detail))

    def _streams(self) -> list[Activations]:
        return [] if self.activations is None else [self.activations, *(self.solver.streams or ())]

    def _choose_streams(self) -> bool:
        """Whether activations are small enough to be saved after each block; says so."""
        if self.activations is None or self.solver.streams is None:
            return False
        size = sum(stream.stream_bytes for stream in self._streams())
        saves = not self.spilled and size <= _SAVED_ACTIVATIONS and self.kept.has_room(size)
        how = "saved once a minute" if saves else "not saved: a run that goes on makes them again from its blocks"
        self._remark(f"activations ({readable_size(size)}) are {how}")
        return saves

    def _with_room(self, place: BlockPlace) -> BlockPlace:
        """The place without its sums where the disk is too small for them; says so once."""
        if self.kept.has_room(place.sums.nbytes):
            return place
        if not self._sums_are_too_large:
            self._sums_are_too_large = True
            size = readable_size(place.sums.nbytes)
            self._remark(f"Hessians ({size}) are not saved: {NO_ROOM}")
        return dataclasses.replace(place, sums=SumsPlace(place.sums.stage, place.sums.part))

    def _remark(self, text: str) -> None:
        self.events(Event("quantizing", 0, 0, detail=Remark(text)))
