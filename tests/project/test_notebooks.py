"""The committed notebooks: run in order without an error, small, fit for pages without scripts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def execute():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_five() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_fit_a_page(path) -> None:
    text = path.read_text()
    assert len(text) < 500_000
    assert "plotly.js v" not in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    figures = 0
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        data = output.get("data", {})
        assert WIDGET not in data
        assert (PLOTLY in data) == ("image/png" in data)
        figures += PLOTLY in data
        assert "/tmp/" not in json.dumps(output)
    assert figures >= 2


def test_what_differs_in_every_run_is_taken_out(execute) -> None:
    def said(text: str, name: str = "stdout"):
        return new_output("stream", name=name, text=text)

    shown = new_output("display_data", {WIDGET: {"model_id": "1"}, "text/html": "<b>"})
    outputs = [
        said("a\n"), said("b\n"), said("!", "stderr"), shown,
        new_output("display_data", {WIDGET: {"model_id": "2"}}),
    ]  # fmt: skip
    cell = new_code_cell("1", outputs=outputs, metadata={"execution": {"iopub.status.idle": "now"}})
    notebook = new_notebook(cells=[cell], metadata={"widgets": {}})
    execute.settle(notebook)
    assert [o.get("text") for o in cell.outputs] == ["a\nb\n", "!", None]
    assert dict(cell.outputs[2].data) == {"text/html": "<b>"}
    assert not cell.metadata
    assert not notebook.metadata


def test_a_still_image_stands_beside_a_figure(execute, monkeypatch) -> None:
    from PIL import Image

    def to_image(figure, **options):
        import io

        file = io.BytesIO()
        Image.new("RGB", (4, 3), "white").save(file, "png")
        return file.getvalue()

    monkeypatch.setattr(execute, "pio", SimpleNamespace(to_image=to_image))
    figure = {"data": [], "layout": {}, "config": {}}
    cell = new_code_cell("1", outputs=[new_output("display_data", {PLOTLY: figure})])
    execute.draw(new_notebook(cells=[cell]))
    assert cell.outputs[0].data["image/png"].startswith("iVBOR")
