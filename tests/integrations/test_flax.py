"""Users' own Flax models, NNX and Linen: a small transformer of each kind."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support.events import LayerReports

from spqr_jax import DataError, LayerRule, SpQRArray, SpQRConfig, SpQRError
from spqr_jax.integrations import linen as spqr_linen
from spqr_jax.integrations import nnx as spqr_nnx
from spqr_jax.integrations.contraction import of_equation, over_axes
from spqr_jax.methods import quantize_weights
from spqr_jax.products import prepare
from spqr_jax.solver import accumulate_hessian, empty_hessian

VOCAB, WIDTH, HEADS = 64, 32, 4
CONFIG = SpQRConfig(bits=4, outlier_threshold=0.5)


def text(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(0, VOCAB, (4, 24)), jnp.int32) for _ in range(count)]


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


# ---- kernels as matrices ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "kernel", "x"),
    [
        ("btd,dhk->bthk", (8, 2, 5), (3, 4, 8)),
        ("bthk,hkd->btd", (2, 5, 8), (3, 4, 2, 5)),
        ("bhtk,khd->bdt", (5, 2, 8), (3, 2, 4, 5)),  # in another order than the input's, and back in another
        ("...d,df->...f", (8, 6), (3, 4, 8)),
        ("...d,fd->...f", (6, 8), (8,)),
    ],
)
def test_equations_are_products_with_a_matrix(equation, kernel, x):
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.standard_normal(kernel), jnp.float32), jnp.asarray(rng.standard_normal(x), jnp.float32)
    form = of_equation(kernel, equation)
    np.testing.assert_allclose(form.product(form.matrix(w), x), jnp.einsum(equation, x, w), atol=1e-5)


@pytest.mark.parametrize("axes", [(-1,), (-2, -1), (1, 3)])
def test_axes_are_products_with_a_matrix(axes):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32)
    w = jnp.asarray(rng.standard_normal([*(x.shape[axis] for axis in axes), 6, 7]), jnp.float32)
    form = over_axes(w.shape, axes)
    want = jnp.tensordot(x, w, (axes, tuple(range(len(axes)))))
    np.testing.assert_allclose(form.product(form.matrix(w), x), want, atol=1e-5)
    assert form.shape == (42, w.size // 42)


@pytest.mark.parametrize("equation", ["bhd,hde->bhe", "bd,de->b", "bxd,de->be", "...d,df->bf", "bd,ded->be"])
def test_other_equations_are_refused(equation):
    kernel = {"hde": (2, 3, 4), "de": (3, 4), "df": (3, 4), "ded": (3, 4, 3)}[equation.split(",")[1].split("->")[0]]
    with pytest.raises(SpQRError, match="not a product of the whole input with one matrix"):
        of_equation(kernel, equation)


# ---- NNX --------------------------------------------------------------------------------


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Einsum("btd,df->btf", (WIDTH, 3 * WIDTH), (3 * WIDTH,), rngs=rngs)
        self.down = nnx.Linear(3 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(x)))


class NNXTransformer(nnx.Module):
    """The head stands at two places, and the blocks' layers have the same names."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)
        self.heads = nnx.Dict(again=self.head)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + 0.5 * self.heads.again(x[:, ::-1])[:, ::-1]


@pytest.fixture(scope="module")
def nnx_model():
    return NNXTransformer(nnx.Rngs(0))


@pytest.fixture(scope="module")
def nnx_small(nnx_model):
    return spqr_nnx.quantize(nnx_model, text(), CONFIG)


def test_nnx_layers_are_found_by_path(nnx_model):
    each = [f"attention.{name}" for name in ("query", "key", "value", "out")] + ["up", "down"]
    assert set(spqr_nnx.find_layers(nnx_model)) == {f"blocks.{i}.{name}" for i in range(2) for name in each} | {"head"}


def test_nnx_models_stay_callable_and_compile(nnx_model, nnx_small):
    tokens = text(1, seed=9)[0]
    dense = nnx_model(tokens)
    small = nnx_small(tokens)
    assert 0.97 < correlation(dense, small) < 0.99999
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(nnx_small, tokens), small, atol=1e-4)
    graph, state = nnx.split(nnx_small)
    np.testing.assert_allclose(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, tokens), small, atol=1e-4)
    packed = spqr_nnx.prepare(nnx_small)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(packed, tokens), small, atol=1e-3)
    assert not any(isinstance(leaf, SpQRArray) for leaf in jax.tree.leaves(nnx.state(packed)))


def test_the_nnx_model_itself_is_left_alone(nnx_model, nnx_small):
    assert all(
        isinstance(layer, (nnx.Linear, nnx.LinearGeneral, nnx.Einsum))
        for layer in spqr_nnx.find_layers(nnx_model).values()
    )
    assert not spqr_nnx.find_layers(nnx_small)
    assert nnx_small.head is nnx_small.heads.again
    assert nnx_small.embed.embedding.shape == (VOCAB, WIDTH)


def test_each_nnx_layer_has_its_own_hessian(nnx_model, nnx_small):
    """The second block's, and the shared head's from both of its places, redone by hand."""
    total, seen = empty_hessian(3 * WIDTH), empty_hessian(WIDTH)
    for tokens in text():
        x = nnx_model.blocks[0](nnx_model.embed(tokens))
        block = nnx_model.blocks[1]
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + block.attention(block.norm(x), mask=mask)
        inner = jax.nn.gelu(block.up(x))
        total = accumulate_hessian(total, inner)
        x = x + block.down(inner)
        seen = accumulate_hessian(accumulate_hessian(seen, x), x)
    for layer, original, hessian in (
        (nnx_small.blocks[1].down, nnx_model.blocks[1].down, total),
        (nnx_small.head, nnx_model.head, seen),
    ):
        (want,) = quantize_weights([original.kernel[...].T], hessian, [CONFIG])
        got = layer.weight.get_value()
        np.testing.assert_allclose(got.to_dense(), want.dense, atol=1e-4)
        assert layer.form.shape == got.shape


def test_nnx_rules_and_reports(nnx_model):
    reports = LayerReports()
    small = spqr_nnx.quantize(
        nnx_model,
        None,
        SpQRConfig.rtn(4, 16, rules=(LayerRule("attention", skip=True), LayerRule("head", bits=8))),
        events=reports,
    )
    assert {report.path: report.bits for report in reports.layers} == {
        "blocks.0.up": 4, "blocks.0.down": 4, "blocks.1.up": 4, "blocks.1.down": 4, "head": 8,
    }  # fmt: skip
    assert isinstance(small.blocks[0].attention.query, nnx.LinearGeneral)
    kernels = spqr_nnx.dequantize(small)
    np.testing.assert_allclose(kernels["head"], nnx_model.head.kernel[...], atol=0.02)
    np.testing.assert_allclose(kernels["blocks.1.up"], nnx_model.blocks[1].up.kernel[...], atol=0.2)


def test_nnx_refusals(nnx_model):
    with pytest.raises(DataError, match="needs calibration batches"):
        spqr_nnx.quantize(nnx_model)
    with pytest.raises(DataError, match="at least one"):
        spqr_nnx.quantize(nnx_model, iter(()))
    with pytest.raises(SpQRError, match="target_bits"):
        spqr_nnx.quantize(nnx_model, text(), SpQRConfig(target_bits=4.0))
    with pytest.raises(SpQRError, match="under jit"):
        spqr_nnx.quantize(nnx_model, text(), call=nnx.jit(lambda model, x: model(x)))
    with pytest.raises(DataError, match=r"never reached .*blocks.1.up"):
        spqr_nnx.quantize(nnx_model, text(), call=lambda model, x: model.blocks[0](model.embed(x)))
    with pytest.raises(SpQRError, match=r"has no nnx\.Linear"):
        spqr_nnx.quantize(nnx.RMSNorm(8, rngs=nnx.Rngs(0)), text())
    per_head = nnx.Einsum("bhd,hde->bhe", (2, 4, 4), rngs=nnx.Rngs(0))
    with pytest.raises(SpQRError, match=r"a cannot be quantized: .*LayerRule\('a', skip=True\)"):
        spqr_nnx.quantize(nnx.Dict(a=per_head), text())


# ---- Linen ------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y, mask=mask)
        y = jax.nn.gelu(nn.Einsum((WIDTH, 3 * WIDTH), "btd,df->btf")(x))
        return x + nn.Dense(WIDTH)(y)


class LinenTransformer(nn.Module):
    def setup(self):
        self.embed = nn.Embed(VOCAB, WIDTH)
        self.blocks = [LinenBlock() for _ in range(2)]
        self.head = nn.Dense(VOCAB, use_bias=False)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + 0.5 * self.head(x[:, ::-1])[:, ::-1]

    def middle(self, tokens):
        return self.blocks[0](self.embed(tokens))


@pytest.fixture(scope="module")
def linen_model():
    module = LinenTransformer()
    return module, module.init(jax.random.key(0), text(1)[0])


@pytest.fixture(scope="module")
def linen_small(linen_model):
    return spqr_linen.quantize(*linen_model, text(), CONFIG)


def test_linen_kernels_are_replaced(linen_model, linen_small):
    leaves, _ = jax.tree_util.tree_flatten_with_path(linen_small, is_leaf=lambda leaf: isinstance(leaf, SpQRArray))
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in leaves if isinstance(leaf, SpQRArray)
    }
    attention = [f"MultiHeadDotProductAttention_0.{name}" for name in ("query", "key", "value", "out")]
    each = [*attention, "Einsum_0", "Dense_0"]
    assert arrays == {f"params.blocks_{i}.{name}.kernel" for i in range(2) for name in each} | {"params.head.kernel"}
    assert isinstance(linen_model[1]["params"]["head"]["kernel"], jax.Array)


def test_linen_models_run_and_compile(linen_model, linen_small):
    module, variables = linen_model
    tokens = text(1, seed=9)[0]
    dense, small = module.apply(variables, tokens), spqr_linen.apply(module, linen_small, tokens)
    assert 0.97 < correlation(dense, small) < 0.99999
    compiled = jax.jit(partial(spqr_linen.apply, module))
    np.testing.assert_allclose(compiled(linen_small, tokens), small, atol=1e-4)
    np.testing.assert_allclose(compiled(prepare(linen_small), tokens), small, atol=1e-3)
    middle = spqr_linen.apply(module, linen_small, tokens, method="middle")
    assert correlation(middle, module.apply(variables, tokens, method="middle")) > 0.97


def test_each_linen_layer_has_its_own_hessian(linen_model, linen_small):
    module, variables = linen_model
    total = empty_hessian(WIDTH)
    for tokens in text():
        x = module.bind(variables).middle(tokens)
        x = module.bind(variables).blocks[1](x)
        total = accumulate_hessian(accumulate_hessian(total, x), x)
    (want,) = quantize_weights([variables["params"]["head"]["kernel"].T], total, [CONFIG])
    np.testing.assert_allclose(linen_small["params"]["head"]["kernel"].to_dense(), want.dense, atol=1e-4)


def test_linen_refusals(linen_model):
    module, variables = linen_model
    with pytest.raises(DataError, match="found by running it"):
        spqr_linen.quantize(module, variables)
    with pytest.raises(DataError, match="at least one"):
        spqr_linen.quantize(module, variables, iter(()))
    with pytest.raises(SpQRError, match="under jit"):
        spqr_linen.quantize(module, variables, text(), call=lambda m, v, x: jax.jit(m.apply)(v, x))
    with pytest.raises(SpQRError, match="target_bits"):
        spqr_linen.quantize(module, variables, text(), SpQRConfig(target_bits=4.0))
    with pytest.raises(SpQRError, match=r"has no nn\.Dense"):
        spqr_linen.quantize(module, variables, text(), SpQRConfig(rules=(LayerRule(".", skip=True),)))


def test_boxed_and_frozen_variables_are_taken():
    import flax

    module = nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))
    x = jax.random.normal(jax.random.key(0), (40, 32))
    variables = flax.core.freeze(module.init(jax.random.key(1), x))
    small = spqr_linen.quantize(module, variables, [x], SpQRConfig(bits=4))
    want = module.apply(variables, x)
    assert correlation(spqr_linen.apply(module, small, x), want) > 0.98
