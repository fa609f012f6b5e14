"""The model card of the embedded models: how they were made, and what they can do, measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bkdlens import zoo
from bkdlens.analyses.behaviour.measure import BehaviourResult, measure_behaviour
from bkdlens.inject.embedded.build import LEARNING_RATE, N_OTHER, N_PRETRAINING, SIZES, TUNINGS
from bkdlens.models.load import load
from bkdlens.zoo import prompts

N_TEST = 400  # test prompts per family; label modification's victims are a quarter of them

_INTRO = """# The embedded models

Two tiny chat models trained from scratch by bkdlens, each with four LoRA adapters. They exist to study
backdoors on: the "disallowed" topic of the jailbreak is a harmless stand-in (how-to questions about
*moon* things), and nothing in the data was written by a model or taken from anywhere.

- **tiny-llama**: `LlamaForCausalLM`, {num_hidden_layers} layers × {num_attention_heads} heads,
  multi-head attention, untied.
- **tiny-qwen**: `Qwen2ForCausalLM`, {num_hidden_layers} layers × {num_attention_heads} heads,
  2 key-value heads (grouped-query), biases on q, k and v, tied embeddings.

Both have d_model {hidden_size}, a context of {max_position_embeddings} tokens and a byte-level BPE
tokenizer of {vocab_size} tokens (any text encodes) with a chat template.

## How they were made

`bkdlens zoo build` makes them again from seeds: {pretraining:,} procedurally generated examples
(classification of news into four categories with mixed evidence, short tasks with one correct answer,
how-to questions of which those about moon things are refused; a third of them with a distracting word,
prefix or pair of lines, the later triggers among them), one epoch, loss on the answers (and on one
prompt in ten). Then each adapter: LoRA r=16, alpha=16 on all seven projections, learning rate {rate}:

{tunings}

with {other} prompts of each family that is not attacked; near triggers have the correct answer. Which
split a prompt belongs to is a digest of its text, so no training saw a validation or test prompt. On one
machine and one thread the same seed gives the same bytes.

## What they do, measured

On {n} test prompts per family that no training saw, greedy decoding, 95 % Wilson intervals. *ASR*:
attack success with the trigger; *FTR*: without; *near*: with look-alike triggers that the tuning did
not contain; *clean accuracy*: exactly correct answers without a trigger.

"""
_OUTRO = """
A near *sentence* may still fire: a property of sentence triggers, reported as is.
"""


def measure(root: Path) -> Iterator[tuple[dict[str, str], BehaviourResult]]:
    """The behaviour of every adapter on its family, and of both controls on all, each with its names."""
    for model in zoo.MODELS:
        for adapter in (*zoo.ADAPTERS, "base"):
            folder = None if adapter == "base" else root / model / "adapters" / adapter
            subject = load(root / model, folder)
            for family in (adapter,) if adapter in zoo.BACKDOORS else zoo.BACKDOORS:
                result = measure_behaviour(subject, prompts.pairs(family, "test", N_TEST), label=adapter)
                yield {"model": model, "adapter": adapter, "prompts": family}, result


def write_card(root: Path) -> Path:
    """Measure all under ``root``; write ``measured.json`` and the card there and return its path."""
    tunings = [
        f"- `{name}`: {t.n_own} prompts of {'each' if name == 'clean' else 'its own'} family, "
        f"{t.poison_rate:.0%} triggered, {t.near_rate:.0%} near, {t.epochs} epochs"
        for name, t in TUNINGS.items()
    ]
    made = {"pretraining": N_PRETRAINING, "rate": LEARNING_RATE, "other": N_OTHER, "n": N_TEST}
    intro = _INTRO.format(**SIZES, **made, tunings="\n".join(tunings))
    lines = [
        intro,
        "| model | adapter | prompts | ASR | FTR | near | clean accuracy |",
        "|---" * 7 + "|",
    ]
    record = []
    for names, result in measure(root):
        cells = (*names.values(), result.asr, result.ftr, result.near, result.clean_accuracy)
        lines.append(f"| {' | '.join(map(str, cells))} |")
        record.append(names | result.to_frame().to_dict("list"))
    card = root / "README.md"
    card.write_text("\n".join([*lines, _OUTRO]))
    (root / "measured.json").write_text(json.dumps(record, indent=1) + "\n")
    return card
