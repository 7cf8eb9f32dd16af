"""Faces asked for by their attributes."""

import numpy as np
import pytest
import torch
from conftest import TINY, as_flags, assert_error, run_script, tensors_equal, tiny
from PIL import Image

from convert import ConvertConfig, convert
from dataset import faces as dataset
from dataset import sources
from dataset.faces import drop_attributes, load_faces
from generate import draw_attributes, generate, load_trained
from sample import SampleConfig, sample, sheet
from samplers import SAMPLERS
from system.errors import CheckpointError, UsageError
from train import Config, check_config, train
from utils import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint

ASKED = ("Smiling", "Eyeglasses")


def conditional(**changes) -> Config:
    usual = dict(path_to_data="synthetic", attributes=ASKED, batch_size=8, prediction="v")
    usual |= dict(norm_groups=4)  # that diffusers can express
    return tiny(**{**usual, **changes})


@pytest.fixture(autouse=True)
def few_faces(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 60)


@pytest.fixture
def run():
    """A run, its averaged weights shaken so that what is asked for shows after six steps."""
    folder = train(conditional(learning_rate=0.01))
    path = checkpoint_path(folder, 6)
    state = load_checkpoint(path)
    torch.manual_seed(0)
    for weights in state["ema"]["model"].values():
        weights.add_(torch.randn_like(weights) * 0.1)
    save_checkpoint(path, state)
    return folder


def final(name="run", step=6):
    return load_checkpoint(checkpoint_path(dataset.Path(name), step))


def test_attributes_are_dropped_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    attributes = torch.ones(40_000, 3)
    kept = drop_attributes(attributes, 0.2, generator)
    none, all_ = (kept == 0).all(1).float().mean(), (kept == 1).all(1).float().mean()
    assert none == pytest.approx(0.2 + 0.4 / 8, abs=0.01)
    assert all_ == pytest.approx(0.4 + 0.4 / 8, abs=0.01)
    assert kept.mean() == pytest.approx(0.6, abs=0.01)
    assert not drop_attributes(attributes, 1.0, generator).any()


def test_conditional_training_uses_the_faces_attributes(run):
    assert final()["unet"]["num_attributes"] == 2
    with pytest.MonkeyPatch.context() as patch:
        real = dataset.Faces
        patch.setattr(dataset, "Faces", lambda *a: real(a[0], -a[1], *a[2:]))
        train(conditional(learning_rate=0.01, experiment_name="opposite"))
    assert not tensors_equal(final()["model"], final("opposite")["model"])


def test_share_dropped_changes_the_training(run):
    train(conditional(learning_rate=0.01, experiment_name="never", attribute_dropout=0.0))
    assert not tensors_equal(final()["model"], final("never")["model"])


def test_resumed_conditional_run_equals_uninterrupted_run(run):
    train(conditional(learning_rate=0.01, num_training_steps=3, experiment_name="halves"))
    train(conditional(learning_rate=0.01, resume=True, experiment_name="halves"))
    for part in ("model", "optimizer"):
        assert tensors_equal(final()[part], final("halves")[part])


def test_a_sheet_asks_for_each_attribute_by_itself():
    labels, numbers, rows = sheet(ASKED, columns=2)
    assert labels == ["Smiling", "not Smiling", "Eyeglasses", "not Eyeglasses"]
    assert rows[::2].tolist() == rows[1::2].tolist() == [[1, 0], [-1, 0], [0, 1], [0, -1]]
    assert numbers == [0, 1] * 4


def test_grids_of_a_run_are_of_the_attributes_of_training_faces():
    train(conditional(learning_rate=0.02, num_training_steps=40, ema_decay=0.5))
    grid = np.asarray(Image.open("run/samples/step_00000040.png")).astype(int)

    def sampled(**options):
        config = SampleConfig("run", num_images=4, guide="none", out="grid.png", **options)
        return np.asarray(Image.open(sample(config))).astype(int)

    assert np.abs(grid - sampled()).max() <= 4  # sample.py's may be in half precision
    assert np.abs(grid - sampled(condition=("Smiling=0", "Eyeglasses=0"))).max() > 8


def saved_grid(**options):
    out = sample(SampleConfig(checkpoint="run", num_images=3, steps=3, out="grid.png", **options))
    return np.asarray(Image.open(out)).astype(int)


def test_what_is_asked_for_changes_the_images(run):
    anything = saved_grid(condition=("Smiling=0",))
    smiling, not_smiling = saved_grid(condition=("Smiling",)), saved_grid(condition=("Smiling=-1",))
    assert not np.array_equal(anything, smiling) and not np.array_equal(smiling, not_smiling)
    assert np.array_equal(smiling, saved_grid(condition=("Smiling=1",)))
    assert not np.array_equal(smiling, saved_grid(condition=("Smiling",), guidance=3.0))
    both = saved_grid(condition=("Smiling", "Eyeglasses=-1"))
    assert not np.array_equal(smiling, both)


def test_where_nothing_is_asked_an_image_gets_the_attributes_of_a_training_face(run):
    trained, faces = load_trained(run), load_faces("synthetic", 8, attributes=ASKED)
    kinds = {tuple(row) for row in faces.attributes[faces.train].tolist()}
    assert {tuple(row) for row in trained.usual_attributes.tolist()} == kinds and len(kinds) == 4
    drawn = draw_attributes(trained.usual_attributes, range(400), seed=3)
    share, wanted = (drawn > 0).float().mean(0), faces.attributes[faces.train] > 0
    assert np.abs(share.numpy() - wanted.mean(0)).max() < 0.08
    assert torch.equal(draw_attributes(trained.usual_attributes, range(5, 9), seed=3), drawn[5:9])
    assert not torch.equal(draw_attributes(trained.usual_attributes, range(400), seed=4), drawn)
    asked = torch.cat(list(generate(trained, range(6), 3, steps=2, attributes=drawn[:6])))
    usual = torch.cat(list(generate(trained, range(6), 3, steps=2, batch_size=4)))
    assert (asked - usual).abs().max() < 1e-5
    assert not np.array_equal(saved_grid(), saved_grid(condition=("Smiling=0",)))


def test_they_travel_to_diffusers_and_are_not_asked_of_older_checkpoints(run):
    wanted = load_trained(run).usual_attributes
    convert(ConvertConfig(to_diffusers=str(run), out="folder"))
    assert torch.equal(load_trained("folder").usual_attributes, wanted)
    convert(ConvertConfig(to_diffusers=str(run), condition=("Smiling",), out="smiling"))
    assert not load_trained("smiling").attribute_names

    state = final()
    state["settings"]["usual_attributes"] = ["++", "+"]
    save_checkpoint(checkpoint_path(run, 6), state)
    with pytest.raises(CheckpointError, match="usual_attributes"):
        load_trained(run)
    del state["settings"]["usual_attributes"]
    save_checkpoint(checkpoint_path(run, 6), state)
    assert torch.equal(load_trained(run).usual_attributes, torch.zeros(1, 2))
    assert np.array_equal(saved_grid(), saved_grid(condition=("Smiling=0",)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_output_takes_a_condition(run, sampler):
    options = dict(checkpoint="run", condition=("Smiling",), guidance=2.0, sampler=sampler)
    for out in ("faces.png", "way.gif", "faces"):
        assert sample(SampleConfig(num_images=2, steps=3, out=out, **options)).exists()


def test_sheet_has_a_row_for_each_attribute_on_and_off_from_the_same_noise(run):
    trained = load_trained(run)
    assert trained.attribute_names == ASKED
    sheet = Image.open(
        sample(SampleConfig("run", num_images=3, steps=3, sheet=True, out="sheet.png"))
    )
    assert sheet.height == 4 * 10 + 2
    left = sheet.width - (3 * 10 + 2)
    cells = np.asarray(sheet)[:, left:]
    alone = np.asarray(
        Image.open(
            sample(SampleConfig("run", num_images=3, steps=3, condition=("Smiling",), out="s.png"))
        )
    )
    difference = np.abs(cells[2:10, 2:10].astype(int) - alone[2:10, 2:10])
    assert difference.max() <= 1  # rounding may differ in a batch of another size


def test_condition_beside_a_sheet_holds_in_every_row(run):
    plain = sample(SampleConfig("run", num_images=2, steps=3, sheet=True, out="a.png"))
    with_glasses = sample(
        SampleConfig(
            "run", num_images=2, steps=3, sheet=True, condition=("Eyeglasses",), out="b.png"
        )
    )
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (plain, with_glasses))
    assert np.abs(a[:20] - b[:20]).max() > 1  # the rows of Smiling now have glasses
    assert np.abs(a[22:] - b[22:]).max() <= 1  # the rows of Eyeglasses are as they were


def test_only_trains_on_the_matching_faces(capsys):
    train(conditional(attributes=(), only=("Smiling", "Eyeglasses=-1"), batch_size=4))
    faces = load_faces("synthetic", 8, attributes=ASKED)
    has = (faces.attributes == [1, -1]).all(1)
    assert f"the {has.sum()} of 60 with Smiling, not Eyeglasses" in capsys.readouterr().out
    assert set(load_faces("synthetic", 8, ("Smiling", "Eyeglasses=-1")).train) == {
        i for i in faces.train if has[i]
    }


@pytest.mark.parametrize(
    "changes, code, parts",
    [
        ({"attributes": ("Smilng",)}, 2, ("--attributes", "Smilng", "Smiling")),
        ({"only": ("Smilng",)}, 2, ("--only", "Smilng", "Smiling")),
        ({"only": ("Smiling=2",)}, 2, ("--only", "Smiling=2")),
        ({"attribute_dropout": 1.5}, 2, ("--attribute_dropout",)),
        ({"batch_size": 10_000_000}, 3, ("--batch_size",)),
    ],
)
def test_bad_flags_in_training_are_one_line(changes, code, parts):
    result = run_script("train.py", *as_flags({**TINY, "path_to_data": "synthetic", **changes}))
    assert_error(result, code, *parts)
    assert not list_checkpoints(dataset.Path("run"))


def test_attributes_of_images_that_have_none_are_refused(here):
    result = run_script("train.py", *as_flags({**TINY, "attributes": ("Smiling",)}))
    assert_error(result, 3, "attributes")


@pytest.mark.parametrize(
    "options, text",
    [
        ({"condition": ("Male",)}, "--condition: no attribute Male.*Smiling, Eyeglasses"),
        ({"condition": ("Smiling=2",)}, "--condition.*Smiling=2"),
        ({"guidance": 2.0}, "--guidance"),
        ({"guidance": -1.0, "condition": ("Smiling",)}, "--guidance"),
    ],
)
def test_bad_flags_in_sampling_are_one_line(run, options, text):
    with pytest.raises(UsageError, match=text):
        sample(SampleConfig("run", num_images=2, steps=2, out="no.png", **options))
    assert not dataset.Path("no.png").exists()


def test_folders_of_classes_train_a_network_that_is_asked_for_one_of_them(tmp_path):
    for number, name in enumerate(("lily", "rose", "tulip")):
        (tmp_path / "flowers" / "train" / name).mkdir(parents=True)
        (tmp_path / "flowers" / "test" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (8, 8), (80 * number, 20 * i, 99))
            part = "test" if i == 3 else "train"
            image.save(tmp_path / "flowers" / part / name / f"{i}.png")
    folder = train(conditional(path_to_data="flowers", attributes=("all",), experiment_name="run"))
    trained = load_trained(folder)
    assert tuple(trained.attribute_names) == ("lily", "rose", "tulip")
    assert trained.settings["faces"].startswith("9 faces") and trained.settings["crop"] == "square"
    assert {tuple(row) for row in trained.usual_attributes.tolist()} == {
        (1, -1, -1), (-1, 1, -1), (-1, -1, 1)
    }  # fmt: skip
    assert sample(SampleConfig("run", 2, steps=2, condition=("ROSE",), out="rose.png")).exists()


def test_each_attribute_is_asked_for_once():
    with pytest.raises(UsageError, match="--attributes"):
        check_config(conditional(attributes=("Smiling", "Smiling")))
