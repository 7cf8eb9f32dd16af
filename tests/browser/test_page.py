"""The page as visitors use it, in Chromium, driven by Playwright:

pip install playwright && python -m pytest -m browser -n 0 tests/browser"""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image

from dataset.decoding import crop_face

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(finished, tmp_path_factory):
    """The address of the page that `python app.py` shows beside a run, without a traceback."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(finished / "run", folder / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, log = [sys.executable, "-u", ROOT / "app.py", "--port", str(port)], folder / "log"
    with open(log, "w") as errors:
        streams = dict(stdout=subprocess.PIPE, stderr=errors, text=True)
        with subprocess.Popen(words, cwd=folder, **streams) as server:
            try:
                assert any("Running on" in line for line in server.stdout), log.read_text()
                yield f"http://127.0.0.1:{port}"
            finally:
                server.terminate()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    options = dict(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


@pytest.fixture
def visit(address, browser):
    """visit(): the page of a new visitor. No script may fail, or ask another server."""
    contexts, errors, urls = [], [], []

    def visit(width: int = 1280, **sliders: int):
        contexts.append(browser.new_context(viewport=dict(width=width, height=900)))
        page = contexts[-1].new_page()
        page.set_default_timeout(180_000)  # the canvas is slow without a GPU
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        move(page, **sliders)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not errors and all(url.startswith((address, "data:", "blob:")) for url in urls)


def move(page, **sliders: int) -> None:
    """Type numbers into the fields of sliders."""
    for label, value in sliders.items():
        field = page.get_by_label(f"number input for {label}")
        field.fill(str(value))
        field.blur()


def press(page, name: str, count: int) -> list[np.ndarray]:
    """Press a button and wait until so many faces are made. Returns the pictures on the page."""
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_text(re.compile(rf"^Faces: {count}, in \d+\.\d seconds$")).wait_for()
    return pictures(page)


def pictures(page) -> list[np.ndarray]:
    """The pictures on the page, (H, W, 3) each."""
    urls = [image.get_attribute("src") for image in page.locator(".faces img:visible").all()]
    files = [BytesIO(page.request.get(url).body()) for url in urls]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def click_face(page, index: int) -> str:
    """Click a face. Returns the command that appears."""
    page.locator(".faces button").nth(index).click()
    page.wait_for_function("document.querySelector('textarea').value")
    return page.locator("textarea").first.input_value()


def test_faces_have_what_was_chosen_and_the_command_makes_them_again(visit, monkeypatch, tmp_path):
    page = visit(Faces=3, Steps=2, Guidance=2)
    page.get_by_label("Weights").click()
    page.get_by_role("option", name="celeba_64").click()
    page.locator("[data-name=Smiling][data-state='1']").click()
    page.locator("[data-name=Male][data-state='-1']").click()
    faces = press(page, "Generate", 3)
    words = shlex.split(click_face(page, 1), comments=True)
    monkeypatch.chdir(tmp_path)
    assert {"Smiling", "Male=-1"} <= set(words) and run_script(*words[1:]).returncode == 0
    again = [np.asarray(Image.open(path)) for path in sorted(Path("faces").iterdir())]
    assert np.array_equal(faces, again)


def test_what_is_painted_on_an_upload_is_repaired_and_the_rest_stays(visit, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    (tmp_path / "text.png").write_text("no image")
    page = visit(Faces=3, Steps=2)
    page.get_by_role("tab", name="Edit").click()
    file = page.locator("input[type=file]").first
    file.set_input_files(tmp_path / "text.png")
    message = page.get_by_text("cannot be used as an image").first
    assert message.inner_text().startswith("text.png")  # and no folder
    file.set_input_files(tmp_path / "face.png")
    page.get_by_text(re.compile(r"^\d+%$")).wait_for()  # the zoom: the canvas has the face
    page.wait_for_timeout(1000)
    box = page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=3)
    page.mouse.up()
    face, hole, *answers = press(page, "Repair what is painted", 3)
    assert np.array_equal(face, crop_face(Image.fromarray(pixels), 8))
    painted = (hole != face).any(-1)
    assert painted[3:5, 3:5].any() and not painted[:2].any() and len(answers) == 3
    for answer in answers:
        assert np.array_equal(answer[~painted], face[~painted]) and (answer != face).any()


def test_visitor_varies_the_face_that_was_clicked_and_another_has_none(visit):
    page, other = visit(Faces=3, Steps=2), visit(Faces=2, Steps=2)
    faces = press(page, "Generate", 3)
    click_face(page, 1)
    assert not pictures(other) and np.array_equal(press(other, "Generate", 2), faces[:2])
    for each in (page, other):
        each.get_by_role("tab", name="Edit").click()
    move(page, Faces=4)
    face, *answers = press(page, "Vary all", 4)
    assert np.array_equal(face, faces[1]) and len(answers) == 4
    other.get_by_role("button", name="Vary all").click()
    other.get_by_text("upload one, or click on a generated one").wait_for()


def test_slider_goes_from_face_to_face(visit):
    page = visit(Steps=2)
    page.get_by_role("tab", name="Between").click()
    press(page, "Walk", 16)
    page.locator(".faces img:visible").nth(17).wait_for()
    first, _, *frames = pictures(page)
    move(page, Where=16)
    page.wait_for_timeout(1000)
    ends = [large[32::64, 32::64] for large in (first, pictures(page)[0])]
    assert np.array_equal(ends, [frames[0], frames[-1]]) and (ends[0] != ends[1]).any()


def test_stop_stops_and_a_page_that_is_loaded_again_works(visit):
    page = visit(Faces=16, Steps=50)
    page.get_by_role("button", name="Generate", exact=True).click()
    status = page.get_by_text(re.compile(r"^Step \d+ of 50$"))
    status.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(3000)
    stopped = status.inner_text()
    page.wait_for_timeout(3000)
    assert status.inner_text() == stopped
    page.reload()
    page.get_by_text("press Generate").wait_for()
    assert not pictures(page)
    move(page, Faces=2, Steps=2)
    assert len(press(page, "Generate", 2)) == 2


def test_nothing_is_wider_than_a_phone(visit):
    page = visit(width=400, Faces=8, Steps=2)
    press(page, "Generate", 8)
    for name in ("Generate", "Edit", "Between", "A run"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(1000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
        for item in page.locator("button, input, img, canvas, textarea").all():
            box = item.bounding_box()  # None if it is not shown
            assert not box or box["x"] + box["width"] <= 400, item
    page.get_by_text(re.compile("^run, step 6")).first.wait_for()  # its grid
    assert page.locator(".faces img:visible").count() == 1
