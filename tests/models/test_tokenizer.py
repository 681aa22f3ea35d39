from __future__ import annotations

import json

import pytest
from support.vocabularies import BYTE_LEVEL, SENTENCEPIECE, TOKENIZERS, byte_level, header, write_gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from spqr_jax import ModelError
from spqr_jax.models.gguf_words import PRE_TOKENIZERS
from spqr_jax.models.tokenizer import (
    encode_stream,
    gguf_tokenizer,
    gguf_tokenizer_files,
    load_tokenizer,
    token_ids,
    tokenizer_files,
)

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def gguf_byte_level(path, pre, merges=("1 2", "l o", "lo w", "Ġ low"), **extra):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)
    return write_gguf(path, "gpt2", tokens, types, merges, pre=pre, eos_token_id=0, **extra)


def pieces(tokenizer, text):
    return [tokenizer.convert_ids_to_tokens(int(i)) for i in encode_stream(tokenizer, text)]


# ---- tokenizer.json -----------------------------------------------------------------------------

TEXTS = [
    "w3 w4 w5 w6",
    "",
    " the",
    "the the  the",
    "the<s>the",
    "</s> the <|im_end|>\n the",
    "é 日本 🙂",
    "w1 w2 . w3",
    "\tt\nh .",
]
SETTINGS = {
    "nothing": {},
    "a class that rebuilds": {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
        "add_eos_token": True, "legacy": False, "add_prefix_space": True, "clean_up_tokenization_spaces": True,
    },
    "tokens of its own": {
        "eos_token": {"content": "the"}, "bos_token": None, "pad_token": "[PAD]", "split_special_tokens": True,
        "extra_special_tokens": ["w1", "new"], "model_max_length": 2, "truncation_side": "left",
        "added_tokens_decoder": {"5": {"content": "t", "special": True}},
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizer_json_is_the_truth(tmp_path, make, settings):
    make().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    loaded = load_tokenizer(tmp_path)
    loaded.save_pretrained(tmp_path / "saved")
    for tokenizer in (loaded, load_tokenizer(tmp_path / "saved")):
        assert len(tokenizer) == raw.get_vocab_size()
        for text in TEXTS:
            ids = raw.encode(text).ids
            assert encode_stream(tokenizer, text).tolist() == raw.encode(text, add_special_tokens=False).ids
            assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == ids
            for skip in (False, True):
                assert tokenizer.decode(ids, skip_special_tokens=skip) == raw.decode(ids, skip_special_tokens=skip)


def test_named_tokens_are_those_of_transformers(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    settings, tokens = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"
    settings.write_text('{"eos_token": "<s>", "bos_token": null, "pad_token": "[PAD]"}')
    tokens.write_text('{"eos_token": {"content": "</s>", "lstrip": false}, "bos_token": "<s>", "unk_token": null}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == ("</s>", "<s>", None)
    assert tokenizer.pad_token is None  # no token of this tokenizer: not added
    settings.write_text('{"eos_token": "<s>", "added_tokens_decoder": {}}')  # newer: then it goes first
    assert load_tokenizer(tmp_path).eos_token == "<s>"


def test_a_named_token_that_is_none_is_left_out_and_said(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    said = []
    assert load_tokenizer(tmp_path, said.append).eos_token_id is None
    assert "eos_token '<|eot|>' is not a token" in said[0]


def changed(**changes):
    values = json.loads(byte_level().to_str())
    model = values["model"] | {name: changes.pop(name) for name in ("vocab", "merges", "type") if name in changes}
    return json.dumps(values | {"model": model} | changes).encode()


NO_TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": []}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (changed()[:-50], "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "expected a JSON object"),
        (b"{}", "cannot be read as a tokenizer"),
        (changed(vocab=["a"]), "cannot be read as a tokenizer"),
        (changed(vocab={"a": -1}), "cannot be read as a tokenizer"),
        (changed(merges=["t h e"]), "cannot be read as a tokenizer"),
        (changed(merges=["no tokens"]), "cannot be read as a tokenizer"),
        (changed(type="Other"), "cannot be read as a tokenizer"),
        (changed(added_tokens=[{"id": -1, "content": "x"}]), "cannot be read as a tokenizer"),
        (changed(post_processor=NO_TEMPLATE | {"special_tokens": {}}), "lacks 'x'"),
    ],
)
def test_a_damaged_tokenizer_is_one_message(tmp_path, data, says):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ModelError, match=says) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize(
    "settings",
    ["[]", "{", '{"eos_token": 5}', '{"eos_token": {}}', '{"eos_token": {"content": 5}}', '{"chat_template": 5}',
     '{"chat_template": [5]}', '{"chat_template": [{"name": "x"}]}', '{"chat_template": {"a": 5}}'],
)  # fmt: skip
def test_damaged_settings_are_one_message(tmp_path, settings):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_text_that_cannot_be_encoded_is_one_message(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text, says in (("b", "cannot be encoded"), ("\ud800", "lone surrogates")):
        with pytest.raises(ModelError, match=says):
            token_ids(tokenizer, text, add_special_tokens=True)


def test_its_files_are_kept_byte_for_byte(tmp_path):
    files = {
        "tokenizer.json": b'{"odd":  1}', "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{ }",
        "chat_template.jinja": b"{{ 1 }}", "additional_chat_templates/rag.jinja": "é".encode(),
        "added_tokens.json": b"{}",
    }  # fmt: skip
    (tmp_path / "additional_chat_templates").mkdir()
    for name, data in (files | {"model.safetensors": b"x", "config.json": b"{}"}).items():
        (tmp_path / name).write_bytes(data)
    assert tokenizer_files(tmp_path) == files


# ---- GGUF: how text is cut ----------------------------------------------------------------------

TEXT = "We'LL pay $1234567 toMrÉcole日本 a\u0301.\n\n  x"
CUT = {
    "default": "We|'|LL| pay| |$|123|456|7| toMrÉcole日本| a|\u0301|.|\n\n | x",
    "falcon": "We|'|LL| pay| |$|123|456|7| toMrÉcole日本| a|\u0301|.|\n\n | x",
    "gpt-2": "We|'|LL| pay| $|1234567| toMrÉcole日本| a|\u0301.|\n\n | x",
    "smollm": "We|'|LL| pay| $|1|2|3|4|5|6|7| toMrÉcole日本| a|\u0301.|\n\n | x",
    "falcon3": "We|'LL| pay| $|123|456|7| toMrÉcole日本| a|\u0301.\n\n| | x",
    "deepseek-r1-qwen": "We|'LL| pay| $|1|2|3|4|5|6|7| toMrÉcole日本| a|\u0301.\n\n| | x",
    "seed-coder": "We|'LL| pay| $|1|2|3|4|5|6|7| toMrÉcole日本| a|\u0301.|\n\n| | x",
    "exaone-moe": "We|'LL| pay| $|1|2|3|4|5|6|7| toMrÉcole日本 a\u0301|.\n|\n| | x",
    "tekken": "We|'LL| pay| $|1|2|3|4|5|6|7| to|Mr|École日本| a\u0301|.\n\n| | x",
    "gpt-4o": "We'LL| pay| $|123|456|7| to|Mr|École日本| a\u0301|.\n\n| | x",
    "tiny_aya": "We'LL| pay| $|1|234|567| to|Mr|École日本| a\u0301|.\n\n| | x",
    "deepseek-llm": "We|'|LL| pay| $|1234567| toMr|É|cole|日本| a|\u0301|.|\n|\n| | x",
    "deepseek-coder": "We|'|LL| pay| $|1|2|3|4|5|6|7| toMrÉcole|日本| a|\u0301|.|\n|\n| | x",
    "deepseek-v3": "We|'LL| pay| $|123|456|7| toMrÉcole|日本| a\u0301|.\n\n| | x",
    "viking": "We'LL| pay| $|1|2|3|4|5|6|7| toMrÉcole日本| a\u0301|.\n\n | x",
    "superbpe": "We'LL pay $|1|234|567| toMrÉcole日本 a\u0301.\n\n  x",
}


# deepseek-llm's second expression leaves "toMrÉcole" whole; its third has letters of ASCII in the range ":-~".


def cut(name, text):
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZERS[name].regexes]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", CUT)
def test_text_is_cut_as_the_name_says(name):
    assert "|".join(cut(name, TEXT)) == CUT[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_expression_is_understood_and_loses_nothing(name):
    for text in (TEXT, "", "\r\n\t \u00a0", "<sentinel:12>IMGIMGABZ '' 's'S", "०१२३ ½ Ǆ ʰ \U0001e900 🙂\u200d"):
        assert "".join(cut(name, text)) == text


@pytest.mark.parametrize(
    ("pre", "expected"), [("gpt-2", ["12"]), ("smollm", ["1", "2"]), ("qwen2", ["1", "2"]), ("llama-bpe", ["12"])]
)
def test_the_pre_tokenizer_decides_whether_digits_stand_alone(tmp_path, pre, expected):
    tokenizer = gguf_tokenizer(gguf_byte_level(tmp_path / "t.gguf", pre))
    assert pieces(tokenizer, "12") == expected


def test_a_file_that_names_none_is_cut_by_the_default_and_it_is_said():
    said = []
    tokenizer = gguf_tokenizer(header(BYTE_LEVEL, pre=None), said.append)
    assert pieces(tokenizer, "hi") == ["hi"]
    assert "lacks tokenizer.ggml.pre" in said[0]


# ---- GGUF: vocabularies -------------------------------------------------------------------------


def test_merges_bytes_and_specials(tmp_path):
    tokenizer = gguf_tokenizer(gguf_byte_level(tmp_path / "t.gguf", "smollm"))
    assert pieces(tokenizer, "low low") == ["low", "Ġlow"]
    for text in ("naïve 日本 🙂\n\ttabs", " leading", "12 345"):
        assert tokenizer.decode(encode_stream(tokenizer, text)) == text
    assert pieces(tokenizer, "low<end>low") == ["low", "<end>", "low"]
    assert tokenizer.eos_token == "<end>"


def test_it_survives_saving(tmp_path):
    file = gguf_byte_level(tmp_path / "t.gguf", "smollm", chat_template="{{ messages[0].content }}!")
    tokenizer = gguf_tokenizer(file)
    for name, data in gguf_tokenizer_files(file).items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(tmp_path)
    assert pieces(again, "low 12") == pieces(tokenizer, "low 12")
    assert again.chat_template == "{{ messages[0].content }}!"
    assert again.eos_token == "<end>"


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    words = {"▁": -8.0, "a": -5.0, "b": -6.0, "ab": -1.0, "▁a": -3.0, "ba": -2.0, "bab": -4.0}
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *words]
    scores = [0.0] * 259 + list(words.values())
    types = [2, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    file = write_gguf(
        tmp_path / "t.gguf", "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2, unk_token_id=0
    )
    tokenizer = gguf_tokenizer(file)
    # likeliest pair first: "ab" (-1) before "ba" (-2); then nothing joins "▁" and "ab"
    assert pieces(tokenizer, "ab") == ["▁", "ab"]
    assert pieces(tokenizer, "a") == ["▁a"]
    assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encode_stream(tokenizer, "ab é"), skip_special_tokens=True) == "ab é"
    assert tokenizer("a")["input_ids"][0] == 1  # this kind starts a text with BOS unless told not to


@pytest.mark.parametrize("pre", ["llama-bpe", "falcon3", "tekken", "chameleon"])
def test_some_pre_tokenizers_begin_a_text_with_bos_unless_told_not_to(pre):
    assert gguf_tokenizer(header(BYTE_LEVEL, pre=pre, bos_token_id=3))("hi")["input_ids"] == [3, 2]
    told = header(BYTE_LEVEL, pre=pre, bos_token_id=3, add_bos_token=False)
    assert gguf_tokenizer(told)("hi")["input_ids"] == [2]


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (BYTE_LEVEL, {"bos_token_id": 3}, [2]),  # gpt-2 adds none by itself
        (BYTE_LEVEL, {"bos_token_id": 3, "add_bos_token": True, "add_eos_token": True}, [3, 2, 2]),
        (BYTE_LEVEL, {"pre": "falcon3"}, [2]),  # no id of a BOS token
        (SENTENCEPIECE, {}, [1, 3, 6]),  # llama.cpp's ids 1 and 2
        (SENTENCEPIECE, {"add_eos_token": True}, [1, 3, 6, 2]),
        (SENTENCEPIECE, {"add_bos_token": False, "add_space_prefix": False}, [6]),
        (SENTENCEPIECE, {"token_type": None}, [1, 3, 6]),
    ],
)
def test_what_stands_around_a_text(base, changes, expected):
    assert gguf_tokenizer(header(base, **changes))("hi")["input_ids"] == expected


def test_words_that_are_tokens_stay_whole_where_merges_are_ignored():
    unmerged = {"merges": [], "tokens": ["h", "i", "hi", "<|im_end|>", "x"]}
    assert pieces(gguf_tokenizer(header(BYTE_LEVEL, pre="tekken", **unmerged)), "hi") == ["hi"]
    assert pieces(gguf_tokenizer(header(BYTE_LEVEL, pre="qwen2", **unmerged)), "hi") == ["h", "i"]


def test_special_tokens_of_phi_3_take_the_white_space_after_them():
    tokens = [*"hi ", "<|end|>", "<|endoftext|>"]
    base = {**BYTE_LEVEL, "tokens": tokens, "merges": [], "token_type": [1, 1, 1, 3, 3], "eos_token_id": 4}
    plain, phi = header(base), header(base, **{"general.name": "Phi-3 Mini"})
    assert token_ids(gguf_tokenizer(plain), "<|end|>\n<|endoftext|>h", add_special_tokens=False) == [3, 4, 0]
    assert gguf_tokenizer(phi).backend_tokenizer.get_added_tokens_decoder()[3].rstrip
    assert not gguf_tokenizer(phi).backend_tokenizer.get_added_tokens_decoder()[4].rstrip


def test_a_tokenizer_json_inside_the_file_is_the_truth():
    whole = byte_level().to_str()
    tokenizer = gguf_tokenizer(header(BYTE_LEVEL, **{"tokenizer.huggingface.json": whole}))
    assert pieces(tokenizer, " the<s>") == ["Ġthe", "<s>"]


@pytest.mark.parametrize(
    ("kind", "pre", "says"), [("gpt2", "martian", "'martian' is not supported"), ("t5", None, "'t5'")]
)
def test_unknown_kinds_are_refused(tmp_path, kind, pre, says):
    file = write_gguf(tmp_path / "t.gguf", kind, ["a"], [NORMAL], pre=pre)
    with pytest.raises(ModelError, match=says):
        gguf_tokenizer(file)


DAMAGED = [
    (BYTE_LEVEL, "model", None, "lacks tokenizer.ggml.model"),
    (BYTE_LEVEL, "model", 5, "model is 5"),
    (BYTE_LEVEL, "tokens", None, "lacks tokenizer.ggml.tokens"),
    (BYTE_LEVEL, "tokens", [1, 2], "expected strings"),
    (BYTE_LEVEL, "tokens", ["h", "i", "hi", "hi", "x"], "'hi' twice"),
    (BYTE_LEVEL, "merges", None, "lacks tokenizer.ggml.merges"),
    (BYTE_LEVEL, "merges", ["hi"], "merges has 'hi'"),
    (BYTE_LEVEL, "merges", ["h z"], "merges has 'h z'"),
    (BYTE_LEVEL, "merges", ["i h"], "merges has 'i h'"),
    (BYTE_LEVEL, "merges", [5], "expected strings"),
    (BYTE_LEVEL, "token_type", [1], "1 values for 5 tokens"),
    (BYTE_LEVEL, "token_type", [1, 1, 1, "x", 1], "expected whole numbers"),
    (BYTE_LEVEL, "eos_token_id", 99, "from 0 to 4"),
    (BYTE_LEVEL, "padding_token_id", 99, "from 0 to 4"),
    (BYTE_LEVEL, "bos_token_id", "1", "from 0 to 4"),
    (BYTE_LEVEL, "add_bos_token", True, "no tokenizer.ggml.bos_token_id"),
    (BYTE_LEVEL, "add_bos_token", 1, "expected true or false"),
    (BYTE_LEVEL, "pre", 5, "pre is 5"),
    (BYTE_LEVEL, "tokenizer.chat_template", 5, "chat_template is 5"),
    (BYTE_LEVEL, "tokenizer.huggingface.json", "{}", "cannot be read as a tokenizer"),
    (SENTENCEPIECE, "scores", None, "lacks tokenizer.ggml.scores"),
    (SENTENCEPIECE, "scores", [1.0], "1 values for 7 tokens"),
    (SENTENCEPIECE, "scores", [float("nan")] * 7, "expected finite numbers"),
    (SENTENCEPIECE, "add_space_prefix", "x", "expected true or false"),
]


@pytest.mark.parametrize(("base", "name", "value", "says"), DAMAGED)
def test_damaged_entries_are_one_message(base, name, value, says):
    with pytest.raises(ModelError, match=says) as error:
        gguf_tokenizer(header(base, **{name: value}))
    assert "m.gguf" in str(error.value)


def test_empty_tokens_are_named_as_llama_cpp_does():
    tokenizer = gguf_tokenizer(header(BYTE_LEVEL, tokens=["h", "i", "hi", "", ""]))
    assert tokenizer.convert_ids_to_tokens([3, 4]) == ["[EMPTY_3]", "[EMPTY_4]"]
