from __future__ import annotations

import dataclasses
import json

import pytest
from support.model_files import write_hf
from support.vocabularies import BYTE_LEVEL, SENTENCEPIECE, byte_level, header, unigram

from spqr_jax import ModelError, save
from spqr_jax.models.stops import all_ends, gguf_ends, tokenizer_ends, with_gguf_tokens, with_named_tokens
from spqr_jax.resolve import open_model

END = 260  # "</s>" of byte_level()


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(tiny_config, vocab_size=300, bos_token_id=None, eos_token_ids=(1,))


def write(folder, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    if "tokenizer_config" in files or "special_tokens_map" in files:
        byte_level().save(str(folder / "tokenizer.json"))
    return folder


def test_all_ends_are_the_union():
    assert all_ends(10, [("a", (3,)), ("b", [7, 3]), ("c", ()), ("d", (1,))]) == (3, 7, 1)
    for bad in (10, -1, "1", True, [1], 1.5):
        with pytest.raises(ModelError, match=r"b is .* token id from 0 to 9"):
            all_ends(10, [("a", (3,)), ("b", [bad])])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),
        ({"generation_config": {"eos_token_id": [2, 3]}}, (1, 2, 3)),
        ({"generation_config": {"eos_token_id": 2}}, (1, 2)),
        ({"generation_config": {"eos_token_id": None}}, (1,)),
        ({"generation_config": {}}, (1,)),
        ({"tokenizer_config": {"eos_token": "</s>"}}, (1, END)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, (1, END)),
        ({"tokenizer_config": {"eos_token": None}}, (1,)),
        ({"tokenizer_config": {"eos_token": "<nope>"}}, (1,)),
        ({"special_tokens_map": {"eos_token": "</s>"}}, (1, END)),
        ({"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {"7": {"content": "</s>"}}}}, (1, 7)),
        ({"tokenizer_config": {"eos_token": "the"}, "generation_config": {"eos_token_id": 5}}, (1, 5, 257)),
    ],
)
def test_a_directory_ends_an_answer_at_what_any_file_names(tmp_path, config, files, expected):
    assert with_named_tokens(config, write(tmp_path, **files)).eos_token_ids == expected


def test_a_token_of_a_vocabulary_that_is_a_list(tmp_path):
    unigram().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "▁the"}')
    assert tokenizer_ends(tmp_path) == (5,)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"generation_config": {"bos_token_id": 2}, "tokenizer_config": {"bos_token": "<s>"}}, 2),
        ({"generation_config": {"bos_token_id": None}, "tokenizer_config": {"bos_token": "<s>"}}, 259),
    ],
)
def test_the_first_source_that_names_bos_counts(tmp_path, config, files, expected):
    write(tmp_path, **files)
    assert with_named_tokens(config, tmp_path).bos_token_id == expected
    assert with_named_tokens(dataclasses.replace(config, bos_token_id=4), tmp_path).bos_token_id == 4


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"generation_config": {"eos_token_id": 300}}, "eos_token_id is 300, expected a token id from 0 to 299"),
        ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id is '</s>'"),
        ({"generation_config": {"eos_token_id": [[1]]}}, "eos_token_id is"),
        ({"generation_config": {"bos_token_id": 300}}, "bos_token_id is 300"),
        ({"generation_config": []}, "expected a JSON object"),
        ({"tokenizer_config": {"eos_token": 2}}, "eos_token is 2, expected a string"),
        ({"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": {"900": {"content": "x"}}}}, "is 900"),
        ({"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": []}}, "added_tokens_decoder is"),
        ({"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": {"1": "x"}}}, "added_tokens_decoder.1 is"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path, config, files, says):
    with pytest.raises(ModelError, match=says) as error:
        with_named_tokens(config, write(tmp_path, **files))
    assert str(tmp_path) in str(error.value)


def test_an_id_of_config_json_outside_of_the_vocabulary_is_refused(tmp_path, config):
    with pytest.raises(ModelError, match="eos_token_id is 300"):
        with_named_tokens(dataclasses.replace(config, eos_token_ids=(300,)), tmp_path)


def test_directories_and_checkpoints_are_opened_with_all_of_them(tmp_path, tiny_model):
    model = dataclasses.replace(tiny_model, config=dataclasses.replace(tiny_model.config, eos_token_ids=(1,)))
    write_hf(tmp_path / "model", model)
    save(tmp_path / "checkpoint", model)
    for name in ("model", "checkpoint"):
        write(tmp_path / name, tokenizer_config={"eos_token": "t"}, generation_config={"eos_token_id": [2]})
        assert open_model(str(tmp_path / name)).source.config.eos_token_ids == (1, 2, 83)


# ---- GGUF ---------------------------------------------------------------------------------------


def vocabulary(*special, kind="gpt2", types=3, **ids):
    tokens = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", *special]
    return header({"model": kind, "tokens": tokens, "token_type": [1] * 12 + [types] * len(special), **ids})


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (header(BYTE_LEVEL), (2, 3)),
        (header(SENTENCEPIECE), (2,)),  # llama.cpp's id where the file names none
        (header(BYTE_LEVEL, eos_token_id=None), (3,)),
        (header(BYTE_LEVEL, eot_token_id=0, eom_token_id=1), (2, 0, 1, 3)),
        (header({"eos_token_id": 4, "eot_token_id": 5}), (4, 5)),  # no vocabulary at all
        (header({}), ()),
        (vocabulary("<|eot_id|>", "<end_of_turn>", "<x>", "<|eom_id|>", "<|file_sep|>"), (12, 13, 15, 16)),
        (vocabulary("<|im_end|>", types=1), (12,)),  # whatever its type
        (vocabulary("</s>", types=4), ()),  # a tag of HTML, Gemma's
        (vocabulary("</s>"), (12,)),
        (vocabulary("<|end|>", "<|return|>", "<|call|>"), (13, 14)),
        (vocabulary("<|end|>", "<|flush|>", "<|calls|>"), (13, 14)),
        (vocabulary("<|end|>", "<|return|>"), (12, 13)),
        (vocabulary("</s>", "<|tool_response>"), (13,)),
        (vocabulary("<｜end▁of▁sentence｜>"), (12,)),
        (vocabulary("<|fim_pad|>", "<fim_pad>", fim_pad_token_id=12), (12,)),
    ],
)  # fmt: skip
def test_gguf_files_end_an_answer_where_llama_cpp_does(file, expected):
    assert gguf_ends(file) == expected


def test_falcons_default_ids_count_where_that_token_is_a_control_token():
    tokens = [*"abcdefghijk", "<end>"]
    types = [1] * 11
    assert gguf_ends(header({"model": "gpt2", "tokens": tokens, "token_type": [*types, 3]})) == (11,)
    assert gguf_ends(header({"model": "gpt2", "tokens": tokens, "token_type": [*types, 1]})) == ()


@pytest.mark.parametrize(
    ("name", "value"), [("eos_token_id", 5), ("eot_token_id", -1), ("eom_token_id", "3"), ("fim_pad_token_id", 99)]
)
def test_gguf_ids_that_are_no_token_are_refused(name, value):
    with pytest.raises(ModelError, match=f"m.gguf: tokenizer.ggml.{name} is .* from 0 to 4"):
        gguf_ends(header(BYTE_LEVEL, **{name: value}))


def test_gguf_ids_must_be_rows_of_the_model(config):
    small = dataclasses.replace(config, vocab_size=3)
    with pytest.raises(ModelError, match="is 3, expected a token id from 0 to 2"):
        with_gguf_tokens(small, header(BYTE_LEVEL))
    found = with_gguf_tokens(config, header(SENTENCEPIECE))
    assert (found.bos_token_id, found.eos_token_ids) == (1, (2,))
