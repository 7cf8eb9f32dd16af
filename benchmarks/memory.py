"""What a training step keeps in a GPU's memory, counted without one, and which batches fit.

    python benchmarks/memory.py                                   # minutes on a CPU
    python benchmarks/memory.py --img_sizes 64 --gpus 8 24 --channels 64

The forward pass runs on tensors that have a shape and a place but no values. With --no_compile each
tensor that autograd saves is counted, on a GPU that is made up; compiled, what the partition that
Inductor takes (the least bytes through a cut between forward and backward) keeps. Besides that a
weight costs 20 bytes: itself, its gradient, its average, two moments of Adam's. What the table
says fits leaves a tenth of the GPU's memory and one GB more for what was not counted: the context,
the libraries' workspaces, the gradients under way, gaps.
"""

import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import flags
from system.flags import check_ranges, constant
from system.terminal import table
from unet import UNet

BATCH = 7  # a prime that divides no width: tells what grows with the batch from what does not
BYTES_OF_A_WEIGHT = 20  # float32: weight, gradient, average, two moments


@dataclass(frozen=True)
class MemoryConfig:
    """What to count."""

    img_sizes: tuple[int, ...] = constant((32, 64, 128, 192, 256), least=8)  # pixels of a side
    gpus: tuple[int, ...] = constant((8, 12, 16, 24, 80), least=1)  # GB of the GPUs in the table
    channels: int = constant(128, least=4)  # channels of the first stage


@contextmanager
def half_precision(device: str):
    """fp16 as autocast has it on a GPU, where there may be none."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def kept_eager(**arguments) -> tuple[float, float]:
    """What autograd saves in a forward pass of UNet(**arguments) in fp16 on a GPU: bytes for each
    image of a batch, and bytes besides, of weights in half precision."""
    with patch.object(UNet, "to", lambda network, *rest, **options: network):  # of no use to fakes
        with FakeTensorMode(), torch.device("cuda"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors without values
            network = UNet(**arguments)
            saved = {}

            def save(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if not isinstance(tensor, torch.nn.Parameter):
                    saved[storage._cdata] = tensor, storage.nbytes()
                return tensor

            size = network.img_size
            x_t = torch.empty(BATCH, 3, size, size, memory_format=torch.channels_last)
            t = torch.empty(BATCH, dtype=torch.long)
            with half_precision("cuda"), torch.autograd.graph.saved_tensors_hooks(save, save):
                network(x_t, t)
    return split(saved.values())


class Counted(Exception):
    """The end of a compilation: nothing is to be computed."""


def kept_compiled(**arguments) -> tuple[float, float]:
    """As `kept_eager`, of the compiled network. It is traced on the CPU, in fp16, in which it takes
    the same path as on a GPU but for its norms: CUDA's autocast has those in float32."""
    kept = []

    def count(graph: torch.fx.GraphModule, inputs) -> None:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        made = [node for node in outputs[1:] if isinstance(node, torch.fx.Node)]
        values = [node.meta["val"] for node in made if node.op != "placeholder"]
        kept.extend((v, v.numel() * v.element_size()) for v in values if isinstance(v, Tensor))
        raise Counted

    def group_norm(x, groups, weight, bias, eps):
        with torch.autocast("cpu", enabled=False):
            return plain_group_norm(x.float(), groups, weight, bias, eps)

    plain_group_norm = F.group_norm
    backend = aot_autograd(
        fw_compiler=count,
        decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition,
    )
    network = UNet(**arguments)
    network.compile(backend=backend, fullgraph=True, dynamic=False)
    x_t = torch.zeros(BATCH, 3, network.img_size, network.img_size)
    x_t = x_t.to(memory_format=torch.channels_last)
    with patch.object(F, "group_norm", group_norm), half_precision("cpu"), suppress(Exception):
        network(x_t, torch.zeros(BATCH, dtype=torch.long))
    assert kept, "nothing was compiled"
    return split(kept)


def split(kept) -> tuple[float, float]:
    """(bytes for an image, bytes besides) of pairs of a tensor and its bytes."""
    kept = list(kept)
    of_batch = sum(size for tensor, size in kept if tensor.numel() % BATCH == 0)
    return of_batch / BATCH, float(sum(size for _, size in kept) - of_batch)


def largest_batch(gpu: float, besides: float, of_image: float) -> int:
    """The largest power of two that fits. gpu, besides, of_image: bytes; 0: not even one image."""
    images = int((0.9 * gpu - 1e9 - besides) / of_image)
    return 2 ** (images.bit_length() - 1) if images > 0 else 0


def rows(config: MemoryConfig) -> list[list[str]]:
    """The lines of the table: for each size, compiled and not."""
    lines = []
    for size in config.img_sizes:
        arguments = dict(img_size=size, channels=config.channels)
        with torch.device("meta"):
            weights = sum(p.numel() for p in UNet(**arguments).parameters())
        for name, kept in (("", kept_compiled), (" --no_compile", kept_eager)):
            of_image, half = kept(**arguments)
            besides = BYTES_OF_A_WEIGHT * weights + half
            batches = [largest_batch(gpu * 1e9, besides, of_image) for gpu in config.gpus]
            line = [f"{size}{name}", f"{weights / 1e6:.1f}", f"{besides / 1e9:.2f}"]
            lines.append([*line, f"{of_image / 1e6:.0f}", *map(str, batches)])
    return lines


def main() -> None:
    """The command line."""
    description = "What a training step keeps in a GPU's memory, and which batches fit."
    config = flags.parse(MemoryConfig, sys.argv[1:], description)
    check_ranges(config)
    columns = ["px", "M weights", "GB for them", "MB for an image"]
    print(table([*columns, *(f"{gpu} GB" for gpu in config.gpus)], rows(config)))


if __name__ == "__main__":
    flags.run(main)
