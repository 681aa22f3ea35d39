"""Texts as trees of tokens, and trees side by side."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spqr_jax.evaluate.trees import Text, forests, plant

ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def texts_of(pairs):
    return [
        Text(i, (*context, *continuation[:-1]), tuple(continuation)) for i, (context, continuation) in enumerate(pairs)
    ]


def way(tree, node):
    """Tokens from the root to a node: of all nodes that it sees."""
    seen = [other for other in range(node + 1) if tree.ends[other] > node]
    assert tree.depths[seen].tolist() == list(range(len(seen)))
    return tree.tokens[seen].tolist()


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=12), st.integers(4, 40))
def test_a_node_sees_the_text_before_it(pairs, most):
    texts, answered = texts_of(pairs), []
    for tree in plant(texts, most):
        assert len(tree) <= most or len(tree.predicting) == 1
        for index, nodes, targets in tree.predicting:
            answered.append(index)
            assert tuple(targets) == texts[index].targets
            for place, node in enumerate(nodes):
                assert tuple(way(tree, node)) == texts[index].read[: texts[index].context + place]
    assert sorted(answered) == list(range(len(texts)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.sampled_from([32, 64, 200]))
def test_forests_hold_every_tree_once(lengths, tokens):
    rng = np.random.default_rng(0)
    trees = plant([Text(i, tuple(rng.integers(0, 10**6, n)), (1,)) for i, n in enumerate(lengths)], tokens)
    held = []
    for forest in forests(trees, tokens):
        assert len(forest.tokens) <= max(tokens, 64)
        for slot, tree in enumerate(forest.trees):
            held.append(tree.predicting[0][0])
            places = forest.places[slot, : len(tree)]
            assert forest.tokens[places].tolist() == tree.tokens.tolist()
            assert forest.depths[places].tolist() == tree.depths.tolist()
            np.testing.assert_array_equal(forest.back[places], slot * forest.places.shape[1] + np.arange(len(tree)))
            assert not forest.ends[slot, len(tree) :].any()
    assert sorted(held) == list(range(len(lengths)))


def test_many_trees_need_few_shapes_and_little_padding():
    lengths = np.random.default_rng(0).integers(60, 300, 3000)
    rng = np.random.default_rng(1)
    trees = plant([Text(i, tuple(rng.integers(0, 10**6, n)), (1,)) for i, n in enumerate(lengths)], 2048)
    filled = forests(trees, 2048)
    assert len({(forest.tokens.shape, forest.places.shape) for forest in filled}) <= 10
    assert sum(forest.nodes for forest in filled) > 0.98 * sum(forest.tokens.size for forest in filled)
    assert sum(forest.nodes for forest in filled) > 0.7 * sum(forest.places.size for forest in filled)
