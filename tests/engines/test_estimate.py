"""Attribution patching is the gradient of one naive pass, times the change; never more than that.

Bounds, on log probabilities: 1e-10 in float64, against torch autograd on whole, unpadded passes.
"""

from __future__ import annotations

import math
import random
from inspect import unwrap

import pytest
import torch
from checkpoints import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    SITES,
    answers_of,
    batches_of,
    every_patch,
    ids_of,
    naive_scores,
    prompts_of,
    set_at,
    together,
)

from bkdlens.analyses.attribution.measure import attribute_heads
from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines import estimate as estimate_module
from bkdlens.engines.estimate import estimate
from bkdlens.engines.hooks import Patch
from bkdlens.engines.memory import run_bytes
from bkdlens.engines.sweep import sweep_patches
from bkdlens.errors import ChoiceError, HeadError, HookError
from bkdlens.types import Head

EXACT, FLOAT32 = 1e-10, 1e-4


def naive(model, prompt, answer, patches) -> tuple[torch.Tensor, list[tuple]]:
    """Base scores ``[2]``, and of each patch its component's activation and two gradients."""
    ids, position = [*prompt.ids, *answer.ids[: answer.n_scored]], len(prompt.ids) - 1
    places = sorted({(p.site, p.layer) for p in patches})
    seen: dict[tuple, torch.Tensor] = {}
    nudges: dict[tuple, torch.Tensor] = {}

    def watch(place: tuple):
        def hook(activation, hook):
            seen[place] = activation[0, position].detach().clone()
            nudges[place] = torch.zeros_like(seen[place], requires_grad=True)
            activation = activation.clone()
            activation[0, position] += nudges[place]
            return activation

        return f"blocks.{place[1]}.{SITES[place[0]]}", hook

    model.set_use_attn_result(any(site == "result" for site, _ in places))
    with torch.enable_grad():
        logits = model.run_with_hooks(torch.tensor([ids[:-1]]), fwd_hooks=[*map(watch, places)])
        found = logits[0, position:].double().log_softmax(-1)
        found = found[range(answer.n_scored), ids[position + 1 :]]
        scores = torch.stack([found.mean(), found[0]])
        if not places:
            return scores, []
        grads = [
            torch.autograd.grad(score, [nudges[place] for place in places], retain_graph=True)
            for score in scores
        ]
    model.set_use_attn_result(False)
    out = []
    for patch in patches:
        k = places.index((patch.site, patch.layer))
        at = ... if patch.head is None else patch.head
        out.append((seen[places[k]][at], grads[0][k][at], grads[1][k][at]))
    return scores.detach(), out


def naive_estimates(model, prompts, answers, patches) -> torch.Tensor:
    """Scores ``[2 pair run]``, untouched first, before they are cut at probability 1."""
    rows = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        base, parts = naive(model, prompt, answer, patches)
        runs = [base]
        for patch, (now, *slopes) in zip(patches, parts, strict=True):
            value = patch.value if patch.value.ndim == 1 else patch.value[row]
            change = (value.to(now) - now).flatten()
            runs.append(base + torch.stack([change @ slope.flatten() for slope in slopes]))
        rows.append(torch.stack(runs, dim=1))
    return torch.stack(rows, dim=1)


def small(model, prompts, patches, step: float) -> list[Patch]:
    """The same patches, moved by ``step`` from each prompt's own activation."""
    out, answer = [], Answer("", (10,), 1)
    parts = [naive(model, prompt, answer, patches)[1] for prompt in prompts]
    for k, patch in enumerate(patches):
        own = torch.stack([rows[k][0] for rows in parts])
        out.append(Patch(patch.site, patch.layer, own + step * patch.value, patch.head))
    return out


def case(model, seed: int, n: int = 4, common: int = 0):
    rng = random.Random(seed)
    return prompts_of(rng, n, 2, 16, common), answers_of(rng, n), every_patch(model, n, seed)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# --- the estimate ---------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("common", [0, 6])
@pytest.mark.parametrize("which", CASES)
def test_it_is_the_change_times_the_gradient(architectures, which, common) -> None:
    """Of every architecture and site; at the last prompt token only; the base is exact."""
    single, model = architectures(which)
    prompts, answers, patches = case(model, 2 + common, common=common)
    wanted = naive_estimates(model, prompts, answers, patches).clamp(max=0)
    found = together(estimate(model, prompts, answers, patches))
    assert far(found, wanted) <= EXACT * 10 * float(wanted.abs().max())
    exact = naive_scores(model, prompts, answers, [])[..., 0]
    assert far(found[..., 0], exact) <= EXACT
    single_found = together(estimate(single, prompts, answers, patches))
    assert far(single_found, wanted) <= FLOAT32 * float(wanted.abs().max())


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_small_patches_agree_with_the_sweep_to_second_order(architectures, which) -> None:
    """A step of 1e-4 is off by about 1e-8, and a tenth of it by a hundredth."""
    _, model = architectures(which)
    prompts, answers, _ = case(model, 3, 3)
    patches = every_patch(model, 3, 3, shared=False)
    off = []
    for step in (1e-4, 1e-5):
        moved = small(model, prompts, patches, step)
        exact = together(sweep_patches(model, prompts, answers, moved))
        found = together(estimate(model, prompts, answers, moved))
        change = exact - exact[..., :1]
        off.append(found - exact)
        assert float(change.abs().max()) > step / 100  # there is something to estimate
        assert far(found, exact) <= 0.02 * float(change.abs().max())
    assert float(off[0].norm()) <= 1e-4
    assert float(off[1].norm()) <= 0.02 * float(off[0].norm()) + 1e-10


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_an_identity_patch_has_no_effect(architectures, which) -> None:
    _, model = architectures(which)
    prompts, answers, _ = case(model, 4, 3)
    patches = small(model, prompts, every_patch(model, 3, 4, shared=False), 0.0)
    found = together(estimate(model, prompts, answers, patches))
    assert far(found, found[..., :1].expand_as(found)) <= EXACT


def test_no_estimate_is_above_probability_1(exact, name) -> None:
    """Where the line goes on above it, it is cut there; below, it is left alone."""
    model = exact[name]
    prompts, answers, patches = case(model, 5)
    far_away = [Patch(p.site, p.layer, 50 * p.value, p.head) for p in patches]
    found = together(estimate(model, prompts, answers, far_away))
    wanted = naive_estimates(model, prompts, answers, far_away)
    above = wanted > 0
    assert 0.2 < float(above.double().mean()) < 0.7
    assert bool((found[above] == 0).all())
    assert far(found[~above], wanted[~above]) <= EXACT * float(wanted.abs().max())


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_any_patches_in_any_order_and_batch(exact, which, seed) -> None:
    model, rng = exact[which], random.Random(seed)
    prompts, answers, every = case(model, seed, rng.randint(1, 5), rng.choice([0, 5]))
    some = rng.choices(every, k=rng.randint(0, 9))
    wanted = naive_estimates(model, prompts, answers, some).clamp(max=0)
    with batches_of(rng.choice([1e12, rng.randint(1, 60) * run_bytes(model, 20, 3), 1])):
        found = together(estimate(model, prompts, answers, some))
    assert far(found, wanted) <= EXACT * 10 * float(wanted.abs().max())


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_a_prompt_that_fills_the_context(architectures, which) -> None:
    """Padding may lie past the context."""
    _, model = architectures(which)
    rng, n_ctx, lengths = random.Random(9), model.cfg.n_ctx, [1, 4, 6]
    prompts = [Prompt("", tuple(ids_of(rng, n_ctx - n, n_ctx - n))) for n in lengths]
    answers = [Answer("", tuple(rng.randrange(4, 96) for _ in range(n)), n) for n in lengths]
    patches = every_patch(model, 3, 9)[:8]
    found = together(estimate(model, prompts, answers, patches))
    wanted = naive_estimates(model, prompts, answers, patches).clamp(max=0)
    assert far(found, wanted) <= EXACT * 10 * float(wanted.abs().max())


def test_gradients_are_nobodys_business(exact) -> None:
    """Neither the caller's mode nor the model's parameters matter, and nothing is left behind."""
    model = exact["qwen"]
    prompts, answers, patches = case(model, 6)
    wanted = together(estimate(model, prompts, answers, patches))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert far(together(estimate(model, prompts, answers, patches)), wanted) <= EXACT
    weights = list(model.parameters())
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        scores = estimate(model, prompts, answers, patches)
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)
    assert far(together(scores), wanted) <= EXACT
    assert not any(t.requires_grad for t in vars(scores).values())
    assert all(weight.grad is None for weight in weights)


def test_refusals(llama, monkeypatch) -> None:
    prompts, answers, patches = case(llama, 0)
    hook = set_at("blocks.0.attn.hook_z", -1, 0, torch.zeros(8))
    with llama.hooks(fwd_hooks=[hook]), pytest.raises(HookError, match="already carries hooks"):
        estimate(llama, prompts, answers, patches)
    monkeypatch.setattr(estimate_module, "supported", lambda model: False)
    with pytest.raises(HookError, match="does not know LlamaForCausalLM; use method='exact'"):
        estimate(llama, prompts, answers, patches)


# --- the methods of attribution -------------------------------------------------------------------


@pytest.fixture
def three(model, cache, pairs):
    """Attribution by every method, layer outputs included."""
    return {
        method: attribute_heads(
            model, pairs, cache=cache, method=method, confirm=0.3, layer_outputs=True, label="base"
        )
        for method in ("exact", "atp", "screened")
    }


@pytest.mark.many
@pytest.mark.float64
def test_atp_is_the_estimate_of_every_head(model, cache, pairs, three) -> None:
    from bkdlens.data.prompts import encode_answer, encode_prompt

    found, victims = three["atp"], pairs.victims
    prompts = [encode_prompt(model.tokenizer, p.clean, cache.fmt) for p in victims]
    answers = [
        encode_answer(model.tokenizer, prompt, pair.backdoor_output, cache.fmt)
        for prompt, pair in zip(prompts, victims, strict=True)
    ]
    mean = cache.mean_z("triggered")
    heads = [Head(i, j) for i in range(3) for j in range(4)]
    patches = [Patch("z", head.layer, mean[head], head.head) for head in heads]
    scores = naive_estimates(model, prompts, answers, patches).clamp(max=0).exp()
    effects = (scores - scores[..., :1])[..., 1:].view(2, -1, 3, 4)
    assert far(found.cie.double(), effects[0].double()) <= EXACT
    assert far(found.cie_first.double(), effects[1].double()) <= EXACT
    assert not bool(found.exact.any())
    assert found.provenance.settings["method"] == found.method == "atp"
    assert far(found.base_prob, three["exact"].base_prob) <= EXACT


@pytest.mark.many
@pytest.mark.float64
def test_screened_is_exact_where_it_says_so(three) -> None:
    exact, guess, screened = (three[method] for method in ("exact", "atp", "screened"))
    chosen = screened.exact
    assert int(chosen.sum()) == math.ceil(0.3 * 12)
    strongest = guess.acie.flatten().argsort(descending=True)[: int(chosen.sum())]
    assert set(strongest.tolist()) == set(chosen.flatten().nonzero()[:, 0].tolist())
    for field in ("cie", "cie_first"):
        found, right, rough = (getattr(result, field) for result in (screened, exact, guess))
        assert far(found[:, chosen], right[:, chosen]) <= EXACT
        assert far(found[:, ~chosen], rough[:, ~chosen]) <= EXACT
    for field in ("cie_attn_out", "cie_mlp_out"):  # always patched
        assert far(getattr(screened, field), getattr(exact, field)) <= EXACT
    assert bool(exact.exact.all())
    assert "screened, 4 exact, 9 pairs, 3×4 heads" in repr(screened)
    assert "atp, 0 exact" in repr(guess)
    assert screened.provenance.settings["confirm"] == 0.3
    assert exact.provenance.settings["confirm"] is None


def test_what_was_patched_is_ranked_before_what_was_estimated(three) -> None:
    screened = three["screened"]
    ranking = screened.ranking
    assert sorted(ranking) == [Head(i, j) for i in range(3) for j in range(4)]
    patched = [bool(screened.exact[head]) for head in ranking]
    assert patched == sorted(patched, reverse=True)
    for part in (ranking[:4], ranking[4:]):
        effects = [float(screened.acie[head]) for head in part]
        assert effects == sorted(effects, reverse=True)
    frame = screened.to_frame()
    assert frame["exact"].tolist() == patched
    assert frame["head"].tolist() == [str(head) for head in ranking]


@pytest.mark.float64
def test_confirming_all_heads_is_exact(model, cache, pairs) -> None:
    screened = attribute_heads(model, pairs, cache=cache, method="screened", confirm=1.0)
    exact = attribute_heads(model, pairs, cache=cache)
    assert bool(screened.exact.all())
    assert far(screened.cie, exact.cie) <= EXACT
    assert screened.ranking == exact.ranking


def test_methods_and_shares_that_there_are_not(llama, pairs) -> None:
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(HeadError, match="is not a share of the heads; give one in"):
            attribute_heads(llama, pairs, method="screened", confirm=share)
    with pytest.raises(ChoiceError, match=r"no attribution method 'exakt'.*Did you mean 'exact'"):
        unwrap(attribute_heads)(llama, pairs, method="exakt")
