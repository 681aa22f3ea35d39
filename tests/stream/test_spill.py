"""Activations on disk: the same bytes as in memory, and no file that stays."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.problems import TINY, random_tokens

from spqr_jax import SpQRConfig, SpQRError, batched
from spqr_jax.job.job import Job
from spqr_jax.models.decoder import State, random_decoder
from spqr_jax.output import Claim
from spqr_jax.stream import spill as spill_module
from spqr_jax.stream.blocks import TreeSink, TreeSource
from spqr_jax.stream.spill import Spill


def state(seed):
    rng = np.random.default_rng(seed)
    residual = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.bfloat16)
    return State(residual, inner=jnp.asarray(rng.standard_normal((2, 3, 7)), jnp.float32))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def files(spill):
    return list(spill.folder.glob("*.state"))


def test_a_list_of_states_reads_back_what_was_put_in(tmp_path):
    with Spill(tmp_path / "out") as spill:
        states = spill.states()
        for seed in range(4):
            states.append(state(seed))
        assert len(states) == 4
        for index in range(4):  # as a stage does: read, replace, go on
            same(states[index], state(index))
            states[index] = state(10 + index)
        for index, read in enumerate(states):
            same(read, state(10 + index))
        assert len(files(spill)) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_copy_goes_its_own_way(tmp_path):
    with Spill(tmp_path / "out") as spill:
        states = spill.states()
        states.append(state(0))
        twin = states.copy()
        same(states[0], state(0))
        assert len(files(spill)) == 1  # shared
        twin[0] = state(1)
        same(states[0], state(0))
        same(twin[0], state(1))
        assert len(files(spill)) == 2


@pytest.mark.parametrize(
    "config",
    [
        SpQRConfig(bits=3),
        SpQRConfig(bits=3, drift_correction=0.5),
        SpQRConfig(bits=3, sequential=False),
        SpQRConfig(target_bits=4.5),
    ],
    ids=["sequential", "drift", "parallel", "target"],
)
def test_quantizing_gives_the_same_bytes_with_activations_on_disk(tiny_model, tmp_path, config):
    same(*(quantized(tiny_model, tmp_path, config, on_disk) for on_disk in (False, True)))


def test_experts_are_the_same_bytes_a_few_at_a_time(tmp_path):
    model = random_decoder(dataclasses.replace(TINY, num_experts=4, experts_per_token=2, expert_size=32), seed=1)
    config = SpQRConfig(bits=3)
    with pytest.warns(UserWarning, match="few calibration tokens"):
        same(*(quantized(model, tmp_path, config, *way) for way in ((False, 2**30), (True, 2 * 4 * 64**2))))


def quantized(model, tmp_path, config, on_disk, hessian_bytes=2**30):
    batches = batched(random_tokens((6, 32), 3), 64)
    sink = TreeSink(model.config)
    with Spill(tmp_path / "out") as spill:
        kept = spill if on_disk else None
        Job(TreeSource(model), sink, batches, config, spill=kept, hessian_bytes=hessian_bytes).run()
        assert (next(spill._names) > 0) == on_disk
    return sink.params()


def test_arrays_come_back_to_the_devices_on_which_they_were():
    code = """
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from spqr_jax.stream.spill import Spill

        mesh = jax.make_mesh((4, 2), ("data", "rows"))
        numbers = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
        with Spill() as spill:
            states = spill.states()
            for spec in (P("data"), P(None, "rows"), P(("data", "rows")), P()):
                states.append({"x": jax.device_put(numbers, NamedSharding(mesh, spec)), "none": None})
            for stored, spec in zip(states, (P("data"), P(None, "rows"), P(("data", "rows")), P())):
                assert stored["x"].sharding == NamedSharding(mesh, spec), stored["x"].sharding
                assert np.array_equal(np.asarray(stored["x"]), numbers)
        assert not spill.folder.exists()
    """
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment, timeout=120)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    spill = Spill(tmp_path / "out")
    spill.states().append(state(0))
    assert spill.folder.parent == tmp_path
    folder = spill.folder
    with pytest.warns(UserWarning, match="left by a run that was killed"), Claim(tmp_path / "out"):
        assert not folder.exists()
    spill.close()


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    def full(path, leaves):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill_module, "_write", full)
    with Spill(tmp_path / "out") as spill:
        states = spill.states()
        states.append(state(0))
        with pytest.raises(SpQRError, match=r"cannot store activations in .*No space left.*--max-memory"):
            states.append(state(1))
    monkeypatch.setattr(spill_module, "free_bytes", lambda path: 1000)
    with Spill(tmp_path / "out") as spill:
        spill.need(999)
        with pytest.raises(SpQRError, match=r"activations need .* of disk space"):
            spill.need(2e9)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    with pytest.raises(SpQRError, match="cannot store activations"):
        Spill(tmp_path / "nowhere" / "out")
