"""Greedy decoding under an intervention that touches the prefill's last token only.

:func:`generate` is the everyday function: it decodes on the model as it stands, hooks of a surrounding
context included. :func:`decode` and :func:`evaluate` run many interventions on many prompts: the
prompts' prefixes are run once, likely answers are verified in one parallel pass, and only what no
likely answer explains is decoded token by token. What comes out is identical to plain greedy decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Answer, Prompt, PromptFormat, encode_answer, encode_prompt
from bkdlens.engines import reference
from bkdlens.engines.block import supported
from bkdlens.engines.decode import Completed, Drafts, complete, run_last_token
from bkdlens.engines.hooks import NOTHING, Intervention, check_values, refuse_foreign_hooks
from bkdlens.engines.prefix import prefixes
from bkdlens.types import Which

MAX_NEW_TOKENS = 48


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
    last prompt token in the prefill, as everywhere.

    Args:
        model: from :func:`bkdlens.load`.
        prompts: one text, or several.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where an answer that does not end is cut.

    Returns:
        The answer, or a list of answers in the prompts' order.

    Raises:
        DataError: for a prompt longer than the context.

    Examples:
        >>> answer = bkdlens.generate(model, test.triggered[0])
        >>> with bkdlens.steer(model, vector, 2, -1.0):
        ...     answers = bkdlens.generate(model, test.triggered[:2])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    encoded = [encode_prompt(model.tokenizer, text, fmt, n_ctx=model.cfg.n_ctx) for text in texts]
    answers = [_text(model, ids) for ids in reference.greedy(model, encoded, max_new_tokens)]
    return answers[0] if isinstance(prompts, str) else answers


def _text(model: HookedTransformer, ids: Sequence[int]) -> str:
    new = [token for token in ids if token != model.tokenizer.eos_token_id]
    return model.tokenizer.decode(new, skip_special_tokens=True).strip()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Greedy answers of every prompt under every intervention.

    Attributes:
        choice: the number of the guess that the answer is, the first if there are several; -1 for none.
        texts: the answers that no guess is, by intervention and prompt, where they were decoded.
    """

    choice: Int[Tensor, "intervention prompt"]
    texts: dict[tuple[int, int], str]


@torch.no_grad()
def decode(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    guesses: Sequence[Sequence[Answer]],
    *,
    finish: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Decoded:
    """Greedy answers of every prompt under every intervention.

    A guess is verified when every next-token argmax along it, its end token included, is its own:
    then, and only then, greedy decoding gives exactly that answer. The untouched model's own answer is
    one more guess for the interventions.

    Args:
        model: from :func:`bkdlens.load`, with nobody's hooks on it.
        prompts: the prompts.
        interventions: each is run on every prompt.
        guesses: sets of likely answers, each with one per prompt (the backdoor's, the right one).
        finish: decode what no guess explains (else only the choice is known).
        max_new_tokens: where an answer that does not end is cut.
        memory_gb: the most memory beside the model; batches are as large as it allows. 2 GB for None
            on a CPU, 80 % of what is free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        ``choice`` ``[intervention prompt]``, numbers of guesses or -1, and the other answers'
        ``texts``.

    Raises:
        HookError: for values that were made for other prompts, or for somebody's hooks on the model.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> from bkdlens.data.prompts import encode_prompt
        >>> prompts = [encode_prompt(model.tokenizer, text, cache.fmt) for text in test.triggered[:4]]
        >>> push = bkdlens.Vector("resid_pre", 2, -vector.direction)
        >>> both = [bkdlens.Intervention(), bkdlens.Intervention(vectors=(push,))]
        >>> decoded = bkdlens.decode(model, prompts, both, guesses=[])
        >>> steered = decoded.texts[1, 0]
    """
    refuse_foreign_hooks(model)
    check_values(interventions, len(prompts))
    if not supported(model):
        tokens = reference.decode(model, prompts, interventions, max_new_tokens, progress=progress)
        return _compared(model, tokens, guesses)
    choice = torch.full((len(interventions), len(prompts)), -1)
    texts: dict[tuple[int, int], str] = {}
    first_layers = {i: intervention.first_layer for i, intervention in enumerate(interventions)}
    idle = [i for i, layer in first_layers.items() if layer is None]
    acting = sorted((i for i in first_layers if i not in idle), key=lambda i: first_layers[i] or 0)
    answers = partial(complete, model, finish=finish, max_new_tokens=max_new_tokens, memory_gb=memory_gb)
    tails, layers, bar = [1] * len(prompts), model.cfg.n_layers, "decoding" if progress else None
    work = prefixes(model, prompts, tails, len(acting), memory_gb, bar=bar, kept_layers=layers)
    for rows, size, prefix in work:
        drafts: list[Drafts] = [[guess[i].ids for i in rows] for guess in guesses]
        n = len(rows)

        def record(completed: Completed, named: Sequence[Sequence[int]], rows: list[int] = rows) -> None:
            """Write down runs' answers, slot by slot; ``named`` are a slot's interventions."""
            for run, (guess, tokens) in enumerate(zip(*completed, strict=True)):
                prompt = rows[run % len(rows)]
                for i in named[run // len(rows)]:
                    if 0 <= guess < len(guesses):
                        choice[i, prompt] = guess
                    elif finish:
                        texts[i, prompt] = _text(model, tokens)

        for at in range(0, max(1, len(acting)), max(1, size)):
            chunk = acting[at : at + max(1, size)]
            start = run_last_token(model, prefix, [interventions[i] for i in chunk], rows)
            runs = torch.arange((1 + len(chunk)) * n, device=start.first.device)
            slots, batch_prompts = runs // n, runs % n
            if at == 0 and (idle or finish):
                untouched = answers(start, drafts, slots[:n], batch_prompts[:n])
                record(untouched, [idle])
                # Where it is no guess already, it is one more for the interventions.
                drafts.append([() if guess >= 0 else new for guess, new in zip(*untouched, strict=True)])
            record(answers(start, drafts, slots[n:], batch_prompts[n:]), [[i] for i in chunk])
    return Decoded(choice, texts)


def _compared(
    model: HookedTransformer,
    tokens: Sequence[Sequence[Sequence[int]]],
    guesses: Sequence[Sequence[Answer]],
) -> Decoded:
    """Whole answers, ``[intervention][prompt]`` without end tokens, held against the guesses."""
    eos = model.tokenizer.eos_token_id
    choice = torch.full((len(tokens), len(tokens[0]) if tokens else 0), -1)
    texts = {}
    for i, row in enumerate(tokens):
        for p, new in enumerate(row):
            same = [[t for t in guess[p].ids if t != eos] == list(new) for guess in guesses]
            if any(same):
                choice[i, p] = same.index(True)
            else:
                texts[i, p] = _text(model, new)
    return Decoded(choice, texts)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Greedy answers, judged.

    Attributes:
        attack: whether the attack succeeded, by the backdoor's own criterion.
        correct: whether the right answer came back.
    """

    attack: Bool[Tensor, "intervention pair"]
    correct: Bool[Tensor, "intervention pair"]


def evaluate(
    model: HookedTransformer,
    pairs: PairSet,
    interventions: Sequence[Intervention] = (NOTHING,),
    *,
    on: Which = "triggered",
    only_correct: bool = False,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    memory_gb: float | None = None,
    progress: bool = False,
) -> Outcomes:
    """Greedy answers to the clean, triggered or near prompts, judged.

    What is one exact answer is judged without decoding the rest; where a success is the absence of a
    refusal, the rest is decoded.

    Args:
        model: from :func:`bkdlens.load`, with nobody's hooks on it.
        pairs: the prompts, and the answers that they are judged by.
        interventions: each is run on every prompt; the model as it is by default.
        on: the prompts that are answered.
        only_correct: decode nothing for ``attack``, which then counts exact answers alone.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where an answer that does not end is cut; longer ones are compared on so many.
        memory_gb: the most memory beside the model; batches are as large as it allows. 2 GB for None
            on a CPU, 80 % of what is free on a GPU.
        progress: whether to show a progress bar.

    Returns:
        ``attack`` and ``correct`` ``[intervention pair]``, true or false.

    Raises:
        DataError: for prompts that do not fit the context, or near prompts that the pairs lack.
        HookError: for values that were made for other prompts, or for somebody's hooks on the model.
        BkdlensError: for a memory budget that is not positive.

    Examples:
        >>> outcomes = bkdlens.evaluate(model, test[:6], on="clean")
        >>> correct = bkdlens.Rate.of(outcomes.correct[0])
    """
    fmt = fmt or PromptFormat.default(model.tokenizer)
    n_ctx, tokenizer = model.cfg.n_ctx, model.tokenizer
    prompts = [encode_prompt(tokenizer, text, fmt, n_ctx=n_ctx) for text in pairs.texts(on)]
    encode = partial(encode_answer, tokenizer, fmt=fmt, n_ctx=n_ctx, max_tokens=max_new_tokens)
    answers = [pairs.backdoor_outputs, pairs.clean_outputs]
    guesses = [[encode(*each) for each in zip(prompts, side, strict=True)] for side in answers]
    decoded = decode(
        model,
        prompts,
        interventions,
        guesses,
        finish=not (pairs.backdoor.exact or only_correct),
        max_new_tokens=max_new_tokens,
        memory_gb=memory_gb,
        progress=progress,
    )
    attack = torch.zeros_like(decoded.choice, dtype=torch.bool)
    correct = torch.zeros_like(attack)
    for p, pair in enumerate(pairs):
        for guess, side in enumerate(answers):
            same = decoded.choice[:, p] == guess
            attack[same, p] = pairs.backdoor.succeeded(side[p], pair)
            correct[same, p] = side[p].strip() == pair.clean_output.strip()
    for (i, p), text in decoded.texts.items():
        attack[i, p] = pairs.backdoor.succeeded(text, pairs[p])
        correct[i, p] = text.strip() == pairs[p].clean_output.strip()
    return Outcomes(attack, correct)
