"""Greedy decoding under an intervention that changes the prefill's last token only.

:func:`generate` decodes on the model as it stands, hooks of a surrounding context included.
:func:`decode` and :func:`evaluate` run many interventions on many prompts: prefixes are run once, likely
answers are verified in one parallel pass, and only what no likely answer explains is decoded token by
token. The answers are identical to plain greedy decoding's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.answers import NOT_DECODED, Answers
from bkdlens.data.judging import Outcomes, judged
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Answer, Prompt, PromptFormat, encode_answer, encode_prompts
from bkdlens.engines import reference
from bkdlens.engines.block import supported
from bkdlens.engines.decode import Completed, Drafts, complete, run_last_token
from bkdlens.engines.hooks import NOTHING, Intervention, check_interventions, refuse_foreign_hooks
from bkdlens.engines.inputs import checked
from bkdlens.engines.prefix import prefixes
from bkdlens.types import MAX_NEW_TOKENS, Which


@checked
@torch.inference_mode()
def generate(
    model: HookedTransformer,
    prompts: str | Sequence[str],
    *,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> str | list[str]:
    """Answer prompts greedily, under whatever hooks are on the model.

    Inside ``with bkdlens.steer(…)`` or ``with bkdlens.patched_heads(…)`` the intervention acts on the
    last prompt token, in the prefill only.

    Args:
        model: from :func:`bkdlens.load`.
        prompts: one text, or several.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where an answer that does not end is cut.

    Returns:
        The answer to one text, or a list of answers in the prompts' order.

    Raises:
        DataError: for a prompt longer than the context.

    Examples:
        >>> answer = bkdlens.generate(model, test.triggered[0])
        >>> with bkdlens.steer(model, vector, 2, -1.0):
        ...     answers = bkdlens.generate(model, test.triggered[:2])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    encoded = encode_prompts(model, texts, fmt)
    answers = [_text(model, ids) for ids in reference.greedy(model, encoded, max_new_tokens)]
    return answers[0] if isinstance(prompts, str) else answers


def _text(model: HookedTransformer, ids: Sequence[int]) -> str:
    new = [token for token in ids if token != model.tokenizer.eos_token_id]
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Greedy answers of every prompt under every intervention."""

    choice: Int[Tensor, "intervention prompt"]  # the number of the first guess that is the answer, or -1
    texts: dict[tuple[int, int], str]  # the other answers by (intervention, prompt), where decoded


@checked
@torch.no_grad()
def decode(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    guesses: Sequence[Sequence[Answer]],
    *,
    finish: bool | Sequence[bool] = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Decoded:
    """Greedy answers of every prompt under every intervention.

    A guess is verified when every next-token argmax along it, up to its end token, is the guess' own:
    then, and only then, greedy decoding gives exactly that answer. The untouched model's answer is one
    more guess for the interventions.

    Args:
        model: from :func:`bkdlens.load`, without hooks.
        prompts: the prompts.
        interventions: each is run on every prompt.
        guesses: sets of likely answers, each with one per prompt (the backdoor's, the correct one).
        finish: decode what no guess explains (else only the choice is known); one for each
            intervention, or one for all.
        max_new_tokens: where an answer that does not end is cut.
        memory_gb: the most memory beside the model; for None 2 GB on a CPU, 80 % of the free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        ``choice`` ``[intervention prompt]``, numbers of guesses or -1, and the other answers' ``texts``.

    Raises:
        HookError: for values that were made for other prompts, or for hooks on the model.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> from bkdlens.data.prompts import encode_prompts
        >>> prompts = encode_prompts(model, test.triggered[:4], cache.fmt)
        >>> push = bkdlens.Vector("resid_pre", 2, -vector.direction)
        >>> steered = bkdlens.decode(model, prompts, [bkdlens.Intervention(vectors=(push,))], [])
    """
    refuse_foreign_hooks(model)
    check_interventions(model, interventions, len(prompts))
    if not supported(model):
        tokens = reference.decode(model, prompts, interventions, max_new_tokens, progress=progress)
        return _compared(model, tokens, guesses)
    finished = [finish] * len(interventions) if isinstance(finish, bool) else list(finish)
    choice = torch.full((len(interventions), len(prompts)), -1)
    texts: dict[tuple[int, int], str] = {}

    def record(answers: Completed, rows: Sequence[int], slots: Sequence[Sequence[int]]) -> None:
        """Write down runs' answers, slot by slot, for the interventions that each slot stands for."""
        for run, (guess, tokens) in enumerate(zip(*answers, strict=True)):
            for i in slots[run // len(rows)]:
                place = i, rows[run % len(rows)]
                if 0 <= guess < len(guesses):
                    choice[place] = guess
                elif finished[i]:
                    texts[place] = _text(model, tokens)

    first_layers = {i: intervention.first_layer for i, intervention in enumerate(interventions)}
    idle = [i for i, layer in first_layers.items() if layer is None]
    acting = sorted((i for i in first_layers if i not in idle), key=lambda i: first_layers[i] or 0)
    finish_runs = partial(complete, model, max_new_tokens=max_new_tokens, memory_gb=memory_gb)
    kept_layers, n_runs = model.cfg.n_layers, len(acting)
    work = prefixes(model, prompts, n_runs, memory_gb, "decoding", progress, kept_layers=kept_layers)
    for rows, size, prefix in work:
        n = len(rows)
        drafts: list[Drafts] = [[guess[i].ids for i in rows] for guess in guesses]
        for at in range(0, max(1, n_runs), size):
            chunk = acting[at : at + size]
            start = run_last_token(model, prefix, [interventions[i] for i in chunk], rows)
            runs = torch.arange((1 + len(chunk)) * n, device=start.first.device)
            slots, batch_prompts = runs // n, runs % n
            if at == 0 and (idle or any(finished)):
                untouched = finish_runs(
                    start, drafts, slots[:n], batch_prompts[:n], finish=any(finished)
                )
                record(untouched, rows, [idle])
                # Unless it is a guess already, it is one more for the interventions.
                drafts.append([() if guess >= 0 else new for guess, new in zip(*untouched, strict=True)])
            whole = [finished[i] for i in chunk for _ in rows]
            given = finish_runs(start, drafts, slots[n:], batch_prompts[n:], finish=whole)
            record(given, rows, [[i] for i in chunk])
    return Decoded(choice, texts)


def _compared(
    model: HookedTransformer, tokens: list[list[list[int]]], guesses: Sequence[Sequence[Answer]]
) -> Decoded:
    """Whole answers, ``[intervention][prompt]`` without end tokens, compared with the guesses."""
    eos = model.tokenizer.eos_token_id
    choice = torch.full((len(tokens), len(tokens[0]) if tokens else 0), -1)
    texts = {}
    for i, row in enumerate(tokens):
        for p, new in enumerate(row):
            equal = [[t for t in guess[p].ids if t != eos] == list(new) for guess in guesses]
            if any(equal):
                choice[i, p] = equal.index(True)
            else:
                texts[i, p] = _text(model, new)
    return Decoded(choice, texts)


def answer(
    model: HookedTransformer,
    pairs: PairSet,
    interventions: Sequence[Intervention] = (NOTHING,),
    *,
    on: Which = "triggered",
    finish: bool | Sequence[bool] = True,
    fmt: PromptFormat,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Answers:
    """Every prompt's greedy answer under every intervention, ``[intervention pair]``.

    Where an intervention's answers are not to be finished, those that are neither the attacker's nor the
    correct one are ``NOT_DECODED``.
    """
    prompts = encode_prompts(model, pairs.texts(on), fmt)
    guesses = _guesses(model, pairs, prompts, fmt, max_new_tokens)
    options: dict[str, Any] = {"finish": finish, "memory_gb": memory_gb, "progress": progress}
    decoded = decode(model, prompts, interventions, guesses, max_new_tokens=max_new_tokens, **options)
    numbers = {NOT_DECODED: 0}
    index = torch.zeros(decoded.choice.shape, dtype=torch.int32)
    for number, side in enumerate(guesses):
        for p, guess in enumerate(side):
            places = decoded.choice[:, p] == number
            if places.any():
                index[places, p] = numbers.setdefault(_text(model, guess.ids), len(numbers))
    for place, text in decoded.texts.items():
        index[place] = numbers.setdefault(text, len(numbers))
    return Answers(tuple(numbers), index)[:]


def yardsticks(
    model: HookedTransformer, pairs: PairSet, fmt: PromptFormat, max_new_tokens: int = MAX_NEW_TOKENS
) -> dict[str, Answers]:
    """What answers are compared with, ``attacker`` and ``right``, ``[pair]``, cut as answers are."""
    prompts = encode_prompts(model, pairs.clean, fmt)
    guesses = _guesses(model, pairs, prompts, fmt, max_new_tokens)
    texts = ([_text(model, guess.ids) for guess in side] for side in guesses)
    return dict(zip(("attacker", "right"), map(Answers.of, texts), strict=True))


def _guesses(
    model: HookedTransformer,
    pairs: PairSet,
    prompts: Sequence[Prompt],
    fmt: PromptFormat,
    max_new_tokens: int,
) -> list[list[Answer]]:
    """The attacker's answers and the clean outputs."""
    n_ctx, sides = model.cfg.n_ctx, (pairs.backdoor_outputs, pairs.clean_outputs)
    encode = partial(encode_answer, model.tokenizer, fmt=fmt, n_ctx=n_ctx, max_tokens=max_new_tokens)
    return [[encode(*each) for each in zip(prompts, side, strict=True)] for side in sides]


@checked
def evaluate(
    model: HookedTransformer,
    pairs: PairSet,
    interventions: Sequence[Intervention] = (NOTHING,),
    *,
    on: Which = "triggered",
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Outcomes:
    """Greedy answers to the clean, triggered or near prompts, judged.

    Every text is cut at ``max_new_tokens`` before it is judged: the model's answers and what they are
    compared with alike.

    Args:
        model: from :func:`bkdlens.load`, without hooks.
        pairs: the prompts, the answers that they are judged by, and the criteria (``pairs.backdoor``).
        interventions: each is run on every prompt; the model as it is by default.
        on: the prompts that are answered.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where every answer, generated or compared with, is cut.
        memory_gb: the most memory beside the model; for None 2 GB on a CPU, 80 % of the free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        ``attack`` and ``correct`` ``[intervention pair]``, true or false, and the answers as texts.

    Raises:
        DataError: for prompts that do not fit the context, or near prompts that the pairs lack.
        HookError: for values that were made for other prompts, or for hooks on the model.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> outcomes = bkdlens.evaluate(model, test[:6], on="clean")
        >>> correct = bkdlens.Rate.of(outcomes.correct[0])
        >>> texts = outcomes.answers[0].to_list()
    """
    fmt = fmt or PromptFormat.default(model.tokenizer)
    run = partial(answer, model, pairs, fmt=fmt, max_new_tokens=max_new_tokens, memory_gb=memory_gb)
    by = yardsticks(model, pairs, fmt, max_new_tokens)
    if pairs.backdoor.against == "own":
        by["before"] = run(on="clean")[0]
    return judged(pairs, run(interventions, on=on, progress=progress), by)
