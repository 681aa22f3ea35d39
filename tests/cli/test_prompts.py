"""Prompts and chat templates on the command line, up to where the model would be read."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from support.command import spqr
from support.model_files import byte_tokenizer, write_model_and_ids
from support.vocabularies import byte_level
from tokenizers import processors

from spqr_jax import DataError, ModelError
from spqr_jax.cli.stream import as_text, encode_chat, encode_prompts, read_prompts
from spqr_jax.models.raw_tokenizer import as_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    return write_model_and_ids(tmp_path_factory.mktemp("prompts"), tiny_model)


class Bytes:
    """A stdin of bytes."""

    def __init__(self, data):
        self.buffer = io.BytesIO(data)


def test_prompts_are_valid_text(monkeypatch):
    assert read_prompts(["é", "b\n"]) == ["é", "b\n"]
    sixteen = os.fsdecode("café".encode("utf-16"))  # as an argument in another encoding comes in
    assert as_text(sixteen, "--prompt") == "café"
    for bad in (os.fsdecode("café".encode("latin-1")), "\ud800"):
        with pytest.raises(DataError, match="--prompt number 2"):
            read_prompts(["a", bad])
    for data, text in (("é\n".encode(), "é"), ("é\r\n".encode("utf-16"), "é"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", Bytes(data))
        assert read_prompts(None) == [text]


def test_a_stdin_that_cannot_be_read_is_one_message(monkeypatch):
    closed = io.StringIO()
    closed.close()

    class Broken:
        def read(self):
            raise IsADirectoryError(21, "Is a directory")

    for stdin in (None, closed, Broken()):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(DataError, match="stdin cannot be read"):
            read_prompts(None)
    monkeypatch.setattr(sys, "stdin", Bytes("café".encode("latin-1")))
    with pytest.raises(DataError, match="stdin"):
        read_prompts(None)


def test_a_prompt_without_tokens_is_one_message():
    with pytest.raises(DataError, match="the prompt holds no tokens"):
        encode_prompts(byte_tokenizer(), ["a", ""], chat=False)
    with pytest.raises(DataError, match="the prompt holds no tokens"):
        encode_chat(byte_tokenizer(), [{"role": "user", "content": ""}], "{{ messages[0].content }}")


def test_a_template_that_writes_bos_leaves_it_at_that():
    whole = byte_level()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
    tokenizer = as_transformers(whole, {"bos_token": "<s>"}, {"default": "{{ bos_token }}the"}, name="m")
    assert encode_prompts(tokenizer, [""], chat=False) == [[259]]  # BOS alone is a prompt
    assert encode_prompts(tokenizer, ["the"], chat=False) == [[259, 257]]
    assert encode_prompts(tokenizer, ["x"], chat=True) == [[259, 257]]


@pytest.mark.parametrize(
    ("template", "options", "says"),
    [
        ("{{ raise_exception('no, thanks') }}", [], "no, thanks"),
        ([{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}], [], "rag, tool_use"),
        ([{"name": "rag", "template": "{{ nope.x }}"}], ["--chat-template", "rag"], "'nope' is undefined"),
        ("x", ["--chat-template", "rag"], "only these templates: default"),
        (None, [], "no chat template"),
    ],
)
def test_chat_templates_fail_with_one_message(folder, template, options, says):
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    result = spqr("generate", "model", "--chat", "--prompt", "w1", *options, cwd=folder)
    assert result.returncode == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_the_template_option_is_for_chat(folder):
    result = spqr("generate", "model", "--prompt", "w1", "--chat-template", "rag", cwd=folder)
    assert result.returncode == 2
    assert "--chat-template needs --chat" in result.stderr


def test_a_tokenizer_of_another_model_is_one_message(folder):
    with pytest.raises(ModelError, match="cannot be encoded"):
        encode_prompts(as_transformers(_unknown(), {}, {}, name="m"), ["b"], chat=False)


def _unknown():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
