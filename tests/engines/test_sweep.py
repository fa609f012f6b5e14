"""The exact sweep equals one naive, unpadded forward pass a run.

Bounds, on log probabilities: 1e-10 in float64. In float32 the two sum in another order; probabilities
are within 1e-5 and their logarithms, of -1 to -20, within 1e-4.
"""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    SITES,
    answer_log_probs,
    answers_of,
    apart,
    batches_of,
    every_patch,
    forward,
    ids_of,
    naive_scores,
    patch_hook,
    prompts_of,
    set_at,
    together,
)
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines import reference
from bkdlens.engines import sweep as sweep_module
from bkdlens.engines.hooks import Patch
from bkdlens.engines.memory import run_bytes
from bkdlens.engines.sweep import sweep_patches
from bkdlens.errors import HookError

EXACT, FLOAT32 = 1e-10, 1e-5


def case(model, seed: int, n: int = 3, common: int = 0):
    """Prompts and answers of many lengths."""
    rng = random.Random(seed)
    return prompts_of(rng, n, 2, 16, common), answers_of(rng, n)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference; nothing is nan."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max()) if wanted.numel() else 0.0


def check(model, oracle, seed: int, *, single: bool = False, common: int = 0, **options) -> None:
    """Every component of every pair against ``oracle``, which may be another backend."""
    prompts, answers = case(model, seed, common=common)
    patches = every_patch(model, len(prompts), seed, **options)
    found = together(sweep_patches(model, prompts, answers, patches))
    wanted = naive_scores(oracle, prompts, answers, patches)
    if single:
        assert far(found.exp(), wanted.exp()) <= FLOAT32
        assert far(found, wanted) <= 10 * FLOAT32
    else:
        assert far(found, wanted) <= EXACT
    moved = (wanted - wanted[..., :1]).abs()[0, :, 1:]
    assert float((moved > 0.01).double().mean()) > 0.8  # the patches matter


@pytest.mark.many
@pytest.mark.parametrize("common", [0, 7])
@pytest.mark.parametrize("which", CASES)
def test_every_architecture(architectures, which, common) -> None:
    """Softcaps, windows shorter than the prompts, learned positions, parallel blocks; all four sites."""
    single, double = architectures(which)
    check(double, double, 3 + common, common=common)
    if not common:
        check(single, single, 4, single=True)


@pytest.mark.many
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("shared", [False, True])
def test_it_equals_one_pass_per_patch(exact, name, site, shared) -> None:
    """Values shared by all prompts, and one for each."""
    check(exact[name], exact[name], 1, sites=[site], shared=shared)


@pytest.mark.many
def test_it_equals_one_pass_per_patch_in_float32(model) -> None:
    check(model, model, 2, single=True)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_any_patches_in_any_order_and_batch(exact, which, seed) -> None:
    """Subsets, orders, repetitions and any memory give what every patch alone gives."""
    model, rng = exact[which], random.Random(seed)
    prompts, answers = case(model, seed, rng.randint(1, 5), rng.choice([0, 0, 6]))
    every = every_patch(model, len(prompts), seed)
    some = rng.choices(every, k=rng.randint(0, 9))
    wanted = naive_scores(model, prompts, answers, some)
    with batches_of(rng.choice([1e12, rng.randint(1, 40) * run_bytes(model, 20, 3), 1])):
        found = together(sweep_patches(model, prompts, answers, some))
    assert far(found, wanted) <= EXACT


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_memory_does_not_matter(architectures, which) -> None:
    """With none at all, prompts and patches are run one by one."""
    _, model = architectures(which)
    prompts, answers = case(model, 5, 5, 3)
    patches = every_patch(model, 5, 5)[:7]
    wanted = together(sweep_patches(model, prompts, answers, patches))
    found = together(sweep_patches(model, prompts, answers, patches, memory_gb=1e-9))
    assert far(found, wanted) <= EXACT
    with batches_of(25 * run_bytes(model, 14, 4)):
        found = together(sweep_patches(model, prompts, answers, patches))
    assert far(found, wanted) <= EXACT


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_few_patches(architectures, which) -> None:
    """None at all, one in each layer (the last layer's is run apart), one twice."""
    _, model = architectures(which)
    prompts, answers = case(model, 6, 3)
    every = every_patch(model, 3, 6)
    alone = {(p.site, p.layer): p for p in every}
    last = model.cfg.n_layers - 1
    for some in (
        [],
        [alone["z", last]],
        [alone["mlp_out", last]],
        [alone["attn_out", 0]],
        [alone["mlp_out", last], alone["z", 0], alone["mlp_out", last]],
    ):
        found = sweep_patches(model, prompts, answers, some)
        assert found.whole.shape == found.first.shape == (3, len(some))
        assert far(together(found), naive_scores(model, prompts, answers, some)) <= EXACT


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_a_prompt_that_fills_the_context(architectures, which) -> None:
    """Beside shorter ones with longer answers: padding may lie past the context, nothing else does."""
    _, model = architectures(which)
    rng, n_ctx = random.Random(9), model.cfg.n_ctx
    lengths = [1, 4, 6]
    prompts = [Prompt("", tuple(ids_of(rng, n_ctx - n, n_ctx - n))) for n in lengths]
    answers = [Answer("", tuple(rng.randrange(4, 96) for _ in range(n)), n) for n in lengths]
    patches = every_patch(model, 3, 9)[:8]
    found = together(sweep_patches(model, prompts, answers, patches))
    assert far(found, naive_scores(model, prompts, answers, patches)) <= EXACT


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_a_components_own_activation_changes_nothing(architectures, which) -> None:
    """A law of every site: an identity patch."""
    _, model = architectures(which)
    prompts, answers = case(model, 7)
    model.set_use_attn_result(True)
    caches = [model.run_with_cache(torch.tensor([prompt.ids]))[1] for prompt in prompts]
    model.set_use_attn_result(False)

    def own(patch: Patch) -> Patch:
        at = -1 if patch.head is None else (-1, patch.head)
        name = f"blocks.{patch.layer}.{SITES[patch.site]}"
        value = torch.stack([cache[name][0][at] for cache in caches])
        return Patch(patch.site, patch.layer, value, patch.head)

    patches = [own(patch) for patch in every_patch(model, 1, 7)]
    found = together(sweep_patches(model, prompts, answers, patches))
    assert far(found, found[..., :1].expand_as(found)) <= EXACT


def test_all_heads_of_a_layer_together_are_its_attention_output(exact, name) -> None:
    """The source's attention output is the source's heads: one patch of it is all of them at once."""
    model = exact[name]
    prompts, answers = case(model, 8, 3)
    source = ids_of(random.Random(5), 6, 6)
    _, cache = model.run_with_cache(torch.tensor([source]))
    for layer in range(model.cfg.n_layers):
        z = cache["z", layer][0, -1]
        patch = Patch("attn_out", layer, cache["attn_out", layer][0, -1])
        found = sweep_patches(model, prompts, answers, [patch])
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            hook = set_at(f"blocks.{layer}.attn.hook_z", len(prompt.ids) - 1, ..., z)
            wanted = answer_log_probs(model, prompt.ids, answer.ids[: answer.n_scored], [hook])
            assert far(found.whole[i, 0], wanted.mean()) <= EXACT


def test_z_and_result_are_the_same_patch(exact, name) -> None:
    model = exact[name]
    prompts, answers = case(model, 11)
    z = every_patch(model, len(prompts), 11, sites=["z"])
    result = [Patch("result", p.layer, p.value @ model.W_O[p.layer, p.head], p.head) for p in z]
    one, other = (together(sweep_patches(model, prompts, answers, side)) for side in (z, result))
    assert far(one, other) <= EXACT


def test_padding_never_matters(exact, name) -> None:
    """A pair alone, and among longer ones with longer answers."""
    model, rng = exact[name], random.Random(8)
    prompts = [Prompt("", tuple(ids_of(rng, n, n))) for n in (2, 3, 9, 20)]
    answers = [Answer("", tuple(rng.randrange(4, 96) for _ in range(n)), n) for n in (3, 7, 1, 2)]
    patches = every_patch(model, 4, 8)
    with batches_of(1e12):
        found = together(sweep_patches(model, prompts, answers, patches))
    for i in range(4):
        mine = [patch.of([i]) for patch in patches]
        alone = together(sweep_patches(model, prompts[i : i + 1], answers[i : i + 1], mine))
        assert far(found[:, i], alone[:, 0]) <= EXACT


def test_only_the_answers_text_is_scored(exact) -> None:
    """The end token is verified in decoding, but has no part in P(y|x)^(1/|y|)."""
    model = exact["llama"]
    prompts, _ = case(model, 6, n=1)
    patches = every_patch(model, 1, 6)
    bare, ended, more = (
        together(sweep_patches(model, prompts, [Answer("", ids, 2)], patches))
        for ids in ((10, 11), (10, 11, 2), (10, 11, 12, 13, 2))
    )
    assert far(bare, ended) <= EXACT
    assert far(bare, more) <= EXACT
    wanted = answer_log_probs(model, prompts[0].ids, [10, 11])
    assert far(bare[:, 0, 0], torch.stack([wanted.mean(), wanted[0]])) <= EXACT


def test_values_of_a_lower_precision_are_taken(exact) -> None:
    """A cache of a bfloat16 model, say, on a float32 one."""
    model = exact["llama"]
    prompts, answers = case(model, 8, n=2)
    patches = every_patch(model, 2, 8)
    lower = [Patch(p.site, p.layer, p.value.float(), p.head) for p in patches]
    one, other = (together(sweep_patches(model, prompts, answers, side)) for side in (patches, lower))
    assert far(one, other) <= 1e-5


def test_same_input_same_result(llama) -> None:
    prompts, answers = case(llama, 3)
    patches = every_patch(llama, len(prompts), 3)
    one, other = (together(sweep_patches(llama, prompts, answers, patches)) for _ in range(2))
    assert torch.equal(one, other)


def test_inference_mode_does_not_matter(exact) -> None:
    model = exact["llama"]
    prompts, answers = case(model, 3)
    patches = every_patch(model, len(prompts), 3)
    wanted = together(sweep_patches(model, prompts, answers, patches))
    with torch.inference_mode():
        assert far(together(sweep_patches(model, prompts, answers, patches)), wanted) <= EXACT


def test_foreign_hooks_are_refused(llama) -> None:
    prompts, answers = case(llama, 0)
    hook = set_at("blocks.0.attn.hook_z", -1, 0, torch.zeros(8))
    with llama.hooks(fwd_hooks=[hook]), pytest.raises(HookError, match="already carries hooks"):
        sweep_patches(llama, prompts, answers, every_patch(llama, 4, 0))


# --- where an architecture is not known -----------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_the_reference_equals_one_pass_per_patch(architectures, which) -> None:
    """Padded on both sides, all prompts in one pass a patch."""
    _, model = architectures(which)
    prompts, answers = case(model, 10, 3)
    patches = every_patch(model, 3, 10)
    found = reference.sweep(model, prompts, answers, patches)
    assert far(found, naive_scores(model, prompts, answers, patches)) <= EXACT
    assert model.cfg.use_attn_result is False


@pytest.mark.slow
def test_what_is_not_known_is_run_by_the_reference(exact, name, monkeypatch) -> None:
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return real(*args, **options)

    real = reference.sweep
    monkeypatch.setattr(reference, "sweep", counted)
    check(exact[name], exact[name], 4, sites=["z", "mlp_out"])
    assert calls == []
    monkeypatch.setattr(sweep_module, "supported", lambda model: False)
    check(exact[name], exact[name], 4, sites=["z", "mlp_out"])
    assert len(calls) == 1


# --- the same numbers with TransformerLens' other backend -----------------------------------------


@pytest.fixture(scope="module")
def bridges(hf_models, tokenizer, tmp_path_factory):
    """The same checkpoints as ``TransformerBridge``, read from disk."""
    made = {}
    for which, hf in hf_models.items():
        folder = tmp_path_factory.mktemp(which)
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[which] = TransformerBridge.boot_transformers(
            str(folder), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
        )
    return made


def test_the_bridge_gives_the_same_logits(loaded, bridges, name) -> None:
    ids = ids_of(random.Random(3), 9, 9)
    hook = set_at("blocks.1.attn.hook_z", 6, 2, torch.randn(8))
    for hooks in ([], [hook]):
        assert apart(forward(bridges[name], ids, hooks), forward(loaded[name], ids, hooks)) < 1e-5
    assert apart(forward(bridges[name], ids, [hook]), forward(bridges[name], ids)) > 1e-3


@pytest.mark.many
@pytest.mark.parametrize("site", ["z", "attn_out", "mlp_out"])
def test_the_sweep_equals_one_pass_of_the_bridge_a_patch(loaded, bridges, name, site) -> None:
    check(loaded[name], bridges[name], 1, single=True, sites=[site])


def test_hooks_of_a_patch_are_plain_ones(exact, name) -> None:
    """``Patch.hook`` on a batch is the naive hook on each of its prompts."""
    model, ids = exact[name], ids_of(random.Random(4), 8, 8)
    for patch in every_patch(model, 2, 12)[:20]:
        for row in range(2):
            one = forward(model, ids, [patch.of([row]).hook(5)])
            assert far(one, forward(model, ids, [patch_hook(patch, 5, row)])) == 0


@pytest.mark.parametrize(
    ("patch", "match"),
    [
        (Patch("z", 9, torch.zeros(8), 0), "layers 0 to 2"),
        (Patch("z", -1, torch.zeros(8), 0), "layers 0 to 2"),
        (Patch("result", 0, torch.zeros(32), 7), "heads 0 to 3"),
        (Patch("z", 0, torch.zeros(1), 0), r"shape \[1\]; give \[8\]"),
        (Patch("mlp_out", 0, torch.zeros(77, 32)), r"shape \[77, 32\]; give \[32\]"),
    ],
)
def test_patches_that_do_not_fit(llama, patch, match) -> None:
    prompts, answers = case(llama, 0)
    with pytest.raises(HookError, match=match):
        sweep_patches(llama, prompts, answers, [patch])
