"""The real model on real text, against published numbers. Slow: minutes each; fetches the demo model.

Protocol: SmolLM2-135M-Instruct from its GGUF file; calibration on 16 windows of
1024 tokens of WikiText-2's validation text; perplexity on the first 10 windows of
2048 tokens of WikiText-2 test and the first 3 of the Penn Treebank's validation.
The public PyTorch SpQR, run by the same protocol, gave the numbers called ORIGINAL.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from spqr_jax import ModelError, perplexity
from spqr_jax.data import load_tokens
from spqr_jax.models.tokenizer import encode_stream
from spqr_jax.resolve import open_model
from spqr_jax.stream.blocks import collect

pytestmark = pytest.mark.slow

ORIGINAL = {"spqr": 24.59, "gptq 3-bit": 54.19, "gptq 4-bit": 23.61, "rtn 3-bit": 55.71}


@pytest.fixture(scope="module")
def demo():
    try:
        return open_model("demo", "float32")
    except ModelError as error:
        pytest.skip(f"the demo model is not at hand: {error}")


def wikitext_windows(shared_data):
    return np.load(shared_data / "wt2_test_ids.npy")[: 10 * 2048].reshape(10, 2048)


def test_tokenizing_wikitext_gives_the_published_ids(demo, shared_data):
    tokenizer = demo.tokenizer()
    ids = load_tokens(
        f"wikitext2:{shared_data / 'wiki.test.raw'}", "evaluation", lambda text: encode_stream(tokenizer, text)
    )
    np.testing.assert_array_equal(ids, np.load(shared_data / "wt2_test_ids.npy"))


def test_dense_perplexity(demo, shared_data):
    params = collect(demo.source)
    assert perplexity(params, wikitext_windows(shared_data)).perplexity == pytest.approx(19.92, abs=0.02)
    treebank = np.load(shared_data / "ptb_valid_ids.npy")[: 3 * 2048].reshape(3, 2048)
    assert perplexity(params, treebank).perplexity == pytest.approx(41.31, abs=0.05)


def quantize_and_measure(folder, shared_data, *options):
    """Both commands in processes of their own; returns their JSON and the first one's peak memory in GiB."""
    calibration = shared_data / "calib_wt2valid_32x1024_seed0.npy"
    spqr = [sys.executable, "-m", "spqr_jax"]
    if "rtn" not in options:
        options = (*options, "--calib", str(calibration), "--nsamples", "16", "--seqlen", "1024")
    subprocess.run(
        [*spqr, "quantize", "demo", "--out", folder / "m", "--json", folder / "q.json", *options], check=True
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    data = ["--data", shared_data / "wt2_test_ids.npy", "--seqlen", "2048", "--windows", "10"]
    subprocess.run([*spqr, "perplexity", folder / "m", *data, "--json", folder / "p.json"], check=True)
    return json.loads((folder / "q.json").read_text()), json.loads((folder / "p.json").read_text()), peak


@pytest.mark.landing
def test_spqr_beats_the_original_at_no_more_bits(demo, shared_data, tmp_path):
    stated = ["--bits", "3", "--group-size", "16", "--stats-bits", "3", "--stats-group-size", "16"]
    stated += ["--outlier-threshold", "0.2", "--damping", "1.0", "--order", "activation"]
    quantized, measured, peak = quantize_and_measure(tmp_path, shared_data, *stated)
    assert quantized["ideal_bits"] <= 4.20
    assert measured["perplexity"] <= ORIGINAL["spqr"]
    assert peak < 2.5  # GiB resident; of all child processes so far, this one is the largest


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rtn 3-bit", ["--method", "rtn", "--bits", "3", "--group-size", "16"]),
        ("gptq 3-bit", ["--method", "gptq", "--bits", "3", "--group-size", "64"]),
        ("gptq 4-bit", ["--method", "gptq", "--bits", "4", "--group-size", "64"]),
    ],
)
def test_baselines_are_as_good_as_the_originals(demo, shared_data, tmp_path, name, options):
    _, measured, _ = quantize_and_measure(tmp_path, shared_data, *options)
    assert measured["perplexity"] <= 1.02 * ORIGINAL[name]
