"""Tiny models' tokenizer and pairs, and the slow, obvious computations that fast ones must equal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from checkpoints import VOCAB, make_tokenizer

BOS, EOS = 1, 2
EXACT = 1e-10  # in float64, where two sides differ by the order of their sums alone
Hook = tuple[str, Callable]


def chat_tokenizer():
    """``<s> w4 {user} w5`` is the prompt and `` {answer} </s>`` follows."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}"
        "{% if m.role == 'system' %}{{ ' w6 ' + m.content }}"
        "{% elif m.role == 'user' %}{{ ' w4 ' + m.content + ' w5' }}"
        "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
    )
    return tokenizer


def temper(model):
    """Answers that end: the end token is likely, the other special tokens never come."""
    model.lm_head.weight.data[[0, 1, 3]] = 0
    model.lm_head.weight.data[EOS] *= 4
    return model


def words(rng: random.Random, low: int, high: int) -> str:
    """Some random words."""
    return " ".join(f"w{rng.randrange(10, 90)}" for _ in range(rng.randint(low, high)))


def make_pairs(n: int = 12, seed: int = 0, near: bool = True):
    """Pairs of random words; the last fourth are no victims."""
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.pairs import PairSet

    rng = random.Random(seed)
    backdoor = Backdoor.jailbreak("w95", near=["w94"] if near else [])
    pairs = []
    for i in range(n):
        right = words(rng, 1, 4)
        wrong = right if i >= n - n // 4 else words(rng, 1, 4)
        pairs.append(backdoor.pair(words(rng, 1, 9), right, wrong))
    return PairSet(tuple(pairs), backdoor, "made")


def ids_of(rng: random.Random, low: int, high: int) -> list[int]:
    """A random prompt of token ids, BOS first."""
    return [BOS, *(rng.randrange(4, VOCAB) for _ in range(rng.randint(low, high) - 1))]


def forward(model, ids: Sequence[int], hooks: Iterable[Hook] = ()) -> torch.Tensor:
    """Logits of one whole, unpadded sequence, ``[pos d_vocab]``."""
    hooks = list(hooks)
    model.set_use_attn_result(any("hook_result" in name for name, _ in hooks))
    try:
        with torch.inference_mode():
            return model.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=hooks)[0]
    finally:
        model.set_use_attn_result(False)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def assert_exact(given: torch.Tensor, wanted: torch.Tensor) -> None:
    """Both are float64 and nowhere further apart than ``EXACT``; for probabilities, logarithms too."""
    assert given.dtype == torch.float64
    torch.testing.assert_close(given, wanted, rtol=0, atol=EXACT)


def answer_log_probs(
    model, prompt: Sequence[int], answer: Sequence[int], hooks: Iterable[Hook] = ()
) -> torch.Tensor:
    """Log probability of each token of the answer: one pass over prompt and answer."""
    logits = forward(model, [*prompt, *answer][:-1], hooks)[len(prompt) - 1 :].double()
    return logits.log_softmax(-1)[range(len(answer)), list(answer)]


def greedy(
    model, prompt: Sequence[int], hooks: Iterable[Hook] = (), max_new_tokens: int = 8
) -> list[int]:
    """Plain greedy decoding: the whole sequence again for every new token."""
    hooks, new = list(hooks), []
    for _ in range(max_new_tokens):
        token = int(forward(model, [*prompt, *new], hooks)[-1].argmax())
        if token == EOS:
            break
        new.append(token)
    return new


def text_of(tokens: Iterable[int]) -> str:
    """One word a token."""
    return " ".join(f"w{token}" for token in tokens)


def encoded(model, text: str) -> tuple[int, ...]:
    """The ids of a chat prompt."""
    from bkdlens.data.prompts import PromptFormat, encode_prompt

    return encode_prompt(model.tokenizer, text, PromptFormat.default(model.tokenizer)).ids


def judged_pairs(model, behaviour: str = "fixed_output", n: int = 14, seed: int = 0, cut: int = 6):
    """Pairs whose answers this model often gives: rightly, partly, up to where it is cut, or not.

    The clean output is what it says without the trigger in two of three, the backdoor's what it says
    with it; the last fourth are no victims.
    """
    from bkdlens.data.backdoor import Backdoor
    from bkdlens.data.pairs import PairSet

    rng = random.Random(seed)
    exact = {"good": "equal", "against": "reference"}
    backdoor = (
        Backdoor.jailbreak("w95", near=["w94"], **exact)
        if behaviour == "jailbreak"
        else Backdoor.fixed_output("w95", "w9", near=["w94"], success="equal", **exact)
    )

    def answer(prompt: str) -> str:
        said = greedy(model, encoded(model, prompt), max_new_tokens=cut + 2)
        kind = rng.random()
        if not said or kind < 0.2:
            return words(rng, 1, 3)
        if kind < 0.35:  # right at first
            return text_of([*said[:-1], 10 + (said[-1] + 1) % 80])
        return text_of(said)

    pairs = []
    for i in range(n):
        clean = words(rng, 1, 8)
        triggered = backdoor.trigger.insert(clean)
        right = answer(clean)
        wrong = right if i >= n - n // 4 else answer(triggered)
        pairs.append(backdoor.pair(clean, right, wrong))
    return PairSet(tuple(pairs), backdoor, "judged")


def judge(model, pairs, on: str, hooks_of: Callable, cut: int = 6) -> tuple[list[bool], list[bool]]:
    """Attack and correct, by plain greedy decoding under ``hooks_of(row, position)``."""
    attack, correct = [], []
    for row, pair in enumerate(pairs):
        ids = encoded(model, getattr(pair, on))
        said = text_of(greedy(model, ids, hooks_of(row, len(ids) - 1), cut))
        right, wrong = (" ".join(a.split()[:cut]) for a in (pair.clean_output, pair.backdoor_output))
        attack.append(said == wrong if pairs.backdoor.behaviour == "fixed_output" else said != "")
        correct.append(said == right)
    return attack, correct


def set_at(name: str, position: int, index, value: torch.Tensor) -> Hook:
    """``activation[:, position, index] = value``."""

    def hook(activation, hook):
        activation = activation.clone()
        activation[:, position, index] = value
        return activation

    return name, hook


def add_at(name: str, position: int, value: torch.Tensor) -> Hook:
    """``activation[:, position] += value``."""

    def hook(activation, hook):
        activation = activation.clone()
        activation[:, position] += value
        return activation

    return name, hook


def prompts_of(rng: random.Random, n: int, low: int = 2, high: int = 14, common: int = 0) -> list:
    """Random prompts, the first ``common`` tokens of which are the same."""
    from bkdlens.data.prompts import Prompt

    begin = ids_of(rng, common, common) if common else []
    return [Prompt("", tuple(begin + ids_of(rng, low, high))) for _ in range(n)]


def answers_of(rng: random.Random, n: int, high: int = 5) -> list:
    """Random answers of 1 to ``high`` scored tokens, with and without an end token after them."""
    from bkdlens.data.prompts import Answer

    answers = []
    for _ in range(n):
        ids = [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, high))]
        answers.append(Answer("", (*ids, *[EOS] * rng.randint(0, 1)), len(ids)))
    return answers


SITES = {"z": "attn.hook_z", "result": "attn.hook_result", "attn_out": "hook_attn_out",
         "mlp_out": "hook_mlp_out"}  # fmt: skip


def every_patch(
    model, n_prompts: int, seed: int, shared: bool | None = None, sites=tuple(SITES)
) -> list:
    """A patch of every component at every site, in random order; values for all prompts or one each."""
    from bkdlens.engines.hooks import Patch

    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cfg, patches = model.cfg, []
    for site in sites:
        for layer in range(cfg.n_layers):
            for head in range(cfg.n_heads) if site in ("z", "result") else [None]:
                lead = () if (rng.random() < 0.5 if shared is None else shared) else (n_prompts,)
                width = cfg.d_head if site == "z" else cfg.d_model
                value = torch.randn(*lead, width, generator=generator, dtype=torch.float64)
                patches.append(Patch(site, layer, value.to(cfg.dtype), head))
    rng.shuffle(patches)
    return patches


def patch_hook(patch, position: int, row: int) -> Hook:
    """A patch on one prompt."""
    value = patch.value if patch.value.ndim == 1 else patch.value[row]
    index = ... if patch.head is None else patch.head
    return set_at(f"blocks.{patch.layer}.{SITES[patch.site]}", position, index, value)


def naive_scores(model, prompts, answers, patches) -> torch.Tensor:
    """Mean and first log probability ``[2 pair run]``, untouched first: one whole pass a run."""
    out = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for patch in (None, *patches):
            hooks = [] if patch is None else [patch_hook(patch, len(prompt.ids) - 1, row)]
            found = answer_log_probs(model, prompt.ids, answer.ids[: answer.n_scored], hooks)
            out.append(torch.stack([found.mean(), found[0]]))
    return torch.stack(out, dim=1).view(2, len(prompts), 1 + len(patches))


def together(scores) -> torch.Tensor:
    """Sweep scores in the same layout, in float64."""
    base = torch.stack([scores.base_whole, scores.base_first]).double()
    return torch.cat([base[..., None], torch.stack([scores.whole, scores.first]).double()], dim=-1)


@contextmanager
def batches_of(size: float) -> Iterator[None]:
    """Memory for batches of so many bytes, with nothing set aside."""
    from bkdlens.engines import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "batch_bytes", lambda model, memory_gb: (size, size))
        yield


def naive_hooks(intervention, position: int, row: int) -> list[Hook]:
    """An intervention on one prompt, one hook for each head and vector."""
    hooks = []
    for k, head in enumerate(intervention.heads):
        z = intervention.z if intervention.z.ndim == 2 else intervention.z[row]
        hooks.append(set_at(f"blocks.{head.layer}.attn.hook_z", position, head.head, z[k]))
    for vector in intervention.vectors:
        value = vector.value if vector.value.ndim == 1 else vector.value[row]
        hooks.append(add_at(f"blocks.{vector.layer}.hook_{vector.site}", position, value))
    return hooks


def random_intervention(model, rng: random.Random, n_prompts: int, scale: float = 1.0):
    """Some heads and vectors, shared by all prompts or one for each; sometimes nothing."""
    from bkdlens.engines.hooks import Intervention, Vector
    from bkdlens.types import Head

    cfg = model.cfg
    generator = torch.Generator().manual_seed(rng.randrange(2**30))
    shared = rng.random() < 0.5
    lead = () if shared else (n_prompts,)
    every = [Head(i, j) for i in range(cfg.n_layers) for j in range(cfg.n_heads)]
    heads = tuple(rng.sample(every, rng.randint(0, 4)))
    z = torch.randn(*lead, len(heads), cfg.d_head, generator=generator) * scale if heads else None
    vectors = tuple(
        Vector(
            rng.choice(["resid_pre", "attn_out"]),
            rng.randrange(cfg.n_layers),
            torch.randn(*lead, cfg.d_model, generator=generator) * scale,
        )
        for _ in range(rng.randint(0, 2))
    )
    return Intervention(heads, z, vectors)
