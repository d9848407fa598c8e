"""The notebooks run from the first to the last cell on a checkpoint that is trained here, and are stored empty."""

import json
import re

import nbformat
import pytest
from helpers.launch import SMALL
from helpers.pages import ROOT
from nbclient import NotebookClient

import main_pretrain

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    words = f"--dataset digits --input_size 16 {SMALL} --batch_size 256 --epochs 1 --warmup_epochs 0 --vis_freq 0"
    words += f" --num_workers 0 --device cpu --amp_dtype fp32 --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words.split()))
    return folder / "checkpoint-0.pth"


def executed(name: str, folder, **settings):
    """The notebook, run in a copy of the settings cell whose values are replaced."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and re.match("[A-Z_]+ =", cell.source)]
    for variable, value in settings.items():
        cell.source, count = re.subn(rf"^{variable} = .*$", f"{variable} = {value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    return text, [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_visualize(checkpoint, tmp_path):
    """An image, a sheet of three ratios, and a loss for each."""
    text, pictures = executed("visualize", tmp_path, CHECKPOINT=str(checkpoint))
    assert len(pictures) == 2
    losses = re.findall(r"(\d+)% removed: ([\d.]+) ± ([\d.]+)", text)
    assert [ratio for ratio, *_ in losses] == ["50", "75", "90"]
    assert all(float(mean) > 0 for _, mean, _ in losses)


def test_judge(checkpoint, tmp_path):
    """Numbers of both encoders, their curves, and t-SNE."""
    text, pictures = executed(
        "judge", tmp_path, FIRST=str(checkpoint), MODEL="vit_micro_patch4", OUT=str(tmp_path),
        DATA="--dataset digits --input_size 16 --num_workers 0 --device cpu",
    )  # fmt: skip
    assert text.count("20-NN") == 2 and len(pictures) == 2
    for tool in ("knn", "fewshot"):
        for name in ("first", "second"):
            assert json.loads((tmp_path / f"{tool}-{name}.json").read_text())["result"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebooks(name):
    """Without outputs and counts, which would change with each run; the badge opens this notebook."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert f"/blob/main/notebooks/{name}.ipynb" in notebook.cells[0].source


def test_no_notebook_is_left_out():
    assert NOTEBOOKS == ["judge", "visualize"]
