"""Every result loads back equal, and a file that is not whole is never taken for one."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import bkdlens
from bkdlens.errors import ResultError
from bkdlens.results import Provenance, Result, provenance, versions
from bkdlens.runs.reading import load_result
from bkdlens.types import Head

NAMES = (
    "ablation", "answer-probs", "attribution", "attribution-with-layers", "behaviour", "generations",
    "head-pattern", "patch", "patch-without-targets", "probe", "steering", "vector",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(loaded, judged, caches, pairs) -> dict[str, Result]:
    """A small real one of every kind."""
    model, cache, mine = loaded["llama"], caches["llama"], judged["llama", "jailbreak"][:5]
    fast = {"max_new_tokens": 4}
    vector = bkdlens.BackdoorVector.from_cache(cache, ["L0H1", "L2H2"], kind="contrast")
    return {
        "answer-probs": bkdlens.answer_probs(model, pairs[0]),
        "head-pattern": bkdlens.head_pattern(
            model, pairs[0].triggered, "L1H1", trigger=pairs.backdoor.trigger
        ),
        "ablation": bkdlens.ablate_heads(model, mine, ["L1H1", "L0H0"], cache=cache, n_random=2, **fast),
        "attribution": bkdlens.attribute_heads(model, pairs, cache=cache, n_pairs=3),
        "attribution-with-layers": bkdlens.attribute_heads(
            model, pairs, cache=cache, n_pairs=3, method="screened", layer_outputs=True
        ),
        "behaviour": bkdlens.measure_behaviour(model, mine, **fast),
        "generations": bkdlens.sample_generations(model, mine, vector, 1, 2.0, n=3, **fast),
        "patch": bkdlens.patch_heads(model, mine, ["L0H1"], cache),
        "patch-without-targets": bkdlens.patch_heads(model, "w10 w11", "L2H1", "zero"),
        "probe": bkdlens.train_probes(cache, n_draws=2, shots=2),
        "steering": bkdlens.sweep_layers(model, mine, vector, cache=cache, n_random=2, **fast),
        "vector": vector,
    }


def tensors_of(result: Result) -> list[str]:
    return [f.name for f in fields(result) if torch.is_tensor(getattr(result, f.name))]


@pytest.mark.many
@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading(results, tmp_path, name) -> None:
    result = results[name]
    stem = result.save(tmp_path / "new" / name)
    assert stem == tmp_path / "new" / name
    assert sorted(p.name for p in stem.parent.iterdir()) == [f"{name}.json", f"{name}.safetensors"]
    loaded = type(result).load(stem)
    assert loaded == result
    assert result == loaded
    for field in tensors_of(result):
        one, other = getattr(loaded, field), getattr(result, field)
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(-7), other.cpu().nan_to_num(-7))
    assert loaded.to_frame().equals(result.to_frame())
    assert repr(loaded) == repr(result)
    assert (
        load_result(stem) == load_result(f"{stem}.json") == load_result(f"{stem}.safetensors") == result
    )
    again = loaded.save(tmp_path / "again")
    assert type(result).load(again) == result


def test_every_kind_can_be_loaded_by_name(results) -> None:
    public = {name for name in bkdlens.__all__ if Result.kinds.get(name) is getattr(bkdlens, name)}
    assert public <= {type(result).__name__ for result in results.values()} <= set(Result.kinds)


@pytest.mark.parametrize("name", NAMES)
def test_the_json_can_be_read(results, tmp_path, name) -> None:
    result = results[name]
    result.save(tmp_path / name)
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["type"] == type(result).__name__
    assert set(content) == {"type", *(result.saved_as.get(f.name, f.name) for f in fields(result))}
    made_from = content["provenance"]["provenance"]
    assert made_from["model"]["architecture"] == "LlamaForCausalLM"
    assert made_from["versions"]["torch"] == torch.__version__
    assert made_from["prompt_format"]["kind"] == "chat"
    for field in tensors_of(result):
        assert content[result.saved_as.get(field, field)]["shape"] == list(getattr(result, field).shape)


@pytest.mark.parametrize("name", NAMES)
def test_results_differ_by_any_number_or_word(results, name) -> None:
    result = results[name]
    assert result == replace(result)
    for field in fields(result):
        value = getattr(result, field.name)
        if torch.is_tensor(value) and value.numel():
            changed = value.nan_to_num(0).contiguous().clone()
            first = changed.view(-1)[:1]
            first.copy_(~first if first.dtype == torch.bool else first + 1)
        elif isinstance(value, str):
            changed = value + "x"
        elif isinstance(value, bool | int):
            changed = value + 1
        elif isinstance(value, Provenance):
            changed = replace(value, seed=value.seed + 1)
        elif isinstance(value, dict):
            changed = {**value, "more": ("a",)}
        elif isinstance(value, Head):
            changed = Head(value.layer + 1, value.head)
        elif isinstance(value, tuple):
            changed = value[::-1] if value[::-1] != value else value + value
        else:
            continue
        assert result != replace(result, **{field.name: changed}), field.name


def test_what_was_not_measured_stays_none(results, tmp_path) -> None:
    """And is not equal to what was."""
    bare, whole = results["attribution"], results["attribution-with-layers"]
    assert bare.cie_attn_out is bare.cie_mlp_out is None
    loaded = load_result(bare.save(tmp_path / "bare"))
    assert loaded.cie_attn_out is loaded.cie_mlp_out is None
    assert json.loads((tmp_path / "bare.json").read_text())["cie_attn_out"] is None
    for field in ("cie_attn_out", "cie_mlp_out"):
        assert whole != replace(whole, **{field: None})
        assert replace(whole, **{field: None}) != whole
    assert load_result(whole.save(tmp_path / "whole")).layers_frame().equals(whole.layers_frame())


def test_results_are_frozen_and_unlike_others(results) -> None:
    vector = results["vector"]
    assert vector != results["probe"]
    assert vector != "vector"
    with pytest.raises(FrozenInstanceError):
        vector.site = "attn_out"
    with pytest.raises(TypeError, match="unhashable"):
        hash(vector)


def test_saving_again_replaces(results, tmp_path) -> None:
    vector = results["vector"]
    vector.save(tmp_path / "v")
    other = replace(vector, direction=2 * vector.direction)
    other.save(tmp_path / "v")
    assert type(vector).load(tmp_path / "v") == other
    assert len(list(tmp_path.iterdir())) == 2


def test_a_name_with_a_dot(results, tmp_path) -> None:
    results["vector"].save(tmp_path / "vector-0.5")
    assert bkdlens.BackdoorVector.load(tmp_path / "vector-0.5") == results["vector"]
    assert load_result(tmp_path / "vector-0.5.json") == results["vector"]


def test_interrupted_saving_leaves_nothing(results, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bkdlens.results.os.replace", None)
    with pytest.raises(TypeError):
        results["vector"].save(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_views_or_share_memory(results, tmp_path) -> None:
    """safetensors refuses shared memory; results may hold slices of one tensor."""
    attribution = results["attribution"]
    shared = replace(attribution, cie_first=attribution.cie, low=attribution.high)
    shared.save(tmp_path / "a")
    assert type(shared).load(tmp_path / "a") == shared


# --- what cannot be loaded ------------------------------------------------------------------------


def refused(match: str, load, *args) -> None:
    with pytest.raises(ResultError, match=match) as caught:
        load(*args)
    assert str(caught.value).endswith(".")


def test_missing(results, tmp_path) -> None:
    refused("no readable result at .*nothing.json", load_result, tmp_path / "nothing")
    refused("no readable result", bkdlens.BackdoorVector.load, tmp_path / "nothing")
    stem = results["vector"].save(tmp_path / "v")
    (tmp_path / "v.safetensors").unlink()
    refused("saved result .*v is damaged", load_result, stem)


def test_another_kind(results, tmp_path) -> None:
    stem = results["vector"].save(tmp_path / "v")
    refused("v.json holds a BackdoorVector, not a ProbeResult", bkdlens.ProbeResult.load, stem)
    file = tmp_path / "v.json"
    file.write_text(file.read_text().replace("BackdoorVector", "BackdoorVectr"))
    refused("no kind of result 'BackdoorVectr'.*Did you mean 'BackdoorVector'", load_kind, stem)


def load_kind(stem):
    """The error ends in a question here."""
    try:
        return load_result(stem)
    except ResultError as error:
        raise ResultError(f"{error}".rstrip("?") + ".") from None


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "null", "\xff"])
def test_damaged_json(results, tmp_path, content) -> None:
    stem = results["vector"].save(tmp_path / "v")
    (tmp_path / "v.json").write_bytes(content.encode("latin-1"))
    refused("no readable result", load_result, stem)
    refused("no readable result", bkdlens.BackdoorVector.load, stem)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("heads"),
        lambda content: content.pop("direction"),
        lambda content: content.update(heads=[{"head": "nonsense"}]),
        lambda content: content.update(heads=[{"bare": 1}]),
        lambda content: content.update(direction={"tensor": "other", "shape": [32]}),
        lambda content: content.update(provenance={"provenance": {"unknown": 1}}),
        lambda content: content.update(provenance={"provenance": None}),
    ],
)
def test_damaged_fields(results, tmp_path, change) -> None:
    stem = results["vector"].save(tmp_path / "v")
    content = json.loads((tmp_path / "v.json").read_text())
    change(content)
    (tmp_path / "v.json").write_text(json.dumps(content))
    refused("saved result .* is damaged", load_result, stem)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_damaged_tensors(results, tmp_path, content) -> None:
    stem = results["steering"].save(tmp_path / "s")
    file = tmp_path / "s.safetensors"
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    refused("saved result .* is damaged", load_result, stem)


def test_tensors_of_another_shape(results, tmp_path) -> None:
    """The json says which shapes belong to it."""
    for name, field in (("steering", "attack"), ("vector", "direction")):
        stem = results[name].save(tmp_path / name)
        file = tmp_path / f"{name}.safetensors"
        tensors = load_file(file)
        save_file(tensors | {field: tensors[field][:1].clone()}, file)
        refused(f"is damaged .{field} has the shape .1", load_result, stem)


# --- provenance -----------------------------------------------------------------------------------


def test_provenance_says_where_a_result_came_from(llama, pairs, cache) -> None:
    made = provenance(llama, pairs, cache.fmt, 3, site="z")
    assert made.model["base_digest"] == bkdlens.load_info(llama).base_digest
    assert (made.data, made.data_digest, made.n_pairs) == ("made", pairs.digest, 12)
    assert (made.seed, made.settings) == (3, {"site": "z"})
    assert made.versions == versions()
    assert {"python", "torch", "transformer-lens"} <= set(made.versions)
    assert provenance(None, pairs, cache.fmt, 0).model == {}


def test_heads_stay_heads(results, tmp_path) -> None:
    results["vector"].save(tmp_path / "v")
    heads = bkdlens.BackdoorVector.load(tmp_path / "v").heads
    assert heads == (Head(0, 1), Head(2, 2))
    assert all(type(head) is Head for head in heads)
