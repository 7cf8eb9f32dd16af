"""Write weights as a folder that diffusers loads.

    python convert.py --checkpoint my_run --out folder      # DDPMPipeline.from_pretrained("folder")
    python convert.py --checkpoint my_run --condition Smiling Eyeglasses=-1 --out folder

sample.py, evaluate.py and train.py --init_from read such a folder without conversion.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from formats.diffusers_folder import diffusers_obstacle, write_folder
from formats.weights import open_weights
from generate import load_trained
from sample import SampleConfig, read_condition
from system import flags
from system.errors import UsageError
from system.flags import check_ranges
from system.terminal import say

# Settings of a run that are not written into a folder to share: they say nothing about the weights.
PRIVATE = ("experiment_name", "path_to_data", "init_from", "resume")


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and where to."""

    checkpoint: str = ""  # a run, a file in it, a diffusers folder, shipped weights; "": newest run
    out: str = ""  # the folder to write, new or empty
    condition: tuple[str, ...] = ()  # attributes to build in for good: Smiling Male=-1
    half: bool = False  # write the weights in float16, half the size


def check_config(config: ConvertConfig) -> None:
    """Raise UsageError, naming the flag, for what is not possible whatever the checkpoint."""
    check_ranges(config)
    if not config.out:
        raise UsageError("--out", "is not given", "name the folder to write")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("--out", f"{out} exists and is not empty", "choose another name")


def convert(config: ConvertConfig) -> Path:
    """Write averaged weights as a folder that diffusers loads. Returns it. Raises UserError."""
    check_config(config)
    out = Path(config.out)
    trained = load_trained(config.checkpoint or None, device="cpu", half=False)
    settings, diffusion = trained.settings, open_weights(trained.path).diffusion
    if obstacle := diffusers_obstacle(trained.model, diffusion["prediction"]):
        what = f"{trained.path} cannot be expressed in diffusers ({obstacle})"
        raise UsageError("--checkpoint", what, "train another network")
    kept = {name: value for name, value in settings.items() if name not in PRIVATE}
    condition = None
    if config.condition:
        condition = read_condition(SampleConfig(condition=config.condition), trained)
        kept |= {"attributes": (), "usual_attributes": (), "condition": config.condition}
    run = {"step": trained.step, "settings": kept}
    write_folder(out, trained.model, diffusion, run, condition, config.half)
    say(f"{trained.path} is converted, in {out}")
    return out


def main() -> None:
    """The command line: ConvertConfig's flags."""
    convert(flags.parse(ConvertConfig, sys.argv[1:], "Write weights for diffusers."))


if __name__ == "__main__":
    flags.run(main)
