"""Resuming behind a shared prefix computes what one whole, unpadded forward pass computes.

Bounds, on log probabilities: 1e-9 in float64. In float32 the two sum in another order; of logits of
5 to 30 with 7 digits that leaves up to 3e-5, which is as far as TransformerLens' own cached and
uncached passes are apart.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from checkpoints import CASES, make_model, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import answer_log_probs, greedy, ids_of, naive_hooks, random_intervention

import bkdlens
from bkdlens import resume as resume_module
from bkdlens.errors import HookError
from bkdlens.hooks import add_vector, intervention_hooks, set_heads, set_results
from bkdlens.prompts import Prompt
from bkdlens.resume import decode_runs, prefix_cache, resume, run_prefixes, run_tail, runs_per_batch
from bkdlens.tail import SITES, Groups, forward_tail, supported

EXACT, FLOAT32 = 1e-9, 5e-5


def prompts_of(rng: random.Random, n: int, low: int = 2, high: int = 14) -> list[Prompt]:
    return [Prompt("", tuple(ids_of(rng, low, high))) for _ in range(n)]


def answers_of(rng: random.Random, n: int, high: int = 5) -> list[list[int]]:
    return [[rng.randrange(3, 96) for _ in range(rng.randint(1, high))] for _ in range(n)]


def log_probs(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
    steps = logits[: len(answer)].double().log_softmax(-1)
    return steps[range(len(answer)), answer]


def random_hooks(model, rng: random.Random, n_runs: int, layer: int):
    """``build(position, runs)`` gives hooks at random sites from ``layer`` on, with a value a run."""
    cfg = model.cfg
    generator = torch.Generator().manual_seed(rng.randrange(2**30))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(n_runs, *shape, generator=generator).to(cfg.dtype)

    sites = [(i, site) for i in range(layer, cfg.n_layers) for site in SITES]
    chosen = []
    for i, site in rng.sample(sites, rng.randint(0, min(4, len(sites)))):
        if site == "attn.hook_result" and (i, "attn.hook_z") in [c[:2] for c in chosen]:
            continue
        width = {"attn.hook_z": cfg.d_head}.get(site, cfg.d_model)
        mask = torch.rand(n_runs, cfg.n_heads, generator=generator) < 0.4
        value = draw(width) if site.startswith("hook_") else draw(cfg.n_heads, width)
        chosen.append((i, site, value, mask))

    def build(position: int, runs):
        hooks = []
        for i, site, value, mask in chosen:
            if site.startswith("hook_"):
                function = add_vector(value[runs], position)
            else:
                factory = set_heads if site == "attn.hook_z" else set_results
                function = factory(value[runs], mask[runs], position)
            hooks.append((f"blocks.{i}.{site}", function))
        return hooks

    return build


def check(model, seed: int, bound: float) -> None:
    """Random prompts, answers, runs and hooks: fast, through hooks, and one whole pass a run."""
    rng = random.Random(seed)
    n = rng.randint(1, 4)
    prompts, answers = prompts_of(rng, n), answers_of(rng, n)
    layer = rng.randrange(model.cfg.n_layers)
    (prefix,) = run_prefixes(model, prompts)
    tail = run_tail(model, prefix, [answers[i] for i in prefix.rows])
    rows = torch.tensor([rng.randrange(n) for _ in range(rng.randint(1, 6))])
    build = random_hooks(model, rng, len(rows), layer)
    everything = torch.arange(len(rows))
    assert supported(model, [name for name, _ in build(0, everything)])
    fast = resume(model, tail, rows, layer, build(0, everything))
    slow = resume(model, tail, rows, layer, build(0, everything), through_hooks=True)
    for run, row in enumerate(rows.tolist()):
        prompt, answer = prompts[prefix.rows[row]].ids, answers[prefix.rows[row]]
        hooks = build(len(prompt) - 1, torch.tensor([run]))
        wanted = answer_log_probs(model, prompt, answer, hooks)
        for logits in (fast, slow):
            assert float((log_probs(logits[run], answer) - wanted).abs().max()) <= bound
    for row in range(n):
        wanted = answer_log_probs(model, prompts[prefix.rows[row]].ids, answers[prefix.rows[row]])
        found = log_probs(tail.logits[row], answers[prefix.rows[row]])
        assert float((found - wanted).abs().max()) <= bound


@pytest.fixture(scope="module")
def zoo_of_architectures():
    """One HookedTransformer of every architecture and variant, with its own float64 copy."""
    made: dict = {}

    def get(case: str):
        if case not in made:
            model = bkdlens.load(make_model(case), tokenizer=make_tokenizer(), device="cpu")
            made[case] = model, copy.deepcopy(model).to(torch.float64, print_details=False)
        return made[case]

    return get


@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_resuming_equals_whole_passes(exact, which, seed) -> None:
    check(exact[which], seed, EXACT)


@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_resuming_equals_whole_passes_in_float32(loaded, which) -> None:
    for seed in range(6):
        check(loaded[which], seed, FLOAT32)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture(zoo_of_architectures, case) -> None:
    """Softcaps, local windows shorter than the prompts, learned positions, parallel blocks."""
    single, double = zoo_of_architectures(case)
    for seed in range(4):
        check(double, seed, EXACT)
    check(single, 5, FLOAT32)


@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_padding_never_matters(exact, which) -> None:
    """A prompt alone, and among longer ones, with a longer answer beside its own."""
    model, rng = exact[which], random.Random(8)
    prompts = [Prompt("", tuple(ids_of(rng, n, n))) for n in (2, 3, 9, 20)]
    answers = [[rng.randrange(3, 96) for _ in range(n)] for n in (3, 7, 1, 2)]
    (prefix,) = run_prefixes(model, prompts)
    tail = run_tail(model, prefix, [answers[i] for i in prefix.rows])
    build = random_hooks(model, rng, len(prompts), 1)
    together = resume(model, tail, torch.arange(4), 1, build(0, torch.tensor(prefix.rows)))
    for place, i in enumerate(prefix.rows):
        (alone,) = run_prefixes(model, [prompts[i]])
        own = run_tail(model, alone, [answers[i]])
        n = len(answers[i])
        assert torch.allclose(tail.logits[place, :n], own.logits[0], atol=EXACT)
        single = resume(model, own, torch.tensor([0]), 1, build(0, torch.tensor([i])))
        assert torch.allclose(together[place, :n], single[0], atol=EXACT)


def test_prefixes_go_in_batches_of_similar_length(llama, monkeypatch) -> None:
    rng = random.Random(2)
    prompts = prompts_of(rng, 9, 2, 20)
    monkeypatch.setattr(resume_module, "PREFIX_TOKENS", 30)
    prefixes = run_prefixes(llama, prompts)
    assert len(prefixes) > 2
    assert sorted(i for prefix in prefixes for i in prefix.rows) == list(range(9))
    for prefix in prefixes:
        assert len(prefix) == len(prefix.rows)
        for place, i in enumerate(prefix.rows):
            assert int(prefix.last[place]) == prompts[i].ids[-1]
            assert int(prefix.mask[place].sum()) == len(prompts[i].ids) - 1


@given(st.integers(0, 2**30))
def test_only_the_first_positions(exact, seed) -> None:
    model, rng = exact["llama"], random.Random(seed)
    prompts = prompts_of(rng, 2)
    (prefix,) = run_prefixes(model, prompts)
    tail = run_tail(model, prefix, answers_of(rng, 2))
    build = random_hooks(model, rng, 2, 0)
    hooks = build(0, torch.arange(2))
    whole = resume(model, tail, torch.arange(2), 0, hooks)
    for through in (False, True):
        first = resume(model, tail, torch.arange(2), 0, hooks, width=1, through_hooks=through)
        assert torch.allclose(first, whole[:, :1], atol=EXACT)


def test_two_hooks_at_one_point_both_act(exact) -> None:
    """The shared-prefix pass has one a point, so TransformerLens' own is taken."""
    model, rng = exact["llama"], random.Random(0)
    prompts, answers = prompts_of(rng, 2), [[10, 11], [12, 13]]
    (prefix,) = run_prefixes(model, prompts)
    tail = run_tail(model, prefix, [answers[i] for i in prefix.rows])
    name, ones = "blocks.1.hook_resid_pre", torch.ones(32, dtype=torch.float64)
    both = resume(model, tail, torch.arange(2), 1, [(name, add_vector(ones, 0))] * 2)
    once = resume(model, tail, torch.arange(2), 1, [(name, add_vector(2 * ones, 0))])
    assert torch.allclose(both, once, atol=EXACT)


def test_other_hook_points_are_reached_through_hooks(exact) -> None:
    model, rng = exact["qwen"], random.Random(1)
    prompt, answer = prompts_of(rng, 1)[0], [10, 11, 12]
    value = torch.randn(32, dtype=torch.float64)
    name = "blocks.1.hook_mlp_out"
    assert not supported(model, [name])
    (prefix,) = run_prefixes(model, [prompt])
    tail = run_tail(model, prefix, [answer])
    logits = resume(model, tail, torch.tensor([0]), 1, [(name, add_vector(value, 0))])
    wanted = answer_log_probs(
        model, prompt.ids, answer, [(name, add_vector(value, len(prompt.ids) - 1))]
    )
    assert torch.allclose(log_probs(logits[0], answer), wanted, atol=EXACT)


def test_a_hook_below_the_start_is_an_error(llama) -> None:
    (prefix,) = run_prefixes(llama, prompts_of(random.Random(0), 1))
    tail = run_tail(llama, prefix, [[10]])
    hooks = [("blocks.0.hook_resid_pre", add_vector(torch.ones(32), 0))]
    for through in (False, True):
        with pytest.raises(HookError, match=r"blocks.0.hook_resid_pre never acted"):
            resume(llama, tail, torch.tensor([0]), 1, hooks, through_hooks=through)


def test_the_tail_may_come_in_pieces(exact) -> None:
    """As decoding does: the keys and values of the pieces so far are kept."""
    model, rng = exact["qwen"], random.Random(6)
    prompts = prompts_of(rng, 3)
    (prefix,) = run_prefixes(model, prompts)
    tail = run_tail(model, prefix, [[rng.randrange(3, 96) for _ in range(6)] for _ in range(3)])
    rows, past, pieces = torch.tensor([2, 0, 1, 0]), {}, []
    start = tail.resid[0][rows]
    with torch.inference_mode():
        whole = forward_tail(model, prefix, rows, start, 0, {})
        for piece in start.split([1, 2, 3], dim=1):
            pieces.append(forward_tail(model, prefix, rows, piece, 0, {}, past))
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=EXACT)


def test_positions_past_the_first_rotary_table(tokenizer) -> None:
    """TransformerLens makes a table for 2048 positions and extends it on demand."""
    hf = make_model("llama-gqa", num_hidden_layers=1, max_position_embeddings=4096)
    model = bkdlens.load(hf, tokenizer=tokenizer, device="cpu")
    rows = model.blocks[0].attn.rotary_cos.shape[0]
    prompt = ids_of(random.Random(0), rows - 1, rows - 1)
    answer = [10, 11, 12, 13, 14]
    (prefix,) = run_prefixes(model, [Prompt("", tuple(prompt))])
    tail = run_tail(model, prefix, [answer])
    assert model.blocks[0].attn.rotary_cos.shape[0] > rows
    wanted = answer_log_probs(model, prompt, answer)
    assert torch.allclose(log_probs(tail.logits[0], answer), wanted, atol=FLOAT32)


# --- decoding -------------------------------------------------------------------------------------


def check_decoding(model, seed: int, max_new_tokens: int = 5) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 4)
    prompts = prompts_of(rng, n)
    interventions = [random_intervention(model, rng, n) for _ in range(2)]
    (prefix,) = run_prefixes(model, prompts)
    hooks = intervention_hooks(model, interventions, n, 0, rows=prefix.rows)
    rows = torch.arange(n).repeat(2)
    found = decode_runs(model, prefix, rows, hooks, max_new_tokens)
    for run, tokens in enumerate(found):
        row = prefix.rows[run % n]
        prompt = prompts[row].ids
        naive = naive_hooks(interventions[run // n], len(prompt) - 1, row)
        assert tokens == greedy(model, prompt, naive, max_new_tokens)


@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_decoding_equals_plain_greedy(loaded, which, seed) -> None:
    check_decoding(loaded[which], seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_decoding_through_hooks_equals_plain_greedy(loaded, which, seed, monkeypatch) -> None:
    monkeypatch.setattr(resume_module, "supported", lambda model, names: False)
    check_decoding(loaded[which], seed)


@pytest.mark.parametrize("case", CASES)
def test_decoding_of_every_architecture(zoo_of_architectures, case) -> None:
    """With windows shorter than prompt and answer together."""
    check_decoding(zoo_of_architectures(case)[0], 3, max_new_tokens=8)


@pytest.mark.parametrize("through", [False, True])
def test_decoding_stops_where_the_context_is_full(loaded, monkeypatch, through) -> None:
    model, rng = loaded["llama"], random.Random(12)
    endless = copy.deepcopy(model.tokenizer)
    endless.eos_token = "w95"  # which never comes, so that nothing else ends a row
    monkeypatch.setattr(model, "tokenizer", endless)
    if through:
        monkeypatch.setattr(resume_module, "supported", lambda model, names: False)
    n_ctx = model.cfg.n_ctx
    prompts = [Prompt("", tuple(ids_of(rng, n, n))) for n in (n_ctx - 1, n_ctx - 4, n_ctx - 30)]
    (prefix,) = run_prefixes(model, prompts)
    found = decode_runs(model, prefix, torch.arange(3), [], 12)
    lengths = {prefix.rows[i]: len(tokens) for i, tokens in enumerate(found)}
    assert lengths == {0: 1, 1: 4, 2: 12}


# --- the small parts ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_groups_find_every_run_again(rows) -> None:
    rows = torch.tensor(rows)
    groups = Groups.of(rows)
    assert torch.equal(groups.prompts, rows.unique())
    assert groups.runs.shape == (len(rows.unique()), int(rows.bincount().max()))
    assert torch.equal(groups.runs.flatten()[groups.place], torch.arange(len(rows)))
    assert torch.equal(rows[groups.runs], groups.prompts[:, None].expand_as(groups.runs))


def test_only_what_is_computed_is_supported(llama) -> None:
    assert supported(llama, [f"blocks.2.{site}" for site in SITES])
    assert not supported(llama, ["blocks.0.attn.hook_q"])
    other = copy.deepcopy(llama)
    other.cfg.positional_embedding_type = "alibi"
    assert not supported(other, [])


def test_prefix_caches_are_given_from_the_first_layer_on(llama) -> None:
    (prefix,) = run_prefixes(llama, prompts_of(random.Random(0), 2))
    cache = prefix_cache(llama, prefix, torch.tensor([1, 0, 1]), first_layer=2, frozen=True)
    assert [entry.past_keys.shape[1] for entry in cache.entries] == [0, 0, prefix.mask.shape[1]]
    assert cache.frozen
    assert torch.equal(cache.entries[2].past_keys[1], prefix.keys[2][0])


def test_runs_per_batch_shrinks_with_length(llama) -> None:
    sizes = [runs_per_batch(llama, length, 4) for length in (4, 40, 400)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    assert runs_per_batch(llama, 4, 4, budget_bytes=1) == 1
