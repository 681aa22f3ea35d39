"""Scores of continuations, with and without shared contexts, against the whole text's logits."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_files import VARIANTS, torch_config

from spqr_jax import DataError, SpQRConfig, forward, quantize
from spqr_jax.evaluate import continuations
from spqr_jax.evaluate.continuations import continuation_scores
from spqr_jax.models.families import family_of_hf
from spqr_jax.models.products import plain_linear
from spqr_jax.models.weights import random_decoder
from spqr_jax.stream.stages import rounded_linear

whole_text = jax.jit(forward)


def expected(model, context, continuation):
    """From the logits of the whole text, padded at its end so that all texts share a program."""
    whole, length = [*context, *continuation][-(model.config.max_positions + 1) :], model.config.max_positions
    tokens = np.pad(np.array(whole[:-1], np.int32), (0, length + 1 - len(whole)))
    scores = np.asarray(whole_text(model, jnp.asarray(tokens[None])), np.float64)[0]
    scores = scores[len(whole) - 1 - len(continuation) : len(whole) - 1]
    top = scores.max(-1, keepdims=True)
    log_p = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.array(continuation)[:, None], -1)
    return picked.sum(), bool(np.all(scores.argmax(-1) == continuation))


def check(model, requests, **options):
    found = continuation_scores(model, requests, **options)
    for score, (context, continuation) in zip(found, requests, strict=True):
        log_p, greedy = expected(model, context, continuation)
        assert score.log_probability == pytest.approx(log_p, abs=1e-4)
        assert score.greedy == greedy


def some_requests(rng, vocab=256):
    def draw(count):
        return rng.integers(3, vocab, count).tolist()

    shared = [draw(n) for n in (1, 2, 30, 30, 60)]  # a context of one token has nothing to share
    choices = [(context, draw(n)) for context in shared for n in (1, 3, 16)]
    return [*choices, (draw(50), draw(1))]


@pytest.mark.parametrize("batch_tokens", [200, 100000])
def test_scores_are_those_of_the_whole_text(tiny_model, batch_tokens):
    requests = some_requests(np.random.default_rng(0))
    np.random.default_rng(1).shuffle(order := list(range(len(requests))))
    check(tiny_model, [requests[index] for index in order], batch_tokens=batch_tokens)


def test_rounded_products_move_scores_a_little(tiny_model):
    requests = some_requests(np.random.default_rng(0))
    exact, rounded = (
        np.array([s.log_probability for s in continuation_scores(tiny_model, requests, linear=linear)])
        for linear in (plain_linear, rounded_linear)
    )
    assert 0 < np.abs(rounded - exact).max() < 0.01 * np.abs(exact).max()


def test_greedy_continuations_are_known(tiny_model):
    context = [5, 6, 7]
    text = list(context)
    for _ in range(4):
        padded = jnp.asarray([[*text, *[0] * (128 - len(text))]], jnp.int32)
        text.append(int(np.argmax(whole_text(tiny_model, padded)[0, len(text) - 1])))
    right, wrong = text[3:], [*text[3:6], (text[6] + 1) % 256]
    found = continuation_scores(tiny_model, [(context, right), (context, wrong)])
    assert [score.greedy for score in found] == [True, False]


@pytest.mark.parametrize("variant", ["gemma3", "mistral", "opt", "mixtral"])
def test_windows_learned_positions_and_experts(variant):
    assert variant in VARIANTS
    values = torch_config(variant).to_dict()
    model = random_decoder(family_of_hf(values).from_hf(values), seed=0)
    check(model, some_requests(np.random.default_rng(0)), batch_tokens=100000)


def test_a_long_context_loses_its_beginning(tiny_model):
    rng = np.random.default_rng(0)
    context = rng.integers(3, 256, 200).tolist()
    check(tiny_model, [(context, [9, 10]), (context, [11]), ([4], rng.integers(3, 256, 128).tolist())])


def test_a_shared_context_is_read_once(tiny_model):
    """Four continuations of one context: 36 tokens, its last one, and one more for each continuation."""
    told = []
    context = list(range(3, 40))
    continuation_scores(tiny_model, [(context, [n, n]) for n in range(4)], events=told.append)
    assert told[-1].total == 37 + 4


def test_progress_counts_tokens(tiny_model):
    told = []
    continuation_scores(tiny_model, some_requests(np.random.default_rng(0)), batch_tokens=200, events=told.append)
    assert len(told) > 2
    assert all(before.done <= after.done for before, after in itertools.pairwise(told))
    assert told[-1].done == told[-1].total
    assert told[-1].note == "16 of 16 continuations"


def test_scores_come_group_by_group(tiny_model, monkeypatch):
    """Whoever stops the work keeps the groups that were told of before."""
    monkeypatch.setattr(continuations, "groups", lambda batches, *_: [[batch] for batch in batches])
    requests, told = some_requests(np.random.default_rng(0)), {}

    def stop_after_two(scores):
        told.update(scores)
        if len(told) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continuation_scores(tiny_model, requests, batch_tokens=64, scored=stop_after_two)
    assert 2 < len(told) < len(requests)
    whole = continuation_scores(tiny_model, requests)
    for index, score in told.items():
        assert score.log_probability == pytest.approx(whole[index].log_probability, abs=1e-5)


def test_many_continuations_of_one_token(tiny_model):
    """More predictions at one place than a row of the output head has, of one token each."""
    check(tiny_model, [([5, 6, 7], [token]) for token in (9, 8, 9, 10, 11, 12, 13)])


def test_quantized_weights_are_used(tiny_model):
    small = quantize(tiny_model, None, SpQRConfig.rtn(3))
    dense = jax.tree.map(
        lambda leaf: leaf.to_dense() if hasattr(leaf, "to_dense") else leaf,
        small,
        is_leaf=lambda leaf: hasattr(leaf, "to_dense"),
    )
    requests = some_requests(np.random.default_rng(0))[:4]
    for a, b in zip(continuation_scores(small, requests), continuation_scores(dense, requests), strict=True):
        assert a.log_probability == pytest.approx(b.log_probability, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (([], [1]), "0 tokens of context"),
        (([1], []), "0 of continuation"),
        (([1], [1] * 129), "more than the model's context of 128"),
        (([1], [256]), "vocabulary has 256"),
    ],
)
def test_what_cannot_be_scored_says_why(tiny_model, request_, says):
    with pytest.raises(DataError, match=says):
        continuation_scores(tiny_model, [request_])
