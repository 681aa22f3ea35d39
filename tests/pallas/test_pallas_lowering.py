"""The Pallas kernels lower, and are exported, for accelerators on a machine that has none."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from support.arrays import random_array
from support.parts import prepared

from pallas_kernels import spqr_matmul

NO_MOSAIC = spqr_matmul.why_no_mosaic(spqr_matmul.target())
KERNELS = {
    "mosaic_gpu": ("fragments", "cuda", "mosaic_gpu_v2", ("NVIDIA H100 80GB HBM3", "gpu")),
    "triton": ("rows", "cuda", "__gpu$xla.gpu.triton", ("NVIDIA H100 80GB HBM3", "gpu")),
    "tpu": ("lanes", "tpu", "tpu_custom_call", ("TPU v5 lite", "tpu")),
}


def abstract(kind: str, platform: str):
    """What the lowering asks for instead of a device."""
    device = AbstractDevice(kind, 1 if platform == "tpu" else None, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def product(kernel):
    layout = KERNELS[kernel][0]
    packed = prepared(layout, random_array((256, 512), outliers=0.01))
    x = jax.ShapeDtypeStruct((1, 512), jnp.bfloat16)
    return jax.jit(lambda x, w: spqr_matmul.matmul(x, w, implementation=kernel)), (x, packed)


@pytest.mark.parametrize(
    "kernel",
    [pytest.param("mosaic_gpu", marks=pytest.mark.skipif(bool(NO_MOSAIC), reason=NO_MOSAIC)), "triton", "tpu"],
)
def test_lowering_and_export(kernel):
    _, platform, call, device = KERNELS[kernel]
    function, arguments = product(kernel)
    with abstract(*device):
        text = function.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert text.count(f"stablehlo.custom_call @{call}(") == 1
        checks = [jax.export.DisabledSafetyCheck.custom_call(call)]
        exported = jax.export.export(function, platforms=[platform], disabled_checks=checks)(*arguments)
    assert exported.platforms == (platform,)
    assert [leaf.shape for leaf in exported.out_avals] == [(1, 256)]
    assert exported.mlir_module().count(f"custom_call @{call}(") == 1


def test_large_batches_lower_without_a_kernel():
    function, (_, packed) = product("tpu")
    del function
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    text = jax.jit(spqr_matmul.matmul).trace(x, packed).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text
