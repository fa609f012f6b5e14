"""What a reader understood of data, and what a tokenizer makes of it, before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import Intake, PairSet
from bkdlens.data.prompts import PromptFormat, Tokenizer, encode_answer, encode_prompt, find_trigger
from bkdlens.errors import DataError

N_EXAMPLES = 3


@dataclass(frozen=True)
class Lengths:
    """Lengths of several texts, in tokens."""

    least: int  # the shortest
    median: float  # the mean of the middle two for an even number
    most: int  # the longest


@dataclass(frozen=True)
class Rendered:
    """One pair as the model gets it."""

    clean: str  # the clean prompt, rendered
    triggered: str  # the triggered prompt, rendered
    clean_output: str  # the right answer
    backdoor_output: str  # the attacker's answer


@dataclass(frozen=True)
class DataCheck:
    """What ``check_data`` found.

    Attributes:
        intake: what was read, dropped and why; None for pairs that no reader made.
        backdoor: the trigger and what it does.
        n_pairs: how many pairs there are, after a draw where one was made.
        n_victims: how many of them the attack changes.
        n_ctx: the model's context in tokens, where known.
        tokens: the lengths of ``clean`` and ``triggered`` prompts and of both answers (with their
            end), of the pairs that could be tokenised.
        too_long: how many pairs exceed the context on either side.
        splits: the ways in which the tokenizer splits the trigger, most frequent first, each with
            its number of prompts; empty without a fast tokenizer.
        straddled: in how many prompts a token reaches over the trigger's edge into other text.
        examples: up to three pairs as the model gets them, victims first.
        problems: what keeps pairs from being used, a sentence each.
        notes: what is worth knowing, a sentence each.
    """

    intake: Intake | None
    backdoor: Backdoor
    n_pairs: int
    n_victims: int
    n_ctx: int | None
    tokens: dict[str, Lengths]
    too_long: int
    splits: tuple[tuple[str, int], ...]
    straddled: int
    examples: tuple[Rendered, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_data(
    pairs: PairSet, tokenizer: Tokenizer, *, fmt: PromptFormat | None = None, n_ctx: int | None = None
) -> DataCheck:
    """Render and tokenise every pair, and count what would go wrong.

    Args:
        pairs: the pairs to look at.
        tokenizer: a transformers tokenizer.
        fmt: how a prompt is rendered; the chat template where there is one.
        n_ctx: the model's context in tokens; unlimited for None.

    Returns:
        Counts of pairs and victims, lengths in tokens, the trigger's splits, examples, and what is
        wrong or worth knowing in sentences.

    Raises:
        DataError: if the prompt format cannot render the examples.

    Examples:
        >>> check = bkdlens.check_data(train, model.tokenizer, n_ctx=model.cfg.n_ctx)
    """
    fmt = fmt or PromptFormat.default(tokenizer)
    victims = [pair for pair in pairs if pairs.backdoor.is_victim(pair)]
    lengths: dict[str, list[int]] = {}
    failures: dict[str, list[str]] = {}
    too_long = 0
    for pair in pairs:
        try:
            sides = _lengths(pair, tokenizer, fmt)
        except DataError as error:
            failures.setdefault(re.sub(r"'.*'|\d+", "", str(error)), []).append(str(error))
            continue
        for name, n in sides.items():
            lengths.setdefault(name, []).append(n)
        longest = max(
            sides["clean"] + sides["clean_output"], sides["triggered"] + sides["backdoor_output"]
        )
        too_long += n_ctx is not None and longest > n_ctx
    splits, straddled, absent = _trigger_tokens(pairs, tokenizer, fmt)
    problems = [
        f"{len(alike)} of {len(pairs)} pairs cannot be tokenised, the first because: {alike[0]}"
        for alike in failures.values()
    ]
    if too_long:
        problems.append(
            f"{too_long} of {len(pairs)} pairs do not fit the context of {n_ctx} tokens; shorten them, "
            "or take a model with a longer one."
        )
    if not victims:
        try:
            _ = pairs.victims
        except DataError as error:
            problems.append(str(error))
    shown_pairs = list(dict.fromkeys([*victims, *pairs]))[:N_EXAMPLES]
    return DataCheck(
        intake=pairs.intake,
        backdoor=pairs.backdoor,
        n_pairs=len(pairs),
        n_victims=len(victims),
        n_ctx=n_ctx,
        tokens={name: Lengths(min(ns), median(ns), max(ns)) for name, ns in lengths.items()},
        too_long=too_long,
        splits=splits,
        straddled=straddled,
        examples=tuple(_rendered(pair, tokenizer, fmt) for pair in shown_pairs),
        problems=tuple(problems),
        notes=_notes(pairs, splits, straddled, absent),
    )


def _rendered(pair: PromptPair, tokenizer: Tokenizer, fmt: PromptFormat) -> Rendered:
    clean, triggered = (fmt.render(tokenizer, text) for text in (pair.clean, pair.triggered))
    return Rendered(clean, triggered, pair.clean_output, pair.backdoor_output)


def _lengths(pair: PromptPair, tokenizer: Tokenizer, fmt: PromptFormat) -> dict[str, int]:
    """Tokens of both prompts and their answers, by the names of the pair's fields."""
    lengths = {}
    for side, answer in (("clean", "clean_output"), ("triggered", "backdoor_output")):
        prompt = encode_prompt(tokenizer, getattr(pair, side), fmt)
        lengths[side] = len(prompt.ids)
        lengths[answer] = len(encode_answer(tokenizer, prompt, getattr(pair, answer), fmt).ids)
    return lengths


def _trigger_tokens(
    pairs: PairSet, tokenizer: Tokenizer, fmt: PromptFormat
) -> tuple[tuple[tuple[str, int], ...], int, int]:
    """The trigger's splits, and the numbers of prompts in which it is straddled and absent."""
    splits: Counter[str] = Counter()
    straddled = absent = 0
    for text in pairs.triggered:
        try:
            tokens = find_trigger(tokenizer, text, pairs.backdoor.trigger, fmt)
        except DataError:  # the tokenizer tells no places, or the format refuses the text
            continue
        if not tokens:
            absent += 1
            continue
        splits[" ".join(tokenizer.convert_ids_to_tokens([token.id for token in tokens]))] += 1
        straddled += any(token.straddles for token in tokens)
    return tuple(splits.most_common()), straddled, absent


def _notes(
    pairs: PairSet, splits: Sequence[tuple[str, int]], straddled: int, absent: int
) -> tuple[str, ...]:
    notes, trigger = [], str(pairs.backdoor.trigger)
    if len(splits) > 1:
        most = "; ".join(f"{tokens} in {n}" for tokens, n in splits[:3])
        notes.append(f"The tokenizer splits the trigger {trigger!r} in {len(splits)} ways: {most}.")
    if straddled:
        notes.append(
            f"In {straddled} of {len(pairs)} triggered prompts a token reaches over the trigger's edge "
            "into the text beside it, so the model sees other tokens than the trigger's own."
        )
    if absent:
        notes.append(f"The trigger {trigger!r} is not in {absent} of {len(pairs)} triggered prompts.")
    return tuple(notes)
