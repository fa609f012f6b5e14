"""Patching by hand: every source is what it says, and the answer moves as in one naive pass."""

from __future__ import annotations

import random
from inspect import unwrap

import pytest
import torch
from tiny import (
    EXACT,
    answer_log_probs,
    apart,
    assert_exact,
    encoded,
    forward,
    greedy,
    set_at,
    text_of,
    words,
)

import bkdlens
from bkdlens.analyses.patching.measure import patch_heads, patched_heads
from bkdlens.data.prompts import PromptFormat, encode_prompt
from bkdlens.engines.generate import generate
from bkdlens.engines.reference import head_z
from bkdlens.errors import ChoiceError, DataError, HeadError, HookError
from bkdlens.types import Head

pytestmark = pytest.mark.float64
HEADS = [Head(0, 1), Head(2, 3), Head(0, 2)]
LAYERS, INDEX = [0, 2, 0], [1, 3, 2]
PROMPTS = [words(random.Random(i), 1, 9) for i in range(5)]
OTHERS = [words(random.Random(i + 50), 1, 9) for i in range(5)]
CHAT = PromptFormat("chat")


def hooks_of(z: torch.Tensor, position: int):
    """``z`` is [head d_head], in the order of HEADS."""
    return [
        set_at(f"blocks.{head.layer}.attn.hook_z", position, head.head, z[k])
        for k, head in enumerate(HEADS)
    ]


def z_of(model, text: str) -> torch.Tensor:
    """The heads' z at the last token of one unpadded prompt."""
    _, cache = model.run_with_cache(torch.tensor([encoded(model, text)]))
    return torch.stack([cache["z", head.layer][0, -1, head.head] for head in HEADS])


def sources(model, cache) -> dict:
    """Every kind of source, with the value that each prompt's heads get."""
    every = torch.randn(3, 4, 8)
    each, shared = torch.randn(5, 3, 8), torch.randn(3, 8)
    _, tl = model.run_with_cache(torch.randint(4, 96, (6, 7)))
    last = torch.stack([tl["z", layer][:, -1] for layer in range(3)], dim=1).mean(0)
    victims = cache.z("triggered")[cache.victims].mean(0)
    return {
        "a cache": (cache, [victims[LAYERS, INDEX]] * 5),
        "TransformerLens' cache": (tl, [last[LAYERS, INDEX]] * 5),
        "a part of a cache": (cache.clean, [cache.z("clean").mean(0)[LAYERS, INDEX]] * 5),
        "a tensor": (shared, [shared] * 5),
        "a tensor for each": (each, list(each)),
        "a tensor of all heads": (every, [every[LAYERS, INDEX]] * 5),
        "prompts": (OTHERS, [z_of(model, text) for text in OTHERS]),
        "one prompt": (OTHERS[0], [z_of(model, OTHERS[0])] * 5),
        "one prompt in a list": (OTHERS[:1], [z_of(model, OTHERS[0])] * 5),
        "zero": ("zero", [torch.zeros(3, 8)] * 5),
        "mean": ("mean", [torch.stack([z_of(model, text) for text in PROMPTS]).mean(0)] * 5),
    }


KINDS = ("a cache", "TransformerLens' cache", "a part of a cache", "a tensor", "a tensor for each",
         "a tensor of all heads", "prompts", "one prompt", "one prompt in a list", "zero",
         "mean")  # fmt: skip


@pytest.mark.many
@pytest.mark.parametrize("site", ["z", "result"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source(model, cache, kind, site) -> None:
    source, wanted = sources(model, cache)[kind]
    result = patch_heads(model, PROMPTS, HEADS, source, site=site)
    for p, text in enumerate(PROMPTS):
        ids = encoded(model, text)
        before = forward(model, ids)[-1]
        after = forward(model, ids, hooks_of(wanted[p], len(ids) - 1))[-1]
        assert apart(result.logits_before[p], before) <= EXACT
        assert apart(result.logits_after[p], after) <= EXACT
        assert result.next_before[p] == model.tokenizer.decode([before.argmax()])
        assert result.next_after[p] == model.tokenizer.decode([after.argmax()])
    assert apart(result.logits_before, result.logits_after) > 1e-2
    assert result.targets is None
    assert result.before.isnan().all()
    assert (result.heads, result.site) == (tuple(HEADS), site)


@pytest.mark.many
@pytest.mark.parametrize("targets", ["w40 w41 w42", [words(random.Random(i), 1, 4) for i in range(5)]])
def test_targets_are_followed(model, cache, targets) -> None:
    result = patch_heads(model, PROMPTS, HEADS, OTHERS, target=targets)
    each = [targets] * 5 if isinstance(targets, str) else targets
    assert result.targets == tuple(each)
    for p, (text, target) in enumerate(zip(PROMPTS, each, strict=True)):
        ids, answer = encoded(model, text), [int(word[1:]) for word in target.split()]
        hooks = hooks_of(z_of(model, OTHERS[p]), len(ids) - 1)
        assert_exact(result.before[p], answer_log_probs(model, ids, answer).mean().exp())
        assert_exact(result.after[p], answer_log_probs(model, ids, answer, hooks).mean().exp())
        assert apart(result.logits_after[p], forward(model, ids, hooks)[-1]) <= EXACT
    assert torch.equal(result.effect, result.after - result.before)


def test_a_pair_set_stands_for_its_clean_prompts(model, cache, pairs) -> None:
    some = pairs[:4]
    result = patch_heads(model, some, "L1H0", cache)
    assert result.prompts == tuple(some.clean)
    assert result.targets == tuple(some.backdoor_outputs)
    again = patch_heads(model, some.clean, "L1H0", cache, target=some.backdoor_outputs)
    assert torch.equal(result.after, again.after)
    assert result.provenance.data_digest == some.digest
    other = patch_heads(model, some, "L1H0", cache, target="w9")
    assert set(other.targets) == {"w9"}


def test_it_agrees_with_attribution(model, cache, pairs) -> None:
    """One head at a time, the cache's mean: the same effect as the sweep's."""
    found = bkdlens.attribute_heads(model, pairs, cache=cache)
    for head in ("L0H3", "L2H1"):
        result = patch_heads(model, pairs.victims, head, cache)
        assert_exact(result.effect, found.cie[(slice(None), *Head.parse(head))])


def test_the_own_activation_changes_nothing(model) -> None:
    every = [(i, j) for i in range(3) for j in range(4)]
    for site in ("z", "result"):
        result = patch_heads(model, PROMPTS, every, PROMPTS, target="w10 w11", site=site)
        assert apart(result.logits_after, result.logits_before) <= EXACT
        assert_exact(result.after, result.before)
        assert float(result.divergence.max()) <= EXACT
        assert result.next_after == result.next_before


def test_one_prompt_and_one_head_in_any_spelling(llama) -> None:
    results = [
        patch_heads(llama, PROMPTS[0], head, "zero")
        for head in ("L1H2", "1.2", (1, 2), Head(1, 2), ["L1H2"], [(1, 2)])
    ]
    assert all(result.heads == (Head(1, 2),) for result in results)
    assert all(torch.equal(r.logits_after, results[0].logits_after) for r in results)
    assert results[0].logits_after.shape == (1, 96)


def test_head_z_is_in_order_and_unpadded(model) -> None:
    z = head_z(model, [encode_prompt(model.tokenizer, text, CHAT) for text in PROMPTS])
    for p, text in enumerate(PROMPTS):
        assert apart(z[p][LAYERS, INDEX], z_of(model, text)) <= EXACT


def test_what_a_result_says(model, cache) -> None:
    result = patch_heads(model, PROMPTS, HEADS, cache, target="w40")
    before, after = (x.softmax(-1) for x in (result.logits_before, result.logits_after))
    kl = (before * (before / after).log()).sum(-1)
    assert_exact(result.divergence, kl)
    frame = result.to_frame()
    assert frame["prompt"].tolist() == PROMPTS
    assert frame["effect"].tolist() == result.effect.tolist()
    assert frame["kl"].tolist() == result.divergence.tolist()
    changed = sum(a != b for a, b in zip(result.next_before, result.next_after, strict=True))
    assert f"next token changed in {changed}, mean effect" in repr(result)
    assert result.source == "mean of 9 triggered"
    bare = patch_heads(model, PROMPTS, HEADS, "zero")
    assert list(bare.to_frame()) == ["prompt", "next_before", "next_after", "kl"]
    assert "effect" not in repr(bare)
    names = {
        "mean of a cache": cache.clean, "a tensor": torch.zeros(3, 8), "zero": "zero",
        "mean": "mean", "other prompts": OTHERS,
    }  # fmt: skip
    for name, source in names.items():
        assert patch_heads(model, PROMPTS, HEADS, source).source == name


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mean"])
def test_generating_under_the_same_patch(model, cache, kind) -> None:
    source, wanted = sources(model, cache)[kind]
    with patched_heads(model, HEADS, source):
        said = generate(model, PROMPTS, max_new_tokens=5)
    result = patch_heads(model, PROMPTS, HEADS, source)
    assert [text.split()[:1] for text in said] == [
        [token] if token != "</s>" else [] for token in result.next_after
    ]
    for p, text in enumerate(PROMPTS):
        ids = encoded(model, text)
        assert said[p] == text_of(greedy(model, ids, hooks_of(wanted[p], len(ids) - 1), 5))


def test_patched_results_generate_the_same(model, cache) -> None:
    with patched_heads(model, HEADS, cache, site="result") as same:
        assert same is model
        said = generate(model, PROMPTS, max_new_tokens=5)
    with patched_heads(model, HEADS, cache):
        assert generate(model, PROMPTS, max_new_tokens=5) == said
    assert generate(model, PROMPTS, max_new_tokens=5) != said


# --- errors ---------------------------------------------------------------------------------------


def test_refusals(model, cache) -> None:
    def refused(error, match, *args, **options):
        with pytest.raises(error, match=match) as caught:
            patch_heads(model, *args, **options)
        assert str(caught.value).endswith(".")

    refused(DataError, "There are no prompts to patch", [], "L0H0", "zero")
    refused(DataError, "2 targets for 5 prompts", PROMPTS, "L0H0", "zero", target=["w9", "w10"])
    refused(DataError, "2 source prompts for 5 prompts", PROMPTS, "L0H0", OTHERS[:2])
    refused(HeadError, r"L0H4 does not exist.*L0H0 to L2H3", PROMPTS, "L0H4", "zero")
    refused(HeadError, "'L0' is not a head", PROMPTS, "L0", "zero")
    refused(HeadError, "L0H0 is named twice", PROMPTS, ["L0H0", (0, 0)], "zero")
    refused(HookError, "The source has 2 prompts and 5 are run", PROMPTS, "L0H0", torch.zeros(2, 1, 8))
    refused(DataError, r"shape \(3, 8\); give \[1 8\]", PROMPTS, "L0H0", torch.zeros(3, 8))
    refused(DataError, "shorten it", "w10 " * 130, "L0H0", "zero")
    refused(DataError, "has no tokens", PROMPTS, "L0H0", "zero", target=" ")
    with pytest.raises(ChoiceError, match="no head site 'pattern'"):
        unwrap(patch_heads)(model, PROMPTS, "L0H0", "zero", site="pattern")
    with pytest.raises(DataError, match="has no prompts here"), patched_heads(model, "L0H0", "mean"):
        raise AssertionError("not reached")
    with pytest.raises(HookError, match="never acted"), patched_heads(model, "L0H0", "zero"):
        pass
    with patched_heads(model, "L0H0", "zero"):
        generate(model, PROMPTS[0], max_new_tokens=2)
        refused(HookError, "already carries hooks", PROMPTS, "L0H1", "zero")


def test_no_heads_is_an_error(model, cache) -> None:
    with pytest.raises(HeadError, match="at least one head"):
        patch_heads(model, PROMPTS, [], "zero")
    with pytest.raises(HeadError, match="at least one head"):
        bkdlens.BackdoorVector.from_cache(cache, [])
