from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax import DataError, Generator, Sampling, SpQRConfig, SpQRError, forward, generate, quantize
from spqr_jax._compat import compile_as_graph
from spqr_jax.errors import NotFiniteError
from spqr_jax.sampling import sample
from spqr_jax.speed import take_turns

compiled_forward = jax.jit(forward)


def greedy_without_cache(model, prompt, count):
    """What comes after a token has no say in its logits, so one length serves all."""
    tokens = list(prompt)
    for _ in range(count):
        whole = np.zeros((1, 32), np.int32)
        whole[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(compiled_forward(model, whole)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_the_cache_changes_nothing(tiny_model):
    prompts = [[5, 6, 7], list(range(10, 31)), [9]]
    result = generate(tiny_model, prompts, max_new_tokens=8, stop_tokens=())
    assert result.prompt_tokens == [3, 21, 1]
    for prompt, made in zip(prompts, result.tokens, strict=True):
        assert made == greedy_without_cache(tiny_model, prompt, 8)


def test_quantized_models_generate_what_they_dequantize_to(tiny_model, tiny_batches):
    quantized = quantize(tiny_model, tiny_batches, SpQRConfig())
    assert generate(quantized, [[1, 5, 9]], max_new_tokens=6, stop_tokens=()).tokens == [
        greedy_without_cache(quantized, [1, 5, 9], 6)
    ]


def test_a_phrase_ends_its_own_text_and_stays(tiny_model):
    prompts = [[5, 6, 7], [50, 51]]
    free = generate(tiny_model, prompts, max_new_tokens=10, stop_tokens=()).tokens
    phrase = free[0][2:4]
    cut = generate(
        tiny_model, prompts, max_new_tokens=10, stop_tokens=(), stop_when=lambda tokens: tokens[-2:] == phrase
    )
    assert cut.tokens == [free[0][:4], free[1]]


def test_stop_tokens_end_a_text_and_are_left_out(tiny_model):
    free = generate(tiny_model, [[5, 6, 7], [50, 51]], max_new_tokens=10, stop_tokens=())
    stop = free.tokens[0][4]
    cut = generate(tiny_model, [[5, 6, 7], [50, 51]], max_new_tokens=10, stop_tokens=[stop])
    for before, after in zip(free.tokens, cut.tokens, strict=True):
        assert after == before[: before.index(stop)] if stop in before else after == before


def test_seeds_repeat_and_differ(tiny_model):
    def run(seed):
        return generate(
            tiny_model, [[5, 6, 7]], max_new_tokens=12, sampling=Sampling(1.5), seed=seed, stop_tokens=()
        ).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_tokens_come_as_they_are_made(tiny_model):
    seen = []
    result = generate(
        tiny_model,
        [[5], [6, 7]],
        max_new_tokens=4,
        stop_tokens=(),
        on_token=lambda row, token: seen.append((row, token)),
    )
    assert [t for r, t in seen if r == 0] == result.tokens[0]
    assert [r for r, _ in seen[:2]] == [0, 1]
    assert result.decode_tokens_per_second > 0


def test_a_generator_compiles_once_for_prompts_of_similar_length(tiny_model):
    generator = Generator(tiny_model)
    first = generator([[5, 6, 7]], max_new_tokens=4, stop_tokens=())
    again = generator([[5, 6, 7, 8, 9]], max_new_tokens=4, stop_tokens=())
    assert first.tokens == generate(tiny_model, [[5, 6, 7]], max_new_tokens=4, stop_tokens=()).tokens
    assert len(again.tokens[0]) == 4
    assert len(generator._programs) == 2  # one prefill, one decode


def test_the_context_ends_the_text(tiny_model):
    prompt = list(range(3, 123))  # 120 of 128
    result = generate(tiny_model, [prompt], max_new_tokens=50, stop_tokens=())
    assert len(result.tokens[0]) == 8
    assert result.ended == ["context"]


def test_it_says_why_a_text_ended(tiny_model):
    free = generate(tiny_model, [[5, 6, 7], [50, 51]], max_new_tokens=10, stop_tokens=())
    assert free.ended == ["length", "length"]
    stop = next(token for token in free.tokens[0] if token not in free.tokens[1])
    assert generate(tiny_model, [[5, 6, 7], [50, 51]], max_new_tokens=10, stop_tokens=[stop]).ended == [
        "stop",
        "length",
    ]
    asked = generate(tiny_model, [[5, 6, 7]], max_new_tokens=10, stop_tokens=(), stop_when=lambda made: len(made) == 3)
    assert asked.ended == ["stop"]
    exactly = generate(tiny_model, [list(range(3, 123))], max_new_tokens=8, stop_tokens=())
    assert exactly.ended == ["length"]  # as many as were asked for, though the context is full, too


def overflowing(model, factor=1e4):
    """In float16, with an MLP in the last block whose output is beyond it."""
    wide = {name: model.layers[-1][name] * factor for name in ("up_proj", "down_proj")}
    layers = (*model.layers[:-1], model.layers[-1].replace(wide))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float16), dataclasses.replace(model, layers=layers))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=4)], ids=str)
def test_scores_that_are_not_finite_are_an_error(tiny_model, sampling):
    with pytest.raises(NotFiniteError, match=r"next token of prompt 0 is not a number.*from block 1 of 2.*bfloat16"):
        generate(overflowing(tiny_model), [[5, 6, 7]], max_new_tokens=4, sampling=sampling)


def test_scores_that_end_being_finite_are_found_where_they_do(tiny_model):
    """One token's embedding is not a number: the text up to it is made, and no row but its own is to blame."""
    prompts = [[50, 51], [5, 6, 7]]
    free = generate(tiny_model, prompts, max_new_tokens=6, stop_tokens=())
    bad = next(token for token in free.tokens[1] if token not in [*free.tokens[0], *prompts[0], *prompts[1]])
    embedding = tiny_model.outer.embed_tokens.at[bad].set(jnp.nan)
    broken = dataclasses.replace(tiny_model, outer=dataclasses.replace(tiny_model.outer, embed_tokens=embedding))
    shown = []
    with pytest.raises(NotFiniteError, match="next token of prompt 1 is not a number: the embedding"):
        generate(broken, prompts, max_new_tokens=6, stop_tokens=(), on_token=lambda row, token: shown.append(token))
    assert bad in shown
    assert generate(broken, prompts, max_new_tokens=6, stop_tokens=[bad]).ended[1] == "stop"  # it is never read


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "at least one prompt"),
        ([[]], "at least one prompt"),
        ([[1] * 128], "no room in the model's context of 128"),
        ([[1, 999]], "vocabulary has 256"),
        ([[-1]], "vocabulary has 256"),
        (["a text"], "lists of integer token ids, got ..a text"),
        ([[1.5]], "lists of integer token ids"),
        ([[None]], "lists of integer token ids"),
        ([1, 2], "lists of integer token ids"),
        (None, "lists of integer token ids"),
    ],
)
def test_unusable_prompts_say_why(tiny_model, prompts, says):
    with pytest.raises(DataError, match=says):
        generate(tiny_model, prompts)


# ---- sampling ---------------------------------------------------------------------------

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


def frequencies(sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.vmap(lambda key, draw: sample(LOGITS, key, draw)[0], in_axes=(0, None))(keys, sampling.draw(4))
    return np.bincount(np.asarray(drawn), minlength=4) / count


def test_temperature_zero_is_greedy():
    np.testing.assert_array_equal(frequencies(Sampling(0.0), 10), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (Sampling(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(1.0, top_p=0.81), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=3), np.array([0.5, 0.3, 0.15, 0]) / 0.95),  # ranked with a fourth, which is left out
        (Sampling(1.0, top_k=100), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_k=10**12), [0.5, 0.3, 0.15, 0.05]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling, expected):
    # four standard errors of a frequency over 4000 draws
    np.testing.assert_allclose(frequencies(sampling), expected, atol=4 * math.sqrt(0.25 / 4000))


def test_other_values_are_no_other_program():
    """A server's requests differ in them, and a program takes seconds to compile."""

    def structure(sampling):
        return jax.tree.structure(sampling.draw(4000))

    assert structure(Sampling(0.7, top_k=40, top_p=0.9)) == structure(Sampling(1.3, top_k=50))
    assert structure(Sampling(0.7, top_p=0.9)) == structure(Sampling(1.3, top_p=0.5))
    assert structure(Sampling(0.7)) == structure(Sampling(1.0))
    assert len({structure(s) for s in (Sampling(), Sampling(1.0), Sampling(1.0, top_p=0.5))}) == 3


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(SpQRError):
        Sampling(**bad)


def test_sampling_is_static():
    assert hash(Sampling()) == hash(dataclasses.replace(Sampling()))


def test_rivals_take_turns():
    calls = []

    def rival(name, prefill, decode):
        def run(prompt, new_tokens):
            calls.append((name, len(prompt), new_tokens))
            return prefill, decode

        return run

    told = []
    speeds = take_turns({"a": rival("a", 0.5, 2.0), "b": rival("b", 1.0, 1.0)}, [1, 2, 3, 4], 5, 2, told.append)
    assert calls == [("a", 4, 5), ("b", 4, 5)] * 3  # the first turn warms up
    assert told == ["a", "b"] * 3
    np.testing.assert_allclose(speeds["a"].prefill, [8.0, 8.0])
    np.testing.assert_allclose(speeds["a"].decode, [2.0, 2.0])
    np.testing.assert_allclose(speeds["b"].decode, [4.0, 4.0])


def test_programs_for_a_gpu_are_compiled_as_graphs(monkeypatch):
    """Loops become part of a CUDA graph, unless the user says otherwise or XLA does not know the option."""
    options = []

    class Lowered:
        def compile(self, compiler_options=None):
            options.append(compiler_options)
            if compiler_options and self.refuses:
                raise jax.errors.JaxRuntimeError(f"setting {next(iter(compiler_options))}: {self.refuses}")
            return "program"

    lowered = Lowered()
    lowered.refuses = ""
    assert compile_as_graph(lowered) == "program"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compile_as_graph(lowered) == "program"
    lowered.refuses = "not a valid enum value"
    assert compile_as_graph(lowered) == "program"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    assert compile_as_graph(lowered) == "program"
    graph = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"}
    assert options == [None, graph, graph, None, None]
