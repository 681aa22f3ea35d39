"""The page, in a real browser; and the commands that measure, analyze and report."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
from support.command import QUICK, spqr
from support.model_files import write_model_and_ids

from spqr_jax import DataError, ModelError
from spqr_jax.report import read_run, render_page

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plots`)")


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model, two quantized ones, what was measured of them, and an analysis of the first."""
    folder = write_model_and_ids(tmp_path_factory.mktemp("report"), tiny_model)
    text = ("--data", "ids.npy", "--seqlen", 64, "--windows", 5)
    commands = [
        ("quantize", "model", "--out", "three", "--bits", 3, "--calib", "ids.npy", *QUICK),
        ("quantize", "model", "--out", "four<b>", "--method", "rtn", "--bits", 4),
        ("compare", "model", "three", *text, "--json", "three.json"),
        ("perplexity", "four<b>", "--against", "model", *text, "--json", "four.json"),
        ("analyze", "three", "--calib", "ids.npy", *QUICK, "--out", "analysis", "--results", "three.json"),
        (
            "report",
            "analysis",
            "three",
            "four<b>",
            "--results",
            "three.json",
            "--results",
            "four.json",
            "--out",
            "all.html",
        ),
    ]
    for command in commands:
        result = spqr(*command, cwd=folder)
        assert result.returncode == 0, (command, result.stderr)
        (folder / f"{command[0]}-{command[1].strip('<b>')}.txt").write_text(result.stdout)
    return folder


def test_compare_and_perplexity_say_the_same(folder):
    compared, short = (json.loads((folder / name).read_text()) for name in ("three.json", "four.json"))
    assert compared["perplexity"] == pytest.approx(compared["dense_perplexity"] * compared["perplexity_ratio"])
    assert (compared["model"], compared["against"], short["against"]) == ("three", "model", "model")
    assert 0 < short["kl_mean"] < compared["kl_mean"]  # 4 bits are nearer than 3
    text = (folder / "compare-model.txt").read_text()
    for shown in (f"{compared['kl_mean']:.5f}", f"{100 * compared['same_top']:.2f}%", f"{compared['perplexity']:.4f}"):
        assert shown in text
    assert f"KL {short['kl_mean']:.4f} nats" in (folder / "perplexity-four.txt").read_text()


def test_analyze_writes_what_it_says(folder):
    names = {path.name for path in (folder / "analysis").iterdir()}
    assert names == {"report.html", "analysis.json", "maps.npz", "figures"}
    values = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert values["setting"]["dense"] == "model"  # found by what the model says it was made from
    assert len(values["analysis"]["weights"]) == 14
    table = (folder / "analyze-three.txt").read_text()
    assert all(kind in table for kind in ("q_proj", "o_proj", "down_proj"))
    for path in (folder / "analysis" / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_is_analyzed_too(folder):
    result = spqr("analyze", "model", "--calib", "ids.npy", *QUICK, "--maps", "q_proj", "--out", "dense", cwd=folder)
    assert result.returncode == 0, result.stderr
    run = read_run(folder / "dense", [])
    assert run.summary is None
    assert set(run.analysis.maps()) == {"layers.0.q_proj", "layers.1.q_proj"}


def test_the_page_holds_everything_itself(folder):
    page = (folder / "all.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#|https://arxiv\.org/abs/2306\.03078\")", page)
    assert "default-src 'none'" in page
    assert "four&lt;b&gt;" in page
    assert "<b>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)):
        assert used in set(ids)
    assert "spqr report analysis three" in page
    compared = json.loads((folder / "three.json").read_text())
    assert page.count(f">{compared['perplexity']:.3f}<") == 2  # of the model and of its analysis
    assert page.count("<svg ") > 10


def test_results_of_other_models_are_named(folder):
    result = spqr("report", "three", "--results", "four.json", "--out", "one.html", cwd=folder)
    assert result.returncode == 0
    assert "none of the models given" in " ".join(result.stderr.split())


def test_what_cannot_be_reported_says_why(folder, tmp_path):
    with pytest.raises(ModelError, match="neither a quantized model written by spqr nor"):
        read_run(folder / "model", [])
    shutil.copytree(folder / "analysis", tmp_path / "broken")
    (tmp_path / "broken" / "analysis.json").write_text("{}")
    with pytest.raises(DataError, match="lacks version"):
        read_run(tmp_path / "broken", [])
    for arguments, says in [
        (("report", "three", "--out", "all.html"), "exists already"),
        (("report", "three", "--out", "x.html", "--results", "ids.npy"), "ids.npy is not valid JSON"),
        (
            ("analyze", "three", "--dense", "nowhere", "--calib", "ids.npy", "--out", "y"),
            "no model found for 'nowhere'",
        ),
    ]:
        result = spqr(*arguments, cwd=folder)
        assert result.returncode == 2
        assert says in " ".join(result.stderr.split())
        assert not (folder / "y").exists()


# ---- in a browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    required = os.environ.get("BROWSER_REQUIRED")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not required:
        pytest.importorskip("selenium", reason="selenium is not installed (extra `browser`)")
        if chromium is None or driver is None:
            pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    for argument in (*quiet.split(), "--disable-component-update", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, folder):
    browser.get((folder / "all.html").as_uri())
    return browser


def column(page, table, index):
    return page.execute_script(
        "return [...document.querySelectorAll('table')[arguments[0]].tBodies[0].rows]"
        ".map(row => row.cells[arguments[1]].textContent)", table, index,
    )  # fmt: skip


def test_the_console_is_silent_and_nothing_is_fetched(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.title == "Quantized models"


def test_figures_are_visible(page):
    boxes = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => { const box = svg.getBoundingClientRect();"
        " return [box.width, box.height, svg.querySelectorAll('path, image').length] })"
    )
    assert len(boxes) > 10
    for width, height, marks in boxes:
        assert width > 500
        assert height > 60
        assert marks > 3
    loaded = page.execute_script(
        "return [...document.querySelectorAll('svg image')].map(i => i.getAttribute('xlink:href').slice(0, 15))"
    )
    assert loaded
    assert set(loaded) == {"data:image/png;"}


def test_tables_sort_both_ways_by_number_and_by_name(page):
    heads = [head.text for head in page.find_elements("css selector", "table:first-of-type thead button")][:3]
    assert heads == ["model", "method", "stored bits"]
    before = column(page, 0, 2)
    button = page.find_elements("css selector", "table thead button")[2]
    button.click()
    rising = [float(text) for text in column(page, 0, 2)]
    assert rising == sorted(rising)
    assert sorted(before) == sorted(column(page, 0, 2))
    button.click()
    assert [float(text) for text in column(page, 0, 2)] == rising[::-1]
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    page.find_elements("css selector", "table thead button")[0].click()
    names = column(page, 0, 0)
    assert names == sorted(names)
    page.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    second = page.find_elements("css selector", "table")[1]
    named = {button.text: button for button in second.find_elements("css selector", "thead button")}
    named["output error"].click()
    index = list(named).index("output error")
    errors = [float(text) for text in column(page, 1, index)]
    assert errors == sorted(errors)


def test_it_fits_a_phone(page):
    page.set_window_size(500, 900)  # the narrowest that headless Chromium makes a window
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        width = "return document.querySelector(arguments[0]).getBoundingClientRect().width"
        assert page.execute_script(width, "figure") <= 390
        assert page.execute_script(width, "figure svg") > 500  # legible: it scrolls by itself
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.set_window_size(1000, 900)


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")])
def test_light_and_dark(page, scheme, ground):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colour = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert page.execute_script(colour, "body", "backgroundColor") == ground
    # Figures write in the page's own colour.
    text = page.execute_script(colour, "figure svg text", "fill")
    assert text == page.execute_script(colour, "body", "color")


def test_in_print_everything_is_open(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        page.execute_script("dispatchEvent(new Event('beforeprint'))")
        closed = page.execute_script("return document.querySelectorAll('details:not([open])').length")
        assert closed == 0
        assert page.execute_script("return getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen"})


def test_a_page_of_one_run_renders_without_results(folder):
    page = render_page([read_run(folder / "three", [])], "One")
    assert "<title>One</title>" in page
