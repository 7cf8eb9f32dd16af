"""What is said of a checkpoint: complete, repeatable, and of the images it was trained on."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, tiny
from PIL import Image

import evaluate as evaluate_module
from dataset.faces import load_faces
from evaluate import EvaluateConfig, Generated, evaluate, generate_all, measure_images, split_real
from formats.features import find_features
from generate import generate, load_trained
from system.device import find_device
from system.errors import UserError
from system.processes import Processes
from train import train
from utils import checkpoint_path, load_checkpoint, save_checkpoint, to_uint8

SMALL = EvaluateConfig(
    checkpoint="run",
    num_images=6,
    samplers=("dpm++:2", "ddim:3"),
    features="mine:load",
    batch_size=4,
)
PLAIN = replace(SMALL, samplers=("dpm++:2",), features="none", loss_draws=0)


@pytest.fixture
def run(run, fresh_imports):
    """The folder of a run on 21 faces and one held out; beside it a user's features."""
    Path("mine.py").write_text(
        "def load():\n"
        "    return lambda x: x.float().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(1)\n"
    )
    return run


def read(path: Path = Path("run/evaluation/evaluation_00000006.json")) -> dict:
    """What was written, which is strictly JSON: no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


# What it says ------------------------------------------------------------------------------------


def test_evaluation_says_all_that_it_promises_and_again_the_same(run, capsys, monkeypatch):
    path = evaluate(SMALL)
    result, text = read(path), capsys.readouterr().out
    assert set(result["held_out"]) == {"raw", "ema"}
    assert len(result["held_out"]["ema"]["bands"]) == 10
    floor = "real faces (the floor)"
    assert list(result["samplers"]) == ["dpm++:2", "ddim:3", floor]
    for name, values in result["samplers"].items():
        assert values["frechet"] > 0 and "kernel" in values and (name == floor or values["seconds"])
        assert f"{values['frechet']:.3f}" in text
    ways, sets = ("pixels", "features"), ("generated", "held out")
    assert set(result["nearest"]) == {f"{one}, by {way}" for way in ways for one in sets}
    assert f"{result['held_out']['ema']['loss']:.4f}" in text
    assert "step_00000006.pt, trained for 6 steps, guided by" in text
    assert result["num_reference"] == 16 and result["step"] == 6
    for name, rows in (("nearest", 5), ("samplers", 2)):
        assert Image.open(path.with_name(f"{name}.png")).height == rows * 10 + 2
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    again = read(evaluate(SMALL))
    for name in ("held_out", "nearest"):
        assert result[name] == again[name]
    for name, values in result["samplers"].items():
        assert values["frechet"] == again["samplers"][name]["frechet"]
    for part in ("dpm++:2:", "held-out loss:", "nearest by pixels:", "features:", "distances:"):
        assert f"{part} 100%" in terminal.getvalue(), part


def test_command_takes_the_data_of_the_run_and_no_distances_on_a_cpu(run):
    """A real start."""
    result = run_script("evaluate.py", "--num_images", "6", "--device", "cpu", new=True)
    assert result.returncode == 0, result.stderr
    faces, written = load_faces("pictures", 8), read()
    assert faces.description in result.stdout and written["fingerprint"] == faces.fingerprint
    assert "written to run/evaluation/evaluation_00000006.json" in result.stdout
    assert "--features inception asks for them" in result.stdout
    assert written["config"]["features"] == "none"
    assert "frechet" not in written["samplers"]["dpm++:10"]


def test_other_faces_than_those_of_the_training_are_said(run, capsys):
    Path("pictures/000.png").unlink()
    evaluate(PLAIN)
    assert "note: it was trained on other faces" in capsys.readouterr().out


def test_held_out_loss_is_of_the_weights_it_names_also_of_two_timesteps(run):
    state = load_checkpoint(checkpoint_path(run, 6))
    for weights in state["ema"]["model"].values():
        weights.zero_()
    state["diffusion"] |= {"prediction": "eps", "num_timesteps": 2}
    save_checkpoint(checkpoint_path(run, 6), state)
    held_out = read(evaluate(replace(PLAIN, loss_draws=20, guide="none")))["held_out"]
    assert held_out["ema"]["loss"] == pytest.approx(1, abs=0.1)  # no answer: the noise's variance
    assert held_out["raw"]["loss"] != held_out["ema"]["loss"]


# The images --------------------------------------------------------------------------------------


def test_images_are_those_that_sample_generates_and_as_many_as_asked(run):
    trained, processes = load_trained("run"), Processes(find_device("cpu"))
    _, ddim = generate_all(SMALL, trained, load_faces("pictures", 8), processes)
    expected = torch.cat(list(generate(trained, range(6), sampler="ddim", steps=3)))
    assert ddim.name == "ddim:3" and ddim.images.shape == (6, 8, 8, 3)
    assert np.abs(ddim.images.astype(int) - to_uint8(expected).numpy()).max() <= 1


def test_conditional_network_is_asked_for_what_training_faces_have(here, monkeypatch):
    monkeypatch.setattr("dataset.sources.NUM_SYNTHETIC", 60)
    train(tiny(path_to_data="synthetic", num_training_steps=1, attributes=("Smiling", "Male")))
    asked, real = [], evaluate_module.generate

    def spy(*arguments, **options):
        asked.append(options["attributes"])
        return real(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "generate", spy)
    evaluate(PLAIN)
    assert torch.cat(asked).shape == (6, 2) and torch.cat(asked).abs().eq(1).all()


def test_real_faces_are_split_without_overlap(run):
    faces = replace(load_faces("pictures", 8), train=np.arange(19), held_out=np.arange(19, 22))
    for count in (2, 3, 20):
        floor, reference = split_real(replace(SMALL, num_images=count), faces)
        assert len(set(floor)) == count and not set(floor) & set(reference)
        assert set(reference) <= set(faces.train)
        assert len(set(floor) & set(faces.held_out)) == min(count, 3)
    assert len(split_real(replace(SMALL, num_reference=7), faces)[1]) == 7


def test_planted_training_faces_are_called_copies(run):
    faces = load_faces("pictures", 8)
    planted = [Generated("planted", np.asarray(faces.images[faces.train[10:16]]), 1.0)]
    real = split_real(SMALL, faces)
    said, (by_pixels, by_features) = measure_images(
        faces, find_features("mine:load"), planted, real
    )
    for way in ("pixels", "features"):
        assert said["nearest"][f"generated, by {way}"]["copies"] == 1
        assert said["nearest"][f"generated, by {way}"]["median_distance"] == 0
        assert said["nearest"][f"held out, by {way}"]["copies"] == 0
    assert by_pixels[:, 0].tolist() == by_features[:, 0].tolist() == list(range(10, 16))


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, code, said",
    [
        (dict(num_images=1), 2, "--num_images"),
        (dict(samplers=()), 2, "--samplers"),
        (dict(samplers=("dpm++",)), 2, "--samplers"),
        (dict(samplers=("euler:5",)), 2, "--samplers"),
        (dict(samplers=("ddpm:51",)), 2, "--samplers"),
        (dict(samplers=("dpm++:" + "9" * 400,)), 2, "--samplers"),
        (dict(samplers=("ddim:5", "ddim:5")), 2, "--samplers"),
        (dict(features="absent:load"), 2, "--features"),
        (dict(num_reference=17), 3, "--num_reference"),
        (dict(num_images=21), 3, "--num_reference"),
        (dict(checkpoint="nowhere"), 4, "nowhere"),
        (dict(path_to_data="nowhere"), 3, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_error_and_leaves_nothing(run, changes, code, said):
    with pytest.raises(UserError, match=r"^[^\n]*Fix: [^\n]*$") as error:
        evaluate(replace(SMALL, **changes))
    assert error.value.exit_code == code and said in str(error.value)
    assert not (run / "evaluation").exists()


def test_folder_that_cannot_be_written_is_found_before_generating(run, monkeypatch):
    (run / "evaluation").touch()
    monkeypatch.setattr(evaluate_module, "generate", lambda *_, **__: pytest.fail("generates"))
    with pytest.raises(UserError, match="evaluation"):
        evaluate(PLAIN)
