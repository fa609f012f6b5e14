"""A block as plain matrix products computes what TransformerLens' own block computes, hook by hook.

Bounds: 1e-10 in float64, relative to the largest value.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from checkpoints import CASES, make_model
from hypothesis import given
from hypothesis import strategies as st
from tiny import answer_log_probs, apart, ids_of
from transformer_lens.utils import get_act_name

import bkdlens
from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines import block as blocks
from bkdlens.engines.block import NOWHERE, Groups, Keys, attend, seen, supported
from bkdlens.engines.hooks import Patch
from bkdlens.engines.prefix import run_prefix
from bkdlens.engines.sweep import sweep_patches
from bkdlens.errors import HookError

EXACT, FLOAT32 = 1e-10, 5e-5


def walk(model, ids: list[int]) -> dict[str, torch.Tensor]:
    """Every activation of one sequence, by the name of TransformerLens' hook point."""
    tokens = torch.tensor([ids])
    at = torch.arange(len(ids))[None]
    resid, out = blocks.embed(model, tokens, at), {}
    for layer, block in enumerate(model.blocks):
        here = f"blocks.{layer}."
        out[here + "hook_resid_pre"] = resid.clone()
        q, keys = blocks.project(block, resid, at)
        rotary = model.cfg.positional_embedding_type == "rotary"
        out[here + f"attn.hook_{'rot_' if rotary else ''}q"] = q * block.attn.attn_scale
        out[here + f"attn.hook_{'rot_' if rotary else ''}k"] = keys.keys.transpose(1, 2)
        out[here + "attn.hook_v"] = keys.values.transpose(1, 2)
        z = blocks.attend_causally(block.attn, q, keys)
        out[here + "attn.hook_z"] = z
        attention = blocks.post_norm(block, blocks.attention_out(block, z))
        out[here + "hook_attn_out"] = attention
        middle = resid if model.cfg.parallel_attn_mlp else resid + attention
        out[here + "hook_mlp_out"] = mlp = blocks.mlp_out(block, middle)
        if torch.is_grad_enabled():
            resid = resid + attention + mlp
        else:
            resid = blocks.finish_block(block, resid, attention)
        out[here + "hook_resid_post"] = resid.clone()
    return out | {"logits": blocks.unembed(model, resid)}


@pytest.mark.many
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_activation_is_transformerlens_own(architectures, case, grad) -> None:
    """In every architecture, with gradients (nothing in place) and without."""
    _, model = architectures(case)
    ids = ids_of(random.Random(1), 13, 13)
    with torch.set_grad_enabled(grad):
        found = walk(model, ids)
    with torch.no_grad():
        logits, wanted = model.run_with_cache(torch.tensor([ids]))
    assert apart(found.pop("logits"), logits) <= EXACT
    assert len(found) == 8 * model.cfg.n_layers
    for name, value in found.items():
        assert apart(value, wanted[name]) <= EXACT, name


@pytest.mark.many
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_whole_block_is_transformerlens_own(architectures, case, in_place) -> None:
    """Two whole sequences behind prompts without a token; what is touched goes on."""
    _, model = architectures(case)
    cfg, rng = model.cfg, random.Random(2)
    tokens = torch.tensor([ids_of(rng, 9, 9) for _ in range(2)])
    at, groups = torch.arange(9).repeat(2, 1), Groups.of(torch.tensor([0, 1]))
    none = torch.zeros(2, cfg.n_key_value_heads or cfg.n_heads, 0, cfg.d_head, dtype=torch.float64)
    empty, sites = Keys(none, none, torch.zeros(2, 0, dtype=torch.long)), ("resid_pre", "z", "attn_out")
    sites = sites if in_place else (*sites, "mlp_out")  # in place it never is a tensor of its own

    def turned(activation, hook=None):
        return -activation

    for changed in (None, *sites):
        found: dict[str, torch.Tensor] = {}
        resid = blocks.embed(model, tokens, at)
        for layer, block in enumerate(model.blocks):

            def touch(site, activation, layer=layer, found=found, changed=changed):
                activation = turned(activation) if (site, layer) == (changed, 1) else activation
                found[get_act_name(site, layer)] = activation.clone()
                return activation

            resid = blocks.run_block(block, resid, at, empty, groups, touch=touch, in_place=in_place)
        hooks = [] if changed is None else [(get_act_name(changed, 1), turned)]
        with model.hooks(fwd_hooks=hooks), torch.no_grad():
            logits, wanted = model.run_with_cache(tokens)
        assert apart(blocks.unembed(model, resid), logits) <= EXACT
        names = {name for name in found if "result" not in name}
        assert names == {get_act_name(site, i) for site in sites for i in range(cfg.n_layers)}
        assert all(apart(found[name], wanted[name]) <= EXACT for name in names)


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_rows_do_not_matter(architectures, case, monkeypatch) -> None:
    """The MLP and the logits are computed for few rows at a time."""
    _, model = architectures(case)
    resid = torch.randn(5, 3, 32, dtype=torch.float64)
    attention, targets = torch.randn_like(resid), torch.randint(0, 96, (5,))

    @torch.no_grad()
    def compute() -> list[torch.Tensor]:
        return [
            blocks.finish_block(model.blocks[1], resid.clone(), attention),
            blocks.log_probs(model, resid[:, 0], targets),
            blocks.next_tokens(model, resid).double(),
        ]

    whole = compute()
    monkeypatch.setattr(blocks, "MLP_BYTES", 1)
    monkeypatch.setattr(blocks, "LOGIT_BYTES", 1)
    for part, wanted in zip(compute(), whole, strict=True):
        assert apart(part, wanted) <= EXACT
    logits = blocks.unembed(model, resid)
    assert apart(whole[1], logits[:, 0].log_softmax(-1)[range(5), targets]) <= EXACT
    assert torch.equal(whole[2].long(), logits.argmax(-1))


# --- attention behind shared prompts --------------------------------------------------------------


def naive_z(attn, q, keys, values, position: int, at: list[int]) -> torch.Tensor:
    """One query of every head, ``[head d_head]``; keys and values are ``[kv key d_head]``."""
    width = attn.cfg.window_size if attn.attn_type == "local" else None
    out = []
    for head in range(len(q)):
        kv = head * len(keys) // len(q)
        scores = []
        for key, where in zip(keys[kv], at, strict=True):
            score, cap = q[head] @ key, attn.cfg.attn_scores_soft_cap
            if cap > 0:
                score = cap * torch.tanh(score / cap)
            unseen = where > position or (width is not None and where <= position - width)
            scores.append(torch.tensor(-torch.inf).double() if unseen else score)
        out.append(torch.stack(scores).softmax(0) @ values[kv])
    return torch.stack(out)


@pytest.mark.slow
@given(st.integers(0, 2**30), st.sampled_from(["llama-mha", "llama-gqa", "mistral-window", "gemma2"]))
def test_attend_is_attention_over_both_parts(architectures, seed, case) -> None:
    """Runs of prompts in any order and number, prompts without runs, padding on the prompts' right."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    attn = rng.choice(list(architectures(case)[1].blocks)).attn
    kv, heads, d = attn.cfg.n_key_value_heads or attn.cfg.n_heads, attn.cfg.n_heads, attn.cfg.d_head
    n, width, length = rng.randint(1, 4), rng.randint(1, 8), rng.randint(1, 4)
    rows = torch.tensor([rng.randrange(n) for _ in range(rng.randint(1, 7))])
    lengths = [rng.randint(1, width) for _ in range(n)]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    far_k, far_v = draw(n, kv, width, d), draw(n, kv, width, d)
    more = rng.randint(0, 2)  # keys of the run's own that are there already
    near_k, near_v = draw(len(rows), kv, more + length, d), draw(len(rows), kv, more + length, d)
    q = draw(len(rows), length, heads, d)
    far_at = torch.tensor([[p if p < m else NOWHERE for p in range(width)] for m in lengths])
    near_at = torch.tensor([[lengths[r] + i for i in range(more + length)] for r in rows.tolist()])
    near, far = Keys(near_k, near_v, near_at), Keys(far_k, far_v, far_at)
    z = attend(attn, q, near_at[:, more:], near, far, Groups.of(rows))
    for run, row in enumerate(rows.tolist()):
        m = lengths[row]
        keys, values = (
            torch.cat([far[row, :, :m], near[run]], dim=1)
            for far, near in ((far_k, near_k), (far_v, near_v))
        )
        for i in range(length):
            position = m + more + i
            wanted = naive_z(attn, q[run, i], keys, values, position, [*range(m + more + length)])
            assert apart(z[run, i], wanted) <= EXACT


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_groups_find_every_run_again(rows) -> None:
    rows = torch.tensor(rows)
    groups = Groups.of(rows)
    assert torch.equal(groups.prompts, rows.unique())
    assert groups.runs.shape == (len(rows.unique()), int(rows.bincount().max()))
    assert torch.equal(groups.runs.flatten()[groups.place], torch.arange(len(rows)))
    assert torch.equal(rows[groups.runs], groups.prompts[:, None].expand_as(groups.runs))


@given(st.integers(0, 9), st.integers(0, 9), st.one_of(st.none(), st.integers(1, 6)))
def test_a_query_sees_itself_and_so_many_before_it(query, key, width) -> None:
    found = bool(seen(torch.tensor([query]), torch.tensor([key]), width)[0])
    assert found == (key in range(0 if width is None else query - width + 1, query + 1))
    assert not bool(seen(torch.tensor([query]), torch.tensor([NOWHERE]), width)[0])


# --- what is known, and where tables end ----------------------------------------------------------


def test_only_what_is_computed_is_supported(architectures, llama) -> None:
    assert all(supported(architectures(case)[0]) for case in CASES)
    for change in ("positional_embedding_type", "original_architecture", "attn_only"):
        other = copy.deepcopy(llama)
        setattr(other.cfg, change, {"attn_only": True}.get(change, "alibi"))
        assert not supported(other)


def test_positions_past_the_first_rotary_table(tokenizer) -> None:
    """TransformerLens makes a table for 2048 positions and extends it on demand."""
    hf = make_model("llama-gqa", num_hidden_layers=1, max_position_embeddings=4096)
    model = bkdlens.load(hf, tokenizer=tokenizer, device="cpu")
    rows = model.blocks[0].attn.rotary_cos.shape[0]
    prompt = Prompt("", tuple(ids_of(random.Random(0), rows - 1, rows - 1)))
    answer = Answer("", (10, 11, 12, 13, 14), 5)
    scores = sweep_patches(model, [prompt], [answer], [])
    assert model.blocks[0].attn.rotary_cos.shape[0] > rows
    wanted = answer_log_probs(model, prompt.ids, answer.ids).mean()
    assert float((scores.base_whole[0] - wanted).abs()) <= FLOAT32


def test_half_precision_scores_are_float32(llama) -> None:
    """Weights may be bfloat16; softmax and log probabilities never are."""
    model = copy.deepcopy(llama).to(torch.bfloat16, print_details=False)
    prompt, answer = Prompt("", (1, 10, 11, 12)), Answer("", (13, 14), 2)
    scores = sweep_patches(model, [prompt], [answer], [Patch("z", 1, torch.zeros(8), 2)])
    assert scores.whole.dtype == scores.base_first.dtype == torch.float32
    exact = sweep_patches(llama, [prompt], [answer], [Patch("z", 1, torch.zeros(8), 2)])
    assert float((scores.whole - exact.whole).abs()) < 0.3  # of -5 or so, with 3 digits
    assert run_prefix(model, [prompt]).layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("head", [None, 1])
@pytest.mark.parametrize("site", ["z", "result", "attn_out", "mlp_out"])
def test_a_patch_names_a_head_where_there_is_one(site, head) -> None:
    if (head is None) == (site in ("z", "result")):
        with pytest.raises(HookError, match=f"patch of {site} takes (a|no) head"):
            Patch(site, 0, torch.zeros(8), head)
    else:
        assert Patch(site, 0, torch.zeros(8), head).of([1]).value.shape == (8,)
        each = Patch(site, 0, torch.arange(24.0).view(3, 8), head)
        assert torch.equal(each.of([2, 0]).value, each.value[[2, 0]])
