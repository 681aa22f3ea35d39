"""Messages quote files; whatever stands there, they can be read."""

from __future__ import annotations

import pickle

from spqr_jax import ModelError, SpQRError


def test_messages_can_be_printed():
    text = str(ModelError("tensor \x1b[2J\ud800\u202e\x00 of naïve 日本 🙂\n  second line"))
    assert text == "tensor \\x1b[2J\\ud800\\u202e\\x00 of naïve 日本 🙂\n  second line"
    text.encode()


def test_messages_are_not_endless():
    text = str(SpQRError("begin" + "x" * 10**6 + "\ud800" * 10**6 + "do this"))
    assert len(text) <= 2000
    assert text.startswith("begin")
    assert "characters" in text
    assert str(SpQRError("begin" + "x" * 10**6 + "do this")).endswith("do this")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ModelError("a message")))
    assert (type(error), str(error)) == (ModelError, "a message")
