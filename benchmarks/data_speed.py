"""How fast images become batches, beside torchvision's ImageFolder and a DataLoader.

    python benchmarks/data_speed.py                        # JPEGs that it makes itself
    python benchmarks/data_speed.py --path_to_data data    # of a folder or zip of images
    python benchmarks/data_speed.py --step_ms 80           # of your step, else it measures one
    python benchmarks/data_speed.py --full 202599          # also: prepare a zip of that many

Both sides read the same files, crop, resize, scale and mirror them alike; that the images are
equal is asserted. This project decodes once, then takes its batches from an array; the loader
decodes in each epoch. Both are in turn, round after round, and ratios are taken within a round.
Everything is written to a temporary folder (TMPDIR says where) and removed.
"""

import contextlib
import io
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    Worker,
    find_device,
    machine,
    measure,
    peak_memory,
    ratio,
    seconds_of,
)
from benchmarks.peers import Ours
from dataset import celeba
from dataset.decoding import face_box
from dataset.faces import Batches, Faces, load_faces
from dataset.prepared import PREPARED
from dataset.sources import Files, find_source, open_files
from system import flags
from system.flags import check_ranges, constant
from system.terminal import table
from train import DEMO, Config

WORKERS = (0, 2)  # processes of the DataLoader


@dataclass(frozen=True)
class DataSpeedConfig:
    """Which images, and how often."""

    path_to_data: str = ""  # folder or zip of images; empty: JPEGs of 178x218, made for this
    num_images: int = constant(4000, least=1)  # how many of them
    img_size: int = constant(64, least=1)  # pixels of a side
    batch_size: int = constant(128, least=1)  # images in a batch
    rounds: int = constant(5, least=1)  # turns that every row has
    step_ms: float = constant(0.0, least=0)  # of a training step; 0: measure the demo's here
    device: str = ""  # where batches go, cpu or cuda; empty: the GPU where there is one
    full: int = constant(0, least=0)  # images of a zip to prepare as a whole; 0: none


def write_images(config: DataSpeedConfig, root: Path) -> Path:
    """Write the images into a folder `faces` of another one, as ImageFolder wants them; returns
    the other one, which has CelebA's name where they are CelebA's, so that they are cropped so."""
    files = open_files(Path(config.path_to_data)) if config.path_to_data else None
    root = root / ("img_align_celeba" if files and is_aligned(files) else "images")
    (root / "faces").mkdir(parents=True)
    if files:
        names = [name for name in files.names if not celeba.is_list(name)]
        for i, name in enumerate(names[: config.num_images]):
            suffix = Path(name).suffix.lower()
            (root / "faces" / f"{i:06d}{suffix}").write_bytes(files.read(name))
        return root
    random = np.random.default_rng(0)
    for i in range(config.num_images):
        colours = Image.fromarray(random.integers(0, 256, (7, 6, 3), dtype=np.uint8))
        image = colours.resize((178, 218), Image.Resampling.BICUBIC)
        image.save(root / "faces" / f"{i:06d}.jpg", quality=90)
    return root


def is_aligned(files: Files) -> bool:
    """Whether these are CelebA's images."""
    return celeba.find_lists(*files[:3])[2]


class Square:
    """This project's crop, as a transform."""

    def __init__(self, aligned: bool):
        self.aligned = aligned

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.crop(face_box(*image.size, "aligned" if self.aligned else "square"))


def image_folder(root: Path, img_size: int, mirror: bool) -> ImageFolder:
    """torchvision's dataset of the images: what a loader would be given."""
    steps = [
        Square(is_aligned(open_files(root))),
        transforms.Resize(img_size, transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(0.5 if mirror else 0.0),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
    return ImageFolder(root, transforms.Compose(steps))


def check_same_images(images: np.ndarray, theirs: ImageFolder) -> int:
    """Assert that the first images are equal, pixel for pixel. Returns how many were compared.

    images: (N, H, W, 3) uint8; theirs: a dataset that gives (3, H, W) in [-1, 1]"""
    assert len(images) == len(theirs), f"{len(images)} images and {len(theirs)}"
    count = min(64, len(images))
    for i in range(count):
        pixels = ((theirs[i][0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        difference = np.abs(images[i].astype(int) - pixels).max()
        assert difference == 0, f"image {i} differs by up to {difference}"
    return count


def prepare_anew(root: Path, img_size: int) -> Faces:
    """`load_faces` as at a first start. What it says is not shown."""
    shutil.rmtree(PREPARED, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        return load_faces(root, img_size)


def make_calls(
    config: DataSpeedConfig, root: Path, device: torch.device
) -> tuple[dict[str, Callable], dict[str, int]]:
    """For each row a call that returns its seconds, and how many images go into it."""
    count = find_source(root).count
    faces = prepare_anew(root, config.img_size)
    theirs = image_folder(root, config.img_size, mirror=False)
    compared = check_same_images(faces.images, theirs)
    print(f"checked: {compared} images are the same on both sides, pixel for pixel")
    batches = Batches(faces, config.batch_size, device=device)
    turns = max(100, batches.per_epoch)

    def decode() -> None:
        for _ in find_source(root).images(config.img_size):
            pass

    def take_batches() -> None:
        for i in range(turns):
            batches(i)

    def go_through(loader: DataLoader) -> None:
        for images, _ in loader:
            images.to(device, non_blocking=True)

    calls = {"decode_all": decode, "load_faces": lambda: prepare_anew(root, config.img_size)}
    calls |= {"Batches": take_batches}
    counts = {"decode_all": count, "load_faces": count, "Batches": turns * config.batch_size}
    dataset = image_folder(root, config.img_size, mirror=True)
    for workers in WORKERS:
        options = dict(batch_size=config.batch_size, shuffle=True, drop_last=True)
        options["pin_memory"] = device.type == "cuda"
        # The workers stay from epoch to epoch: their start is not counted.
        loader = DataLoader(dataset, num_workers=workers, persistent_workers=workers > 0, **options)
        calls[f"DataLoader {workers}"] = partial(go_through, loader)
        counts[f"DataLoader {workers}"] = len(loader) * config.batch_size
    for call in calls.values():
        call()  # the files are in the system's memory from here on, for all rows
    return {name: partial(seconds_of, call, device) for name, call in calls.items()}, counts


def measure_step(config: DataSpeedConfig, device: torch.device) -> float:
    """Milliseconds of a training step of the demo's network."""
    config = replace(
        Config(**DEMO), img_size=config.img_size, batch_size=config.batch_size, attributes=()
    )
    with Worker(Ours, config, device) as worker:
        return worker("time_constant", 2) * 1e3


class Preparation:
    """A start of a run, in a process of its own: its time and memory."""

    def run(self, path: Path, img_size: int) -> tuple[float, int]:
        """Seconds until the faces are there, and the most bytes this process has held."""
        cpu = torch.device("cpu")
        with contextlib.redirect_stderr(io.StringIO()):
            seconds = seconds_of(lambda: load_faces(path, img_size), cpu)
        return seconds, peak_memory(cpu)


def prepare_zip(config: DataSpeedConfig, root: Path) -> str:
    """Make a zip of `full` images, the ones there again and again, and start twice with it.
    Returns the line about it."""
    contents = [path.read_bytes() for path in sorted((root / "faces").iterdir())]
    path = root.parent / "full.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(config.full):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", contents[i % len(contents)])
    starts = []
    for _ in range(2):
        with Worker(Preparation) as worker:
            starts.append(worker("run", path, config.img_size))
    (first, memory), (second, _) = starts
    return (
        f"a zip of {config.full:,} images ({path.stat().st_size / 1e9:.2f} GB): prepared in"
        f" {first / 60:.2f} minutes ({config.full / first:,.0f} images/s) with at most"
        f" {memory / 1e9:.2f} GB of memory; the second start takes {second:.2g} s"
    )


def format_tables(config: DataSpeedConfig, seconds: dict, counts: dict, step_ms: float) -> str:
    """The table of preparing and the table of batches."""
    titles = {
        "decode_all": "this project: decoded",
        "load_faces": "this project: decoded and written, once",
        "Batches": "this project: `Batches`",
    }
    titles |= {f"DataLoader {n}": f"ImageFolder, DataLoader, {n} workers" for n in WORKERS}
    rates = {name: [counts[name] / each for each in seconds[name]] for name in seconds}
    loaders = [f"DataLoader {n}" for n in WORKERS]

    lines = []
    for name in ["decode_all", "load_faces", *loaders]:
        times = [f"{ratio(rates[name], rates[loader]):.2f}" for loader in loaders]
        lines.append([titles[name], f"{median(rates[name]):,.0f}", *times])
    columns = ["from files", "images/s", *(f"x {n} workers" for n in WORKERS)]
    text = table(columns, lines)

    lines = []
    for name in ["Batches", *loaders]:
        cost = 1e3 * config.batch_size / median(rates[name])
        times = [f"{ratio(rates[name], rates[loader]):.2f}" for loader in loaders]
        speed = f"{median(rates[name]) / config.batch_size:,.4g}"
        lines.append([titles[name], speed, f"{cost:.3g}", f"{cost / step_ms:.2%}", *times])
    columns = ["in training", "batches/s", "ms a batch", f"of a step of {step_ms:.4g} ms"]
    return text + "\n\n" + table([*columns, *(f"x {n} workers" for n in WORKERS)], lines)


def main() -> None:
    """The command line."""
    description = "How fast images become batches, beside torchvision's ImageFolder."
    config = flags.parse(DataSpeedConfig, sys.argv[1:], description)
    check_ranges(config)
    if config.path_to_data:
        config = replace(config, path_to_data=str(Path(config.path_to_data).absolute()))
    device = find_device(config.device)
    about_machine = machine(device)
    step_ms = config.step_ms or measure_step(config, device)
    # The prepared arrays go into the current folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = write_images(config, Path(folder))
        calls, counts = make_calls(config, root, device)
        seconds = measure(calls, config.rounds)
        print(f"\n{format_tables(config, seconds, counts, step_ms)}\n")
        print(
            f"{counts['decode_all']:,} images to {config.img_size} px, batch"
            f" {config.batch_size}, {config.rounds} rounds; files in the system's memory"
        )
        if config.full:
            print(prepare_zip(config, root))
    print(about_machine)


if __name__ == "__main__":
    flags.run(main)
