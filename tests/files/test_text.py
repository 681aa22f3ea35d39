"""Bytes become text in any encoding that can be told; all else is one message."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest

from spqr_jax import DataError, ModelError
from spqr_jax.files import decode_text

TEXT = "naïve\r\nline 日本 🙂\rend"
READ = "naïve\nline 日本 🙂\nend"  # as Python reads text files


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-32"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        b"\x00\x00\xfe\xff" + TEXT.encode("utf-32-be"),
        gzip.compress(TEXT.encode(), mtime=0),
        gzip.compress(TEXT[:7].encode(), mtime=0) + gzip.compress(TEXT[7:].encode(), mtime=0) + b"\0" * 512,
        gzip.compress(TEXT.encode("utf-16"), mtime=0),
    ],
)
def test_text_in_many_encodings(data):
    assert decode_text(data, "F") == READ


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_zeros_tell_wide_characters_without_a_mark(encoding):
    text = "Some western text – with a dash, é, and 日.\n"
    assert decode_text(text.encode(encoding), "F") == text


def test_what_only_begins_like_a_file_of_another_kind_is_text():
    for text in ("", "GGUF is a format", "PAR1", "BZh", "%PDF", "PK", "a"):
        assert decode_text(text.encode(), "F") == text


def numpy_file():
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


PACKED = gzip.compress(b"some text " * 100, mtime=0)
BAD = {
    "Latin-1": ("café".encode("latin-1"), r"byte 0xE9 at offset 3 \(line 1\) is not UTF-8 text.*iconv -f latin1"),
    "Windows' Russian": ("да\nнет".encode("cp1251"), r"byte 0xE4 at offset 0 \(line 1\) is not UTF-8"),
    "Shift JIS": (b"ok\n" + "日本".encode("shift-jis"), r"at offset 3 \(line 2\)"),
    "a zero": (b"one\ntwo\0three", r"byte 0x00 at offset 7 \(line 2\) is not text: the file is binary"),
    "a zero after a mark": (b"\xef\xbb\xbfa\0b", "byte 0x00 at offset 4"),
    "UTF-16 that is no western text": ("привет, мир".encode("utf-16-le"), "iconv -f utf-16le"),
    "UTF-16 cut short": ("text".encode("utf-16")[:-1], "not UTF-16-LE text .truncated data.*damaged or cut off"),
    "half a surrogate pair": (b"\xff\xfe\x00\xd8a\x00", "not UTF-16-LE text"),
    "surrogates in UTF-8": (b"a\xed\xa0\x80", "not UTF-8"),
    "ids of 16 bits": (
        np.random.default_rng(0).integers(0, 50257, 4000).astype(np.uint16).tobytes(),
        "the file is binary",
    ),
    "ids of 32 bits": (
        np.random.default_rng(0).integers(0, 50257, 4000).astype(np.uint32).tobytes(),
        "the file is binary",
    ),
    "gzip cut short": (PACKED[:-9], "truncated gzip"),
    "gzip of which only the mark is left": (PACKED[:2], "truncated gzip"),
    "gzip with a wrong checksum": (PACKED[:-8] + b"xxxxxxxx", "damaged gzip"),
    "gzip with something behind it": (PACKED + b"rest", "damaged gzip"),
    "gzip twice": (gzip.compress(PACKED, mtime=0), "compressed with gzip twice"),
    "binary data in gzip": (gzip.compress(numpy_file(), mtime=0), "a NumPy array"),
    "zstd": (b"\x28\xb5\x2f\xfd123", "zstd -d FILE"),
    "bzip2": (b"BZh91AY&SY", "bunzip2"),
    "xz": (b"\xfd7zXZ\0", "unxz"),
    "zip": (b"PK\x03\x04\x14\0", "a zip archive"),
    "tar": (b"name".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "PDF": (b"%PDF-1.7\n", "a PDF document"),
    "a GGUF file": (b"GGUF\x03\0\0\0" + b"\0" * 16, "a model .GGUF."),
    "safetensors": (b"\x10\x01\0\0\0\0\0\0{}", "safetensors"),
    "a pickle": (b"\x80\x04\x95", "pickle"),
    "a picture": (b"\x89PNG\r\n", "a picture"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize(("data", "says"), BAD.values(), ids=BAD.keys())
def test_bytes_that_are_no_text_are_named(data, says):
    with pytest.raises(DataError, match=rf"^FILE.*{says}"):
        decode_text(data, "FILE")
    with pytest.raises(ModelError):
        decode_text(data, "FILE", ModelError)


def test_a_file_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr("spqr_jax.files.text.LARGEST", 1000)
    assert len(decode_text(gzip.compress(b"a" * 1000, mtime=0), "F")) == 1000
    with pytest.raises(DataError, match="more than 2 GiB"):
        decode_text(gzip.compress(b"a" * 1001, mtime=0), "F")


def test_any_bytes_are_text_or_one_message():
    draw = np.random.default_rng(0)
    for size in range(300):
        for start in (b"", b"\xff\xfe", b"\x00\x00\xfe\xff", b"\x1f\x8b\x08\0", b"PAR1"):
            try:
                decode_text(start + draw.bytes(size % 40), "F")
            except DataError as error:
                assert str(error).startswith("F")  # noqa: PT017 (text is as good)
