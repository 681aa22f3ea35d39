from __future__ import annotations

import gguf
import pytest
from tokenizers import pre_tokenizers

from spqr_jax import ModelError
from spqr_jax.models.gguf import GGUFFile
from spqr_jax.models.tokenizer import encode_stream, gguf_tokenizer, load_tokenizer

NORMAL, CONTROL, BYTE = 1, 3, 6


def write(path, kind, tokens, types, merges=(), scores=None, pre=None, **extra):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(list(merges))
    if scores:
        writer.add_token_scores(scores)
    if pre:
        writer.add_tokenizer_pre(pre)
    for name, value in extra.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def byte_level(path, pre, merges=("1 2", "l o", "lo w", "Ġ low"), **extra):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)
    return write(path, "gpt2", tokens, types, merges, pre=pre, eos_token_id=0, **extra)


def pieces(tokenizer, text):
    return [tokenizer.convert_ids_to_tokens(int(i)) for i in encode_stream(tokenizer, text)]


@pytest.mark.parametrize(
    ("pre", "expected"), [("gpt-2", ["12"]), ("smollm", ["1", "2"]), ("qwen2", ["1", "2"]), ("llama-bpe", ["12"])]
)
def test_the_pre_tokenizer_decides_whether_digits_stand_alone(tmp_path, pre, expected):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf", pre))
    assert pieces(tokenizer, "12") == expected


def test_merges_bytes_and_specials(tmp_path):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf", "smollm"))
    assert pieces(tokenizer, "low low") == ["low", "Ġlow"]
    for text in ("naïve 日本 🙂\n\ttabs", " leading", "12 345"):
        assert tokenizer.decode(encode_stream(tokenizer, text)) == text
    assert pieces(tokenizer, "low<end>low") == ["low", "<end>", "low"]
    assert tokenizer.eos_token == "<end>"


def test_it_survives_saving(tmp_path):
    tokenizer = gguf_tokenizer(byte_level(tmp_path / "t.gguf", "smollm", chat_template="{{ messages[0].content }}!"))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert pieces(again, "low 12") == pieces(tokenizer, "low 12")
    assert again.chat_template == "{{ messages[0].content }}!"
    assert again.eos_token == "<end>"


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    words = {"▁": -8.0, "a": -5.0, "b": -6.0, "ab": -1.0, "▁a": -3.0, "ba": -2.0, "bab": -4.0}
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *words]
    scores = [0.0] * 259 + list(words.values())
    types = [2, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    file = write(
        tmp_path / "t.gguf", "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2, unk_token_id=0
    )
    tokenizer = gguf_tokenizer(file)
    # likeliest pair first: "ab" (-1) before "ba" (-2); then nothing joins "▁" and "ab"
    assert pieces(tokenizer, "ab") == ["▁", "ab"]
    assert pieces(tokenizer, "a") == ["▁a"]
    assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encode_stream(tokenizer, "ab é"), skip_special_tokens=True) == "ab é"
    assert tokenizer("a")["input_ids"][0] == 1  # this kind starts a text with BOS unless told not to


@pytest.mark.parametrize(
    ("kind", "pre", "says"), [("gpt2", "martian", "'martian' is not supported"), ("t5", None, "'t5'")]
)
def test_unknown_kinds_are_refused(tmp_path, kind, pre, says):
    file = write(tmp_path / "t.gguf", kind, ["a"], [NORMAL], pre=pre)
    with pytest.raises(ModelError, match=says):
        gguf_tokenizer(file)


def test_a_directory_without_tokenizer_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)
