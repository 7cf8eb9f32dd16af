"""The page: it makes what sample.py makes, keeps visitors apart, and opens no other file."""

import contextlib
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import gradio_client
import httpx
import numpy as np
import pytest
from conftest import ROOT, assert_error, run_script, tiny
from PIL import Image

import app
import sample
from dataset.decoding import crop_face
from sample import SampleConfig
from system.errors import UsageError
from train import train
from utils import list_checkpoints, load_checkpoint

CONTROLS = ("run", {"Smiling": 1, "Plain": 0}, 2.0, "dpm++", 3, 5, 4)
FLAGS = dict(checkpoint="run", condition=("Smiling",), guidance=2.0, steps=3, seed=5, num_images=4)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder of all tests: a run with two attributes, a face, strokes on it."""
    folder = tmp_path_factory.mktemp("page")
    random = np.random.default_rng(0)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "served"))
        for i in range(22):
            path = Path("pictures", "Smiling" if i % 2 else "Plain", f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        train(tiny(attributes=("Smiling", "Plain"), learning_rate=0.01, sample_every=3))
        pixels = random.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(pixels).save("face.png")
        strokes = np.zeros((512, 512, 4), np.uint8)
        strokes[100:300, 200:400] = 255, 0, 0, 255
        Image.fromarray(strokes).save("strokes.png")
        yield folder


@pytest.fixture(scope="module")
def page(folder):
    """The page, on the loopback address."""
    blocks = app.page()
    blocks.launch(prevent_thread_lock=True, quiet=True)
    yield blocks
    blocks.close()


def visitor(page: gr.Blocks) -> gradio_client.Client:
    return gradio_client.Client(page.local_url, verbose=False, analytics_enabled=False)


def last(steps):
    *_, step = steps
    return step


def pixels(images) -> np.ndarray:
    """Pictures, or the files in a folder, as (N, H, W, 3)."""
    if isinstance(images, Path):
        images = [Image.open(path) for path in sorted(images.glob("*.png"))]
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


@pytest.mark.parametrize("state", [0, 1])
def test_command_of_a_face_makes_it_bit_for_bit(state, tmp_path, monkeypatch):
    controls = ("run", {"Smiling": state, "Plain": -state}, 2.0, "ddpm", 3, 5, 4)
    _, faces, made = last(app.generate_faces("auto", *controls))
    face, _, text = last(app.choose(made, SimpleNamespace(index=2)))
    command, hint = text.splitlines()
    _, script, *words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *words, "--out", str(tmp_path / "faces")])
    sample.main()
    same = Image.open(tmp_path / hint.split()[-1])
    assert np.array_equal(pixels([face]), pixels([same]))
    assert np.array_equal(pixels(faces), pixels(tmp_path / "faces"))


def test_faces_appear_while_they_form_and_can_be_clicked_at_the_end():
    steps = list(app.generate_faces("auto", *CONTROLS))
    assert [status for status, _, _ in steps[:-1]] == ["Step 1 of 3", "Step 2 of 3"]
    assert all(len(faces) == 4 for _, faces, _ in steps)
    with pytest.raises(gr.Error, match="not finished"):
        last(app.choose(steps[0][2], SimpleNamespace(index=0)))


@pytest.mark.parametrize("how", ["repair", "vary", "change"])
def test_edited_faces_are_those_of_sample(how, tmp_path):
    face, _ = last(app.upload("auto", "run", "face.png"))
    canvas = dict(background=None, layers=["strokes.png"], composite=None)
    _, gallery = last(app.edit(how, face, canvas, 0.5, "auto", *CONTROLS))
    flags = dict(repair=dict(mask="strokes.png"), vary=dict(strength=0.5))
    flags = FLAGS | flags.get(how, dict(steps=app.INVERSION_STEPS))
    face.save(tmp_path / "mine.png")
    out = str(tmp_path / "out")
    sample.sample(SampleConfig(image=str(tmp_path / "mine.png"), out=out, **flags))
    beside = 2 if how == "repair" else 1  # the face, and the face with its hole
    assert np.array_equal(pixels([gallery[0][0]]), pixels([face]))
    answers = [answer for answer, _ in gallery[beside:]]
    assert np.array_equal(pixels(answers), pixels(tmp_path / "out"))
    assert not np.array_equal(pixels(answers[:1]), pixels([face]))


@pytest.mark.parametrize("end", [1, "face.png"])
def test_walk_is_that_of_sample_and_a_gif(end, tmp_path):
    file = end if isinstance(end, str) else None
    walk = app.walk(0, None, 1, file, "auto", *CONTROLS)
    steps = [(faces, large, gif and Image.open(gif).n_frames) for _, faces, large, _, gif in walk]
    faces, large, frames = steps[-1]
    flags = FLAGS | dict(interpolate=(0, end), num_images=app.FRAMES, out=str(tmp_path / "out"))
    flags |= dict(steps=app.INVERSION_STEPS) if file else {}
    sample.sample(SampleConfig(**flags))
    assert np.array_equal(pixels(faces), pixels(tmp_path / "out"))
    assert frames == app.FRAMES == len(large)


def test_upload_is_cropped_as_the_training_faces_and_enlarged_without_blur():
    face, large = last(app.upload("auto", "run", "face.png"))
    crop = load_checkpoint(list_checkpoints(Path("run"))[0])["settings"]["crop"]
    assert np.array_equal(np.asarray(face), crop_face(Image.open("face.png"), 8, crop))
    assert large.size == (512, 512)
    assert np.array_equal(pixels([large])[0, 32::64, 32::64], pixels([face])[0])


@pytest.mark.parametrize("kind", ["truncated", "text", "16 bit", "bomb"])
def test_damaged_upload_is_a_message_that_names_no_folder(kind, tmp_path, monkeypatch):
    path, data = tmp_path / "mine.png", Path("face.png").read_bytes()
    files = {"truncated": data[: len(data) // 2], "text": b"no image", "bomb": data}
    path.write_bytes(files.get(kind, b""))
    if kind == "16 bit":
        Image.fromarray(np.zeros((9, 9), np.uint16)).save(path)
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(app.tempfile, "gettempdir", lambda: str(tmp_path.parent))
    with pytest.raises(gr.Error, match="cannot be used as an image") as error:
        last(app.upload("auto", "run", str(path)))
    assert "mine.png" in error.value.message and str(tmp_path.parent) not in error.value.message


def test_two_visitors_do_not_mix(page):
    one, two = visitor(page), visitor(page)
    one.predict("run", gradio_client.handle_file("face.png"), api_name="/upload")
    canvas = dict(
        background=None, layers=[gradio_client.handle_file("strokes.png")], composite=None
    )
    status, gallery = one.predict(canvas, 0.5, *CONTROLS, api_name="/repair")
    assert status.startswith("Faces: 4") and len(gallery) == 2 + 4
    with pytest.raises(gradio_client.exceptions.AppError, match="there is none"):
        two.predict(canvas, 0.5, *CONTROLS, api_name="/repair")


@pytest.mark.parametrize("place, value", [(0, "../page/run"), (1, {"Bald": 1}), (4, 9999), (6, 99)])
def test_what_a_visitor_may_not_ask_for_is_a_message(page, place, value):
    controls = [value if i == place else each for i, each in enumerate(CONTROLS)]
    with pytest.raises(gradio_client.exceptions.AppError, match="choose|choices|maximum"):
        visitor(page).predict(*controls, api_name="/generate")


def test_nothing_but_its_images_can_be_fetched_from_the_page(page, folder):
    visitor(page).predict(*CONTROLS, api_name="/generate")
    served = list((folder / "served").rglob("*.png"))
    others = [list_checkpoints(folder / "run")[0], folder / "face.png", ROOT / "app.py"]
    url, paths = f"{page.local_url}gradio_api/file=", [served[0], *others]
    codes = [httpx.get(f"{url}{path}").status_code for path in paths]
    assert codes == [200, 403, 403, 403]
    assert page.max_file_size == 20 * 2**20 and not page.allowed_paths


def test_stop_stops_all_that_computes(page):
    names = {index: function.api_name for index, function in page.fns.items()}
    stopped = {names[index] for function in page.fns.values() for index in function.cancels}
    assert stopped == {"generate", "repair", "vary", "change", "between"}


def test_run_is_shown_by_its_curves_and_its_grids():
    figure, grids = app.watch(["run"], 0)
    training, held_out = figure.axes[0].lines
    history = load_checkpoint(list_checkpoints(Path("run"))[0])["history"]
    assert np.allclose(training.get_xydata(), history) and len(held_out.get_xydata()) == 2
    assert grids[0][1] == "run, step 3" and app.watch(["run"], 100)[1][0][1] == "run, step 6"
    figure, grids = app.watch(["../page/run"], 0)
    assert not figure.axes[0].lines and not grids


def test_page_is_for_this_machine_unless_asked(page, monkeypatch):
    port = page.local_url.rstrip("/").split(":")[-1]
    monkeypatch.setattr(sys, "argv", ["app.py", "--port", port])
    with pytest.raises(UsageError, match=f"{port} of 127.0.0.1 is in use"):
        app.main()
    launched = []
    blocks = SimpleNamespace(launch=lambda **options: launched.append(options["server_name"]))
    monkeypatch.setattr(app, "page", lambda device: blocks)
    monkeypatch.setattr(sys, "argv", ["app.py", "--host", "0.0.0.0"])
    app.main()
    assert launched == ["0.0.0.0"]


def test_without_gradio_one_error_says_how_to_install_it(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('gradio')")
    result = run_script("app.py", env={"PYTHONPATH": str(tmp_path)})
    assert_error(result, 5, "pip install -r requirements-app.txt")
