"""Rows out of JSON, JSON lines, CSV and Parquet, each with its place for messages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from spqr_jax.errors import DataError
from spqr_jax.files.entries import LARGEST

Row = tuple[str, Any]
"""Where it is ("FILE, line 3"), and what it holds."""


def json_rows(text: str, label: str) -> Iterator[Row]:
    """JSON values one after another, as JSON lines have them; or the elements of a single array.

    Raises:
      DataError: a value that is not JSON; the line that it begins in is named.
    """
    values = list(_json_values(text, label))
    if len(values) == 1 and isinstance(values[0][1], list):
        return ((f"{label}, record {index}", value) for index, value in enumerate(values[0][1], start=1))
    return iter(values)


def _json_values(text: str, label: str) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    position, line, size = 0, 1, len(text)
    while True:
        begin = position
        while position < size and text[position].isspace():
            position += 1
        line += text.count("\n", begin, position)
        if position == size:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except RecursionError:
            raise DataError(f"{label}, line {line}: the JSON is nested too deeply: remove the record") from None
        except ValueError as problem:  # of JSON, and of numbers too long to convert
            raise DataError(
                f"{label}, line {line}: not valid JSON ({problem}); expected one JSON object per line, or one array of "
                "objects: correct or remove it (a plain text file must not be named .json or .jsonl)"
            ) from None
        yield f"{label}, line {line}", value
        line += text.count("\n", position, end)
        position = end


def looks_like_json(text: str) -> bool:
    """Whether a file of any name holds JSON records: one of its first two lines is an object, or all of it an array."""
    begun = text[:1000].lstrip()[:1]
    if begun == "{":  # two lines, so that a broken first one is said and not read as prose
        first, _, rest = text.lstrip().partition("\n")
        return _is_object(first) or _is_object(rest.lstrip().partition("\n")[0])
    if begun == "[":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return bool(values) and all(isinstance(value, dict) for value in values)
    return False


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object with something in it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def csv_rows(text: str, label: str, delimiters: str, names: Sequence[str], more: Sequence[str]) -> Iterator[Row]:
    """Rows of a table whose first row names its columns, as objects of texts.

    Args:
      text: may hold quoted line ends and delimiters.
      label: the file, for messages.
      delimiters: tried in turn, until one finds a wanted column.
      names: columns of which one must be there.
      more: columns that are taken if they are there.

    Raises:
      DataError: no such column, a row with more or fewer fields, or a quote that does not end.
    """
    headers = {delimiter: _header(text, label, delimiter) for delimiter in delimiters}
    delimiter = next((d for d in delimiters if set(names) & set(headers[d])), delimiters[0])
    header = headers[delimiter]
    rows = _csv_fields(text, label, delimiter)
    next(rows)
    wanted = _wanted(header, label, names, more)
    for line, fields in rows:
        if not fields:
            continue
        place = f"{label}, line {line}"
        if len(fields) != len(header):
            raise DataError(
                f"{place}: {len(fields)} fields, but the first row names {len(header)} columns: put texts with "
                f"{delimiter!r} or line breaks in quotes"
            )
        row = dict(zip(header, fields, strict=True))
        yield place, {name: row[name] for name in wanted}


def _header(text: str, label: str, delimiter: str) -> list[str]:
    """The names of the columns; none where the first row is no row with this delimiter."""
    try:
        return [name.strip() for name in next(_csv_fields(text, label, delimiter))[1]]
    except DataError:
        return []


def _csv_fields(text: str, label: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line that a row begins in, and its fields; blank lines before the first row are left out."""
    reader = csv.reader(io.StringIO(text.lstrip("\n"), newline=""), delimiter=delimiter, strict=True)
    skipped = len(text) - len(text.lstrip("\n"))
    while True:
        line = skipped + reader.line_num + 1
        before = csv.field_size_limit(LARGEST)  # of the whole process; a document is longer than its default
        try:
            fields = next(reader, None)
        except csv.Error as problem:
            raise DataError(
                f"{label}, line {line}: not a valid table row ({problem}): inside a quoted text, write each quote twice"
            ) from None
        finally:
            csv.field_size_limit(before)
        if fields is None:
            return
        yield line, fields


def parquet_rows(data: bytes, label: str, names: Sequence[str], more: Sequence[str]) -> Iterator[Row]:
    """Rows of a Parquet table, as objects of the wanted columns; `names` and `more` as in :func:`csv_rows`.

    Raises:
      DataError: no such column, or a file that pyarrow cannot read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        wanted = _wanted(table.schema_arrow.names, label, names, more)
        count = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                count += 1
                yield f"{label}, row {count}", row
    except DataError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as problem:  # ValueError: also of texts that are not UTF-8
        raise DataError(
            f"{label} cannot be read as Parquet ({' '.join(str(problem).split())[:200]}): fetch it again"
        ) from None


def _wanted(columns: Sequence[str], label: str, names: Sequence[str], more: Sequence[str]) -> list[str]:
    """The columns to be read, or an error that says which there are."""
    if not set(names) & set(columns):
        raise no_text(label, "column", columns, label, names)
    wanted = [name for name in columns if name in (*names, *more)]
    for name in set(wanted):
        if wanted.count(name) > 1:
            raise DataError(f"{label} has {wanted.count(name)} columns {name!r}: rename all but one")
    return wanted


def no_text(place: str, kind: str, there: Sequence[str], label: str, names: Sequence[str]) -> DataError:
    """The error of a table or a record without the text that is asked for.

    Args:
      place: in the file.
      kind: of what is lacking: ``column`` or ``key``.
      there: the columns or keys that it has.
      label: the file.
      names: the columns or keys that would do.
    """
    listed = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    return DataError(
        f"{place}: no {kind} {' or '.join(map(repr, names))}; there are: {listed or 'none'}. "
        f"Name the one with the text, for example {label}#{next(iter(there), kind.upper())}"
    )
