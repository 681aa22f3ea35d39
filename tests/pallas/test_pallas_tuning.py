"""How the Pallas kernels cut their work: by rules that fit a device, or by what was measured on it."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from support.arrays import random_array
from support.parts import prepared

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import lanes, tuning

H100 = spqr_matmul.Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)


@pytest.mark.parametrize("shape", [(16, 16), (576, 576), (4096, 4096), (11008, 4096), (4096, 11008), (151936, 896)])
def test_rules_fill_a_gpu(shape):
    config = tuning.triton_config(H100, tuning.Problem(1, *shape, 3, 16))
    blocks, steps = -(-shape[0] // 128), -(-shape[1] // 64)
    assert 1 <= config.splits <= max(steps // 2, 1)
    assert blocks * config.splits >= min(16 * 132, blocks * (steps // 2))


def test_what_was_measured_comes_before_the_rule(tmp_path, monkeypatch):
    measured = {"blocks": 2, "splits": 7}
    table = {H100.kind: {"triton": {"1x4096x4096:b3g16": measured}}}
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    tuning.TABLE.write_text(json.dumps(table))
    tuning.table.cache_clear()
    try:
        problem = tuning.Problem(1, 4096, 4096, 3, 16)
        assert tuning.triton_config(H100, problem) == tuning.TritonConfig(**measured)
        assert tuning.triton_config(H100, dataclasses.replace(problem, batch=2)).blocks == 1
    finally:
        tuning.table.cache_clear()


def test_blocks_of_a_tpu():
    for out in (1, 128, 576, 896, 1536, 4096, 11008, 151936):
        block = lanes.choose_block(out)
        assert block % 128 == 0
        assert block <= 1024
        padded = -(-out // block) * block
        assert padded - out < max(128, 0.05 * out)  # few rows of padding


def test_a_tpu_step_fits_into_vector_memory():
    problem = tuning.Problem(1, 4096, 4096, 3, 16)
    depths = [tuning.tpu_depth(dataclasses.replace(problem, inner=512 * n), 1024) for n in (1, 2, 3, 4, 6, 7, 16)]
    assert depths == [1, 2, 3, 4, 3, 1, 4]
    for bits, group_size in [(2, 16), (4, 32), (4, 128)]:
        form = {"bits": bits, "group_size": group_size}
        depth = tuning.tpu_depth(tuning.Problem(16, 4096, 8 * 32 * group_size, **form), 1024)
        assert lanes.vmem_bytes(**form, block=1024, depth=depth, batch=16) <= tuning.VMEM_BYTES
    assert depth < 4  # the last would not fit four times


def test_a_configuration_is_an_argument():
    packed = prepared("rows", random_array((256, 256)))

    def splits(config) -> str:
        function = functools.partial(spqr_matmul.matmul, implementation="triton", config=config, interpret=True)
        return str(jax.make_jaxpr(function)(jnp.ones((1, 256)), packed))

    assert "f32[3,1,256]" in splits(tuning.TritonConfig(1, 3))
    assert "f32[4,1,256]" in splits(tuning.TritonConfig(2, 4))
