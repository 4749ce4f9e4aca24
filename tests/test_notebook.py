"""The notebook, from its first cell to its last, in a kernel of its own, with the stand-in for the Hub."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from fake_hub import FakeHub
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
SMALL = {"QUICKSTART_IMAGES": "8", "QUICKSTART_UPDATES": "2", "QUICKSTART_INFERENCE_STEPS": "20"}


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_committed_without_what_a_run_left() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert "HF_ENDPOINT" not in NOTEBOOK.read_text(encoding="utf-8")


def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read_notebook()
    with FakeHub() as hub:
        an_activated_environment = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the cores from other tests
            "PATH": an_activated_environment,
            "TMPDIR": str(tmp_path),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        for name, value in {**hub.env(tmp_path / "hf_home"), **own, **SMALL}.items():
            monkeypatch.setenv(name, value)
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute()  # raises at the first cell that does

    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # three grids and the strips
    printed = "".join(output.get("text", "") for output in cells[-1].outputs)
    assert re.search(r"/user/animeface-quickstart/commit/[0-9a-f]{40}\n", printed)
    assert "pulled again, with its DPMSolverMultistepScheduler" in printed
    repo = hub.repo("user/animeface-quickstart")
    assert repo.private and "unet/diffusion_pytorch_model.safetensors" in hub.files("user/animeface-quickstart")
