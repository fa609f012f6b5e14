"""The effect of a head is what patching it into one naive pass a pair changes."""

from __future__ import annotations

import pytest
import torch
from tiny import EXACT, answer_log_probs, assert_exact, encoded, make_pairs, set_at

import bkdlens
from bkdlens.analyses.attribution.measure import attribute_heads
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import PairSet
from bkdlens.errors import ChoiceError, DataError, ResultError
from bkdlens.metrics import bootstrap_mean
from bkdlens.types import Head

pytestmark = pytest.mark.float64


def naive_effects(model, pairs: PairSet, mean_z: torch.Tensor, *end: int) -> tuple[torch.Tensor, ...]:
    """``cie``, ``cie_first`` and the base, by one unpadded pass a pair and head."""
    cfg = model.cfg
    cie = torch.zeros(2, len(pairs), cfg.n_layers, cfg.n_heads)
    base = torch.zeros(2, len(pairs))
    for p, pair in enumerate(pairs):
        prompt = encoded(model, pair.clean)
        answer = [*(int(word[1:]) for word in pair.backdoor_output.split()), *end]
        plain = answer_log_probs(model, prompt, answer)
        base[:, p] = torch.stack([plain.mean(), plain[0]]).exp()
        for layer in range(cfg.n_layers):
            for head in range(cfg.n_heads):
                at = f"blocks.{layer}.attn.hook_z"
                hook = set_at(at, len(prompt) - 1, head, mean_z[layer, head])
                found = answer_log_probs(model, prompt, answer, [hook])
                cie[:, p, layer, head] = torch.stack([found.mean(), found[0]]).exp() - base[:, p]
    return cie[0], cie[1], base[0]


@pytest.mark.slow
@pytest.mark.parametrize("site", ["z", "result"])
def test_effects_are_those_of_naive_patching(model, cache, pairs, site) -> None:
    result = attribute_heads(model, pairs, cache=cache, site=site)
    rows = [i for i, pair in enumerate(pairs) if pair.clean_output != pair.backdoor_output]
    mean_z = torch.stack([cache.z("triggered")[i] for i in rows]).mean(0)
    cie, first, base = naive_effects(model, pairs.victims, mean_z)
    assert_exact(result.cie, cie)
    assert_exact(result.cie_first, first)
    assert_exact(result.base_prob, base)
    assert float(cie.abs().max()) > 1e-3
    assert result.provenance.settings["site"] == site
    assert result.provenance.settings["source"] == "mean over 9 triggered prompts"


@pytest.mark.slow
def test_over_all_pairs_as_published(model, cache, pairs) -> None:
    result = attribute_heads(model, pairs, cache=cache, victims_only=False)
    mean_z = cache.z("triggered").mean(0)
    cie, _, _ = naive_effects(model, pairs, mean_z)
    assert_exact(result.cie, cie)
    assert result.provenance.settings["victims_only"] is False


@pytest.mark.slow
def test_the_end_token_is_scored_where_asked_for(model, cache, pairs) -> None:
    result = attribute_heads(model, pairs, cache=cache, end_token=True)
    mean_z = cache.mean_z("triggered")
    cie, first, base = naive_effects(model, pairs.victims, mean_z, model.tokenizer.eos_token_id)
    assert_exact(result.cie, cie)
    assert_exact(result.cie_first, first)
    assert_exact(result.base_prob, base)
    assert result.provenance.settings["end_token"] is True
    text = attribute_heads(model, pairs, cache=cache)
    assert text.provenance.settings["end_token"] is False
    assert not torch.equal(text.cie, result.cie)
    # An answer that is cut has no end to score.
    cut, whole = (
        attribute_heads(model, pairs, cache=cache, end_token=end, max_answer_tokens=1)
        for end in (True, False)
    )
    assert_exact(cut.cie, whole.cie)


@pytest.mark.slow
def test_concentration_follows_the_ranking(model, cache, pairs) -> None:
    """Heads that were patched come first, whatever the estimates of the others say."""
    for method in ("exact", "screened"):
        result = attribute_heads(model, pairs, cache=cache, method=method, confirm=0.25)
        effects = torch.stack([result.acie[head] for head in result.ranking]).clamp(min=0)
        assert_exact(result.concentration, effects.cumsum(0) / effects.sum())
        some = result.ranking[3:6]
        assert_exact(result.carried(some), effects[3:6].cumsum(0) / effects.sum())


def naive_layers(model, pairs: PairSet, site: str, mean: torch.Tensor) -> torch.Tensor:
    """Effects of whole layer outputs, ``[pair layer]``."""
    effects = torch.zeros(len(pairs), model.cfg.n_layers)
    for p, pair in enumerate(pairs):
        prompt = encoded(model, pair.clean)
        answer = [int(word[1:]) for word in pair.backdoor_output.split()]
        base = answer_log_probs(model, prompt, answer).mean().exp()
        for layer in range(model.cfg.n_layers):
            hook = set_at(f"blocks.{layer}.hook_{site}", len(prompt) - 1, ..., mean[layer])
            effects[p, layer] = answer_log_probs(model, prompt, answer, [hook]).mean().exp() - base
    return effects


@pytest.mark.slow
@pytest.mark.parametrize("victims_only", [True, False])
def test_effects_of_layer_outputs(model, cache, pairs, victims_only) -> None:
    """The mean triggered attention and MLP output of each layer, patched whole."""
    chosen = pairs.victims if victims_only else pairs
    options = {"cache": cache, "victims_only": victims_only}
    result = attribute_heads(model, pairs, layer_outputs=True, **options)
    rows = cache.victims if victims_only else torch.ones(len(pairs), dtype=torch.bool)
    for site in ("attn_out", "mlp_out"):
        out = [cache.triggered[f"blocks.{layer}.hook_{site}"][:, 0] for layer in range(3)]
        mean = torch.stack([layer[rows].mean(0) for layer in out])
        found = getattr(result, f"cie_{site}")
        assert_exact(found, naive_layers(model, chosen, site, mean))
        assert float(found.abs().max()) > 1e-3
    heads = attribute_heads(model, pairs, **options)
    assert_exact(heads.cie, result.cie)
    assert heads.cie_attn_out is heads.cie_mlp_out is None


def test_layers_as_a_frame(model, cache, pairs) -> None:
    result = attribute_heads(model, pairs, cache=cache, layer_outputs=True, seed=2)
    frame = result.layers_frame()
    assert frame["layer"].tolist() == [0, 1, 2]
    for layer in range(3):
        whole = sum(float(result.acie[layer, head]) for head in range(4))
        assert frame["heads_sum"][layer] == pytest.approx(whole, abs=EXACT)
    for name, cie in (("attn_out", result.cie_attn_out), ("mlp_out", result.cie_mlp_out)):
        low, high = bootstrap_mean(cie, seed=2)
        assert frame[name].tolist() == pytest.approx(cie.mean(0).tolist(), abs=EXACT)
        assert frame[f"{name}_low"].tolist() == low.tolist()
        assert frame[f"{name}_high"].tolist() == high.tolist()
    with pytest.raises(ResultError, match="not patched; attribute with layer_outputs=True"):
        attribute_heads(model, pairs, cache=cache, n_pairs=2).layers_frame()


@pytest.mark.many
def test_it_makes_its_own_cache(model, cache, pairs) -> None:
    given = attribute_heads(model, pairs, cache=cache, seed=4)
    made = attribute_heads(model, pairs, seed=4, memory_gb=0.2)
    assert_exact(given.cie, made.cie)
    assert_exact(given.low, made.low)


def test_a_trigger_that_changes_nothing_has_no_effect(model) -> None:
    """One pair, triggered and clean the same text: every head gets its own activation."""
    pair = PromptPair("w10 w11 w12", "w10 w11 w12", "w13", "w14 w15")
    pairs = PairSet((pair,), Backdoor.fixed_output("w95", "w14 w15"))
    result = attribute_heads(model, pairs)
    assert float(result.cie.abs().max()) <= EXACT
    assert float(result.cie_first.abs().max()) <= EXACT


@pytest.mark.many
def test_the_sample_of_pairs(model, cache, pairs) -> None:
    some = attribute_heads(model, pairs, cache=cache, n_pairs=4, seed=1)
    assert some.cie.shape == (4, 3, 4)
    assert some == attribute_heads(model, pairs, cache=cache, n_pairs=4, seed=1)
    other = attribute_heads(model, pairs, cache=cache, n_pairs=4, seed=3)
    assert some.provenance.data_digest != other.provenance.data_digest
    every = attribute_heads(model, pairs, cache=cache, n_pairs=None)
    chosen = pairs.victims.sample(4, seed=1)
    rows = [pairs.victims.clean.index(text) for text in chosen.clean]
    assert_exact(some.cie, every.cie[rows])


def test_long_answers_are_scored_on_their_start(model, cache, pairs) -> None:
    cut = attribute_heads(model, pairs, cache=cache, max_answer_tokens=1)
    whole = attribute_heads(model, pairs, cache=cache)
    assert_exact(cut.cie, cut.cie_first)
    assert_exact(cut.cie_first, whole.cie_first)


def test_what_a_result_says(model, cache, pairs) -> None:
    result = attribute_heads(model, pairs, cache=cache, label="base")
    acie = result.cie.mean(0)
    assert torch.equal(result.acie, acie)
    assert torch.equal(result.acie_first, result.cie_first.mean(0))
    low, high = bootstrap_mean(result.cie, seed=0)
    assert torch.equal(low, result.low)
    assert torch.equal(high, result.high)
    assert bool(((low <= acie + EXACT) & (acie <= high + EXACT)).all())
    ranking = result.ranking
    assert sorted(ranking) == [Head(i, j) for i in range(3) for j in range(4)]
    ranked = [float(acie[head]) for head in ranking]
    assert ranked == sorted(ranked, reverse=True)
    assert result.top(3) == ranking[:3]
    share = result.concentration
    assert bool((share.diff() >= 0).all())
    assert float(share[-1]) == pytest.approx(1)
    positive = [max(x, 0) for x in ranked]
    assert float(share[1]) == pytest.approx(sum(positive[:2]) / sum(positive), rel=EXACT)
    frame = result.to_frame()
    assert list(frame["rank"]) == list(range(1, 13))
    assert list(frame["head"]) == [str(head) for head in ranking]
    assert frame["acie"].tolist() == ranked
    assert repr(result).startswith(f"HeadAttribution(base, 9 pairs, 3×4 heads: {ranking[0]} ")


def test_refusals(llama, pairs) -> None:
    with pytest.raises(DataError, match="no victim"):
        attribute_heads(llama, pairs[-2:])
    long = bkdlens.Backdoor.fixed_output("w9", "w10 " * 125 + "w10")
    with pytest.raises(DataError, match="do not fit the model's context"):
        attribute_heads(llama, PairSet((long.pair("w10", "w11"),), long), max_answer_tokens=None)
    from inspect import unwrap

    with pytest.raises(ChoiceError, match="no head site 'pattern'"):
        unwrap(attribute_heads)(llama, make_pairs(4), site="pattern")
