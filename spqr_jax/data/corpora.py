"""Corpora of the Hugging Face hub by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from spqr_jax.errors import DataError
from spqr_jax.files.records import Document

Split = Literal["calibration", "evaluation"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A named corpus of the Hugging Face hub.

    Attributes:
      path, name: arguments of ``datasets.load_dataset``.
      splits: dataset split for calibration and for evaluation.
      column: field that holds the text, or the messages of a conversation.
      join: what stands between documents.
      limit: documents read (corpora too large to read whole are streamed).
      files: data file for calibration and evaluation, where the protocol names one.
      join_lines: how a local copy of the text, given as ``name:FILE``, is joined.
    """

    path: str
    name: str | None
    splits: tuple[str, str]
    column: str
    join: str
    limit: int | None = None
    files: tuple[str, str] | None = None
    join_lines: Callable[[Iterable[str]], str] | None = None


def join_wikitext(lines: Iterable[str]) -> str:
    """WikiText as GPTQ joins it: a line keeps its newline, a blank one is empty, "\\n\\n" between."""
    return "\n\n".join(line if line.strip() else "" for line in lines)


def join_sentences(lines: Iterable[str]) -> str:
    """Penn Treebank as here: stripped sentences, "\\n\\n" between."""
    return "\n\n".join(line.strip() for line in lines)


_C4_FILES = ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")

CORPORA = {
    # GPTQ: the train split's documents joined by "\n\n"; test likewise.
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "test"), "text", "\n\n",
                        join_lines=join_wikitext),
    # GPTQ: train sentences joined by " ", validation by "\n\n"; "\n\n" for both here.
    "ptb": Corpus("ptb-text-only/ptb_text_only", "penn_treebank", ("train", "validation"), "sentence", "\n\n",
                  join_lines=join_sentences),
    # GPTQ: first shard of train; the first 1100 documents of validation joined by " ".
    "c4": Corpus("allenai/c4", None, ("train", "validation"), "text", " ", 1100, files=_C4_FILES),
    # SpQR's calibration corpora: a sample of train, documents joined by "\n\n".
    "redpajama": Corpus("togethercomputer/RedPajama-Data-1T-Sample", None, ("train", "train"), "text", "\n\n", 2000),
    "refinedweb": Corpus("tiiuae/falcon-refinedweb", None, ("train", "train"), "content", "\n\n", 2000),
    "pile": Corpus("monology/pile-uncopyrighted", None, ("train", "train"), "text", "\n\n", 2000),
    # What the default mixture takes of the hub: Python files, conversations, encyclopedias in other languages.
    "codeparrot": Corpus("codeparrot/codeparrot-clean-valid", None, ("train", "train"), "content", "\n\n", 500),
    "ultrachat": Corpus("HuggingFaceH4/ultrachat_200k", None, ("train_sft", "test_sft"), "messages", "", 500),
    **{f"wikipedia-{code}": Corpus("wikimedia/wikipedia", f"20231101.{code}", ("train", "train"), "text", "\n\n", 200)
       for code in ("de", "es", "fr", "zh")},
}  # fmt: skip


def read_corpus(name: str, split: Split) -> str | list[Document]:
    """The text of a named corpus, or its conversations, from the hub or the hub's cache.

    Raises:
      DataError: it cannot be read.
    """
    import datasets  # the hub's own reader: caching, streaming, mirrors

    corpus = CORPORA[name]
    which = 0 if split == "calibration" else 1
    options: dict[str, object] = {"split": corpus.splits[which], "streaming": corpus.limit is not None}
    if corpus.files is not None:
        options["data_files"] = {corpus.splits[which]: corpus.files[which]}
    try:
        rows = iter(datasets.load_dataset(corpus.path, corpus.name, **options))
        documents = [row[corpus.column] or "" for row, _ in zip(rows, _counter(corpus.limit), strict=False)]
    except Exception as error:  # the network, the hub and the reader fail in many ways
        raise DataError(
            f"{name} ({corpus.path}) could not be read from the hub: {type(error).__name__}: {error}; "
            "without a network use 'pydoc', 'pysource', 'pychat' or a file"
        ) from None
    if corpus.column == "messages":
        return [Document(messages, f"{name}, conversation {i}") for i, messages in enumerate(documents, 1)]
    return corpus.join.join(documents)


def _counter(limit: int | None) -> Iterator[int]:
    return iter(range(limit if limit is not None else 1 << 62))
