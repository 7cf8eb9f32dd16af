"""The tour, `ddpm_test.ipynb`: it runs, and what is committed is one clean run of it."""

import os
import re

import nbformat
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image

from dataset.synthetic import ATTRIBUTES, render_face

PATH = ROOT / "ddpm_test.ipynb"
TOUR = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in TOUR.cells if cell.cell_type == "code"]


def text_of(cell) -> str:
    """All that a cell has printed, but its images."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join(parts)


def assert_resumed_run_is_equal(said: str) -> None:
    """The proof that a tour has printed."""
    equal, total = re.search(r"(\d+) of (\d+) tensors are equal, bit for bit", said).groups()
    assert equal == total and int(total) > 100


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


def test_tour_runs_on_celeba_without_a_gpu_and_its_resumed_run_is_equal(tmp_path, monkeypatch):
    """In an empty folder, with a small CelebA, few steps of training and two of each sampler. A
    cell that raises ends `execute` with CellExecutionError."""
    save_small_celeba(tmp_path / "data", 64)
    tour = nbformat.read(PATH, as_version=4)
    for cell in tour.cells:
        cell.source = re.sub(r"\bsteps=\d+", "steps=2", cell.source)
        cell.source = re.sub(r"generate\(trained, numbers,", r"\g<0> steps=2,", cell.source)
    (constants,) = [cell for cell in tour.cells if cell.source.startswith("DATA = ")]
    constants.source = """DATA, SIZE, STEPS = "data", 8, 4
ATTRIBUTES = ("Smiling", "Eyeglasses")
import engine.run, train
engine.run.LOSS_TIMESTEPS = 2
train.DEMO["batch_size"] = 8"""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(tour, timeout=300, resources=resources).execute()
    said = "\n".join(text_of(cell) for cell in tour.cells if cell.cell_type == "code")
    assert "61 faces (3 held out), 8x8, CelebA's crop, from data" in said
    assert (tmp_path / "notebook/data/checkpoints/step_00000004.pt").exists()
    assert_resumed_run_is_equal(said)


def test_committed_tour_is_one_clean_small_run_that_names_no_machine():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [o for cell in CODE for o in cell.outputs if o.output_type == "error"]
    said = "\n".join(map(text_of, CODE))
    assert_resumed_run_is_equal(said)
    images = [o for cell in CODE for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(images) >= 12 and PATH.stat().st_size < 1_000_000
    written = "\n".join([said, *(cell.source for cell in TOUR.cells)])
    assert not re.findall(r".*/(?:tmp|root|work|home|content|mnt|usr)/.*", written)


def test_cells_are_short_announced_and_define_nothing():
    for before, cell in zip(TOUR.cells, TOUR.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            lines = cell.source.split("\n")
            assert len(lines) <= 15 and max(map(len, lines)) <= 100, cell.source
            assert not re.search(r"^ *(def|class) ", cell.source, re.MULTILINE), cell.source
