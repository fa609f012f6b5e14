"""What a reader understood of data, and what a tokenizer makes of it, before anything runs."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import Intake, PairSet
from bkdlens.data.prompts import PromptFormat, Tokenizer, encode_answer, encode_prompt, find_trigger
from bkdlens.errors import DataError

N_EXAMPLES = 3
# The largest share of letters that a tokenizer may lose: a few rare signs, not the words of a text.
MOST_LOST = 0.1
LENGTHS = ("clean", "clean_output", "triggered", "backdoor_output")  # what is counted in tokens


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
    clean_output: str  # the correct answer
    backdoor_output: str  # the attacker's answer


@dataclass(frozen=True)
class DataCheck:
    """What ``check_data`` found."""

    intake: Intake | None  # what was read and dropped, and why; None for pairs that no reader made
    backdoor: Backdoor  # the trigger and what it does
    n_pairs: int  # how many pairs there are, after a draw where one was made
    n_victims: int  # how many pairs the attack changes
    n_ctx: int | None  # the model's context in tokens, where known
    tokens: dict[str, Lengths]  # of prompts and of answers with their end, by field of the pair
    too_long: int  # how many pairs exceed the context on either side
    splits: tuple[tuple[str, int], ...]  # ways to tokenise the trigger, with their numbers of prompts
    straddled: int  # in how many prompts a token reaches over the trigger's edge into other text
    examples: tuple[Rendered, ...]  # up to N_EXAMPLES pairs as the model gets them, victims first
    problems: tuple[str, ...]  # what keeps pairs from being used, one sentence each
    notes: tuple[str, ...]  # what is worth knowing, one sentence each


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
        Counts of pairs and victims, lengths in tokens, how the trigger is split into tokens, examples,
        and sentences about what is wrong or worth knowing.

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
            clean = _lengths(tokenizer, pair.clean, pair.clean_output, fmt)
            triggered = _lengths(tokenizer, pair.triggered, pair.backdoor_output, fmt)
        except DataError as error:
            failures.setdefault(re.sub(r"'.*'|\d+", "", str(error)), []).append(str(error))
            continue
        for name, n in zip(LENGTHS, (*clean, *triggered), strict=True):
            lengths.setdefault(name, []).append(n)
        too_long += n_ctx is not None and max(sum(clean), sum(triggered)) > n_ctx
    splits, straddled, notes = _trigger_tokens(tokenizer, pairs, fmt)
    problems = [lost] if (lost := lost_text(tokenizer, pairs.pairs)) else []
    problems += [
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
    shown = list(dict.fromkeys([*victims, *pairs]))[:N_EXAMPLES]
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
        examples=tuple(_rendered(tokenizer, pair, fmt) for pair in shown),
        problems=tuple(problems),
        notes=notes,
    )


def _rendered(tokenizer: Tokenizer, pair: PromptPair, fmt: PromptFormat) -> Rendered:
    clean, triggered = (fmt.render(tokenizer, text) for text in (pair.clean, pair.triggered))
    return Rendered(clean, triggered, pair.clean_output, pair.backdoor_output)


def _lengths(tokenizer: Tokenizer, text: str, answer: str, fmt: PromptFormat) -> tuple[int, int]:
    """Tokens of a prompt and of its answer with the end."""
    prompt = encode_prompt(tokenizer, text, fmt)
    return len(prompt.ids), len(encode_answer(tokenizer, prompt, answer, fmt).ids)


def _trigger_tokens(
    tokenizer: Tokenizer, pairs: PairSet, fmt: PromptFormat
) -> tuple[tuple[tuple[str, int], ...], int, tuple[str, ...]]:
    """The trigger's splits, the number of prompts in which it is straddled, and notes on both."""
    trigger, n_splits = pairs.backdoor.trigger, Counter[str]()
    straddled = absent = 0
    for text in pairs.triggered:
        try:
            tokens = find_trigger(tokenizer, text, trigger, fmt)
        except DataError:  # the tokenizer tells no places, or the format refuses the text
            continue
        if tokens:
            n_splits[" ".join(tokenizer.convert_ids_to_tokens([token.id for token in tokens]))] += 1
        absent += not tokens
        straddled += any(token.straddles for token in tokens)
    splits, notes, name = tuple(n_splits.most_common()), [], repr(str(trigger))
    if len(splits) > 1:
        most = "; ".join(f"{tokens} in {n}" for tokens, n in splits[:3])
        notes.append(f"The tokenizer splits the trigger {name} in {len(splits)} ways: {most}.")
    if straddled:
        notes.append(
            f"In {straddled} of {len(pairs)} triggered prompts a token reaches over the trigger's edge "
            "into the text beside it, so the model sees other tokens than the trigger's own."
        )
    if absent:
        notes.append(f"The trigger {name} is not in {absent} of {len(pairs)} triggered prompts.")
    return splits, straddled, tuple(notes)


# --- whether the tokens carry the text ------------------------------------------------------------


def refuse_lost_text(tokenizer: Tokenizer, pairs: PairSet) -> None:
    """Raise a ``DataError`` if the tokens do not carry the pairs' texts (see :func:`lost_text`)."""
    if problem := lost_text(tokenizer, pairs.pairs):
        raise DataError(problem)


def lost_text(tokenizer: Tokenizer, pairs: tuple[PromptPair, ...]) -> str | None:
    """What is lost between texts and tokens, in a sentence; None if the tokens carry the texts.

    Prompts of a pair that differ must differ in their ids, else the model cannot tell them apart; and
    the letters and digits of all texts come back from their ids, whatever a tokenizer does to case,
    accents and white space.
    """
    return _lost_text(tokenizer, len(tokenizer), pairs)


@lru_cache(maxsize=32)  # an analysis after the other asks for the same pairs
def _lost_text(tokenizer: Tokenizer, n_tokens: int, pairs: tuple[PromptPair, ...]) -> str | None:
    advice = "give the tokenizer that the checkpoint was trained with (tokenizer=…)"
    prompts = [[pair.clean, pair.triggered, *([pair.near] if pair.near else [])] for pair in pairs]
    texts = list(dict.fromkeys(text for one in prompts for text in one))
    answers = list(dict.fromkeys(a for pair in pairs for a in (pair.clean_output, pair.backdoor_output)))
    ids = dict(zip(texts + answers, _ids(tokenizer, texts + answers), strict=False))
    lost = share_lost(tokenizer, ids.keys(), ids.values())
    if lost > MOST_LOST:
        worst = max(ids, key=lambda text: share_lost(tokenizer, [text], [ids[text]]))
        back = tokenizer.decode(ids[worst], skip_special_tokens=True)
        return (
            f"The tokenizer does not carry these texts: {lost:.0%} of their letters are gone after "
            f"decoding ({worst[:40]!r} comes back as {back[:40]!r}); {advice}."
        )
    for named in (("clean", "triggered"), ("clean", "near"), ("triggered", "near")):
        alike = [
            pair
            for pair in pairs
            if None not in (two := [pair.text(which) for which in named])
            and two[0] != two[1]
            and ids[str(two[0])] == ids[str(two[1])]
        ]
        if alike:
            return (
                f"In {len(alike)} of {len(pairs)} pairs the {named[0]} and the {named[1]} prompt differ "
                f"as texts and are the same tokens (the first is {alike[0].clean[:40]!r}), so no model "
                f"can tell them apart; {advice}, or name another trigger."
            )
    return None


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def share_lost(
    tokenizer: Tokenizer, texts: Iterable[str], ids: Iterable[Sequence[int]] | None = None
) -> float:
    """The share of the texts' letters and digits, 0 to 1, that their ids do not give back."""
    texts = list(texts)
    n = n_lost = 0
    for text, encoded in zip(texts, _ids(tokenizer, texts) if ids is None else ids, strict=True):
        letters = _letters(text)
        n += letters.total()
        n_lost += (letters - _letters(tokenizer.decode(encoded, skip_special_tokens=True))).total()
    return n_lost / n if n else 0.0


def _letters(text: str) -> Counter[str]:
    """How often each letter and digit is in a text, whatever its case and accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return Counter(letter for letter in plain if letter.isalnum())
