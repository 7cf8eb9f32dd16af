"""Weights, wherever they lie: in a run, in a folder of diffusers', or with the program; and how a
new run starts from them."""

from pathlib import Path

import torch

from engine.state import State
from formats.diffusers_format import MAP, WEIGHTS, read_folder, weights_file
from system.errors import UsageError
from system.terminal import say
from unet import Attention, GroupNorm, UNet, default_channel_mults
from utils import list_checkpoints, open_checkpoint, plain_keys, reading

SHIPPED = Path(__file__).resolve().parents[1] / "weights"  # a folder for each name
DEFAULT = "synthetic_32"


def open_weights(given: str | Path | None) -> tuple[Path, dict]:
    """Read the weights that are meant by: a checkpoint; a run's folder (its newest); a folder of
    diffusers', or its file of weights; a name in `weights/` under which none lie here; nothing: the
    newest run under the current folder, or where there is none the weights that come with the
    program.

    Returns the file, and what it holds: "unet" and "diffusion" (their arguments), "settings",
    "step", "model" and "ema". Raises CheckpointError."""
    if not given and (SHIPPED / DEFAULT).is_dir():
        given = None if any(Path().glob("*/checkpoints/step_*.pt")) else SHIPPED / DEFAULT
    if given and weights_file(SHIPPED / given) and not _holds_weights(Path(given)):
        given = SHIPPED / given
    folder = Path(given or "")
    if folder.name == WEIGHTS:
        folder = folder.parent.parent if folder.parent.name == "unet" else folder.parent
    if given and (path := weights_file(folder)):
        return path, read_folder(folder)
    return open_checkpoint(given)


def _holds_weights(folder: Path) -> bool:
    """Whether any lie there: a run that starts from weights of its name has a folder by then."""
    return bool(weights_file(folder) or list_checkpoints(folder))


def start_from(state: State, path: Path, saved: dict, config) -> None:
    """Put the averaged weights that lie in a file into a new run's network and its average.

    saved: what `open_weights` returns; config: of the new run. Where its attributes are others, the
    map of the attributes starts anew. Raises UsageError, with the flags that would fit, where the
    network is another one."""
    with reading(path, "take other weights"):
        weights, step = plain_keys(saved["ema"]["model"]), saved["step"]
        source, prediction = saved["unet"], saved["diffusion"]["prediction"]
        attributes = tuple(saved["settings"]["attributes"])
    with torch.device("meta"):
        if structure(UNet(**source)) != structure(state.model):
            what, fix = f"{path} holds another network", f"pass {fitting_flags(source, config)}"
            raise UsageError("--init_from", what, fix)
    ours = state.model.state_dict()
    anew = [MAP] if MAP in ours and attributes != tuple(config.attributes) else []
    for model in (state.model, state.ema.model):
        model.load_state_dict(ours | {k: w for k, w in weights.items() if k in ours.keys() - anew})
    text = f"started from {path}, step {step}"
    text += "; the map of the attributes starts anew" if anew else ""
    text += "; its attributes are left out" if MAP in weights.keys() - ours.keys() else ""
    text += f"; note: its output is {prediction}" if prediction != config.prediction else ""
    say(text)


def structure(unet: UNet) -> list:
    """All that makes a network take the weights of another and mean the same by them."""
    shapes = [(k, tuple(w.shape)) for k, w in unet.state_dict().items() if k != MAP]
    heads = [m.heads for m in unet.modules() if isinstance(m, Attention)]
    return [shapes, heads, [m.num_groups for m in unet.modules() if isinstance(m, GroupNorm)]]


def fitting_flags(source: dict, config) -> str:
    """The flags of train.py, as one would write them, that make it build a network from `source`,
    the arguments of a UNet, at the size of the images in `config`."""
    wanted = {name: source[name] for name in ("channels", "num_res_blocks", "head_dim")}
    mults = source["channel_mults"] or default_channel_mults(source["img_size"])
    sizes = source["attn_resolutions"], config.img_size, source["img_size"]
    wanted |= {"channel_mults": tuple(mults), "norm_groups": source.get("norm_groups", 0)}
    wanted["attn_resolutions"] = tuple(r * sizes[1] // sizes[2] for r in sizes[0])
    flags = []
    for name, value in wanted.items():
        if value != getattr(config, name, value):
            flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(flags) or "other weights"
