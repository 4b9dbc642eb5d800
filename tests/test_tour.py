"""docs/tour.ipynb from its first cell to its last, on a small training of each method."""
import os
from pathlib import Path

import pytest

from data import puppets
from tests.helpers import required

nbformat, nbclient = required("nbformat"), required("nbclient")
FLAGS = {"detrpose": "--layers 2 --dim 32 --size 64", "diffusionregpose": "--short_side 64 --long_side 64 --dim 32",
         "querypose": "--short_side 64 --long_side 64 --queries 20", "diffusionpose": "", "sdpose": ""}


@pytest.mark.slow
@pytest.mark.parametrize("method", FLAGS)
def test_the_tour_runs_to_its_end(method, puppets_folder, tmp_path, monkeypatch):
    notebook = nbformat.read(Path(__file__).parents[1] / "docs" / "tour.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('method = "detrpose"', f'method = "{method}"')
    data = puppets_folder
    if method == "diffusionpose":
        data = puppets.make(tmp_path, "video", size=64, workers=1, progress=False, counts={"train": 4, "val": 2})
    monkeypatch.setenv("TOUR_FLAGS", " ".join(["--epochs 1 --batch 8 --processes 1", FLAGS[method], f"--data {data}"]))
    monkeypatch.setenv("TOUR_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(Path("docs"))}}).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4
