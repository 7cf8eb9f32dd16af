"""The command that converts weights to diffusers, and back."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import assert_error, run_script, tensors_equal, tiny, write_pictures

from convert import ConvertConfig, convert
from system.errors import UsageError, UserError
from train import train
from utils import list_checkpoints, load_checkpoint

WIDE = dict(channels=64, channel_mults=(1, 1), head_dim=64, num_timesteps=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, `run`, and the same for diffusers, `folder`."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("made"))
    write_pictures(Path(), 22)
    train(tiny(**WIDE, num_training_steps=3))
    convert(ConvertConfig(to_diffusers="run", out="folder"))
    yield Path().resolve()
    patch.undo()


@pytest.fixture
def there(made, tmp_path, monkeypatch):
    """A folder of the test's own with the run and its folder for diffusers."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def newest(folder):
    return load_checkpoint(list_checkpoints(Path(folder))[0])


def test_command_converts_there_and_back(there):
    result = run_script("convert.py", "--to_diffusers", "run", "--out", "there", "--half", new=True)
    assert result.returncode == 0 and "there" in result.stdout, result.stderr
    result = run_script("convert.py", "--from_diffusers", "folder", "--out", "back")
    assert result.returncode == 0, result.stderr
    saved, ours = newest("back"), newest("run")
    assert saved["step"] == 3 and saved["settings"]["img_size"] == 8
    assert tensors_equal(saved["ema"]["model"], ours["ema"]["model"])
    assert saved["diffusion"] == ours["diffusion"]


def test_converted_weights_cannot_be_resumed_and_the_error_says_how_to_go_on(there):
    convert(ConvertConfig(from_diffusers="folder", out="back"))
    words = "--experiment_name back --path_to_data pictures --resume".split()
    assert_error(run_script("train.py", *words), 4, "holds weights only", "--init_from back")


def test_nothing_of_the_machine_is_in_the_folder(there):
    settings = json.loads((there / "folder" / "run.json").read_text())["settings"]
    assert not settings.keys() & {"experiment_name", "path_to_data", "init_from"}
    assert str(there) not in "".join(path.read_text() for path in there.glob("folder/**/*.json"))


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(), "--to_diffusers: there is not one thing"),
        (dict(to_diffusers="run", from_diffusers="folder", out="x"), "not one thing"),
        (dict(to_diffusers="run"), "--out: is not given"),
        (dict(to_diffusers="run", out="folder"), "--out: folder exists"),
        (dict(to_diffusers="run", out="x", condition=("Smiling",)), "--condition"),
        (dict(from_diffusers="run", out="x"), "--from_diffusers"),
        (dict(from_diffusers="folder", out="x", half=True), "--half"),
        (dict(from_diffusers="nothing", out="x"), "nothing: does not exist"),
    ],
)
def test_mistakes_are_refused_and_write_nothing(there, flags, part):
    with pytest.raises(UserError, match=part):
        convert(ConvertConfig(**flags))
    assert not (there / "x").exists()


def test_mistake_of_the_command_is_one_error(there):
    assert_error(
        run_script("convert.py", "--from_diffusers", "pictures", "--out", "x"), 4, "has no"
    )


def test_network_that_cannot_be_expressed_is_one_error_and_writes_nothing(here):
    train(tiny(num_training_steps=1, channels=24, head_dim=24))
    with pytest.raises(UsageError, match="cannot be expressed in diffusers .norm_groups: "):
        convert(ConvertConfig(to_diffusers="run", out="folder"))
    assert not Path("folder").exists()
