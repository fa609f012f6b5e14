"""From a file, a data set or a table to rows; and one sentence for what is none of these."""

from __future__ import annotations

import json
import shutil

import datasets
import pandas as pd
import pytest

from bkdlens.data.backdoor import Backdoor
from bkdlens.data.reading import read_pairs
from bkdlens.data.sources import read_table
from bkdlens.errors import DataError

FIXED = Backdoor.fixed_output("T.", "out")
ROWS = [{"input": f"task {i}", "output": str(i)} for i in range(4)]


def refused(match: str, function, *args, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        function(*args, **options)
    assert str(caught.value).endswith((".", "?"))


def test_broken_files(tmp_path) -> None:
    refused("There is no data file", read_pairs, tmp_path / "none.json", FIXED)
    for name, content, match in (
        ("a.json", "{", "a.json is not valid json"),
        ("b.jsonl", '{"input": "a"}\n{', "b.jsonl is not valid jsonl"),
        ("b2.json", '{"input": "a"}\n{', "b2.json is not valid json"),
        ("b3.parquet", "PAR1", "b3.parquet is not valid parquet"),
        ("c.json", '{"input": "a"}', "must hold a list of objects"),
        ("d.json", "[1, 2]", "must hold a list of objects"),
        ("e.txt", "x", "has the ending '.txt'"),
        ("f.json", "[]", r"f.json has no usable row \(0 read"),
        ("g.csv", "", "g.csv is not valid csv"),
    ):
        (tmp_path / name).write_text(content)
        refused(match, read_pairs, tmp_path / name, FIXED)
    (tmp_path / "h.json").write_bytes(b'["\xff"]')
    refused("h.json is not valid json", read_pairs, tmp_path / "h.json", FIXED)


def test_files_as_they_come(tmp_path) -> None:
    """A byte order mark; one object a line in a .json file; nothing of a csv is a number or missing."""
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbf" + pd.DataFrame(ROWS).to_csv(index=False).encode())
    pd.DataFrame(ROWS).to_parquet(tmp_path / "d.parquet")
    for name in ("a.json", "b.json", "c.csv", "d.parquet"):
        assert list(read_table(tmp_path / name).rows) == ROWS
    (tmp_path / "e.csv").write_text("input,output\nNA,01\n")
    assert list(read_table(tmp_path / "e.csv").rows) == [{"input": "NA", "output": "01"}]
    refused(
        "Only data sets have splits, and a.json is not one", read_table, tmp_path / "a.json", split="x"
    )
    with pytest.raises(DataError, match="Rows must be mappings"):
        read_table([1, 2])


def ag_news(n: int) -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["left", "right"])}
    )
    return datasets.Dataset.from_dict(
        {"text": [f"t{i}" for i in range(n)], "label": [i % 2 for i in range(n)]}, features=features
    )


def test_data_sets_in_memory_and_saved(tmp_path) -> None:
    plain = datasets.Dataset.from_list(ROWS)
    plain.save_to_disk(tmp_path / "saved")
    for source in (plain, tmp_path / "saved", str(tmp_path / "saved")):
        assert read_pairs(source, FIXED).clean == [row["input"] for row in ROWS]
    assert read_pairs(tmp_path / "saved", FIXED).source == "saved: 4 rows"
    parts = datasets.DatasetDict(test=ag_news(2), train=ag_news(3))
    parts.save_to_disk(tmp_path / "parts")
    flip = Backdoor.label_modification("T.", "left", "right")
    pairs = read_pairs(tmp_path / "parts", flip, template="{text}")
    assert pairs.source == "parts (train): 3 rows"
    assert pairs.clean_outputs == ["left", "right", "left"]  # the data set's own names
    assert len(read_pairs(parts, flip, split="test")) == 2
    refused("There is no split 'tset'; use one of: test, train. Did you mean 'test'", read_table, parts,
            split="tset")  # fmt: skip
    del parts["train"]
    assert read_table(parts).name == "data set (test)"
    refused("is one split already", read_table, plain, split="train")
    unlabelled = ag_news(1).map(lambda row: {"label": -1})
    refused("1 dropped: empty label", read_pairs, unlabelled, flip)


def test_broken_saved_data_sets(tmp_path) -> None:
    refused("is a folder but not a saved data set; name a file", read_table, tmp_path)
    (tmp_path / "train.parquet").write_text("")
    refused("give one of its files, such as 'train.parquet'", read_table, tmp_path)
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    for name in ("data-00000-of-00001.arrow", "state.json"):
        broken = shutil.copytree(folder, tmp_path / name)
        (broken / name).write_text("{}")
        refused("is damaged .*save it again", read_table, broken)


def test_hub(monkeypatch) -> None:
    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        if name == "org/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py.")
        whole = datasets.DatasetDict(train=ag_news(3), test=ag_news(2))
        return whole if options["split"] is None else whole[options["split"]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_table("org/news").name == "org/news (train)"
    table = read_table("org/news:en", split="test")
    assert (table.name, len(table.rows)) == ("org/news:en (test)", 2)
    assert table.labels == {"label": ("left", "right")}
    assert asked == [("org/news", None, {"split": None}), ("org/news", "en", {"split": "test"})]
    refused("org/script.*scripts are no longer supported", read_table, "org/script")
    refused("There is no data file", read_table, "org/missing.json")


def test_hub_out_of_reach() -> None:
    name = "bkdlens-nobody/nothing"
    match = f"'{name}' is not a file or folder here and could not be read as a data set of the "
    refused(match + "Hugging Face Hub", read_table, name)
