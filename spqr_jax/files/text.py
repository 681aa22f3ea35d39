"""Text out of bytes: in any encoding that can be told, and one message where it cannot."""

from __future__ import annotations

import gzip
import io
import re
import unicodedata
import zlib

from spqr_jax.errors import DataError, SpQRError
from spqr_jax.files.entries import LARGEST

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)

# What files of other kinds begin with, what they are, and how their text is had.
_KINDS = (
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer", "fetch the file itself, `git lfs pull`"),
    (rb"\x28\xb5\x2f\xfd", "zstd-compressed data", "decompress it, `zstd -d FILE`"),
    (rb"BZh[1-9]1AY&SY", "bzip2-compressed data", "decompress it, `bunzip2 FILE`"),
    (rb"\xfd7zXZ\0", "xz-compressed data", "decompress it, `unxz FILE`"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (such as .docx, .xlsx, .npz or .pt)", "unpack or convert it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb".{257}ustar", "a tar archive", "unpack it, `tar -xf FILE`"),
    (rb"PAR1.{4,}PAR1\Z", "a Parquet table", "give it as an uncompressed file"),
    (rb"(ARROW1\0|\xff\xff\xff\xff)", "an Arrow table", "write it as Parquet, `Dataset.to_parquet`"),
    (rb"\x93NUMPY", "a NumPy array", "give token ids as an uncompressed .npy file"),
    (rb"GGUF[^\n]\0\0", "a model (GGUF)", "give text instead"),
    (rb".{5}\0\0\0\{", "a model's weights (safetensors)", "give text instead"),
    (rb"\x80[\x02-\x05]", "a Python pickle, which is not read", "write its texts as JSON lines"),
    (rb"%PDF-\d\.\d", "a PDF document", "convert it, `pdftotext FILE`"),
    (rb"\{\\rtf\d", "an RTF document", "save it as plain text"),
    (rb"\xd0\xcf\x11\xe0", "an old Word or Excel document", "save it as plain text"),
    (rb"(\x89PNG|\xff\xd8\xff|GIF8[79]a)", "a picture", "give text instead"),
    (rb"\x7fELF", "a program", "give text instead"),
    (rb"SQLite format 3\0", "an SQLite database", "export its texts as CSV"),
)

_GZIP = b"\x1f\x8b"
_PIECE = 1 << 24  # bytes unpacked at a time


def decode_text(data: bytes, label: str, error: type[SpQRError] = DataError) -> str:
    """The text of a file, a prompt or a stream.

    A byte order mark decides: UTF-8, UTF-16 or UTF-32, of either order. Without one,
    UTF-16 and UTF-32 are told by the zeros between western letters; all else must be
    UTF-8, without errors. Other encodings are never guessed. Data packed by gzip is
    unpacked. Line ends become "\\n", as Python's own text files have them.

    Args:
      data: of any content.
      label: where it comes from, for messages.
      error: what is raised.

    Raises:
      SpQRError: of type `error`: binary data, another encoding, or damaged data.
    """
    if data.startswith(_GZIP):
        data = _unpack(data, label, error)
    for start, kind, advice in _KINDS:
        if re.match(start, data, re.DOTALL):
            raise error(f"{label} is {kind}, expected text: {advice}")
    name, begin = _marked(data) or (_encoding_by_zeros(data) or "utf-8", 0)
    if name == "utf-8" and b"\0" in data:
        raise error(
            f"{label}: {_place(data, data.index(0))} is not text: the file is binary, or its text encoding cannot be "
            "determined. Convert text to UTF-8, for example with `iconv -f utf-16le -t utf-8 FILE > NEW`"
        )
    try:
        text = data[begin:].decode(name)
    except UnicodeDecodeError as problem:
        advice = "convert it to UTF-8, for example with `iconv -f latin1 -t utf-8 FILE > NEW`"
        if begin:
            advice = "its byte order mark announces this encoding; is the file damaged or cut off?"
        raise error(
            f"{label}: {_place(data, begin + problem.start)} is not {name.upper()} text ({problem.reason}): {advice}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def checked_characters(text: str, label: str, error: type[SpQRError] = DataError) -> str:
    """The text, all of whose characters are some; JSON's escapes can stand for halves, which no tokenizer takes.

    Raises:
      SpQRError: of type `error`: half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise error(
            f"{label}: \\u{ord(text[problem.start]):04x} at character {problem.start} is half of a surrogate pair, not "
            "a character: replace it with \\ufffd, or remove it"
        ) from None
    return text


def _marked(data: bytes) -> tuple[str, int] | None:
    """The encoding by the byte order mark, and the bytes that the mark takes; None without one."""
    for mark, encoding in _MARKS:
        if data.startswith(mark) and not (encoding.startswith("utf-32") and len(data) % 4):
            return encoding, len(mark)
    return None


def _encoding_by_zeros(data: bytes) -> str | None:
    """UTF-32 or UTF-16 without a mark: most characters are western, so their higher bytes are zeros."""
    if b"\0" not in data:
        return None
    for encoding, width, low in (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1)):
        zeros = [data[lane::width].count(0) / max(1, len(data) // width) for lane in range(width)]
        letters = zeros.pop(low)
        if len(data) % width == 0 and min(zeros) >= 0.75 and letters < 0.1:
            try:
                characters = set(data.decode(encoding))
            except UnicodeDecodeError:
                continue
            if not any(_is_odd(character) for character in characters):
                return encoding
    return None


def _is_odd(character: str) -> bool:
    """Whether text holds no such character: controls, unassigned ones, those for private use."""
    return unicodedata.category(character) in ("Cc", "Cn", "Co") and character not in "\t\n\r\f"


def _unpack(data: bytes, label: str, error: type[SpQRError]) -> bytes:
    """The content of a gzip file, of one part or several."""
    parts: list[bytes] = []
    total = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(_PIECE):
                parts.append(part)
                total += len(part)
                if total > LARGEST:
                    raise error(f"{label} decompresses to more than 2 GiB: use a part of it")
    except EOFError:
        raise error(f"{label} is a truncated gzip file: fetch it again") from None
    except (OSError, zlib.error) as problem:
        raise error(f"{label} is a damaged gzip file ({problem}): fetch it again") from None
    if parts and parts[0].startswith(_GZIP):
        raise error(f"{label} is compressed with gzip twice: decompress it once, `gunzip FILE`")
    return b"".join(parts)


def _place(data: bytes, offset: int) -> str:
    """A byte for a message: what it is, and where."""
    line = data.count(b"\n", 0, offset) + 1
    return f"byte 0x{data[offset]:02X} at offset {offset} (line {line})"
