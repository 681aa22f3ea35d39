"""Typed getters: a value of its type, or one message: file, key, what is there, what was expected, what to do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spqr_jax import DataError, ModelError
from spqr_jax.files import Entries, read_json, read_object

VALUES = {"a": 3, "b": 2.5, "c": "text", "d": True, "e": [1, 2], "f": None, "g": {"h": {"i": "x"}}, "j": 4096.0,
          "k": np.array([7, 8], np.uint32), "l": [0.5, 1], "m": ["p", "q"]}  # fmt: skip
ENTRIES = Entries(VALUES, "F", defaults={"f": 1, "n": 9, "a": 0})


def test_values_have_their_types():
    assert (ENTRIES.integer("a"), ENTRIES.integer("j"), ENTRIES.number("a"), ENTRIES.number("b")) == (3, 4096, 3.0, 2.5)
    assert (ENTRIES.text("c"), ENTRIES.flag("d"), ENTRIES.integers("a")) == ("text", True, [3])
    assert (ENTRIES.integers("e"), ENTRIES.integers("k"), ENTRIES.numbers("l")) == ([1, 2], [7, 8], [0.5, 1.0])
    assert (ENTRIES.texts("m"), ENTRIES.texts("c"), ENTRIES.texts("nothing")) == (["p", "q"], ["text"], [])
    assert ENTRIES.nested("g").nested("h").text("i") == "x"


def test_null_is_absent_and_goes_before_a_default():
    assert "f" not in ENTRIES
    assert ENTRIES.maybe_integer("f") is None
    assert (ENTRIES.integer("f", 5), ENTRIES.integer("n"), ENTRIES.maybe_text("z")) == (5, 9, None)
    assert not list(ENTRIES.nested("f"))


@pytest.mark.parametrize(
    ("get", "says"),
    [
        (lambda e: e.integer("b"), "F: b is 2.5, expected a whole number from 0 to 2147483647: correct the entry"),
        (lambda e: e.integer("d"), "F: d is True, expected a whole number"),
        (lambda e: e.integer("a", least=4), "F: a is 3, expected a whole number from 4"),
        (lambda e: e.number("c"), "F: c is 'text', expected a finite number"),
        (lambda e: e.number("a", least=3.5), "expected a finite number of at least 3.5"),
        (lambda e: e.flag("a"), "F: a is 3, expected true or false"),
        (lambda e: e.text("e"), r"F: e is \[1, 2\], expected a string"),
        (lambda e: e.texts("e"), "F: e is 1, expected strings"),
        (lambda e: e.integers("l"), "F: l is 0.5, expected whole numbers"),
        (lambda e: e.integers("g"), "F: g is .* expected a list"),
        (lambda e: e.nested("c"), "F: c is 'text', expected an object"),
        (lambda e: e.nested("g").nested("h").integer("i"), r"F: g\.h\.i is 'x', expected a whole number"),
        (lambda e: e.nested("g").nested("h").text("y"), r"F lacks g\.h\.y \(a string\): add the entry"),
        (lambda e: e.integer("f"), r"F lacks f \(a whole number\)"),
    ],
)
def test_everything_else_is_one_message(get, says):
    with pytest.raises(ModelError, match=says):
        get(ENTRIES)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -1e999, "\ud800", [[]], 2**31, {"x": {}}])
def test_extreme_values_are_refused_by_every_getter(value):
    entries = Entries({"x": value}, "F", error=DataError)
    for get in (entries.integer, entries.number, entries.text, entries.flag, entries.integers, entries.numbers):
        if get == entries.number and value == 2**31:
            continue
        if get == entries.numbers and value == 2**31:
            continue
        with pytest.raises(DataError, match=r"^F: x is ") as caught:
            get("x")
        assert len(str(caught.value)) < 300
        str(caught.value).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'\xff{"a": 1}', "is not valid JSON"),
        (b"[1]", r"holds \[1\], expected a JSON object"),
    ],
)
def test_files_that_are_no_json_objects(tmp_path, content, says):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        read_object(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path, "cannot be read"), (tmp_path / "\0", "read")):
        with pytest.raises(ModelError, match=says):
            read_json(path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_object(tmp_path / "x.json").integer("a") == 1
