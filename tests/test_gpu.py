"""benchmarks/gpu.py, the one command for a machine with a GPU: nothing is to be mended there."""

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import needs_posix, run_script

import unet
from benchmarks import gpu, gpu_parts, peers, sample_speed, train_speed, variants
from benchmarks.common import read_tables
from benchmarks.gpu_parts import PARTS, GpuConfig
from system.errors import UsageError

TOY = GpuConfig(toy=True, device="cpu", out="out")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder with a few images."""
    monkeypatch.chdir(tmp_path)
    gpu_parts.draw_pictures()
    return tmp_path


def test_curves_of_all_precisions_stand_beside_each_other(folder):
    found = gpu_parts.curves(TOY)
    (rows,) = found["tables"]
    assert [row["step"] for row in rows] == [2, 4] and len(rows[0]) == 5
    assert all(float(row["no"]) == float(row["no compiled"]) > 0 for row in rows)
    json.dumps(found)


def test_resumed_runs_are_compared_weight_by_weight(folder):
    (rows,) = gpu_parts.resume(TOY)["tables"]
    assert [row["largest difference of weights"] for row in rows] == ["0"]
    one = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert gpu_parts.largest_difference(one, {**one, "b": torch.ones(1) * 3}) == 2


def test_images_are_compared_with_those_of_the_cpu(folder):
    (rows,) = gpu_parts.sampling(TOY)["tables"]
    assert len(rows) == 6
    assert {row["most"] for row in rows if row["precision"] == "float32"} == {"0.00"}


def test_kernels_are_listed_with_their_share(folder):
    (rows,) = gpu_parts.kernels(TOY)["tables"]
    shares = [float(row["share"].rstrip("%")) for row in rows]
    assert len(rows) == 3 and shares == sorted(shares, reverse=True) and shares[0] > 5


@pytest.mark.parametrize("toy", [True, False])
def test_the_commands_of_the_benchmarks_are_understood(monkeypatch, toy):
    commands = []
    monkeypatch.setattr(gpu_parts, "measured", lambda *command: commands.append(command))
    config = GpuConfig(toy=toy, device="cpu")
    for name, part in PARTS.items():
        if "speed" in name or "variants" in name:
            part.find_out(config)
    for script, *flags in commands:
        if "train_speed" in script:
            asked = flags.parse(train_speed.TrainSpeedConfig, flags, "")
            assert set(asked.rows) <= set(train_speed.ROWS)
            train_speed.config_of(asked)
        elif "variants" in script:
            asked = flags.parse(variants.VariantsConfig, flags, "")
            assert set(asked.variants) <= set(variants.VARIANTS)
        else:
            sample_speed.config_of(flags.parse(sample_speed.SampleSpeedConfig, flags, ""))
    assert [Path(command[0]).name for command in commands].count("train_speed.py") == 2


@pytest.fixture
def unchanged(monkeypatch):
    """What a variant changes is as it was afterwards."""
    for owner in (unet.GroupNorm, unet.Upsample):
        monkeypatch.setattr(owner, "forward", owner.forward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)


def momentum_of(changed, ours) -> torch.Tensor:
    """AdamW's averaged gradients after two steps under a loss scale, and one between that fails."""
    ours.state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    changed(ours)
    ours.step()
    ours.step_on(lambda index: (ours.batches(index)[0] * float("nan"), None))
    assert ours.state.scaler.get_scale() == 512
    ours.step()
    return torch.cat([s["exp_avg"].flatten() for s in ours.state.optimizer.state.values()])


CHANGES = {
    "norm by channels": lambda ours: setattr(unet.GroupNorm, "forward", variants.norm_by_channels),
    "transposed upsampling": lambda ours: setattr(
        unet.Upsample, "forward", variants.transposed_upsampling
    ),
    "grad_scale": variants.fold_into_adamw,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_variant_has_the_gradients_of_the_product(unchanged, name):
    options = dict(batch_size=2, num_res_blocks=1, mixed_precision="no", max_grad_norm=0.1)
    config = peers.make_config(8, 64, (1, 1), warmup_steps=0, **options)
    expected = momentum_of(lambda ours: None, peers.Ours(config, torch.device("cpu")))
    found = momentum_of(CHANGES[name], peers.Ours(config, torch.device("cpu")))
    assert (found - expected).norm() < 1e-3 * expected.norm()
    # On a CPU the product's float32 upsamples so itself; the others round in another order.
    assert torch.equal(found, expected) == (name == "transposed upsampling")


def test_variants_that_fail_or_compute_something_else_are_left_out(monkeypatch, capsys):
    class Worker(nullcontext):
        def __init__(self, make, name, *rest):
            super().__init__(self)
            self.name = name

        def __call__(self, method, *arguments):
            if self.name == "CUDA graphs" and method == "evaluations":
                raise RuntimeError("in the process:\nRuntimeError: overwritten")
            answers = {"first": [1.0, 1.2 if self.name == "grad_scale" else 1.0], "memory": 1}
            return {**answers, "saving": (2.0, 1.0)}.get(method, 0.5)

    monkeypatch.setattr(variants, "Worker", Worker)
    names = ("as it is", "CUDA graphs", "grad_scale", "not compiled")
    config = variants.VariantsConfig(rounds=1, variants=names)
    rows, saving = read_tables(variants.compare(config, torch.device("cpu")))
    assert list(rows) == ["as it is", "not compiled"]
    assert saving["checkpoint, every 1000 steps"]["a thread for the rest wins"] == "0.2%"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "CUDA graphs is left out: RuntimeError: overwritten"
    assert said[1].startswith("grad_scale is left out: it finds [1.0, 1.2]")
    with pytest.raises(RuntimeError, match="overwritten"):
        variants.compare(replace(config, variants=("CUDA graphs", "as it is")), torch.device("cpu"))


def test_parts_that_are_left_go_on_and_faults_are_kept(folder, monkeypatch):
    clock, done = [0.0], []

    def run_part(config, name, seconds):
        done.append(name)
        clock[0] += 45
        failed = "exit code 1, see b.txt" if name == "b" else ""
        rows = [] if failed else [[{"step": 1, "loss": "0.5"}]]
        return {"tables": rows, "facts": {"good": "yes"}, "failed": failed, "seconds": 45.0}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "run_part", run_part)
    some = dict(zip("abcd", PARTS.values(), strict=False))
    times = {"a": 60, "b": 60, "c": 60, "d": 999}  # the last takes longer than there is at a time
    monkeypatch.setattr(gpu, "PARTS", {k: p._replace(seconds=times[k]) for k, p in some.items()})
    config = GpuConfig(out="out", device="cpu", minutes=2.0)
    assert [gpu.run_parts(config), list(done)] == [False, ["a", "b"]]
    assert [gpu.run_parts(config), list(done)] == [False, ["a", "b", "c"]]
    assert [gpu.run_parts(config), list(done)] == [True, ["a", "b", "c", "d"]]
    assert gpu.run_parts(config) and len(done) == 4
    page = (folder / "out" / "gpu.md").read_text()
    assert "FAILED: exit code 1" in page and "- good: yes" in page and "|  0.5 |" in page
    assert json.loads((folder / "out" / "gpu.json").read_text())["parts"]["b"]["failed"]


def test_parts_and_their_sum_keep_to_the_times_that_the_documents_name():
    seconds = [part.seconds for part in PARTS.values()]
    assert max(seconds) < GpuConfig().minutes * 60 and sum(seconds) <= 3600


def test_a_part_ends_with_the_command(folder, monkeypatch):
    needs_posix()
    started, wait = [], gpu.subprocess.Popen.wait

    def stop(process, seconds=None):
        if seconds is None:
            return wait(process)
        started.append(process)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gpu.subprocess.Popen, "wait", stop)
    monkeypatch.setattr("sys.argv", "gpu.py --toy --device cpu --out out --parts curves".split())
    with pytest.raises(SystemExit, match="143"):
        gpu.main()
    signal.signal(signal.SIGTERM, before)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_part_that_hangs_is_ended(folder):
    Path("out").mkdir()
    found = gpu.run_part(TOY, "curves", seconds=0.3)
    assert found["failed"] == "not done after 0 s" and found["seconds"] < 5


def test_missing_packages_come_from_the_folder_of_wheels(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name != "tyro" or None)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: commands.append(command))
    gpu.install_missing(Path("wheels"))
    assert [command[-1] for command in commands] == gpu.PACKAGES["tyro"]
    assert all("--no-index" in command and "wheels" in command for command in commands)


def test_a_part_that_there_is_not_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--parts", "hers"])
    with pytest.raises(UsageError, match="--parts: 'hers' is none"):
        gpu.main()


@pytest.mark.slow
def test_the_whole_command_runs_at_toy_size(folder):
    words = "--toy --device cpu --out out --minutes 30".split()  # of a busy machine, too
    result = run_script("benchmarks/gpu.py", *words, timeout=1800)
    assert "all parts are done" in result.stdout, result.stdout + result.stderr
    assert not list(Path("out/work").iterdir())
    parts = json.loads(Path("out/gpu.json").read_text())["parts"]
    assert list(parts) == list(PARTS) and not [part for part in parts.values() if part["failed"]]
    codes = [parts[name]["facts"]["exit codes after SIGTERM"] for name in ("ranks", "full_size")]
    assert codes == ["[143, 143]", "[143]"]
