"""Arrows between modules run one way, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spqr_jax"

# From the bottom up: a module may import from its own layer's earlier entries and
# from the layers before it. Modules of one entry may import each other.
LAYERS = [
    ["errors", "events", "_compat", "compile_cache", "product_jit"],
    ["devices"],
    ["files"],
    ["output"],
    ["atomic"],
    ["journal"],
    ["packing"],
    ["layout", "quantized"],
    ["invariants"],
    ["rules"],
    ["config", "sampling", "data"],
    ["array"],
    ["products"],
    ["solver"],
    ["models"],
    ["stream"],
    ["parallel"],
    ["methods", "evaluate"],
    ["planning", "tune", "analysis"],
    ["checkpoint"],
    ["job", "generate"],
    ["speed", "integrations", "estimate", "forecast"],
    ["formats"],
    ["resolve", "inspection"],
    ["report", "terminal"],
    ["texts"],
    ["cli"],
    ["__main__", "__init__"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spqr_jax":
            names = [alias.name for alias in node.names if alias.name != "__version__"]  # any layer may show it
            if node.module == "spqr_jax":  # modules by their names, or public names
                yield from (name if name in LEVEL else "__init__" for name in names)
            elif names:
                yield top(node.module)
        if isinstance(node, ast.Import):
            yield from (top(alias.name) for alias in node.names if alias.name.split(".")[0] == "spqr_jax")


def test_imports_run_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for imported in imports_of(path):
            if imported != module and LEVEL[imported] >= LEVEL[module]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_place():
    modules = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert modules == set(LEVEL)


def test_the_solver_knows_no_model():
    known = {"array", "config", "devices", "errors", "layout", "packing", "product_jit", "quantized", "solver"}
    for path in (PACKAGE / "solver").rglob("*.py"):
        assert set(imports_of(path)) <= known, path


def test_kernels_know_arrays_only():
    """They import jax and numpy, and nothing of spqr_jax."""
    allowed = set(sys.stdlib_module_names) | {"jax", "numpy"}
    paths = [path for package in ("cpu_kernels", "pallas_kernels") for path in (PACKAGE.parent / package).rglob("*.py")]
    assert len(paths) > 20
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            own = path.relative_to(PACKAGE.parent).parts[0]
            assert {(name or "").split(".")[0] for name in names} <= allowed | {own}, (path.name, names)


def test_importing_needs_jax_and_numpy_only():
    heavy = ["transformers", "tokenizers", "orbax", "flax", "optax", "datasets", "safetensors", "gguf", "typer", "rich"]
    heavy.append("jax.experimental.pallas")  # only what multiplies on an accelerator needs it
    code = f"import sys, spqr_jax; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["scripts", "benchmarks"])
def test_programs_beside_the_package_import_no_command(folder):
    """What they share with commands is in `spqr_jax.terminal` and `spqr_jax.texts`."""
    paths = list((PACKAGE.parent / folder).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("spqr_jax.cli")], path


def test_no_test_file_imports_another():
    """What tests share is in tests/support."""
    for path in (PACKAGE.parent / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.rpartition(".")[2].startswith(("test_", "conftest"))], path
