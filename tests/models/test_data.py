from __future__ import annotations

import numpy as np
import pytest

from spqr_jax import DataError
from spqr_jax.data import (
    calibration_windows,
    evaluation_windows,
    join_sentences,
    join_wikitext,
    load_tokens,
    pydoc_text,
)


def encode(text):
    return np.array([ord(c) % 256 for c in text], np.int32)


def test_pydoc_halves_do_not_touch():
    calibration, evaluation = pydoc_text("calibration"), pydoc_text("evaluation")
    assert 0.8 < len(calibration) / len(evaluation) < 1.25
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert len(calibration) > 80_000
    assert "::=" not in calibration


def test_wikitext_is_joined_as_gptq_does():
    lines = [" \n", " = Title = \n", " \n", " Some text .\n"]
    assert join_wikitext(lines) == "\n\n = Title = \n\n\n\n\n Some text .\n"


def test_sentences_are_stripped():
    assert join_sentences([" a b \n", " c\n"]) == "a b\n\nc"


def test_ids_are_taken_as_they_are(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    stream = load_tokens(str(tmp_path / "a.npy"), "evaluation", encode)
    assert stream.dtype == np.int32
    np.testing.assert_array_equal(evaluation_windows(stream, 30, None), np.arange(90).reshape(3, 30))
    np.testing.assert_array_equal(evaluation_windows(stream, 30, 2), np.arange(60).reshape(2, 30))
    windows = np.arange(40).reshape(4, 10)
    np.testing.assert_array_equal(calibration_windows(windows, 8, 3, seed=5), windows[:3, :8])


def test_text_files_and_protocols(tmp_path):
    (tmp_path / "a.txt").write_text("line one\n \nline two\n")
    plain = load_tokens(str(tmp_path / "a.txt"), "evaluation", encode)
    joined = load_tokens(f"wikitext2:{tmp_path / 'a.txt'}", "evaluation", encode)
    np.testing.assert_array_equal(plain, encode("line one\n \nline two\n"))
    np.testing.assert_array_equal(joined, encode("line one\n\n\n\n\nline two\n"))


def test_calibration_windows_repeat_by_seed():
    stream = np.arange(1000)
    a, b, c = (calibration_windows(stream, 50, 8, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert np.all(np.diff(a, axis=1) == 1)
    assert calibration_windows(np.arange(50), 50, 2, 0).shape == (2, 50)


def bad_files(folder):
    np.save(folder / "float.npy", np.ones(4))
    np.save(folder / "cube.npy", np.ones((2, 2, 2), int))
    np.save(folder / "negative.npy", np.array([-1, 2]))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "torn.npy").write_bytes(b"\x93NUMPY")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("float.npy", "integer token ids"),
        ("cube.npy", "integer token ids"),
        ("negative.npy", "negative"),
        ("objects.npy", "not an .npy file of numbers"),
        ("torn.npy", "not an .npy file"),
        ("empty.txt", "no text"),
        ("binary.txt", "not UTF-8"),
        ("nowhere.npy", "does not exist"),
        ("nowhere", "expected a text file"),
    ],
)
def test_unusable_data_says_why(tmp_path, name, says):
    bad_files(tmp_path)
    with pytest.raises(DataError, match=says):
        load_tokens(str(tmp_path / name), "evaluation", encode)


def test_too_little_text_says_so():
    with pytest.raises(DataError, match="10 tokens, less than one window of 20"):
        evaluation_windows(np.arange(10), 20, None)
    with pytest.raises(DataError, match="less than one window"):
        calibration_windows(np.arange(10), 20, 1, 0)
    with pytest.raises(DataError, match="asked for 5 of 4"):
        calibration_windows(np.zeros((2, 4), int), 4, 5, 0)


def test_an_unreachable_corpus_points_to_pydoc(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="without a network use 'pydoc'"):
        load_tokens("c4", "calibration", encode)


def test_corpora_are_read_by_their_protocol(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def fake(path, name, **options):
        calls.append((path, name, options))
        return [{"text": "a", "sentence": "s"}, {"text": "b", "sentence": "t"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    np.testing.assert_array_equal(load_tokens("wikitext2", "evaluation", encode), encode("a\n\nb"))
    np.testing.assert_array_equal(load_tokens("c4", "evaluation", encode), encode("a b"))
    assert calls[0][2]["split"] == "test"
    assert calls[1][2]["streaming"] is True
    assert "validation" in str(calls[1][2]["data_files"])
