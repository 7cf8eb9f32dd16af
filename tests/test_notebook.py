"""The tour, `ddpm_test.ipynb`: it runs, and what is committed is one clean run of it."""

import ast
import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image

from dataset.synthetic import ATTRIBUTES, render_face

PATH = ROOT / "ddpm_test.ipynb"
TOUR = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in TOUR.cells if cell.cell_type == "code"]
MACHINE_PATHS = r"/(?:tmp|root|work|home|content|mnt|usr)/"


def text_of(cell) -> str:
    """All that a cell has printed, but its images."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join(parts)


def save_small_celeba(folder, count: int) -> None:
    """A folder as CelebA's: aligned images of 178x218, here synthetic ones, and the attributes."""
    (folder / "img_align_celeba").mkdir(parents=True)
    rows = [str(count), " ".join(ATTRIBUTES)]
    for i in range(count):
        pixels, has = render_face(i, 218)
        name = f"{i + 1:06d}.jpg"
        Image.fromarray(pixels[:, 20:198]).save(folder / "img_align_celeba" / name)
        rows.append(f"{name} {' '.join(map(str, has))}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tour, run on the CPU in an empty folder with other constants: a small CelebA, 8 steps."""
    folder = tmp_path_factory.mktemp("tour")
    save_small_celeba(folder / "data", 64)
    tour = nbformat.read(PATH, as_version=4)
    (constants,) = [cell for cell in tour.cells if cell.source.startswith("DATA = ")]
    constants.source = 'DATA, SIZE, STEPS = "data", 8, 8\nATTRIBUTES = ("Smiling", "Eyeglasses")'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        client = NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(folder)}})
        client.execute()
    return folder, tour


def test_tour_runs_without_a_gpu(run):
    """A cell that raises ends `execute` with CellExecutionError."""
    folder, tour = run
    counts = [cell.execution_count for cell in tour.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(CODE) + 1))
    assert (folder / "notebook/data/checkpoints/step_00000008.pt").exists()


def test_tour_proves_that_the_resumed_run_is_equal(run):
    said = "\n".join(text_of(cell) for cell in run[1].cells if cell.cell_type == "code")
    equal, total = re.search(r"(\d+) of (\d+) tensors are equal, bit for bit", said).groups()
    assert equal == total and int(total) > 100


def test_tour_switches_to_celeba_by_one_constant(run):
    said = "\n".join(text_of(cell) for cell in run[1].cells if cell.cell_type == "code")
    assert "61 faces (3 held out), 8x8, CelebA's crop, from data" in said


def test_committed_tour_is_one_clean_run():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [o for cell in CODE for o in cell.outputs if o.output_type == "error"]
    said = "\n".join(map(text_of, CODE))
    equal, total = re.search(r"(\d+) of (\d+) tensors are equal, bit for bit", said).groups()
    assert equal == total
    images = [o for cell in CODE for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(images) >= 12


def test_committed_tour_is_small_and_names_no_machine():
    assert PATH.stat().st_size < 1_000_000
    for cell in TOUR.cells:
        assert not re.search(MACHINE_PATHS, cell.source), cell.source
    for cell in CODE:
        assert not re.search(MACHINE_PATHS, text_of(cell)), text_of(cell)


def test_cells_are_short_and_each_is_announced():
    for before, cell in zip(TOUR.cells, TOUR.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            lines = cell.source.split("\n")
            assert len(lines) <= 15 and max(map(len, lines)) <= 100, cell.source


def test_tour_defines_nothing_and_imports_what_exists():
    import importlib

    for cell in CODE:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef), cell.source
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
