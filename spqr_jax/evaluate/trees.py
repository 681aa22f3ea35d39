"""Texts that begin alike, as trees of tokens: what several texts share is read once.

A tree's nodes are its tokens, depth first. A token sees the tokens on the way from the root to itself: those before it
whose part of the tree has not ended yet.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from spqr_jax.layout import round_up

_STEPS = ((32, 8), (64, 16), (256, 32), (1024, 64), (float("inf"), 256))
"""Up to which size of a tree, sizes are rounded up to a multiple of what: few sizes are compiled."""
_SPARE = 1.25  # trees of a batch may be smaller than the largest: so many more slots than fit


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to read.

    Attributes:
      index: of the request.
      read: token ids, int each: the context, and the continuation without its last token.
      targets: the continuation. The last `len(targets)` tokens of `read` predict these.
    """

    index: int
    read: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def context(self) -> int:
        """Tokens of the context."""
        return len(self.read) + 1 - len(self.targets)


@dataclasses.dataclass(frozen=True)
class Tree:
    """Texts that begin alike.

    Attributes:
      tokens, depths: int32 [nodes], depth first.
      ends: int32 [nodes], the first node behind the part of the tree below a node.
      predicting: of each text, its index, the nodes int32 [targets] that predict, and the targets int32 [targets].
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    predicting: list[tuple[int, np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return len(self.tokens)


def plant(texts: Iterable[Text], most: int) -> list[Tree]:
    """Trees of texts.

    Texts go into one tree if they share a whole context, or half of the shorter text. A tree has at most `most` nodes,
    unless a single text is longer.
    """
    trees: list[Tree] = []
    growing: list[tuple[Text, int]] = []  # a text, and the tokens that it shares with the one before
    size = 0
    for text in sorted(texts, key=lambda text: (text.read, text.index)):
        shared = _shared(growing[-1][0], text) if growing else 0
        if growing and (not shared or size + len(text.read) - shared > most):
            trees.append(_tree(growing))
            growing, size, shared = [], 0, 0
        growing.append((text, shared))
        size += len(text.read) - shared
    if growing:
        trees.append(_tree(growing))
    return trees


def _shared(before: Text, text: Text) -> int:
    """Tokens that two texts begin with alike; 0 if they are too few for one tree."""
    shortest = min(len(before.read), len(text.read))
    shared = next((i for i in range(shortest) if before.read[i] != text.read[i]), shortest)
    return shared if 2 * shared >= shortest or shared >= min(before.context, text.context) else 0


def _tree(texts: Sequence[tuple[Text, int]]) -> Tree:
    nodes = sum(len(text.read) - shared for text, shared in texts)
    tokens, depths, ends = (np.empty(nodes, np.int32) for _ in range(3))
    path = np.empty(max(len(text.read) for text, _ in texts), np.int32)  # nodes from the root to a text's last token
    predicting, count, length = [], 0, 0
    for text, shared in texts:
        ends[path[shared:length]] = count
        length = len(text.read)
        new = slice(count, count + length - shared)
        tokens[new], depths[new] = text.read[shared:], np.arange(shared, length)
        path[shared:length] = np.arange(new.start, new.stop)
        count = new.stop
        nodes_before = path[length - len(text.targets) : length].copy()
        predicting.append((text.index, nodes_before, np.array(text.targets, np.int32)))
    ends[path[:length]] = count
    return Tree(tokens, depths, ends, predicting)


@dataclasses.dataclass(frozen=True)
class Forest:
    """Trees that are read together: their tokens stand side by side, with padding at the end only.

    Attributes:
      trees: from left to right.
      tokens, depths: int32 [tokens].
      places: int32 [slots, size], where each node of a tree stands among the tokens; the last token for none.
      back: int32 [tokens], where a token stands among the nodes of all slots.
      ends: int32 [slots, size], as in `Tree`; 0 where there is no node.
    """

    trees: list[Tree]
    tokens: np.ndarray
    depths: np.ndarray
    places: np.ndarray
    back: np.ndarray
    ends: np.ndarray

    @property
    def nodes(self) -> int:
        """Tokens that are no padding."""
        return sum(map(len, self.trees))


def forests(trees: Sequence[Tree], tokens: int) -> list[Forest]:
    """Trees of similar size together, about `tokens` tokens at a time.

    A forest has `tokens` tokens, or those of one larger tree. Its number of slots depends on the size of its largest
    tree. Only the last forest is smaller.
    """
    waiting = sorted(trees, key=len)
    sizes = [len(tree) for tree in waiting]
    result = []
    while waiting:
        largest = _rounded(sizes[-1])
        room = max(tokens, largest)
        slots = int(np.ceil(_SPARE * room / largest))
        taken: list[Tree] = []
        left = room
        while len(taken) < slots and (position := bisect.bisect_right(sizes, left)):
            taken.append(waiting.pop(position - 1))
            left -= sizes.pop(position - 1)
        if not waiting:  # the last forest is as small as it can be
            room = min(room, max(_power_of_two(room - left), largest))
            slots = min(slots, _power_of_two(len(taken)))
        result.append(_forest(taken, room, slots, largest))
    return result


def _forest(trees: list[Tree], room: int, slots: int, size: int) -> Forest:
    tokens, depths, back = (np.zeros(room, np.int32) for _ in range(3))
    places, ends = np.full((slots, size), room - 1, np.int32), np.zeros((slots, size), np.int32)
    first = 0
    for slot, tree in enumerate(trees):
        here = slice(first, first + len(tree))
        tokens[here], depths[here] = tree.tokens, tree.depths
        places[slot, : len(tree)] = np.arange(here.start, here.stop)
        back[here] = slot * size + np.arange(len(tree))
        ends[slot, : len(tree)] = tree.ends
        first = here.stop
    return Forest(trees, tokens, depths, places, back, ends)


def _rounded(size: int) -> int:
    return round_up(size, next(step for top, step in _STEPS if size <= top))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
