"""Token streams and windows for calibration and evaluation.

Protocols follow GPTQ's and SpQR's scripts, so that numbers can be compared:
texts are joined as noted for each name, tokenized as one stream without special
tokens, and cut into windows; calibration draws windows at random with a seed,
evaluation takes them side by side from the start. For models that are of no use
without it, each window begins with a BOS token, one token of text less in it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from spqr_jax.errors import DataError

Split = Literal["calibration", "evaluation"]
Encode = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A named corpus of the Hugging Face hub.

    Attributes:
      path, name: arguments of ``datasets.load_dataset``.
      splits: dataset split for calibration and for evaluation.
      column: field that holds the text.
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
}  # fmt: skip

DATA_HELP = (
    "a text file, an .npy of token ids (1-D: a stream; 2-D: windows), 'pydoc' (always at hand), "
    f"or one of {', '.join(CORPORA)} (from the hub; NAME:FILE reads a local copy of wikitext2 or ptb)"
)


def pydoc_text(split: Split) -> str:
    """English prose that every Python carries: ``pydoc_data.topics``.

    Topics in alphabetical order, their prose paragraphs once each (grammar, code
    and tables are left out). The first half of the text is for calibration, the
    second for evaluation; no paragraph is in both. The text differs a little
    from one Python version to the next.
    """
    from pydoc_data.topics import topics  # about 0.5 MB: read only when asked for

    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            prose = " ".join(paragraph.split())
            if prose not in seen and len(prose) >= 80 and re.search(r"[a-z]{3}.*[.:]$", prose) and "::=" not in prose:
                seen.add(prose)
                paragraphs.append(prose)
    total, half, cut = sum(map(len, paragraphs)), 0, 0
    while half < total / 2:
        half += len(paragraphs[cut])
        cut += 1
    return "\n\n".join(paragraphs[:cut] if split == "calibration" else paragraphs[cut:])


def load_tokens(spec: str, split: Split, encode: Encode) -> np.ndarray:
    """Reads data as token ids.

    Args:
      spec: see `DATA_HELP`.
      split: which side of a named corpus.
      encode: text to int32 [tokens], without special tokens.

    Returns:
      int32 [tokens], a stream, or [windows, length], windows as they are.

    Raises:
      DataError: no such data, or data that is empty or of the wrong kind.
    """
    name, _, file = spec.partition(":")
    if spec.endswith(".npy"):
        return _read_ids(Path(spec))
    if spec == "pydoc":
        return encode(pydoc_text(split))
    if name in CORPORA:
        text = _read_local(name, Path(file)) if file else _read_corpus(name, split)
    elif Path(spec).is_file():
        text = _read_text(Path(spec))
    else:
        raise DataError(f"no data {spec!r}: expected {DATA_HELP}")
    tokens = encode(text)
    if not tokens.size:
        raise DataError(f"{spec} holds no text")
    return tokens


def _read_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except ValueError as error:
        raise DataError(f"{path} is not an .npy file of numbers: {error}") from None
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise DataError(
            f"{path} holds {ids.dtype} of shape {ids.shape}; expected integer token ids, [tokens] or [windows, length]"
        )
    if ids.min() < 0:
        raise DataError(f"{path} holds negative token ids (smallest {ids.min()})")
    return ids.astype(np.int32)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def _read_local(name: str, path: Path) -> str:
    join = CORPORA[name].join_lines
    if join is None:
        raise DataError(f"{name} has no rule for a local file; give the file's path alone")
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    return join(_read_text(path).splitlines(keepends=True))


def _read_corpus(name: str, split: Split) -> str:
    import datasets  # the hub's own reader: caching, streaming, mirrors

    corpus = CORPORA[name]
    which = 0 if split == "calibration" else 1
    options: dict[str, object] = {"split": corpus.splits[which], "streaming": corpus.limit is not None}
    if corpus.files is not None:
        options["data_files"] = {corpus.splits[which]: corpus.files[which]}
    try:
        rows = iter(datasets.load_dataset(corpus.path, corpus.name, **options))
        documents = [row[corpus.column] for row, _ in zip(rows, _counter(corpus.limit), strict=False)]
    except Exception as error:  # the network, the hub and the reader fail in many ways
        raise DataError(
            f"{name} ({corpus.path}) could not be read from the hub: {type(error).__name__}: {error}; "
            "without a network use 'pydoc' or a file"
        ) from None
    return corpus.join.join(documents)


def _counter(limit: int | None) -> Iterator[int]:
    return iter(range(limit if limit is not None else 1 << 62))


def evaluation_windows(
    tokens: np.ndarray, length: int, limit: int | None, source: str = "the data", first_token: int | None = None
) -> np.ndarray:
    """Windows side by side from the start of a stream; ready-made windows are cut to `length`.

    Args:
      tokens: int32 [tokens] or [windows, length].
      length: of a window, `first_token` included.
      limit: windows at most; None for all.
      source: named in errors.
      first_token: that each window cut from a stream begins with, or None.

    Returns:
      int32 [windows, length].

    Raises:
      DataError: less than one window.
    """
    if tokens.ndim == 2:
        windows = tokens[:, :length]
    else:
        taken = length - (first_token is not None)
        count = tokens.size // taken
        windows = _begun(tokens[: count * taken].reshape(count, taken), first_token)
    if not len(windows):
        raise DataError(
            f"{source} holds {tokens.size} tokens, less than one window of {length}; ask for shorter windows"
        )
    return windows if limit is None else windows[:limit]


def _begun(windows: np.ndarray, first_token: int | None) -> np.ndarray:
    return windows if first_token is None else np.pad(windows, ((0, 0), (1, 0)), constant_values=first_token)


def calibration_windows(
    tokens: np.ndarray,
    length: int,
    count: int,
    seed: int,
    source: str = "the data",
    first_token: int | None = None,
) -> np.ndarray:
    """Windows drawn at random starts of a stream; of ready-made windows, the first `count`.

    Arguments as :func:`evaluation_windows`; `seed` is that of the draw.

    Returns:
      int32 [count, length].

    Raises:
      DataError: the stream is shorter than a window, or there are too few windows.
    """
    if tokens.ndim == 2:
        if len(tokens) < count or tokens.shape[1] < length:
            raise DataError(
                f"{source} holds {tokens.shape[0]} windows of {tokens.shape[1]}, asked for {count} of {length}"
            )
        return tokens[:count, :length]
    taken = length - (first_token is not None)
    if tokens.size < taken:
        raise DataError(
            f"{source} holds {tokens.size} tokens, less than one window of {length}; ask for shorter windows"
        )
    starts = np.random.default_rng(seed).integers(0, tokens.size - taken + 1, count)
    return _begun(np.stack([tokens[start : start + taken] for start in starts]), first_token)
