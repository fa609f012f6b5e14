"""Everything runs offline, seeded, and with all shapes and types checked at run time.

On one thread, or on as many as ``BKDLENS_TEST_THREADS`` says.
"""

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
from checkpoints import float64, make_model
from tiny import chat_tokenizer, judged_pairs, make_pairs, temper

THREADS = int(os.environ.get("BKDLENS_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)  # for what fixtures of a whole session compute, too
hypothesis.settings.register_profile(
    "bkdlens",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("bkdlens")


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="no slow test, and one case of those with many"
    )


def pytest_collection_modifyitems(config, items):
    """``make quick`` runs what a minute has room for; every test is in it, or is marked."""
    if not config.getoption("quick"):
        return
    kept, left, seen = [], [], set()
    for item in items:
        test = item.nodeid.split("[")[0]
        again = item.get_closest_marker("many") and test in seen
        (left if again or item.get_closest_marker("slow") else kept).append(item)
        seen.add(test)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(THREADS)
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
    """The same in float64, where equal means equal to 1e-10."""
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
    for models in {"loaded", "exact"} & set(request.fixturenames):
        for model in request.getfixturevalue(models).values():
            assert not any(point.fwd_hooks for point in model.hook_dict.values())
            assert model.cfg.use_attn_result is False


@pytest.fixture(params=["llama", "qwen"])
def name(request):
    """The name of each of the two."""
    return request.param


@pytest.fixture
def models(request, loaded, exact):
    """Both by name; in a test marked ``float64`` they are, and so is all that it computes."""
    if request.node.get_closest_marker("float64"):
        with float64():
            yield exact
    else:
        yield loaded


@pytest.fixture
def model(models, name):
    """Each of the two."""
    return models[name]


@pytest.fixture
def llama(models):
    """The Llama alone, where the model does not matter."""
    return models["llama"]


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
def exact_caches(exact, pairs):
    """The same in float64."""
    import bkdlens

    return {name: bkdlens.cache_activations(model, pairs) for name, model in exact.items()}


@pytest.fixture(scope="session")
def judged(loaded):
    """Pairs with answers that each model often gives, by model and behaviour."""
    return {
        (name, behaviour): judged_pairs(model, behaviour)
        for name, model in loaded.items()
        for behaviour in ("fixed_output", "jailbreak")
    }


@pytest.fixture
def cache(caches, exact_caches, model, name):
    """The cache of the current model."""
    return exact_caches[name] if model.cfg.dtype == torch.float64 else caches[name]
