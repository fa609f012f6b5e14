"""Each step of decoding many interventions, token by token against plain greedy decoding.

Plain greedy decoding is one whole, unpadded pass a token, with one naive hook a head and vector.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from checkpoints import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, apart, batches_of, greedy, ids_of, naive_hooks, prompts_of, random_intervention

from bkdlens.data.prompts import Prompt
from bkdlens.engines import decode as decoding
from bkdlens.engines.decode import complete, follow, go_on, run_last_token
from bkdlens.engines.hooks import NOTHING
from bkdlens.engines.memory import run_bytes
from bkdlens.engines.prefix import run_common, run_prefix

EXACT, CUT = 1e-10, 6


class Setting:
    """Prompts under nothing and under interventions, in the order of the engine's slots."""

    def __init__(self, model, seed: int, n: int = 3, k: int = 3, prompts=None) -> None:
        self.model, self.rng = model, random.Random(seed)
        everyone = prompts or prompts_of(self.rng, n + 1, 2, 12, self.rng.choice([0, 6]))
        self.rows = self.rng.sample(range(len(everyone)), len(everyone) if prompts else n)
        self.prompts = [everyone[row] for row in self.rows]
        acting = [random_intervention(model, self.rng, len(everyone)) for _ in range(k)]
        acting = [each for each in acting if each.first_layer is not None]
        self.slots = [NOTHING, *sorted(acting, key=lambda each: each.first_layer)]
        prefix = run_prefix(model, self.prompts, run_common(model, everyone))
        self.start = run_last_token(model, prefix, self.slots[1:], self.rows)

    def hooks(self, slot: int, prompt: int):
        ids = self.prompts[prompt].ids
        return naive_hooks(self.slots[slot], len(ids) - 1, self.rows[prompt])

    def plain(self, slot: int, prompt: int, most: int) -> list[int]:
        """New tokens with the end token, where it comes."""
        ids = self.prompts[prompt].ids
        most = min(most, self.model.cfg.n_ctx - len(ids))
        said = greedy(self.model, ids, self.hooks(slot, prompt), most)
        return said if len(said) == most else [*said, EOS]

    def runs(self, most: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        """Some runs, slots ascending; prompts may have none, one or many, even the same one twice."""
        every = [(s, p) for s in range(len(self.slots)) for p in range(len(self.prompts))]
        some = sorted(self.rng.choices(every, k=self.rng.randint(1, most)), key=lambda run: run[0])
        slots, prompts = zip(*some, strict=True)
        return torch.tensor(slots), torch.tensor(prompts)

    def draft(self) -> list[list[int]]:
        """An answer a prompt: what some run says, more, less or something else; the end comes last."""
        drafts = []
        for prompt in range(len(self.prompts)):
            said = self.plain(self.rng.randrange(len(self.slots)), prompt, CUT)
            kind = self.rng.choice(["right", "right", "partly", "longer", "cut", "wrong"])
            if kind == "partly":
                said = [*said[:-1], 4 + (said[-1] + 1) % 90]
            elif kind == "longer":
                said = [*said[: said.index(EOS) if EOS in said else None], self.rng.randrange(4, 96)]
            elif kind == "cut":
                said = said[: self.rng.randint(1, len(said))]
            elif kind == "wrong":
                said = [self.rng.randrange(4, 96) for _ in range(self.rng.randint(1, 4))]
            drafts.append(said[: self.model.cfg.n_ctx - len(self.prompts[prompt].ids)])
        return drafts


def agreement(said: Sequence[int], answer: Sequence[int]) -> int:
    n = 0
    while n < min(len(said), len(answer)) and said[n] == answer[n]:
        n += 1
    return n


# --- the steps, of any interventions --------------------------------------------------------------


def check_last_token(setting: Setting) -> None:
    """What it says, its keys and values, and which slots share them with the untouched run."""
    model, start = setting.model, setting.start
    n = len(setting.prompts)
    for slot in range(len(setting.slots)):
        for prompt in range(n):
            ids = torch.tensor([setting.prompts[prompt].ids])
            with model.hooks(fwd_hooks=setting.hooks(slot, prompt)), torch.no_grad():
                logits, cache = model.run_with_cache(ids)
            assert int(start.first[slot, prompt]) == int(logits[0, -1].argmax())
            rotary = model.cfg.positional_embedding_type == "rotary"
            for layer in range(model.cfg.n_layers):
                past = start.past(layer, torch.tensor([slot]), torch.tensor([prompt]))
                assert past.at.tolist() == [[len(setting.prompts[prompt].ids) - 1]]
                names = ("rot_k" if rotary else "k", "v")
                for found, name in zip((past.keys, past.values), names, strict=True):
                    wanted = cache[f"blocks.{layer}.attn.hook_{name}"][0, -1]
                    assert apart(found[0, :, 0], wanted) <= EXACT
    first_layers = [slot.first_layer for slot in setting.slots[1:]]
    for layer, keys in enumerate(start.layers):
        assert len(keys.at) == n * (1 + sum(first <= layer for first in first_layers))


def check_follow(setting: Setting) -> None:
    answers = setting.draft()
    slots, prompts = setting.runs()
    agreed, after = follow(setting.model, setting.start, answers, slots, prompts)
    for run, (slot, prompt) in enumerate(zip(slots.tolist(), prompts.tolist(), strict=True)):
        answer = answers[prompt]
        said = setting.plain(slot, prompt, len(answer))
        assert int(agreed[run]) == agreement(said, answer)
        if int(agreed[run]) < len(answer):
            assert int(after[run]) == said[int(agreed[run])]


def check_go_on(setting: Setting, most: int = CUT) -> None:
    """From any number of tokens that are known already."""
    slots, prompts = setting.runs()
    wanted = [setting.plain(*run, most) for run in zip(slots.tolist(), prompts.tolist(), strict=True)]
    known = [said[: setting.rng.randint(1, len(said))] for said in wanted]
    before = [list(said) for said in known]
    assert go_on(setting.model, setting.start, slots, prompts, known, most) == wanted
    assert known == before


def check_complete(setting: Setting, size: float, n_drafts: int, most: int = CUT) -> None:
    """Any drafts, in any batches; what is none of them is decoded where that is asked for."""
    drafts = [setting.draft() for _ in range(n_drafts)]
    slots, prompts = setting.runs()
    options = {"max_new_tokens": most, "memory_gb": None}
    with batches_of(size):
        choice, tokens = complete(
            setting.model, setting.start, drafts, slots, prompts, finish=True, **options
        )
        only, few = complete(
            setting.model, setting.start, drafts, slots, prompts, finish=False, **options
        )
    assert only == choice
    for run, (slot, prompt) in enumerate(zip(slots.tolist(), prompts.tolist(), strict=True)):
        right = [
            number
            for number, draft in enumerate(drafts)
            if setting.plain(slot, prompt, len(draft[prompt])) == draft[prompt]
        ]
        assert choice[run] == (right[0] if right else -1)
        if right:
            assert list(tokens[run]) == list(few[run]) == drafts[right[0]][prompt]
        else:
            assert list(tokens[run]) == setting.plain(slot, prompt, most)
            assert list(few[run]) == []


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_the_last_token_under_any_interventions(exact, which, seed) -> None:
    check_last_token(Setting(exact[which], seed))


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_following_an_answer(exact, which, seed) -> None:
    check_follow(Setting(exact[which], seed))


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(0, 2**30))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_going_on_from_any_token(exact, which, seed) -> None:
    check_go_on(Setting(exact[which], seed))


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(0, 2**30), st.sampled_from([1, 10, 1e12]), st.integers(0, 3))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_completing_with_any_drafts(exact, which, seed, runs, n_drafts) -> None:
    """No drafts at all, right ones, partly right ones, cut ones; any number of runs at once."""
    model = exact[which]
    check_complete(Setting(model, seed), runs * run_bytes(model, 12, CUT, 3), n_drafts)


# --- every architecture, and the ends -------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_every_architecture(architectures, which) -> None:
    """With windows shorter than the prompts, and answers that go past them."""
    single, double = architectures(which)
    check_last_token(Setting(double, 1, k=2))
    check_follow(Setting(double, 2, k=2))
    check_go_on(Setting(double, 3, k=2), 9)
    check_complete(Setting(double, 4, k=2), 1e12, 2)
    check_go_on(Setting(single, 5, k=2), 9)


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_where_the_context_is_full(architectures, monkeypatch, which) -> None:
    """Rows of one batch fill it at different times; padding past it never matters."""
    _, model = architectures(which)
    endless = copy.deepcopy(model.tokenizer)
    endless.eos_token = "w95"  # which is not what plain greedy stops at
    n_ctx, rng = model.cfg.n_ctx, random.Random(12)
    lengths = [n_ctx - 1, n_ctx - 3, n_ctx - 9, 5]
    prompts = [Prompt("", tuple(ids_of(rng, n, n))) for n in lengths]
    setting = Setting(model, 6, k=1, prompts=prompts)
    check_follow(setting)
    check_go_on(setting, 12)
    check_complete(setting, 1e12, 1, 9)
    monkeypatch.setattr(model, "tokenizer", endless)
    every = torch.arange(4)
    first = setting.start.first[0].tolist()
    found = go_on(model, setting.start, 0 * every, every, [[t] for t in first], 12)
    room = {len(p.ids): len(tokens) for p, tokens in zip(setting.prompts, found, strict=True)}
    ended = {len(p.ids): 95 in tokens for p, tokens in zip(setting.prompts, found, strict=True)}
    for n in lengths:
        assert ended[n] or room[n] == min(12, n_ctx - n)


def test_longer_than_the_room_that_was_made(exact, monkeypatch) -> None:
    """Room for keys is doubled where 16 tokens are not enough; some rows end before others."""
    monkeypatch.setattr(decoding, "SPARSE", 0.0)  # rows that have ended stay
    check_go_on(Setting(exact["llama"], 7), 40)
    monkeypatch.setattr(decoding, "SPARSE", 1.0)  # and go at once
    check_go_on(Setting(exact["llama"], 7), 40)


def test_nothing_to_run(exact) -> None:
    setting = Setting(exact["llama"], 8)
    none = torch.zeros(0, dtype=torch.long)
    agreed, after = follow(setting.model, setting.start, setting.draft(), none, none)
    assert agreed.shape == after.shape == (0,)
    assert go_on(setting.model, setting.start, none, none, [], 5) == []
    options = {"finish": True, "max_new_tokens": 5}
    drafts = [setting.draft()]
    assert complete(setting.model, setting.start, drafts, none, none, **options) == ([], [])


def test_likely_answers_are_not_decoded(exact, monkeypatch) -> None:
    """Each run that a draft explains costs one pass; the others go on from where they differ."""
    setting = Setting(exact["llama"], 9, k=0)
    n = len(setting.prompts)
    right = [setting.plain(0, p, CUT) for p in range(n)]
    calls = []

    def counted(model, start, slots, prompts, said, most):
        calls.append([list(tokens) for tokens in said])
        return real(model, start, slots, prompts, said, most)

    real = decoding.go_on
    monkeypatch.setattr(decoding, "go_on", counted)
    every, options = torch.arange(n), {"finish": True, "max_new_tokens": CUT}
    wrong = [[5 if said[0] != 5 else 6] for said in right]
    choice, tokens = complete(setting.model, setting.start, [wrong, right], 0 * every, every, **options)
    assert (choice, [list(t) for t in tokens]) == ([1] * n, right)
    assert [said for call in calls for said in call] == []
    calls.clear()
    nearly = [[*said[:-1], 4 + (said[-1] + 1) % 90] for said in right]
    _, tokens = complete(setting.model, setting.start, [nearly], 0 * every, every, **options)
    assert [list(t) for t in tokens] == right
    assert sorted(said for call in calls for said in call) == sorted(right)
