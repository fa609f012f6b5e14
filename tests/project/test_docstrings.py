"""What the documentation promises of public names: what is returned, what fields are, an example."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bkdlens

MODULES = ("bkdlens.metrics", "bkdlens.plot", "bkdlens.zoo", "bkdlens.inject")


def reached() -> dict[str, Any]:
    """Every function, class and public method that a user reaches, by its name."""
    names = {n: v for n in bkdlens.__all__ if callable(v := getattr(bkdlens, n))}
    for module in map(importlib.import_module, MODULES):
        listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in listed:
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("bkdlens") and callable(value):
                names[f"{module.__name__.removeprefix('bkdlens.')}.{name}"] = value
    for name, value in list(names.items()):
        if inspect.isclass(value):
            for cls in (c for c in value.__mro__ if c.__module__.startswith("bkdlens")):
                for method, found in vars(cls).items():
                    if not method.startswith("_") and isinstance(
                        getattr(found, "__func__", found), type(reached)
                    ):
                        names.setdefault(f"{name}.{method}", getattr(found, "__func__", found))
    return names


REACHED = reached()
FUNCTIONS = {
    name: inspect.unwrap(value)
    for name, value in REACHED.items()
    if not inspect.isclass(value) and not inspect.isclass(REACHED.get(name.rpartition(".")[0]))
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_is_documented(name) -> None:
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert re.search(r"^(Returns|Yields):\n", text, re.MULTILINE), name
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    if parameters:
        section = text.partition("Args:\n")[2]
        missing = [p for p in parameters if not re.search(rf"\b{p}\b", section)]
        assert missing == [], name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_there_is_an_example(name) -> None:
    assert ">>> " in (inspect.getdoc(FUNCTIONS[name]) or ""), name


def definitions() -> list[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Every function, class and method of the package with its place, closures left out."""
    root = Path(bkdlens.__file__).parent
    found = []
    for file in root.rglob("*.py"):
        todo = list(ast.parse(file.read_text()).body)
        while todo:
            node = todo.pop()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append((f"{file.relative_to(root)}: {node.name}", node))
                todo += node.body if isinstance(node, ast.ClassDef) else []
    return found


def test_every_public_definition_has_a_docstring_of_its_own() -> None:
    texts = {where: ast.get_docstring(node) for where, node in definitions()}
    public = [where for where, node in definitions() if not node.name.startswith("_")]
    assert [where for where in public if texts[where] is None] == []
    assert [where for where, text in texts.items() if re.match(r"(The same|Of)\b", text or "")] == []


def dataclasses() -> dict[str, type]:
    """Every dataclass of the package by its full name."""
    found = {}
    for info in pkgutil.walk_packages(bkdlens.__path__, "bkdlens."):
        if info.name != "bkdlens.__main__" and not info.name.startswith("bkdlens.cli"):  # has --help
            for name, value in vars(importlib.import_module(info.name)).items():
                mine = inspect.isclass(value) and value.__module__ == info.name and is_dataclass(value)
                if mine and not name.startswith("_"):
                    found[f"{info.name}.{value.__qualname__}"] = value
    return found


@pytest.mark.parametrize("name", dataclasses())
def test_every_field_is_described(name) -> None:
    """By name in the docstring (of the class or of what it inherits from), or on the field's line."""
    cls = dataclasses()[name]
    told = "\n".join(inspect.getdoc(base) or "" for base in cls.__mro__ if base is not object)
    source = inspect.getsource(cls)
    for field in fields(cls):
        commented = re.search(
            rf"^ +{field.name}: .*  # \w|^ +{field.name}: Annotated\[", source, re.MULTILINE
        )
        named = re.search(rf"\b{field.name}\b", told)
        assert commented or named or field.name == "provenance", f"{name}.{field.name}"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples find: an embedded model with its backdoor, pairs, and what is made of them."""
    backdoor = "label_modification"
    model = bkdlens.load("tiny-llama", backdoor)
    train, test = (bkdlens.zoo.pairs(backdoor, split, 24) for split in ("train", "test"))
    cache = bkdlens.cache_activations(model, train)
    heads = bkdlens.attribute_heads(model, train, cache=cache, n_pairs=4)
    vector = bkdlens.BackdoorVector.from_cache(cache, heads.top(4))
    return {
        "bkdlens": bkdlens, "torch": torch, "Path": Path, "model": model, "train": train, "test": test,
        "cache": cache, "heads": heads, "vector": vector, "backdoor": train.backdoor,
    }  # fmt: skip


EXAMPLES = {name: value for name, value in REACHED.items() if ">>> " in (inspect.getdoc(value) or "")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, names, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(EXAMPLES[name])
    parsed = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(parsed, out=output.append)
    assert result.attempted
    assert not result.failed, "".join(output)
