"""Three ways to train a network: the step of this project, of diffusers' unconditional example, and
of denoising-diffusion-pytorch's Trainer, each as its own code takes it.

    pip install diffusers denoising-diffusion-pytorch
"""

import contextlib
import copy
import importlib.util
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import seconds_of
from dataset.faces import Batches, Faces
from diffusion import Diffusion
from engine.log import Meter
from engine.run import Run
from engine.state import diffusion_arguments, make_state, unet_arguments
from formats.diffusers_folder import to_diffusers
from system.cpu import pinned_threads
from system.device import autocast_dtype, compile_network, set_up_device
from system.errors import UsageError
from train import Config, check_config, loss_of, train_step
from unet import UNet, default_channel_mults

PRECISIONS = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# As diffusers names them.
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SCHEDULERS = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}
SCHEDULERS["ddpm"] = "DDPMScheduler"


def make_config(img_size: int, channels: int, channel_mults: tuple[int, ...], **changes) -> Config:
    """The constants of a network that diffusers can build too, without dropout, because the peers
    train without it. Raises UsageError."""
    if channels < 64 or channels % 32:
        fix = "give a multiple of 32 from 64 on, because diffusers' norms have 32 groups"
        raise UsageError("--channels", f"is {channels}", fix)
    mults = channel_mults or default_channel_mults(img_size)
    shape = dict(img_size=img_size, channels=channels, channel_mults=mults)
    config = Config(**shape, dropout=0.0, **changes)
    check_config(config)
    return config


def installed(name: str) -> bool:
    """Whether a peer can be imported; prints a line if it cannot."""
    found = importlib.util.find_spec(name.replace("-", "_")) is not None
    if not found:
        print(f"{name} is left out, because it is not installed. Fix: pip install {name}")
    return found


def random_faces(count: int, img_size: int) -> Faces:
    """Random pixels: a step takes as long on them as on faces."""
    size = (count, img_size, img_size, 3)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    nothing, everyone = np.empty((count, 0), np.float32), np.arange(count)
    return Faces(images, nothing, everyone, everyone[:0], "random", "random pixels")


def diffusers_network(model: UNet) -> nn.Module:
    """diffusers' UNet2DModel with the shape and the weights of our network."""
    from diffusers import UNet2DModel

    config, weights = to_diffusers(model)
    network = UNet2DModel(**config)
    network.load_state_dict(weights)
    return network


def forward_flops(model: nn.Module, img_size: int) -> int:
    """Floating-point operations of a forward pass for one image; a product and a sum are two.

    They are counted on the meta device, where every network uses plain operations only."""
    shadow = copy.deepcopy(model).to("meta", memory_format=torch.contiguous_format)
    x_t = torch.empty(1, 3, img_size, img_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(x_t, torch.zeros(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


class Row:
    """One way to train. A subclass sets these, and `step` makes one update of the network."""

    device: torch.device
    network: nn.Module  # not compiled
    flops: int  # of a forward pass for one image
    dtype: torch.dtype | None = None  # half precision to compute in
    same_network = True  # as that of the other rows

    def about(self) -> dict:
        """What the table says besides the time; memory: the most bytes of tensors on the GPU."""
        weights = sum(p.numel() for p in self.network.parameters())
        about = {"weights": weights, "flops": self.flops, "same_network": self.same_network}
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return about | {"precision": PRECISIONS[self.dtype], "memory": memory}

    def time(self, steps: int) -> float:
        """Seconds of a step: the mean of `steps`, after one that is not timed."""
        with pinned_threads(self.device):
            self.step()
            return seconds_of(self.step, self.device, steps)


class Ours(Row):
    """This project, as `train.train` runs it: batch, step, log."""

    def __init__(self, config: Config, device: torch.device):
        set_up_device(device)
        self.device = device
        faces = random_faces(8 * config.batch_size, config.img_size)
        state = make_state(config, device, unet_arguments(config))
        self.dtype = autocast_dtype(config.mixed_precision, device)
        self.run = Run(
            config=config,
            state=state,
            diffusion=Diffusion(**diffusion_arguments(config), device=device),
            batches=Batches(faces, config.batch_size, config.seed, device),
            forward=state.model,
            dtype=self.dtype,
        )
        self.network = state.model
        self.flops = forward_flops(self.network, config.img_size)
        if config.compile and device.type == "cuda":
            if compile_network(self.network, lambda: loss_of(self.run, 0)) is None:
                fix = "install what it lacks, or compare with --no_compile"
                raise UsageError("--compile", "the network cannot be compiled here", fix)
        self.meter = Meter(device)

    def step(self) -> None:
        """One update, as in the loop of `train.train`."""
        loss, grad_norm = train_step(self.run).values()
        self.meter(loss=loss, grad_norm=grad_norm)


class Diffusers(Row):
    """diffusers' UNet2DModel, trained as its examples/unconditional_image_generation does.

    half: in half precision if the device has it; advised: with what diffusers' documentation
    recommends for speed. Until `feed` is called it trains on one batch, ready on the device."""

    def __init__(
        self, config: Config, device: torch.device, half: bool = True, advised: bool = False
    ):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.config, self.device, self.advised = config, device, advised
        self.dtype = autocast_dtype("fp16" if half else "no", device)
        on_gpu = device.type == "cuda"
        if advised and on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(config.seed)
        network = diffusers_network(UNet(**unet_arguments(config)))
        self.flops = forward_flops(network, config.img_size)
        self.format = torch.channels_last if advised else torch.contiguous_format
        self.network = network.to(device, memory_format=self.format).train()
        options = dict(lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        options["fused"] = True if advised else None
        self.optimizer = torch.optim.AdamW(self.network.parameters(), **options)
        options = dict(use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=advised)
        self.ema = EMAModel(self.network.parameters(), decay=0.9999, **options)
        self.ema.to(device)
        self.scheduler = DDPMScheduler(config.num_timesteps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if advised and on_gpu:
            self.network.compile()
        shape = (config.batch_size, 3, config.img_size, config.img_size)
        self.clean = torch.rand(shape, device=device) * 2 - 1

    def feed(self, x_0: Tensor, step: int, progress: float) -> None:
        """Take the next batch, and set the learning rate of the example: 500 steps of warm-up, then
        a cosine over the training. progress: the share of the training that is done."""
        self.clean = x_0
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * progress))

    def step(self) -> None:
        """One update, as in the loop of the example."""
        # The noise, the timesteps, the noisy images.
        noise, count = torch.randn_like(self.clean), len(self.clean)
        t = torch.randint(0, len(self.scheduler.betas), (count,), device=self.device)
        noisy = self.scheduler.add_noise(self.clean, noise, t)
        noisy = noisy.to(memory_format=self.format)

        # The network, and the loss in float32, as accelerate computes it.
        with self.autocast():
            guess = self.network(noisy, t).sample
        loss = F.mse_loss(guess.float(), noise)
        self.scaler.scale(loss).backward()

        # The update and the average. The example reads the loss in each step for its progress bar.
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.network.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        if not self.advised:
            loss.item()

    def autocast(self) -> torch.autocast:
        """The precision of the network."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def parts(self) -> dict:
        """All that training changes."""
        names = ("network", "optimizer", "ema", "scaler")
        return {name: getattr(self, name) for name in names}

    def generate(self, steps: int, count: int, seed: int) -> Tensor:
        """(count, 3, H, W) in [-1, 1] on the CPU, by its DDPMPipeline from the averaged weights."""
        parameters = list(self.network.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        with self.autocast():
            images = pipeline_images(self.network, self.config, "ddpm", steps, count, seed)
        self.ema.restore(parameters)
        return images


def pipeline_images(
    network: nn.Module, config: Config, sampler: str, steps: int, count: int, seed: int, **options
) -> Tensor:
    """(count, 3, H, W) in [-1, 1] on the CPU, by diffusers' pipeline of a sampler, a name in
    SCHEDULERS, from the noise of the seed."""
    import diffusers

    make = getattr(diffusers, SCHEDULERS[sampler])
    scheduler = make(config.num_timesteps, beta_schedule=SCHEDULES[config.noise_schedule])
    make = diffusers.DDIMPipeline if sampler == "ddim" else diffusers.DDPMPipeline
    pipeline = make(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options |= dict(num_inference_steps=steps, generator=generator, output_type="np")
    images = pipeline(batch_size=count, **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


class DenoisingDiffusionPytorch(Row):
    """denoising-diffusion-pytorch's Unet, as its Trainer trains it: in float32, its default.

    The network cannot be ours: it has our stages and our width in the first of them."""

    same_network = False

    def __init__(self, config: Config, device: torch.device):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        self.device = device
        torch.manual_seed(config.seed)
        self.network = Unet(config.channels, dim_mults=config.channel_mults)
        self.flops = forward_flops(self.network, config.img_size)
        options = dict(image_size=config.img_size, timesteps=config.num_timesteps)
        self.diffusion = GaussianDiffusion(self.network, **options).to(device)
        options = dict(lr=1e-4, betas=(0.9, 0.99))
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), **options)
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10).to(device)
        shape = (config.batch_size, 3, config.img_size, config.img_size)
        self.images = torch.rand(shape, device=device)  # in [0, 1], as it wants them

    def feed(self, x_0: Tensor, step: int, progress: float) -> None:
        """Take the next batch; the learning rate is constant."""
        self.images = (x_0 + 1) / 2

    def step(self) -> None:
        """One update, as in the loop of its Trainer."""
        loss = self.diffusion(self.images)
        loss.item()  # as its Trainer does
        loss.backward()
        clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def parts(self) -> dict:
        """All that training changes; the average holds the network too."""
        return {"optimizer": self.optimizer, "ema": self.ema}

    def generate(self, steps: int, count: int, seed: int) -> Tensor:
        """(count, 3, H, W) in [-1, 1] on the CPU, by its sampler from the averaged weights: DDIM
        for fewer steps than the network was trained with."""
        torch.manual_seed(seed)
        model = self.ema.ema_model
        model.sampling_timesteps, model.is_ddim_sampling = steps, steps < model.num_timesteps
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each batch
            return (model.sample(batch_size=count) * 2 - 1).cpu()


PEERS = {"diffusers": Diffusers, "denoising-diffusion-pytorch": DenoisingDiffusionPytorch}
