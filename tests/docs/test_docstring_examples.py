"""The examples in public docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spqr_jax

MODULES = ("spqr_jax", "spqr_jax.integrations.nnx", "spqr_jax.integrations.linen")
WITH_EXAMPLE = {
    *("SpQRArray", "SpQRConfig", "SpQRConfig.preset", "quantize", "quantize_weight", "accumulate_hessian", "batched"),
    *("load_model", "load", "save", "forward", "generate", "Generator", "perplexity", "linear", "prepare"),
    *("integrations.nnx.quantize", "integrations.linen.quantize"),
}


def docstrings() -> dict[str, str]:
    """The docstring of each public name and method, by its path in `spqr_jax`."""
    texts = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            path = f"{module_name}.{name}".removeprefix("spqr_jax.")
            value = getattr(module, name)
            texts[path] = inspect.getdoc(value) or ""
            if inspect.isclass(value):
                texts |= {
                    f"{path}.{member}": inspect.getdoc(getattr(value, member)) or ""
                    for member, definition in vars(value).items()
                    if not member.startswith("_")
                    and (inspect.isroutine(definition) or isinstance(definition, property))
                }
    return texts


EXAMPLES = {path: text for path, text in docstrings().items() if ">>>" in text}


def test_every_main_function_has_an_example():
    assert not WITH_EXAMPLE - set(EXAMPLES)


@pytest.fixture(scope="module")
def demo(tiny_model, tmp_path_factory):
    return spqr_jax.save(tmp_path_factory.mktemp("demo") / "demo", tiny_model)


@pytest.mark.parametrize("path", EXAMPLES)
def test_example(path, tiny_model, demo, tmp_path, monkeypatch):
    """In an empty folder, with a tiny model for the demo."""
    monkeypatch.setattr("spqr_jax.resolve.packaged_model", lambda spec, say: demo)
    monkeypatch.chdir(tmp_path)
    names = {"jax": jax, "jnp": jnp, "np": np, "spqr_jax": spqr_jax, "model": tiny_model}
    example = doctest.DocTestParser().get_doctest(EXAMPLES[path], names, path, None, 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE).run(example, out=report.append)
    assert not report, "".join(report)
