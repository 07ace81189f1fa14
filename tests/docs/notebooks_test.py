"""The notebook runs from top to bottom."""

import pathlib

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / "docs" / "notebooks" / "tour.ipynb"


@pytest.mark.live
def test_the_tour_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    root = NOTEBOOK.parents[2]
    for name in ("configs", "research"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.setenv("PYTHONPATH", str(root))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises what a cell raises
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert outputs[2][0]["data"]["text/plain"] == "30"
    assert "config.json" in outputs[-1][0]["data"]["text/plain"]


def test_the_tour_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
