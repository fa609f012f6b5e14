"""Arguments of a wrong kind are one sentence; what a function always took, it still takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

import bkdlens
from bkdlens.engines.inputs import checked
from bkdlens.errors import BkdlensError, InputError


def refused(message: str, call) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert isinstance(caught.value, TypeError)  # as it was before there was a sentence
    assert str(caught.value).endswith(".")


@pytest.fixture
def hugging_face(hf_models):
    return hf_models["llama"]


def test_a_hugging_face_model_is_to_be_loaded_first(hugging_face, pairs) -> None:
    for call in (
        lambda: bkdlens.measure_behaviour(hugging_face, pairs),
        lambda: bkdlens.attribute_heads(hugging_face, pairs),
        lambda: bkdlens.generate(hugging_face, "w5"),
        lambda: bkdlens.patch_heads(hugging_face, "w5 w6", "L0H0", "zero"),
        lambda: bkdlens.cache_activations(hugging_face, pairs),
    ):
        refused("not a LlamaForCausalLM; load it first, with bkdlens.load", call)


def test_swapped_arguments_name_the_order(llama, pairs, caches) -> None:
    refused(r"In attribute_heads\(model, pairs, …\), model must be a model that bkdlens.load gives, "
            "not a PairSet", lambda: bkdlens.attribute_heads(pairs, llama))  # fmt: skip
    refused(r"from_cache\(cache, heads, …\), cache must be a PairCache, not a HookedTransformer",
            lambda: bkdlens.BackdoorVector.from_cache(llama, "L0H0"))  # fmt: skip
    refused("cache must be a PairCache, not a PairSet", lambda: bkdlens.train_probes(pairs))


def test_texts_are_no_pairs_and_pairs_no_texts(llama, pairs) -> None:
    for texts in (pairs.clean, pairs.clean[0], list(pairs)):
        refused("pairs must be a PairSet", lambda texts=texts: bkdlens.evaluate(llama, texts))
    refused("give prompts=pairs.clean", lambda: bkdlens.generate(llama, pairs))
    refused("pair must be a PromptPair", lambda: bkdlens.answer_probs(llama, pairs))


def test_one_is_not_several_and_several_not_one(llama, pairs, caches) -> None:
    vector = bkdlens.BackdoorVector.from_cache(caches["llama"], "L0H0")
    refused("counts must be several in a list, not 4; give counts=\\[4\\]",
            lambda: bkdlens.ablate_heads(llama, pairs, ["L0H0"], counts=4))  # fmt: skip
    refused("give modes=\\['mean'\\]",
            lambda: bkdlens.ablate_heads(llama, pairs, ["L0H0"], modes="mean"))  # fmt: skip
    refused("give coefficients=\\[1.0\\]",
            lambda: bkdlens.sweep_layers(llama, pairs, vector, coefficients=1.0))  # fmt: skip
    refused("layer must be a whole number, not a list of 2 int; give one, as in layer=1",
            lambda: bkdlens.steer(llama, vector, [1, 2]))  # fmt: skip
    refused("n_pairs must be a whole number, not 'all'",
            lambda: bkdlens.attribute_heads(llama, pairs, n_pairs="all"))  # fmt: skip


@pytest.mark.slow
def test_whatever_is_a_number_or_a_sequence_is_taken(llama, pairs, caches) -> None:
    vector = bkdlens.BackdoorVector.from_cache(caches["llama"], ("L0H0", "L1H1"))
    options = {"n_random": 0, "max_new_tokens": 2}
    swept = bkdlens.sweep_layers(llama, pairs[:8], vector, layers=[0, 1], coefficients=[-1], **options)
    with bkdlens.steer(llama, vector, 1, 2):
        bkdlens.generate(llama, ("w5 w6", "w7"), max_new_tokens=2)
    assert swept.layers == (0, 1)


def test_annotations_are_the_rule() -> None:
    @checked
    def take(a: int, b: float = 1.0, *, c: torch.Tensor | None = None, d: bool = False) -> int:
        return a

    assert take(np.int64(3), np.float32(2)) == 3
    assert take(1, c=torch.ones(2), d=True) == 1
    refused(r"In take\(a, b, …\), a must be a whole number, not 1.5", lambda: take(1.5))
    refused("c must be a tensor, not a ndarray", lambda: take(1, c=np.ones(2)))
    refused("d must be True or False, not 'yes'", lambda: take(1, d="yes"))
    with pytest.raises(TypeError, match="missing"):  # Python's own sentence is good enough
        take()


def test_lists_tuples_and_iterators_are_several() -> None:
    @checked
    def take(steps: tuple[str, ...], at: Iterable[int] = (), place: tuple[int, int] = (0, 0)) -> list:
        return [*steps, *at, *place]

    assert take(["a"], (i for i in range(2)), [3, 4]) == ["a", 0, 1, 3, 4]  # no iterator is used up
    assert take(("a", "b"), torch.arange(2)) == ["a", "b", 0, 1, 0, 0]
    refused("steps must be several in a list, not 'probe'; give steps=\\['probe'\\]",
            lambda: take("probe"))  # fmt: skip
    refused("at must be several in a list, not a list of 1 float", lambda: take(["a"], [0.5]))
    refused("place must be a tuple", lambda: take(["a"], (), 3))


def test_a_token_outside_of_the_vocabulary_is_refused(llama, monkeypatch) -> None:
    monkeypatch.setattr(llama.cfg, "d_vocab", 20)
    with pytest.raises(BkdlensError, match="token 30 and the model has 20"):
        bkdlens.generate(llama, "w30")
