"""Tokenizers rebuilt from the vocabulary that a GGUF file carries, as llama.cpp's src/llama-vocab.cpp reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries, shown
from spqr_jax.models.chat import gguf_chat_templates
from spqr_jax.models.gguf_vocabulary import BYTE_LEVEL, PREFIX, SENTENCEPIECE, Vocabulary
from spqr_jax.models.gguf_words import PRE_TOKENIZERS, Words
from spqr_jax.models.raw_tokenizer import as_transformers, parse_tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's visible blank
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_WITHOUT_STRIP = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3


def gguf_tokenizer(file: Any, say: Callable[[str], None] = lambda message: None) -> Any:
    """The tokenizer that a GGUF file describes, as a transformers tokenizer.

    A tokenizer.json inside the file (``tokenizer.huggingface.json``) is the truth. Without
    one, ``tokenizer.ggml.pre`` names how text is cut before the merges of a byte-level BPE,
    and llama.cpp's defaults stand for what is absent.

    Args:
      file: a `spqr_jax.models.gguf.GGUFFile`.
      say: told where the file leaves something important out.

    Raises:
      ModelError: a tokenizer of a kind that we cannot rebuild, or entries that contradict each other.
    """
    entries: Entries = file.entries
    whole = entries.maybe_text("tokenizer.huggingface.json")
    if whole is None and f"{PREFIX}model" not in entries:
        raise entries.lacks(f"{PREFIX}model", "the kind of tokenizer; give token ids (.npy) as data instead of text")
    vocabulary = Vocabulary(entries)
    if whole is not None:
        tokenizer = parse_tokenizer(whole.encode(), f"{entries.label}: tokenizer.huggingface.json")
    elif vocabulary.kind == BYTE_LEVEL:
        tokenizer = _byte_level_bpe(entries, vocabulary, say)
    elif vocabulary.kind == SENTENCEPIECE:
        tokenizer = _sentencepiece_bpe(entries, vocabulary)
    else:
        raise ModelError(
            f"{entries.label}: tokenizer {vocabulary.kind!r} is not supported, expected 'gpt2' or 'llama': "
            "use the model's Hugging Face directory"
        )
    ids = {name: vocabulary.special_id(key) for name, key in _NAMES.items()}
    named = {name: vocabulary.tokens[index] for name, index in ids.items() if index is not None}
    return as_transformers(tokenizer, named, gguf_chat_templates(entries), name=entries.label)


# ---- byte-level BPE -----------------------------------------------------------------------------


def _byte_level_bpe(entries: Entries, vocabulary: Vocabulary, say: Callable[[str], None]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = _words(entries, say)
    merges = _merges(entries, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=words.ignore_merges))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in words.regexes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(entries, vocabulary, tokenizer, add_bos=words.add_bos)
    return tokenizer


def _words(entries: Entries, say: Callable[[str], None]) -> Words:
    name = entries.maybe_text(f"{PREFIX}pre")
    if not name:
        say(
            f"{entries.label} lacks {PREFIX}pre, so text is split by llama.cpp's default rules. The model may have "
            "been trained with other rules: convert it again for best results"
        )
        return PRE_TOKENIZERS["default"]
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{entries.label}: pre-tokenizer {name!r} is not supported ({PREFIX}pre; docs/how-to/formats.md lists "
            "the supported ones); use the model's Hugging Face directory"
        )
    return PRE_TOKENIZERS[name]


def _merges(entries: Entries, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs of tokens, the first to be merged first."""
    if f"{PREFIX}merges" not in entries:
        raise entries.lacks(f"{PREFIX}merges", "pairs of tokens")
    ids = vocabulary.ids
    merges: dict[tuple[str, str], None] = {}
    for merge in entries.texts(f"{PREFIX}merges"):
        cut = merge.find(" ", 1)
        pair = merge[:cut], merge[cut + 1 :]
        if cut < 0 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise ModelError(
                f"{entries.label}: {PREFIX}merges has {shown(merge)}, expected two tokens of the vocabulary, separated "
                "by a space, that together form a third token: convert the model again"
            )
        merges[pair] = None
    return list(merges)


# ---- SentencePiece ------------------------------------------------------------------------------


def _sentencepiece_bpe(entries: Entries, vocabulary: Vocabulary) -> Any:
    """SentencePiece BPE: a pair may merge if the result is a token, likeliest (highest score) first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.special_id("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.ids,
            _merges_by_score(vocabulary, _scores(entries, vocabulary)),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = entries.flag(f"{PREFIX}add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special_tokens(entries, vocabulary, tokenizer, add_bos=True)
    return tokenizer


def _scores(entries: Entries, vocabulary: Vocabulary) -> list[float]:
    scores = entries.numbers(f"{PREFIX}scores")
    if not scores:
        raise entries.lacks(f"{PREFIX}scores", "a number for each token")
    vocabulary.check_length("scores", scores)
    return scores


def _merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    ids = vocabulary.ids
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(vocabulary.tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None and (right := ids.get(token[cut:])) is not None:
                ranked.append((-score, left, right, (token[:cut], token[cut:])))
    ranked.sort(key=lambda entry: entry[:3])
    return [entry[3] for entry in ranked]


# ---- both ---------------------------------------------------------------------------------------


def _add_special_tokens(entries: Entries, vocabulary: Vocabulary, tokenizer: Any, add_bos: bool) -> None:
    """Tokens that are found before all others; BOS before a text and EOS after it, where the file wants them."""
    from tokenizers import AddedToken

    name = (entries.maybe_text("general.name") or "").lower()
    strips = "phi-3" in name or "phi3" in name  # its special tokens take the white space after them away

    def added(index: int) -> Any:
        token = vocabulary.tokens[index]
        return AddedToken(token, normalized=False, rstrip=strips and token not in _WITHOUT_STRIP)

    indices = range(len(vocabulary.tokens))
    tokenizer.add_special_tokens([added(index) for index in indices if vocabulary.is_special(index)])
    tokenizer.add_tokens([added(index) for index in indices if vocabulary.is_user_defined(index)])
    _add_ends(entries, vocabulary, tokenizer, add_bos)


def _add_ends(entries: Entries, vocabulary: Vocabulary, tokenizer: Any, add_bos: bool) -> None:
    from tokenizers import processors

    used: dict[str, int] = {}
    for key, default in (("bos", add_bos), ("eos", False)):
        index, wanted = vocabulary.special_id(key), entries.maybe_flag(f"{PREFIX}add_{key}_token")
        if wanted and index is None:
            raise ModelError(
                f"{entries.label}: {PREFIX}add_{key}_token is true, but there is no {PREFIX}{key}_token_id: "
                "convert the model again"
            )
        if index is not None and (default if wanted is None else wanted):
            used[key] = index
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[key for key in ("bos", "$A", "eos") if key in used or key == "$A"],
            special_tokens=[
                {"id": key, "ids": [index], "tokens": [vocabulary.tokens[index]]} for key, index in used.items()
            ],
        )
