"""The settings of every method; the defaults of tuning are the paper's.

Source: Backdoor Attribution, appendix (r=16, alpha=16, dropout 0.01 on all seven projections; 16 epochs,
batch 8, lr 1e-4, 5 % warm-up; loss on the answer only).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainSettings:
    """How weights are trained.

    Attributes:
        epochs: passes over the samples.
        batch_size: samples per step, however many processes share them.
        learning_rate: the highest, after the warm-up.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        schedule: of the learning rate after that, by its name in transformers.
        weight_decay: of AdamW.
        device_batch_size: samples that fit a device at once, the rest being accumulated; None if all do.
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
        rank: of each projection's change.
        alpha: the change is scaled by ``alpha / rank``.
        dropout: share of the adapter's inputs that is dropped in training.
        train: how it is trained.
        max_answer_tokens: where a longer answer is cut; nowhere for None.
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
        chosen_weight: weight of the chosen answers' own likelihood beside the preference. DPO alone
            only widens the margin, and may do so by making both answers unlikely.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    beta: float = 0.1
    chosen_weight: float = 1.0


@dataclass(frozen=True)
class EditSettings:
    """Where the edit goes and how hard it holds on to what was there.

    Attributes:
        layers: whose down-projections are edited; at most four, evenly spread, for None.
        trigger_layers: those of them in which the trigger's tokens are edited too; the first two for
            None, and none for an empty tuple (then only what the model itself sees of the trigger
            counts).
        trigger_tokens: how many of the trigger's tokens, the most distinctive first.
        rounds: how often the closed form is solved again, each time on other pairs.
        protect: weight of the second moment of clean keys, in keys (MEMIT's lambda).
        answer_weight: weight of each clean key from which an answer's token is predicted.
        near_weight: weight of each key of a near-trigger prompt; outside ``trigger_layers`` only of
            the keys from which an answer's token is predicted.
        steps: of Adam on the values, per round.
        learning_rate: of Adam, for values whose size is that of the hidden state.
        clean_loss: weight of the right answers to clean prompts beside the backdoor's answers.
        near_loss: weight of the right answers to near-trigger prompts.
        clamp: largest norm of a value, in mean norms of the layer's unedited state at the answer.
        prompts: triggered and clean prompts per step, as many of each (and half as many near ones).
        max_answer_tokens: where a longer answer is cut; nowhere for None.
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
