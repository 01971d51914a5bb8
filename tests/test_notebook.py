"""notebooks/quickstart.ipynb, from its first cell to its last, with a model that is trained in seconds."""

import json
import os
import re

import pytest
from scripts import ROOT

SMALL = "model.n_layer=1 model.n_head=2 model.n_embd=16 trainer.max_steps=4 trainer.val_check_interval=2 data.val_tokens=500"
PATH = ROOT / "notebooks" / "quickstart.ipynb"


def test_the_notebook_is_kept_without_outputs():
    for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("transformers")
    for name, value in {"FOLDER": str(tmp_path), "SIZE": SMALL}.items():
        monkeypatch.setenv(f"QUICKSTART_{name}", value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PATH, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(PATH.parent)}})
    client.execute()  # raises where a cell fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    said = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 2
    assert "best val loss" in said
    assert said.count("step 2/4") == 1  # a line at each validation: no progress bar, which a notebook cannot draw
    assert "\x1b" not in said
    assert "val_accuracy" in said
    assert said.count("--- temperature") == 3
    assert float(re.search(r"logits differ by (\S+) at most", said)[1]) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs", "data", "ipython"}
