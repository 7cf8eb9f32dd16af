"""Weights that `--checkpoint` and `--init_from` name: of a run, in a folder of diffusers', or those
that come with the program; and how a new run starts from them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema import EMA
from formats.diffusers_folder import MAP, STEM, WEIGHTS, read_folder
from system.errors import CheckpointError, UsageError
from system.flags import as_flags
from system.terminal import say
from unet import Attention, GroupNorm, UNet, default_channel_mults
from utils import (
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    reading,
)

SHIPPED = Path(__file__).resolve().parents[1] / "weights"  # a folder for each name
DEFAULT = "celeba_64"
VARIANTS = ("norm_eps", "downsample_padding", "freq_shift")  # of UNet: no constants of a run


class Saved(NamedTuple):
    """What a file of weights holds."""

    path: Path
    unet: dict  # the arguments of UNet
    diffusion: dict  # the arguments of Diffusion
    settings: dict  # the constants of the run
    step: int
    model: dict[str, Tensor]  # the weights in training, by the names of UNet
    ema: dict[str, Tensor]  # their average, likewise
    contents: dict  # all of the file, as it was saved

    @classmethod
    def of(cls, path: Path, contents: dict) -> "Saved":
        """What the contents of a checkpoint are. Raises CheckpointError if a part is missing."""
        with reading(path, "use another checkpoint"):
            about = [contents[name] for name in ("unet", "diffusion", "settings", "step")]
            return cls(path, *about, contents["model"], contents["ema"]["model"], contents)


# Finding and reading -----------------------------------------------------------------------------


def open_weights(given: str | Path | None) -> Saved:
    """Read the weights that `find_checkpoint` finds; of a run the newest that are not damaged.
    Raises CheckpointError."""
    path = find_checkpoint(given)
    if path.name.startswith(STEM):
        return Saved.of(path, read_folder(path))
    if given and path == Path(given):
        return Saved.of(path, load_checkpoint(path))
    return Saved.of(*load_newest_checkpoint(path.parent.parent))


def find_checkpoint(given: str | Path | None) -> Path:
    """The file of weights that `given` names: a file; a run (its newest checkpoint); a folder of
    diffusers'; a name in `weights/`, if the current folder has no weights of that name. None or ""
    is the newest run under the current folder, or the default in `weights/` if there is no run.

    Raises CheckpointError, with what there is, if there is none."""
    if not given:
        runs = [path for path in run_checkpoints() if path.exists()]  # no dead links
        if runs:
            return max(runs, key=lambda path: (path.stat().st_mtime, path.name))
    elif Path(given).is_file():
        return Path(given)
    for folder in (Path(given or DEFAULT), SHIPPED / (given or DEFAULT)):
        if path := weights_file(folder):
            return path
        run = folder.parent if folder.name == "checkpoints" else folder
        if checkpoints := list_checkpoints(run):
            return checkpoints[0]
    what = "has no weights" if given and Path(given).exists() else "does not exist"
    runs = sorted({path.parent.parent.name for path in run_checkpoints()})
    names = runs[:10] + shipped_names()
    fix = f"name one of these: {', '.join(names)}" if names else "train first"
    raise CheckpointError(given or "--checkpoint", what, fix)


def short(path: Path) -> str:
    """A checkpoint as one would name it: weights by their folder's name, files from here."""
    if path.suffix == ".safetensors":
        return path.parent.parent.name if path.parent.name == "unet" else path.parent.name
    return os.path.relpath(path)


def shipped_names() -> list[str]:
    """The names in `weights/`, without those of the guides."""
    names = sorted(path.parent.name for path in SHIPPED.glob("*/unet"))
    return [name for name in names if not name.endswith("_guide")]


def run_checkpoints() -> Iterable[Path]:
    """The checkpoints of all runs under the current folder."""
    return Path().glob("*/checkpoints/step_*.pt")


def weights_file(folder: Path) -> Path | None:
    """The file of weights in a folder that diffusers wrote; None in all others. The average in a
    trainer's `unet_ema/` goes before `unet/`, and a file without a variant before `.fp16`."""
    for part in (folder / "unet_ema", folder / "unet", folder):
        found = sorted(part.glob(f"{STEM}*"), key=lambda p: (p.suffix == ".bin", len(p.name)))
        if found:
            return found[0]
    return folder / "unet" / WEIGHTS if (folder / "model_index.json").is_file() else None


# Starting from them ------------------------------------------------------------------------------


def network_constants(saved: Saved, img_size: int) -> dict[str, Any]:
    """The constants of `train.Config` that build the network of these weights for images of this
    size. Raises CheckpointError."""
    with reading(saved.path, "use other weights"):
        about = saved.unet
        other = ("img_size", "dropout", "num_attributes", *VARIANTS)
        constants = {name: value for name, value in about.items() if name not in other}
        mults = tuple(about["channel_mults"] or default_channel_mults(about["img_size"]))
        # Attention stands in the same stages, whatever their resolution is.
        attends = [about["img_size"] >> i in about["attn_resolutions"] for i in range(len(mults))]
        resolutions = tuple(img_size >> i for i, each in enumerate(attends) if each)
        return constants | {"channel_mults": mults, "attn_resolutions": resolutions}


def start_from(model: UNet, ema: EMA, saved: Saved, config: Any) -> None:
    """Load averaged weights into a new run's network and its average.

    config: the new run's; if it has other attributes, their map keeps its initial values. Raises
    UsageError, naming the flags, if the network is another one; CheckpointError."""
    with reading(saved.path, "use other weights"):
        attributes = tuple(saved.settings["attributes"])
        with torch.device("meta"):
            same = structure(UNet(**saved.unet)) == structure(model)
    if not same:
        theirs = network_constants(saved, config.img_size)
        wanted = {name: value for name, value in theirs.items() if value != getattr(config, name)}
        what, fix = f"{short(saved.path)} has another network", "use other weights"
        if wanted:
            fix = f"give {as_flags(wanted)}, or leave out these flags"
        raise UsageError("--init_from", what, fix)
    ours, theirs = model.state_dict(), saved.ema
    another_map = attributes != tuple(config.attributes)
    kept = {k: w for k, w in theirs.items() if k in ours and not (k == MAP and another_map)}
    for network in (model, ema.model):
        network.load_state_dict(ours | kept)
    text = f"started from {short(saved.path)}, step {saved.step}"
    if another_map:
        text += "; the attributes are learned anew" if MAP in ours else "; without its attributes"
    was = {k: v for k, v in saved.diffusion.items() if v != getattr(config, k, v)}
    say(text + (f"; note: it was trained with {as_flags(was)}" if was else ""))


def structure(unet: UNet) -> list:
    """What two networks must have in common to take the same weights and mean the same by them."""
    shapes = [(k, tuple(w.shape)) for k, w in unet.state_dict().items() if k != MAP]
    heads = [m.heads for m in unet.modules() if isinstance(m, Attention)]
    return [shapes, heads, [m.num_groups for m in unet.modules() if isinstance(m, GroupNorm)]]
