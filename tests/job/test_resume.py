"""Runs that are stopped and go on: the same bytes and the same report as of a run without a stop."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from support.stops import Stop, StopAfter, report_of

from spqr_jax import CheckpointError, LayerReport, SpQRConfig, accumulate_hessian, empty_hessian, quantize
from spqr_jax.job import kept, pace
from spqr_jax.journal import Journal
from spqr_jax.methods import quantize_weights
from spqr_jax.planning.budget import plan_budget
from spqr_jax.planning.ledger import Ledger
from spqr_jax.planning.record import plan_from_json, plan_to_json
from spqr_jax.stream.blocks import TreeSource
from spqr_jax.tune.config import TuneConfig

CASES = {
    "target and head": (
        SpQRConfig(target_bits=4.5, head_bits=3),
        None,
        [("measuring", 1, "backward"), ("quantizing", 1, "^block 0")],
    ),
    "drift": (SpQRConfig(drift_correction=0.5), None, [("quantizing", 1, "^block 0")]),
    "all at once": (SpQRConfig(sequential=False), None, [("quantizing", 1, "^block 0")]),
    "blocks are tuned": (
        SpQRConfig(),
        TuneConfig("blocks", epochs=2),
        [("quantizing", 1, "^block 1"), ("tuning", 1, "^block 0")],
    ),
    "logits are tuned": (SpQRConfig(), TuneConfig("logits", epochs=3, batch_tokens=64), [("tuning", 1, "step 2")]),
    "round to nearest": (SpQRConfig.rtn(4, 16, head_bits=8), None, [("quantizing", 1, "^block 0")]),
    "brecq": (SpQRConfig.baseline("brecq", 3, 32, steps=4), None, [("quantizing", 1, "^block 0")]),
}  # fmt: skip


@pytest.mark.parametrize("saves", [True, False], ids=["saved", "made again"])
@pytest.mark.parametrize(("config", "tuning", "stops"), CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:what was finished")
def test_a_run_that_goes_on_ends_as_without_a_stop(
    tiny_model, tiny_batches, tmp_path, monkeypatch, config, tuning, stops, saves
):
    if not saves:
        if not config.needs_calibration:
            pytest.skip("there are no activations")
        monkeypatch.setattr(kept, "_SAVED_ACTIVATIONS", 0)
    monkeypatch.setattr(pace, "SAVE_EVERY", 0.0)
    quantize(tiny_model, tiny_batches, config, tuning=tuning, out=tmp_path / "whole")
    for number, stop in enumerate(stops):
        with pytest.raises(Stop):
            quantize(
                tiny_model, tiny_batches, config, tuning=tuning,
                out=tmp_path / "parts", resume=number > 0, events=StopAfter(*stop),
            )  # fmt: skip
        assert (tmp_path / ".parts.run").is_dir()
        assert not (tmp_path / "parts").exists()
    seen = []
    quantize(tiny_model, tiny_batches, config, tuning=tuning, out=tmp_path / "parts", resume=True, events=seen.append)
    assert report_of(tmp_path / "parts") == report_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".parts*"))
    first = next(event for event in seen if isinstance(event.detail, LayerReport)) if tuning is None else None
    assert first is None or first.detail.path.startswith("layers.1.")


@pytest.mark.filterwarnings("ignore:what was finished")
def test_a_run_goes_on_after_a_stop_behind_any_commit(tiny_model, tmp_path, monkeypatch):
    config, commit, commits = SpQRConfig.rtn(4, 16, head_bits=8), Journal.commit, []
    quantize(tiny_model, None, config, out=tmp_path / "whole")

    def stopping(self, state):
        commit(self, state)
        commits.append(state)
        raise Stop

    for _ in range(10):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "commit", stopping)
            with pytest.raises(Stop):
                quantize(tiny_model, None, config, out=tmp_path / "parts", resume=bool(commits))
        if commits[-1]["phase"] == "done":
            break
    quantize(tiny_model, None, config, out=tmp_path / "parts", resume=True)
    assert report_of(tmp_path / "parts") == report_of(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:what was finished")
def test_another_run_is_refused(tiny_model, tiny_batches, tmp_path):
    with pytest.raises(Stop):
        quantize(
            tiny_model, tiny_batches, SpQRConfig(), out=tmp_path / "m", events=StopAfter("quantizing", 1, "^block 0")
        )
    with pytest.raises(CheckpointError, match="unfinished run"):
        quantize(tiny_model, tiny_batches, SpQRConfig(), out=tmp_path / "m")
    with pytest.raises(CheckpointError, match="differs in the configuration"):
        quantize(tiny_model, tiny_batches, SpQRConfig(bits=4), out=tmp_path / "m", resume=True)
    with pytest.raises(CheckpointError, match="differs in the calibration text"):
        quantize(tiny_model, tiny_batches[:2], SpQRConfig(), out=tmp_path / "m", resume=True)


def test_a_plan_comes_back_with_the_same_bits(tiny_model, tiny_batches):
    config = SpQRConfig(target_bits=4.5)
    plan = plan_budget(TreeSource(tiny_model), tiny_batches, config)
    again = plan_from_json(plan_to_json(plan))
    assert again.config(config) == plan.config(config)
    assert again.stored_bits == plan.stored_bits
    assert plan_to_json(again) == plan_to_json(plan)
    ledger, other = Ledger(plan), Ledger(again)
    other.restore(ledger.state())
    assert other.factor() == ledger.factor()


@pytest.mark.parametrize(
    "config",
    [SpQRConfig(), SpQRConfig.reference(), SpQRConfig(order="identity"), SpQRConfig.gptq(3, None)],
    ids=["spqr", "reference", "identity", "one group a row"],
)
def test_text_sees_what_is_stored(config):
    """Bit for bit; `to_dense` may round a product and a sum together."""
    rng = np.random.default_rng(0)
    w = rng.standard_t(4, (576, 200)).astype(np.float32) * 0.05
    x = rng.standard_normal((512, 200)).astype(np.float32) * np.exp(rng.standard_normal(200)).astype(np.float32)
    hessian = accumulate_hessian(empty_hessian(200), x)
    (solved,) = quantize_weights([jax.device_put(w)], hessian, [config])
    np.testing.assert_array_equal(solved.dense, solved.array.to_dense_exactly())
    np.testing.assert_allclose(solved.array.to_dense(), solved.array.to_dense_exactly(), atol=1e-5)
