"""Tokenizers of each kind, and GGUF headers with a vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from spqr_jax.files import Entries
from spqr_jax.models.gguf import GGUFFile


def write_gguf(path, kind, tokens, types, merges=(), scores=None, pre=None, **extra):
    """A GGUF file of a vocabulary alone, opened; `extra` names methods of its writer, without ``add_``."""
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


def header(base, **changes):
    """A GGUF header in memory; None removes an entry, a name without a dot is one of ``tokenizer.ggml``."""
    entries = {(name if "." in name else f"tokenizer.ggml.{name}"): value for name, value in (base | changes).items()}
    return SimpleNamespace(label="m.gguf", entries=Entries(entries, "m.gguf"))


BYTE_LEVEL = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["h", "i", "hi", "<|im_end|>", "</s>"],
    "merges": ["h i"],
    "token_type": [1, 1, 1, 3, 1],
    "eos_token_id": 2,
}
SENTENCEPIECE = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "▁", "h", "i", "hi"],
    "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
    "token_type": [2, 3, 3, 1, 1, 1, 1],
}


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "th", "the", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", AddedToken("<|im_end|>", rstrip=True)])
    return tokenizer


def sentencepiece(scheme):
    """BPE with byte fallback, BOS and EOS; `scheme` says where a blank is put in front."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        blanks = [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(blanks)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def unigram():
    pieces = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "▁": -2.0, "the": -3.0, "▁the": -1.0, "t": -5.0, "h": -5.0}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), 0, False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_level():
    """Cut and padded for batches, which is nothing that a text should be."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)} | {"the": 60, "?": 61}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=10)
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "normalizer": lambda: sentencepiece("normalizer"),
    "always": lambda: sentencepiece("always"),
    "first": lambda: sentencepiece("first"),
    "never": lambda: sentencepiece("never"),
    "unigram": unigram,
    "word-level": word_level,
}
