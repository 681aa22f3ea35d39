from __future__ import annotations

import json

import pytest
from support.vocabularies import BYTE_LEVEL, byte_level, header
from tokenizers import processors

from spqr_jax import ModelError
from spqr_jax.models import chat
from spqr_jax.models.chat import chat_templates, gguf_chat_templates, pick_template
from spqr_jax.models.raw_tokenizer import as_transformers
from spqr_jax.models.tokenizer import load_tokenizer, render_chat

ASKED = [{"role": "user", "content": "hi"}]


def tokenizer(**templates):
    return as_transformers(byte_level(), {"bos_token": "<s>"}, templates, name="m")


def test_a_conversation_becomes_text():
    template = (
        "{{ bos_token }}{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = [{"role": "system", "content": "x"}, *ASKED]
    assert render_chat(tokenizer(default=template), asked) == "<s><user>hi"
    assert render_chat(tokenizer(default=template), asked, add_generation_prompt=True) == "<s><user>hi<assistant>"
    assert render_chat(tokenizer(default=template), asked, template="{{ messages | length }}") == "2"
    assert render_chat(tokenizer(default=template), asked, continue_final_message=True) == "<s><user>hi"


FAILING = {
    "{{ raise_exception('a system message is required') }}": "rejects this conversation: a system message is required",
    "{% for m in messages %}{{ m.content }}{% endfo": "not valid Jinja: line 1: .*endfo",
    "{% if %}": "not valid Jinja",
    "{{ 'x' | nofilter }}": "No filter named 'nofilter'",
    "{{ tools[0].name }}": "fails: None has no element 0",
    "{{ nope.x }}": "fails: 'nope' is undefined",
    "{{ messages[9].content }}": "no element 9",
    "{{ messages[0]['content'] + 5 }}": "concatenate",
    "{{ 1 / 0 }}": "division by zero",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ range(10 ** 9) }}": "Range too big",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "recursion",
    "(" + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "recursion",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "does not finish",
    "x" * 2_000_000: "2000000 characters",
    "{{ 'x' * 2000 }}": "2000 characters",
}


@pytest.mark.parametrize("template", FAILING, ids=[template[:30] for template in FAILING])
def test_a_template_that_fails_is_one_message_in_its_own_words(monkeypatch, template):
    monkeypatch.setattr(chat, "_LONGEST_TEXT", 1000)
    if "not finish" in FAILING[template]:
        monkeypatch.setattr(chat, "_SECONDS", 0.3)
    with pytest.raises(ModelError, match=FAILING[template]) as error:
        render_chat(tokenizer(default=template), ASKED)
    assert str(error.value).startswith("m: the chat template")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("messages", [[], ["x"]])
def test_what_is_no_conversation_is_one_message(messages):
    with pytest.raises(ModelError, match="chat template fails"):
        render_chat(tokenizer(default="x"), messages)


# ---- which template -----------------------------------------------------------------------------


def test_one_of_several_is_chosen(tmp_path):
    several = tokenizer(rag="R", tool_use="T")
    with pytest.raises(ModelError, match=r"called rag, tool_use, but none called default: .*--chat-template NAME"):
        render_chat(several, ASKED)
    assert pick_template(several, "rag") == "R"
    assert pick_template(tokenizer(default="D", rag="R")) == "D"
    (tmp_path / "own.jinja").write_text("é", encoding="utf-8")
    assert pick_template(several, str(tmp_path / "own.jinja")) == "é"
    for choice in ("nope", str(tmp_path), "\0"):
        with pytest.raises(ModelError, match="no such file"):
            pick_template(several, choice)
    with pytest.raises(ModelError, match="no chat template"):
        render_chat(tokenizer(), ASKED)


def test_a_template_that_is_no_text_is_one_message(tmp_path):
    (tmp_path / "own.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ModelError, match=r"own\.jinja"):
        pick_template(tokenizer(), str(tmp_path / "own.jinja"))


# ---- where they come from -----------------------------------------------------------------------


def write(folder, config=None, **files):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / path).write_text(text)
    return chat_templates(folder)


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        (None, {}, {}),
        ("", {}, {}),
        ("C", {}, {"default": "C"}),
        ([{"name": "default", "template": "C"}, {"name": "rag", "template": "R"}], {}, {"default": "C", "rag": "R"}),
        ({"default": "C", "rag": "R"}, {}, {"default": "C", "rag": "R"}),
        ("C", {"default": "F"}, {"default": "F"}),
        ({"default": "C", "rag": "R"}, {"default": "F", "tool_use": "T"}, {"default": "F", "tool_use": "T"}),
    ],
)
def test_files_go_before_settings(tmp_path, config, files, expected):
    assert write(tmp_path, config, **files) == expected


def test_the_older_file_comes_last(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert chat_templates(tmp_path) == {"default": "old"}
    assert write(tmp_path, "C") == {"default": "C"}


def test_gguf_files_have_several():
    names = {"tokenizer.chat_template": "D", "tokenizer.chat_template.rag": "R", "tokenizer.chat_templates": ["rag"]}
    assert gguf_chat_templates(header(BYTE_LEVEL, **names).entries) == {"default": "D", "rag": "R"}


def test_transformers_is_handed_the_same_templates(tmp_path):
    whole = byte_level()
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
    whole.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, None, default="{{ bos_token }}F", rag="R")
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == {"default": "{{ bos_token }}F", "rag": "R"}
