"""Networks that know attributes: what they are trained on, and faces asked for by attributes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import final, tensors_equal, tiny
from PIL import Image

import dataset
from convert import ConvertConfig, convert
from dataset.faces import drop_attributes, load_faces
from generate import draw_attributes, generate, load_trained
from sample import SampleConfig, sample, sheet
from samplers import SAMPLERS
from system.errors import CheckpointError, UsageError
from train import train
from utils import checkpoint_path, save_checkpoint

ASKED = ("Smiling", "Eyeglasses")


def conditional(**changes):
    """A run with attributes, of norms that diffusers can express."""
    usual = dict(path_to_data="synthetic", attributes=ASKED, batch_size=8, norm_groups=4)
    return tiny(**usual | dict(learning_rate=0.01) | changes)


@pytest.fixture(autouse=True)
def few_faces(monkeypatch):
    monkeypatch.setattr("dataset.sources.NUM_SYNTHETIC", 60)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A run with its prepared faces, its averaged weights shaken, so that what is asked for shows
    after six steps."""
    folder = tmp_path_factory.mktemp("conditional")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("dataset.sources.NUM_SYNTHETIC", 60)
        train(conditional())
        state = final()
        torch.manual_seed(0)
        for weights in state["ema"]["model"].values():
            weights.add_(torch.randn_like(weights) * 0.1)
        save_checkpoint(checkpoint_path(Path("run"), 6), state)
    return folder


@pytest.fixture
def run(trained_once, tmp_path, monkeypatch):
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


# Training ----------------------------------------------------------------------------------------


def test_attributes_are_dropped_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    attributes = torch.ones(40_000, 3)
    kept = drop_attributes(attributes, 0.2, generator)
    assert (kept == 0).all(1).float().mean() == pytest.approx(0.2 + 0.4 / 8, abs=0.01)
    assert (kept == 1).all(1).float().mean() == pytest.approx(0.4 + 0.4 / 8, abs=0.01)
    assert not drop_attributes(attributes, 1.0, generator).any()


def test_training_uses_the_attributes_of_the_faces(run, monkeypatch):
    assert final()["unet"]["num_attributes"] == 2
    real = dataset.faces.Faces
    monkeypatch.setattr("dataset.faces.Faces", lambda *a: real(a[0], -a[1], *a[2:]))
    train(conditional(experiment_name="opposite"))
    assert not tensors_equal(final()["model"], final("opposite")["model"])


def test_all_attributes_are_kept_by_name_and_resumed(run):
    train(conditional(experiment_name="all", attributes=("all",), num_training_steps=3))
    names = load_faces("synthetic", 8, attributes=("all",)).attribute_names
    assert tuple(final("all", 3)["settings"]["attributes"]) == names
    train(conditional(experiment_name="all", attributes=("all",), resume=True))
    assert final("all")["unet"]["num_attributes"] == len(names)


def test_grids_of_a_run_have_the_attributes_of_training_faces(here):
    train(conditional(learning_rate=0.02, num_training_steps=40, ema_decay=0.5, save_every=40))
    grid = np.asarray(Image.open("run/samples/step_00000040.png")).astype(int)

    def sampled(**options):
        config = SampleConfig("run", num_images=4, guide="none", out="grid.png", **options)
        return np.asarray(Image.open(sample(config))).astype(int)

    assert np.abs(grid - sampled()).max() <= 4  # sample.py's may be in half precision
    assert np.abs(grid - sampled(condition=("Smiling=0", "Eyeglasses=0"))).max() > 8


# Sampling ----------------------------------------------------------------------------------------


def saved_grid(**options) -> np.ndarray:
    options = dict(num_images=3, steps=3, out="grid.png", guide="none") | options
    return np.asarray(Image.open(sample(SampleConfig("run", **options)))).astype(int)


def test_what_is_asked_for_changes_the_images(run):
    smiling, anything = saved_grid(condition=("Smiling",)), saved_grid(condition=("Smiling=0",))
    assert np.array_equal(smiling, saved_grid(condition=("smiling=1",)))
    others = [anything, saved_grid(condition=("Smiling=-1",))]
    others += [saved_grid(condition=("Smiling", "Eyeglasses=-1"))]
    others += [saved_grid(condition=("Smiling",), guidance=3.0)]
    assert not any(np.array_equal(smiling, other) for other in others)


def test_image_of_which_nothing_is_said_gets_the_attributes_of_a_training_face(run):
    trained, faces = load_trained(run), load_faces("synthetic", 8, attributes=ASKED)
    drawn = draw_attributes(trained.usual_attributes, range(400), seed=3)
    share, wanted = (drawn > 0).float().mean(0), faces.attributes[faces.train] > 0
    assert np.abs(share.numpy() - wanted.mean(0)).max() < 0.08
    assert torch.equal(draw_attributes(trained.usual_attributes, range(5, 9), seed=3), drawn[5:9])
    assert not torch.equal(draw_attributes(trained.usual_attributes, range(400), seed=4), drawn)
    asked = torch.cat(list(generate(trained, range(6), 3, steps=2, attributes=drawn[:6])))
    usual = torch.cat(list(generate(trained, range(6), 3, steps=2, batch_size=4)))
    assert (asked - usual).abs().max() < 1e-5


def test_usual_attributes_travel_to_diffusers_and_are_checked(run):
    wanted = load_trained(run).usual_attributes
    convert(ConvertConfig(checkpoint=str(run), out="folder"))
    assert torch.equal(load_trained("folder").usual_attributes, wanted)
    convert(ConvertConfig(checkpoint=str(run), condition=("Smiling",), out="smiling"))
    assert not load_trained("smiling").attribute_names
    state = final()
    state["settings"]["usual_attributes"] = ["++", "+"]
    save_checkpoint(checkpoint_path(run, 6), state)
    with pytest.raises(CheckpointError, match="usual_attributes"):
        load_trained(run)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_output_takes_a_condition(run, sampler):
    options = dict(condition=("Smiling",), guidance=2.0, sampler=sampler, num_images=2, steps=3)
    for out in ("faces.png", "way.gif", "faces"):
        assert sample(SampleConfig("run", out=out, **options)).exists()


def test_sheet_has_a_row_for_each_attribute_on_and_off_beside_what_is_asked_for(run):
    labels, numbers, rows = sheet(ASKED, 2)
    assert labels == ["Smiling", "not Smiling", "Eyeglasses", "not Eyeglasses"]
    assert numbers == [0, 1] * 4 and rows[::2].tolist() == [[1, 0], [-1, 0], [0, 1], [0, -1]]
    plain, with_glasses = saved_grid(sheet=True), saved_grid(sheet=True, condition=("Eyeglasses",))
    cells, alone = plain[:, -(3 * 10 + 2) :], saved_grid(condition=("Smiling",))
    assert np.abs(cells[2:10, 2:10] - alone[2:10, 2:10]).max() <= 1  # in a batch of another size
    assert np.abs(plain[:20] - with_glasses[:20]).max() > 1  # the rows of Smiling have glasses
    assert np.abs(plain[22:] - with_glasses[22:]).max() <= 1  # those of Eyeglasses are the same


@pytest.mark.parametrize(
    "options, text",
    [
        ({"condition": ("Male",)}, "--condition: no attribute Male.*Smiling, Eyeglasses"),
        ({"condition": ("Smiling=2",)}, "--condition.*Smiling=2"),
        ({"guidance": 2.0}, "--guidance"),
        ({"guidance": -1.0, "condition": ("Smiling",)}, "--guidance"),
    ],
)
def test_what_cannot_be_asked_for_is_one_error(run, options, text):
    with pytest.raises(UsageError, match=text):
        saved_grid(**options)
    assert not Path("grid.png").exists()
