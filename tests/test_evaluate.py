"""What is said of a checkpoint: complete, repeatable, and never of the wrong images."""

import io
import json
import shutil
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import TINY, as_flags, assert_error, needs_posix, run_script, write_pictures
from PIL import Image
from test_processes import fork, join, said

import evaluate as evaluate_module
from dataset import sources
from dataset.faces import load_faces
from diffusion import Diffusion
from evaluate import EvaluateConfig, evaluate, split_real
from generate import Generated, generate, keep_generated, load_trained, read_generated
from metrics import find_features, held_out_loss, loss_at_all_t, measure_images
from system.errors import DataError, UserError
from train import Config, train
from utils import checkpoint_path, load_checkpoint, save_checkpoint, to_uint8

DATA = TINY["path_to_data"]
SMALL = EvaluateConfig(
    checkpoint="run",
    path_to_data=DATA,
    num_images=6,
    samplers=("dpm++:2", "ddim:3"),
    features="mine:load",
    loss_draws=2,
    batch_size=4,
)


def evaluate_flags(config: EvaluateConfig) -> list[str]:
    return as_flags({field.name: getattr(config, field.name) for field in fields(config)})


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder with 60 images, three of them held out, a run on them, and a user's features."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_pictures(folder, 60)
    (folder / "mine.py").write_text(
        "def load():\n"
        "    return lambda x: x.float().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(1)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(Config(**TINY))
    return folder


@pytest.fixture
def run(trained_once, tmp_path, monkeypatch, fresh_imports):
    """A copy of it as the current folder; returns the run's."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def read(folder) -> dict:
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


def test_evaluation_says_all_that_it_promises(run, capsys):
    path = evaluate(SMALL)
    result, text = json.loads(path.read_text()), capsys.readouterr().out
    assert (
        set(result["held_out"]) == {"raw", "ema"} and len(result["held_out"]["ema"]["bands"]) == 10
    )
    assert result["held_out"]["raw"] != result["held_out"]["ema"]
    floor = "real faces (the floor)"
    assert list(result["samplers"]) == ["dpm++:2", "ddim:3", floor]
    for name, values in result["samplers"].items():
        assert values["frechet"] > 0 and "kernel" in values and (name == floor or values["seconds"])
        assert f"{values['frechet']:.3f}" in text
    ways, sets = ("pixels", "features"), ("generated", "held out")
    assert set(result["nearest"]) == {f"{one}, by {way}" for way in ways for one in sets}
    assert f"{result['held_out']['ema']['bits_per_dim']:.3f}" in text
    assert result["num_reference"] == 54 and result["step"] == 6
    assert Image.open(run / "evaluation" / "nearest.png").size[1] == 5 * 10 + 2
    assert Image.open(run / "evaluation" / "samplers.png").size[1] == 2 * 10 + 2


def test_same_evaluation_twice_gives_the_same_numbers(run):
    evaluate(SMALL)
    first = read(run)
    for path in (run / "evaluation").rglob("*.npz"):
        path.unlink()
    evaluate(SMALL)
    again = read(run)
    for name in ("held_out", "nearest"):
        assert first[name] == again[name]
    for name, values in first["samplers"].items():
        assert values["frechet"] == again["samplers"][name]["frechet"]


def test_images_are_those_that_sample_generates(run):
    evaluate(replace(SMALL, guide="none"))
    trained = load_trained("run")
    expected = torch.cat(list(generate(trained, range(6), sampler="ddim", steps=3)))
    paths = sorted((run / "evaluation" / "generated").glob("ddim_3_ema*/*.npz"))
    kept = np.concatenate([np.load(path)["images"] for path in paths])
    difference = kept.astype(int) - to_uint8(expected).numpy().astype(int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("count", [3, 4, 5, 8, 9])
def test_just_as_many_images_are_generated_as_asked(run, count):
    evaluate(replace(SMALL, num_images=count, features="none", loss_draws=0))
    for sampler in ("dpm++_2", "ddim_3"):
        (folder,) = (run / "evaluation" / "generated").glob(f"{sampler}_*")
        assert sum(len(np.load(path)["images"]) for path in folder.iterdir()) == count


def test_stopped_in_the_middle_it_goes_on_from_what_is_kept(run, monkeypatch):
    calls, real = [], evaluate_module.generate

    def interrupted(trained, numbers, *args, **options):
        calls.append(numbers)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(trained, numbers, *args, **options)

    monkeypatch.setattr(evaluate_module, "generate", interrupted)
    config = replace(SMALL, samplers=("dpm++:2",), num_images=14, features="none", loss_draws=0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert [len(numbers) for numbers in calls] == [4, 4, 4]
    calls.extend([None] * 3)  # no more interruptions
    evaluate(config)
    assert [numbers.start for numbers in calls[6:]] == [8, 12]
    evaluate(replace(config, num_images=16))  # the last part was a smaller one
    assert [(numbers.start, numbers.stop) for numbers in calls[8:]] == [(12, 16)]
    monkeypatch.setattr(evaluate_module, "VERSION", -1)  # other samplers make other images
    evaluate(replace(config, num_images=16))
    assert [numbers.start for numbers in calls[9:]] == [0, 4, 8, 12]


def test_other_weights_seeds_guides_and_checkpoints_share_no_images(run):
    options = dict(features="none", loss_draws=0, samplers=("dpm++:2",))
    config = replace(SMALL, guide="none", **options)
    evaluate(config)
    for strength in (1.5, 2.0):
        early = "run/checkpoints/step_00000003.pt"
        evaluate(replace(config, guide=early, autoguidance=strength))
    evaluate(replace(config, raw=True))
    evaluate(replace(config, seed=1))
    train(Config(**{**TINY, "num_training_steps": 9, "resume": True}))
    evaluate(config)
    folders = sorted((run / "evaluation" / "generated").iterdir())
    assert len(folders) == 6
    images = [np.load(sorted(folder.iterdir())[0])["images"] for folder in folders]
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])


def test_real_faces_are_split_without_overlap(run):
    faces = load_faces(DATA, 8)
    for count in (2, 3, 20):
        floor, reference = split_real(replace(SMALL, num_images=count), faces)
        assert len(floor) == count and not set(floor) & set(reference)
        assert set(reference) <= set(faces.train)
        assert set(faces.held_out[:count]) <= set(faces.held_out) and len(set(floor)) == count
        assert len(set(floor) & set(faces.held_out)) == min(count, 3)
    assert len(split_real(replace(SMALL, num_reference=7), faces)[1]) == 7


def test_planted_training_faces_are_called_copies(run):
    faces = load_faces(DATA, 8)
    images = faces.images[faces.train[10:16]]
    planted = [Generated("planted", np.asarray(images), 1.0)]
    features = find_features("mine:load")
    real = split_real(SMALL, faces)
    said, (by_pixels, by_features) = measure_images(faces, features, planted, real)
    for way in ("pixels", "features"):
        assert said["nearest"][f"generated, by {way}"]["copies"] == 1
        assert said["nearest"][f"generated, by {way}"]["median_distance"] == 0
        assert said["nearest"][f"held out, by {way}"]["copies"] == 0
    assert by_pixels[:, 0].tolist() == by_features[:, 0].tolist() == list(range(10, 16))


def test_conditional_network_is_asked_for_what_training_faces_have(here, monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 60)
    names = ("Smiling", "Eyeglasses")
    train(Config(**{**TINY, "path_to_data": "synthetic", "attributes": names}))
    asked, real = [], evaluate_module.generate

    def spy(trained, numbers, *args, **options):
        asked.append(options["attributes"])
        return real(trained, numbers, *args, **options)

    monkeypatch.setattr(evaluate_module, "generate", spy)
    config = replace(SMALL, path_to_data="synthetic", samplers=("dpm++:2",), features="none")
    evaluate(config)
    assert torch.cat(asked).shape == (6, 2) and torch.cat(asked).abs().eq(1).all()
    assert "held_out" in read(here / "run")


def test_held_out_loss_of_an_evaluation_uses_the_weights_it_names(run):
    state = load_checkpoint(checkpoint_path(run, 6))
    for weights in state["ema"]["model"].values():
        weights.zero_()
    state["diffusion"]["prediction"] = "eps"
    save_checkpoint(checkpoint_path(run, 6), state)
    evaluate(replace(SMALL, features="none"))
    held_out = read(run)["held_out"]
    assert held_out["ema"]["loss"] == pytest.approx(1, abs=0.1)  # no answer: the noise's variance
    assert held_out["raw"]["loss"] != held_out["ema"]["loss"]


def test_other_faces_than_those_of_the_training_are_said(run, capsys):
    (run.parent / DATA / "000.png").unlink()
    evaluate(replace(SMALL, features="none", loss_draws=0))
    assert "note: it was trained on other faces" in capsys.readouterr().out


def test_faces_come_in_the_checkpoints_size(run):
    load_faces(DATA, 16)  # another size lies prepared beside it
    evaluate(replace(SMALL, features="none"))
    assert "_8_" in read(run)["key"]


@pytest.mark.parametrize(
    "changes,code,said",
    [
        (dict(num_images=1), 2, "--num_images"),
        (dict(batch_size=0), 2, "--batch_size"),
        (dict(samplers=()), 2, "--samplers"),
        (dict(samplers=("dpm++",)), 2, "--samplers"),
        (dict(samplers=("euler:5",)), 2, "--samplers"),
        (dict(samplers=("ddpm:51",)), 2, "--samplers"),
        (dict(samplers=("dpm++:" + "9" * 400,)), 2, "--samplers"),
        (dict(samplers=("ddim:5", "ddim:5")), 2, "--samplers"),
        (dict(features="absent:load"), 2, "--features"),
        (dict(features="json:dumps"), 2, "--features"),
        (dict(loss_draws=1), 2, "--loss_draws"),
        (dict(num_reference=55), 3, "--num_reference"),
        (dict(num_images=59), 3, "--num_reference"),
        (dict(checkpoint="nowhere"), 4, "nowhere"),
        (dict(path_to_data=f"{DATA}/000.png"), 3, "000.png"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, changes, code, said):
    with pytest.raises(UserError) as error:
        evaluate(replace(SMALL, **changes))
    assert error.value.exit_code == code and said in str(error.value)
    assert not (run / "evaluation" / "evaluation.json").exists()


def test_checkpoint_without_average_is_one_line(run):
    state = load_checkpoint(checkpoint_path(run, 6))
    del state["ema"], state["format"]
    save_checkpoint(checkpoint_path(run, 6), state)
    assert_error(run_script("evaluate.py", *evaluate_flags(SMALL), new=True), 4, "lacks 'ema'")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_kept_images_are_named_and_generated_again_once_deleted(run, damage):
    evaluate(SMALL)
    first = read(run)["samplers"]["ddim:3"]["frechet"]
    path = sorted((run / "evaluation" / "generated").glob("ddim_3_*/*.npz"))[-1]
    whole = path.read_bytes()
    middle = bytes([whole[len(whole) // 4] ^ 255])
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "flipped": whole[: len(whole) // 4] + middle + whole[len(whole) // 4 + 1 :],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(DataError, match=path.name):
        evaluate(SMALL)
    path.unlink()
    evaluate(SMALL)
    assert read(run)["samplers"]["ddim:3"]["frechet"] == first


def test_every_flipped_bit_of_kept_images_is_noticed(tmp_path):
    path = tmp_path / "000000-000002.npz"
    keep_generated(path, lambda: torch.zeros(2, 3, 2, 2))
    files, whole = [(range(2), path)], path.read_bytes()
    images = read_generated("one", files).images
    for i in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            assert (read_generated("one", files).images == images).all(), i
        except DataError as error:
            assert path.name in str(error)


def test_default_draws_are_few_and_their_error_is_small(run):
    faces, evaluated = load_faces(DATA, 8), []
    trained = replace(load_trained("run"), diffusion=Diffusion(num_timesteps=1000))
    trained.model.register_forward_hook(lambda _, inputs, __: evaluated.append(len(inputs[0])))
    images = faces.images[faces.held_out], faces.attributes[faces.held_out]
    few = loss_at_all_t(trained, trained.diffusion, *images, EvaluateConfig().loss_draws)
    assert sum(evaluated) <= 2500 and len(few.loss) == 1000
    many = held_out_loss(trained, trained.diffusion, *images, draws=8)
    (bits, error), (expected, usual) = few.bits_per_dim(), many.bits_per_dim()
    assert 0 < error < usual and abs(bits - expected) < 4 * (error**2 + usual**2) ** 0.5


class Terminal(io.StringIO):
    """Takes what is shown in a terminal."""

    def isatty(self):
        return True


def test_every_part_that_takes_long_shows_progress(run, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    evaluate(SMALL)
    for part in ("dpm++:2:", "held-out loss:", "nearest by pixels:", "features:", "distances:"):
        assert f"{part} 100%" in sys.stderr.getvalue(), part


def test_without_a_gpu_no_distances_are_measured_unless_asked_for(run, capsys):
    evaluate(replace(SMALL, features="", loss_draws=0, device="cpu"))
    assert "--features inception" in capsys.readouterr().out
    assert read(run)["config"]["features"] == "none"
    assert "frechet" not in read(run)["samplers"]["dpm++:2"]


@pytest.mark.parametrize("taken", ["evaluation", "evaluation/evaluation.json"])
def test_a_folder_that_cannot_be_written_is_found_before_generating(run, monkeypatch, taken):
    if taken == "evaluation":
        (run / taken).touch()
    else:
        (run / taken).mkdir(parents=True)
    monkeypatch.setattr(evaluate_module, "generate", lambda *_, **__: pytest.fail("generates"))
    with pytest.raises(UserError, match="evaluation"):
        evaluate(replace(SMALL, features="none", loss_draws=0))


def test_all_that_is_written_is_json(here):
    train(Config(**{**TINY, "num_timesteps": 2}))
    evaluate(replace(SMALL, features="none", samplers=("dpm++:2",)))
    path = here / "run" / "evaluation" / "evaluation.json"
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_two_processes_generate_just_as_many_images(run):
    config = replace(SMALL, num_images=14)
    needs_posix()
    assert join(fork(2, lambda _: evaluate(config))) == [0, 0], said()
    assert said().count("real faces (the floor)") == 1
    (folder,) = (run / "evaluation" / "generated").glob("ddim_3_*")
    assert sum(len(np.load(path)["images"]) for path in folder.iterdir()) == 14
    together = read(run)
    for path in (run / "evaluation").rglob("*.npz"):
        path.unlink()
    evaluate(config)
    for name, values in read(run)["samplers"].items():
        assert values["frechet"] == pytest.approx(together["samplers"][name]["frechet"], rel=1e-2)
