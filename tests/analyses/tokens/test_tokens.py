"""Single prompts, token by token, against one naive pass each."""

from __future__ import annotations

import random
from inspect import unwrap

import pytest
import torch
from tiny import (
    EXACT,
    answer_log_probs,
    assert_exact,
    encoded,
    forward,
    naive_hooks,
    random_intervention,
)

import bkdlens
from bkdlens.analyses.tokens.measure import answer_probs, head_pattern
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.prompts import shown
from bkdlens.engines.hooks import NOTHING, Intervention, Patch, from_end
from bkdlens.errors import ChoiceError, HeadError, HookError
from bkdlens.types import Head

SENTENCE = Backdoor.label_modification(("w91 w92", "w93 w94 w95"))
PAIR = PromptPair("w20 w21 w22", "w20 w95 w21 w22", "w30 w31", "w40 w41 w42")


@pytest.mark.float64
def test_pattern_is_the_hook_points(model) -> None:
    pair = SENTENCE.pair("w20 w21 w22", "Sports")
    result = head_pattern(model, pair.triggered, "L1H2", trigger=SENTENCE.trigger)
    ids = encoded(model, pair.triggered)
    _, cache = model.run_with_cache(torch.tensor([ids]))
    assert_exact(result.pattern, cache["pattern", 1][0, 2])
    assert result.head == Head(1, 2)
    marked = {"w91", "w92", "w93", "w94", "w95"}
    assert result.trigger.tolist() == [token in marked for token in result.tokens]
    assert int(result.trigger.sum()) == 5
    by_hand = sum(float(result.pattern[-1, i]) for i, t in enumerate(result.tokens) if t in marked)
    assert result.on_trigger == pytest.approx(by_hand, abs=EXACT)
    assert result.to_frame().attention.sum() == pytest.approx(1, abs=EXACT)
    assert f"L1H2, {len(ids)} tokens" in repr(result)


def test_a_prompt_without_the_trigger_has_none_marked(llama) -> None:
    assert not head_pattern(llama, "w20 w21", "L0H0", trigger=SENTENCE.trigger).trigger.any()
    assert not head_pattern(llama, "w20 w21", "L0H0").trigger.any()


@pytest.mark.float64
@pytest.mark.parametrize("on", ["clean", "triggered"])
def test_every_token_is_as_in_one_naive_pass(model, on) -> None:
    change = random_intervention(model, random.Random(3), 1)
    result = answer_probs(model, PAIR, change, on=on)
    answer = [40, 41, 42]
    for run, side in enumerate(("clean", "triggered", on)):
        ids = encoded(model, getattr(PAIR, side))
        hooks = naive_hooks(change, len(ids) - 1, 0) if run == 2 else []
        wanted = answer_log_probs(model, ids, answer, hooks)
        assert_exact(result.log_probs[run], wanted)
        logits = forward(model, [*ids, *answer][:-1], hooks)[len(ids) - 1 :]
        assert result.best[run] == tuple(f"w{i}" if i > 3 else shown(model.tokenizer, [i])[0]
                                         for i in logits.argmax(-1).tolist())  # fmt: skip
        assert_exact(result.whole[run], wanted.mean().exp())
    assert result.runs == ("clean", "triggered", f"{on}, patched")
    assert result.tokens == ("w40", "w41", "w42")
    assert len(result.to_frame()) == 9


@pytest.mark.float64
@pytest.mark.parametrize("position", [-1, -2, -3])
@pytest.mark.parametrize("site", ["z", "result"])
def test_patches_act_where_they_are_told(llama, site, position) -> None:
    width = llama.cfg.d_head if site == "z" else llama.cfg.d_model
    patches = [Patch(site, 0, torch.randn(width), 1), Patch(site, 1, torch.randn(width), 3)]
    result = answer_probs(llama, PAIR, patches, position=position, answer="w50 w51")
    ids = encoded(llama, PAIR.clean)
    hooks = [patch.hook(len(ids) + position) for patch in patches]
    wanted = answer_log_probs(llama, ids, [50, 51], hooks)
    assert_exact(result.log_probs[2], wanted)
    assert not torch.allclose(result.log_probs[2], result.log_probs[0], atol=1e-3)


@pytest.mark.parametrize("nothing", [NOTHING, Intervention(), []])
def test_without_a_change_there_are_two_runs(llama, nothing) -> None:
    assert answer_probs(llama, PAIR, nothing).runs == ("clean", "triggered")
    assert len(answer_probs(llama, PAIR, max_answer_tokens=2).tokens) == 2


def test_results_save_and_load(llama, tmp_path) -> None:
    for result in (head_pattern(llama, PAIR.clean, "L0H0"), answer_probs(llama, PAIR)):
        result.save(tmp_path / "one")
        assert bkdlens.load_result(tmp_path / "one") == result


def test_mistakes_are_refused(llama) -> None:
    with pytest.raises(HeadError, match="does not exist"):
        head_pattern(llama, "w20", "L9H0")
    with pytest.raises(ChoiceError, match="prompt to change"):
        unwrap(answer_probs)(llama, PAIR, on="near")
    with pytest.raises(HookError, match=r"give -1 to -4\.$"):
        from_end(4, -5)
    with pytest.raises(HookError, match="not in a prompt"):
        from_end(4, 0)
