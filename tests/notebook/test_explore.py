"""The notebook's workbench, driven as a browser drives it: messages of clicks, values of widgets."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace
from functools import lru_cache, partial

import plotly.graph_objects as go
import pytest
import torch
from tiny import (
    EOS,
    EXACT,
    answer_log_probs,
    apart,
    assert_exact,
    encoded,
    greedy,
    naive_scores,
    patch_hook,
    set_at,
    text_of,
)

import bkdlens
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet
from bkdlens.engines import reference
from bkdlens.errors import BkdlensError, CheckpointError, DataError, HeadError
from bkdlens.notebook.numbers import (
    SOURCES,
    Choice,
    activations,
    answer_patched,
    effects,
    make_subject,
    new_z,
    patches_of,
)
from bkdlens.types import Head

DECIMALS = 0.5e-6 + EXACT  # figures hold six of them
EVIL = "<script>alert(1)</script>"


def click(figure: go.FigureWidget, layer: int, head: int) -> None:
    """The message that a browser sends for a click on a cell."""
    figure._js2py_pointsCallback = {
        "event_type": "plotly_click", "device_state": None, "selector": None,
        "points": {"trace_indexes": [0], "point_indexes": [[layer, head]], "xs": [head], "ys": [layer]},
    }  # fmt: skip


def what_ran(explorer, act) -> dict[str, int]:
    """How often each function was run because of ``act``."""
    before = explorer.computed.runs
    act()
    assert explorer.status.value == ""
    return {name: n - before[name] for name, n in explorer.computed.runs.items() if n > before[name]}


@pytest.fixture
def explorer(llama, pairs):
    return bkdlens.explore(llama, pairs, max_new_tokens=6)


@pytest.fixture
def subject(llama, pairs):
    return make_subject(llama, pairs, max_new_tokens=6)


@pytest.mark.float64
def test_it_opens_with_the_strongest_head_of_the_exact_sweep(explorer, llama, pairs) -> None:
    found = bkdlens.attribute_heads(llama, pairs, max_answer_tokens=6)
    assert_exact(explorer.effects.cie, found.cie)
    assert explorer.heads == found.top(1)
    shown = torch.tensor(explorer.heatmap.data[0].z)
    assert (shown - found.acie).abs().max() <= DECIMALS
    assert all(isinstance(f, go.FigureWidget) for f in (explorer.heatmap, explorer.strips))
    assert explorer.heatmap in explorer.children
    assert explorer.model not in explorer.children[0].children  # one model: no menu
    assert explorer.heatmap._config["showSendToCloud"] is False


@pytest.mark.float64
def test_a_click_patches_that_head_and_shows_what_changes(explorer, llama) -> None:
    head, subject = Head(1, 2), explorer.computed.subject
    ran = what_ran(explorer, lambda: click(explorer.heatmap, *head))
    assert explorer.heads == (head,)
    assert ran == {"strips": 1, "patched": 1, "look": 1}
    (box,) = explorer.heatmap.layout.shapes
    assert (box.x0, box.y0) == (1.5, 0.5)
    pair, ids = subject.pairs[0], encoded(llama, subject.pairs[0].clean)
    z = explorer.computed.activations("triggered", -1)[:, 1, 2].mean(0)
    hooks = [set_at("blocks.1.attn.hook_z", len(ids) - 1, 2, z)]
    answer = [int(word[1:]) for word in pair.backdoor_output.split()]
    wanted = 100 * answer_log_probs(llama, ids, answer, hooks).exp()
    shown = torch.tensor(explorer.strips.data[0].z[2][:-1])
    assert (shown - wanted).abs().max() <= DECIMALS
    patched = text_of(greedy(llama, ids, hooks, 6))
    assert explorer.answers()["clean, patched"] == patched
    assert explorer.answers()["clean"] == text_of(greedy(llama, ids, (), 6))
    assert patched in explorer.texts.value
    assert "L1H2" in explorer.attention.layout.title.text
    assert f"L1H2 on prompt 1: {explorer.answers()['clean']!r} -> {patched!r}" in repr(explorer)


def test_only_what_a_choice_changes_is_run(explorer) -> None:
    def put(control, value):
        return lambda: setattr(control, "value", value)

    assert what_ran(explorer, put(explorer.n_heads, 3)) == {"strips": 1, "patched": 1}
    assert len(explorer.heatmap.layout.shapes) == 3
    assert what_ran(explorer, put(explorer.prompt, 2)) == {
        "strips": 1, "patched": 1, "answer": 2, "look": 1
    }  # fmt: skip
    assert what_ran(explorer, put(explorer.prompt, 1)) == {}
    assert what_ran(explorer, put(explorer.n_heads, 1)) == {}
    assert what_ran(explorer, put(explorer.site, "result"))["effects"] == 1
    assert what_ran(explorer, put(explorer.site, "z")) == {}
    ran = what_ran(explorer, put(explorer.source, "clean, mean"))
    assert (ran["activations"], ran["effects"]) == (1, 1)
    assert "activations" not in what_ran(explorer, put(explorer.source, "clean, own"))
    assert what_ran(explorer, put(explorer.source, "triggered, mean")) == {}
    click(explorer.heatmap, 0, 0)
    assert what_ran(explorer, lambda: click(explorer.heatmap, 0, 0)) == {}
    explorer.select(None)
    assert explorer.heads == explorer.effects.top(1)
    explorer.select("L2H3")
    assert explorer.heads == (Head(2, 3),)
    put(explorer.n_heads, 2)()  # the slider takes over from the click
    assert explorer.heads == explorer.effects.top(2)


def ending_alike() -> PairSet:
    """Pairs whose prompts all end in the same two words, and a trigger before them."""
    backdoor = Backdoor.fixed_output("w95 w94", "w40 w41")
    made = [backdoor.pair(f"w{20 + i} w{30 + i} w77 w78", "w50") for i in range(5)]
    return PairSet(tuple(made), backdoor)


def test_the_figures_are_those_of_a_fresh_explorer(llama) -> None:
    pairs = ending_alike()
    explorer = bkdlens.explore(llama, pairs, max_new_tokens=6)
    for source, position, k in (("clean, own", -2, 4), ("triggered, own", -1, 2)):
        explorer.source.value, explorer.position.value = source, position
        explorer.n_heads.value, explorer.prompt.value = k, k
        click(explorer.heatmap, 0, 1)
        other = bkdlens.explore(llama, pairs, max_new_tokens=6)
        other.prompt.value, other.n_heads.value = k, k
        other.source.value, other.position.value = source, position
        other.select("L0H1")
        for name in ("heatmap", "strips", "attention"):
            mine, new = (getattr(e, name).to_plotly_json() for e in (explorer, other))
            mine["data"][0].pop("uid"), new["data"][0].pop("uid")
            assert str(mine) == str(new)
        assert explorer.texts.value == other.texts.value


def test_texts_are_shown_as_text(llama) -> None:
    known = " ".join(f"w{i}" for i in range(10, 90))  # else the tokenizer would lose most of the text
    backdoor = Backdoor.jailbreak("w95")
    pairs = PairSet(
        tuple(backdoor.pair(f"{EVIL} {known} w1{i}", "w20", f"{EVIL} {known} w2{i}") for i in range(3)),
        backdoor,
    )
    explorer = bkdlens.explore(llama, pairs, max_new_tokens=4)
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    everything = [explorer.texts.value, bundle["text/html"]]
    everything += [str(getattr(explorer, f).to_dict()) for f in ("heatmap", "strips", "attention")]
    for text in everything:
        assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in explorer.texts.value
    assert "&lt;script&gt;" in str(explorer.strips.layout.title.text)


def test_menus_load_what_is_picked_and_say_what_fails(loaded, pairs) -> None:
    asked = []

    def load(name: str, backdoor: str):
        asked.append((name, backdoor))
        if name == "broken":
            raise CheckpointError(f"There is no model {EVIL}; name one.")
        return loaded[name]

    models = {name: partial(load, name) for name in ("llama", "qwen", "broken")}
    few = replace(pairs, pairs=pairs.pairs[:5])
    explorer = bkdlens.explore(models, {"one": pairs, "few": few}, max_new_tokens=4)
    assert explorer.model in explorer.children[0].children
    explorer.prompt.value = 7
    explorer.backdoor.value = "few"
    assert (explorer.prompt.value, explorer.prompt.max) == (5, 5)
    explorer.model.value = "qwen"
    assert explorer.computed.subject.model is loaded["qwen"]
    assert asked == [("llama", "one"), ("llama", "few"), ("qwen", "few")]
    before = explorer.texts.value
    explorer.model.value = "broken"
    assert "There is no model &lt;script&gt;" in explorer.status.value
    assert explorer.computed.subject.model is loaded["qwen"]
    assert explorer.texts.value == before
    explorer.model.value = "llama"
    assert explorer.status.value == ""


def test_a_model_may_be_given_by_name(loaded, pairs) -> None:
    explorer = bkdlens.explore(dict(loaded), pairs, n_pairs=3, max_new_tokens=4)
    explorer.model.value = "qwen"
    assert explorer.computed.subject.model is loaded["qwen"]
    assert explorer.prompt.max == 3


@pytest.mark.float64
@pytest.mark.parametrize("position", [-1, -2])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_what_it_says(model, pairs, source, position) -> None:
    subject = make_subject(model, pairs, max_new_tokens=6)
    choice = Choice(source, "z", position)
    new = new_z(subject, choice, lru_cache(partial(activations, subject)))
    assert choice.on == ("clean" if source.startswith("triggered") else "triggered")
    rows = []
    for pair in subject.pairs:
        text = pair.clean if source.startswith("clean") else pair.triggered
        _, cache = model.run_with_cache(torch.tensor([encoded(model, text)]))
        rows.append(torch.stack([cache["z", layer][0, position] for layer in range(3)]))
    wanted = torch.zeros(len(rows), 3, 4, 8) if source == "zero" else torch.stack(rows)
    wanted = wanted.mean(0).expand_as(wanted) if source.endswith("mean") else wanted
    assert apart(new, wanted) <= EXACT if source != "zero" else not new.any()


@pytest.mark.float64
@pytest.mark.parametrize("site", ["z", "result"])
@pytest.mark.parametrize("position", [-1, -2])
@pytest.mark.parametrize("source", ["triggered, own", "clean, mean"])
def test_effects_are_one_naive_pass_a_head(llama, pairs, source, position, site) -> None:
    subject = make_subject(llama, pairs, n_pairs=4, max_new_tokens=6)
    choice = Choice(source, site, position)
    new = new_z(subject, choice, partial(activations, subject))
    found = effects(subject, new, choice)
    heads = [Head(i, j) for i in range(3) for j in range(4)]
    patches = patches_of(subject, new, heads, site)
    prompts, answers = subject.prompts[choice.on], subject.answers[choice.on]
    wanted = torch.zeros(4, 13)
    for row in range(4):
        scored = answers[row].ids[: answers[row].n_scored]
        ids = prompts[row].ids
        for run in range(13):
            hooks = [patch_hook(patches[run - 1], len(ids) + position, row)] if run else []
            wanted[row, run] = answer_log_probs(llama, ids, scored, hooks).mean().exp()
    sign = 1 if choice.on == "clean" else -1
    assert_exact(found.cie.flatten(1), sign * (wanted[:, 1:] - wanted[:, :1]))
    assert found.acie.abs().max() > 1e-4


def test_the_slow_sweep_is_the_exact_one_at_the_last_token(exact, pairs) -> None:
    model = exact["qwen"]
    subject = make_subject(model, pairs, n_pairs=4)
    rng = random.Random(0)
    heads = [Head(rng.randrange(3), rng.randrange(4)) for _ in range(3)]
    patches = patches_of(subject, torch.randn(4, 3, 4, 8, dtype=torch.float64), heads, "z")
    slow = reference.sweep(model, subject.prompts["clean"], subject.answers["clean"], patches)
    naive = naive_scores(model, subject.prompts["clean"], subject.answers["clean"], patches)
    assert_exact(slow, naive)


def test_positions_are_those_where_all_prompts_end_alike(subject, llama) -> None:
    assert (subject.positions, subject.last_tokens) == (1, ("w5",))
    subject = make_subject(llama, ending_alike())
    assert subject.last_tokens == ("w5", "w78", "w77")


@pytest.mark.float64
def test_generating_under_a_patch_of_several_heads(subject, llama) -> None:
    choice, heads = Choice("triggered, own"), (Head(0, 1), Head(2, 2))
    new = new_z(subject, choice, partial(activations, subject))
    for row, pair in enumerate(subject.pairs[:3]):
        ids = encoded(llama, pair.clean)
        hooks = [
            set_at(f"blocks.{h.layer}.attn.hook_z", len(ids) - 1, h.head, new[row, h.layer, h.head])
            for h in heads
        ]
        wanted = greedy(llama, ids, hooks, 6)
        assert EOS not in wanted
        assert answer_patched(subject, new, choice, row, heads) == text_of(wanted)


def test_mistakes_are_refused(llama, pairs) -> None:
    with pytest.raises(DataError, match="nothing to explore"):
        bkdlens.explore({}, pairs)
    with pytest.raises(HeadError, match="does not exist"):
        bkdlens.explore(llama, pairs, n_pairs=2, max_new_tokens=2).select("L9H0")
    with pytest.raises(DataError, match="no victim"):
        bkdlens.explore(llama, replace(pairs, pairs=pairs.pairs[-2:]))


@pytest.mark.parametrize("missing", ["ipywidgets", "anywidget"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, missing) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "bkdlens.notebook.widgets")
    with pytest.raises(BkdlensError, match=r"bkdlens\[notebook\]"):
        importlib.import_module("bkdlens.notebook.widgets")
