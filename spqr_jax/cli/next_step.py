"""The command to try after one has ended."""

from __future__ import annotations

import shlex
from pathlib import Path

from spqr_jax.checkpoint import CheckpointSource, is_checkpoint
from spqr_jax.errors import ModelError
from spqr_jax.models.chat import chat_templates
from spqr_jax.resolve import OpenedModel

_QUESTION = "Why is the sky blue?"
_BEGINNING = "The sky is blue because"


def after_writing(directory: Path) -> str:
    """A quantized model was written: generate with it, or inspect it if it has no tokenizer."""
    if not (directory / "tokenizer.json").is_file():
        return command("inspect", directory)
    try:
        chat = bool(chat_templates(directory))
    except ModelError:
        chat = False
    prompt = ["--chat", "--prompt", _QUESTION] if chat else ["--prompt", _BEGINNING]
    return command("generate", directory, *prompt)


def after_perplexity(opened: OpenedModel, *text: object) -> str:
    """Compare a quantized model with the dense one, on the same text; quantize a dense one.

    Args:
      opened: the model that was measured.
      text: options that name the text.
    """
    if not opened.quantized:
        return after_dense(opened.label)
    dense = dense_model(opened)
    return command("inspect", opened.label) if dense is None else command("compare", dense, opened.label, *text)


def after_dense(model: str) -> str:
    """A dense model was measured: quantize it."""
    return command("quantize", model, "--out", f"{Path(model).stem}-spqr")


def after_bench(model: str) -> str:
    """Generate with a quantized model; quantize a dense one."""
    return after_writing(Path(model)) if is_checkpoint(Path(model)) else after_dense(model)


def after_eval(opened: OpenedModel, *options: object) -> str:
    """The same tasks with the dense model, to compare scores; quantize a dense one."""
    dense = dense_model(opened)
    return after_dense(opened.label) if dense is None else command("eval", dense, *options)


def after_compare(dense: str, quantized: str) -> str:
    """How fast the two are."""
    return command("bench", quantized, "--dense", dense)


def after_analyze(model: OpenedModel, out: Path) -> str:
    """A page on the quantized model and its analysis together; quantize a dense one."""
    return command("report", model.label, out) if model.quantized else after_dense(model.label)


def after_export(place: str, form: str) -> str:
    """How other programs load it: a line of Python."""
    options = "" if form == "dense" else ', dtype="float16", device_map="cuda"'
    return f'in Python: transformers.AutoModelForCausalLM.from_pretrained("{place}"{options})'


def dense_model(opened: OpenedModel) -> str | None:
    """The model that a quantized one was made from, if its directory says so."""
    if not isinstance(opened.source, CheckpointSource):
        return None
    model = opened.source.provenance.get("model")
    return model if isinstance(model, str) else None


def command(*words: object) -> str:
    """A command line of `spqr`, quoted for a shell; a text with spaces in double quotes, which are easier to read."""
    return " ".join(["spqr", *(_quoted(str(word)) for word in words)])


def _quoted(word: str) -> str:
    plain = not set(word) & set('"$`\\!')
    return f'"{word}"' if " " in word and plain else shlex.quote(word)
