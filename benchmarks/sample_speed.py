"""How fast this project generates images, beside diffusers with the same weights.

    python benchmarks/sample_speed.py                         # 32 px, 64 channels; 1000 steps last
    python benchmarks/sample_speed.py --ddpm_steps 0 --rounds 5    # without the slow sampler
    python benchmarks/sample_speed.py --img_size 64 --channels 128 --channel_mults 1 2 2 2 4

    pip install -r requirements-test.txt

A checkpoint with random weights is written; this project generates from it as `sample.py` does, and
diffusers with its own network, which holds the same weights, in its DDIMPipeline and DDPMPipeline,
the latter also with DPMSolverMultistepScheduler. Each has a process of its own; they compute in
turn, round after round, and ratios are taken within a round: as each generates where it is told
nothing (this project in half precision where the machine has it, diffusers in float32), and both in
either precision. Before that DDIM's images, in float32 from the same noise at the same timesteps,
are asserted to agree to half a grey level.
"""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import samplers
from benchmarks.common import (
    Worker,
    empty_cache,
    find_device,
    machine,
    measure,
    ratio,
    seconds_of,
)
from benchmarks.peers import diffusers_network, make_config
from diffusion import Diffusion
from engine.state import diffusion_arguments, unet_arguments
from generate import generate, load_trained
from system import flags
from system.device import autocast_dtype, keep_freed_memory
from system.errors import UsageError
from system.flags import check_ranges, constant
from system.terminal import table
from train import Config
from unet import UNet
from utils import save_checkpoint

HALF_A_GREY_LEVEL = 1 / 255  # images are in [-1, 1], in 255 steps
# As diffusers names them:
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SCHEDULERS = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}
SCHEDULERS["ddpm"] = "DDPMScheduler"  # last: it takes most steps


@dataclass(frozen=True)
class SampleSpeedConfig:
    """What to generate, and how long."""

    img_size: int = 32  # pixels of a side
    channels: int = 64  # channels of the first stage
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)  # times `channels`, for each stage
    num_images: int = constant(64, least=1)  # images to generate, all in one batch
    steps: tuple[int, ...] = constant((10, 20, 50), least=2, most=1000)  # of ddim and dpm++
    ddpm_steps: int = constant(1000, least=0, most=1000)  # of ddpm; 0: leave it out
    rounds: int = constant(3, least=1)  # turns that every row has
    ddpm_rounds: int = constant(1, least=1)  # turns that ddpm has
    device: str = ""  # cpu or cuda; empty: the GPU where there is one


def config_of(config: SampleSpeedConfig) -> Config:
    """The constants of the network and its diffusion. Raises UsageError."""
    check_ranges(config)
    if not config.steps and not config.ddpm_steps:
        raise UsageError("--steps", "and --ddpm_steps leave nothing to generate", "give either")
    return make_config(config.img_size, config.channels, config.channel_mults, prediction="eps")


def random_network(train_config: Config) -> UNet:
    """A network whose weights are all random: no layer is left at zero."""
    torch.manual_seed(0)
    model = UNet(**unet_arguments(train_config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def write_checkpoint(train_config: Config, path: Path) -> None:
    """A checkpoint as `sample.py` reads it."""
    weights = random_network(train_config).state_dict()
    networks = {
        "unet": unet_arguments(train_config),
        "diffusion": diffusion_arguments(train_config),
    }
    networks |= {"model": weights, "ema": {"model": weights, "num_updates": 0}}
    save_checkpoint(path, {"settings": asdict(train_config), "step": 0, **networks})


class Ours:
    """This project, as `sample.py` runs it; half: whether in half precision."""

    def __init__(self, path: Path, device: torch.device, half: bool):
        keep_freed_memory()
        self.device = device
        self.trained = load_trained(path, device=device.type, half=half)

    def generate(self, sampler: str, steps: int, num_images: int) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the CPU."""
        options = dict(batch_size=num_images, sampler=sampler, steps=steps)
        return torch.cat([x.cpu() for x in generate(self.trained, range(num_images), **options)])

    def time(self, sampler: str, steps: int, num_images: int) -> float:
        """Seconds for the images."""
        seconds = seconds_of(lambda: self.generate(sampler, steps, num_images), self.device)
        empty_cache(self.device)
        return seconds


class Diffusers:
    """diffusers' pipelines with our weights. half: on a GPU with weights in float16, as it advises;
    on a CPU, where its pipelines cannot have that, under autocast."""

    def __init__(self, path: Path, device: torch.device, half: bool):
        trained = load_trained(path, device="cpu", half=False)
        names = {field.name for field in fields(Config)}
        settings = {name: value for name, value in trained.settings.items() if name in names}
        self.train_config, self.ours = Config(**settings), trained.model
        self.device, self.network = device, diffusers_network(self.ours).eval().to(device)
        self.autocast = half and device.type == "cpu"
        if half and not self.autocast:
            self.network.half()

    def generate(self, sampler: str, steps: int, num_images: int) -> Tensor:
        """(N, 3, H, W) in [-1, 1], on the CPU."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return generate_with_diffusers(
                self.network, self.train_config, sampler, steps, num_images
            )

    def time(self, sampler: str, steps: int, num_images: int) -> float:
        """Seconds for the images."""
        seconds = seconds_of(lambda: self.generate(sampler, steps, num_images), self.device)
        empty_cache(self.device)
        return seconds

    def compare(self, steps: int, num_images: int) -> tuple[float, int]:
        """Assert that this network is ours. Returns the largest difference of their images and
        the number of their weights."""
        networks = (self.ours.to(self.device), self.network)
        weights = [sum(p.numel() for p in network.parameters()) for network in networks]
        assert weights[0] == weights[1], f"not the same number of weights: {weights}"
        return largest_difference(*networks, self.train_config, steps, num_images), weights[0]


def generate_with_diffusers(
    network: nn.Module,
    train_config: Config,
    sampler: str,
    steps: int,
    num_images: int,
    seed: int = 0,
    **options,
) -> Tensor:
    """(N, 3, H, W) in [-1, 1], on the CPU, from the noise of that seed."""
    import diffusers

    schedule = SCHEDULES[train_config.noise_schedule]
    make = getattr(diffusers, SCHEDULERS[sampler])
    scheduler = make(train_config.num_timesteps, beta_schedule=schedule)
    make = diffusers.DDIMPipeline if sampler == "ddim" else diffusers.DDPMPipeline
    pipeline = make(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options |= dict(num_inference_steps=steps, generator=generator, output_type="np")
    images = pipeline(batch_size=num_images, **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


def largest_difference(
    ours: nn.Module, theirs: nn.Module, train_config: Config, steps: int, num_images: int
) -> float:
    """Between the two networks' images of DDIM, in float32: asserted to be below half a grey
    level. Both start at the same noise and take diffusers' timesteps, each T / steps apart."""
    device = next(ours.parameters()).device
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    options = dict(eta=0.0, use_clipped_model_output=True)
    expected = generate_with_diffusers(theirs, train_config, "ddim", steps, num_images, **options)
    diffusion = Diffusion(**diffusion_arguments(train_config), device=device)
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    options = dict(sampler="ddim", steps=steps, x_T=noise)
    with patch.object(samplers, "even_timesteps", lambda T, n: torch.arange(n) * (T // n)):
        images = diffusion.sample(ours, expected.shape, **options).cpu()
    torch.backends.cudnn.allow_tf32 = tf32
    difference = float((images - expected).abs().max())
    assert expected.std() > 0.1, "empty images agree too easily"
    assert difference < HALF_A_GREY_LEVEL, f"the images differ by up to {difference}"
    return difference


def run_rows(config: SampleSpeedConfig, path: Path, device: torch.device) -> list[dict[str, str]]:
    """The lines of the table, by column. Before them the images are compared."""
    quick = [sampler for sampler in SCHEDULERS if sampler != "ddpm"]
    kinds = [(sampler, n, config.rounds) for sampler in quick for n in config.steps]
    if config.ddpm_steps:
        kinds.append(("ddpm", config.ddpm_steps, config.ddpm_rounds))
    makers = {"ours": (Ours, path, device, False), "diffusers": (Diffusers, path, device, False)}
    ratios = [("x in float32", "diffusers", "ours")]
    if autocast_dtype("fp16", device) is not None:
        makers["ours half"] = (Ours, path, device, True)
        makers["diffusers half"] = (Diffusers, path, device, True)
        ratios.append(("x in half", "diffusers half", "ours half"))
        ratios.append(("x as they come", "diffusers", "ours half"))
    lines = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(*row)) for name, row in makers.items()}
        steps, count = min(config.steps, default=10), min(8, config.num_images)
        difference, weights = workers["diffusers"]("compare", steps, count)
        print(
            f"checked: both hold {weights:,} weights, and {count} images of DDIM at {steps}"
            f" steps differ by at most {difference:.1e}, of a range of 2"
        )
        for sampler, steps, rounds in kinds:
            calls = {}
            for name, worker in workers.items():
                worker("time", sampler, min(steps, 4), config.num_images)  # warms up
                calls[name] = partial(worker, "time", sampler, steps, config.num_images)
            seconds = measure(calls, rounds)
            line = {"sampler": sampler, "steps": f"{steps}"}
            line |= {f"{name} s": f"{median(each):.3g}" for name, each in seconds.items()}
            for column, theirs, ours in ratios:
                line[column] = f"{ratio(seconds[theirs], seconds[ours]):.2f}"
            lines.append(line)
    return lines


def main() -> None:
    """The command line."""
    description = "How fast this project generates images, beside diffusers with the same weights."
    config = flags.parse(SampleSpeedConfig, sys.argv[1:], description)
    train_config, device = config_of(config), find_device(config.device)
    about_machine = machine(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        write_checkpoint(train_config, path)
        lines = run_rows(config, path, device)
    rows = [list(line.values()) for line in lines]
    print(f"\n{table(list(lines[0]), rows)}\n")
    print(
        f"{config.num_images} images of {config.img_size} px in a batch, {config.rounds} rounds"
        f" (ddpm: {config.ddpm_rounds})"
    )
    print(about_machine)


if __name__ == "__main__":
    flags.run(main)
