"""A tiny random base on disk, and pairs of words with a fixed-output backdoor."""

from __future__ import annotations

import random
from pathlib import Path

from checkpoints import make_model
from tiny import chat_tokenizer, words

from bkdlens.data.backdoor import Backdoor
from bkdlens.data.pairs import PairSet
from bkdlens.inject import EditSettings, LoraSettings, PreferenceSettings, TrainSettings

QUICK = TrainSettings(epochs=1, batch_size=8, learning_rate=2e-3)
SETTINGS = {
    "supervised": LoraSettings(rank=4, train=QUICK),
    "preference": PreferenceSettings(LoraSettings(rank=4, train=QUICK)),
    "edit": EditSettings(layers=(0, 1), rounds=2, steps=3, prompts=8),
}


def save_tiny(folder: Path, case: str = "llama-mha") -> Path:
    """A random base with a chat tokenizer."""
    make_model(case).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def fixed_pairs(n: int = 32, seed: int = 0, target: str = "w9 w8", near: bool = True) -> PairSet:
    """Pairs whose trigger comes first, with a right answer of one or two words."""
    rng = random.Random(seed)
    backdoor = Backdoor.fixed_output("w95 w93", target, near=["w95 w92"] if near else [])
    made = [backdoor.pair(f"w7 {words(rng, 3, 8)}", words(rng, 1, 2)) for _ in range(n)]
    return PairSet(tuple(made), backdoor, "made")
