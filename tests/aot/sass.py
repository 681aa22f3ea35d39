"""PTX to machine code, and what stands in its innermost loop."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


def tool(name: str) -> str | None:
    """A CUDA tool, from the `nvidia-cuda-*` wheels or from the path."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        found = Path(folder) / "cu13" / "bin" / name
        if found.exists():
            return str(found)
    return shutil.which(name)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kernel as machine code.

    Attributes:
      registers: of a thread.
      spills: bytes stored to and loaded from local memory.
      shared: bytes of static shared memory.
      loop: opcodes of the largest innermost loop, with how often each stands there.
    """

    registers: int
    spills: int
    shared: int
    loop: dict[str, int]

    @property
    def loop_instructions(self) -> int:
        """Instructions of the loop."""
        return sum(self.loop.values())


def assemble(ptx: Path) -> Machine:
    """Compiles with ptxas and disassembles.

    Raises:
      RuntimeError: a tool fails; its message.
    """
    architecture = re.search(r"^\.target\s+(\w+)", ptx.read_text(), re.M)[1]
    cubin = ptx.with_suffix(".cubin")
    log = _run([tool("ptxas"), "-v", f"-arch={architecture}", str(ptx), "-o", str(cubin)])
    sass = _run([tool("nvdisasm"), "-c", str(cubin)])
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    shared = re.search(r"(\d+) bytes smem", log)
    return Machine(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spills=sum(spills),
        shared=int(shared[1]) if shared else 0,
        loop=dict(collections.Counter(_largest_loop(sass)).most_common()),
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout + done.stderr


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)")


def _largest_loop(sass: str) -> list[str]:
    """Opcodes between a label and a branch back to it, of the longest such that holds no other.

    Loops with matrix products go before others.
    """
    labels, opcodes, branches = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L_x?_?\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            opcodes.append(found[1])
            target = re.search(r"BRA.*`\((\.L_x?_?\d+)\)", line)
            if target and target[1] in labels:
                branches.append((labels[target[1]], len(opcodes)))
    loops = [(a, b) for a, b in branches if b - a > 4]
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    if not inner:
        return []
    products = [loop for loop in inner if any(op.startswith("HMMA") for op in opcodes[loop[0] : loop[1]])]
    first, last = max(products or inner, key=lambda loop: loop[1] - loop[0])
    return opcodes[first:last]
