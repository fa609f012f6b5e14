"""The report: whole, offline, escaped, and sentences that follow the numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs
from test_plot import CHOSEN, EVIL, make_ablation, make_steering, make_study

from bkdlens.claims import claims
from bkdlens.data import Backdoor
from bkdlens.report import write_report
from bkdlens.study import Study


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the content of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """Two studies, one whose texts are an attack on the reader."""
    evil = make_study(f"name {EVIL}", EVIL)
    evil = replace(evil, backdoor=Backdoor.fixed_output(EVIL, EVIL), settings={EVIL: EVIL})
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_report([make_study(), evil], path) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report)


def test_every_figure_is_there_with_its_data(page) -> None:
    plots = [attrs["id"] for attrs in page.all("div") if attrs.get("class") == "plot"]
    data = [a["id"] for a in page.all("script") if a.get("type") == "application/json"]
    assert data == [f"{name}-data" for name in plots]
    # behaviour 1; probes 2 kinds, few-shot, separation, 4 rows of matrices; attribution 3; ablation 1;
    # vectors 2; steering 4 (test by layer and at one, two sweeps)
    assert len(plots) == len(set(plots)) == 2 * 19
    for script, attrs in zip(page.scripts, page.all("script"), strict=True):
        if attrs.get("type") == "application/json":
            assert json.loads(script)["data"]


def test_contents_lead_to_every_section(page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for attrs in page.all("a")]
    assert len(links) == 2 * 9
    assert all(link.removeprefix("#") in ids for link in links)


def test_nothing_breaks_out(report, page) -> None:
    assert EVIL not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    kinds = [attrs.get("type") for attrs in page.all("script")]
    assert kinds.count(None) == 2  # plotly and the page's own; all others are data
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_no_request_and_no_foreign_script(page) -> None:
    for _, attrs in page.tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith("#")
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy
    scripts = policy.partition("script-src")[2].partition(";")[0]
    assert scripts.count("'sha256-") == 2
    assert "unsafe" not in scripts
    assert "showSendToCloud: false" in page.scripts[-1]


def test_the_scripts_match_their_digests(page) -> None:
    from bkdlens.report import _digest

    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    runs = [
        s for s, attrs in zip(page.scripts, page.all("script"), strict=True) if not attrs.get("type")
    ]
    assert all(f"'sha256-{_digest(script)}'" in policy for script in runs)


def test_six_studies_stay_under_8_mb(report) -> None:
    library = len(get_plotlyjs().encode())
    two = len(report.encode()) - library
    assert library + 3 * two < 8e6


def test_missing_results_are_named(tmp_path) -> None:
    whole = make_study()
    some = {k: whole.results[k] for k in ("behaviour-backdoored", "probe-base-svm-clean")}
    partial = replace(whole, results=some)
    text = write_report([partial, replace(whole, results={})], tmp_path / "p.html").read_text()
    for name in ("attribution", "ablation", "vector", "steering", "generations"):
        assert text.count(f"{name}: not run") == 2
    assert "behaviour: not run" in text
    assert claims(replace(whole, results={})) == []


KINDS = ("behaviour", "probe", "attribution", "ablation", "vector", "steering", "generations")


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_result_may_be_alone(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bkdlens.report.get_plotlyjs", lambda: "/* plotly */")
    whole = make_study()
    names = [name for name in whole.results if name.startswith(kind)]
    # The main condition alone, and the last control alone.
    studies = [replace(whole, results={n: whole.results[n]}) for n in {names[0], names[-1]}]
    assert write_report(studies, tmp_path / "r.html").exists()


def test_a_control_may_be_missing(tmp_path) -> None:
    whole = make_study()
    kept = {k: v for k, v in whole.results.items() if "base" not in k and k != "steering-test"}
    study = replace(whole, results=kept)
    text = write_report([study], tmp_path / "r.html").read_text()
    assert "steering-test: not run" in text
    assert "base:" not in said(study, "SVM probes")


def test_an_empty_report_is_a_page(tmp_path) -> None:
    assert "0 studies" in write_report([], tmp_path / "r.html").read_text()


def said(study: Study, start: str) -> str:
    return next(c for c in claims(study) if c.startswith(start)).replace("\u00a0", " ")


def test_claims_follow_the_numbers() -> None:
    study = make_study()
    assert "98.3 % (118/120; 95 % interval 94.1–99.5 %)" in said(study, "With the trigger")
    zero = said(study, "Ablation by zero")
    assert "1 head (L3H5) brings the attack from 98.3 % (118/120) to 43.3 % (52/120" in zero
    assert "10 random groups" in zero
    head = next(c for c in claims(study) if c.startswith("The strongest head"))
    assert "L3H5" in head
    assert "clean-adapter" in head
    probes = said(study, "SVM probes tell triggered from clean")
    assert re.search(r"base: \d+\.\d % \(\d+/96\) at layer \d", probes)


def test_claims_admit_failure_damage_and_controls_that_do_as_much() -> None:
    study = make_study()
    good = make_ablation(("zero",))
    stubborn = replace(good, attack=good.attack * 0 + 118)
    broken = replace(good, clean=good.clean // 3 + (good.clean == 228) * 152)
    vain = replace(good, random_attack=good.random_attack // 4)
    none = replace(good, attack=good.attack * 0)
    for ablation, expected in (
        (stubborn, "no number of heads tried, up to 32, halves the attack"),
        (broken, "part of this is damage"),
        (vain, "Random groups do as much"),
        (none, "there was no attack to break"),
    ):
        changed = replace(study, results={**study.results, "ablation": ablation})
        assert expected in said(changed, "Ablation by zero")
    test = make_steering("contrast", (0,), (2.0, -2.0))
    test = replace(test, attack=test.random_vectors.amax(-1))
    changed = replace(study, results={**study.results, "steering-test": test})
    assert "bare embedding" in said(changed, "Added to clean")
    assert "not specific" in said(changed, "Added to clean")


def test_steering_is_told_at_the_layer_chosen_on_validation(tmp_path) -> None:
    study = make_study()
    test = study.results["steering-test"]
    on, off = said(study, "Added to clean"), said(study, "Subtracted from triggered")
    for text, coefficient in ((on, 2.0), (off, -2.0)):
        rate = test.rate("attack", CHOSEN, coefficient)
        assert f"at layer {CHOSEN} (resid_pre, chosen on the validation pairs)" in text
        assert f"({rate.successes}/{rate.n}; 95 % interval" in text
        assert "norm-matched noise" in text
    assert "(114/120) without the vector." in on
    assert "(2/120) without the vector." in off
    text = write_report([study, study], tmp_path / "r.html").read_text()
    assert text.count("chosen on validation") == 2 * 2  # in two panels each
    assert text.count(f"+2, layer {CHOSEN}</small>") == 2  # the overview
    assert (
        f"On the test pairs, layer {CHOSEN} (controls: attack, mean and least–most of 10 and 10" in text
    )
    assert "On the test pairs, all layers" in text
    assert "Sweep of the mean vector on the validation pairs</summary>" in text
    assert "kind: contrast, layer: 2, coefficient: 2.0" in text


def test_without_a_choice_the_best_layer_is_told_and_admitted() -> None:
    study = replace(make_study(), choice={})
    test = study.results["steering-test"]
    assert test.best_layer(2.0) != CHOSEN
    text = said(study, "Added to clean")
    assert f"at layer {test.best_layer(2.0)} (resid_pre, the best layer on these same pairs" in text
    one = replace(study, results={**study.results, "steering-test": make_steering(layers=(3,))})
    assert "at layer 3 (resid_pre) with" in said(one, "Added to clean")


def test_nothing_needs_random_draws(tmp_path) -> None:
    study = make_study()
    bare = {"steering-test": make_steering(n_random=0), "ablation": make_ablation(n_random=0)}
    study = replace(study, results={**study.results, **bare})
    text = write_report([study], tmp_path / "r.html").read_text()
    assert "no random controls" in text
    assert not re.search(r"\bnan\b", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert "controls" not in said(study, "Added to clean")
    assert "random" not in said(study, "Ablation by zero")
