"""What a folder may hold after a power cut: a model of a disk that promises only what was flushed.

A file's content is certain once the file was flushed. What was written since may be there, may be missing, or in part.
A name (made, changed or removed) is certain once the folder that holds it was flushed, and a rename once either of its
two folders was. Of the other changes of names any may have happened and any not, each as a whole: journaling file
systems keep an order among them, this model does not.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from support.crash.recorder import Record


@dataclasses.dataclass
class _File:
    now: bytearray = dataclasses.field(default_factory=bytearray)
    flushed: bytes | None = None


@dataclasses.dataclass
class _Link:
    target: str


@dataclasses.dataclass
class _Folder:
    now: dict[str, _Node] = dataclasses.field(default_factory=dict)
    flushed: dict[str, _Node] = dataclasses.field(default_factory=dict)
    pending: list[_Change] = dataclasses.field(default_factory=list)


_Node = _File | _Folder | _Link


@dataclasses.dataclass(eq=False)
class _Change:
    """Of names in one folder or two: all of it happens or nothing."""

    entries: list[tuple[_Folder, str, _Node | None]]
    is_flushed: bool = False


class Disk:
    """Follows records; `after_power_cut` then tells what may be found."""

    def __init__(self) -> None:
        self.root = _Folder()
        self._inodes: dict[int, _Node] = {}

    def follow(self, record: Record) -> None:
        if record.kind in ("create", "mkdir", "symlink"):
            new: _Node = {"create": _File, "mkdir": _Folder}.get(record.kind, lambda: _Link(record.second))()
            self._inodes[record.inode] = new
            self._change((record.path, new))
        elif record.kind == "write":
            content = self._file(record.inode).now
            content.extend(bytes(max(0, record.offset - len(content))))
            content[record.offset : record.offset + len(record.data)] = record.data
        elif record.kind == "truncate":
            content = self._file(record.inode).now
            del content[record.offset :]
            content.extend(bytes(record.offset - len(content)))
        elif record.kind == "sync":
            self._flush(self._inodes.get(record.inode, self.root))
        elif record.kind == "rename":
            self._rename(record)
        elif record.kind == "unlink":
            self._change((record.path, None))
        elif record.kind == "link":
            self._change((record.path, self._inodes[record.inode]))

    def _rename(self, record: Record) -> None:
        """A name inside takes another; what comes from outside or goes there is not followed."""
        if record.path.startswith("..") or record.second.startswith(".."):
            raise ValueError(f"a rename across the border of the watched folder: {record}")
        folder, name = self._place(record.path)
        self._change((record.path, None), (record.second, folder.now[name]))

    def _file(self, inode: int) -> _File:
        node = self._inodes[inode]
        assert isinstance(node, _File)
        return node

    def _place(self, path: str) -> tuple[_Folder, str]:
        *folders, name = Path(path).parts
        node: _Node = self.root
        for part in folders:
            assert isinstance(node, _Folder)
            node = node.now[part]
        assert isinstance(node, _Folder)
        return node, name

    def _change(self, *entries: tuple[str, _Node | None]) -> None:
        change = _Change([(*self._place(path), node) for path, node in entries])
        for folder, name, node in change.entries:
            _set(folder.now, name, node)
            if change not in folder.pending:
                folder.pending.append(change)

    def _flush(self, node: _Node) -> None:
        if isinstance(node, _File):
            node.flushed = bytes(node.now)
        elif isinstance(node, _Folder):
            for change in node.pending:
                change.is_flushed = True
            _settle(node)

    def as_it_is(self) -> dict[str, bytes | str | None]:
        """Path -> content of each file now, target of each link, None for each folder."""
        return dict(_walk(self.root, lambda folder: folder.now, lambda file: bytes(file.now)))

    def after_power_cut(self, chance: random.Random) -> dict[str, bytes | str | None]:
        """As `as_it_is`, of what may be found on the disk."""
        happened: dict[int, bool] = {}
        keep = chance.choice((0.0, 0.5, 0.9, 1.0))

        def entries(folder: _Folder) -> dict[str, _Node]:
            names = dict(folder.flushed)
            for change in folder.pending:
                if change.is_flushed or happened.setdefault(id(change), chance.random() < keep):
                    for place, name, node in change.entries:
                        if place is folder:
                            _set(names, name, node)
            return names

        return dict(_walk(self.root, entries, lambda file: _content(file, chance)))


def _set(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _settle(folder: _Folder) -> None:
    """Changes at the beginning that are certain are pending no longer; their order to the others counts."""
    while folder.pending and folder.pending[0].is_flushed:
        for place, name, node in folder.pending.pop(0).entries:
            if place is folder:
                _set(folder.flushed, name, node)


def _content(file: _File, chance: random.Random) -> bytes:
    """Flushed bytes are certain; others may be lost, zeros, or a mixture."""
    now, flushed = bytes(file.now), file.flushed if file.flushed is not None else b""
    if now == flushed:
        return now
    length = chance.randint(0, len(now))
    candidates = (now, flushed, now[:length], bytes(len(now)), now[:length] + bytes(len(now) - length))
    return chance.choice(candidates)


def _walk(folder, entries, content, base=""):
    for name, node in sorted(entries(folder).items()):
        path = f"{base}{name}"
        if isinstance(node, _Folder):
            yield path, None
            yield from _walk(node, entries, content, f"{path}/")
        else:
            yield path, node.target if isinstance(node, _Link) else content(node)


def write_tree(folder: Path, tree: dict[str, bytes | str | None]) -> None:
    """Makes a folder that holds what `Disk` tells."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir(exist_ok=True)
        elif isinstance(content, str):
            (folder / path).symlink_to(content)
        else:
            (folder / path).write_bytes(content)


def read_tree(folder: Path) -> dict[str, bytes | str | None]:
    """What a folder holds, in the form of `Disk.as_it_is`."""
    tree: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            tree[name] = str(path.readlink())
        else:
            tree[name] = None if path.is_dir() else path.read_bytes()
    return tree


def disk_after(records: Sequence[Record], count: int) -> Disk:
    """A disk that has followed the first `count` records."""
    disk = Disk()
    for record in records[:count]:
        disk.follow(record)
    return disk
