"""How much calibration text a run takes."""

from __future__ import annotations

import dataclasses

import pytest
from support.command import spqr
from support.model_files import write_model_and_ids

from spqr_jax.forecast import Text
from spqr_jax.forecast.amount import MOST_TOKENS, TOKENS_AN_INPUT, enough_windows, widest_input, windows_within


def test_the_widest_matrix_asks_for_tokens(tiny_config):
    wide = dataclasses.replace(tiny_config, intermediate_size=1536)
    assert widest_input(wide) == ("down_proj", 1536, 1.0)
    assert enough_windows(wide, 1000) == -(-TOKENS_AN_INPUT * 1536 // 1000)
    huge = dataclasses.replace(tiny_config, intermediate_size=10**6)
    assert enough_windows(huge, 2048) == MOST_TOKENS // 2048
    assert enough_windows(tiny_config, 10**6) == 1


def test_experts_ask_for_what_they_do_not_see(tiny_config):
    experts = dataclasses.replace(
        tiny_config, family="mixtral", num_experts=8, experts_per_token=2, expert_size=tiny_config.intermediate_size
    )
    name, width, share = widest_input(experts)
    assert name.startswith("experts.")
    assert share == 0.25
    assert enough_windows(experts, 128) == -(-TOKENS_AN_INPUT * width * 4 // 128)


@pytest.mark.parametrize(("limit", "windows"), [(0.5, None), (1.0, 1), (7.9, 7), (8.0, 8), (100.0, 24)])
def test_a_time_allows_so_many_windows(limit, windows):
    assert windows_within(24, 2048, limit, lambda text: text.tokens / 2048) == windows
    assert windows_within(24, 2048, limit, lambda text: float(text.windows)) == windows
    assert Text(1, 2048).tokens == 2048


def test_the_command_takes_enough_and_warns_of_less(tiny_model, tmp_path):
    folder = write_model_and_ids(tmp_path, tiny_model)
    enough = enough_windows(tiny_model.config, 32)
    command = ["quantize", "model", "--bits", 3, "--calib", "ids.npy", "--seqlen", 32]
    whole = spqr(*command, "--out", "a", cwd=folder)
    assert f"calibrated on {enough} windows of 32 tokens" in whole.stderr
    assert "a first try" not in whole.stderr
    few = spqr(*command, "--nsamples", 2, "--out", "b", cwd=folder)
    assert f"tokens for each of the {widest_input(tiny_model.config)[1]} inputs" in few.stderr
    assert f"({enough} windows)" in few.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nsamples", "some"], "--nsamples: expected a number of windows, 1 or more, or auto; got 'some'"),
        (["--nsamples", "0"], "expected a number of windows, 1 or more"),
        (["--nsamples", "4", "--max-minutes", "1"], "leave out --nsamples, or --max-minutes"),
        (["--max-minutes", "0.0001"], "--max-minutes 0.0001: with one window this run takes about"),
        (["--max-minutes", "5", "--machine", "H100"], "leave out --machine, or --max-minutes"),
    ],
)
def test_amounts_that_cannot_be(tiny_model, tmp_path, arguments, says):
    folder = write_model_and_ids(tmp_path, tiny_model)
    refused = spqr("quantize", "model", "--plan", "--calib", "ids.npy", *arguments, cwd=folder)
    assert refused.returncode == 2
    assert says in refused.stderr


def test_a_time_limit_says_which_number_repeats_the_run(tiny_model, tmp_path):
    folder = write_model_and_ids(tmp_path, tiny_model)
    shown = spqr("quantize", "model", "--plan", "--calib", "ids.npy", "--max-minutes", 1000, cwd=folder)
    assert shown.returncode == 0
    assert f"--nsamples {enough_windows(tiny_model.config, 2048)} repeats this run" in shown.stderr
