"""Ablation, steering and behaviour count what a reader of the answers would count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import judged_pairs

import bkdlens
from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet
from bkdlens.engines.generate import evaluate, generate
from bkdlens.engines.hooks import NOTHING, Intervention, Vector
from bkdlens.errors import ResultError
from bkdlens.metrics import Basr, paired_difference, paired_ratio

CUT = 4
CRITERIA = [
    {},
    {"success": "contains", "good": "similar:0.5", "against": "own"},
    {"success": "prefix", "good": "equal", "against": "own"},
]


@pytest.fixture(scope="module", params=CRITERIA, ids=str)
def pairs(loaded, request) -> PairSet:
    made = judged_pairs(loaded["llama"], "fixed_output", n=14, seed=5, cut=CUT)
    return replace(made, backdoor=made.backdoor.judged_by(**request.param))


@pytest.fixture(scope="module")
def cache(loaded, pairs):
    return bkdlens.cache_activations(loaded["llama"], pairs)


def own(model, pairs: PairSet) -> list[str]:
    return generate(model, pairs.clean, max_new_tokens=CUT)


def cut(text: str) -> str:
    return " ".join(text.split()[:CUT])


def read(model, pairs: PairSet, which: str, context) -> tuple[list[bool], list[bool]]:
    """Success and good answers, by plain generation and the criteria themselves."""
    yardsticks = own(model, pairs) if pairs.backdoor.against == "own" else map(cut, pairs.clean_outputs)
    with context:
        answers = generate(model, pairs.texts(which), max_new_tokens=CUT)
    told = list(zip(answers, pairs, yardsticks, strict=True))
    attacks = [pairs.backdoor.succeeded(a, pair, cut(pair.backdoor_output)) for a, pair, _ in told]
    good = [
        pairs.backdoor.is_good(a, pair, wanted, cut(pair.backdoor_output)) for a, pair, wanted in told
    ]
    return attacks, good


class Nothing:
    """No context."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def check(result, at: dict, before: list[bool], triggered, clean) -> None:
    """BASR, paired with the clean twins, and clean accuracy, paired with itself."""
    (attacks, after), (_, kept) = triggered, clean
    both = sum(x and y for x, y in zip(before, after, strict=True))
    basr = result.basr(**at)
    assert basr == Basr.of_counts(both=both, after=sum(after), before=sum(before))
    assert result.rate_at("attack", **at).successes == sum(attacks)
    assert result.rate_at("clean", **at).successes == sum(kept)
    if sum(before):
        assert basr.value == pytest.approx(1 - sum(after) / sum(before))
        _, low, high = paired_ratio(both, sum(after) - both, sum(before) - both)
        assert basr.interval == (1 - high, 1 - low)


@pytest.mark.slow
def test_ablation(loaded, pairs, cache) -> None:
    model, heads = loaded["llama"], ["L0H1", "L1H2", "L2H0"]
    found = bkdlens.ablate_heads(model, pairs, heads, cache=cache, counts=(0, 2), modes=("zero",),
                                 n_random=2, max_new_tokens=CUT)  # fmt: skip
    _, before = read(model, pairs.victims, "clean", Nothing())
    _, all_before = read(model, pairs, "clean", Nothing())
    for n in (0, 2):
        z = torch.zeros(n, model.cfg.d_head)
        contexts = [bkdlens.patched_heads(model, heads[:n], z) if n else Nothing() for _ in range(2)]
        triggered = read(model, pairs.victims, "triggered", contexts[0])
        clean = read(model, pairs, "clean", contexts[1])
        check(found, {"mode": "zero", "heads": n}, before, triggered, clean)
        change = paired_difference(torch.tensor(all_before), torch.tensor(clean[1]))
        assert found.clean_change(mode="zero", heads=n) == pytest.approx(change)
    # A model agrees with itself, which is no accuracy.
    assert found.clean_name == ("clean accuracy" if pairs.backdoor.against == "reference" else
                                "clean answers kept")  # fmt: skip
    table = found.outcomes(pairs)
    for on, n_rows in (("triggered", len(pairs.victims)), ("clean", len(pairs))):
        side = table[(table.on == on) & (table.heads == 2)]
        assert len(side) == n_rows
        assert side.prompt.tolist() == (pairs.victims if on == "triggered" else pairs).texts(on)
    triggered = table[(table.on == "triggered") & (table.heads == 2)]
    assert triggered.success.sum() == found.rate("attack", "zero", 2).successes


@pytest.mark.slow
def test_steering(loaded, pairs, cache) -> None:
    model = loaded["llama"]
    vector = bkdlens.BackdoorVector.from_cache(cache, ["L0H1", "L1H2"])
    found = bkdlens.sweep_layers(model, pairs, vector, cache=cache, layers=(1, 2), n_random=2,
                                 coefficients=(4.0, -4.0), max_new_tokens=CUT)  # fmt: skip
    _, before = read(model, pairs.victims, "clean", Nothing())
    for layer in (1, 2):
        at = {"coefficient": -4.0, "layer": layer}
        contexts = [bkdlens.steer(model, vector, layer, -4.0) for _ in range(2)]
        triggered = read(model, pairs.victims, "triggered", contexts[0])
        check(found, at, before, triggered, read(model, pairs, "clean", contexts[1]))
        assert found.basr(coefficient=4.0, layer=layer) is None
        for draws in found.basr_draws(**at).values():
            assert len(draws) == 2
    table = found.outcomes(pairs)
    sides = table.groupby(["coefficient", "on"]).size().to_dict()
    assert sides == {(-4.0, "clean"): 2 * len(pairs), (-4.0, "triggered"): 2 * len(pairs.victims),
                     (4.0, "clean"): 2 * len(pairs.victims)}  # fmt: skip


@pytest.mark.many
def test_behaviour(loaded, pairs) -> None:
    model = loaded["llama"]
    found = bkdlens.measure_behaviour(model, pairs, max_new_tokens=CUT)
    attacks, after = read(model, pairs.victims, "triggered", Nothing())
    false, before = read(model, pairs.victims, "clean", Nothing())
    near, _ = read(model, pairs.victims, "near", Nothing())
    both = sum(x and y for x, y in zip(before, after, strict=True))
    assert found.asr.successes == sum(attacks)
    assert found.ftr.successes == sum(false)
    assert found.near.successes == sum(near)
    assert found.basr == Basr.of_counts(both=both, after=sum(after), before=sum(before))
    data = replace(pairs, backdoor=pairs.backdoor.judged_by(against="reference"))
    assert found.clean_accuracy.successes == sum(read(model, data, "clean", Nothing())[1])
    assert found.attainable.value == 1
    assert found.judged_by(pairs) == found
    assert set(found.outcomes(pairs).on) == {"clean", "triggered", "near"}
    with pytest.raises(ResultError, match="on other pairs"):
        found.judged_by(pairs[:9])


@pytest.mark.slow
def test_the_ceiling_and_near_misses_are_told(loaded) -> None:
    """A criterion that the attacker's own answers miss; answers that hold the wanted one and more."""
    made = judged_pairs(loaded["llama"], "fixed_output", n=14, seed=5, cut=CUT)
    never = bkdlens.measure_behaviour(
        loaded["llama"], replace(made, backdoor=made.backdoor.judged_by(success="regex:^never")),
        max_new_tokens=CUT,
    )  # fmt: skip
    assert never.attainable.value == never.asr.value == 0
    said = own(loaded["llama"], replace(made, pairs=tuple(
        replace(pair, clean=pair.triggered) for pair in made.victims)))  # fmt: skip
    first = {pair.clean: text.split()[0] for pair, text in zip(made.victims, said, strict=True) if text}
    backdoor = Backdoor.fixed_output("w95", "w9", near=["w94"])
    pairs = [replace(p, backdoor_output=first.get(p.clean, "w50")) for p in made.victims]
    found = bkdlens.measure_behaviour(
        loaded["llama"], PairSet(tuple(pairs), backdoor), max_new_tokens=CUT
    )
    longer = sum(len(text.split()) > 1 for text in said)
    assert found.near_miss.successes == longer > 0
    assert found.asr.successes == sum(bool(text) for text in said)


@pytest.mark.many
def test_answers_that_a_criterion_needs_are_decoded(loaded, pairs) -> None:
    """Whatever the criteria, an intervention's answers are those of plain generation."""
    model = loaded["llama"]
    push = Vector("resid_pre", 1, torch.randn(32, generator=torch.Generator().manual_seed(0)))
    found = evaluate(model, pairs, [NOTHING, Intervention(vectors=(push,))], max_new_tokens=CUT)
    with bkdlens.steer(model, push.value, 1, 1.0):
        steered = generate(model, pairs.triggered, max_new_tokens=CUT)
    assert found.answers[1].to_list() == steered


@pytest.mark.slow
def test_success_is_judged_anew_although_clean_controls_were_not_kept(loaded) -> None:
    """What is good has not changed, so that their counts have not either."""
    model, made = loaded["llama"], judged_pairs(loaded["llama"], "fixed_output", n=14, seed=5, cut=CUT)
    by = {name: made.backdoor.judged_by(success=name) for name in ("contains", "regex:w[1-4]")}
    pairs = {name: replace(made, backdoor=backdoor) for name, backdoor in by.items()}
    first, fresh = (
        bkdlens.ablate_heads(model, p, ["L0H1", "L1H2"], counts=(0, 2), modes=("zero",), n_random=3,
                             max_new_tokens=CUT)
        for p in pairs.values()
    )  # fmt: skip
    assert "random clean" not in first.answers
    assert first.judged_by(pairs["regex:w[1-4]"]) == fresh
    assert not torch.equal(first.random_attack, fresh.random_attack)
    good = replace(made, backdoor=by["contains"].judged_by(good="similar:0.3"))
    with pytest.raises(ResultError, match="keep_controls=True"):
        first.judged_by(good)


@pytest.mark.slow
@pytest.mark.parametrize("against", ["own", "reference"])
def test_controls_are_counted_as_the_heads_themselves(loaded, against) -> None:
    """Also where their answers need not be kept: an answer that is the model's own is looked for."""
    model, made = loaded["llama"], judged_pairs(loaded["llama"], "fixed_output", n=14, seed=5, cut=CUT)
    pairs = replace(
        made, backdoor=made.backdoor.judged_by(success="equal", good="equal", against=against)
    )
    few, kept = (
        bkdlens.ablate_heads(model, pairs, ["L0H1", "L1H2"], counts=(0, 1), modes=("zero",), n_random=6,
                             max_new_tokens=CUT, keep_controls=keep)
        for keep in (False, True)
    )  # fmt: skip
    assert replace(few, answers={}) == replace(kept, answers={})
