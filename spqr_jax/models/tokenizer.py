"""Fast tokenizers from a model directory or out of a GGUF file's own vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.errors import ModelError
from spqr_jax.models.gguf import GGUFFile

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")

_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4  # tokenizer.ggml.token_type

_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre -> (digits stand alone, how text is cut into words)
_PRE_TOKENIZERS = {
    "default": (False, _GPT2_WORDS),
    "gpt-2": (False, _GPT2_WORDS),
    "smollm": (True, _GPT2_WORDS),
    "llama-bpe": (False, _LLAMA3_WORDS),
    "llama3": (False, _LLAMA3_WORDS),
    "llama-v3": (False, _LLAMA3_WORDS),
    "qwen2": (False, _QWEN2_WORDS),
}


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a model directory (Hugging Face's or ours).

    Remote code is never run.

    Raises:
      ModelError: the directory holds no tokenizer that can be read.
    """
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(
            f"{directory} has no tokenizer.json (fast tokenizers only); give token ids (.npy) as data instead of text"
        )
    import transformers

    try:
        if (directory / "config.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return transformers.PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the many ways in which a tokenizer file can be bad
        raise ModelError(f"the tokenizer in {directory} cannot be read: {error}") from None


def gguf_tokenizer(file: GGUFFile) -> Any:
    """The tokenizer that a GGUF file describes.

    ``tokenizer.ggml.pre`` names how text is cut before the merges; it decides,
    among other things, whether digits stand alone, and is honoured.

    Raises:
      ModelError: a tokenizer of a kind that we cannot rebuild.
    """
    import transformers

    kind = file.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(file)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(file)
    else:
        raise ModelError(f"{file.label}: tokenizer {kind!r} is not supported, expected 'gpt2' or 'llama'")
    tokens = file.get("tokenizer.ggml.tokens")
    special = {}
    for name, key in {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}.items():
        index = file.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            special[name] = tokens[index]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    fast.chat_template = file.get("tokenizer.chat_template")
    return fast


def _byte_level_bpe(file: GGUFFile) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{file.label}: pre-tokenizer {pre!r} is not supported ({', '.join(_PRE_TOKENIZERS)}); "
            "use the model's Hugging Face directory"
        )
    digits, words = _PRE_TOKENIZERS[pre]
    tokens = file.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    ignore_merges = words == _LLAMA3_WORDS
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(file, tokenizer, add_bos=False)
    return tokenizer


def _sentencepiece_bpe(file: GGUFFile) -> Any:
    """SentencePiece BPE: a pair may merge if the result is a token, likeliest (highest score) first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = file.get("tokenizer.ggml.tokens")
    scores = file.get("tokenizer.ggml.scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, vocab[left], vocab[right], (left, right)))
    ranked.sort(key=lambda entry: entry[:3])
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab, [entry[3] for entry in ranked], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's visible blank
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(space)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", space)])
    strip: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special_tokens(file, tokenizer, add_bos=True)
    return tokenizer


def _add_special_tokens(file: GGUFFile, tokenizer: Any, add_bos: bool) -> None:
    """Tokens that are found before all others, and a BOS token before a text where the file (or its kind) wants one."""
    from tokenizers import AddedToken, processors

    tokens = file.get("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type") or []
    by_kind: dict[int, list[Any]] = {}
    for token, kind in zip(tokens, types, strict=False):
        if kind in (_CONTROL_TOKEN, _USER_DEFINED_TOKEN):
            by_kind.setdefault(kind, []).append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(by_kind.get(_CONTROL_TOKEN, []))
    tokenizer.add_tokens(by_kind.get(_USER_DEFINED_TOKEN, []))
    bos = file.get("tokenizer.ggml.bos_token_id")
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", add_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """A conversation in the model's chat template.

    Raises:
      ModelError: the model has no chat template, or one that does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ModelError("this model has no chat template: use text without messages, or an instruction-tuned model")
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates are programs
        raise ModelError(f"the chat template does not take these messages: {error}") from None
    return text


def encode_stream(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of a long text, int32 [tokens], without special tokens."""
    # The backend is called itself: a length warning would be about windows we cut anyway.
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
