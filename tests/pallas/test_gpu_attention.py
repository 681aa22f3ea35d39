"""Attention at one position: XLA's formula against NumPy, the combination of splits, plans, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention import Form, arrays_of, bits, error, expected

from pallas_kernels import attention
from pallas_kernels.attention.api import why_no_mosaic
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.xla import combine
from pallas_kernels.spqr_matmul.device import Target

H100 = Target("gpu", "NVIDIA H100", (9, 0), 132)
SUPPORTED = {"heads": 32, "kv_heads": 8, "head_dim": 128, "length": 2048, "rotated": 128}
SUPPORTED |= {"dtype": jnp.bfloat16, "cache_dtype": jnp.bfloat16, "target": H100}
FORMS = {
    "float32, two texts, softcap": (
        Form(2, 4, 2, 32, 64, 40, (0, 33), 16, 3.0, dtype="float32", cache_dtype="float32"),
        1e-6,
    ),
    "bfloat16, no rotary embedding": (Form(rotated=0), 2e-2),
    "an empty cache, float16": (Form(start=0, cache_dtype="float16", dtype="float32"), 1e-3),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_formula_attends_and_updates_the_cache(name):
    form, limit = FORMS[name]
    given = arrays_of(form, unread=0.0)  # the formula masks what it reads
    out, keys, values = jax.jit(lambda *arrays: attention.attend(*arrays, **form.static))(*given)
    wanted, *caches = expected(form, given)
    assert out.shape == (form.batch, form.heads * form.head_dim)
    assert out.dtype == given.qkv.dtype
    assert error(out, wanted) < limit
    for cache, right in zip((keys, values), caches, strict=True):
        others = np.ones(form.length, bool)
        others[form.start] = False
        np.testing.assert_array_equal(bits(np.asarray(cache)[..., others, :]), bits(right[..., others, :]))
        np.testing.assert_allclose(  # XLA may round products and sums at once
            np.asarray(cache, np.float32)[..., form.start, :], right[..., form.start, :].astype(np.float32), rtol=1e-2
        )


def test_splits_combine_to_the_whole():
    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((1, 2, 30)), rng.standard_normal((30, 8))
    parts = [slice(0, 12), slice(12, 30)]
    tops = np.stack([scores[..., part].max(-1) for part in parts] + [np.full((1, 2), -1e30)], axis=-1)
    weights = [np.exp2(scores[..., part] - tops[..., i, None]) for i, part in enumerate(parts)]
    sums = [w @ values[part] for w, part in zip(weights, parts, strict=True)] + [np.full((1, 2, 8), np.nan)]
    totals = np.stack([w.sum(-1) for w in weights] + [np.full((1, 2), np.nan)], axis=-1)
    got = combine(*(jnp.asarray(a, jnp.float32) for a in (np.stack(sums, axis=2), tops, totals)))
    whole = np.exp2(scores)
    np.testing.assert_allclose(got, whole @ values / whole.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": Target("cpu", "cpu", (0, 0), 132)}, "NVIDIA GPUs only"),
        ({"target": Target("gpu", "Tesla V100", (7, 0), 80)}, "compute capability"),
        ({"cache_dtype": jnp.int8}, "the cache must be bfloat16"),
        ({"dtype": jnp.float64}, "qkv must be bfloat16"),
        ({"head_dim": 72, "rotated": 72}, "multiple of 16"),
        ({"head_dim": 272, "rotated": 272}, "up to 256"),
        ({"length": 100}, "multiple of 64"),
        ({"rotated": 130}, "at most head_dim"),
        ({"kv_heads": 5}, "multiple of kv_heads"),
    ],
)
def test_what_the_kernel_cannot_do_has_a_reason(change, reason):
    assert reason in attention.why_unsupported(**SUPPORTED | change)


def test_where_there_is_no_gpu_the_kernel_is_refused():
    form = Form(head_dim=16)
    with pytest.raises(NotImplementedError, match="NVIDIA GPUs only"):
        attention.attend(*arrays_of(form), **form.static, implementation="mosaic_gpu")


def test_wrong_arguments_are_told():
    form = Form(head_dim=16)
    given = arrays_of(form)
    for name, wrong in (("qkv", given.qkv[:, 1:]), ("cos", None), ("values", given.values[:1]), ("first", given.start)):
        with pytest.raises(ValueError, match="attend:"):
            attention.attend(*dataclasses.replace(given, **{name: wrong}), **form.static)


@pytest.mark.parametrize("heads", [1, 2, 4, 7, 8, 16, 71])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 240, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_plan_covers_all_heads_and_dimensions(heads, head_dim, itemsize):
    for batch, cores in ((1, 132), (16, 132), (3, 108)):
        plan = attention.choose_plan(batch, heads, 1, head_dim, 2048, itemsize, cores, cores == 132)
        assert plan.lanes * plan.chunks * 16 >= head_dim * itemsize
        assert (plan.parts - 1) * plan.block_heads < heads <= plan.parts * plan.block_heads
        assert plan.block_heads * plan.chunks * 16 // itemsize <= 64, "sums that a lane holds"
        assert plan.warps % 4 == 0
        assert plan.splits % plan.cluster == 0
        assert plan.sums <= 8, "XLA combines more by two launches"
        assert batch * plan.parts * plan.splits <= max(cores, batch * plan.parts)


def test_the_splits_of_a_plan_keep_the_multiprocessors_busy():
    def blocks(batch, heads, kv_heads):
        return batch * kv_heads * attention.choose_plan(batch, heads, kv_heads, 128, 2048, 2, 132, True).splits

    assert [blocks(1, 32, 32), blocks(1, 32, 8), blocks(16, 32, 8)] == [128, 128, 128]
    assert attention.choose_plan(1, 32, 8, 128, 128, 2, 132, True).splits == 2, "no split has fewer than 64 positions"


@pytest.mark.skipif(bool(why_no_mosaic()), reason=why_no_mosaic())
def test_the_kernel_lowers_with_the_cache_in_place():
    from pallas_kernels.attention import mosaic_gpu

    bfloat16 = jnp.dtype(jnp.bfloat16)
    problem = Problem(2, 4, 2, 64, 128, 64, 0.125, None, bfloat16, bfloat16)
    plan = attention.choose_plan(2, 4, 2, 64, 128, 2, 132, True)
    qkv, table, cache = ((2, 8 * 64), bfloat16), ((2, 32), jnp.float32), ((3, 2, 2, 128, 64), bfloat16)
    shapes = [qkv, table, table, cache, cache, ((), jnp.int32), ((2,), jnp.int32), ((), jnp.int32)]
    traced = jax.jit(functools.partial(mosaic_gpu.attend, problem, plan)).trace(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    [call] = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    assert call.count("output_operand_alias<") == 2
