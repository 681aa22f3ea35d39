"""Operations and bytes of a forecast, against sums worked out here by hand for a tiny model."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from support.problems import TINY

from spqr_jax import SpQRConfig
from spqr_jax.forecast import Text, Work, measuring, memory, memory_plan, passes, quantizing
from spqr_jax.models import prompt_attention
from spqr_jax.models.config import BlockKind
from spqr_jax.stream.activations import HELD_SHARE
from spqr_jax.stream.outer import OuterMemory
from spqr_jax.tune.config import TuneConfig

# TINY: 2 blocks of hidden 64, MLP 96, 4 heads and 2 key-value heads of 16; vocabulary 256, head not tied.
Q, K, V, OUT = 64 * 64, 32 * 64, 32 * 64, 64 * 64
GATE, UP, DOWN = 96 * 64, 96 * 64, 64 * 96
BLOCK = Q + K + V + OUT + GATE + UP + DOWN
HEAD = 256 * 64
TEXT = Text(3, 128)  # 384 tokens; attention takes each window in one go


def test_a_forward_pass_is_counted_matrix_by_matrix():
    passed = passes.forward_pass(TINY, TEXT)
    assert passed.products == 2 * BLOCK * 384 * 2
    # All 128 queries of a window against all 128 keys: q kᵀ and its product with v, two operations a number each.
    assert passed.attention == 2 * 3 * (2 * 2 * (4 * 16) * 128 * 128)
    assert passes.head_operations(TINY, 384) == 2 * HEAD * 384
    assert passes.model_weights(TINY) == 2 * BLOCK + 2 * HEAD


def test_attention_skips_keys_that_no_query_sees():
    assert passes.QUERY_CHUNK == prompt_attention._QUERY_CHUNK
    # Two chunks of queries: 128 keys, then 256.
    full = passes.attention_operations(TINY, local=False, text=Text(1, 256))
    assert full == 4 * 64 * (128 * 128 + 128 * 256)
    local = dataclasses.replace(TINY, sliding_window=32, local_layers=(0,))
    # The second chunk's first query sees 31 keys before it.
    assert passes.attention_operations(local, local=True, text=Text(1, 256)) == 4 * 64 * (128 * 128 + 128 * (128 + 31))


def test_hessians_are_one_for_each_input():
    # q, k, v read one input; o, gate and up, down read three more. Widths below a panel are summed whole.
    assert [width for _, width in passes.input_groups(TINY, BlockKind())] == [64, 64, 64, 96]
    assert passes.hessian_operations(TINY, 384) == 2 * 2 * 384 * (3 * 64**2 + 96**2)
    # 512 columns are two panels of 256: the second needs half of the columns only.
    assert passes.gram_operations(512, 10) == 2 * 10 * (256 * 512 + 256 * 256)


def test_calibration_and_solver():
    work = quantizing.quantize_work(TINY, SpQRConfig(), TEXT)
    assert work.bfloat16 == 2 * BLOCK * 384 * 2
    assert work.dense == 0
    assert work.factor == pytest.approx(4 / 3 * 2 * (3 * 64**3 + 96**3))
    # Stacks of q, k, v (128 rows), o (64, solved as 128), gate and up (192), down (64, solved as 128).
    visits = 2 * (128 * 64 + 128 * 64 + 192 * 64 + 128 * 96)
    assert work.searched == visits
    assert work.float32 == 2 * (64 * (128 + 128 + 192) * 64 + 96 * 128 * 96)


@pytest.mark.parametrize(
    ("config", "kind", "times"),
    [
        (SpQRConfig(drift_correction=0.25), "bfloat16", 2),
        (SpQRConfig(sequential=False), "bfloat16", 2),
        (SpQRConfig(calibration_dtype="float32"), "dense", 1),
        (SpQRConfig.rtn(), "bfloat16", 0),
    ],
)
def test_passes_of_calibration(config, kind, times):
    assert getattr(quantizing.quantize_work(TINY, config, TEXT), kind) == times * 2 * BLOCK * 384 * 2


def test_a_target_measures_first():
    text = Text(40, 128)
    assert quantizing.plan_text(text) == Text(16, 128)  # 2048 tokens in all
    plan = quantizing.plan_work(TINY, SpQRConfig(target_bits=4.3), text)
    assert plan.bfloat16 == 3 * (2 * BLOCK * 2 + 2 * HEAD) * 2048  # forwards, twice backwards; the head thrice
    assert plan.attention == 5 * passes.forward_pass(TINY, Text(16, 128)).attention
    with_target = quantizing.quantize_work(TINY, SpQRConfig(target_bits=4.3), text)
    without = quantizing.quantize_work(TINY, SpQRConfig(), text)
    assert with_target.bfloat16 - without.bfloat16 == plan.bfloat16
    exact = quantizing.plan_work(TINY, SpQRConfig(target_bits=4.3, calibration_dtype="float32"), text)
    assert (exact.dense, exact.gram) == (plan.bfloat16, plan.rounded_gram)
    assert quantizing.plan_text(Text(40, 2048)) == Text(16, 256)  # never more than 4096 tokens
    assert quantizing.plan_text(Text(24, 1024)) == Text(12, 256)  # an eighth
    assert quantizing.plan_text(Text(4, 2048)) == Text(4, 512)  # longer beginnings of few windows
    assert with_target.searched > plan.searched + without.searched  # some weights are solved again


def test_tuning_takes_a_step_for_each_batch_and_pass():
    tuning = TuneConfig(epochs=3)
    work = quantizing.tuning_work(TINY, tuning, Text(16, 128))
    tokens, products = 16 * 128, 2 * BLOCK * 2
    assert work.dense == products * tokens  # the dense model, once
    assert work.bfloat16 == 3 * tokens * (3 * products + 3 * 2 * HEAD)
    assert work.unpacked == 3 * 2 * 2 * BLOCK  # two batches of 8 windows
    blocks = quantizing.tuning_work(TINY, TuneConfig("blocks", epochs=3), Text(16, 128))
    assert blocks.bfloat16 == tokens * products * (1 + 3 * 2)


def test_perplexity_and_compare():
    work = measuring.perplexity_work(TINY, TEXT)
    assert work.dense == (2 * BLOCK * 2 + 2 * HEAD) * 384
    assert measuring.compare_work(TINY, TINY, TEXT).dense == 2 * work.dense
    assert measuring.perplexity_work(TINY, TEXT, packed=True).programs > work.programs
    analysis = measuring.analyze_work(TINY, TEXT)
    assert (analysis.bfloat16, analysis.mapped) == (2 * BLOCK * 384 * 2, 2 * BLOCK)


def test_experts_that_inference_skips_are_not_counted():
    sparse = dataclasses.replace(TINY, num_experts=4, experts_per_token=1, expert_size=32)
    attention_part = Q + K + V + OUT
    expert = 3 * 32 * 64
    # One of four experts, and 1.2 rows for each token with the padding of tiles.
    products = 2 * (attention_part + 1.2 * expert) * 384 * 2
    assert passes.forward_pass(sparse, TEXT).products == pytest.approx(products)
    grams = 2 * 2 * (2 * 64**2 + 1.2 * (64**2 + 32**2)) * 384
    assert passes.hessian_operations(sparse, 384) == pytest.approx(grams)


@pytest.mark.parametrize(
    "config", [SpQRConfig(), SpQRConfig.preset("4bit"), SpQRConfig.gptq(), SpQRConfig.baseline("brecq")]
)
def test_more_text_is_never_less_work_or_memory(config):
    texts = [Text(windows, 128) for windows in (1, 4, 16, 64, 256)]
    works = [dataclasses.astuple(quantizing.quantize_work(TINY, config, text, TuneConfig())) for text in texts]
    peaks = [memory_plan.plan_memory(TINY, config, text, TuneConfig(), 4).host_bytes for text in texts]
    for before, after in itertools.pairwise(works):
        assert all(a <= b for a, b in zip(before, after, strict=True))
        assert before != after
    assert peaks == sorted(set(peaks))


def test_bytes_of_calibration_and_models():
    # A token: the residual stream (64) in float32, and the widest input between stages (96), rounded to bfloat16.
    assert memory_plan.calibration_bytes(TINY, SpQRConfig(), TEXT, 4) == 384 * (64 * 4 + 96 * 2)
    # Half the residual stream's bytes of the MLP's 96 are held, but all that attention makes (64).
    held = memory_plan.calibration_bytes(TINY, SpQRConfig(), TEXT, 4, most_inner=0)
    assert held == 384 * (64 * 4 + max(64 * 4 * HELD_SHARE, 64 * 2))
    exact = SpQRConfig(drift_correction=0.5, calibration_dtype="float32")
    assert memory_plan.calibration_bytes(TINY, exact, TEXT, 4) == 2 * 384 * (64 + 96) * 4
    dense = memory.perplexity_bytes(TINY, TEXT, 1, 4, packed=False)
    assert dense - memory.perplexity_bytes(TINY, TEXT, 1, 2, packed=False) == 2 * (
        2 * BLOCK + 2 * HEAD
    )  # two of two blocks
    assert memory.perplexity_bytes(TINY, TEXT, 2, 4, packed=False) > dense
    # A packed model: of two blocks 0.6 bytes a weight, and one of them in float32.
    packed = memory.perplexity_bytes(TINY, TEXT, 1, 4, packed=True)
    assert dense - packed == pytest.approx((2 * 4 - 2 * 0.6 - 4) * BLOCK)
    # More blocks take no more memory.
    assert memory.perplexity_bytes(dataclasses.replace(TINY, num_layers=9), TEXT, 1, 4, packed=True) == packed
    both = memory.compare_bytes(TINY, TINY, TEXT, 1, 4)
    assert both > packed


def test_bytes_outside_of_the_blocks_are_those_held():
    large = dataclasses.replace(TINY, vocab_size=100_000)
    dense = memory.perplexity_bytes(large, TEXT, 1, 4, packed=True)
    lean = OuterMemory(held=10**6, reading=0, head_rows=2000)
    packed = memory.perplexity_bytes(large, TEXT, 1, 4, True, lean)
    logits = 3 * 4 * 128 * (100_000 - 2000)
    assert dense - packed == pytest.approx(2 * 100_000 * 64 * 4 - 10**6 + logits)
    # A matrix that is read as a whole, before the blocks are.
    whole = dataclasses.replace(lean, reading=10**9)
    assert memory.perplexity_bytes(large, TEXT, 1, 4, True, whole) > packed + 10**9
    # Logits of two models are computed for pieces that fit both.
    both = memory.compare_bytes(large, large, TEXT, 1, 4)
    assert both - memory.compare_bytes(large, large, TEXT, 1, 4, (None, lean)) > logits


def test_streams_of_long_texts_are_bounded():
    some, more = (memory.perplexity_bytes(TINY, Text(count, 128), 1, 4, packed=True) for count in (10**5, 10**6))
    assert some == more


def test_work_adds_up():
    assert Work(dense=1.0) + Work(dense=2.0, gram=3.0) == Work(dense=3.0, gram=3.0)
    assert 2 * Work(dense=1.0, factor=4.0) == Work(dense=2.0, factor=8.0)
