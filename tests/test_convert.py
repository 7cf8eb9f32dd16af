"""The command that writes weights for diffusers."""

import json
from pathlib import Path

import pytest
from conftest import run_script, tensors_equal, tiny

from convert import ConvertConfig, convert
from formats.weights import open_weights
from system.errors import UsageError, UserError
from train import train


def test_command_writes_weights_that_are_read_without_conversion(there):
    result = run_script("convert.py", "--checkpoint", "run", "--out", "there", "--half", new=True)
    assert result.returncode == 0 and "there" in result.stdout, result.stderr
    saved, ours = open_weights("folder"), open_weights("run")
    assert saved.step == 3 and saved.settings["img_size"] == 8
    assert tensors_equal(saved.ema, ours.ema)
    assert saved.diffusion == ours.diffusion


def test_nothing_of_the_machine_is_in_the_folder(converted):
    settings = json.loads((converted / "folder" / "run.json").read_text())["settings"]
    assert not settings.keys() & {"experiment_name", "path_to_data", "init_from"}
    texts = [path.read_text() for path in converted.glob("folder/**/*.json")]
    assert not [text for text in texts if str(converted) in text]


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(), "--out: is not given"),
        (dict(out="folder"), "--out: folder exists"),
        (dict(out="x", condition=("Smiling",)), "--condition"),
        (dict(out="x", checkpoint="pictures"), "pictures: has no weights"),
    ],
)
def test_mistakes_are_refused_and_write_nothing(there, flags, part):
    with pytest.raises(UserError, match=part):
        convert(ConvertConfig(**{"checkpoint": "run"} | flags))
    assert not (there / "x").exists()


def test_network_that_cannot_be_expressed_is_one_error_and_writes_nothing(here):
    train(tiny(num_training_steps=1, channels=24, head_dim=24))
    with pytest.raises(UsageError, match="cannot be expressed in diffusers .norm_groups: "):
        convert(ConvertConfig(checkpoint="run", out="folder"))
    assert not Path("folder").exists()
