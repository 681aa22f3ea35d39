"""How the Pallas kernels cut their work: by rules that fit a device, or by what was measured on it."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import pytest
from support.arrays import random_array

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import api, fragments, lanes, tuning
from spqr_jax.products import pack_for_pallas

H100 = spqr_matmul.Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)


@pytest.mark.parametrize("shape", [(16, 16), (576, 576), (4096, 4096), (11008, 4096), (4096, 11008), (151936, 896)])
def test_rules_fill_a_gpu(shape):
    problem = tuning.Problem(1, *shape, 3, 16)
    config = tuning.mosaic_config(H100, problem)
    blocks, steps = -(-shape[0] // 64), -(-shape[1] // 256)
    assert 1 <= config.splits <= max(steps // 2, 1)
    assert blocks * config.splits >= min(4 * 132, blocks * (steps // 2))
    assert 1 <= config.stages <= 3
    assert fragments.shared_bytes(bits=3, group_size=16, batch=1, row_blocks=1, stages=3) <= 232448 // 4  # four a core
    vector = tuning.triton_config(H100, problem)
    assert 1 <= vector.splits <= max(-(-shape[1] // 64) // 2, 1)


def test_stages_fit_into_shared_memory():
    small = dataclasses.replace(H100, capability=(8, 9))
    for device, group_size, batch, stages in [
        (H100, 128, 1, 3),
        (H100, 128, 16, 1),
        (small, 64, 1, 2),
        (small, 128, 8, 0),
    ]:
        problem = tuning.Problem(batch, 4096, 65536, 4, group_size)
        assert tuning.mosaic_config(device, problem).stages == stages
        form = {"bits": 4, "group_size": group_size, "batch": batch, "row_blocks": 1}
        assert fragments.shared_bytes(**form, stages=max(stages, 1)) <= device.shared_bytes or not stages
        assert stages == 3 or fragments.shared_bytes(**form, stages=stages + 1) > device.shared_bytes


def test_what_was_measured_comes_before_the_rule(tmp_path, monkeypatch):
    found = {"row_blocks": 2, "splits": 7, "stages": 4}
    table = {H100.kind: {"mosaic_gpu": {"1x4096x4096:b3g16": found}, "triton": {}}}
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    tuning.TABLE.write_text(json.dumps(table))
    tuning.table.cache_clear()
    try:
        problem = tuning.Problem(1, 4096, 4096, 3, 16)
        assert tuning.mosaic_config(H100, problem) == tuning.MosaicConfig(**found)
        assert tuning.mosaic_config(H100, dataclasses.replace(problem, batch=8)).row_blocks == 1
        with api.using("mosaic_gpu", tuning.MosaicConfig(1, 1, 1)):
            assert api._forced["mosaic_gpu"].splits == 1
        assert not api._forced
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


@pytest.mark.skipif(bool(spqr_matmul.why_no_mosaic(H100)), reason="JAX without mma in Mosaic GPU")
def test_a_step_that_does_not_fit_is_another_implementations():
    packed = pack_for_pallas(random_array((64, 256)), "fragments")
    x = jnp.ones((1, 256))
    with api.using("mosaic_gpu", tuning.MosaicConfig(1, 1, 0)):
        with pytest.raises(NotImplementedError, match=r"does not fit into .* bytes of shared memory"):
            spqr_matmul.matmul(x, packed, "mosaic_gpu", interpret=True)
        assert spqr_matmul.matmul(x, packed, ["mosaic_gpu", "xla"], interpret=True).shape == (1, 64)
