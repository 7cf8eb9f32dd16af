"""The benchmarks run at a tiny size, and refuse to compare what is not the same."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_posix, run_script, tensors_equal, tiny
from torch import nn
from torch.autograd import DeviceType

from benchmarks import curve, editing, gpu, quality, recipes, speed
from benchmarks.common import Worker, measure, ratio
from benchmarks.peers import PEERS, diffusers_network, forward_flops, installed, make_config
from dataset.faces import Batches, load_faces
from system.errors import UsageError
from train import train
from utils import list_checkpoints, load_checkpoint


@pytest.fixture
def features(here, fresh_imports):
    """Pictures, and a user's features, mine:of."""
    Path("mine.py").write_text("of = lambda x: x.float().unfold(2, 4, 4).mean(4).flatten(1)")


def test_rounds_alternate_and_ratios_are_taken_within_a_round():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert measure(calls, rounds=3) == {"a": [1, 4, 5], "b": [2, 3, 6]}  # abbaab
    assert ratio([1, 4, 5], [2, 3, 6]) == 5 / 6


def test_a_fault_in_a_worker_is_told():
    with pytest.raises(RuntimeError, match="invalid literal"):
        Worker(int, "no number")


def test_networks_that_differ_are_not_compared_by_flops_two_for_each_product():
    ours = speed.random_network(make_config(8, 64, (1, 2)))
    flops = forward_flops(ours, 8)
    assert flops == forward_flops(diffusers_network(ours), 8)
    ours.conv_in = nn.Sequential(ours.conv_in, nn.Conv2d(64, 64, 3, padding=1))
    assert forward_flops(ours, 8) - flops == 2 * 9 * 64 * 64 * 8 * 8
    same = {"weights": 100, "flops": 1000, "same_network": True}
    speed.check_same_network({"a": same, "b": {**same, "flops": 1, "same_network": False}})
    for key in ("weights", "flops"):
        with pytest.raises(AssertionError, match=key):
            speed.check_same_network({"a": same, "b": {**same, key: 99}})
    with pytest.raises(UsageError, match="--channels"):
        make_config(8, 48, (1,))  # which diffusers would normalise in other groups


def test_a_kernel_counts_once_in_a_profile():
    def event(key, device, us, mark=False):
        about = dict(device_type=device, is_user_annotation=mark, count=3, key=key)
        return SimpleNamespace(self_device_time_total=us, self_cpu_time_total=9, **about)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [event("aten::conv2d", cpu, 1000), event("Torch-Compiled Region", cuda, 1400, True)]
    events += [event("copy", cuda, 400), event("gemm", cuda, 1000)]
    assert speed.device_rows(events, on_gpu=True) == [("gemm", 1000, 3), ("copy", 400, 3)]
    assert speed.device_rows(events, on_gpu=False) == [("aten::conv2d", 9, 3)]


@pytest.mark.parametrize("name", [*filter(installed, PEERS)])
def test_a_peer_continues_the_training_that_was_saved(here, name):
    config, path = make_config(8, 64, (1,), batch_size=4, prediction="eps"), here / "state.pt"
    batches = Batches(load_faces("pictures", 8), config.batch_size)
    first, second = (PEERS[name](config, torch.device("cpu")) for _ in range(2))
    step, spent = quality.train_for(first, batches, path, 0.3)
    assert quality.train_for(second, batches, path, spent) == (step, spent)  # nothing is left to do
    for part, one in first.parts().items():
        assert tensors_equal(one.state_dict(), second.parts()[part].state_dict()), part
    further, _ = quality.train_for(second, batches, path, spent + 0.3)
    assert further > step and load_checkpoint(path)["step"] == further
    images = second.generate(3, 2, seed=1)
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1
    assert torch.equal(second.generate(3, 2, seed=1), images)


def test_quality_measures_the_run_and_its_peers(features):
    train(tiny(num_training_steps=2))
    config = dict(checkpoint="run", path_to_data="pictures", minutes=0.01, steps=(3,), num_images=4)
    config |= dict(samplers=("dpm++:2",), features="mine:of", peer_channels=64, device="cpu")
    found = quality.compare(quality.QualityConfig(**config, peers=("diffusers",)))["samplers"]
    assert list(found) == ["dpm++:2", "diffusers:3", "real faces (the floor)"]
    assert all(one["frechet"] > 0 for one in found.values())
    assert json.loads(Path("quality/quality.json").read_text())["samplers"] == found


def test_the_error_of_a_distance_is_as_large_as_it_varies():
    random = np.random.default_rng(0)
    reference = random.normal(size=(2000, 4))
    measured = [curve.distance(reference, random.normal(size=(200, 4))) for _ in range(60)]
    values, errors = np.array(measured).T
    assert 0.6 < np.median(errors) / values.std() < 1.6


def test_recipes_train_for_the_flops_and_the_curve_measures_each_checkpoint(features):
    muon = "channels=8 channel_mults=1,2 head_dim=8 attn_resolutions=4 batch_size=4 norm_groups=4"
    muon += " num_samples=2 attributes= optimizer=muon"
    adamw = muon.replace("muon", "adamw")
    flops, less = (recipes.update_flops(recipes.read_recipe(text, 8)) for text in (muon, adamw))
    wish = dict(teraflops=3e-12 * flops, path_to_data="pictures", img_size=8, seeds=(0,))
    wish |= dict(features="mine:of", num_images=20, steps=(2,), autoguidance=(1.0, 2.0))
    both = (muon, f"{adamw} num_training_steps=5")
    found = recipes.compare(recipes.Recipes(recipes=both, **wish))
    assert [one["images"] for one in found] == [12, 20] and flops > less
    assert len({value for one in found for value, _ in one["distances"].values()}) == 4

    paths = tuple(map(str, list_checkpoints(Path(found[0]["folder"]))))
    config = dict(path_to_data="pictures", features="mine:of", num_images=20, steps=(2,))
    measured = curve.measure(curve.CurveConfig(paths, **config, device="cpu"))
    assert [one["step"] for one in measured] == [3, 2, 1] and "held_out_loss" in measured[0]
    assert measured[0]["distances"]["2 steps"] == pytest.approx(found[0]["distances"]["2 steps"])
    with pytest.raises(UsageError, match="--recipes"):
        recipes.read_recipe("optimizer")


def test_changes_count_what_faces_have_and_keep(capsys):
    """The classifier reads two attributes off two pixels; each change sets the second one, too."""
    judge = lambda x: x[:, 0, 0, :2]  # noqa: E731
    faces = torch.ones(5, 3, 8, 8)
    faces[:, 0, 0, :2] = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1], [1, -1]])

    def edit(attributes, **options):
        changed = faces.clone()
        changed[:, 0, 0, attributes[0].argmax()] = changed[:, 0, 0, 1] = 1
        return [changed]

    editing.change(edit, faces, faces, judge)
    assert capsys.readouterr().out.count("| 100.0% |         80.0% |") == 3


def test_gpu_does_every_part_at_toy_size_and_ends_with_its_minutes(here, monkeypatch, capsys):
    needs_posix()
    result = run_script("benchmarks/gpu.py", "--toy", new=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    verdicts = {n: json.loads(Path(f"gpu/{n}.json").read_text())["verdict"] for n in gpu.PARTS}
    assert verdicts.pop("training").startswith("failed: ")  # a CPU is not 2.5 times as fast
    assert all(verdict.startswith("passed: ") for verdict in verdicts.values()), verdicts
    monkeypatch.setattr("sys.argv", ["gpu.py", "--toy", "--minutes", "0", "--parts", "resume"])
    gpu.main()
    assert capsys.readouterr().out == "resume: failed: no time left\n"
    assert not multiprocessing.active_children()
