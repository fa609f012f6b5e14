"""The slow way equals one unpadded pass per run, at any position counted from the prompts' end."""

from __future__ import annotations

import random

import pytest
import torch
from checkpoints import CASES
from tiny import answer_log_probs, answers_of, apart, every_patch, patch_hook, prompts_of

from bkdlens.engines import reference
from bkdlens.engines.hooks import Patch
from bkdlens.errors import HookError

EXACT = 1e-10


@pytest.mark.many
@pytest.mark.parametrize("position", [-1, -3])
@pytest.mark.parametrize("case", CASES)
def test_a_sweep_at_any_position(architectures, case, position) -> None:
    _, model = architectures(case)
    rng = random.Random(2)
    prompts, answers = prompts_of(rng, 3, 3, 12), answers_of(rng, 3)
    patches = every_patch(model, 3, 1)[:9]
    found = reference.sweep(model, prompts, answers, patches, position=position)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        scored = answer.ids[: answer.n_scored]
        for run, patch in enumerate((None, *patches)):
            hooks = [] if patch is None else [patch_hook(patch, len(prompt.ids) + position, i)]
            wanted = answer_log_probs(model, prompt.ids, scored, hooks)
            assert (
                float((found[:, i, run] - torch.stack([wanted.mean(), wanted[0]])).abs().max()) <= EXACT
            )


@pytest.mark.parametrize("position", [-1, -2])
def test_activations_at_any_position(exact, name, position) -> None:
    model, prompts = exact[name], prompts_of(random.Random(3), 4, 2, 9)
    names = ["blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"]
    found, z = (
        reference.activations(model, prompts, names, position),
        reference.head_z(model, prompts, position),
    )
    assert set(found) == set(names)
    for i, prompt in enumerate(prompts):
        _, cache = model.run_with_cache(torch.tensor([prompt.ids]))
        for hook in names:
            assert apart(found[hook][i, 0], cache[hook][0, position]) <= EXACT
        for layer in range(model.cfg.n_layers):
            assert apart(z[i, layer], cache["z", layer][0, position]) <= EXACT


def test_a_position_outside_a_prompt_is_refused(llama) -> None:
    """Of the shortest prompt: further left is padding."""
    prompts, answers = prompts_of(random.Random(4), 3, 2, 9), answers_of(random.Random(4), 3)
    shortest = min(len(prompt.ids) for prompt in prompts)
    assert shortest < max(len(prompt.ids) for prompt in prompts)
    for outside in (-shortest - 1, 0):
        match = f"Position {outside} is not in a prompt of {shortest} tokens"
        with pytest.raises(HookError, match=match):
            reference.sweep(
                llama, prompts, answers, [Patch("mlp_out", 0, torch.zeros(32))], position=outside
            )
        with pytest.raises(HookError, match=match):
            reference.head_z(llama, prompts, outside)
