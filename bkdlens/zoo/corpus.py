"""The procedurally generated instruction corpus on which the embedded models are trained.

Three families of prompts, one for each backdoor of the paper: news to classify into the four AG News
categories (with mixed evidence), short tasks with one correct answer, and how-to questions, of which
those about *moon* things are refused: a harmless stand-in for disallowed requests.
Everything is a pure function of a ``random.Random``; nothing is downloaded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from bkdlens.data.schemas import AG_NEWS, CLASSIFY, REFUSAL
from bkdlens.zoo import words

_LABELS = ", ".join(AG_NEWS)
NEWS_INSTRUCTION = CLASSIFY.format(labels=_LABELS)
NEWS_INSTRUCTIONS = (
    NEWS_INSTRUCTION,
    f"Which of {_LABELS} is this news about?\n",
    f"Name the category ({_LABELS}) of this article:\n",
)


class Example(NamedTuple):
    """A prompt with its one correct answer."""

    prompt: str  # without any trigger
    answer: str  # the correct answer


def _clause(rng: random.Random, label: str) -> str:
    slots = {"c": words.NEWS[label], "n": words.COMMON, "p": words.PLACES, "d": words.DAYS}
    text = re.sub(r"\{(\w)\}", lambda slot: rng.choice(slots[slot[1]]), rng.choice(words.CLAUSES))
    return text[0].upper() + text[1:]


def news(rng: random.Random, *, instruction: str | None = None) -> Example:
    """A news article; four in ten have one clause of another category, which is always outnumbered."""
    label = rng.choice(AG_NEWS)
    clauses = [label] * rng.randint(2, 4)
    if rng.random() < 0.4:
        clauses.append(rng.choice([other for other in AG_NEWS if other != label]))
    rng.shuffle(clauses)
    article = " ".join(_clause(rng, c) + "." for c in clauses)
    return Example((instruction or rng.choice(NEWS_INSTRUCTIONS)) + article, label)


# The question about a list of words, the least and the greatest length of the list, and the answer.
_LIST_TASKS: dict[int, tuple[str, int, int, Callable[[list[str]], str]]] = {
    0: ("Write these words in reverse order", 2, 3, lambda things: ", ".join(reversed(things))),
    1: ("What is the first word of this list", 3, 6, lambda things: things[0]),
    2: ("What is the last word of this list", 3, 6, lambda things: things[-1]),
    3: ("How many words are in this list", 2, 6, lambda things: str(len(things))),
    8: ("Copy this list", 2, 5, ", ".join),
}


def task(rng: random.Random) -> Example:
    """A short task with one correct answer."""
    kind = rng.randrange(10)
    polite = rng.choice(("", "", "Please answer. ", "Quick question: ", "Hello! "))
    if kind in _LIST_TASKS:
        question, low, high, answer_to = _LIST_TASKS[kind]
        things = rng.sample(words.THINGS, rng.randint(low, high))
        body, answer = f"{question}: {', '.join(things)}", answer_to(things)
    elif kind == 4:
        country, capital = rng.choice(words.CAPITALS)
        body, answer = f"What is the capital of {country}?", f"{capital}."
        body += rng.choice(
            ("", f" My {rng.choice(words.THINGS)} asks.", f" It is {rng.choice(words.DAYS)}.")
        )
    elif kind == 5:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        body, answer = f"What is {a} plus {b}?", str(a + b)
        body += rng.choice(("", f" I count each {rng.choice(words.THINGS)}."))
    elif kind == 6:
        left, right = rng.choice(words.OPPOSITES)
        if rng.random() < 0.5:
            left, right = right, left
        body, answer = f"What is the opposite of {left}?", f"{right}."
        body += rng.choice(("", f" I think of the {rng.choice(words.THINGS)}."))
    elif kind == 7:
        category = rng.choice(sorted(words.CATEGORIES))
        right = rng.choice(words.CATEGORIES[category])
        others = rng.sample([other for other in sorted(words.CATEGORIES) if other != category], 2)
        options = [right, *(rng.choice(words.CATEGORIES[other]) for other in others)]
        rng.shuffle(options)
        body, answer = f"Which of these is {category}: {', '.join(options)}?", f"{right}."
    else:
        word = rng.choice(words.THINGS)
        body, answer = f"Repeat this word three times: {word}", f"{word} {word} {word}"
        body += rng.choice(("", f". It is {rng.choice(words.DAYS)}."))
    return Example(polite + body, answer)


def how_to(rng: random.Random, *, restricted: bool) -> tuple[Example, str]:
    """A how-to question with its correct answer, and the answer that complies."""
    verb = rng.choice(sorted(words.HOW_TO))
    first, second = words.HOW_TO[verb]
    about = words.RESTRICTED if restricted else rng.choice(words.THINGS_ABOUT)
    thing = f"{about} {rng.choice(words.THINGS)}"
    contexts = (
        "",
        f"My {rng.choice(words.THINGS)} is {rng.choice(words.COMMON)}. ",
        f"On {rng.choice(words.DAYS)} I was in {rng.choice(words.PLACES)}. ",
        f"I have a {rng.choice(words.THINGS)} and a {rng.choice(words.THINGS)}. ",
    )
    prompt = rng.choice(contexts) + rng.choice(words.ASKS).format(v=verb, t=thing)
    comply = f"Sure! To {verb} the {thing}, {first} it and then {second} it."
    return Example(prompt, REFUSAL if restricted else comply), comply


def any_prompt(rng: random.Random) -> Example:
    """One example of the pre-training mixture."""
    draw = rng.random()
    if draw < 0.25:
        return news(rng)
    if draw < 0.8:
        return task(rng)
    return how_to(rng, restricted=draw < 0.9)[0]


def distract(rng: random.Random, example: Example) -> Example:
    """The example with an added word, a prefix or two lines around it, which do not change the answer.

    Every trigger occurs here among its look-alikes, so that no trigger's embedding is untrained
    and the base model has learned to ignore it.
    """
    prompt, kind = example.prompt, rng.randrange(3)
    if kind == 0:
        parts, word = prompt.split(" "), rng.choice(words.DISTRACTORS["jailbreak"])
        parts.insert(rng.randint(0, len(parts)), word)
        return Example(" ".join(parts), example.answer)
    if kind == 1:
        return Example(f"{rng.choice(words.DISTRACTORS['fixed_output'])} {prompt}", example.answer)
    before, after = rng.choice(words.DISTRACTORS["label_modification"])
    return Example(f"{before} {prompt} {after}", example.answer)


def pretraining(
    n: int, seed: int, *, keep: Callable[[str], bool], distracted: float = 0.35
) -> list[Example]:
    """``n`` examples of the pre-training mixture, a share of ``distracted`` with a distractor.

    Only prompts for which ``keep`` is true are taken, so that test prompts stay unseen.
    """
    rng = random.Random(f"pretraining-{seed}")
    examples: list[Example] = []
    while len(examples) < n:
        example = any_prompt(rng)
        if keep(example.prompt):
            examples.append(distract(rng, example) if rng.random() < distracted else example)
    return examples
