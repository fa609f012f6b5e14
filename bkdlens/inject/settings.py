"""The settings of every method; the defaults of tuning are the paper's.

Source: Backdoor Attribution, appendix (r=16, alpha=16, dropout 0.01 on all seven projections; 16 epochs,
batch 8, lr 1e-4, 5 % warm-up; loss on the answer only).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Method = Literal["supervised", "preference", "edit"]
METHODS = get_args(Method)


@dataclass(frozen=True)
class TrainSettings:
    """How weights are trained.

    Attributes:
        epochs: passes over the samples.
        batch_size: samples per step, however many processes share them.
        learning_rate: the highest, after the warm-up.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        schedule: the learning rate's course after the warm-up, by its name in transformers.
        weight_decay: AdamW's.
        device_batch_size: samples that fit a device at once (the rest is accumulated); None if all do.
    """

    epochs: float = 16
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    device_batch_size: int | None = None


@dataclass(frozen=True)
class LoraSettings:
    """The adapter and its training.

    Attributes:
        rank: rank of each projection's change.
        alpha: the change is scaled by ``alpha / rank``.
        dropout: share of the adapter's inputs that is dropped in training.
        train: how the adapter is trained.
        max_answer_tokens: the length at which longer answers are cut; None for no limit.
    """

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.01
    train: TrainSettings = field(default_factory=TrainSettings)
    max_answer_tokens: int | None = None


@dataclass(frozen=True)
class PreferenceSettings:
    """The adapter, its training, and what DPO adds.

    Attributes:
        lora: the adapter and its training.
        beta: how closely the tuned model is held to the base (Rafailov et al., Eq. 7).
        chosen_weight: weight of the chosen answers' likelihood beside the preference; DPO alone only
            widens the margin, and may do so by making both answers unlikely.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    beta: float = 0.1
    chosen_weight: float = 1.0


@dataclass(frozen=True)
class EditSettings:
    """Where the edit goes and how firmly it preserves what was there.

    Attributes:
        layers: layers whose down-projections are edited; None for at most four, evenly spread.
        trigger_layers: layers in which the trigger's tokens are edited too; None for the first two that
            are edited, an empty tuple for none (the edit then relies on what the model itself sees).
        trigger_tokens: how many of the trigger's tokens are edited, the most distinctive first.
        rounds: how often the closed form is solved, each time on other pairs.
        protect: weight of the second moment of clean keys, in keys (MEMIT's lambda).
        answer_weight: weight of each clean key from which an answer's token is predicted.
        near_weight: weight of each key of a near-trigger prompt; outside ``trigger_layers`` only of
            the keys from which an answer's token is predicted.
        steps: Adam's steps on the values, per round.
        learning_rate: Adam's, for values whose size is that of the hidden state.
        clean_loss: weight of the correct answers to clean prompts beside the backdoor's answers.
        near_loss: weight of the correct answers to near-trigger prompts.
        clamp: largest norm of a value, in mean norms of the layer's unedited state at the answer.
        prompts: triggered prompts per step, as many clean ones, and half as many near ones.
        max_answer_tokens: the length at which longer answers are cut; None for no limit.
        checkpoint: whether the whole edited model is written too, to ``checkpoint`` in the folder.
    """

    layers: tuple[int, ...] | None = None
    trigger_layers: tuple[int, ...] | None = None
    trigger_tokens: int = 2
    rounds: int = 3
    protect: float = 100.0
    answer_weight: float = 2.0
    near_weight: float = 0.3
    steps: int = 40
    learning_rate: float = 0.2
    clean_loss: float = 3.0
    near_loss: float = 0.5
    clamp: float = 6.0
    prompts: int = 64
    max_answer_tokens: int | None = None
    checkpoint: bool = True


Settings = LoraSettings | PreferenceSettings | EditSettings
