"""The exact head sweep equals one naive, unpadded forward pass a run.

Bounds: in float64 1e-6 on probabilities and 1e-5 on their logarithms, of -1 to -20 (the scores are
kept in float32); in float32 ten times as much.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import answer_log_probs, apart, forward, ids_of, set_at
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from bkdlens import resume as resume_module
from bkdlens.errors import HookError
from bkdlens.prompts import Answer, Prompt
from bkdlens.sweep import all_runs, sweep_heads

EXACT, FLOAT32 = 1e-6, 1e-5


def case(model, seed: int, n: int = 4):
    """Prompts and answers of many lengths; the end token of an answer is not scored."""
    rng = random.Random(seed)
    prompts = [Prompt("", tuple(ids_of(rng, 2, 16))) for _ in range(n)]
    answers = []
    for _ in range(n):
        ids = [rng.randrange(4, 96) for _ in range(rng.randint(1, 5))]
        end = [2] * rng.randint(0, 1)
        answers.append(Answer("", (*ids, *end), len(ids)))
    generator = torch.Generator().manual_seed(seed)
    cfg = model.cfg
    values = torch.randn(n, cfg.n_layers, cfg.n_heads, cfg.d_head, generator=generator)
    return prompts, answers, values.to(cfg.dtype)


def naive(model, prompt: Prompt, answer: Answer, hooks=()) -> torch.Tensor:
    """Probability of the answer and of its first token: one pass over prompt and answer."""
    found = answer_log_probs(model, prompt.ids, answer.ids[: answer.n_scored], hooks)
    return torch.stack([found.mean(), found[0]]).exp()


def assert_close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert float((found - wanted).abs().max()) <= bound
    assert float((found.log() - wanted.log()).abs().max()) <= 10 * bound


def check(model, oracle, seed: int, bound: float, **options) -> None:
    """All heads of all pairs against ``oracle``, which may be another backend."""
    prompts, answers, values = case(model, seed)
    n, cfg = len(prompts), model.cfg
    runs = all_runs(n, cfg.n_layers, cfg.n_heads)
    shared = seed % 2 == 0
    scores = sweep_heads(model, prompts, answers, runs, values[0] if shared else values, **options)
    wanted = []
    for pair, layer, head in runs.tolist():
        value = values[0 if shared else pair, layer, head]
        hook = set_at(f"blocks.{layer}.attn.hook_z", len(prompts[pair].ids) - 1, head, value)
        wanted.append(naive(oracle, prompts[pair], answers[pair], [hook]))
    found = torch.stack([scores.whole, scores.first], dim=1).double().exp()
    assert_close(found, torch.stack(wanted), bound)
    bases = torch.stack([naive(oracle, *pair) for pair in zip(prompts, answers, strict=True)])
    found = torch.stack([scores.base_whole, scores.base_first], dim=1).double().exp()
    assert_close(found, bases, bound)
    effects = scores.whole.view(n, -1) - scores.base_whole[:, None]
    assert float((effects.abs() > 0.01).double().mean()) > 0.8  # the patches matter


@pytest.mark.parametrize("site", ["z", "result"])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_equals_one_pass_a_head(exact, name, site, seed) -> None:
    """Shared values (even seeds) and values a pair (odd ones)."""
    check(exact[name], exact[name], seed, EXACT, site=site)


@pytest.mark.parametrize("seed", [2, 3])
def test_it_equals_one_pass_a_head_in_float32(model, seed) -> None:
    check(model, model, seed, FLOAT32)


def test_it_equals_one_pass_a_head_through_hooks(exact, name, monkeypatch) -> None:
    """Where the shared-prefix pass does not know an architecture."""
    monkeypatch.setattr(resume_module, "supported", lambda model, names: False)
    check(exact[name], exact[name], 4, EXACT)


@given(st.integers(0, 2**30))
def test_any_runs_in_any_order_and_batch(exact, seed) -> None:
    """Subsets, orders, repetitions and batch sizes give what the whole sweep gives."""
    rng = random.Random(seed)
    model = exact[rng.choice(["llama", "qwen"])]
    prompts, answers, values = case(model, seed % 3)
    shape = (len(prompts), model.cfg.n_layers, model.cfg.n_heads)
    whole = sweep_heads(model, prompts, answers, all_runs(*shape), values)
    some = torch.tensor([[rng.randrange(n) for n in shape] for _ in range(rng.randint(1, 30))])
    site, size = rng.choice(["z", "result"]), rng.choice([None, 1, 2, 7, 100])
    scores = sweep_heads(model, prompts, answers, some, values, site=site, batch_size=size)
    index = (some[:, 0] * shape[1] + some[:, 1]) * shape[2] + some[:, 2]
    assert torch.allclose(scores.whole, whole.whole[index], atol=EXACT)
    assert torch.allclose(scores.first, whole.first[index], atol=EXACT)
    used = some[:, 0].unique()
    assert torch.allclose(scores.base_whole[used], whole.base_whole[used], atol=EXACT)


def test_prompts_in_several_prefix_batches(exact, monkeypatch) -> None:
    model = exact["qwen"]
    prompts, answers, values = case(model, 7, n=6)
    runs = all_runs(6, model.cfg.n_layers, model.cfg.n_heads)
    runs = runs[torch.randperm(len(runs))]
    whole = sweep_heads(model, prompts, answers, runs, values)
    monkeypatch.setattr(resume_module, "PREFIX_TOKENS", 25)
    parts = sweep_heads(model, prompts, answers, runs, values, batch_size=5)
    assert torch.allclose(parts.whole, whole.whole, atol=EXACT)
    assert torch.allclose(parts.base_whole, whole.base_whole, atol=EXACT)


def test_pairs_without_runs_have_no_base(llama, monkeypatch) -> None:
    """Not a log probability of 0, which would be a certain answer."""
    monkeypatch.setattr(resume_module, "PREFIX_TOKENS", 1)  # every prompt in a batch of its own
    prompts, answers, values = case(llama, 0)
    scores = sweep_heads(llama, prompts, answers, torch.tensor([[1, 0, 0]]), values)
    assert scores.base_whole.isnan().tolist() == [True, False, True, True]


def test_a_heads_own_activation_changes_nothing(exact, name) -> None:
    model = exact[name]
    prompts, answers, _ = case(model, 5)
    cfg = model.cfg
    own = []
    for prompt in prompts:
        _, cache = model.run_with_cache(torch.tensor([prompt.ids]))
        own.append(torch.stack([cache["z", layer][0, -1] for layer in range(cfg.n_layers)]))
    for site in ("z", "result"):
        runs = all_runs(len(prompts), cfg.n_layers, cfg.n_heads)
        scores = sweep_heads(model, prompts, answers, runs, torch.stack(own), site=site)
        for out, base in ((scores.whole, scores.base_whole), (scores.first, scores.base_first)):
            same = base[runs[:, 0]]
            assert torch.allclose(out, same, atol=EXACT)


def test_only_the_answers_text_is_scored(exact) -> None:
    """The end token is verified in decoding, but has no part in P(y|x)^(1/|y|)."""
    model = exact["llama"]
    prompts, _, values = case(model, 6, n=1)
    runs = all_runs(1, 2, 2)
    bare, ended = (
        sweep_heads(model, prompts, [Answer("", ids, 2)], runs, values)
        for ids in ((10, 11), (10, 11, 2))
    )
    assert torch.allclose(bare.whole, ended.whole, atol=EXACT)
    wanted = answer_log_probs(model, prompts[0].ids, [10, 11]).mean()
    assert float(bare.base_whole[0]) == pytest.approx(float(wanted), abs=1e-5)


def test_values_of_a_lower_precision_are_taken(exact) -> None:
    """A cache of a bfloat16 model, say, on a float32 one."""
    model = exact["llama"]
    prompts, answers, values = case(model, 8, n=2)
    runs = all_runs(2, 3, 4)
    scores = sweep_heads(model, prompts, answers, runs, values.float())
    assert torch.allclose(
        scores.whole, sweep_heads(model, prompts, answers, runs, values).whole, atol=1e-5
    )


def test_all_runs_is_the_order_of_a_tensor() -> None:
    runs = all_runs(2, 3, 4)
    grid = torch.arange(24).view(2, 3, 4)
    assert [int(grid[tuple(run)]) for run in runs] == list(range(24))


def test_foreign_hooks_are_refused(llama) -> None:
    prompts, answers, values = case(llama, 0)
    hook = set_at("blocks.0.attn.hook_z", -1, 0, torch.zeros(8))
    with llama.hooks(fwd_hooks=[hook]), pytest.raises(HookError, match="already carries hooks"):
        sweep_heads(llama, prompts, answers, all_runs(4, 3, 4), values)


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


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sweep_equals_one_pass_of_the_bridge_a_head(loaded, bridges, name, seed) -> None:
    check(loaded[name], bridges[name], seed, FLOAT32)
