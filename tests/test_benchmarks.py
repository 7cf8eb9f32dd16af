"""The benchmarks run, at a tiny size, and refuse to compare what is not the same."""

import copy
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_error, run_script, tensors_equal
from PIL import Image
from torch import nn

from benchmarks import (
    conditional_accuracy,
    data_speed,
    distances,
    quality,
    recipes,
    sample_speed,
    train_speed,
)
from benchmarks.common import Worker, measure, ratio, read_tables
from benchmarks.peers import diffusers_network, forward_flops, make_config
from dataset import sources
from dataset.faces import Batches, load_faces
from generate import generate
from metrics import Features
from system.device import autocast_dtype
from system.errors import UsageError
from system.terminal import table
from train import Config, train
from utils import list_checkpoints, load_checkpoint

SMALLEST = ["--img_size", "8", "--channels", "64", "--channel_mults", "1", "1", "--rounds", "1"]
SMALL = make_config(img_size=8, channels=64, channel_mults=(1, 1), prediction="eps")
CPU = ["--device", "cpu"]


def run(script: str, *arguments: str) -> str:
    """What a benchmark prints; it leaves nothing in the current folder."""
    result = run_script(f"benchmarks/{script}.py", *arguments, timeout=600, new=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "machine: " in result.stdout.splitlines()[-1]
    return result.stdout


def weights() -> int:
    """Of the tiny network."""
    return sum(p.numel() for p in sample_speed.random_network(SMALL).parameters())


def test_train_speed_has_its_rows_and_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["ours", "diffusers", "denoising-diffusion-pytorch"]
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        rows.pop()
    small = ["--batch_size", "2", "--steps_per_round", "1", *CPU, "--rows", *rows]
    text = run("train_speed", *SMALLEST, *small)
    (found,) = read_tables(text)
    assert [name.partition(" (")[0] for name in found] == rows
    for row in found.values():
        assert float(row["images/s"]) > 0 and float(row["peak GB"]) > 0.1
        assert float(row["of matrix product"].rstrip("%")) > 0
        assert float(row["of convolution"].rstrip("%")) > 0
        speed = float(row["images/s"]) * 3 * float(row["GFLOP forward"]) / 1e3
        assert float(row["TFLOP/s"]) == pytest.approx(speed, rel=0.01)
    ours, theirs = list(found.values())[:2]
    assert float(theirs["x diffusers"]) == 1
    for column in ("M weights", "GFLOP forward"):
        assert ours[column] == theirs[column]
    assert f"checked: 2 rows train {weights():,} weights" in text
    for part in ("EMA update", "clipping", "logging", "constant batch"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_sample_speed_has_its_rows_and_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--num_images", "2", "--steps", "2", "3", "--ddpm_steps", "4", *CPU]
    text = run("sample_speed", *SMALLEST, *small)
    (found,) = read_tables(text)
    assert list(found) == ["ddim 2", "ddim 3", "dpm++ 2", "dpm++ 3", "ddpm 4"]
    for row in found.values():
        times = float(row["diffusers s"]) / float(row["ours s"])
        assert float(row["x in float32"]) == pytest.approx(times, rel=0.02, abs=0.01)
        half = autocast_dtype("fp16", torch.device("cpu")) is not None
        assert ("x in half" in row) == ("diffusers half s" in row) == half
    assert f"checked: both hold {weights():,} weights" in text
    assert not list(tmp_path.iterdir())


def test_data_speed_has_its_rows_and_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--num_images", "24", "--img_size", "8", "--batch_size", "4", "--rounds", "1"]
    text = run("data_speed", *small, "--step_ms", "10", "--full", "30", *CPU)
    files, training = read_tables(text)
    assert len(files) == 4 and len(training) == 3
    assert all(float(row["images/s"].replace(",", "")) > 0 for row in files.values())
    for row in training.values():
        share = float(row["of a step of 10 ms"].rstrip("%")) / 100
        assert share == pytest.approx(float(row["ms a batch"]) / 10, rel=0.01, abs=1e-4)
    assert "checked: 24 images are the same" in text
    assert "a zip of 30 images" in text and "the second start takes" in text
    assert not list(tmp_path.iterdir())


@pytest.fixture
def short_run(here):
    """A run that quality.py can compare with, and a user's features."""
    (here / "mine.py").write_text(
        "def load():\n    return of\n\n"
        "def of(x):\n"
        "    assert x.shape[1:] == (3, 8, 8), x.shape\n"
        "    return x.float().unfold(2, 4, 4).mean(4).flatten(1)[:, ::3]\n"
    )
    train(Config(**{**TINY, "num_training_steps": 2}))
    return here


PEERS = [name for name in quality.PEERS if importlib.util.find_spec(name.replace("-", "_"))]


def test_quality_trains_each_peer_for_the_minutes_and_measures_all(short_run):
    config = [
        "--checkpoint",
        "run",
        "--path_to_data",
        TINY["path_to_data"],
        "--minutes",
        "0.02",
        *CPU,
    ]
    config += ["--steps", "3", "--num_images", "4", "--batch_size", "3", "--samplers", "dpm++:2"]
    config += ["--features", "mine:load", "--peers", *PEERS, "--peer_channels", "64"]
    text = run("quality", *config)
    samplers, copied = read_tables(text)
    floor = "real faces (the floor)"
    assert list(samplers) == ["dpm++:2", *(f"{name}:3" for name in PEERS), floor]
    assert all(float(row["Frechet distance"]) > 0 for row in samplers.values())
    assert "generated, by features" in copied
    for name in PEERS:
        (folder,) = Path("quality").glob(f"{name}_0.02_minutes_*")
        state = load_checkpoint(folder / "state.pt")
        assert state["step"] > 1 and 1.2 <= state["seconds"] < 10
        # The run itself has 8 channels, the peers are as wide as was asked.
        assert f"{name}: 0.0" not in text and f"{name}: " in text
        assert len(list((folder / "generated_3").iterdir())) == 2
    assert Image.open("quality/samplers.png").size[0] > 4 * 10

    # Once more: all is there.
    (again, _) = read_tables(run("quality", *config))
    assert again == samplers


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_goes_on_with_the_training_that_was_kept(short_run, name):
    torch.manual_seed(0)
    config = replace(SMALL, batch_size=4)
    batches = Batches(load_faces(TINY["path_to_data"], 8), config.batch_size)
    path, cpu = short_run / "state.pt", torch.device("cpu")
    first, second = (quality.make_peer(name, config, cpu) for _ in range(2))
    before = {key: value.clone() for key, value in first.network.state_dict().items()}
    step, spent = quality.train_for(first, batches, path, 0.3)
    assert any((before[key] != value).any() for key, value in first.network.state_dict().items())
    assert quality.train_for(second, batches, path, spent) == (step, spent)  # nothing is left to do
    kept = load_checkpoint(path)
    for part, one in first.parts().items():
        assert tensors_equal(one.state_dict(), second.parts()[part].state_dict()), part
        assert tensors_equal(one.state_dict(), kept[part]), part
    further, _ = quality.train_for(second, batches, path, spent + 0.3)
    assert further > step
    images = second.generate(config, 3, 2, seed=1)
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1
    assert torch.equal(second.generate(config, 3, 2, seed=1), images)
    assert not torch.equal(second.generate(config, 3, 2, seed=2), images)


@pytest.mark.parametrize(
    "flag, value", [("minutes", "0"), ("steps", "0"), ("peers", "hers"), ("num_images", "-1")]
)
def test_quality_refuses_what_cannot_be(here, flag, value):
    assert_error(run_script("benchmarks/quality.py", f"--{flag}", value), 2, f"--{flag}")


def test_distances_of_each_checkpoint_by_steps_and_guide(short_run):
    train(Config(**{**TINY, "experiment_name": "longer"}))
    checkpoints = [str(path) for path in reversed(list_checkpoints(Path("longer")))]
    config = ["--path_to_data", "pictures", "--features", "mine:load", "--num_images", "20"]
    config += ["--steps", "2", "3", "--autoguidance", "1", "2", "--loss_draws", "1"]
    text = run("distances", "--checkpoints", *checkpoints, *config)
    (found,) = read_tables(text)
    assert list(found) == checkpoints and [row["step"] for row in found.values()] == ["3", "6"]
    names = [f"distance, {steps} steps{way}" for steps in (2, 3) for way in ("", ", guided at 2")]
    first, last = ([row[name] for name in names] for row in found.values())
    assert len({*first, *last}) == 6  # the guide, of step 3, is not that of its own weights
    assert all(0 < float(row["held-out loss"]) < 9 for row in found.values())
    again = run("distances", "--checkpoints", "longer", *config, "--seed", "1")
    assert checkpoints[1] in again and last[0] not in again
    kept = json.loads(Path("distances.json").read_text())
    assert [one["step"] for one in kept["results"]] == [6] and kept["config"]["seed"] == 1


def test_distances_of_grey_images_are_to_grey_faces(short_run, monkeypatch):
    train(Config(**{**TINY, "experiment_name": "grey", "grey": True}))
    references = []

    class Noted(Features):
        def cached(self, images, *which):
            references.append(images)
            return super().cached(images, *which)

    features = Noted("mean colour", lambda x: x.float().mean((2, 3)))
    monkeypatch.setattr(distances, "find_features", lambda *spec: features)
    options = dict(num_images=20, steps=(2,), loss_draws=0)
    wanted = distances.DistancesConfig(("grey",), "pictures", **options)
    (found,) = distances.measure(wanted)
    assert np.ptp(references[0], axis=-1).max() == 0  # the three channels are equal
    assert found["distances"]["2 steps"][0] > 0


def test_distances_refuse_what_cannot_be(here):
    for flag, value in (("num_images", "3"), ("steps", "0"), ("autoguidance", "0.5")):
        assert_error(run_script("benchmarks/distances.py", f"--{flag}", value), 2, f"--{flag}")
    flags = ("--checkpoints", "celeba_32", "--features", "none")
    result = run_script("benchmarks/distances.py", *flags)
    assert_error(result, 2, "--features")


TINY_RECIPE = (
    "img_size=8 channels=8 channel_mults=1,2 head_dim=8 norm_groups=4 attn_resolutions=4 "
    "batch_size=4 num_samples=2 mixed_precision=no attributes="
)


def test_recipes_are_trained_for_the_flops_and_measured_for_each_seed(short_run):
    muon = f"{TINY_RECIPE} optimizer=muon"
    flops = recipes.update_flops(recipes.read_recipe(muon))
    assert flops > recipes.update_flops(recipes.read_recipe(f"{TINY_RECIPE} optimizer=adamw"))
    config = ["--recipes", muon, f"{muon} learning_rate=0.01", "--teraflops", str(flops * 3e-12)]
    config += ["--path_to_data", "pictures", "--features", "mine:load", "--num_images", "20"]
    text = run("recipes", *config, "--steps", "2", "3", "--autoguidance", "1", "2")
    lines = [line for line in text.splitlines() if "channels=8" in line and line.startswith("|")]
    assert len(lines) == 4  # two recipes, two seeds
    assert "distance, 3 steps, guided at 2" in text
    distances = [cell.split("±") for line in lines for cell in line.split("|")[-5:-1]]
    assert len({value for value, _ in distances}) == 16
    assert all(float(value) > 0 and float(error) > 0 for value, error in distances)
    for folder in Path("recipes").glob("*TF*"):
        assert list_checkpoints(folder)[0].stem == "step_00000003"


def test_a_recipe_with_attributes_is_asked_for_those_of_training_faces(here, monkeypatch):
    monkeypatch.setattr(sources, "NUM_SYNTHETIC", 60)
    wish = recipes.Recipes(teraflops=1e-9, path_to_data="synthetic", num_images=8, steps=(2,))
    asked = []

    def noted(*arguments, attributes, **options):
        asked.append(attributes)
        return generate(*arguments, attributes=attributes, **options)

    monkeypatch.setattr(distances, "generate", noted)
    features = Features("mean colour", lambda x: x.float().mean((2, 3)))
    recipe = TINY_RECIPE.replace("attributes=", "attributes=Smiling,Male")
    assert recipes.run(wish, recipe, 0, features)["distances"].keys() == {"2 steps"}
    faces = load_faces("synthetic", 8, attributes=("Smiling", "Male"))
    kinds = {tuple(row) for row in faces.attributes[faces.train].tolist()}
    assert asked[0].shape == (8, 2) and {tuple(row) for row in asked[0].tolist()} <= kinds


def test_the_error_of_a_distance_is_as_large_as_it_varies():
    random = np.random.default_rng(0)
    reference = random.normal(size=(2000, 4))
    measured = [distances.distance(reference, random.normal(size=(200, 4))) for _ in range(60)]
    values, errors = np.array(measured).T
    assert 0.6 < np.median(errors) / values.std() < 1.6


def test_a_change_that_is_none_is_refused(here):
    for recipe in ("optimizer", "optimizer=sgd", "=3"):
        result = run_script("benchmarks/recipes.py", "--recipes", recipe)
        assert_error(result, 2, "--recipes" if "sgd" not in recipe else "--optimizer")


def test_conditional_accuracy_counts_what_varied_faces_have_and_keep(monkeypatch, capsys):
    """The judge reads an attribute off a pixel; to vary is to switch the one asked for, and one
    more: Smiling, but in faces that are asked to smile."""
    names = ("Smiling", "Black_Hair", "Blond_Hair")
    places = [conditional_accuracy.ATTRIBUTES.index(name) for name in names]
    trained = SimpleNamespace(attribute_names=names, image_channels=3, img_size=32, path="run")
    faces = torch.randint(0, 2, (60, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    faces = faces.float() * 2 - 1

    def vary(trained, numbers, seed, attributes, image, **options):
        image, asked = image.clone(), places[int(attributes[0].argmax())]
        assert len(image) == len(numbers) and (image[:, 0, 0, asked] < 0).all()
        image[:, 0, 0, asked] = 1
        if asked != places[0]:
            image[:, 0, 0, places[0]] *= -1
        yield image

    judge = lambda faces: faces[:, 0, 0, :15], torch.ones(15)  # noqa: E731
    monkeypatch.setattr(conditional_accuracy, "classifier", lambda: judge)
    monkeypatch.setattr(conditional_accuracy, "render_faces", lambda *_: (faces, None))
    monkeypatch.setattr(conditional_accuracy, "generate", vary)
    monkeypatch.setattr(conditional_accuracy, "load_trained", lambda _: trained)
    words = "--strengths 0.5 --guidance 1 3 --num_images 10"
    monkeypatch.setattr("sys.argv", ["conditional_accuracy.py", *words.split()])
    conditional_accuracy.main()
    text = capsys.readouterr().out
    assert text.count("| 100.0% |         50.0% |") == 2, text  # of 2, 1 and 1 others 2, 0 and 0
    distance = 127.5 * (4 * (1 + 2 + 2) / 3 / (3 * 32 * 32)) ** 0.5  # 1, 2 and 2 values by 2
    assert text.count(f"{distance:.1f} |") == 2, text
    for bad in (dict(attribute_names=("Young",)), dict(attribute_names=()), dict(img_size=64)):
        with pytest.raises(UsageError, match="^--checkpoint: "):
            conditional_accuracy.Judge(SimpleNamespace(**{**vars(trained), **bad}))


def test_a_row_that_is_not_there_is_named():
    result = run_script("benchmarks/train_speed.py", "--rows", "ours", "hers")
    assert_error(result, 2, "--rows", "hers", "diffusers-advised")


def test_a_width_that_diffusers_would_normalise_otherwise_is_refused():
    for channels in (32, 48, 80):
        with pytest.raises(UsageError, match="--channels"):
            make_config(8, channels, (1, 1))


def test_networks_that_differ_are_not_compared():
    same = {"weights": 100, "flops": 1000, "same_network": True}
    check = train_speed.check_same_network
    assert "100 weights" in check({"a": same, "b": same | {"flops": 1029}})
    check({"a": same, "b": same | {"flops": 1, "weights": 1, "same_network": False}})
    with pytest.raises(AssertionError, match="FLOPs"):
        check({"a": same, "b": same | {"flops": 1031}})
    with pytest.raises(AssertionError, match="weights"):
        check({"a": same, "b": same | {"weights": 99}})


class Products(nn.Module):
    """A convolution and a matrix product, whose FLOPs can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(8, 7, bias=False)

    def forward(self, x, t):
        return self.linear(self.conv(x))


def test_flops_are_two_for_each_product_and_equal_in_both_networks():
    assert forward_flops(Products(), 8) == 2 * (9 * 3 * 5 * 64 + 8 * 7 * 5 * 8)
    ours = sample_speed.random_network(SMALL)
    assert forward_flops(ours, 8) == forward_flops(diffusers_network(ours), 8)


def test_images_that_differ_are_not_compared():
    ours = sample_speed.random_network(SMALL).eval()
    theirs = diffusers_network(ours).eval()
    assert sample_speed.largest_difference(ours, theirs, SMALL, steps=3, num_images=2) < 1e-4
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.conv_out.bias.add_(0.02)
    with pytest.raises(AssertionError, match="differ"):
        sample_speed.largest_difference(other, theirs, SMALL, steps=3, num_images=2)


def test_decoded_images_that_differ_are_not_compared():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    theirs = [(torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1, 0) for image in images]
    assert data_speed.check_same_images(images, theirs) == 5
    images[3, 2, 1, 0] ^= 1
    with pytest.raises(AssertionError, match="image 3"):
        data_speed.check_same_images(images, theirs)
    with pytest.raises(AssertionError, match="4 images"):
        data_speed.check_same_images(images[:4], theirs)


def test_rounds_alternate_and_ratios_are_taken_within_a_round():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert measure(calls, rounds=3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert order == list("abbaab")
    assert ratio([1, 4, 5], [2, 3, 6]) == 5 / 6


def test_table_is_markdown():
    text = table(["row", "s"], [["a", "1"], ["long name", "10"]])
    assert read_tables(text) == [
        {"a": {"row": "a", "s": "1"}, "long name": {"row": "long name", "s": "10"}}
    ]
    assert text.splitlines()[1] == "| --------- | -: |"


def test_a_fault_in_a_worker_is_told():
    with pytest.raises(RuntimeError, match="invalid literal"):
        Worker(int, "no number")


def test_busy_speed_compares_settings_alone_and_beside_a_busy_process():
    words = ["--img_size", "8", "--rounds", "1", "--steps", "1"]
    text = run("busy_speed", *words, "--settings", "", "GOMP_SPINCOUNT=1000")
    (rows,) = read_tables(text)
    assert list(rows) == ["train.py's", "GOMP_SPINCOUNT=1000"]
    assert list(rows["GOMP_SPINCOUNT=1000"]) == [
        "images/s",
        "quiet",
        "of the first row",
        "beside 1 busy",
    ]
    assert rows["train.py's"]["of the first row"] == "100.0%"
    bad = run_script("benchmarks/busy_speed.py", "--settings", "NICE=1")
    assert_error(bad, 2, "--settings", "NICE=1", "OMP_WAIT_POLICY")


@pytest.mark.slow
def test_processes_speed_compares_several_processes_with_several_threads():
    text = run("processes_speed", *"--img_size 8 --rounds 1 --steps 1".split())
    (rows,) = read_tables(text)
    assert list(rows) == ["1 process, 2 threads", "2 processes", "without an exchange"]
    assert all(float(row["images/s"]) > 0 for row in rows.values())
    assert re.search(r"the exchange of \d+\.\d MB takes -?[\d.]+ ms", text)
