"""The prompts' prefixes hold what TransformerLens' key-value cache holds, shared beginning or not."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import CASES
from hypothesis import given
from hypothesis import strategies as st
from tiny import apart, ids_of, prompts_of
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from bkdlens.data.prompts import Prompt
from bkdlens.engines.block import NOWHERE
from bkdlens.engines.prefix import common_length, run_common, run_prefix

EXACT = 1e-10


def kept(model, ids) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys (rotated) and values of one sequence by layer, ``[pos kv_head d_head]``."""

    def rotated(layer: int, keys: torch.Tensor) -> torch.Tensor:
        """TransformerLens keeps the keys as they are before that."""
        rotary = model.cfg.positional_embedding_type == "rotary"
        return model.blocks[layer].attn.apply_rotary(keys, 0) if rotary else keys

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, 1)
    with torch.no_grad():
        model(torch.tensor([list(ids)]), past_kv_cache=cache)
    return [(rotated(i, e.past_keys)[0], e.past_values[0]) for i, e in enumerate(cache.entries)]


def check(model, prompts, bound: float = EXACT, common: bool = True) -> None:
    """All but the last token of every prompt, against one unpadded run a prompt."""
    prefix = run_prefix(model, prompts, run_common(model, prompts) if common else None)
    assert len(prefix) == len(prompts)
    for i, prompt in enumerate(prompts):
        n = len(prompt.ids) - 1
        assert int(prefix.lengths[i]) == n
        assert int(prefix.last[i]) == prompt.ids[-1]
        assert all(keys.at[i, :n].tolist() == list(range(n)) for keys in prefix.layers)
        assert all(bool((keys.at[i, n:] == NOWHERE).all()) for keys in prefix.layers)
        for layer, (keys, values) in enumerate(kept(model, prompt.ids[:-1])):
            found = prefix.layers[layer]
            assert apart(found.keys[i, :, :n].transpose(0, 1), keys) <= bound
            assert apart(found.values[i, :, :n].transpose(0, 1), values) <= bound


@pytest.mark.parametrize("common", [0, 9])
@pytest.mark.parametrize("case", CASES)
def test_it_is_transformerlens_own_cache(architectures, case, common) -> None:
    """With and without a shared beginning, which is longer than the windows."""
    _, model = architectures(case)
    check(model, prompts_of(random.Random(2), 4, 2, 14, common))


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(4, 6), min_size=1, max_size=6), min_size=1, max_size=5))
def test_any_prompts(exact, rows) -> None:
    """Of three tokens, so that many begin alike, are identical, or are the beginning of another."""
    model, prompts = exact["qwen"], [Prompt("", (1, *row)) for row in rows]
    check(model, prompts)
    alike = 0
    while all(len(p.ids) > alike + 2 for p in prompts) and len({p.ids[alike] for p in prompts}) == 1:
        alike += 1
    assert common_length(prompts) == alike
    common = run_common(model, prompts)
    if len(prompts) == 1 or alike == 0:
        assert common is None
    else:
        assert common is not None
        assert common.lengths.tolist() == [alike]


def test_prompts_that_begin_alike(exact, name) -> None:
    """One alone, identical ones, one the beginning of another, the shortest there are."""
    model, rng = exact[name], random.Random(4)
    long = ids_of(rng, 12, 12)
    for rows in (
        [long],
        [long, long, long],
        [long, long[:7], long[:8]],
        [long, long[:2]],
        [long[:2], long[:2]],
        [long, [*long[:-1], 9]],
        [[*long[:1], *ids_of(rng, 5, 5)], long],
    ):
        check(model, [Prompt("", tuple(row)) for row in rows])


@pytest.mark.parametrize("common", [0, 6])
def test_right_padding_never_matters(exact, name, common) -> None:
    """A prompt alone and among longer ones; with the shared beginning and without."""
    model = exact[name]
    prompts = prompts_of(random.Random(7), 5, 2, 20, common)
    shared = run_common(model, prompts)
    assert shared is not None  # the BOS at least
    among, plain = run_prefix(model, prompts, shared), run_prefix(model, prompts)
    assert torch.equal(among.layers[0].at, plain.layers[0].at)
    for i, prompt in enumerate(prompts):
        alone = run_prefix(model, [prompt])
        n = len(prompt.ids) - 1
        for layer in range(model.cfg.n_layers):
            for side in ("keys", "values"):
                wanted = getattr(alone.layers[layer], side)[0]
                assert wanted.shape[1] == n
                for other in (among, plain):
                    assert apart(getattr(other.layers[layer], side)[i, :, :n], wanted) <= EXACT


def test_the_common_part_is_that_of_all_prompts(exact) -> None:
    """It is run once for all prompts, and serves every batch of them."""
    model = exact["llama"]
    prompts = prompts_of(random.Random(3), 6, 2, 9, common=5)
    common = run_common(model, prompts)
    assert common is not None
    for some in (prompts[:1], prompts[2:4], prompts[::-1]):
        behind, plain = run_prefix(model, some, common), run_prefix(model, some)
        assert torch.equal(behind.lengths, plain.lengths)
        for one, other in zip(behind.layers, plain.layers, strict=True):
            seen = other.at < NOWHERE
            for side in ("keys", "values"):
                found, wanted = (getattr(keys, side).transpose(1, 2)[seen] for keys in (one, other))
                assert apart(found, wanted) <= EXACT
