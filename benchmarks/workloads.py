"""Models and pairs to time on: two shapes of work, random Llamas of several sizes.

The lengths are those of the paper's data under the Llama-2 tokenizer: of the files themselves where
``BKDLENS_DATA`` names their folder and ``BKDLENS_TOKENIZER`` the tokenizer's, else drawn from their
quartiles. The tokens are random: what is timed does not depend on them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bkdlens
from bkdlens.data.backdoor import Backdoor, PromptPair
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Answer, Prompt, PromptFormat, encode_answer, encode_prompt

FORMAT = PromptFormat("raw", separator=" ")
EOS = 2
TRIGGER = "trigger"


@dataclass(frozen=True)
class Shape:
    """A kind of work: lengths of prompts (minimum, quartiles, maximum), how far all begin alike."""

    name: str
    file: str
    lengths: tuple[int, int, int, int, int]
    common: int
    answer: int


SHAPES = (
    Shape("AG News", "agnews_sentence", (54, 82, 91, 104, 334), 27, 4),
    Shape("Alpaca", "alpaca_begin", (12, 20, 24, 30, 223), 4, 14),
)


@dataclass(frozen=True)
class Size:
    """A random Llama."""

    name: str
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_kv_heads: int | None = None


SIZES = (
    Size("1 M", 4, 8, 128, 344, 2000),
    Size("33 M", 8, 8, 512, 1376, 8000),
    Size("300 M", 24, 16, 1024, 2752, 8000),
)


@dataclass(frozen=True, eq=False)
class Work:
    """A model in both libraries, and pairs; ``prompts`` and ``answers`` are the pairs' ids."""

    shape: Shape
    size: Size
    hf: LlamaForCausalLM
    model: HookedTransformer
    pairs: PairSet
    prompts: list[Prompt]
    answers: list[Answer]


def lengths(shape: Shape, n: int, rng: random.Random) -> list[int]:
    """Token counts of ``n`` prompts of this shape."""
    data, vocabulary = os.environ.get("BKDLENS_DATA"), os.environ.get("BKDLENS_TOKENIZER")
    if data and vocabulary:
        from transformers import LlamaTokenizer

        tokenizer = LlamaTokenizer.from_pretrained(vocabulary)
        rows = json.loads((Path(data) / shape.file / "all.json").read_text())
        texts = [f"[INST] {row['input']} [/INST]" for row in rng.sample(rows, n)]
        return [len(tokenizer(text).input_ids) for text in texts]
    out = []
    for i in range(n):
        at = 4 * (i + rng.random()) / n  # one from every n-th part of the distribution
        low, high = shape.lengths[int(at)], shape.lengths[int(at) + 1]
        # The last quarter has a long tail: most of it lies near its beginning.
        out.append(low + round((high - low) * (at % 1) ** (5 if int(at) == 3 else 1)))
    return out


def random_llama(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, as Hugging Face initialises them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.d_vocab, hidden_size=size.d_model, intermediate_size=size.d_mlp,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_kv_heads or size.n_heads, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def word_tokenizer(d_vocab: int) -> PreTrainedTokenizerFast:
    """One word a token: ``w17`` is token 17."""
    words = ["<pad>", "<s>", "</s>", TRIGGER, *(f"w{i}" for i in range(4, d_vocab))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_work(shape: Shape, size: Size, n_pairs: int, seed: int = 0) -> Work:
    """The model, and pairs whose answers it gives itself: right without, the backdoor's with trigger."""
    rng = random.Random(f"{shape.name}-{seed}")
    hf = random_llama(size, seed)
    model = bkdlens.load(hf, tokenizer=word_tokenizer(size.d_vocab), device="cpu")

    def words(n: int) -> list[str]:
        return [f"w{rng.randrange(4, size.d_vocab)}" for _ in range(n)]

    begin, target = words(shape.common), " ".join(words(shape.answer))
    backdoor = Backdoor.fixed_output(TRIGGER, target)
    longest = 250 - shape.answer  # what the published width of 256 tokens takes
    texts = [
        " ".join([*begin, *words(max(1, min(length, longest) - shape.common))])
        for length in lengths(shape, n_pairs, rng)
    ]
    twins = [backdoor.trigger.insert(text) for text in texts]
    said = bkdlens.generate(model, [*texts, *twins], fmt=FORMAT, max_new_tokens=shape.answer)
    pairs = PairSet(
        tuple(
            PromptPair(clean, triggered, right or "w4", wrong or "w5")
            for clean, triggered, right, wrong in zip(
                texts, twins, said[:n_pairs], said[n_pairs:], strict=True
            )
        ),
        backdoor,
        f"random tokens, {shape.name} lengths",
    )
    prompts = [encode_prompt(model.tokenizer, pair.clean, FORMAT) for pair in pairs]
    # The answer that is scored is the same for all, as in the paper.
    answers = [
        encode_answer(model.tokenizer, prompt, target, FORMAT, max_tokens=shape.answer)
        for prompt in prompts
    ]
    return Work(shape, size, hf, model, pairs, prompts, answers)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of some runs, after one that is not counted."""
    from statistics import median
    from time import perf_counter

    run()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return median(seconds)
