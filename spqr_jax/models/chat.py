"""Chat templates: where they come from, which is taken, and the text that one makes of a conversation."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spqr_jax.errors import ModelError
from spqr_jax.files.entries import Entries
from spqr_jax.files.json_file import read_bytes, read_object
from spqr_jax.files.text import decode_text
from spqr_jax.models.special_tokens import tokenizer_settings

_LONGEST_TEMPLATE = 1 << 20  # characters; the longest of known models has some 30 000
_LONGEST_TEXT = 1 << 24
_SECONDS = 1.5  # that a template may take: known ones take milliseconds
_TEMPLATE_CODE = "<template>"  # as Jinja calls the file of a template's code

# ---- where they come from -----------------------------------------------------------------------


def chat_templates(directory: Path) -> dict[str, str]:
    """The chat templates of a model directory by name; ``default`` is the one that is taken unasked.

    As transformers has it: files (chat_template.jinja, additional_chat_templates/NAME.jinja)
    replace all that tokenizer_config.json says; chat_template.json, older, comes last.

    Raises:
      ModelError: a file is damaged, or holds something else.
    """
    templates: dict[str, str] = {}
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = _read_template(directory / "chat_template.jinja")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.name.removesuffix(".jinja")] = _read_template(path)
    if not templates:
        templates = _templates_of(tokenizer_settings(directory))
    legacy = directory / "chat_template.json"
    if not templates and legacy.is_file():
        templates = _templates_of(read_object(legacy))
    return templates


def gguf_chat_templates(entries: Entries) -> dict[str, str]:
    """The chat templates in a GGUF file's header: ``tokenizer.chat_template`` and ``tokenizer.chat_template.NAME``.

    Raises:
      ModelError: one is no text.
    """
    key = "tokenizer.chat_template"
    default = entries.maybe_text(key)
    templates = {"default": default} if default else {}
    for name in entries:
        if name.startswith(f"{key}.") and (text := entries.maybe_text(name)):
            templates[name.removeprefix(f"{key}.")] = text
    return templates


def _templates_of(settings: Entries) -> dict[str, str]:
    """The entry ``chat_template``: a text, an object of texts by name, or a list of names and templates."""
    value = settings.raw("chat_template")
    if isinstance(value, list):
        pairs = [
            Entries(pair if isinstance(pair, dict) else {}, settings.label, prefix="chat_template[].") for pair in value
        ]
        templates = {pair.text("name"): pair.text("template") for pair in pairs}
    elif isinstance(value, dict):
        named = settings.nested("chat_template")
        templates = {name: named.text(name) for name in named}
    else:
        templates = {"default": settings.maybe_text("chat_template") or ""}
    return {name: text for name, text in templates.items() if text}


def _read_template(path: Path) -> str:
    return decode_text(read_bytes(path), str(path), ModelError)


# ---- which is taken -----------------------------------------------------------------------------


def pick_template(tokenizer: Any, choice: str | None = None) -> str:
    """The text of a chat template.

    Args:
      tokenizer: a transformers tokenizer.
      choice: name of one of its templates, or path of a Jinja file; None for its only or ``default`` one.

    Raises:
      ModelError: it has none, none of that name, or several and none that is called ``default``.
    """
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    label = _label(tokenizer)
    names = ", ".join(sorted(templates))
    if choice is None:
        if not templates:
            raise ModelError(
                f"{label} has no chat template: use text without messages (and without --chat), give one with "
                "--chat-template FILE, or use an instruction-tuned model"
            )
        if "default" not in templates:
            raise ModelError(
                f"{label} has chat templates called {names}, but none called default: choose one with "
                "--chat-template NAME"
            )
        return str(templates["default"])
    if choice in templates:
        return str(templates[choice])
    if not Path(choice).is_file():
        raise ModelError(
            f"--chat-template {choice}: there is no such file, and {label} has "
            f"{f'only these templates: {names}' if names else 'no chat template'}; give the name of a template, or the "
            "path of a Jinja file"
        )
    return _read_template(Path(choice))


# ---- what it makes of a conversation ------------------------------------------------------------


def render_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    template: str | None = None,
) -> str:
    """The text of a conversation, with the special tokens that the template writes, BOS among them.

    Encode it with ``add_special_tokens=False``: a second BOS would be wrong. Templates run
    in the sandbox of transformers, for a few seconds at most.

    Args:
      tokenizer: a transformers tokenizer.
      messages: with ``role`` and ``content``.
      add_generation_prompt: end where the model's answer begins.
      continue_final_message: end inside of the last message.
      template: a Jinja text; None for the tokenizer's own.

    Raises:
      ModelError: the tokenizer has no template, or it fails or refuses the conversation.
    """
    template = pick_template(tokenizer) if template is None else template
    label = f"{_label(tokenizer)}: the chat template"
    if len(template) > _LONGEST_TEMPLATE:
        raise ModelError(f"{label} has {len(template)} characters, expected at most {_LONGEST_TEMPLATE}")
    try:
        with _time_limit(_SECONDS):
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
    except ImportError as error:
        raise ModelError(f"chat templates need jinja2: pip install 'jinja2>=3.1.6' ({error})") from None
    except Exception as error:  # a template is a program: it can fail in any way
        raise ModelError(f"{label} {_complaint(error)}; use --chat-template FILE to give another template") from None
    if len(text) > _LONGEST_TEXT:
        raise ModelError(f"{label} turns {len(messages)} messages into {len(text)} characters: it is damaged")
    return str(text)


def _label(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "this model"


def _complaint(error: Exception) -> str:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    if isinstance(error, _TooSlow):
        return f"does not finish within {_SECONDS:g} seconds"
    words = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        return f"is not valid Jinja: line {error.lineno}: {words}"
    if type(error) is TemplateError:  # raise_exception, the template's own
        return f"rejects this conversation: {words}"
    return f"fails: {words}"


class _TooSlow(Exception):
    """A template takes too long."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends a template that loops for ever: Python calls a tracing function at each line of its code."""
    end = time.monotonic() + seconds

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _TooSlow
        return trace if frame.f_code.co_filename == _TEMPLATE_CODE else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
