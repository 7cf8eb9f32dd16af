"""Ways to train the same network: this project's step, diffusers', denoising-diffusion-pytorch's,
each as its own code takes it. `train_speed.py` gives each of them a process of its own.

    pip install -r requirements-test.txt denoising-diffusion-pytorch
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import empty_cache, peak_memory, seconds_of
from dataset.faces import Batches, Faces
from diffusion import Diffusion
from engine.safety import Watch
from engine.state import diffusion_arguments, make_state, unet_arguments
from formats.diffusers_folder import to_diffusers
from system.device import autocast_dtype, set_up_device
from system.errors import UsageError
from system.threads import a_core_each
from train import Config, check_config, train_step
from unet import UNet, default_channel_mults

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_config(img_size: int, channels: int, channel_mults: tuple[int, ...], **changes) -> Config:
    """The constants of a network that diffusers can build as well, without dropout, which the peers
    have none of by default. Raises UsageError."""
    if channels < 64 or channels % 32:
        fix = (
            "give 64, 96, 128 or so: diffusers' norms have 32 groups, of two channels or more here"
        )
        raise UsageError("--channels", f"is {channels}", fix)
    mults = channel_mults or default_channel_mults(img_size)
    shape = dict(img_size=img_size, channels=channels, channel_mults=mults, dropout=0.0)
    config = Config(**shape, **changes)
    check_config(config)
    return config


def random_faces(count: int, img_size: int) -> Faces:
    """Random pixels: they cost a step what faces cost it."""
    size = (count, img_size, img_size, 3)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    nothing, everyone = np.empty((count, 0), np.float32), np.arange(count)
    return Faces(images, nothing, everyone, everyone[:0], "random", "random pixels")


def diffusers_network(model: UNet) -> nn.Module:
    """diffusers' UNet2DModel of a network's shape, with its weights."""
    from diffusers import UNet2DModel  # here: only where diffusers is installed

    config, weights = to_diffusers(model)
    network = UNet2DModel(**config)
    network.load_state_dict(weights)
    return network


def forward_flops(model: nn.Module, img_size: int) -> int:
    """Floating-point operations of a forward pass for one image, two for each product and sum.

    Counted on the meta device, where every network takes its plain path: no fused kernel that the
    counter might not know, and no products that stand in for sums on a CPU."""
    shadow = copy.deepcopy(model).to("meta", memory_format=torch.contiguous_format)
    x_t = torch.empty(1, 3, img_size, img_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(x_t, torch.zeros(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


class Row:
    """One way to train. A subclass sets these, and `step` makes one update of the network."""

    device: torch.device
    precision: str  # one of DTYPES
    network: nn.Module  # not compiled
    label = ""  # more about it, for the table
    same_network = True  # as the other rows'
    flops: int  # of a forward pass for one image

    def step(self) -> None:
        raise NotImplementedError

    def about(self) -> dict:
        """What is compared before anything is timed."""
        weights = sum(p.numel() for p in self.network.parameters())
        about = {"weights": weights, "flops": self.flops, "same_network": self.same_network}
        return about | {"precision": self.precision, "label": self.label}

    def time(self, steps: int) -> float:
        """Seconds for a step, the mean of `steps` after one that warms up."""
        self.step()
        seconds = seconds_of(self.step, self.device, steps)
        empty_cache(self.device)
        return seconds

    def memory(self) -> int:
        return peak_memory(self.device)


class Ours(Row):
    """This project, as `train.train` runs it: batch, noise, step, average, log."""

    def __init__(self, config: Config, device: torch.device):
        set_up_device(device)
        self.config, self.device = config, device
        faces = random_faces(8 * config.batch_size, config.img_size)
        self.batches = Batches(faces, config.batch_size, config.seed, device=device)
        self.diffusion = Diffusion(**diffusion_arguments(config), device=device)
        self.dtype = autocast_dtype(config.mixed_precision, device)
        self.precision = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        self.state = make_state(config, device, fp16=self.dtype == torch.float16)
        self.network = self.state.model
        self.flops = forward_flops(self.network, config.img_size)
        if config.compile and device.type == "cuda":
            self.network.compile()
        self.watch = Watch(device, patience=20)

    def time(self, steps: int) -> float:
        with a_core_each(self.device):
            return super().time(steps)

    def step(self) -> None:
        self.step_on(self.batches)

    def step_on(self, batches) -> None:
        """One update, on what `batches(index)` returns."""
        state, diffusion, network = self.state, self.diffusion, self.network
        self.watch.add(*train_step(self.config, state, diffusion, batches, network, self.dtype))

    def parts(self) -> dict[str, float]:
        """Seconds of what a step does besides the network, each measured alone."""
        parameters = list(self.network.parameters())
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        limit, scalar = self.config.max_grad_norm, torch.ones((), device=self.device)
        calls = {
            "EMA update": lambda: self.state.ema.update(self.network),
            "clipping": lambda: clip_grad_norm_(parameters, limit, foreach=True),
            "logging": lambda: self.watch.add(scalar, scalar),
            "batch": lambda: self.batches(0),
        }
        seconds = {}
        for name, call in calls.items():
            call()
            seconds[name] = seconds_of(call, self.device, times=20)
        self.state.optimizer.zero_grad()
        return seconds

    def time_constant(self, steps: int) -> float:
        """As `time`, on one batch that lies ready."""
        batch = self.batches(0)
        with a_core_each(self.device):
            self.step_on(lambda index: batch)
            seconds = seconds_of(lambda: self.step_on(lambda index: batch), self.device, steps)
        empty_cache(self.device)
        return seconds

    def synchronises(self) -> str:
        """What in a step waits for the GPU, or nothing."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step()
        except RuntimeError as error:
            return str(error).split("\n")[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return ""


class Diffusers(Row):
    """diffusers' UNet2DModel, trained as its examples/unconditional_image_generation does.

    advised: with what its documents advise for speed. The batch lies ready on the device."""

    def __init__(self, config: Config, device: torch.device, precision: str, advised: bool = False):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.device, self.precision, self.advised = device, precision, advised
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
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        if advised and on_gpu:
            self.network.compile()
        shape = (config.batch_size, 3, config.img_size, config.img_size)
        self.clean = torch.rand(shape, device=device) * 2 - 1

    def step(self) -> None:
        """One update, as in the example's loop."""
        # The noise, the times, the noisy images.
        noise, count = torch.randn_like(self.clean), len(self.clean)
        times = torch.randint(0, len(self.scheduler.betas), (count,), device=self.device)
        noisy = self.scheduler.add_noise(self.clean, noise, times)
        noisy = noisy.to(memory_format=self.format)

        # The network and the loss, which accelerate keeps in float32.
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            guess = self.network(noisy, times).sample
        loss = F.mse_loss(guess.float(), noise)
        self.scaler.scale(loss).backward()

        # The update, the average, and the loss for the progress bar, at each step in the example.
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.network.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        if not self.advised:
            loss.item()


class DenoisingDiffusionPytorch(Row):
    """denoising-diffusion-pytorch's network, as its Trainer trains it: in float32, its default.

    Its network cannot be ours; it gets our stages and the width whose FLOPs come nearest."""

    precision = "float32"
    same_network = False

    def __init__(self, config: Config, device: torch.device):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        def make(dim: int) -> nn.Module:
            return Unet(dim, dim_mults=config.channel_mults)

        def distance(dim: int) -> int:
            with torch.device("meta"):
                return abs(forward_flops(make(dim), config.img_size) - wanted)

        with torch.device("meta"):
            wanted = forward_flops(UNet(**unet_arguments(config)), config.img_size)
        dim = min(range(8, 2 * config.channels + 1, 8), key=distance)
        self.device, self.label = device, f"dim {dim}"
        torch.manual_seed(config.seed)
        self.network = make(dim)
        self.flops = forward_flops(self.network, config.img_size)
        options = dict(image_size=config.img_size, timesteps=config.num_timesteps)
        self.diffusion = GaussianDiffusion(self.network, **options).to(device)
        options = dict(lr=1e-4, betas=(0.9, 0.99))
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), **options)
        self.ema = EMA(self.diffusion, beta=0.995, update_every=10).to(device)
        shape = (config.batch_size, 3, config.img_size, config.img_size)
        self.images = torch.rand(shape, device=device)  # in [0, 1], as it wants them

    def step(self) -> None:
        """One update, as in its Trainer's loop."""
        loss = self.diffusion(self.images)
        loss.item()  # its Trainer does
        loss.backward()
        clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()


class Machine:
    """What the machine can do, in TFLOP/s: matrix products, and 3x3 convolutions of the network's
    size, forward and backward."""

    def __init__(self, config: Config, device: torch.device):
        self.device = device
        self.side = 8192 if device.type == "cuda" else 2048
        width = config.channels * max(config.channel_mults[:2])
        self.shape = (config.batch_size, width, config.img_size // 2, config.img_size // 2)

    def rates(self, precision: str) -> tuple[float, float]:
        """Of matrix products and of convolutions, in TFLOP/s, the best of three."""
        dtype = DTYPES[precision] or torch.float32
        times = 10 if self.device.type == "cuda" else 1
        options = dict(device=self.device, dtype=dtype)
        a, b = (torch.randn(self.side, self.side, **options) for _ in range(2))
        x, width = torch.randn(self.shape, **options), self.shape[1]
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(width, width, 3, 3, **options) / width
        weight = weight.to(memory_format=torch.channels_last).requires_grad_()
        upstream = torch.ones_like(x)

        def convolve() -> tuple[Tensor, ...]:
            return torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), upstream)

        def best(call) -> float:
            call()
            return min(seconds_of(call, self.device, times) for _ in range(3))

        pixels = x.numel() // width
        products = 2 * self.side**3 / best(lambda: a @ b) / 1e12
        convolutions = 3 * 2 * 9 * width**2 * pixels / best(convolve) / 1e12
        empty_cache(self.device)
        return products, convolutions
