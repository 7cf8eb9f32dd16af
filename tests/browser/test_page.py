"""The page as a visitor uses it, in Chromium, driven by Playwright:

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

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """The server's current folder: a run, and a face to upload."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(finished / "run", folder / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "face.png")
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """The address at which `python app.py` shows the page. It must not print a traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-u", ROOT / "app.py", "--port", str(port)]
    log = folder / "log"
    with open(log, "w") as errors:
        streams = dict(stdout=subprocess.PIPE, stderr=errors, text=True)
        with subprocess.Popen(words, cwd=folder, **streams) as server:
            assert any("Running on" in line for line in server.stdout), log.read_text()
            yield f"http://127.0.0.1:{port}"
            server.terminate()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    options = dict(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


@pytest.fixture
def visit(address, browser):
    """visit(width): a new visitor's page. Its script must not fail, nor ask another server."""
    pages, errors, urls = [], [], []

    def visit(width: int = 1280):
        page = browser.new_context(viewport=dict(width=width, height=900)).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        page.locator("[data-is]").first.or_(button(page, "Generate")).last.wait_for()
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.context.close()
    outside = [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    assert not errors and not outside


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page, **values: int) -> None:
    """Type numbers into the fields of the sliders."""
    for label, value in values.items():
        field = page.get_by_label(f"number input for {label}")
        field.fill(str(value))
        field.blur()


def press(page, name: str, count: int = 16) -> list[np.ndarray]:
    """Press a button and wait until it made so many faces. Returns the pictures on the page."""
    button(page, name).click()
    page.get_by_text(re.compile(rf"^Faces: {count}, in \d+\.\d seconds$")).wait_for()
    return faces(page)


def faces(page) -> list[np.ndarray]:
    """The pictures on the page, (H, W, 3) each."""
    sources = [each.get_attribute("src") for each in page.locator(".faces img:visible").all()]
    files = [BytesIO(page.request.get(source).body()) for source in sources]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def paint(page) -> None:
    """A stroke from left to right through the middle of the canvas."""
    box = page.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=20)
    page.mouse.up()


def test_faces_have_what_was_chosen_and_the_command_makes_them_again(visit, monkeypatch, tmp_path):
    page = visit()
    page.get_by_label("Weights").click()
    page.get_by_role("option", name="celeba_32").click()
    page.locator("[data-name=Smiling][data-state='1']").click()
    page.locator("[data-name=Male][data-state='-1']").click()
    choose(page, Faces=3, Steps=2, Guidance=2)
    made = press(page, "Generate", 3)
    page.locator(".faces button").nth(1).click()
    page.wait_for_function("document.querySelector('textarea').value")
    words = shlex.split(page.locator("textarea").first.input_value(), comments=True)
    monkeypatch.chdir(tmp_path)
    assert "Smiling" in words and run_script(*words[1:]).returncode == 0
    again = [np.asarray(Image.open(path)) for path in sorted(Path("faces").iterdir())]
    assert np.array_equal(made, again)
