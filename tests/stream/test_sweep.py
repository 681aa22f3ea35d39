"""The two loops over a model's blocks: order, reading ahead, memory, errors, and that there is no third."""

from __future__ import annotations

import ast
import threading
import weakref
from pathlib import Path

import jax
import pytest

from spqr_jax.errors import ModelError
from spqr_jax.models.decoder import Block
from spqr_jax.stream import sweep

PACKAGE = Path(__file__).resolve().parents[2] / "spqr_jax"


class _Config:
    num_layers = 5


class _Source:
    """Gives empty blocks; knows which are read, by which thread, and how many are alive."""

    config = _Config()

    def __init__(self, broken: int | None = None):
        self.read, self.threads, self.devices, self.most_alive = [], [], [], 0
        self._broken, self._given = broken, []
        self.begun = [threading.Event() for _ in range(_Config.num_layers)]

    def alive(self) -> int:
        return sum(block() is not None for block in self._given)

    def block(self, index: int) -> Block:
        self.begun[index].set()
        self.read.append(index)
        self.threads.append(threading.current_thread())
        self.devices.append(jax.config.jax_default_device)
        if index == self._broken:
            raise ModelError(f"block {index} is damaged")
        block = Block({})
        self._given.append(weakref.ref(block))
        self.most_alive = max(self.most_alive, self.alive())
        return block


@pytest.mark.parametrize("read_ahead", [True, False])
def test_blocks_are_visited_in_order(read_ahead):
    source, seen = _Source(), []
    sweep.forward(source, lambda index, block: seen.append(index), read_ahead=read_ahead)
    sweep.forward(source, lambda index, block: seen.append(index), first=3, end=4, read_ahead=read_ahead)
    sweep.forward(source, lambda index, block: seen.append(index), first=5, read_ahead=read_ahead)
    sweep.backward(source, lambda index, block: seen.append(index), read_ahead=read_ahead)
    sweep.backward(source, lambda index, block: seen.append(index), first=2, end=1, read_ahead=read_ahead)
    assert seen == source.read == [0, 1, 2, 3, 4, 3, 4, 3, 2, 1, 0, 2, 1]


@pytest.mark.parametrize("read_ahead", [True, False])
def test_at_most_two_blocks_are_held(read_ahead):
    """The next block is read during a visit, and the one behind it is not."""
    source = _Source()

    def visit(index, block):
        if read_ahead and index + 1 < _Config.num_layers:
            assert source.begun[index + 1].wait(timeout=60)
        if index + 2 < _Config.num_layers:
            assert not source.begun[index + 2].wait(timeout=0.01)

    sweep.forward(source, visit, read_ahead=read_ahead)
    assert source.most_alive == (2 if read_ahead else 1)
    assert source.alive() == 0
    here = threading.current_thread()
    assert all((thread is here) != read_ahead for thread in source.threads)
    assert not any(thread.is_alive() for thread in source.threads if thread is not here)


def test_an_error_is_raised_when_its_block_is_due():
    source, seen = _Source(broken=2), []
    with pytest.raises(ModelError, match="block 2 is damaged"):
        sweep.forward(source, lambda index, block: seen.append(index))
    assert seen == [0, 1]
    seen.clear()
    with pytest.raises(ModelError, match="block 2 is damaged"):
        sweep.backward(_Source(broken=2), lambda index, block: seen.append(index))
    assert seen == [4, 3]


def test_a_visitor_that_fails_ends_the_reading():
    source = _Source()

    def visit(index, block):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.forward(source, visit)
    assert source.read in ([0], [0, 1])
    assert not any(thread.is_alive() for thread in source.threads)


def test_the_thread_puts_arrays_where_the_caller_would():
    source, device = _Source(), jax.devices("cpu")[-1]
    with jax.default_device(device):
        sweep.forward(source, lambda index, block: None)
    assert source.devices == [device] * 5


def _loops(tree: ast.AST):
    """Each loop or comprehension of a module: the node, its iterables as source text and its body's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            yield node.lineno, ast.unparse(node.iter), ast.unparse(ast.Module(node.body, []))
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            iterables = " ".join(ast.unparse(part.iter) for part in node.generators)
            yield node.lineno, iterables, ast.unparse(node)


RUNS_BLOCKS = (".block(", "pass_block(", "run_block(", "run_stage(", "dense_block(", "block_form(", "put_block(")
IN_TRACED_FUNCTIONS = {  # the whole model as one expression; here is nothing to read or to drop between blocks
    "models/decoder.py: params.layers",
}


def test_there_is_no_other_loop_over_blocks():
    """Whatever reads or runs the blocks of a model is a visitor of `forward` or `backward`."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "stream/sweep.py":
            continue
        for _, iterables, body in _loops(ast.parse(path.read_text())):
            over_blocks = "num_layers" in iterables or ".layers" in iterables
            if over_blocks and any(call in body for call in RUNS_BLOCKS):
                found.add(f"{name}: {iterables}")
    assert found == IN_TRACED_FUNCTIONS
