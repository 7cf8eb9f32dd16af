"""A page to play with: generate faces, repair and vary them, walk between them, watch runs.

    python app.py                     # http://127.0.0.1:7860, for this machine only
    python app.py --host 0.0.0.0      # for the whole network
    app.page().launch()               # in a notebook

The functions of sample.py make the images, so that its command line makes the same, bit for bit.
Needs Gradio: pip install -r requirements-app.txt.
"""

import html
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import sample
from dataset.decoding import open_file
from editing import read_image
from formats.weights import DEFAULT, find_checkpoint, run_checkpoints, shipped_names, short
from generate import Trained, add_guide, check_finite, load_trained, sample_loop
from samplers import SAMPLERS
from system import flags
from system.device import DEVICES, find_device, set_up_generation
from system.errors import UsageError, UserError
from utils import to_uint8

try:
    import gradio as gr
except ModuleNotFoundError:
    fix = "pip install -r requirements-app.txt"
    sys.exit(flags.fail(f"app.py: needs gradio, which is not installed. Fix: {fix}", 5))

CANVAS = 512  # pixels to which a face is enlarged for painting, at most
FRAMES = 16  # on the way between two faces
INVERSION_STEPS = 50  # evaluations to find the noise of an image, at least
SHOWN = 25  # pictures of faces that are forming, at most
NETWORK = dict(concurrency_id="network", concurrency_limit=1)  # one visitor at a time computes
QUIET = dict(api_visibility="private", show_progress="hidden", trigger_mode="always_last")
GALLERY = dict(format="png", allow_preview=False, interactive=False, show_label=False, buttons=[])
CSS = """
.gradio-container {max-width: 1280px !important}
.faces img {image-rendering: pixelated}
.faces .grid-wrap {height: auto !important; max-height: none !important}
.faces .grid-container {grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important}
.grids .grid-container {grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)) !important}
@media (max-width: 720px) {.controls {order: 2}}
"""
SWITCHES = dict(  # three states for each attribute; the value: {name: 1 yes, 0 any, -1 no}
    html_template="""{{#each value}}<div data-is="{{this}}"><span>{{@key}}</span>
<button data-name="{{@key}}" data-state="-1">no</button>
<button data-name="{{@key}}" data-state="0">any</button>
<button data-name="{{@key}}" data-state="1">yes</button></div>{{/each}}""",
    css_template="""div {display: flex; align-items: center; font-size: var(--text-md)}
div + div {margin-top: 4px} span {flex: 1}
button {padding: 2px 12px; border: 1px solid var(--border-color-primary)}
[data-is="-1"] [data-state="-1"], [data-is="0"] [data-state="0"], [data-is="1"] [data-state="1"]
{background: var(--primary-600); color: white}""",
    js_on_load="""element.addEventListener("click", ({target: {dataset: {name, state}}}) => {
  if (state) props.value = {...props.value, [name]: Number(state)};
});""",
)


@dataclass(frozen=True)
class AppConfig:
    """Where the page is."""

    # Page
    host: str = "127.0.0.1"  # who reaches it: 127.0.0.1 this machine, 0.0.0.0 the whole network
    port: int = flags.constant(7860, least=1, most=65535)  # its port
    device: Literal[*DEVICES] = "auto"  # auto: cuda if there is one, else cpu; mps is untried


# Making images -----------------------------------------------------------------------------------


def weights_names() -> list[str]:
    """The runs under the current folder, the newest first, and the weights of the program."""
    paths = [path for path in run_checkpoints() if path.exists()]  # no dead links
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    runs = [path.parent.parent.name for path in paths]
    return list(dict.fromkeys([*runs, DEFAULT, *shipped_names()]))


def network(device: str, name: str) -> Trained:
    """The network of a name in `weights_names`, guided as sample.py guides it. Raises UserError."""
    if name not in weights_names():
        raise UsageError("weights", f"there are none called {name!r}", "choose from the list")
    path = find_checkpoint(name)
    return _load(path, find_device(device), path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(path: Path, device: torch.device, changed: int) -> Trained:
    return add_guide(load_trained(path, device=device))


def asked_for(device: str, name: str, switches: dict, *values) -> tuple:
    """What the controls ask for, as the flags of sample.py, and the network. Raises UserError."""
    guidance, sampler, steps, seed, count = values
    trained = network(device, name)
    states = {attribute: state for attribute, state in switches.items() if state}
    condition = tuple(key if state == 1 else f"{key}={state}" for key, state in states.items())
    guidance = guidance if condition else 1.0  # without attributes there is nothing to guide
    about = dict(condition=condition, guidance=guidance, sampler=sampler, steps=int(steps))
    about |= dict(num_images=int(count), seed=int(seed or 0), device=device, out="faces")
    config = sample.SampleConfig(checkpoint=short(trained.path), **about)
    sample.check_config(config)
    return config, trained


def forming(
    trained: Trained, config: sample.SampleConfig, loop: Callable = sample_loop, **options
) -> Iterator[tuple[str, list[Image.Image], bool]]:
    """Generate what the config asks for: yields up to SHOWN times how far it is, the pictures so
    far, and whether they are done. loop, options: as for `generate.generate`. Raises UserError."""
    sample.check_steps(config, trained.diffusion.num_timesteps)
    attributes = sample.read_condition(config, trained)
    if attributes is not None:
        attributes = attributes.expand(config.num_images, -1)
    options |= {name: getattr(config, name) for name in ("seed", "sampler", "steps", "guidance")}
    total, began = config.steps * options.get("resample", 1), time.monotonic()
    moves = loop(trained, range(config.num_images), attributes=attributes, **options)
    for i, (_, images) in enumerate(moves, 1):
        if i < total and i % math.ceil(total / SHOWN) == 0:
            yield f"Step {i} of {total}", pictures(images), False
    check_finite(trained, images)
    seconds = time.monotonic() - began
    yield f"Faces: {len(images)}, in {seconds:.1f} seconds", pictures(images), True


def pictures(images: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] as N pictures."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images).numpy()]


def enlarged(face: Image.Image) -> Image.Image:
    """A face as large as the canvas, without blur."""
    size = face.width * max(1, CANVAS // face.width)
    return face.resize((size, size), Image.Resampling.NEAREST)


# What the page does ------------------------------------------------------------------------------


def shown(function: Callable) -> Callable:
    """The function, a generator, with the errors that a user can fix as messages on the page."""

    @wraps(function)
    def wrapper(*args):
        try:
            yield from function(*args)
        except UserError as error:
            text = re.sub(rf"{re.escape(tempfile.gettempdir())}\S*[\\/]", "", str(error))
            raise gr.Error(html.escape(text), print_exception=False) from error

    return wrapper


@shown
def open_switches(device: str, name: str):
    """The value of the switches for these weights: every attribute that they know, open."""
    yield dict.fromkeys(network(device, name).attribute_names, 0)


@shown
def generate_faces(*controls):
    """Generate: yields how far it is, the gallery, and what `choose` needs once it is done."""
    config, trained = asked_for(*controls)
    for status, faces, done in forming(trained, config):
        yield status, faces, (config, faces) if done else None


@shown
def choose(made: tuple | None, event: gr.SelectData):
    """A click on a generated face: the face to edit, the canvas with it, and its command."""
    if made is None:
        raise UsageError("this face", "is not finished", "generate it once more, and wait")
    (config, faces), default = made, sample.SampleConfig()
    changed = {k: v for k, v in asdict(config).items() if v != getattr(default, k)}
    text = f"# the face is {config.out}/{event.index:06d}.png"
    face = faces[event.index]
    yield face, enlarged(face), f"python sample.py {flags.as_flags(changed)}\n{text}"


@shown
def upload(device: str, name: str, path: str):
    """A face of a visitor, cropped as the training data: the face to edit, the canvas with it."""
    (face,) = pictures(read_image(path, network(device, name)))
    yield face, enlarged(face)


@shown
def edit(how: str, face: Image.Image | None, canvas: dict, strength: float, *controls):
    """Repair, vary or change the face: yields how far it is and the gallery, the face first."""
    if face is None:
        raise UsageError("the face", "there is none", "upload one, or click on a generated one")
    config, trained = asked_for(*controls)
    if how == "change" and not config.condition:
        raise UsageError("attributes", "none is asked for", "switch one to yes or no")
    if how == "repair" and not canvas["layers"]:
        raise UsageError("the face", "nothing is painted on it", "paint over what to make anew")
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, image=f"{folder}/face.png")
        face.save(config.image)
        if how == "vary":
            config = replace(config, strength=strength)
        elif how == "change":
            config = replace(config, num_images=1, steps=max(config.steps, INVERSION_STEPS))
        else:
            config = replace(config, mask=f"{folder}/mask.png")
            strokes = canvas["layers"][0]
            data = strokes if isinstance(strokes, bytes) else Path(strokes).read_bytes()
            Path(config.mask).write_bytes(data)
            strokes = open_file(config.mask)
            strokes.thumbnail((CANVAS, CANVAS))
            strokes.save(config.mask)
        sample.check_config(config)
        options, beside = sample.read_edit(config, trained, sample.read_condition(config, trained))
    before = list(zip(pictures(torch.cat(beside)), ("the face", "its hole"), strict=False))
    for status, faces, _ in forming(trained, config, **options):
        yield status, [*before, *((each, None) for each in faces)]


@shown
def walk(a: int, file_a: str | None, b: int, file_b: str | None, *controls):
    """From face to face: yields how far it is, the gallery, its frames, the first one, a GIF."""
    config, trained = asked_for(*controls)
    ends = (file_a or int(a or 0), file_b or int(b or 0))
    config = replace(config, interpolate=ends, num_images=FRAMES)
    if file_a or file_b:
        config = replace(config, steps=max(config.steps, INVERSION_STEPS))
    sample.check_config(config)
    noise = sample.noise_between(config, trained, sample.read_condition(config, trained))
    for status, faces, done in forming(trained, config, x_T=noise):
        if not done:
            yield status, faces, None, None, None
    with tempfile.TemporaryDirectory() as folder:
        sample.save_gif(faces, Path(folder, "between.gif"))
        large = [enlarged(face) for face in faces]
        yield status, faces, large, large[0], f"{folder}/between.gif"


def run_names() -> list[str]:
    """The runs under the current folder that have a log, the newest first."""
    logs = {path.parent: path.stat().st_mtime for path in Path().glob("*/events.out.tfevents*")}
    return [folder.name for folder in sorted(logs, key=logs.get, reverse=True)]


def watch(runs: list[str], share: float) -> tuple[Figure, list]:
    """The losses of these runs by step, in training and, dashed, of held-out faces; and of each the
    grid at this share, in percent, of its grids."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    figure, grids = Figure(figsize=(5, 3.4), layout="constrained", dpi=150), []
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for run in [run for run in runs if run in run_names()]:
        log = EventAccumulator(run, size_guidance={"scalars": 0, "images": 1}).Reload()
        for tag, line in (("loss", "-"), ("held_out_loss", "o--")):
            if tag in log.Tags()["scalars"]:
                points = [(point.step, point.value) for point in log.Scalars(tag)]
                axes.plot(*zip(*points, strict=True), line, label=f"{run}: {tag}")
                axes.legend()
        if paths := sorted(Path(run, "samples").glob("step_*.png")):
            path = paths[round(share / 100 * (len(paths) - 1))]
            with Image.open(path) as grid:
                grids.append((grid.copy(), f"{run}, step {int(path.stem[5:]):,}"))
    return figure, grids


# The page ----------------------------------------------------------------------------------------


def page(device: str = "auto") -> gr.Blocks:
    """The page; `launch()` shows it. device: one of DEVICES. Raises UsageError if there is none."""
    find_device(device)
    set_up_generation()
    with gr.Blocks(title="Faces", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown("# Faces that a diffusion model makes")
        with gr.Row():
            with gr.Column(scale=1, min_width=320, elem_classes="controls"):
                controls = make_controls(device)
            with gr.Column(scale=2, min_width=320):
                with gr.Row():
                    status = gr.Markdown("Choose attributes, or none, and press Generate.")
                    stop = gr.Button("Stop", scale=0, min_width=90, size="sm")

                def starts(button, function: Callable, inputs: list, outputs: list, name: str):
                    """Let a button start a function that Stop stops."""
                    about = dict(api_name=name, show_progress_on=status, **NETWORK)
                    event = button.click(function, inputs + controls, [status, *outputs], **about)
                    stop.click(None, cancels=event)

                with gr.Tab("Generate"):
                    go, made = gr.Button("Generate", variant="primary"), gr.State()
                    gallery = gr.Gallery(elem_classes="faces", **GALLERY)
                    hint = "Click a face: here is the command that makes it, and Edit changes it."
                    text = gr.Textbox(show_label=False, placeholder=hint, lines=2, buttons=["copy"])
                    starts(go, generate_faces, [], [gallery, made], "generate")
                with gr.Tab("Edit"):
                    face, canvas = edit_tab(starts, controls[:2])
                with gr.Tab("Between"):
                    walk_tab(starts)
                with gr.Tab("A run") as tab:
                    runs = run_tab(tab)
        gallery.select(choose, made, [face, canvas, text], **QUIET)
        blocks.load(look_around, None, [controls[1], runs], **QUIET)
    # The fonts are this machine's instead of Google's.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    looks = dict(theme=theme, css=CSS, footer_links=[], show_error=True)
    limits = dict(max_file_size="20mb", allowed_paths=[], share=False)
    blocks.launch = partial(blocks.queue(max_size=30).launch, **looks, **limits)
    return blocks


def look_around() -> list:
    """The lists of weights and of runs, as they are now."""
    names, runs = weights_names(), run_names()
    return [gr.Dropdown(names, value=names[0]), gr.Dropdown(runs, value=runs[:1])]


def make_controls(device: str) -> list:
    """What all tabs ask of the network: the arguments of `asked_for`."""
    weights = gr.Dropdown(weights_names(), label="Weights", filterable=False)
    network = [gr.State(device), weights]
    switches = gr.HTML({}, apply_default_css=False, padding=True, **SWITCHES)
    gr.on(None, open_switches, network, switches, api_visibility="private", **NETWORK)
    guidance = gr.Slider(0, 5, 1, step=0.1, label="Guidance", info="how strongly attributes count")
    count = gr.Slider(1, 16, 8, step=1, label="Faces")
    steps = gr.Slider(1, 250, 10, step=1, label="Steps", info="more are slower and finer")
    with gr.Row():
        sampler = gr.Dropdown(list(SAMPLERS), value="dpm++", label="Sampler", min_width=120)
        seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=120)
    return [*network, switches, guidance, sampler, steps, seed, count]


def edit_tab(starts: Callable, network: list) -> list:
    """The second tab: the visitor's face, and the canvas with it."""
    text = "Click a face in the first tab or upload one, which is cropped as the training faces."
    gr.Markdown(f"{text} Paint over what to make anew.")
    given, face = gr.UploadButton("Upload a face", file_types=["image"], size="sm"), gr.State()
    about = dict(sources=(), transforms=(), layers=False, canvas_size=(CANVAS, CANVAS), height=460)
    brush = gr.Brush(40, ["#ff3b30"], color_mode="fixed")
    canvas = gr.ImageEditor(brush=brush, format="png", **about)
    # Gradio would decode whatever a browser sends: take the path, or the bytes, of the file.
    canvas.convert_and_format_image = lambda file, **_: getattr(file, "path", file)
    text = "of a variation: 1 keeps nothing of the face"
    strength = gr.Slider(0.05, 1, 0.5, step=0.05, label="Strength", info=text)
    names = dict(repair="Repair what is painted", vary="Vary all", change="Change attributes")
    with gr.Row():
        buttons = {how: gr.Button(names[how], variant="primary", min_width=150) for how in names}
    gallery = gr.Gallery(elem_classes="faces", **GALLERY)
    for how, button in buttons.items():
        starts(button, partial(edit, how), [face, canvas, strength], [gallery], how)
    given.upload(upload, [*network, given], [face, canvas], api_name="upload", **NETWORK)
    return [face, canvas]


def walk_tab(starts: Callable) -> None:
    """The third tab: from face to face."""
    gr.Markdown("Give the numbers of two generated faces, the first of which is 0, or two images.")
    ends = []
    for number, label in enumerate(("From face", "To face")):
        with gr.Row():
            ends.append(gr.Number(number, precision=0, minimum=0, label=label))
            ends.append(gr.File(label="or an image", file_types=["image"], height=140))
    go, frames = gr.Button("Walk", variant="primary"), gr.State()
    where = gr.Slider(1, FRAMES, 1, step=1, label="Where")
    about = dict(interactive=False, elem_classes="faces", min_width=150)
    with gr.Row():
        large = gr.Image(label="Face", format="png", buttons=[], **about)
        gif = gr.Image(label="GIF", type="filepath", buttons=["download"], **about)
    gallery = gr.Gallery(elem_classes="faces", **GALLERY)
    starts(go, walk, ends, [gallery, frames, large, gif], "between")
    where.input(lambda faces, i: faces and faces[int(i) - 1], [frames, where], large, **QUIET)


def run_tab(tab: gr.Tab) -> gr.Dropdown:
    """The last tab, which is refreshed once it was opened. Returns its list of runs."""
    runs = gr.Dropdown(multiselect=True, max_choices=2, label="Run, or two")
    plot, timer = gr.Plot(show_label=False), gr.Timer(5, active=False)
    share = gr.Slider(0, 100, 100, step=1, label="Grids", info="0: the first, 100: the newest")
    outputs = [plot, gr.Gallery(elem_classes="faces grids", **GALLERY)]
    changes = [tab.select, timer.tick, share.change, runs.change]
    gr.on(changes, watch, [runs, share], outputs, concurrency_limit=1, **QUIET)
    tab.select(lambda: gr.Timer(active=True), None, timer, **QUIET)
    return runs


def main() -> None:
    """The command line: AppConfig's flags."""
    config = flags.parse(AppConfig, sys.argv[1:], "A page to play with.")
    flags.check_ranges(config)
    blocks = page(config.device)
    try:
        blocks.launch(server_name=config.host, server_port=config.port)
    except OSError as error:
        what = f"{config.port} of {config.host} is in use, or not of this machine"
        raise UsageError("--port", what, "give another one, or another --host") from error


if __name__ == "__main__":
    flags.run(main)
