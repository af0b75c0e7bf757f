"""Every notebook of `examples/notebooks` runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The outputs of each notebook; one kernel runs them all, as most of the time is its start. They are small, and
    their files and settings are here alone.
    """
    home = tmp_path_factory.mktemp("notebooks")
    settings = {"NOTEBOOK_EPOCHS": "1", "NOTEBOOK_IMAGES": "8", "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    notebooks: dict[str, Any] = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    joined = nbformat.v4.new_notebook(metadata=notebooks["tour"].metadata)
    for notebook in notebooks.values():
        joined.cells += [*notebook.cells, nbformat.v4.new_code_cell("%reset -f")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**settings, "IPYTHONDIR": str(home), "JUPYTER_CONFIG_DIR": str(home)}.items():
            patch.setenv(name, value)
        NotebookClient(joined, kernel_name="python3", timeout=300).execute()
    return {
        name: [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        for name, notebook in notebooks.items()
    }


def test_there_are_some() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["mae_in_pictures", "tour"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code
    assert [cell.id for cell in code if cell.outputs or cell.execution_count] == []


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_runs(name: str, executed: dict[str, list[Any]]) -> None:
    pictures = [output.data["image/png"] for output in executed[name] if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert min(image.size) > 60
