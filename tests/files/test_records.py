"""Documents out of the files that people keep texts in, and one message for each that is not understood."""

from __future__ import annotations

import gzip
import json
import os
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from spqr_jax import DataError, ModelError
from spqr_jax.data import load_tokens

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
RENDERED = "<user>hi<assistant>hello|"
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def render(messages):
    return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "|"


def text_of(spec, renderer=render, split="calibration"):
    """The text that is tokenized."""
    seen = []

    def encode(text):
        text.encode()  # a tokenizer takes nothing else
        seen.append(text)
        return np.zeros(len(text), np.int32)

    load_tokens(str(spec), split, encode, renderer)
    return seen[0]


def lines(*records):
    return "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)


GOOD = {
    "JSON lines": ("a.jsonl", lines({"text": "naïve\nline"}, {"text": "two"}), "naïve\nline\n\ntwo"),
    "by another name": ("a.txt", lines({"text": "one"}, "", {"text": "two"}), "one\n\ntwo"),
    "without a name's end": ("data", lines({"text": "one", "id": 3}), "one"),
    "in capitals": ("A.NDJSON", lines({"text": "one"}), "one"),
    "Windows' line ends": ("a.jsonl", '{"text": "one"}\r\n\r\n{"text": "two"}\r\n', "one\n\ntwo"),
    "a byte order mark": ("a.jsonl", '\ufeff{"text": "one"}', "one"),
    "an array": ("a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=1), "one\n\ntwo"),
    "an array by another name": ("a.txt", json.dumps([{"text": "one"}, {"text": "two"}]), "one\n\ntwo"),
    "an array of texts": ("a.json", json.dumps(["one", "two"]), "one\n\ntwo"),
    "texts a line": ("a.jsonl", lines('"one"', '"two"'), "one\n\ntwo"),
    "an object on many lines": ("a.json", json.dumps({"text": "one"}, indent=2), "one"),
    "objects on many lines": ("a.jsonl", '{\n"text": "one"\n}\n{\n"text": "two"\n}\n', "one\n\ntwo"),
    "blank and null": ("a.jsonl", lines({"text": ""}, {"text": " \n"}, {"text": None}, {"text": "one"}), "one"),
    "a pair of surrogates": ("a.jsonl", r'{"text": "\ud83d\ude42"}', "🙂"),
    "messages": ("a.jsonl", lines({"messages": CHAT}, {"messages": CHAT}), RENDERED * 2),
    "ShareGPT": ("a.json", json.dumps([{"conversations": SHAREGPT}]), RENDERED),
    "ShareGPT's system": ("a.jsonl", lines({"system": "S", "conversations": SHAREGPT}), "<system>S" + RENDERED),
    "conversation": ("a.jsonl", lines({"conversation": CHAT, "model": "x"}), RENDERED),
    "mixed": ("a.jsonl", lines({"text": "a"}, {"text": "b"}, {"messages": CHAT}, {"text": "c"}), f"a\n\nb{RENDERED}c"),
    "null text beside messages": ("a.jsonl", lines({"text": None, "messages": CHAT}), RENDERED),
    "no messages": ("a.jsonl", lines({"messages": []}, {"text": "one"}), "one"),
    "parts": (
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"text": "!"}]}]}),
        "<user>hi!|",
    ),
    "a tool's call": (
        "a.jsonl",
        lines({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}),
        "<assistant>|",
    ),
    "another key": ("a.jsonl#content", lines({"content": "one", "text": "x"}), "one"),
    "another key with messages": ("a.jsonl#chosen", lines({"chosen": CHAT, "rejected": []}), RENDERED),
    "CSV": ("a.csv", 'id,text\n1,"one, ""two""\nthree"\n\n2,four\n', 'one, "two"\nthree\n\nfour'),
    "CSV with semicolons": ("a.CSV", '"id";"text"\n1;one\n', "one"),
    "TSV": ("a.tsv", "id\ttext\n1\tone, two\n", "one, two"),
    "another column": ("a.csv#body", "body,text\none,x\n", "one"),
    "messages in a cell": ("a.csv", 'messages\n"' + json.dumps(CHAT).replace('"', '""') + '"\n', RENDERED),
    "a long field": ("a.csv", "text\n" + "x" * 200_000, "x" * 200_000),
    "prose that begins like JSON": ("a.txt", "{sic} a text\n{more}", "{sic} a text\n{more}"),
    "a bibliography": ("a.txt", "[1] A book.\n[2] Another.", "[1] A book.\n[2] Another."),
    "a program": ("a.py", "{}\nprint(1)", "{}\nprint(1)"),
}


@pytest.mark.parametrize(("spec", "content", "text"), GOOD.values(), ids=GOOD.keys())
def test_documents(tmp_path, spec, content, text):
    path = tmp_path / spec.partition("#")[0]
    path.write_bytes(content.encode())
    assert text_of(tmp_path / spec) == text
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    assert text_of(str(tmp_path / spec).replace(path.name, path.name + ".gz")) == text


def test_utf16_tables_as_spreadsheets_write_them(tmp_path):
    (tmp_path / "a.csv").write_bytes("id\ttext\r\n1\tnaïve\r\n".encode("utf-16"))
    assert text_of(tmp_path / "a.csv") == "naïve"


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    texts = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": ["one", None, "two"]})
    assert text_of(texts) == "one\n\ntwo"
    texts.rename(tmp_path / "train")
    assert text_of(tmp_path / "train") == "one\n\ntwo"
    chats = write_parquet(tmp_path / "b.PARQUET", {"messages": [CHAT, CHAT], "embedding": [[0.5], [0.5]]})
    assert text_of(chats) == RENDERED * 2
    column = write_parquet(tmp_path / "c.parquet", {"body": pyarrow.array(["x", "x"]).dictionary_encode()})
    assert text_of(f"{column}#body") == "x\n\nx"


def test_a_file_of_the_whole_name_comes_first(tmp_path):
    (tmp_path / "notes#text").write_text("one")
    assert text_of(tmp_path / "notes#text") == "one"


def test_local_copies_of_corpora_may_be_tables(tmp_path):
    rows = ["", " = Title = \n", "", " Some text .\n"]
    wiki = write_parquet(tmp_path / "test.parquet", {"text": rows})
    assert text_of(f"wikitext2:{wiki}") == "\n\n".join(rows)
    (tmp_path / "ptb.jsonl").write_text(lines({"sentence": " a b "}, {"sentence": "c"}))
    assert text_of(f"ptb:{tmp_path / 'ptb.jsonl'}") == "a b\n\nc"


def test_conversations_need_a_chat_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": "one"}, {"messages": CHAT}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is a conversation, but the model has no chat template"):
        text_of(tmp_path / "a.jsonl", None)

    def fail(messages):
        raise ModelError("the template refuses")

    with pytest.raises(ModelError, match=r"a\.jsonl, line 2: the template refuses"):
        text_of(tmp_path / "a.jsonl", fail)


ONE = {"text": "one"}


def message(**entries):
    return lines({"messages": [entries]})


BAD = {
    "an empty file": ("a.jsonl", "", "holds no text"),
    "an empty table": ("a.csv", "", "holds no text"),
    "only a header": ("a.csv", "text\n", "holds no text"),
    "only blanks": ("a.txt", " \n\n", "holds no text"),
    "only nulls": ("a.jsonl", lines({"text": None}), "holds no text"),
    "an empty array": ("a.json", "[]", "holds no text"),
    "a broken line": ("a.jsonl", lines(*[ONE] * 16, '{"text": "one}', *[ONE] * 3), "line 17: not valid JSON"),
    "a first line cut short": ("a.txt", lines('{"text": "on', ONE, ONE), "line 1: not valid JSON"),
    "a line cut short": ("a.txt", lines(ONE, ONE, '{"text": "on'), "line 3: not valid JSON"),
    "prose": ("a.jsonl", "Some prose.", "line 1: not valid JSON.*plain text"),
    "nested too deeply": ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: the JSON is nested too deeply"),
    "a long number": ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1: not valid JSON"),
    "other keys": (
        "a.jsonl",
        lines(ONE, {"prompt": "x", "answer": "y"}),
        r"line 2: no key 'text'.*prompt, answer.*#prompt",
    ),
    "no keys": ("a.jsonl", lines({"text": "one"}, {}), "line 2: no key.*there are: none"),
    "the named key": ("a.jsonl#body", lines(ONE), "no key 'body'; there are: text"),
    "a number": ("a.jsonl", lines({"text": 3}), "line 1: text is 3, expected a string or a list of messages"),
    "a record of numbers": ("a.json", "[1, 2]", "record 1 is 1, expected a string or an object"),
    "a record of texts by key": ("a.jsonl#body", '"one"', "expected a string or an object with body"),
    "an object of columns": ("a.json", lines({"text": ["one", "two"]}), r"text\[0\] is 'one', expected an object with"),
    "half a surrogate pair": ("a.jsonl", lines(ONE, r'{"text": "a\ud83d"}'), r"line 2: \\ud83d at character 1 is half"),
    "half a pair in a message": ("a.jsonl", message(role="user", content="\udc00"), "is half of a surrogate pair"),
    "half a pair in a role": ("a.jsonl", message(role="\udc00", content="x"), "is half of a surrogate pair"),
    "a message without role": ("a.jsonl", message(content="x"), r"messages\[0\]: role is None, expected a string"),
    "a role of another type": ("a.jsonl", message(role=1, content="x"), "role is 1"),
    "a message without content": ("a.jsonl", message(role="user"), "content is None, expected a string"),
    "a picture": ("a.jsonl", message(role="user", content=[{"type": "image_url"}]), "only text is supported"),
    "an unknown speaker": (
        "a.jsonl",
        lines({"conversations": [{"from": "narrator", "value": "x"}]}),
        "'narrator'.*human",
    ),
    "messages that are no list": ("a.jsonl", lines({"messages": {"role": "user"}}), "expected a string or a list"),
    "Python's list in a cell": ("a.csv", "messages\n\"[{'role': 'user'}]\"\n", "line 2: messages.*messages as JSON"),
    "no such column": ("a.csv", "id,body\n1,x\n", r"no column 'text'.*there are: id, body.*#id"),
    "no header": ("a.csv", "1,some text\n", "no column 'text'"),
    "a comma too many": ("a.csv", "id,text\n1,one\n2,two, three\n", "line 3: 3 fields.*names 2 columns: put texts"),
    "a row cut short": ("a.csv", "id,text\n1,one\n2\n", "line 3: 1 fields"),
    "a quote without end": ("a.csv", 'text\n"one\n\n"two""three\n', "line 2: not a valid table row"),
    "a quote in the middle": ("a.csv", 'text\none\n"two" three\n', "line 3: not a valid table row"),
    "two columns of one name": ("a.csv", "text,text\none,two\n", "2 columns 'text'"),
    "a column of plain text": ("a.txt#body", "one", "plain text and has no columns: remove '#body'"),
    "text called Parquet": ("a.parquet", "one", "is not a Parquet file"),
    "a pointer called Parquet": ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a damaged Parquet file": ("a.parquet", "PAR1" + "x" * 40 + "PAR1", "cannot be read as Parquet"),
    "Latin-1": ("a.csv", b"text\ncaf\xe9\n", r"byte 0xE9 at offset 8 \(line 2\) is not UTF-8"),
}


@pytest.mark.parametrize(("spec", "content", "says"), BAD.values(), ids=BAD.keys())
def test_what_is_not_understood_is_named(tmp_path, spec, content, says):
    path = tmp_path / spec.partition("#")[0]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"{path.name}.*{says}"):
        text_of(tmp_path / spec)


def test_bad_parquet_files(tmp_path):
    with pytest.raises(DataError, match=r"no column 'text'.*there are: body"):
        text_of(write_parquet(tmp_path / "a.parquet", {"body": ["one"]}))
    with pytest.raises(DataError, match=r"row 1: text is b'one', expected a string"):
        text_of(write_parquet(tmp_path / "b.parquet", {"text": [b"one"]}))
    not_utf8 = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    with pytest.raises(DataError, match=r"c\.parquet cannot be read as Parquet.*utf-8"):
        text_of(write_parquet(tmp_path / "c.parquet", {"text": not_utf8}))


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a directory: give one of its files"):
        text_of(tmp_path)
    with pytest.raises(DataError, match="no data"):
        text_of("x" * 5000)
    with pytest.raises(DataError, match="no data"):
        text_of("a\0b")
    monkeypatch.setattr("spqr_jax.files.records.LARGEST", 3)
    (tmp_path / "a.txt").write_text("four")
    with pytest.raises(DataError, match=r"a\.txt has .* use a part"):
        text_of(tmp_path / "a.txt")


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[b'{"text": "one"}\n'], daemon=True)
    writer.start()
    assert text_of(tmp_path / "pipe") == "one"
    writer.join(timeout=10)
