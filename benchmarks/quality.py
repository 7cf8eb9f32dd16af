"""How good the pictures of a run are beside those of its peers after as many minutes of training.

    python benchmarks/quality.py --checkpoint my_first_diffusion --path_to_data celeba --minutes 20

    pip install -r requirements-test.txt denoising-diffusion-pytorch

The run is one of train.py's, and --minutes what it took. On its faces and for as long, diffusers
trains its UNet2DModel of the same shape as its unconditional example does (batch 16, learning rate
1e-4 on a cosine, linear noise schedule, EMA, half precision where the machine has it), and
denoising-diffusion-pytorch a Unet of as many FLOPs as its Trainer does. They find their batches
ready, flipped at random. Each draws by its own samplers; evaluate.py's measures compare them.

Stopped, it goes on from what it kept in --out: the training to the minute, and all pictures."""

import contextlib
import hashlib
import io
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cli
import evaluate
from benchmarks.common import find_device, machine
from benchmarks.peers import DTYPES, DenoisingDiffusionPytorch, Diffusers, make_config
from benchmarks.sample_speed import draw_with_diffusers
from dataset import Batches, Faces, load_faces
from errors import UsageError
from evaluate import Drawn, Evaluate
from features import find_features
from log import say
from sample import load_trained
from train import Config
from utils import autocast_dtype, load_checkpoint, save_checkpoint, save_json

PEERS = ("diffusers", "denoising-diffusion-pytorch")
SAVE_EVERY = 60  # seconds of training


@dataclass(frozen=True)
class Quality:
    """What to compare, and how."""

    checkpoint: str = ""  # a run's folder (its newest), a file in it; empty: the newest run here
    path_to_data: str = "data"  # the faces it was trained on, as for train.py
    minutes: float = 20.0  # that it took, and that each peer gets
    peers: tuple[str, ...] = PEERS  # who to compare with
    samplers: tuple[str, ...] = ("dpm++:20",)  # of this project, as for evaluate.py
    steps: tuple[int, ...] = (50, 1000)  # evaluations of the peers' own samplers
    num_images: int = 1000  # pictures drawn by each sampler
    features: str = "inception"  # for the distances, as for evaluate.py
    feature_size: int = 0  # pixels that pictures are resized to for them; 0: as they are
    batch_size: int = 64  # pictures drawn at a time
    out: str = "quality"  # folder for the peers' training, their pictures and the result
    device: str = ""  # cpu or cuda; empty: the GPU where there is one


class DiffusersRun(Diffusers):
    """diffusers' example, training on what it is fed."""

    def feed(self, x_0: Tensor, step: int, progress: float) -> None:
        """Take the next batch, and the learning rate of that step, at that share of the time."""
        self.clean = x_0
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * progress))

    def parts(self) -> dict:
        """All that training changes."""
        names = ("network", "optimizer", "ema", "scaler")
        return {name: getattr(self, name) for name in names}

    def draw(self, config: Config, steps: int, count: int, seed: int) -> Tensor:
        """(N, 3, H, W) in [-1, 1], by its DDPMPipeline from the averaged weights."""
        parameters, dtype = list(self.network.parameters()), DTYPES[self.precision]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            images = draw_with_diffusers(self.network, config, "ddpm", steps, count, seed)
        self.ema.restore(parameters)
        return images


class DenoisingDiffusionPytorchRun(DenoisingDiffusionPytorch):
    """denoising-diffusion-pytorch's Trainer, training on what it is fed."""

    def feed(self, x_0: Tensor, step: int, progress: float) -> None:
        """Take the next batch; the learning rate stays."""
        self.images = (x_0 + 1) / 2

    def parts(self) -> dict:
        """All that training changes; the average holds the network too."""
        return {"optimizer": self.optimizer, "ema": self.ema}

    def draw(self, config: Config, steps: int, count: int, seed: int) -> Tensor:
        """(N, 3, H, W) in [-1, 1], by its sampler from the averaged weights: DDIM for fewer steps
        than it was trained with."""
        torch.manual_seed(seed)
        model = self.ema.ema_model
        model.sampling_timesteps, model.is_ddim_sampling = steps, steps < model.num_timesteps
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each batch
            return (model.sample(batch_size=count) * 2 - 1).cpu()


def make_peer(name: str, config: Config, device: torch.device):
    """One of PEERS, untrained."""
    if name == "diffusers":
        dtype = autocast_dtype("fp16", device)
        return DiffusersRun(config, device, next(n for n, d in DTYPES.items() if d == dtype))
    return DenoisingDiffusionPytorchRun(config, device)


def train_for(peer, batches: Batches, path: Path, seconds: float) -> tuple[int, float]:
    """Train for so many seconds, those included that `path` tells of. Returns steps and seconds."""
    step, spent = 0, 0.0
    if path.exists():
        kept = load_checkpoint(path)
        step, spent = kept["step"], kept["seconds"]
        for name, part in peer.parts().items():
            part.load_state_dict(kept[name])
    saved = spent
    with tqdm(total=round(seconds), initial=round(spent), unit="s", disable=None) as bar:
        while spent < seconds:
            started = time.perf_counter()
            peer.feed(batches(step)[0], step, spent / seconds)
            peer.step()  # reads the loss, so it ends when the device is done
            step, spent = step + 1, spent + time.perf_counter() - started
            bar.update(int(spent) - bar.n)
            if spent >= min(saved + SAVE_EVERY, seconds):
                state = {name: part.state_dict() for name, part in peer.parts().items()}
                save_checkpoint(path, {"step": step, "seconds": spent, **state})
                saved = spent
    return step, spent


def draw_peer(wish: Quality, name: str, peer, config: Config, steps: int, folder: Path) -> Drawn:
    """The peer's pictures by its sampler with that many evaluations; `folder` keeps them."""
    parts = evaluate.chunks(wish.num_images, wish.batch_size, folder)
    missing = [part for part in parts if not part[1].exists()]
    for numbers, path in tqdm(missing, f"drawing, {name}:{steps}", disable=None):
        evaluate.keep_drawn(path, lambda n=numbers: peer.draw(config, steps, len(n), n.start))
    return evaluate.read_drawn(f"{name}:{steps}", parts)


def run_peer(wish: Quality, name: str, config: Config, faces: Faces, digest: str) -> list[Drawn]:
    """Train one of PEERS, or go on with it, and let it draw."""
    device = find_device(wish.device)
    peer = make_peer(name, config, device)
    folder = Path(wish.out) / f"{name}_{wish.minutes:g}_minutes_{digest}"
    batches = Batches(faces, config.batch_size, config.seed, device=device)
    step, spent = train_for(peer, batches, folder / "state.pt", wish.minutes * 60)
    weights = sum(p.numel() for p in peer.network.parameters()) / 1e6
    seen = f"{step * config.batch_size:,} faces seen in {spent / 60:.1f} minutes"
    say(f"{name}: {weights:.3g} M weights, {seen}, in {peer.precision}")
    return [
        draw_peer(wish, name, peer, config, steps, folder / f"drawn_{steps}")
        for steps in wish.steps
    ]


def check_flags(wish: Quality) -> None:
    """Raise UsageError for what cannot be."""
    for name in ("minutes", "num_images", "batch_size"):
        if not getattr(wish, name) > 0:
            raise UsageError(f"--{name}", f"is {getattr(wish, name)}", "give a number above 0")
    if unknown := [name for name in wish.peers if name not in PEERS]:
        raise UsageError("--peers", f"{unknown[0]!r} is none", f"choose of {', '.join(PEERS)}")
    if not wish.steps or not all(1 <= steps <= 1000 for steps in wish.steps):
        raise UsageError("--steps", f"is {wish.steps}", "give numbers from 1 to 1000")


def compare(wish: Quality) -> Path:
    """Train, draw, measure. Returns the path of quality.json. Raises UserError."""
    check_flags(wish)
    device = find_device(wish.device)
    trained = load_trained(wish.checkpoint or None, device=device.type)
    settings = trained.settings
    names = ("num_res_blocks", "attn_resolutions", "head_dim")
    shape = {name: settings[name] for name in names}
    shape |= dict(channel_mults=settings["channel_mults"], channels=settings["channels"])
    changes = dict(batch_size=16, noise_schedule="linear", prediction="eps")
    config = make_config(settings["img_size"], **shape, **changes)
    same = ("path_to_data", "num_images", "samplers", "features", "feature_size", "batch_size")
    wanted = Evaluate(str(trained.path), **{name: getattr(wish, name) for name in same})
    evaluate.check_flags(wanted)
    evaluate.check_samplers(wanted, trained.diffusion.num_timesteps)
    features = find_features(wish.features, wish.feature_size, device.type)
    data = (wish.path_to_data, trained.img_size, settings["only"], settings["attributes"])
    faces = load_faces(*data)
    real = evaluate.split_real(wanted, faces)
    say(f"{trained.path}, step {trained.step}, against {faces.description}")
    if faces.fingerprint != settings["faces"]:
        say(f"note: it was trained on other faces ({settings['faces']})")

    drawn = []
    for text in wish.samplers:
        digest = evaluate.drawn_from(trained, faces)
        parts = evaluate.chunk_files(wanted, Path(wish.out), digest, text)
        evaluate.draw_missing(wanted, trained, faces, text, parts)
        drawn.append(evaluate.read_drawn(text, parts))
    digest = hashlib.sha256(f"{config} {faces.fingerprint}".encode()).hexdigest()[:12]
    for name in wish.peers:
        drawn += run_peer(wish, name, config, faces, digest)

    result = {"flags": asdict(wish), "faces": faces.fingerprint, "num_reference": len(real[1])}
    result |= evaluate.measure_pictures(wanted, faces, features, drawn, real)[0]
    evaluate.draw_samplers(Path(wish.out) / "pictures.png", drawn)
    save_json(Path(wish.out) / "quality.json", result)
    evaluate.report(wanted, result)
    say(f"\nwritten to {wish.out}\n{machine(device)}")
    return Path(wish.out) / "quality.json"


def main() -> None:
    """The command line: Quality's flags."""
    description = "Compare a run's pictures with its peers' after the same minutes of training."
    compare(cli.parse(Quality, sys.argv[1:], description))


if __name__ == "__main__":
    cli.run(main)
