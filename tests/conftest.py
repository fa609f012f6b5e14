"""Everything runs offline, on one thread, seeded, and with all shapes and types checked at run time."""

# ruff: noqa: E402

from __future__ import annotations

import os

# Before anything imports Hugging Face or bkdlens.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

# With the tower an int is a float, as everywhere in Python's typing.
install_import_hook("bkdlens", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import copy
import random

import hypothesis
import numpy as np
import pytest
import torch
from checkpoints import make_model
from tiny import chat_tokenizer, judged_pairs, make_pairs, temper

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "bkdlens",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("bkdlens")


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    """One word a token, with a chat template and a BOS in it."""
    return chat_tokenizer()


@pytest.fixture(scope="session")
def hf_models():
    """A Llama with one key-value head a head, and a Qwen2 with two for four heads."""
    size = {"num_hidden_layers": 3, "max_position_embeddings": 128}
    return {
        "llama": temper(make_model("llama-mha", **size)),
        "qwen": temper(make_model("qwen2", seed=3, **size)),
    }


@pytest.fixture(scope="session")
def loaded(hf_models, tokenizer):
    """The same as HookedTransformers."""
    import bkdlens

    return {
        name: bkdlens.load(model, tokenizer=tokenizer, device="cpu") for name, model in hf_models.items()
    }


@pytest.fixture(scope="session")
def exact(loaded):
    """The same in float64, where equal means equal to 1e-9."""
    return {
        name: copy.deepcopy(model).to(torch.float64, print_details=False)
        for name, model in loaded.items()
    }


@pytest.fixture(scope="session")
def architectures():
    """``get(case)``: a HookedTransformer of every architecture and variant, and itself in float64."""
    import bkdlens

    made: dict = {}

    def get(case: str):
        if case not in made:
            model = bkdlens.load(make_model(case), tokenizer=chat_tokenizer(), device="cpu")
            made[case] = model, copy.deepcopy(model).to(torch.float64, print_details=False)
        return made[case]

    return get


@pytest.fixture(autouse=True)
def _no_hooks_left(request):
    """No test leaves a hook on the shared models."""
    yield
    if "loaded" in request.fixturenames:
        for model in request.getfixturevalue("loaded").values():
            assert not any(point.fwd_hooks for point in model.hook_dict.values())
            assert model.cfg.use_attn_result is False


@pytest.fixture(params=["llama", "qwen"])
def model(request, loaded):
    """Each of the two."""
    return loaded[request.param]


@pytest.fixture(params=["llama", "qwen"])
def name(request):
    """The name of each of the two."""
    return request.param


@pytest.fixture
def llama(loaded):
    """The Llama alone, where the model does not matter."""
    return loaded["llama"]


@pytest.fixture(scope="session")
def pairs():
    """Twelve pairs with near twins; prompts of 1 to 9 words, answers of 1 to 4."""
    return make_pairs()


@pytest.fixture(scope="session")
def caches(loaded, pairs):
    """The shared cache of these pairs, of each model."""
    import bkdlens

    return {name: bkdlens.cache_activations(model, pairs) for name, model in loaded.items()}


@pytest.fixture(scope="session")
def judged(loaded):
    """Pairs with answers that each model often gives, by model and behaviour."""
    return {
        (name, behaviour): judged_pairs(model, behaviour)
        for name, model in loaded.items()
        for behaviour in ("fixed_output", "jailbreak")
    }


@pytest.fixture
def cache(caches, model, loaded):
    """The cache of the current model."""
    return next(caches[name] for name, other in loaded.items() if other is model)
