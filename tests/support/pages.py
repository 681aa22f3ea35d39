"""Runs a page of the documentation: every command and every Python block, in order, as a reader would.

    run_page(ROOT / "README.md", tmp_path)                  # quickly: a tiny model in place of `demo`
    run_page(ROOT / "README.md", tmp_path, real_demo=True)  # the real one, every number as written

What a page may hold:

- ```` ```python ````: all blocks of a page share one namespace. A comment behind ``print(...)`` shows what is printed.
- ```` ```console ```` and ```` ```shell ````: lines that begin with ``$``, each followed by the output shown for it
  (``...`` for lines left out). ``$ spqr ...`` runs in this process and must exit with 0; the other commands allowed
  are `OTHER_COMMANDS`. Lines that begin with ``>`` are what a user types in a conversation (``spqr generate --chat``).
- ```` ```text ````, ```` ```json ```` and ```` ```bibtex ````: shown, not run.
- Any block after a line ``<!-- not run: REASON -->``.

Shown output is compared by its words, in order, without its numbers (see `check_shown`). What a model writes is not
compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from spqr_jax.models.decoder import random_decoder
from support.command import spqr
from support.model_files import byte_tokenizer, write_hf
from support.problems import TINY

OTHER_COMMANDS = ("ls", "du")
"""Commands beside `spqr` that a page may run."""
SHOWN_ONLY = ("text", "json", "bibtex")
"""Languages of blocks that are not run."""
QUICK_REPLACEMENTS = (
    # Less text, in windows that other tests compile for, too.
    (r"--nsamples \d+", "--nsamples 4"),
    (r"--seqlen \d+", "--seqlen 32"),
    (r"--windows \d+", "--windows 3"),
    (r"\blength=\d+, count=\d+", "length=32, count=4"),
    (r"--max-new-tokens \d+", "--max-new-tokens 16"),
    # Small matrices need more bits a weight for what comes once a row: 4 stored bits are too few for 3-bit codes.
    (r"--target-bits 4 --bits 3,4", "--target-bits 5 --bits 3,4"),
)
"""What the quick run reads in place of a page's text: patterns and what stands in their place."""

_UNITS = frozenset(
    {"about", "a", "few", "second", "seconds", "minute", "minutes", "hour", "hours", "MB", "GB"}
    | {"thousand", "million", "billion"}
)
"""Words beside numbers, which depend on their size: "a few seconds", "about 2 minutes"."""
_MODULE = "documentation_page"
_FENCE = re.compile(r"^```(\S*)\s*$")
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
_SHELL_SYNTAX = {"|", "||", "&&", "&", ";", ">", ">>", "<"}
_PRINT_COMMENT = re.compile(r"^\s*print\((?P<printed>.*)\)\s+# (?P<shown>.+)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, and the number of its first line in the page."""

    language: str
    lines: tuple[str, ...]
    line: int


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of a console block and the output shown for it; `typed` is what a user types in a conversation."""

    command: tuple[str, ...]
    shown: tuple[str, ...]
    typed: tuple[str, ...]


def run_page(page: Path, folder: Path, *, real_demo: bool = False) -> dict[str, Any]:
    """Runs all blocks of a page in one folder.

    Args:
      page: a Markdown file.
      folder: an empty one to run in.
      real_demo: leave `demo` and all numbers as they are; otherwise `demo` is a tiny random model with a byte
        tokenizer and a chat template, and `QUICK_REPLACEMENTS` are made.

    Returns:
      The names that the Python blocks defined.

    Raises:
      AssertionError: a block fails, or shows what is not printed; names the page and the line.
    """
    namespace = types.ModuleType(_MODULE)  # a module: dataclasses look up the one they are defined in
    work = folder / "work"
    work.mkdir()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, {_MODULE: namespace}))
        if not real_demo:
            stack.enter_context(_tiny_demo(folder / "tiny-demo"))
        for block in blocks_to_run(page):
            text = "\n".join(block.lines)
            if not real_demo:
                text = _replaced(text)
            place = f"{page.name}:{block.line}"
            if block.language == "python":
                _run_python(text, place, namespace, work)
            else:
                _run_console(text, place, work)
    return vars(namespace)


# ---- reading a page ---------------------------------------------------------------------------


def blocks_to_run(page: Path) -> list[Block]:
    """The Python and console blocks of a page, without those marked ``not run``.

    Raises:
      AssertionError: a block has no language, or one that is neither run nor only shown.
    """
    blocks, before, opened = [], "", None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and (fence := _FENCE.match(line)):
            opened = (fence[1], number + 1, [], _NOT_RUN.fullmatch(before) is not None)
        elif opened is not None and line.startswith("```"):
            language, first, lines, skipped = opened
            opened, before = None, ""
            if skipped or language in SHOWN_ONLY:
                continue
            known = language in ("python", "console", "shell")
            assert known, (
                f"{page.name}:{first - 1}: a block of language {language!r} is not run: see tests/support/pages.py"
            )
            blocks.append(Block(language, tuple(lines), first))
        elif opened is not None:
            opened[2].append(line)
        elif line.strip():
            before = line.strip()
    assert opened is None, f"{page.name}: a block is not closed"
    return blocks


def console_steps(text: str) -> list[Step]:
    """The commands of a console block, each with the output shown for it."""
    steps: list[tuple[str, list[str], list[str]]] = []
    continued = False
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], [], []))
        elif continued:
            command, shown, typed = steps[-1]
            steps[-1] = (command.removesuffix("\\") + line, shown, typed)
        else:
            assert steps, f"output before the first command: {line!r}"
            steps[-1][2 if line.startswith("> ") else 1].append(line.removeprefix("> "))
            continue
        continued = line.endswith("\\")
    return [Step(_words_of(command), tuple(shown), tuple(typed)) for command, shown, typed in steps]


def _words_of(command: str) -> tuple[str, ...]:
    words = tuple(shlex.split(command, comments=True))
    assert not _SHELL_SYNTAX & set(words), f"pages run no pipes and no redirections: {command!r}"
    return words


def _replaced(text: str) -> str:
    for written, quick in QUICK_REPLACEMENTS:
        text = re.sub(written, quick, text)
    return text


# ---- running it -------------------------------------------------------------------------------


@contextlib.contextmanager
def _tiny_demo(folder: Path) -> Iterator[None]:
    """`demo`, on the command line and in Python, is a tiny model."""
    config = dataclasses.replace(TINY, tied_head=True, max_positions=2048)  # as the real one's; room for its windows
    write_hf(folder, random_decoder(config, seed=0))
    byte_tokenizer().save_pretrained(folder)
    with mock.patch("spqr_jax.resolve.packaged_model", return_value=folder):
        yield


def _run_python(code: str, place: str, namespace: types.ModuleType, folder: Path) -> None:
    printed = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(compile(code, place, "exec"), vars(namespace))
    except Exception as error:
        raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error
    comments = [match for line in code.splitlines() if (match := _PRINT_COMMENT.match(line))]
    shown = [match["shown"] for match in comments if "decode(" not in match["printed"]]  # a model's text
    check_shown(shown, [printed.getvalue().splitlines()], place)
    assert len(printed.getvalue().splitlines()) >= len(comments), f"{place}: fewer lines are printed than are shown"


def _run_console(text: str, place: str, folder: Path) -> None:
    for step in console_steps(text):
        command = shlex.join(step.command)
        where = f"{place}: $ {command}"
        if step.command[0] in OTHER_COMMANDS:
            other = subprocess.run(step.command, cwd=folder, capture_output=True, text=True, check=False)
            assert other.returncode == 0, f"{where}\n{other.stderr}"
            continue
        assert step.command[0] == "spqr", f"{where}\na page may run spqr and {', '.join(OTHER_COMMANDS)}"
        typed = "".join(f"{line}\n" for line in step.typed)
        result = spqr(*step.command[1:], cwd=folder, stdin=typed, terminal=bool(typed))
        assert result.returncode == 0, f"{where}\nexits with {result.returncode}\n{result.stderr[-2000:]}"
        shown = step.shown
        if step.command[1] == "generate":  # what a model writes differs; the last line is ours, outside conversations
            shown = () if typed else shown[-1:]
        check_shown(shown, [result.stderr.splitlines(), result.stdout.splitlines()], where)


# ---- comparing what is shown ------------------------------------------------------------------


def check_shown(shown: Sequence[str], streams: Sequence[Sequence[str]], place: str) -> None:
    """Checks that shown lines look like lines that were printed, in the same order.

    Every word of a shown line must be in a line of one stream, or in that line and the next, since a page
    breaks lines elsewhere. Numbers count for nothing, nor do names of matrices such as ``up_proj`` that stand alone:
    another model has other ones. More may be printed than is shown.

    Raises:
      AssertionError: a shown line is like no line from there on.
    """
    position = [0] * len(streams)
    for line in shown:
        words = _words(line)
        for index, printed in enumerate(streams):
            match = next((at for at in range(position[index], len(printed)) if words <= _pair(printed, at)), None)
            if match is not None:
                position[index] = match
                break
        else:
            printed = "\n".join("\n".join(stream) for stream in streams)
            raise AssertionError(
                f"{place}\nshows {line!r},\nbut no such line is printed there. Printed:\n{printed[-4000:]}"
            )


def _pair(lines: Sequence[str], index: int) -> set[str]:
    return _words(" ".join(lines[index : index + 2]))


def _words(line: str) -> set[str]:
    """Words with letters in them, except units; digits in them are #."""
    words = {re.sub(r"\d+", "#", word.strip("()[],;:'\"")) for word in re.findall(r"[^\s│┃…━┏┓┳┡┩╇└┘┴─]+", line)}
    words = {word for word in words if re.search(r"[A-Za-z]", word) and not re.fullmatch(r"[a-z]+_proj", word)}
    return words - _UNITS
