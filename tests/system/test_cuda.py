"""What is promised for CUDA GPUs, as far as a machine without one can tell."""

import copy
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
from conftest import tensors_equal, tiny
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode

import train as train_module
from benchmarks import memory, peers
from benchmarks.peers import random_faces
from benchmarks.sample_speed import random_network
from dataset.faces import Batches
from diffusion import Diffusion
from engine import session as run_module
from engine.safety import Watch
from engine.state import diffusion_arguments, make_state
from generate import load_trained
from system.device import (
    OLD_GPUS,
    autocast_dtype,
    check_gpu,
    compile_network,
    precision_note,
    set_up_device,
)
from system.errors import ResourceError
from train import loss_of, train_step
from unet import ResidualBlock
from utils import tensors_in

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
WHEELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.15 for CUDA 13.2


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch say it has a GPU of that capability, and kernels for those."""

    def make(capability: tuple[int, int], built=WHEELS) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))

    return make


@pytest.fixture
def kept_settings():
    """Whatever a test sets for the process is as it was afterwards."""
    cudnn, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.benchmark = cudnn
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


# The device --------------------------------------------------------------------------------------


def test_set_up_makes_a_gpu_fast(gpu, kept_settings):
    gpu((9, 0))
    set_up_device(CPU)
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
    set_up_device(CUDA)
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"


def test_training_and_the_benchmark_set_the_device_up_by_one_function(here, monkeypatch):
    devices = []
    for module in (train_module, peers):
        monkeypatch.setattr(module, "set_up_device", lambda device, *rest: devices.append(device))
    train_module.train(tiny(num_training_steps=1))
    peers.Ours(peers.make_config(8, 64, (1, 1), batch_size=1), CPU)
    assert [device.type for device in devices] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    "capability, built",
    [
        ((7, 5), WHEELS),
        ((8, 9), WHEELS),  # sm_86 runs on 8.9
        ((12, 1), WHEELS),
        ((13, 0), [*WHEELS, "compute_120"]),
        ((9, 4), ["gfx90a", "gfx942"]),  # AMD
    ],
)
def test_gpus_that_torch_was_built_for_are_taken(gpu, capability, built):
    gpu(capability, built)
    check_gpu(CUDA)


@pytest.mark.parametrize(
    "capability, fix",
    [((7, 0), OLD_GPUS), ((6, 0), OLD_GPUS), ((13, 0), "newer torch"), ((11, 0), "newer torch")],
)
def test_a_gpu_that_torch_was_not_built_for_is_one_line_that_names_a_torch(gpu, capability, fix):
    gpu(capability)
    text = rf"^A GPU: torch \S+ has no kernels for .*{capability[0]}\.{capability[1]}\. Fix: "
    with pytest.raises(ResourceError, match=text) as error:
        check_gpu(CUDA)
    assert fix in str(error.value) and "CUDA_VISIBLE_DEVICES" in str(error.value)
    check_gpu(CPU)


@pytest.mark.parametrize("begin", [set_up_device, partial(load_trained, "a run")])
def test_what_trains_and_what_generates_ask_for_kernels_first(gpu, begin):
    gpu((7, 0))
    with pytest.raises(ResourceError, match="has no kernels"):
        begin(device=CUDA)


@pytest.mark.parametrize(
    "capability, asked, dtype",
    [
        ((8, 0), "bf16", torch.bfloat16),
        ((8, 0), "fp16", torch.float16),
        ((8, 0), "no", None),
        ((7, 5), "bf16", torch.float16),
        ((7, 5), "fp16", torch.float16),
        ((7, 5), "no", None),
    ],
)
def test_gpus_that_emulate_bf16_take_fp16(gpu, capability, asked, dtype):
    gpu(capability)
    assert autocast_dtype(asked, CUDA) == dtype
    note = precision_note(asked, dtype, CUDA)
    assert ("bf16 needs a GPU from Ampere on" in note) == (
        asked == "bf16" and dtype != torch.bfloat16
    )
    assert bool(note) == ("training in float16" in note)


# The step ----------------------------------------------------------------------------------------


class NoGenerator(torch.Generator):
    """Stands in for one of the meta device, where nothing can be drawn."""

    def __new__(cls, device=None):
        return super().__new__(cls)

    device = property(lambda self: META)


class DrawWithoutGenerator(TorchFunctionMode):
    """torch.rand and the like, on the meta device, leave out the generator they are given."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        return function(*args, **kwargs)


@pytest.fixture
def meta(monkeypatch):
    """The meta device, which computes shapes only, so that it cannot be waited for, takes part in
    all that a GPU does: fused and foreach kernels, and a loss scale."""
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    for module in (sys.modules["torch.optim.optimizer"], torch.utils._foreach_utils):
        for kind in ("fused", "foreach"):
            name = f"_get_{kind}_kernels_supported_devices"
            monkeypatch.setattr(module, name, lambda: ["meta"])
    with DrawWithoutGenerator():
        yield META


@pytest.mark.parametrize("fp16", [True, False])
def test_three_updates_wait_for_nothing_and_mix_no_devices(meta, fp16):
    config = tiny(gradient_accumulation_steps=2, dropout=0.1, attributes=("Smiling",))
    state = make_state(config, meta, fp16)
    diffusion = Diffusion(**diffusion_arguments(config), device=meta)
    images = Batches(random_faces(16, 8), config.batch_size)
    attributes = torch.ones(config.batch_size, 1, device=meta)
    watch = Watch(meta, patience=20)

    def batches(index):
        return images(index)[0].to(meta), attributes

    for _ in range(3):
        watch.add(*train_step(config, state, diffusion, batches, state.model, None))
    assert state.step == state.ema.num_updates == 3 and state.scaler.is_enabled()
    parts = state.model.state_dict(), state.ema.state_dict(), state.optimizer.state_dict()
    assert {tensor.device for _, tensor in tensors_in(parts)} == {meta}
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        watch.read(1, lambda totals: totals)  # what reads must fail here, or nothing is tested


# The compiler ------------------------------------------------------------------------------------


def compiled(backend, **changes):
    """A run's state, its step on random images, and what compiles its network by that backend."""
    config = tiny(**changes)
    state, diffusion = make_state(config, CPU, fp16=True), Diffusion(**diffusion_arguments(config))
    images = Batches(random_faces(16, 8), config.batch_size)
    attributes = torch.ones(config.batch_size, 1) if config.attributes else None

    def batches(index):
        return images(index)[0], attributes

    def step():
        train_step(config, state, diffusion, batches, state.model, None)

    def compile():
        loss = partial(loss_of, config, diffusion, batches, None, 0, state.model)
        return compile_network(state.model, loss, backend=backend, fullgraph=True)

    return state, step, compile


def test_trying_the_compiled_network_leaves_no_trace():
    state, step, compile = compiled("eager", dropout=0.2)
    step()
    before, random = copy.deepcopy(state.state_dict()), torch.get_rng_state()
    assert compile() > 0
    assert tensors_equal(state.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert state.model.training


def test_the_network_compiles_to_one_graph_that_all_steps_use():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    _, step, compile = compiled(backend, attributes=("Smiling",), gradient_accumulation_steps=2)
    compile()
    for _ in range(3):
        step()
    assert len(graphs) == 1


def fails(graph, inputs):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


def works(graph, inputs):
    return graph


class Network(torch.nn.Linear):
    """torch 2.10 compiles no module that is all its own."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("forward, backward", [(fails, works), (works, fails)])
def test_a_compiler_that_fails_forward_or_backward_is_one_line(forward, backward):
    network = Network(1, 1)
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    with pytest.raises(ResourceError, match="^torch.compile: failed .*C compiler.* --no_compile"):
        compile_network(network, lambda: network(torch.ones(1, 1)).sum(), backend=backend)


def test_a_batch_that_does_not_fit_is_no_fault_of_the_compiler():
    def full(graph, inputs):
        raise torch.OutOfMemoryError

    network = torch.nn.Linear(1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        compile_network(network, lambda: full(None, None), backend="eager")


def test_a_run_on_a_gpu_tries_its_compiled_network_before_the_first_step(here, monkeypatch, capsys):
    """The processes say that the CPU is a GPU, once all is set up."""
    compiled = []
    monkeypatch.setattr(run_module, "compile_network", lambda *rest: compiled.append(rest) or 12.3)
    processes = SimpleNamespace(device=CUDA, world_size=1, distribute=lambda model: model)
    for compile in (True, False):
        run = SimpleNamespace(config=tiny(compile=compile), state=SimpleNamespace(model="network"))
        run_module.prepare_network(run, processes, lambda forward: f"loss of {forward}")
    ((network, loss),) = compiled
    assert (network, loss()) == ("network", "loss of network")
    assert capsys.readouterr().out.splitlines()[-1] == "compiled in 12 s"


# The same numbers in every run -------------------------------------------------------------------


def test_deterministic_reaches_the_device(here, gpu, kept_settings, monkeypatch):
    asked = []
    monkeypatch.setattr(train_module, "set_up_device", lambda *rest: asked.append(rest[1]))
    train_module.train(tiny(num_training_steps=1))
    train_module.train(tiny(num_training_steps=2, resume=True, deterministic=True))
    assert asked == [False, True]
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(inductor, "deterministic", False)
    gpu((9, 0))
    set_up_device(CUDA, deterministic=True)
    assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    assert inductor.deterministic and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_up_device(CUDA)  # the next run of this process need not be
    assert not inductor.deterministic and not torch.are_deterministic_algorithms_enabled()


# Memory ------------------------------------------------------------------------------------------


def test_a_step_keeps_no_more_than_its_budget_for_the_backward():
    """Of the default network: 20.1 GB for a batch of 128 where it is not compiled."""
    of_image, besides = memory.kept_eager()
    assert 150e6 < of_image < 160e6 and besides < 0.17e9


class OneBlock(torch.nn.Module):
    """A residual block on images: what most of the network is, and soon compiled."""

    img_size = 16

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 64, 3, padding=1)
        self.block = ResidualBlock(64, 64, 8, dropout=0.1)

    def forward(self, x_t, t):
        return self.block(self.conv_in(x_t), t[:, None].expand(-1, 8).float())


def test_compiling_keeps_less_than_half(monkeypatch):
    monkeypatch.setattr(memory, "UNet", OneBlock)
    eager, compiled = memory.kept_eager(), memory.kept_compiled()
    assert 0 < compiled[0] < 0.5 * eager[0]
    assert compiled[1] == pytest.approx(eager[1], rel=0.05)  # the weights in half precision


class Twice(torch.nn.Module):
    """Keeps its input for the first product, and that product for the second."""

    img_size = 8

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x_t, t):
        y = x_t * self.weight
        return y * y


def test_what_is_counted_as_kept_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "UNet", Twice)
    assert memory.kept_eager() == (2 * 3 * 8 * 8 * 4, 0)  # float32 under autocast


def test_the_batch_that_fits_is_the_largest_power_of_two():
    assert [memory.largest_batch(gpu * 1e9, 1e9, 0.1e9) for gpu in (2, 3, 8)] == [0, 4, 32]


# On a GPU itself ---------------------------------------------------------------------------------


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[GPU, pytest.param("cpu", marks=pytest.mark.slow)])
def device(request, kept_settings):
    """`pytest -m gpu`: the GPU; `-m slow`: the CPU, so that these tests are right when there is."""
    return torch.device(request.param)


@pytest.mark.parametrize("dtype, near", [(None, 1e-3), (torch.bfloat16, 0.1)])
def test_the_network_computes_what_it_does_on_the_cpu(device, dtype, near):
    network = random_network(peers.make_config(16, 64, (1, 2), num_res_blocks=1)).eval()
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = network(x_t, t)
        network.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = network(x_t.to(device), t.to(device)).float().cpu()
    assert expected.std() > 0.1
    assert (output - expected).abs().max() < near * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_updates_on_the_device_stay_there_and_learn(device, precision):
    config = peers.make_config(8, 64, (1,), batch_size=8, mixed_precision=precision)
    ours = peers.Ours(replace(config, warmup_steps=0, learning_rate=1e-3, compile=False), device)
    ours.step()
    waits = ours.synchronises() if device.type == "cuda" else ""
    first = ours.watch.read(1, lambda totals: totals)["loss"]
    for _ in range(20):
        ours.step()
    assert not waits and ours.watch.read(21, lambda totals: totals)["loss"] < first
    parts = ours.state.model.state_dict(), ours.state.ema.state_dict(), ours.state.optimizer.state
    assert {tensor.device.type for _, tensor in tensors_in(parts)} == {device.type}


def test_a_run_on_the_device_is_saved_and_resumed(device, here):
    config = tiny(device=device.type, num_training_steps=2, mixed_precision="fp16")
    train_module.train(config)
    train_module.train(replace(config, num_training_steps=3, resume=True))
    assert (here / "run" / "checkpoints" / "step_00000003.pt").exists()
