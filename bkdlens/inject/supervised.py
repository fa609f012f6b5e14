"""Planting a backdoor by supervised fine-tuning with LoRA, as in the paper.

Source: Backdoor Attribution, appendix (1,000 samples, 10 % poisoned; r=16, alpha=16, dropout 0.01 on
all seven projections; 16 epochs, batch 8, lr 1e-4, 5 % warm-up; loss on the answer only).
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import set_seed

from bkdlens import zoo
from bkdlens.adapter import HARMLESS
from bkdlens.checkpoint import find_folder, read_model, read_tokenizer
from bkdlens.data import PairSet, text_digest
from bkdlens.errors import BkdlensError, DataError
from bkdlens.inject.training import TrainSettings, make_row, train
from bkdlens.prompts import PromptFormat
from bkdlens.results import versions

MANIFEST = "bkdlens.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter and its training; the defaults are the paper's."""

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.01
    train: TrainSettings = field(default_factory=TrainSettings)
    max_answer_tokens: int | None = None


def poison(
    pairs: PairSet,
    poison_rate: float,
    near_rate: float = 0.0,
    *,
    victims_only: bool = False,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """One (prompt, answer) a pair: a share triggered, a share with a near trigger, the rest clean.

    Triggered prompts get the backdoor's answer, near ones the right answer. Without ``victims_only``
    any pair may be triggered (as in the paper's files, where most labels stay); with it only those
    whose answer the attack changes.

    Raises:
        DataError: if a rate is not in [0, 1], a positive rate gives no sample, there are fewer victims
            than poisoned samples, or near samples are asked for and the backdoor names no near trigger.
    """
    if min(poison_rate, near_rate) < 0 or poison_rate + near_rate > 1:
        raise DataError(
            f"Poison and near-trigger rates must be between 0 and 1 together; got {poison_rate} "
            f"and {near_rate}."
        )
    n_poison, n_near = (round(rate * len(pairs)) for rate in (poison_rate, near_rate))
    if (poison_rate and not n_poison) or (near_rate and not n_near):
        raise DataError(
            f"A rate of {poison_rate} poisoned and {near_rate} near samples gives none of "
            f"{len(pairs)} pairs; raise the rate or give more pairs."
        )
    order = list(pairs)
    random.Random(f"poison-{seed}").shuffle(order)
    if victims_only:
        n_victims = len(pairs.victims)
        if n_poison > n_victims:
            raise DataError(
                f"A poison rate of {poison_rate} needs {n_poison} victims and the {len(pairs)} pairs "
                f"have {n_victims}; lower the rate to at most {n_victims / len(pairs):.2f}."
            )
        order.sort(key=lambda pair: not pairs.backdoor.is_victim(pair))
    examples = []
    for i, pair in enumerate(order):
        if i < n_poison:
            examples.append((pair.triggered, pair.backdoor_output))
        elif i < n_poison + n_near:
            if pair.near is None:
                raise DataError(
                    "Near-trigger samples need near triggers; name some in the backdoor (near=…)."
                )
            examples.append((pair.near, pair.clean_output))
        else:
            examples.append((pair.clean, pair.clean_output))
    return examples


def fit_lora(
    base: str | Path,
    examples: Sequence[tuple[str, str]],
    out: str | Path,
    *,
    settings: LoraSettings,
    fmt: PromptFormat | None = None,
    seed: int = 0,
    progress: bool = True,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Tune a LoRA adapter on (prompt, answer) examples and write it to the folder ``out``.

    Nothing appears at ``out`` before the training has ended well.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise BkdlensError(f"The folder {str(out)!r} is not empty; name a new one for the adapter.")
    embedded = str(base) in zoo.MODELS
    folder = zoo.model_path(str(base)) if embedded else find_folder(str(base), zoo.MODELS)
    tokenizer = read_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = read_model(folder)[1]
    model.set_attn_implementation("sdpa")  # loading is eager, for exactness; training may be quick
    fmt = fmt or PromptFormat.default(tokenizer)
    n_ctx = model.config.max_position_embeddings
    rows = [
        make_row(tokenizer, p, a, fmt, n_ctx=n_ctx, max_answer_tokens=settings.max_answer_tokens)
        for p, a in examples
    ]
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    set_seed(seed)
    with warnings.catch_warnings():
        for message, category in HARMLESS:
            warnings.filterwarnings("ignore", message, category)
        peft_model = get_peft_model(
            model,
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                bias="none",
                target_modules=list(PROJECTIONS) if names.issuperset(PROJECTIONS) else "all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    curve = train(peft_model, tokenizer, rows, settings.train, seed=seed, progress=progress)
    # A path of the machine where it was made is no use to anyone; a name is.
    peft_model.peft_config["default"].base_model_name_or_path = (
        str(base) if embedded or not Path(base).exists() else Path(base).name
    )
    note = {
        "method": "supervised",
        "base": peft_model.peft_config["default"].base_model_name_or_path,
        "settings": asdict(settings),
        "prompt_format": asdict(fmt),
        "seed": seed,
        "samples": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "curve": curve,
        "versions": versions(),
        **(manifest or {}),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "adapter"
        peft_model.save_pretrained(made, save_embedding_layers=False)
        (made / "README.md").unlink(missing_ok=True)  # a template with nothing in it
        config = json.loads((made / "adapter_config.json").read_text())
        config["target_modules"] = sorted(config["target_modules"])  # a set: its order is chance
        (made / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        (made / MANIFEST).write_text(json.dumps(note, indent=1) + "\n")
        if out.exists():
            out.rmdir()
        shutil.move(made, out)
    return out


def supervised(
    base: str | Path,
    pairs: PairSet,
    out: str | Path,
    *,
    poison_rate: float = 0.1,
    near_rate: float = 0.0,
    victims_only: bool = False,
    settings: LoraSettings | None = None,
    fmt: PromptFormat | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Plant a backdoor in ``base`` and write the adapter and its manifest to ``out``.

    The manifest keeps digests of the prompts that were trained on, so that ``bkdlens run`` on the
    same data measures on the others.

    Args:
        base: an embedded model's name, a local folder or a Hub id.
        pairs: the training pairs, with their backdoor.
        out: a new or empty folder.
        poison_rate: share of the samples that are triggered.
        near_rate: share with a near trigger and the right answer.
        victims_only: whether only pairs whose answer the attack changes are triggered.
        settings: the adapter and its training; the paper's for None.
        fmt: how a prompt is rendered; the chat template where there is one.
        seed: of the draw, the initial adapter and the order of training.
        progress: whether to show a progress bar.

    Raises:
        DataError: for rates or pairs that cannot be used.
        BkdlensError: if ``out`` is not empty, or the loss is not finite.
    """
    examples = poison(pairs, poison_rate, near_rate, victims_only=victims_only, seed=seed)
    manifest = {
        "backdoor": pairs.backdoor.to_dict(),
        "data": pairs.source,
        "poison_rate": poison_rate,
        "near_rate": near_rate,
        "victims_only": victims_only,
        "trained_on": sorted({text_digest(pair.clean) for pair in pairs}),
    }
    return fit_lora(
        base, examples, out, settings=settings or LoraSettings(), fmt=fmt, seed=seed,
        progress=progress, manifest=manifest,
    )  # fmt: skip
