"""What a file is by its first bytes, in words: for messages about files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

_KINDS = (
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip archive, such as PyTorch writes: give the directory with config.json and safetensors"),
    (b"\x80\x02", "a pickle file, and pickles are never read: give the directory with config.json and safetensors"),
    (b"\x80\x04", "a pickle file, and pickles are never read: give the directory with config.json and safetensors"),
    (b"lmgg", "a model in an old GGML format (older than GGUF): convert it with llama.cpp"),
    (b"fmgg", "a model in an old GGML format (older than GGUF): convert it with llama.cpp"),
    (b"tjgg", "a model in an old GGML format (older than GGUF): convert it with llama.cpp"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run 'git lfs pull'"),
    (b"\x1f\x8b", "compressed with gzip: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PAR1", "a Parquet table"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<!DOCTYPE", "a web page: was an error page saved instead of the file?"),
    (b"<html", "a web page: was an error page saved instead of the file?"),
)


def first_bytes(path: Path) -> str:
    """A file's kind in words, such as "a zip archive"."""
    try:
        with path.open("rb") as file:
            begin = file.read(32)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    if not begin:
        return "an empty file"
    for magic, words in _KINDS:
        if begin.startswith(magic):
            return words
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < 1 << 27:
        return "a safetensors file: give the directory that contains it"
    if begin.lstrip()[:1] in (b"{", b"["):
        return "JSON text: give the directory that contains it"
    return "a file of an unknown type"
