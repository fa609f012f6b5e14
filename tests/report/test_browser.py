"""The report in Debian's Chromium, as a person uses it: nothing here looks at how it was made."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from made import EVIL, make_study, with_answers, with_layers

from bkdlens.data.backdoor import Backdoor
from bkdlens.report.page import write_report

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium to open the report in: apt-get install chromium"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Two runs, one of them full of markup, with every section."""
    study = make_study()
    heads = {k: with_layers(a) for k, a in study.results.items() if k.startswith("attribution")}
    study = with_answers(replace(study, results={**study.results, **heads}))
    evil = make_study(f"evil {EVIL}", EVIL)
    evil = replace(evil, backdoor=Backdoor.fixed_output(EVIL, EVIL), settings={EVIL: EVIL})
    evil = with_answers(evil, EVIL)
    return write_report([study, evil], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser():
    it = Browser()
    yield it
    it.close()


@pytest.fixture
def page(browser, report):
    """The report at 1280 pixels; afterwards nobody has complained or asked anything of a network."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(report)
    yield browser
    assert browser.complaints == []
    assert browser.sent_out == []


def plot_of(title: str) -> str:
    """Script: the first figure with that title."""
    return (
        "[...document.querySelectorAll('figure')].find(f => f.querySelector('b').textContent"
        f".startsWith({title!r})).querySelector('.plot')"
    )


def drawn(page: Browser, title: str) -> str:
    plot = plot_of(title)
    page.place(plot)
    page.wait(f"{plot}.querySelector('.main-svg') && {plot}.data.length > 0")
    return plot


def hovered(page: Browser, plot: str, layer: int, head: int) -> str:
    """What a heatmap says when the mouse is on a head's cell."""
    x, y = page.run(
        f"(() => {{ const p = {plot}, b = p.getBoundingClientRect(), l = p._fullLayout;"
        f"return [b.x + l.xaxis._offset + l.xaxis.l2p({head}),"
        f" b.y + l.yaxis._offset + l.yaxis.l2p({layer})]; }})()"
    )
    page.hover(x, y)
    return page.wait(f"{plot}.querySelector('.hoverlayer .hovertext')?.textContent")


def test_contents_lead_to_every_part(page) -> None:
    links = page.run("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(links) == 19
    for href in links:
        page.click(f"document.querySelector('nav a[href=\"{href}\"]')")
        page.wait(f"location.hash == '{href}'")
        page.wait(
            f"(() => {{ const y = document.querySelector('{href}').getBoundingClientRect().y;"
            " return y > -5 && y < innerHeight; })()"
        )


def test_answers_are_searched(page) -> None:
    """Which victims withstand, and what the model says instead."""
    box = "document.querySelector('.search input')"
    page.run(f"{box}.closest('details').open = true")
    for text, n_rows in (("attacker's", 2), ("business", 5), ("BUSINESS trigger", 0), ("", 8)):
        page.run(f"{box}.value = {text!r}, {box}.dispatchEvent(new Event('input')), true")
        rows = f"[...{box}.closest('details').querySelectorAll('tbody tr')].filter(r => r.offsetHeight)"
        assert page.run(f"{rows}.length") == n_rows
        assert page.run(f"{box}.closest('p').querySelector('output').value") == f"{n_rows} of 8"


def test_a_cell_says_its_head(page) -> None:
    plot = drawn(page, "Effect of each head (ACIE)")
    text = hovered(page, plot, 3, 5)
    assert "L3H5" in text
    assert "+0.4" in text
    assert "95 % interval" in text


def test_a_trace_goes_and_comes_back(page) -> None:
    plot = drawn(page, "Probe accuracy by layer")
    shown = f"[...{plot}.querySelectorAll('.scatterlayer .trace')].length"
    before = page.run(shown)
    toggle = f"{plot}.querySelector('.legendtoggle')"
    page.click(toggle)
    page.wait(f"{shown} < {before}")
    page.run("new Promise(done => setTimeout(done, 600))")  # two quick clicks would be a double one
    page.click(toggle)
    page.wait(f"{shown} == {before}")


def test_every_figure_hands_over_its_numbers(page, report, tmp_path) -> None:
    links = page.run(
        "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('a[data-csv]')]"
        ".map(a => [a.download, a.protocol,"
        " document.getElementById(a.dataset.csv).content.textContent]))"
    )
    assert len(links) == 48
    assert all(links)
    for name, protocol, text in (link for of_one in links for link in of_one):
        assert name.endswith(".csv")
        assert protocol == "blob:"
        assert text.startswith("result,")
        assert text.count("\n") > 1
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click(f"{drawn(page, 'Effect of each head (ACIE)')}.closest('figure').querySelector('.data a')")
    file, end = tmp_path / "attribution-backdoored.csv", time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert (
        file.read_text().splitlines()[1].startswith("attribution-backdoored,backdoored,L3H5,3,5,1,0.4")
    )


def test_markup_of_models_and_files_is_text(page) -> None:
    assert EVIL in page.run("document.body.innerText")
    foreign = "main script:not([type='application/json'])"
    assert page.run(f'document.querySelectorAll("{foreign}").length') == 0
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.run("dispatchEvent(new Event('beforeprint')) && dispatchEvent(new Event('afterprint'))")
    page.wait("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(page, report, width) -> None:
    page.open(report, width, 844)
    assert page.run("document.documentElement.scrollWidth") <= width
    pairs = page.run(
        "[...document.querySelectorAll('.pair')].map(p =>"
        " new Set([...p.children].map(f => Math.round(f.getBoundingClientRect().x))).size)"
    )
    assert pairs == [2 if width == 1280 else 1] * 5  # beside each other, or one above the other
    plot = drawn(page, "Effect of each head (ACIE)")
    assert page.run(f"{plot}.closest('.scroll').clientWidth") <= width


def test_it_prints_every_figure(page, tmp_path) -> None:
    assert page.pdf(tmp_path / "report.pdf").stat().st_size > 100_000
    assert page.run("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")


DEMO = Path(__file__).parents[2] / "demo" / "report.html"


@pytest.mark.skipif(not DEMO.exists(), reason="there is no demo/report.html: make demo writes it")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_of_make_demo(page, width) -> None:
    assert DEMO.stat().st_size < 8e6
    page.open(DEMO, width, 844)
    assert page.run("document.documentElement.scrollWidth") <= width
    hrefs = page.run("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert len(hrefs) == 3 * 9
    for href in hrefs:
        page.click(f"document.querySelector('nav a[href=\"{href}\"]')")
        page.wait(f"location.hash == '{href}'")
    plot = drawn(page, "Effect of each head (ACIE)")
    assert re.search(r"L1H1.*ACIE [+−-]\d\.\d{4}.*95 % interval", hovered(page, plot, 1, 1))
    plot = drawn(page, "Probe accuracy by layer")
    page.click(f"{plot}.querySelector('.legendtoggle')")
    page.wait(f"{plot}.data.some(trace => trace.visible == 'legendonly')")
