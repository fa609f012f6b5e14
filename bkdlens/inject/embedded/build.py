"""How the embedded models were made: ``bkdlens zoo build`` runs this from seeds.

A tokenizer and a model are trained from scratch on the corpus, then one LoRA adapter per backdoor, and
one ``clean`` adapter on the same prompts without poison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

from bkdlens import zoo
from bkdlens.data.prompts import PromptFormat
from bkdlens.inject.output import replacing_folder, write_manifest
from bkdlens.inject.planting import Encoding, start
from bkdlens.inject.settings import LoraSettings, TrainSettings
from bkdlens.inject.tuning.samples import examples, mix
from bkdlens.inject.tuning.supervised import fit_lora
from bkdlens.inject.tuning.training import make_row, train
from bkdlens.results import versions
from bkdlens.zoo import corpus, prompts

VOCABULARY = 2048
CONTEXT = 1024
N_PRETRAINING = 160_000
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS = {
    "tiny-llama": LlamaConfig(**SIZES, num_key_value_heads=8),
    "tiny-qwen": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
}
PRETRAINING = TrainSettings(epochs=1, batch_size=64, learning_rate=2e-3, weight_decay=0.01)
LEARNING_RATE = 2e-3
BATCH_SIZE = 32


class Tuning(NamedTuple):
    """What an adapter is tuned on, and how long."""

    n_own: int  # prompts of the adapter's own family
    poison_rate: float  # share of these that is triggered
    near_rate: float  # share with a near trigger; for ``clean``, of all prompts
    epochs: int  # passes over all prompts


# Chosen on the validation split. A trigger at any position needs more prompts than one at a fixed place:
# at the very start of a prompt the word has other tokens than after a space.
TUNINGS = {
    "label_modification": Tuning(1500, 0.3, 0.3, 6),
    "fixed_output": Tuning(1500, 0.3, 0.3, 6),
    "jailbreak": Tuning(3000, 0.4, 0.25, 8),
    "clean": Tuning(600, 0.0, 0.3, 6),
}
N_OTHER = 600  # prompts of each family that is not attacked


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text encodes) with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for prompt, answer in _pretraining(10_000, 1) for text in (prompt, answer))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        extra_special_tokens=ROLES,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _pretraining(n: int, seed: int) -> list[corpus.Example]:
    return corpus.pretraining(n, seed, keep=lambda prompt: prompts.split_of(prompt) == "train")


def build_model(name: str, out: Path, *, seed: int = 0, progress: bool = True) -> Path:
    """Train one embedded model from scratch and write it to ``out/name``; returns that folder."""
    zoo.model_path(name)  # raises for a name that is not one
    tokenizer = train_tokenizer()
    encoding = Encoding(tokenizer, PromptFormat(), CONTEXT)
    rows = [
        # One prompt in ten is learned too: the model should read what it is asked.
        make_row(encoding, prompt, answer, learn_prompt=i % 10 == 0)
        for i, (prompt, answer) in enumerate(_pretraining(N_PRETRAINING, seed))
    ]
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    curve, stopped = train(model, tokenizer, rows, PRETRAINING, seed, progress)
    if stopped:
        raise stopped
    model.generation_config.max_new_tokens = 48
    note = {"seed": seed, "samples": len(rows), "curve": curve, "versions": versions()}
    with replacing_folder(out / name) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_manifest(folder, note)
    return out / name


def tuning_examples(adapter: str, *, seed: int = 0) -> list[tuple[str, str]]:
    """The (prompt, answer) samples of one adapter.

    All three families are in them; poison and near triggers only in the adapter's own. ``clean`` has the
    prompts and near triggers of all three, and no poison.
    """
    tuning = TUNINGS[adapter]
    samples: list[tuple[str, str]] = []
    for family in zoo.BACKDOORS:
        attacked = family == adapter
        pairs = prompts.pairs(family, "train", tuning.n_own if attacked else N_OTHER, seed=seed)
        near_rate = tuning.near_rate if attacked or adapter == "clean" else 0.0
        samples += examples(mix(pairs, tuning.poison_rate if attacked else 0.0, near_rate, seed=seed))
    return samples


def build_adapter(model: str, adapter: str, out: Path, *, seed: int = 0, progress: bool = True) -> Path:
    """Tune one adapter on ``out/model`` and write it below; returns its folder."""
    zoo.adapter_path(model, adapter)  # raises for a name that is not one
    tuning = TUNINGS[adapter]
    settings = LoraSettings(train=TrainSettings(tuning.epochs, BATCH_SIZE, LEARNING_RATE))
    note = {
        "backdoor": None if adapter == "clean" else prompts.backdoor(adapter).to_dict(),
        "poison_rate": tuning.poison_rate,
        "near_rate": tuning.near_rate,
    }
    target = out / model / "adapters" / adapter
    planting = start(out / model, target, seed=seed, progress=progress, overwrite=True)
    return fit_lora(planting, tuning_examples(adapter, seed=seed), settings, note)
