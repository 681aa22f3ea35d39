"""Tokens a second, with rivals that take turns."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spqr_jax.generate import Generator

Rival = Callable[[Sequence[int], int], tuple[float, float]]
"""Reads a prompt and decodes some tokens; returns the seconds of each."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a rival was, in tokens per second: float64 [turns].

    Attributes:
      prefill: while it read the prompt.
      decode: after the first token.
    """

    prefill: np.ndarray
    decode: np.ndarray


def generating(generator: Generator) -> Rival:
    """A `Generator` as a rival; greedy, and no token ends the text."""

    def run(prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        made = generator([prompt], max_new_tokens=new_tokens, stop_tokens=())
        return made.prefill_seconds, (new_tokens - 1) / made.decode_tokens_per_second

    return run


def take_turns(
    rivals: dict[str, Rival],
    prompt: Sequence[int],
    new_tokens: int,
    turns: int,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Speed]:
    """Runs every rival once to warm up, then all in turn, so that none has the machine's better minutes.

    Args:
      rivals: by name.
      prompt: token ids.
      new_tokens: to decode in a turn, at least 2.
      turns: of each rival.
      progress: told whose turn is over.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for turn in range(turns + 1):
        for name, rival in rivals.items():
            taken = rival(prompt, new_tokens)
            if turn:
                seconds[name].append(taken)
            progress(name)
    speeds = {}
    for name, taken_by_turn in seconds.items():
        prefill, decode = np.array(taken_by_turn).T
        speeds[name] = Speed(len(prompt) / prefill, (new_tokens - 1) / decode)
    return speeds


def read_bandwidth(megabytes: int = 256, tries: int = 7) -> float:
    """GB/s at which this machine's processors together read memory, the best of some tries."""
    workers = os.cpu_count() or 1
    parts = [np.ones(megabytes * 250_000 // workers, np.float32) for _ in range(workers)]
    best = 0.0
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(tries):
            begun = time.perf_counter()
            list(pool.map(np.sum, parts))  # lets go of Python's lock
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - begun) / 1e9)
    return best
