"""A tokenizer.json as the `tokenizers` package reads it, in the shape of a transformers tokenizer, nothing changed."""

from __future__ import annotations

import json
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import shown
from spqr_jax.files.json_file import parse_json


def parse_tokenizer(data: bytes, label: str) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json.

    It never cuts or pads a text, whatever the file says of lengths: those are another
    program's batches, and transformers does not apply them either.

    Raises:
      ModelError: it is not JSON, or not a tokenizer that this version of `tokenizers` reads.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8-sig"))
    except BaseException as error:  # a panic of Rust's is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        values = parse_json(data, label)  # says so itself if it is no JSON
        if not isinstance(values, dict):
            raise ModelError(f"{label} holds {shown(values)}, expected a JSON object: is it the right file?") from None
        raise ModelError(
            f"{label} cannot be read as a tokenizer: {str(error)[:300]}; fetch the file again, or update `tokenizers`"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.post_processor is not None:
        _check_template(json.loads(tokenizer.post_processor.__getstate__()), label)
    return tokenizer


def _check_template(processor: dict[str, Any], label: str) -> None:
    """Special tokens that a template puts around a text must be described, else `tokenizers` crashes at a text."""
    for part in processor.get("processors", []):
        _check_template(part, label)
    if processor.get("type") != "TemplateProcessing":
        return
    known = processor["special_tokens"]
    for piece in [*processor["single"], *processor["pair"]]:
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in known:
            raise ModelError(
                f"{label}: post_processor.special_tokens lacks {shown(piece['SpecialToken']['id'])}, which its "
                "template puts around a text: fetch the file again"
            )


def as_transformers(tokenizer: Any, named: dict[str, str], chat_templates: dict[str, str], *, name: str) -> Any:
    """A transformers tokenizer that gives the ids and texts of `tokenizer`.

    transformers changes a tokenizer that it takes over: named tokens become added ones,
    a missing post-processor is filled in. So it is given an empty one, which is replaced
    by the real one after that.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      named: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``; those that are no token are left out.
      chat_templates: by name.
      name: where it comes from.
    """
    import transformers
    from tokenizers import Tokenizer, models

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({}, unk_token="")),
        clean_up_tokenization_spaces=False,
        name_or_path=name,
        **{role: token for role, token in named.items() if tokenizer.token_to_id(token) is not None},
    )
    fast._tokenizer = tokenizer
    fast.chat_template = chat_templates.get("default") if set(chat_templates) <= {"default"} else dict(chat_templates)
    return fast


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of a text's tokens.

    Args:
      tokenizer: a transformers tokenizer.
      text: any.
      add_special_tokens: such as BOS, where the tokenizer adds some.

    Raises:
      ModelError: the tokenizer cannot encode it, such as one without a token for unknown words.
    """
    try:
        # The backend is called itself: a length warning would be about windows we cut anyway.
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    except BaseException as error:  # a panic of Rust's is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        label = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ModelError("the text contains lone surrogates (half characters): give valid text") from None
        raise ModelError(f"{label}: the text cannot be encoded: {str(error)[:300]}") from None
