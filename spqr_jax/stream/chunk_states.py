"""The states of a text's chunks. Large ones need not be held: they are made again each time they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spqr_jax.models.decoder import State
from spqr_jax.stream.spill import SpilledStates

Step = Callable[[State], State]
"""Takes one chunk through a stage."""


class ChunkStates:
    """A list of states, of which some may be one step behind what reading them gives.

    Args:
      held: the states in memory or on disk.
    """

    def __init__(self, held: list[State] | SpilledStates) -> None:
        self._held = held
        self._postponed: dict[int, Step] = {}

    def append(self, state: State) -> None:
        self._held.append(state)

    def postpone(self, index: int, step: Step) -> None:
        """From now on a state is what `step` makes of it, which is done each time that it is read."""
        assert index not in self._postponed, "one step at most"
        self._postponed[index] = step

    def is_postponed(self, index: int) -> bool:
        return index in self._postponed

    def copy(self) -> ChunkStates:
        twin = ChunkStates(self._held.copy())
        twin._postponed = dict(self._postponed)
        return twin

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> State:
        return self._brought_up(index, self._held[index])

    def __setitem__(self, index: int, state: State) -> None:
        self._held[index] = state
        self._postponed.pop(index, None)

    def __iter__(self) -> Iterator[State]:
        for index, state in enumerate(self._held):
            yield self._brought_up(index, state)

    def _brought_up(self, index: int, state: State) -> State:
        step = self._postponed.get(index)
        if step is None:
            return state
        return step(state)
