"""Ablated heads are what the mode says, at the last prompt token, whatever else changes."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from tiny import add_at, judge, set_at

import bkdlens
from bkdlens.analyses.ablation.measure import ablate_heads
from bkdlens.engines.generate import evaluate
from bkdlens.engines.hooks import Intervention, Vector
from bkdlens.errors import ChoiceError, DataError, HeadError
from bkdlens.types import Head

CUT = 6
EVERY = [Head(i, j) for i in range(3) for j in range(4)]
FAST = {"max_new_tokens": CUT, "n_random": 0}


@pytest.fixture
def fixed(judged, name):
    """Pairs with answers that the model often gives."""
    return judged[name, "fixed_output"]


@pytest.fixture
def own(model, fixed):
    """The cache of the same pairs."""
    return bkdlens.cache_activations(model, fixed)


def counts(found) -> tuple[int, int]:
    return sum(found[0]), sum(found[1])


def check(model, pairs, result, mode: str, count: int, hooks_of) -> None:
    """The numbers of one cell, by naive greedy decoding; ``hooks_of(on, row, position)``."""
    at = result.modes.index(mode), result.counts.index(count)
    victims = pairs.victims
    triggered = counts(judge(model, victims, "triggered", lambda r, p: hooks_of("triggered", r, p), CUT))
    clean = counts(judge(model, pairs, "clean", lambda r, p: hooks_of("clean", r, p), CUT))
    assert (int(result.attack[at]), int(result.restored[at])) == triggered
    assert int(result.clean[at]) == clean[1]


@pytest.mark.slow
@pytest.mark.float64
def test_no_heads_is_the_model_as_it_is(model, fixed, own) -> None:
    modes = ("zero", "mean", "resample", "subtract")
    result = ablate_heads(model, fixed, EVERY, cache=own, counts=(0,), modes=modes, **FAST)
    for mode in modes:
        check(model, fixed, result, mode, 0, lambda on, row, position: [])
    assert 0 < int(result.attack[0, 0]) < len(fixed.victims)
    assert 0 < int(result.clean[0, 0]) < len(fixed)


@pytest.mark.slow
@pytest.mark.float64
def test_zero_and_mean(model, fixed, cache) -> None:
    """The cache is of other fixed, as it should be; the mean is over all its clean prompts."""
    ranking = [Head(1, 2), Head(0, 0), Head(1, 0), Head(2, 3)]
    mean = cache.z("clean").mean(0)
    result = ablate_heads(
        model, fixed, ranking, cache=cache, counts=(1, 2, 4), modes=("zero", "mean"), **FAST
    )
    for count in (1, 2, 4):
        for mode, values in (("zero", torch.zeros_like(mean)), ("mean", mean)):

            def hooks_of(on, row, position, count=count, values=values):
                return [
                    set_at(f"blocks.{h.layer}.attn.hook_z", position, h.head, values[h])
                    for h in ranking[:count]
                ]

            check(model, fixed, result, mode, count, hooks_of)
    assert result.n_triggered == len(fixed.victims)
    assert result.n_clean == len(fixed)
    assert result.heads == tuple(ranking)
    assert result.provenance.settings["cache"] == "made"


@pytest.mark.slow
@pytest.mark.float64
def test_subtract_is_what_the_published_code_does(model, fixed) -> None:
    """The head's untouched output is subtracted from the attention output, layer by layer."""
    ranking = [Head(0, 1), Head(2, 2), Head(0, 3)]
    result = ablate_heads(model, fixed, ranking, counts=(1, 3), modes=("subtract",), **FAST)
    outputs = {
        "clean": bkdlens.cache_activations(model, fixed).result("clean"),
        "triggered": bkdlens.cache_activations(model, fixed.victims).result("triggered"),
    }
    for count in (1, 3):

        def hooks_of(on, row, position, count=count):
            return [
                add_at(f"blocks.{h.layer}.hook_attn_out", position, -outputs[on][row][h])
                for h in ranking[:count]
            ]

        check(model, fixed, result, "subtract", count, hooks_of)


@pytest.mark.slow
@pytest.mark.float64
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_subtract_equals_zero_within_one_layer(model, fixed, layer) -> None:
    ranking = [Head(layer, 1), Head(layer, 3), Head(layer, 0)]
    result = ablate_heads(model, fixed, ranking, counts=(1, 3), modes=("zero", "subtract"), **FAST)
    for numbers in (result.attack, result.restored, result.clean):
        assert torch.equal(numbers[0], numbers[1])


@pytest.mark.slow
def test_subtract_over_layers_is_no_true_zero(model, own) -> None:
    """The later layer's output has changed by then; what remains of it is not zero."""
    ids = torch.tensor([[1, 4, 10, 11, 5]])
    _, before = model.run_with_cache(ids)
    hooks = [
        add_at(f"blocks.{layer}.hook_attn_out", -1, -(before["z", layer][0, -1, 0] @ w))
        for layer, w in ((0, model.W_O[0, 0]), (2, model.W_O[2, 0]))
    ]
    with model.hooks(fwd_hooks=hooks):
        _, after = model.run_with_cache(ids)
    rest = (after["z", 2][0, -1, 0] - before["z", 2][0, -1, 0]) @ model.W_O[2, 0]
    assert float(rest.norm()) > 1e-2


@pytest.mark.slow
@pytest.mark.float64
def test_all_heads_with_their_own_activation_change_nothing(model, fixed, own) -> None:
    """Through the engine with one value a prompt, and through resampling from a cache of one."""
    for on in ("clean", "triggered"):
        z = own.z(on).flatten(1, 2)
        interventions = [Intervention(), Intervention(tuple(EVERY), z)]
        found = evaluate(model, fixed, interventions, on=on, max_new_tokens=CUT)
        assert torch.equal(found.attack[0], found.attack[1])
        assert torch.equal(found.correct[0], found.correct[1])
    alone = fixed[:1]
    result = ablate_heads(
        model, alone, EVERY, cache=bkdlens.cache_activations(model, alone),
        counts=(0, 4, 12), modes=("mean", "resample"), **FAST,
    )  # fmt: skip
    assert len(set(result.clean.flatten().tolist())) == 1


@pytest.mark.slow
@pytest.mark.float64
def test_resample_takes_clean_prompts_of_the_cache(model, fixed, cache) -> None:
    result = ablate_heads(
        model, fixed, EVERY, cache=cache, counts=(5,), modes=("resample",), seed=3, **FAST
    )
    sides = {}
    for on, part in (("triggered", fixed.victims), ("clean", fixed)):
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randint(len(cache.pairs), (len(part),), generator=generator)
        sides[on] = cache.z("clean")[drawn]

    def hooks_of(on, row, position):
        return [
            set_at(f"blocks.{h.layer}.attn.hook_z", position, h.head, sides[on][row][h])
            for h in EVERY[:5]
        ]

    check(model, fixed, result, "resample", 5, hooks_of)


def test_counts_are_clipped_sorted_and_each_once(loaded, judged) -> None:
    pairs = judged["llama", "fixed_output"][:4]
    options = {"counts": (32, 1, 2, 0, 4), "modes": ("zero",)} | FAST
    result = ablate_heads(loaded["llama"], pairs, ["L0H1", (2, 0)], **options)
    assert result.counts == (0, 1, 2)
    assert result.heads == (Head(0, 1), Head(2, 0))


@pytest.mark.slow
@pytest.mark.float64
def test_random_groups(model, name, judged, cache) -> None:
    pairs = judged[name, "jailbreak"]
    options = {"counts": (0, 2, 12), "modes": ("zero", "mean"), "cache": cache,
               "max_new_tokens": CUT, "n_random": 6}  # fmt: skip
    result = ablate_heads(model, pairs, EVERY, seed=1, **options)
    sides = [
        (result.attack, result.random_attack, len(pairs.victims)),
        (result.restored, result.random_restored, len(pairs.victims)),
        (result.clean, result.random_clean, len(pairs)),
    ]
    for main, control, n in sides:
        assert control.shape == (2, 3, 6)
        assert bool(((control >= 0) & (control <= n)).all())
        # No heads, or all of them: every group is the same as the ranking's first.
        for k in (0, 2):
            assert torch.equal(control[:, k], main[:, k, None].expand(-1, 6))
    assert len(set(result.random_attack[:, 1].flatten().tolist())) > 1
    assert result == ablate_heads(model, pairs, EVERY, seed=1, **options)
    other = ablate_heads(model, pairs, EVERY, seed=2, **options)
    assert torch.equal(other.attack, result.attack)
    assert not torch.equal(other.random_attack, result.random_attack)


def test_random_groups_have_as_many_other_heads(loaded, judged, monkeypatch) -> None:
    from bkdlens.analyses.ablation import measure

    seen = []

    def record(model, pairs, interventions, **options):
        seen.extend(interventions)
        return real(model, pairs, interventions, **options)

    real = measure.answer
    monkeypatch.setattr(measure, "answer", record)
    ablate_heads(
        loaded["llama"], judged["llama", "fixed_output"][:3], EVERY,
        counts=(3,), modes=("zero",), n_random=20, max_new_tokens=2,
    )  # fmt: skip
    groups = [frozenset(intervention.heads) for intervention in seen[2:22]]
    assert {len(group) for group in groups} == {3}
    assert len(set(groups)) > 10
    assert set().union(*groups) == set(EVERY[3:])
    assert seen[0].heads == ()
    assert seen[1].heads == tuple(EVERY[:3])


def test_what_a_result_says(loaded, judged) -> None:
    pairs = judged["qwen", "fixed_output"]
    result = ablate_heads(
        loaded["qwen"], pairs, EVERY, counts=(0, 3), modes=("zero",), n_random=4,
        max_new_tokens=CUT,
    )  # fmt: skip
    rate = result.rate("attack", "zero", 0)
    assert (rate.successes, rate.n) == (int(result.attack[0, 0]), result.n_triggered)
    assert result.rate("clean", "zero", 3).n == result.n_clean
    mean = float(result.random_attack[0, 1].double().mean()) / result.n_triggered
    assert result.random_mean("attack", "zero", 3) == pytest.approx(mean)
    frame = result.to_frame()
    assert frame["heads"].tolist() == [0, 3]
    assert frame["attack"][0] == rate.value
    assert (frame["attack_low"][0], frame["attack_high"][0]) == rate.interval
    assert frame["attack_random"][1] == pytest.approx(mean)
    assert repr(result).startswith("AblationResult(attack success by heads, n=")


def test_refusals(llama, judged, caches) -> None:
    pairs = judged["llama", "fixed_output"]
    for mode in ("mean", "resample"):
        with pytest.raises(DataError, match=f"Ablation by {mode} needs a cache"):
            ablate_heads(llama, pairs, EVERY, modes=("zero", mode))
    with pytest.raises(ChoiceError, match=r"no ablation mode 'zer'.*Did you mean 'zero'"):
        unwrap(ablate_heads)(llama, pairs, EVERY, modes=("zer",))
    with pytest.raises(HeadError, match="Head L3H0 does not exist"):
        ablate_heads(llama, pairs, ["L0H0", "L3H0"], modes=("zero",))
    with pytest.raises(HeadError, match="L0H1 is named twice"):
        ablate_heads(llama, pairs, ["L0H1", (0, 1)], modes=("zero",))
    with pytest.raises(DataError, match="no victim"):
        ablate_heads(llama, pairs[-2:], EVERY, modes=("zero",))


@pytest.mark.slow
@pytest.mark.float64
def test_vectors_and_heads_go_together(model, fixed) -> None:
    """An intervention may do both; each layer's hooks act in TransformerLens' order."""
    value = 3 * torch.randn(32)
    both = Intervention((Head(1, 1),), torch.zeros(1, 8), (Vector("attn_out", 1, value),))
    found = evaluate(model, fixed, [both], on="clean", max_new_tokens=CUT)

    def hooks_of(row, position):
        return [
            set_at("blocks.1.attn.hook_z", position, 1, torch.zeros(8)),
            add_at("blocks.1.hook_attn_out", position, value),
        ]

    assert [x[0].tolist() for x in (found.attack, found.correct)] == list(
        judge(model, fixed, "clean", hooks_of, CUT)
    )
