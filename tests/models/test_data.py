from __future__ import annotations

import re

import numpy as np
import pytest

from spqr_jax import DataError
from spqr_jax.data import (
    at_hand,
    calibration_windows,
    evaluation_windows,
    join_sentences,
    join_wikitext,
    load_tokens,
    mixed_windows,
    pychat_conversations,
    pydoc_text,
    pysource_text,
    shares,
    split_weight,
)


def encode(text):
    return np.array([ord(c) % 256 for c in text], np.int32)


def test_pydoc_halves_do_not_touch():
    calibration, evaluation = pydoc_text("calibration"), pydoc_text("evaluation")
    assert 0.8 < len(calibration) / len(evaluation) < 1.25
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))
    assert len(calibration) > 80_000
    assert "::=" not in calibration


def test_code_at_hand_is_code_and_its_halves_do_not_touch():
    calibration, evaluation = pysource_text("calibration"), pysource_text("evaluation")
    assert 0.8 < len(calibration) / len(evaluation) < 1.25
    assert len(calibration) > 800_000
    for text in (calibration, evaluation):
        assert len(re.findall(r"^(?:class|def) \w+", text, re.MULTILINE)) > 300
    bodies = re.compile(r"^def \w+\(.*\n(?: .*\n|\n)+", re.MULTILINE)
    functions = [set(bodies.findall(text)) for text in (calibration, evaluation)]
    assert len(functions[0] & functions[1]) < 0.02 * len(functions[0])  # small helpers that modules have alike


def test_conversations_at_hand_are_questions_and_answers():
    calibration, evaluation = pychat_conversations("calibration"), pychat_conversations("evaluation")
    assert min(len(calibration), len(evaluation)) > 150
    for conversation in calibration:
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert 2 <= len(conversation) <= 8
    questions = [{talk[0]["content"] for talk in part} for part in (calibration, evaluation)]
    assert not questions[0] & questions[1]


def test_conversations_at_hand_take_the_chat_template():
    def render(messages):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    read = []
    load_tokens("pychat", "calibration", lambda text: read.append(text) or encode(text), render)
    assert read[0].startswith("<user>What does the ")
    assert read[0].count("<user>") == read[0].count("<assistant>") > 500
    with pytest.raises(DataError, match="pychat, conversation 1 is a conversation, but the model has no chat template"):
        load_tokens("pychat", "calibration", encode)


def test_a_python_without_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(at_hand.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "big.py").write_text("x = 1\n" * 1000)  # a test
    with pytest.raises(DataError, match=r"this Python has no source files of its library in .*: give a file of text"):
        load_tokens("pysource", "calibration", encode)


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
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    np.testing.assert_array_equal(load_tokens(str(tmp_path / "A.NPY"), "evaluation", encode), stream)
    (tmp_path / "A.NPY").rename(tmp_path / "ids")
    np.testing.assert_array_equal(load_tokens(str(tmp_path / "ids"), "evaluation", encode), stream)
    for dtype in (np.uint16, ">i4", np.uint64):
        np.save(tmp_path / "b.npy", np.arange(100).astype(dtype))
        other = load_tokens(str(tmp_path / "b.npy"), "evaluation", encode)
        assert other.dtype == np.int32
        np.testing.assert_array_equal(other, stream)
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
    with pytest.raises(DataError, match="the seed must be 0 or more, got -1"):
        calibration_windows(stream, 50, 8, -1)


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ([1], 5, [5]),
        ([1, 1], 5, [3, 2]),
        ([1, 2], 128, [43, 85]),
        ([0.5, 0.25, 0.25], 8, [4, 2, 2]),
        ([1, 1, 1], 4, [2, 1, 1]),
        ([100, 1, 1], 4, [2, 1, 1]),  # at least one of each
        ([1e308, 1e308, 1e-320], 5, [2, 2, 1]),
    ],
)
def test_windows_are_shared_by_weight(weights, count, expected):
    assert shares(weights, count) == expected


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(DataError, match="must be a positive number, got"):
        shares([1, weight], 8)


def test_each_text_needs_a_window():
    with pytest.raises(DataError, match="2 windows are too few for 3 texts: use more windows"):
        shares([1, 1, 1], 2)


def test_one_text_is_drawn_as_without_mixing():
    stream = np.arange(1000, dtype=np.int32)
    for first_token in (None, 7):
        alone = calibration_windows(stream, 50, 8, 3, "s", first_token)
        np.testing.assert_array_equal(mixed_windows([stream], [2.5], 50, 8, 3, ["s"], first_token), alone)
    starts = np.random.default_rng(3).integers(0, 951, 8)
    np.testing.assert_array_equal(mixed_windows([stream], [1], 50, 8, 3)[:, 0], starts)


def test_texts_are_mixed_by_weight_and_spread():
    texts = [np.arange(1000), np.arange(1000, 2000), np.arange(2000, 3000).reshape(10, 100)]
    windows = mixed_windows(texts, [2, 1, 1], 20, 16, seed=0)
    assert windows.shape == (16, 20)
    assert np.all(np.diff(windows, axis=1) == 1)
    of = windows[:, 0] // 1000
    assert np.bincount(of).tolist() == [8, 4, 4]
    for quarter in of.reshape(4, 4):
        assert np.bincount(quarter).tolist() == [2, 1, 1]
    np.testing.assert_array_equal(windows[of == 2], texts[2][:4, :20])  # ready-made ones in their order
    np.testing.assert_array_equal(windows, mixed_windows(texts, [2, 1, 1], 20, 16, seed=0))
    other = mixed_windows(texts, [2, 1, 1], 20, 16, seed=1)
    assert not np.array_equal(windows[of < 2], other[of < 2])
    twice = mixed_windows([texts[0], texts[0]], [1, 1], 20, 16, seed=0)
    assert len(np.unique(twice[:, 0])) > 12  # a draw of its own for each


def test_a_text_of_the_mixture_that_is_too_short_is_named():
    with pytest.raises(DataError, match=r"b\.txt holds 10 tokens, less than one window of 20"):
        mixed_windows([np.arange(1000), np.arange(10)], [1, 1], 20, 4, 0, ["a.txt", "b.txt"])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("wikitext2", ("wikitext2", 1)),
        ("code.jsonl=2", ("code.jsonl", 2)),
        ("wikitext2:wiki.raw=0.5", ("wikitext2:wiki.raw", 0.5)),
        ("code.jsonl#body=1e-3", ("code.jsonl#body", 0.001)),
        ("lr=3", ("lr=3", 1)),
        ("lr=3=4", ("lr=3", 4)),
        ("lr=3#body", ("lr=3#body", 1)),
        ("ptb:lr=3", ("ptb:lr=3", 1)),
    ],
)
def test_weights_stand_behind_texts(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").write_text("a file whose name holds a sign")
    (tmp_path / "code.jsonl").write_text("{}")
    assert split_weight(spec) == expected


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999", "abc", "", "2,5", "2x", "0x10"])
def test_bad_weights_say_so(weight):
    with pytest.raises(DataError, match="must be the weight of the text: a positive number"):
        split_weight(f"code.jsonl={weight}")


def bad_files(folder):
    np.save(folder / "float.npy", np.ones(4))
    np.save(folder / "cube.npy", np.ones((2, 2, 2), int))
    np.save(folder / "negative.npy", np.array([-1, 2]))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "torn.npy").write_bytes(b"\x93NUMPY")
    (folder / "nothing.npy").write_bytes(b"")
    np.save(folder / "large.npy", np.array([1, 2**32 + 5]))
    np.save(folder / "unsigned.npy", np.array([2**63 + 1], np.uint64))
    np.save(folder / "flags.npy", np.array([True]))
    np.save(folder / "none.npy", np.zeros((0, 4), int))
    np.save(folder / "pair.npy", np.array([(1, 2)], [("a", "i4"), ("b", "i4")]))
    np.save(folder / "short.npy", np.arange(1000))
    (folder / "short.npy").write_bytes((folder / "short.npy").read_bytes()[:500])
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(117) + b"\n"
    (folder / "liar.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header)
    (folder / "header.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"{'descr': (((".ljust(117) + b"\n")
    with (folder / "archive.npy").open("wb") as file:
        np.savez(file, a=np.arange(3))
    (folder / "text.npy").write_text("some text")
    (folder / "folder.npy").mkdir()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("float.npy", "integer token ids"),
        ("cube.npy", "integer token ids"),
        ("negative.npy", "negative"),
        ("objects.npy", "not an .npy file of numbers"),
        ("torn.npy", "not an .npy file"),
        ("nothing.npy", "not an .npy file"),
        ("large.npy", r"do not fit in 32 bits .largest 4294967301"),
        ("unsigned.npy", "do not fit in 32 bits"),
        ("flags.npy", "holds bool"),
        ("none.npy", "shape .0, 4."),
        ("pair.npy", "integer token ids"),
        ("short.npy", "not an .npy file of numbers"),
        ("liar.npy", "not an .npy file of numbers"),
        ("header.npy", "not an .npy file of numbers"),
        ("archive.npy", "archive of several arrays"),
        ("text.npy", "not an .npy file of numbers"),
        ("folder.npy", "cannot be read: Is a directory"),
        ("empty.txt", "no text"),
        ("binary.txt", "not UTF-16-LE"),
        ("nowhere.npy", "does not exist"),
        ("nowhere", "no data found for .*nowhere': expected .* a text file"),
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
    with pytest.raises(DataError, match="but 5 windows of 4 tokens are needed"):
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
        messages = [{"role": "user", "content": "hi"}]
        return [
            {"text": "a", "sentence": "s", "messages": messages},
            {"text": "b", "sentence": "t", "messages": messages},
        ]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    np.testing.assert_array_equal(load_tokens("wikitext2", "evaluation", encode), encode("a\n\nb"))
    np.testing.assert_array_equal(load_tokens("c4", "evaluation", encode), encode("a b"))
    conversations = load_tokens("ultrachat", "evaluation", encode, lambda messages: f"<{messages[0]['content']}>")
    np.testing.assert_array_equal(conversations, encode("<hi><hi>"))
    assert calls[2][2]["split"] == "test_sft"
    assert calls[0][2]["split"] == "test"
    assert calls[1][2]["streaming"] is True
    assert "validation" in str(calls[1][2]["data_files"])
