"""The wheel, installed somewhere else, works without the repository."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from spqr_jax import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="the package `build` is not installed (test extra)")
    out = tmp_path_factory.mktemp("wheel")
    # from a copy: building leaves files beside the sources, and another run of the tests may do the same
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo-output")
    tree = shutil.copytree(ROOT, out / "tree", ignore=unwanted)
    result = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", out, tree], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "spqr_jax").rglob("*.py")}
    assert modules <= set(names)
    assert "spqr_jax/py.typed" in names
    assert "spqr_jax/report/page.html.j2" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "cpu_kernels").rglob("*.[ch]*")}
    assert sources
    assert {name for name in sources if name.endswith((".cc", ".h"))} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


def test_the_version_has_one_source(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "spqr_jax.__version__"}
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert email.message_from_bytes(archive.read(name))["Version"] == __version__
    command = [sys.executable, "-m", "spqr_jax", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"spqr-jax {__version__} (")


def test_the_installed_wheel_runs(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import spqr_jax; print(spqr_jax.__file__)\n"
        "import jax.numpy as jnp\n"
        "a = spqr_jax.quantize_weight(jnp.eye(32), None, spqr_jax.SpQRConfig.rtn(4, 16))\n"
        "print(float(abs(a.to_dense() - jnp.eye(32)).max()))\n"
        "import cpu_kernels; print(cpu_kernels.__file__, ','.join(cpu_kernels.kernel_names()) or 'none')"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, error, kernels_where, kernels = result.stdout.split()
    assert Path(where).is_relative_to(target)
    assert float(error) < 1e-3
    assert Path(kernels_where).is_relative_to(target)
    if shutil.which("g++") or shutil.which("clang++"):  # then installing has compiled them
        assert "portable" in kernels or "neon" in kernels
    assert (target / "bin" / "spqr").is_file()
