"""What the compiled programs depend on, as digests: programs with equal digests were compiled and tested already.

    python tests/aot/proof.py           exits with 0 if tests/aot/budgets.json was proven for the sources as they are
    python tests/aot/proof.py --write   notes that it was, after all of tests/aot has passed

A program depends on the script that compiles it, on every module of this repository which that imports
(directly or not, in functions too), on the tests that judge it, and on the pinned compilers. No package
is needed to work that out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGETS = HERE / "budgets.json"
_BENCHMARKS = ROOT / "benchmarks"  # the model whose decoding step is compiled
_PACKAGES = ("spqr_jax", "pallas_kernels", "cpu_kernels", "aot", "support")
_EVERYTHING = ROOT / "spqr_jax" / "__init__.py"  # re-exports; what is compiled imports from where things are
_JUDGES = {
    "kernels": (
        *("test_budgets.py", "test_numerics.py", "compile.py", "cases.py"),
        *("test_attention.py", "compile_attention.py"),
    ),
    "step": ("test_generate_step.py", "generate_step.py"),
}


def _module_files(name: str) -> list[Path]:
    """The files that importing a module of this repository runs, packages' own first."""
    parts, found = name.split("."), []
    for base in (ROOT, ROOT / "tests", HERE, _BENCHMARKS):
        for count in range(1, len(parts) + 1):
            path = base.joinpath(*parts[:count])
            found += [p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()]
    return [path for path in found if path != _EVERYTHING]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    local = {path.stem for folder in (HERE, _BENCHMARKS) for path in folder.glob("*.py")}
    return {name for name in names if name.split(".")[0] in _PACKAGES or name in local}


def sources(judges: tuple[str, ...]) -> list[Path]:
    """All files that these and what they import are made of, sorted."""
    seen: set[Path] = set()
    waiting = [HERE / name for name in judges]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += [file for name in _imports(path) for file in _module_files(name)]
    return sorted(seen)


def digests() -> dict[str, str]:
    """Of the kernels, and of a whole decoding step."""
    found = {}
    for name, judges in _JUDGES.items():
        digest = hashlib.sha256((HERE / "requirements.txt").read_bytes())
        for path in sources(judges):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
        found[name] = digest.hexdigest()[:16]
    return found


def changed() -> list[str]:
    """Which of the digests are not those that were proven."""
    proven = json.loads(BUDGETS.read_text())["proven"]
    return [name for name, digest in digests().items() if proven.get(name) != digest]


def main() -> None:
    """Tells, or with --write notes."""
    if "--write" in sys.argv:
        content = json.loads(BUDGETS.read_text())
        BUDGETS.write_text(json.dumps({**content, "proven": digests()}, indent=1) + "\n")
    elif names := changed():
        sys.exit(f"not proven for these sources: {', '.join(names)}")


if __name__ == "__main__":
    main()
