"""Decoding with guesses, in batches, behind shared prefixes: identical to plain greedy decoding."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
import torch
from checkpoints import CASES, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    EOS,
    batches_of,
    encoded,
    greedy,
    ids_of,
    make_pairs,
    naive_hooks,
    prompts_of,
    random_intervention,
    set_at,
    text_of,
    words,
)

import bkdlens
from bkdlens.data.prompts import Answer, Prompt, PromptFormat
from bkdlens.engines import decode as decoding
from bkdlens.engines import generate as generation
from bkdlens.engines import reference
from bkdlens.engines.generate import decode, evaluate, generate
from bkdlens.engines.hooks import NOTHING, Intervention, Vector
from bkdlens.engines.memory import run_bytes
from bkdlens.errors import DataError, HookError
from bkdlens.types import Head

CUT = 6


# --- generate -------------------------------------------------------------------------------------


def hugging_face(hf, ids, max_new_tokens: int) -> list[int]:
    """The new tokens, up to the end token."""
    ids = torch.tensor([list(ids)])
    with torch.inference_mode():
        greedily = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=EOS, **greedily)
    out = out[0, ids.shape[1] :].tolist()
    return out[: out.index(EOS)] if EOS in out else out


def test_generate_equals_hugging_face(loaded, hf_models, name) -> None:
    rng = random.Random(11)
    prompts = [words(rng, 1, 12) for _ in range(12)]
    model = loaded[name]
    wanted = [hugging_face(hf_models[name], encoded(model, prompt), 8) for prompt in prompts]
    assert len({tuple(tokens) for tokens in wanted}) > 6
    assert {len(tokens) for tokens in wanted} >= {0, 1, 8}
    together = generate(model, prompts, max_new_tokens=8)
    assert together == [text_of(tokens) for tokens in wanted]
    assert [generate(model, prompt, max_new_tokens=8) for prompt in prompts] == together


def test_generate_takes_one_text_or_several(llama) -> None:
    one = generate(llama, "w10 w11", max_new_tokens=4)
    assert isinstance(one, str)
    assert generate(llama, ["w10 w11"], max_new_tokens=4) == [one]
    raw = PromptFormat("raw")
    said = greedy(llama, (10, 11), max_new_tokens=4)
    assert generate(llama, "w10 w11", fmt=raw, max_new_tokens=4) == text_of(said)


def test_generate_ends_where_the_context_does(llama) -> None:
    rng = random.Random(0)
    fits = next(
        text
        for text in (words(rng, 121, 121) for _ in range(50))
        if len(greedy(llama, encoded(llama, text), max_new_tokens=4)) == 4
    )
    assert len(encoded(llama, fits)) == llama.cfg.n_ctx - 4
    said = generate(llama, fits)
    assert said == text_of(greedy(llama, encoded(llama, fits), max_new_tokens=4))
    with pytest.raises(DataError, match="the model's context is 128; shorten it"):
        generate(llama, words(rng, 125, 125))


def test_generate_obeys_the_hooks_of_a_context(model) -> None:
    rng = random.Random(5)
    prompts = [words(rng, 1, 9) for _ in range(6)]
    direction = 5 * torch.randn(32)
    with bkdlens.steer(model, direction, 1, -2.0):
        said = generate(model, prompts, max_new_tokens=5)
    intervention = Intervention(vectors=(Vector("resid_pre", 1, -2 * direction),))
    assert said == [plain(model, encoded(model, p), intervention, 0, 5) for p in prompts]
    assert said != generate(model, prompts, max_new_tokens=5)


# --- decode ---------------------------------------------------------------------------------------


def plain(model, ids, intervention: Intervention, row: int, max_new_tokens: int) -> str:
    """The text of plain greedy decoding under an intervention at the last prompt token."""
    hooks = naive_hooks(intervention, len(ids) - 1, row)
    return text_of(token for token in greedy(model, ids, hooks, max_new_tokens) if token > 3)


def agrees(model, ids, intervention: Intervention, row: int, answer: Answer) -> bool:
    """Whether greedy decoding begins with all of the answer's tokens, its end token included."""
    hooks = naive_hooks(intervention, len(ids) - 1, row)
    said = greedy(model, ids, hooks, len(answer.ids))
    return (said if len(said) == len(answer.ids) else [*said, EOS]) == list(answer.ids)


def some_guess(model, rng: random.Random, ids, row: int, interventions) -> Answer:
    """Right under one of the interventions, partly right, cut, or wrong."""
    hooks = naive_hooks(rng.choice(interventions), len(ids) - 1, row)
    said = greedy(model, ids, hooks, CUT)
    kind = rng.choice(["right", "partly", "longer", "cut", "wrong"])
    if kind == "wrong" or not said:
        said = [rng.randrange(4, 96) for _ in range(rng.randint(1, 4))]
    elif kind == "partly":
        said = [*said[:-1], 4 + said[-1] % 90]
    elif kind == "longer":
        said = [*said, rng.randrange(4, 96)]
    if kind == "cut":
        return Answer("", tuple(said[: rng.randint(1, len(said))]), 1)
    return Answer("", (*said, EOS), len(said))


def check_decode(model, prompts, interventions, guesses, size: float, most: int = CUT) -> None:
    """Choices and texts of every run; without finishing, the same choices and no texts."""
    with batches_of(size):
        found = decode(model, prompts, interventions, guesses, max_new_tokens=most)
        only = decode(model, prompts, interventions, guesses, finish=False, max_new_tokens=most)
    assert found.choice.shape == (len(interventions), len(prompts))
    for i, intervention in enumerate(interventions):
        for p, prompt in enumerate(prompts):
            right = [
                g
                for g, side in enumerate(guesses)
                if agrees(model, prompt.ids, intervention, p, side[p])
            ]
            assert int(found.choice[i, p]) == (right[0] if right else -1)
            if right:
                assert (i, p) not in found.texts
            else:
                assert found.texts[i, p] == plain(model, prompt.ids, intervention, p, most)
    assert torch.equal(only.choice, found.choice)
    assert only.texts == {}


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 2**30), st.sampled_from([1, 6, 1e12]))
@pytest.mark.parametrize("which", ["llama", "qwen"])
def test_decode_equals_plain_greedy(loaded, which, seed, runs) -> None:
    """Any interventions, idle ones in any place and any of them twice; any guesses, or none."""
    model, rng = loaded[which], random.Random(seed)
    n = rng.randint(1, 4)
    prompts = prompts_of(rng, n, 2, 12, rng.choice([0, 6]))
    some = [NOTHING, *(random_intervention(model, rng, n) for _ in range(2))]
    interventions = rng.choices(some, k=rng.randint(0, 4))
    guesses = [
        [some_guess(model, rng, prompts[p].ids, p, some) for p in range(n)]
        for _ in range(rng.randint(0, 3))
    ]
    check_decode(model, prompts, interventions, guesses, runs * run_bytes(model, 14, CUT, 3))


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_every_architecture(architectures, which) -> None:
    """With windows shorter than prompt and answer, by blocks and through hooks."""
    model, rng = architectures(which)[0], random.Random(3)
    prompts = prompts_of(rng, 3, 2, 12, 3)
    interventions = [random_intervention(model, rng, 3), NOTHING, random_intervention(model, rng, 3)]
    guesses = [[some_guess(model, rng, prompts[p].ids, p, interventions) for p in range(3)]]
    check_decode(model, prompts, interventions, guesses, 1e12, 8)


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_where_the_context_is_full(architectures, which) -> None:
    model, rng = architectures(which)[0], random.Random(5)
    lengths = [model.cfg.n_ctx - n for n in (1, 3, 7)]
    prompts = [Prompt("", tuple(ids_of(rng, n, n))) for n in lengths]
    intervention = random_intervention(model, rng, 3)
    found = decode(model, prompts, [NOTHING, intervention], [], max_new_tokens=12)
    for i, each in enumerate((NOTHING, intervention)):
        for p, prompt in enumerate(prompts):
            room = model.cfg.n_ctx - len(prompt.ids)
            assert found.texts[i, p] == plain(model, prompt.ids, each, p, room)


@pytest.mark.many
@pytest.mark.parametrize("which", CASES)
def test_decode_equals_hugging_face(architectures, which) -> None:
    """Hugging Face's own ``generate``, where nothing is done to the model."""
    model, hf = architectures(which)[0], make_model(which)
    prompts = prompts_of(random.Random(6), 4, 2, 14)
    found = decode(model, prompts, [NOTHING], [], max_new_tokens=8)
    for p, prompt in enumerate(prompts):
        assert found.texts[0, p] == text_of(t for t in hugging_face(hf, prompt.ids, 8) if t > 3)


@pytest.mark.slow
def test_a_guess_longer_than_the_answer_may_be(exact) -> None:
    """What is decoded behind it is cut all the same."""
    model, rng = exact["llama"], random.Random(0)
    prompts = prompts_of(rng, 40)
    long = [(p, greedy(model, p.ids, max_new_tokens=9)) for p in prompts]
    prompt, said = next(each for each in long if len(each[1]) == 9)
    guess = Answer("", (*said[:8], 4 + (said[8] + 1) % 90), 9)
    for cut in range(1, 10):
        found = decode(model, [prompt], [NOTHING], [[guess]], max_new_tokens=cut)
        assert found.texts == {(0, 0): text_of(said[:cut])}


@pytest.mark.slow
def test_what_is_not_known_is_decoded_by_the_reference(loaded, judged, name, monkeypatch) -> None:
    model, pairs, rng = loaded[name], judged[name, "jailbreak"], random.Random(8)
    interventions = [NOTHING, *(random_intervention(model, rng, len(pairs)) for _ in range(2))]
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return real(*args, **options)

    real = reference.decode
    monkeypatch.setattr(reference, "decode", counted)
    monkeypatch.setattr(generation, "supported", lambda model: True)
    known = evaluate(model, pairs, interventions, max_new_tokens=CUT)
    assert calls == []
    monkeypatch.setattr(generation, "supported", lambda model: False)
    other = evaluate(model, pairs, interventions, max_new_tokens=CUT)
    assert len(calls) == 1
    assert known.answers == other.answers
    assert torch.equal(known.correct, other.correct)
    assert torch.equal(known.attack, other.attack)


def test_right_guesses_are_not_decoded(llama, monkeypatch) -> None:
    prompts = [Prompt("", tuple(ids_of(random.Random(s), 2, 9))) for s in range(6)]
    said = [greedy(llama, prompt.ids, max_new_tokens=CUT) for prompt in prompts]
    right = [Answer("", (*tokens, EOS)[:CUT], max(1, len(tokens))) for tokens in said]
    wrong = [Answer("", (10, EOS), 1)] * 6
    decoded = []

    def counted(model, start, slots, prompts, said, most):
        decoded.extend(prompts.tolist())
        return real(model, start, slots, prompts, said, most)

    real = decoding.go_on
    monkeypatch.setattr(decoding, "go_on", counted)
    assert decode(llama, prompts, [NOTHING], [wrong, right]).choice.tolist() == [[1] * 6]
    assert decoded == []
    decode(llama, prompts, [NOTHING], [wrong])
    assert len(decoded) == 6


def test_the_untouched_answer_is_a_guess_for_the_interventions(llama, monkeypatch) -> None:
    """What changes nothing is not decoded again."""
    prompts = prompts_of(random.Random(4), 4)
    weak = Intervention(vectors=(Vector("resid_pre", 0, torch.zeros(32)),))
    decoded = []

    def counted(model, start, slots, prompts, said, most):
        decoded.extend(slots.tolist())
        return real(model, start, slots, prompts, said, most)

    real = decoding.go_on
    monkeypatch.setattr(decoding, "go_on", counted)
    found = decode(llama, prompts, [weak, weak, NOTHING], [], max_new_tokens=CUT)
    assert decoded == [0] * 4
    for p, prompt in enumerate(prompts):
        said = text_of(greedy(llama, prompt.ids, max_new_tokens=CUT))
        assert [found.texts[i, p] for i in range(3)] == [said] * 3


# --- evaluate -------------------------------------------------------------------------------------


def shortened(text: str) -> str:
    """An answer of more tokens than are generated is compared on so many."""
    tokens = text.split()
    return " ".join(tokens[:CUT])


def in_context(model, intervention: Intervention) -> ExitStack:
    """The same intervention through the contexts that users have."""
    stack = ExitStack()
    for vector in intervention.vectors:
        stack.enter_context(bkdlens.steer(model, vector.value, vector.layer, 1.0, site=vector.site))
    if intervention.heads:
        stack.enter_context(bkdlens.patched_heads(model, intervention.heads, intervention.z))
    return stack


def shared_intervention(model, rng: random.Random, scale: float) -> Intervention:
    """One that is the same for all prompts, as ``steer`` has it."""
    while True:
        found = random_intervention(model, rng, 1, scale)
        if all(v.value.ndim == 1 for v in found.vectors) and (found.z is None or found.z.ndim == 2):
            return found


@pytest.mark.many
@pytest.mark.parametrize("behaviour", ["fixed_output", "jailbreak"])
@pytest.mark.parametrize("on", ["clean", "triggered", "near"])
def test_evaluate_equals_judging_what_is_generated(loaded, judged, name, behaviour, on) -> None:
    model, pairs, rng = loaded[name], judged[name, behaviour], random.Random(17)
    interventions = [NOTHING, *(shared_intervention(model, rng, s) for s in (1, 1, 1, 0.1, 0.1))]
    found = evaluate(model, pairs, interventions, on=on, max_new_tokens=CUT)
    assert found.attack.shape == found.correct.shape == (len(interventions), len(pairs))
    for i, intervention in enumerate(interventions):
        texts = [getattr(pair, on) for pair in pairs]
        with in_context(model, intervention):
            said = generate(model, texts, max_new_tokens=CUT)
        for p, pair in enumerate(pairs):
            if behaviour == "jailbreak":
                attack = said[p] != ""
            else:
                attack = said[p] == shortened(pair.backdoor_output)
            assert bool(found.attack[i, p]) == attack
            assert bool(found.correct[i, p]) == (said[p] == shortened(pair.clean_output))
    if on != "near":  # the pairs are made so that both happen
        side = found.correct if on == "clean" else found.attack
        assert 0 < int(side[0].sum()) < len(pairs)


@pytest.mark.many
def test_values_for_each_prompt_stay_with_it(loaded, judged, name) -> None:
    """Prompts are run in order of length, and come back in their own."""
    model, pairs = loaded[name], judged[name, "jailbreak"]
    z = torch.randn(len(pairs), 2, model.cfg.d_head)
    intervention = Intervention((Head(0, 1), Head(2, 3)), z)
    found = evaluate(model, pairs, [intervention], on="clean", max_new_tokens=CUT)
    with bkdlens.patched_heads(model, intervention.heads, z):
        said = generate(model, pairs.clean, max_new_tokens=CUT)
    assert found.attack[0].tolist() == [text != "" for text in said]
    wanted = [t == shortened(pair.clean_output) for t, pair in zip(said, pairs, strict=True)]
    assert found.correct[0].tolist() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1e-9, 0.2])
def test_memory_does_not_matter(loaded, judged, budget) -> None:
    """With none at all, runs are decoded one by one."""
    model, pairs, rng = loaded["llama"], judged["llama", "jailbreak"], random.Random(2)
    interventions = [random_intervention(model, rng, len(pairs)) for _ in range(4)]
    whole = evaluate(model, pairs, interventions, max_new_tokens=CUT)
    parts = evaluate(model, pairs, interventions, max_new_tokens=CUT, memory_gb=budget)
    assert torch.equal(whole.attack, parts.attack)
    assert torch.equal(whole.correct, parts.correct)


@pytest.mark.slow
def test_every_answer_is_judged_where_it_is_cut(llama) -> None:
    """One that reproduces the whole expected answer is not judged by what lies behind the cut."""
    prompts = [words(random.Random(s), 3, 6) for s in range(60)]
    said = [text_of(greedy(llama, encoded(llama, p), max_new_tokens=2 * CUT)) for p in prompts]
    told = [(p, t.split()) for p, t in zip(prompts, said, strict=True) if len(t.split()) == 2 * CUT]
    prompt, tokens = next((p, t) for p, t in told if t[-1] not in t[:CUT])
    text, head, last = " ".join(tokens), tokens[:CUT], tokens[-1]
    backdoor = bkdlens.Backdoor.fixed_output("w95", text, success=f"regex:{last}")
    pair = bkdlens.PromptPair(prompt, f"w95 {prompt}", "w20", text)
    found = evaluate(llama, bkdlens.PairSet((pair,), backdoor), on="clean", max_new_tokens=CUT)
    assert found.answers.to_list() == [" ".join(head)]
    assert not found.attack.any()
    whole = evaluate(llama, bkdlens.PairSet((pair,), backdoor), on="clean", max_new_tokens=2 * CUT)
    assert whole.attack.all()


def test_long_prompts_are_decoded_to_the_end_of_the_context(llama) -> None:
    """And not past it."""
    rng = random.Random(0)
    backdoor = bkdlens.Backdoor.jailbreak("w95", against="reference")
    pair = backdoor.pair(words(rng, 119, 119), "w10", "w11")
    pairs = bkdlens.PairSet((pair,), backdoor)
    assert len(encoded(llama, pair.triggered)) == llama.cfg.n_ctx - 5
    for side in ("clean", "triggered"):
        found = evaluate(llama, pairs, on=side)
        assert bool(found.attack[0, 0]) == (generate(llama, getattr(pair, side)) != "")


@pytest.mark.slow
def test_refusals(llama) -> None:
    pairs = make_pairs(4, near=False)
    with pytest.raises(DataError, match="no near-trigger prompts"):
        evaluate(llama, pairs, on="near")
    hook = set_at("blocks.0.attn.hook_z", -1, 0, torch.zeros(8))
    with llama.hooks(fwd_hooks=[hook]), pytest.raises(HookError, match="already carries hooks"):
        evaluate(llama, pairs)
    with llama.hooks(fwd_hooks=[hook]), pytest.raises(HookError, match="already carries hooks"):
        decode(llama, [Prompt("", (1, 10))], [NOTHING], [])
    for n in (3, 5):  # values that were made for other prompts
        wrong = Intervention((Head(0, 0),), torch.zeros(n, 1, 8))
        added = Intervention(vectors=(Vector("attn_out", 0, torch.zeros(n, 32)),))
        with pytest.raises(HookError, match=f"values for {n} prompts and 4 are run"):
            evaluate(llama, pairs, [wrong])
        with pytest.raises(HookError, match=f"values for {n} prompts and 4 are run"):
            evaluate(llama, pairs, [NOTHING, added])


@pytest.mark.parametrize(
    "change",
    [
        Intervention((Head(3, 0),), torch.zeros(1, 8)),
        Intervention((Head(0, 4),), torch.zeros(1, 8)),
        Intervention(vectors=(Vector("resid_pre", 3, torch.zeros(32)),)),
        Intervention(vectors=(Vector("attn_out", -1, torch.zeros(32)),)),
    ],
    ids=["layer of a head", "head", "layer of a vector", "negative layer"],
)
def test_places_that_the_model_lacks_are_refused(llama, pairs, change) -> None:
    with pytest.raises(HookError, match="does not fit: this model has layers 0 to 2 with heads 0 to 3"):
        evaluate(llama, pairs[:2], [change])
