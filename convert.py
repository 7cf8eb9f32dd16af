"""Convert weights to diffusers, and back.

    python convert.py --to_diffusers my_run --out folder      # DDPMPipeline.from_pretrained(folder)
    python convert.py --to_diffusers my_run --condition Smiling Eyeglasses=-1 --out folder
    python convert.py --from_diffusers folder --out my_run    # a checkpoint of this program

sample.py, evaluate.py and train.py --init_from also read a folder of diffusers without conversion.
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
from utils import checkpoint_path, save_checkpoint

# Settings of a run that are not written into a folder to share: they say nothing about the weights.
PRIVATE = ("experiment_name", "path_to_data", "init_from", "resume")


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and where to."""

    to_diffusers: str = ""  # weights for diffusers: a run, a checkpoint, a name in weights/
    from_diffusers: str = ""  # a folder of diffusers to write as a run
    out: str = ""  # the folder to write, new or empty
    condition: tuple[str, ...] = ()  # attributes to build in for good: Smiling Male=-1
    half: bool = False  # write the weights in float16, half the size


def check_config(config: ConvertConfig) -> None:
    """Raise UsageError, naming the flag, for flags that do not go together."""
    check_ranges(config)
    if bool(config.to_diffusers) == bool(config.from_diffusers):
        fix = "give one of --to_diffusers and --from_diffusers"
        raise UsageError("--to_diffusers", "there is not one thing to convert", fix)
    if config.from_diffusers and (config.condition or config.half):
        flag = "--condition" if config.condition else "--half"
        raise UsageError(flag, "goes with --to_diffusers only", "leave it out")
    if not config.out:
        raise UsageError("--out", "is not given", "name the folder to write")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("--out", f"{out} exists and is not empty", "choose another name")


def to_diffusers(config: ConvertConfig, out: Path) -> None:
    """Write averaged weights as a folder that diffusers loads."""
    trained = load_trained(config.to_diffusers, device="cpu", half=False)
    settings, diffusion = trained.settings, open_weights(trained.path).diffusion
    if obstacle := diffusers_obstacle(trained.model, diffusion["prediction"]):
        what = f"{trained.path} cannot be expressed in diffusers ({obstacle})"
        raise UsageError("--to_diffusers", what, "train another network")
    kept = {name: value for name, value in settings.items() if name not in PRIVATE}
    condition = None
    if config.condition:
        condition = read_condition(SampleConfig(condition=config.condition), trained)
        kept |= {"attributes": (), "usual_attributes": (), "condition": config.condition}
    run = {"step": trained.step, "settings": kept}
    write_folder(out, trained.model, diffusion, run, condition, config.half)


def from_diffusers(config: ConvertConfig, out: Path) -> None:
    """Write the weights in a folder of diffusers as the checkpoint of a run."""
    saved = open_weights(config.from_diffusers)
    if saved.path.suffix != ".safetensors":
        what, fix = f"{saved.path} is not from diffusers", "name a folder with a model_index.json"
        raise UsageError("--from_diffusers", what, fix)
    save_checkpoint(checkpoint_path(out, saved.step), saved.contents)


def convert(config: ConvertConfig) -> Path:
    """Convert what the config says. Returns the folder written. Raises UserError."""
    check_config(config)
    out = Path(config.out)
    (to_diffusers if config.to_diffusers else from_diffusers)(config, out)
    say(f"{config.to_diffusers or config.from_diffusers} is converted, in {out}")
    return out


def main() -> None:
    """The command line: ConvertConfig's flags."""
    convert(flags.parse(ConvertConfig, sys.argv[1:], "Convert weights to diffusers, and back."))


if __name__ == "__main__":
    flags.run(main)
