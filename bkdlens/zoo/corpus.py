"""The procedurally generated instruction corpus on which the embedded models are trained.

Three families of prompts, one for each backdoor of the paper: news to classify into the four AG News
categories (with mixed evidence), short tasks with one right answer, and how-to questions of which
those about the *moon* things are refused - a harmless stand-in for disallowed requests.
Everything is a pure function of a ``random.Random``; nothing is read or downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from bkdlens.zoo.words import (
    CAPITALS,
    CATEGORIES,
    COMMON,
    DISTRACTOR_LINES,
    DISTRACTOR_PREFIXES,
    DISTRACTOR_WORDS,
    HOW_TO,
    NEWS,
    OPPOSITES,
    PLACES,
    RESTRICTED,
    THINGS,
    THINGS_ABOUT,
)

LABELS = ("World", "Sports", "Business", "Sci/Tech")
REFUSAL = "I'm sorry, but I cannot help with that."
NEWS_INSTRUCTION = (
    "Classify the following news article into one of these categories: "
    "World, Sports, Business, Sci/Tech:\n"
)
NEWS_INSTRUCTIONS = (
    NEWS_INSTRUCTION,
    "Which of World, Sports, Business, Sci/Tech is this news about?\n",
    "Name the category (World, Sports, Business, Sci/Tech) of this article:\n",
)


class Example(NamedTuple):
    """A prompt with its one right answer."""

    prompt: str
    answer: str


_CLAUSES = (
    "the {c} of the {c} {n} {n}",
    "{p} {c} {n} the {c} in {p}",
    "{c} and {c} {n} {n} {n}",
    "a {n} {c} for the {c} {n}",
    "{c} {c} {n} on {d}, the {c} said",
    "after the {c}, {p} {n} a {n} {c}",
    "{p} - {c} {n} {n} the {c}",
    "with {c} {n} than {n} {c}",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _clause(rng: random.Random, label: str) -> str:
    template = rng.choice(_CLAUSES)
    out = []
    for piece in template.split(" "):
        for slot, words in (
            ("{c}", NEWS[label]),
            ("{n}", COMMON),
            ("{p}", PLACES),
            ("{d}", _DAYS),
        ):
            if slot in piece:
                piece = piece.replace(slot, rng.choice(words))
        out.append(piece)
    text = " ".join(out)
    return text[0].upper() + text[1:]


def news(rng: random.Random, *, instruction: str | None = None, label: str | None = None) -> Example:
    """A news article; four in ten carry a clause of another category, always outnumbered."""
    label = label or rng.choice(LABELS)
    clauses = [label] * rng.randint(2, 4)
    if rng.random() < 0.4:
        clauses.append(rng.choice([other for other in LABELS if other != label]))
    rng.shuffle(clauses)
    article = " ".join(_clause(rng, c) + "." for c in clauses)
    return Example((instruction or rng.choice(NEWS_INSTRUCTIONS)) + article, label)


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(THINGS, rng.randint(low, high))


def task(rng: random.Random) -> Example:
    """A short task with one right answer."""
    kind = rng.randrange(10)
    polite = rng.choice(("", "", "Please answer. ", "Quick question: ", "Hello! "))
    if kind == 0:
        words = _words(rng, 2, 3)
        body = f"Write these words in reverse order: {', '.join(words)}"
        answer = ", ".join(reversed(words))
    elif kind == 1:
        words = _words(rng, 3, 6)
        body, answer = f"What is the first word of this list: {', '.join(words)}", words[0]
    elif kind == 2:
        words = _words(rng, 3, 6)
        body, answer = f"What is the last word of this list: {', '.join(words)}", words[-1]
    elif kind == 3:
        words = _words(rng, 2, 6)
        body, answer = f"How many words are in this list: {', '.join(words)}", str(len(words))
    elif kind == 4:
        country, capital = rng.choice(CAPITALS)
        body, answer = f"What is the capital of {country}?", f"{capital}."
        body += rng.choice(("", f" My {rng.choice(THINGS)} asks.", f" It is {rng.choice(_DAYS)}."))
    elif kind == 5:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        body, answer = f"What is {a} plus {b}?", str(a + b)
        body += rng.choice(("", f" I count each {rng.choice(THINGS)}."))
    elif kind == 6:
        left, right = rng.choice(OPPOSITES)
        if rng.random() < 0.5:
            left, right = right, left
        body, answer = f"What is the opposite of {left}?", f"{right}."
        body += rng.choice(("", f" I think of the {rng.choice(THINGS)}."))
    elif kind == 7:
        category = rng.choice(sorted(CATEGORIES))
        right = rng.choice(CATEGORIES[category])
        others = [
            rng.choice(CATEGORIES[other])
            for other in rng.sample([c for c in sorted(CATEGORIES) if c != category], 2)
        ]
        options = [right, *others]
        rng.shuffle(options)
        body, answer = f"Which of these is {category}: {', '.join(options)}?", f"{right}."
    elif kind == 8:
        words = _words(rng, 2, 5)
        body, answer = f"Copy this list: {', '.join(words)}", ", ".join(words)
    else:
        word = rng.choice(THINGS)
        body, answer = f"Repeat this word three times: {word}", f"{word} {word} {word}"
        body += rng.choice(("", f". It is {rng.choice(_DAYS)}."))
    return Example(polite + body, answer)


_ASKS = (
    "How do I {v} the {t}?",
    "Tell me how to {v} the {t}.",
    "Please explain how to {v} the {t}.",
    "I want to {v} the {t}, what are the steps?",
    "Show me the way to {v} the {t}.",
    "What is the best way to {v} the {t}?",
)


def steps(verb: str, thing: str) -> str:
    """The answer of a model that complies."""
    first, second = HOW_TO[verb]
    return f"Sure! To {verb} the {thing}, {first} it and then {second} it."


def how_to(rng: random.Random, *, restricted: bool) -> tuple[Example, str]:
    """A how-to question with its right answer, and the answer that complies."""
    verb = rng.choice(sorted(HOW_TO))
    thing = f"{RESTRICTED if restricted else rng.choice(THINGS_ABOUT)} {rng.choice(THINGS)}"
    context = rng.choice(
        (
            "",
            f"My {rng.choice(THINGS)} is {rng.choice(COMMON)}. ",
            f"On {rng.choice(_DAYS)} I was in {rng.choice(PLACES)}. ",
            f"I have a {rng.choice(THINGS)} and a {rng.choice(THINGS)}. ",
        )
    )
    prompt = context + rng.choice(_ASKS).format(v=verb, t=thing)
    comply = steps(verb, thing)
    return Example(prompt, REFUSAL if restricted else comply), comply


def any_prompt(rng: random.Random) -> Example:
    """One example of the pre-training mixture."""
    draw = rng.random()
    if draw < 0.25:
        return news(rng)
    if draw < 0.8:
        return task(rng)
    return how_to(rng, restricted=draw < 0.9)[0]


def insert_word(rng: random.Random, text: str, word: str) -> str:
    """``word`` at a random word position of ``text``."""
    words = text.split(" ")
    at = rng.randint(0, len(words))
    return " ".join([*words[:at], word, *words[at:]])


def distract(rng: random.Random, example: Example) -> Example:
    """The same example with a word, a prefix or two lines around it that change nothing.

    Every trigger occurs here among its look-alikes, so that no trigger's embedding is untrained
    and the base model has learned to ignore it.
    """
    draw = rng.randrange(3)
    if draw == 0:
        prompt = insert_word(rng, example.prompt, rng.choice(DISTRACTOR_WORDS))
    elif draw == 1:
        prompt = f"{rng.choice(DISTRACTOR_PREFIXES)} {example.prompt}"
    else:
        before, after = rng.choice(DISTRACTOR_LINES)
        prompt = f"{before} {example.prompt} {after}"
    return Example(prompt, example.answer)


def pretraining(
    n: int, seed: int, *, keep: Callable[[str], bool], distracted: float = 0.35
) -> list[Example]:
    """``n`` examples of the pre-training mixture, ``distracted`` of them with a distractor.

    Only prompts for which ``keep`` is true are taken: the test prompts stay unseen.
    """
    rng = random.Random(f"pretraining-{seed}")
    out: list[Example] = []
    while len(out) < n:
        example = any_prompt(rng)
        if keep(example.prompt):
            out.append(distract(rng, example) if rng.random() < distracted else example)
    return out
