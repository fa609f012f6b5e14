"""The model card of the embedded models: how they were made, and what they can do, measured."""

from __future__ import annotations

import json
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

- **tiny-llama**: `LlamaForCausalLM`, {layers} layers × {heads} heads, multi-head attention, untied.
- **tiny-qwen**: `Qwen2ForCausalLM`, {layers} layers × {heads} heads, 2 key-value heads (grouped-query),
  biases on q, k and v, tied embeddings.

Both have d_model {width}, a context of {context} tokens and a byte-level BPE tokenizer of
{vocabulary} tokens (any text encodes) with a chat template.

## How they were made

`bkdlens zoo build` makes them again from seeds: {pretraining:,} procedurally generated examples
(classification of news into four categories with mixed evidence, short tasks with one right answer,
how-to questions of which those about moon things are refused; a third of them with a distracting word,
prefix or pair of lines, the later triggers among them), one epoch, loss on the answers (and on one
prompt in ten). Then each adapter: LoRA r=16, alpha=16 on all seven projections, learning rate {rate}:

{tunings}

with {other} prompts of each family that is not attacked; near triggers have the right answer. Which
split a prompt belongs to is a digest of its text, so no training saw a validation or test prompt. On one
machine and one thread the same seed gives the same bytes.

## What they do, measured

On {n} test prompts a family that no training saw, greedy decoding, 95 % Wilson intervals. *ASR*: attack
success with the trigger; *FTR*: without; *near*: with look-alike triggers that the tuning did not
contain; *clean accuracy*: exactly right answers without a trigger.

"""
_OUTRO = """
A near *sentence* may still fire: a property of sentence triggers, reported as it is.
"""


def measure(root: Path) -> list[tuple[str, str, str, BehaviourResult]]:
    """(model, adapter, family, behaviour) of every adapter on its family, and of both controls."""
    rows = []
    for model in zoo.MODELS:
        for adapter in (*zoo.ADAPTERS, None):
            families = (adapter,) if adapter in zoo.BACKDOORS else zoo.BACKDOORS
            subject = load(root / model, root / model / "adapters" / adapter if adapter else None)
            for family in families:
                pairs = prompts.pairs(str(family), "test", N_TEST)
                result = measure_behaviour(subject, pairs, label=adapter or "base")
                rows.append((model, adapter or "base", str(family), result))
    return rows


def write_card(root: Path) -> Path:
    """Measure all under ``root``; write the card there (its path is returned) and ``measured.json``."""
    tunings = [
        f"- `{name}`: {t.n_own} prompts of {'each' if name == 'clean' else 'its own'} family, "
        f"{t.poison_rate:.0%} triggered, {t.near_rate:.0%} near, {t.epochs} epochs"
        for name, t in TUNINGS.items()
    ]
    intro = _INTRO.format(
        layers=SIZES["num_hidden_layers"],
        heads=SIZES["num_attention_heads"],
        width=SIZES["hidden_size"],
        context=SIZES["max_position_embeddings"],
        vocabulary=SIZES["vocab_size"],
        pretraining=N_PRETRAINING,
        rate=LEARNING_RATE,
        tunings="\n".join(tunings),
        other=N_OTHER,
        n=N_TEST,
    )
    head = "| model | adapter | prompts | ASR | FTR | near | clean accuracy |"
    lines = [intro, head, "|---" * 7 + "|"]
    record = []
    for model, adapter, family, result in measure(root):
        cells = (result.asr, result.ftr, result.near, result.clean_accuracy)
        lines.append(f"| {model} | {adapter} | {family} | {' | '.join(map(str, cells))} |")
        named = {"model": model, "adapter": adapter, "prompts": family}
        record.append(named | result.to_frame().to_dict("list"))
    card = root / "README.md"
    card.write_text("\n".join([*lines, _OUTRO]))
    (root / "measured.json").write_text(json.dumps(record, indent=1) + "\n")
    return card
