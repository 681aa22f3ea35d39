"""Configuration of the documentation site; `scripts/docs` builds it."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]  # the package of this tree, and our own directive

import spqr_jax  # noqa: E402

project = "spqr-jax"
author = "the spqr-jax contributors"
copyright = "the spqr-jax contributors, Apache-2.0"
version = release = spqr_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "commands"]
exclude_patterns = ["_build", "extensions"]
nitpicky = True  # a reference to nothing is a warning, and scripts/docs makes warnings errors
nitpick_ignore_regex = [
    # Types of other libraries. Links to their documentation would need a network during the build.
    (r"py:.*", r"(jax|jaxlib|numpy|np|flax|collections|pathlib|typing)\..*"),
]

nitpick_ignore = [
    ("py:class", "pallas_kernels.spqr_matmul.pieces.Piece"),  # inside of a prepared matrix
    ("py:class", "spqr_jax.stream.blocks.BlockSource"),  # what `spqr_jax.resolve.open_model` gives
    ("py:class", "spqr_jax.planning.curves.Measured"),  # of a measuring pass that was stopped
    ("py:class", "spqr_jax.stream.spill.Spill"),  # what `--max-memory` keeps activations in
]

myst_heading_anchors = 3  # the anchors that GitHub gives to headings
smartquotes = False  # --option stays two hyphens
highlight_language = "text"  # a code block without a language: commands and their output

default_role = "py:obj"  # `name` in a docstring: a link if the name is documented, else code (see _resolve)
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"  # types stand beside the arguments, which keeps signatures short
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "spqr-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False  # some sites make theirs by JavaScript

_PUBLIC_MODULES = (
    "spqr_jax",
    "spqr_jax.integrations.nnx",
    "spqr_jax.integrations.linen",
    "cpu_kernels",
    "pallas_kernels.spqr_matmul",
)


def _public_names() -> dict[str, str]:
    """Where a public object is defined -> the name by which it is documented."""
    names = {}
    for module in map(importlib.import_module, _PUBLIC_MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if hasattr(value, "__qualname__"):
                names[f"{value.__module__}.{value.__qualname__}"] = f"{module.__name__}.{name}"
    return names


def _resolve(app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Resolves what Sphinx could not: names by the module that defines them; else `name` stays code."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if node["reftype"] == "obj" and f"spqr_jax.{target}" in _PUBLIC.values():  # seen from a module below
        target = f"spqr_jax.{target}"
    defined_in = next((name for name in _PUBLIC if target == name or target.startswith(name + ".")), None)
    public = target if defined_in is None else _PUBLIC[defined_in] + target.removeprefix(defined_in)
    if public != node["reftarget"]:
        domain = env.get_domain("py")
        link = domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], public, node, content)
        if link is not None:
            return link
    return content if node["reftype"] == "obj" else None


_PUBLIC = _public_names()

_ATTRIBUTE = re.compile(r"^( *)(\.\. attribute:: \w+)\n((?:\n|\1 .*\n)*?)\1   :type: (.*)\n", re.MULTILINE)


def _types_beside_names(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Shows ``bits: int = 3`` where napoleon would give the type a paragraph of its own; no type says more than Any."""
    defaults = {field.name: field.default for field in dataclasses.fields(value)} if _is_dataclass(value) else {}

    def beside(match: re.Match[str]) -> str:
        indent, directive, text, type_ = match.groups()
        head = f"{indent}{directive}\n"
        if type_ not in ("Any", "Any | None"):
            head += f"{indent}   :type: {type_}\n"
        default = defaults.get(directive.split()[-1], dataclasses.MISSING)
        if default is not dataclasses.MISSING:
            head += f"{indent}   :value: {default!r}\n"
        return head + text

    text = _ATTRIBUTE.sub(beside, "\n".join(lines) + "\n")
    # The contents of a page name functions, classes and methods; with attributes they would be too long.
    text = re.sub(r"^( *)\.\. attribute:: .*$", r"\g<0>\n\1   :no-contents-entry:", text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def _is_dataclass(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value)


def _order_fields(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Puts the type of a result beside its description; leaves out types that say nothing."""
    for fields in content.findall(nodes.field_list):
        by_name = {field[0].astext(): field for field in fields}
        result_type = by_name.get("rtype")
        if result_type is None:
            continue
        fields.remove(result_type)
        if result_type[1].astext() not in ("~typing.Any", "Any", "None"):
            after = by_name.get("returns")
            fields.insert(fields.index(after) + 1 if after is not None else len(fields), result_type)


_LEAVES_DOCS = re.compile(r"(?<!!)\[([^\[\]]+)\]\(((?:\.\./)+[^)\s#]+)(?:#[^)\s]*)?\)")


def _offer_files(app: Sphinx, name: str, content: list[str]) -> None:
    """Makes links to files outside of docs/, which GitHub shows, downloads on the site; of those to folders, text."""
    here = (ROOT / "docs" / name).parent

    def offered(link: re.Match[str]) -> str:
        text, path = link.groups()
        target = (here / path).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return link.group()  # one page of the site, or a mistake: MyST says so
        return f"[{text}](<path:{path}>)" if target.is_file() else text

    content[0] = _LEAVES_DOCS.sub(offered, content[0])


def _dashes(app: Sphinx, doctree: nodes.document) -> None:
    """The dash between a parameter and its description, which smartquotes would make."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> None:
    app.connect("source-read", _offer_files)
    app.connect("autodoc-process-docstring", _types_beside_names, priority=900)  # after napoleon
    app.connect("doctree-read", _dashes)
    app.connect("object-description-transform", _order_fields, priority=900)  # after autodoc has added types
    app.connect("missing-reference", _resolve)
