"""Issue forms, the citation file and the changelog are what GitHub and their readers can use."""

from __future__ import annotations

import re

import pytest
import yaml  # comes with huggingface-hub
from support import ROOT

import spqr_jax

FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FORM_KEYS = {"name", "description", "body", "title", "labels", "assignees", "projects", "type"}
ATTRIBUTES = {
    "markdown": {"value"},
    "input": {"label", "description", "placeholder", "value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
}
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_there_is_a_form_for_bugs_and_one_for_devices():
    assert [path.name for path in FORMS] == ["bug_report.yml", "device_report.yml"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_in_githubs_schema(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form) <= FORM_KEYS
    for element in form["body"]:
        assert set(element) <= {"type", "id", "attributes", "validations"}, element
        assert set(element["attributes"]) <= ATTRIBUTES[element["type"]], element
        assert all(isinstance(value, str) for value in element["attributes"].values()), element
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert all(isinstance(field["validations"]["required"], bool) for field in fields)
    ids, labels = [field["id"] for field in fields], [field["attributes"]["label"] for field in fields]
    assert len(set(ids)) == len(set(labels)) == len(fields) > 0
    assert all(re.fullmatch("[A-Za-z0-9_-]+", name) for name in ids)


@pytest.mark.parametrize(
    ("form", "needed"),
    [
        ("bug_report", {"version", "command", "output", "model", "machine"}),
        ("device_report", {"device", "jax", "driver", "output"}),
    ],
)
def test_forms_ask_for_what_a_fault_is_found_by(form, needed):
    body = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())["body"]
    assert needed <= {element["id"] for element in body if element.get("validations", {}).get("required")}


def test_the_form_chooser_links_to_private_reports():
    chooser = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())
    assert set(chooser) <= {"blank_issues_enabled", "contact_links"}
    for link in chooser["contact_links"]:
        assert set(link) == {"name", "url", "about"}
        assert link["url"].startswith("https://")


def test_the_citation_has_what_its_schema_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert "version" not in citation  # the package's own is the only one
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["url"] == "https://arxiv.org/abs/2306.03078"
    for author in [*citation["authors"], *paper["authors"]]:
        assert set(author) in ({"name"}, {"family-names", "given-names"})


def test_the_changelog_has_the_version_that_is_here():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^\]]+)\](?: - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert len(versions) == text.count("\n## ")
    assert versions[0] == "Unreleased"
    version = spqr_jax.__version__
    assert ("Unreleased" if "dev" in version else version) in versions
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= SECTIONS
