"""Greedy decoding under an intervention that touches the prefill's last token only.

:func:`generate` is the everyday function: it decodes on the model as it stands, hooks of a surrounding
context included. :func:`decode` and :func:`evaluate` run many interventions on many prompts: the
prompts' prefixes are run once, likely answers are verified in one parallel pass, and only what no
likely answer explains is decoded token by token. What comes out is identical to plain greedy decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from bkdlens.data import PairSet, Which
from bkdlens.errors import DataError
from bkdlens.hooks import (
    NOTHING,
    Hooks,
    Intervention,
    check_values,
    intervention_hooks,
    refuse_foreign_hooks,
)
from bkdlens.progress import track
from bkdlens.prompts import (
    Answer,
    Prompt,
    PromptFormat,
    encode_answer,
    encode_prompt,
    pad_id,
    pad_left,
)
from bkdlens.resume import (
    Prefix,
    Tail,
    decode_runs,
    resume,
    run_prefixes,
    run_tail,
    runs_per_batch,
)

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

    Inside ``with bkdlens.steer(…)`` or ``with bkdlens.patch_heads(…)`` the intervention acts on the
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
    """
    single = isinstance(prompts, str)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    encoded = [encode_prompt(model.tokenizer, t, fmt, n_ctx=model.cfg.n_ctx) for t in texts]
    # One batch: hooks with a value for each prompt rely on the prompts' order.
    ids, mask = pad_left([prompt.ids for prompt in encoded], pad_id(model.tokenizer))
    ids, mask = ids.to(model.W_E.device), mask.to(model.W_E.device)
    room = [min(max_new_tokens, model.cfg.n_ctx - len(prompt.ids)) for prompt in encoded]
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, len(texts))
    logits = model(ids, attention_mask=mask.int(), past_kv_cache=cache)
    new = _decode_on(model, cache, logits[:, -1].argmax(-1), room)
    answers = [_text(model, row) for row in new]
    return answers[0] if single else answers


def _decode_on(
    model: HookedTransformer,
    cache: TransformerLensKeyValueCache,
    token: Int[Tensor, " row"],
    limits: Sequence[int],
) -> list[list[int]]:
    """Continue greedily from a first new token; rows end before their end-of-sequence token."""
    out: list[list[int]] = [[] for _ in token]
    room = torch.tensor(limits, device=token.device)
    done = torch.zeros_like(token, dtype=torch.bool)
    for step in range(max(limits)):
        done |= (token == model.tokenizer.eos_token_id) | (room <= step)
        for i in (~done).nonzero()[:, 0].tolist():
            out[i].append(int(token[i]))
        if bool((done | (room <= step + 1)).all()):
            break
        ones = torch.ones_like(token)[:, None].int()
        token = model(token[:, None], attention_mask=ones, past_kv_cache=cache)[:, -1].argmax(-1)
    return out


def _text(model: HookedTransformer, ids: Sequence[int]) -> str:
    return model.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Which of the likely answers each run gave in full (-1 for none), and the texts of the others."""

    choice: Int[Tensor, "intervention prompt"]
    texts: dict[tuple[int, int], str]  # of the runs with choice -1, where they were decoded


@torch.inference_mode()
def decode(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    guesses: Sequence[Sequence[Answer]],
    *,
    finish: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
    progress: bool = False,
) -> Decoded:
    """Greedy answers of every prompt under every intervention.

    A guess is verified when every next-token argmax along it, its end token included, is its own:
    then, and only then, greedy decoding gives exactly that answer.

    Args:
        model: the model; no hooks of anybody's on it.
        prompts: the prompts.
        interventions: each is run on every prompt.
        guesses: sets of likely answers, each with one answer a prompt (the backdoor's, the right one).
        finish: decode what no guess explains (else only the choice is known).
        max_new_tokens: where an answer that does not end is cut.
        batch_size: runs at once; chosen from memory for None.
        progress: whether to show a progress bar.
    """
    refuse_foreign_hooks(model)
    check_values(interventions, len(prompts))
    device = model.W_E.device
    choice = torch.full((len(interventions), len(prompts)), -1, device=device)
    texts: dict[tuple[int, int], str] = {}
    # Runs of one chunk share the layer from which they resume.
    order = sorted(range(len(interventions)), key=lambda i: _first_layer(interventions[i]))
    work: list[tuple[Prefix, list[int]]] = []
    for prefix in run_prefixes(model, prompts):
        longest = max(len(g[i].ids) for g in guesses for i in prefix.rows) if guesses else 1
        size = batch_size or runs_per_batch(model, prefix.mask.shape[1], longest)
        step = max(1, size // len(prefix))
        work += [(prefix, order[i : i + step]) for i in range(0, len(order), step)]
    tails: list[Tail] = []
    current: Prefix | None = None
    for prefix, chunk in track(work, "decoding", progress):
        if prefix is not current:
            current = prefix
            tails = [run_tail(model, prefix, [g[i].ids for i in prefix.rows]) for g in guesses]
        batch = _Chunk(model, prefix, [interventions[i] for i in chunk])
        chosen = batch.verify(tails)
        places = torch.tensor(prefix.rows, device=device)
        choice[torch.tensor(chunk, device=device)[:, None], places] = chosen
        if finish:
            for i, p, tokens in batch.decode((chosen < 0).flatten().nonzero()[:, 0], max_new_tokens):
                texts[chunk[i], prefix.rows[p]] = _text(model, tokens)
    return Decoded(choice.cpu(), texts)


def _first_layer(intervention: Intervention) -> int:
    return 0 if intervention.first_layer is None else intervention.first_layer


class _Chunk:
    """Some interventions on one prefix: a run is (intervention, prompt), numbered row by row."""

    def __init__(
        self, model: HookedTransformer, prefix: Prefix, interventions: Sequence[Intervention]
    ) -> None:
        self.model, self.prefix, self.interventions = model, prefix, interventions
        self.layer = min(_first_layer(i) for i in interventions)

    def hooks(self, runs: Int[Tensor, " run"]) -> Hooks:
        return intervention_hooks(
            self.model, self.interventions, len(self.prefix), 0, rows=self.prefix.rows, runs=runs
        )

    def verify(self, tails: Sequence[Tail]) -> Int[Tensor, "intervention prompt"]:
        """The first guess that each run gives in full, or -1."""
        n = len(self.prefix)
        device = self.prefix.last.device
        every = torch.arange(len(self.interventions) * n, device=device)
        choice = torch.full_like(every, -1)
        if not tails:
            return choice.view(-1, n)
        # The first new token is the same whatever the guess, and rules out most guesses.
        logits = resume(self.model, tails[0], every % n, self.layer, self.hooks(every), width=1)
        first = logits[:, 0].argmax(-1)
        for guess, tail in enumerate(tails):
            runs = ((choice < 0) & (first == tail.targets[every % n, 0])).nonzero()[:, 0]
            if len(runs):
                local = runs % n
                logits = resume(self.model, tail, local, self.layer, self.hooks(runs))
                agrees = (logits.argmax(-1) == tail.targets[local]) | ~tail.mask[local]
                choice[runs[agrees.all(-1)]] = guess
        return choice.view(-1, n)

    def decode(self, runs: Int[Tensor, " run"], max_new_tokens: int) -> list[tuple[int, int, list[int]]]:
        """(intervention, prompt, new tokens) of each run, token by token."""
        if not len(runs):
            return []
        n = len(self.prefix)
        new = decode_runs(self.model, self.prefix, runs % n, self.hooks(runs), max_new_tokens)
        return [(int(run) // n, int(run) % n, t) for run, t in zip(runs, new, strict=True)]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """For each intervention and pair: did the attack succeed, did the right answer come back?"""

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
    batch_size: int | None = None,
    progress: bool = False,
) -> Outcomes:
    """Greedy answers to the clean, triggered or near prompts, judged.

    ``correct`` is equality with the right answer; answers of more than ``max_new_tokens`` tokens are
    compared on so many. What is one exact answer is judged without decoding the rest; where a success
    is the absence of a refusal, the rest is decoded unless ``only_correct`` is wanted (``attack`` then
    counts exact answers alone).

    Raises:
        DataError: for prompts that do not fit the context, or near prompts that the pairs lack.
    """
    fmt = fmt or PromptFormat.default(model.tokenizer)
    n_ctx, tokenizer = model.cfg.n_ctx, model.tokenizer
    texts = [{"clean": p.clean, "triggered": p.triggered, "near": p.near}[on] for p in pairs]
    if None in texts:
        raise DataError("These pairs have no near-trigger prompts; name near triggers.")
    prompts = [encode_prompt(tokenizer, str(text), fmt, n_ctx=n_ctx) for text in texts]
    answers = [pairs.backdoor_outputs, pairs.clean_outputs]
    guesses = [
        [
            encode_answer(tokenizer, p, a, fmt, n_ctx=n_ctx, max_tokens=max_new_tokens)
            for p, a in zip(prompts, side, strict=True)
        ]
        for side in answers
    ]
    decoded = decode(
        model,
        prompts,
        interventions,
        guesses,
        finish=not (pairs.backdoor.exact or only_correct),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
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
