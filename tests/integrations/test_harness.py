"""Tasks of the LM Evaluation Harness: our model and transformers' own behind the same tasks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.command import spqr
from support.harness_tasks import ANSWERS, CHOICES, ROLLING
from support.model_files import byte_tokenizer, write_model_and_ids

from spqr_jax import SpQRError
from spqr_jax.models.hf import open_hf
from spqr_jax.stream.blocks import collect

lm_eval = pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed (extra `eval`)")


def text(rng, length):
    return "".join(rng.choice(list("abcdefghij "), length))


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A tiny model with a tokenizer, and three tasks over local files."""
    folder = write_model_and_ids(tmp_path_factory.mktemp("harness"), tiny_model, eos_token=2)
    rng, tasks = np.random.default_rng(0), folder / "tasks"
    tasks.mkdir()
    rows = [
        {"question": text(rng, int(length)), "choices": [" " + text(rng, int(n)) for n in rng.integers(1, 9, 4)],
         "answer": int(rng.integers(4))}
        for length in rng.integers(1, 60, 20)
    ]  # fmt: skip
    rows.append(rows[0] | {"question": text(rng, 400)})  # longer than the model's context
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """(transformers' model in the harness's own backend, ours)."""
    pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    from lm_eval.models.huggingface import HFLM

    from spqr_jax.integrations.harness import HarnessModel

    theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4)
    ours = HarnessModel(collect(open_hf(folder / "model", np.float32)), theirs.tokenizer, batch_tokens=300)
    return theirs, ours


@pytest.fixture(scope="module")
def with_answers(folder, models):
    """The generation task: the right answer is what the model says, for half the questions."""
    rng = np.random.default_rng(1)
    stop = models[0].tokenizer.decode([models[0].tokenizer.encode("e")[0]])
    (folder / "tasks" / "answers.yaml").write_text(ANSWERS.format(folder=folder, stop=stop))
    for name, form in (("choices", CHOICES), ("rolling", ROLLING)):
        (folder / "tasks" / f"{name}.yaml").write_text(form.format(folder=folder))
    questions = [text(rng, int(n)) for n in rng.integers(2, 50, 8)]
    said = models[1].generate_until(
        [_Request((question, {"until": [stop], "max_gen_toks": 12, "do_sample": False})) for question in questions]
    )
    rows = [
        {"question": q, "answer": a if i % 2 else "no"} for i, (q, a) in enumerate(zip(questions, said, strict=True))
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class _Request:
    def __init__(self, args):
        self.args = args


def run(model, folder, task, **options):
    manager = lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_agree_with_the_harness_own_backend(models, with_answers, shots):
    theirs, ours = (run(m, with_answers, "tiny_choices", log_samples=True, num_fewshot=shots) for m in models)
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["tiny_choices"][metric] == theirs["results"]["tiny_choices"][metric]
    assert 0 < ours["results"]["tiny_choices"]["acc,none"] < 1
    for a, b in zip(ours["samples"]["tiny_choices"], theirs["samples"]["tiny_choices"], strict=True):
        for (log_p, greedy), (their_log_p, their_greedy) in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            assert float(log_p) == pytest.approx(float(their_log_p), abs=1e-4)
            assert greedy == their_greedy


def test_generated_answers_agree(models, with_answers):
    theirs, ours = (run(model, with_answers, "tiny_answers", log_samples=True) for model in models)
    said = [[sample["filtered_resps"] for sample in found["samples"]["tiny_answers"]] for found in (ours, theirs)]
    assert said[0] == said[1]
    assert len({str(answer) for answer in said[0]}) > 3
    assert ours["results"]["tiny_answers"] == theirs["results"]["tiny_answers"]
    assert 0.4 < ours["results"]["tiny_answers"]["exact_match,none"] < 1


def test_whole_texts_agree(models, with_answers):
    theirs, ours = (run(model, with_answers, "tiny_rolling")["results"]["tiny_rolling"] for model in models)
    for metric in ("word_perplexity,none", "byte_perplexity,none"):
        assert np.log(ours[metric]) == pytest.approx(np.log(theirs[metric]), rel=1e-5)


def test_chat_templates_agree(models):
    history = [{"role": "user", "content": "a question"}]
    theirs, ours = models
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.apply_chat_template(history).startswith("<user>a question")
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_eval_shows_and_writes_what_the_harness_says(with_answers, capfd):
    arguments = ("eval", "model", "--tasks", "tiny_choices,tiny_answers", "--include-path", "tasks", "--limit", 6)
    result = spqr(*arguments, "--json", "e.json", cwd=with_answers)
    assert result.returncode == 0, result.stderr
    assert "git" not in capfd.readouterr().err  # the folder is in no repository, which is nobody's business
    values = json.loads((with_answers / "e.json").read_text())
    accuracy = values["results"]["tiny_choices"]["acc,none"]
    assert values["n-samples"]["tiny_choices"]["effective"] == 6
    line = next(line for line in result.stdout.splitlines() if "tiny_choices" in line and "acc " in line)
    assert f"{accuracy:.4f}" in line
    result = spqr("eval", "model", "--tasks", "no_such_task", cwd=with_answers)
    assert result.returncode == 2
    assert "has no task no_such_task" in " ".join(result.stderr.split())


def test_without_a_chat_template_it_is_said(models):
    from spqr_jax.integrations.harness import HarnessModel

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(SpQRError, match="no chat template"):
        HarnessModel(models[1]._params, tokenizer).apply_chat_template([{"role": "user", "content": "x"}])
