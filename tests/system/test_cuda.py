"""What is promised for CUDA GPUs, as far as a machine without one can tell; tests/gpu has the
tests that need one."""

import copy
import os
import runpy
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor
from conftest import ROOT, tensors_equal, tiny
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode

from diffusion import Diffusion
from engine import session, state
from engine.log import Meter
from engine.run import Run
from engine.state import diffusion_arguments, make_state, unet_arguments
from generate import load_trained
from optimizers import OPTIMIZERS
from system import device as device_module
from system.device import (
    autocast_dtype,
    check_gpu,
    compile_network,
    find_device,
    precision_note,
    set_up_device,
    set_up_generation,
)
from system.errors import ResourceError
from train import loss_of, train, train_step
from unet import UNet
from utils import tensors_in

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch say that it has a GPU of that capability."""

    def make(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A GPU")
        monkeypatch.setattr(device_module, "check_gpu", lambda device: None)

    return make


@pytest.fixture
def kept_settings():
    """Whatever a test sets for the process is as it was afterwards."""
    cudnn, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.benchmark = cudnn
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


def small_run(device: torch.device, dtype=None, **changes) -> Run:
    """A tiny run on random images, without a folder."""
    config = tiny(**changes)

    def batches(number):
        size = (config.batch_size, 3, config.img_size, config.img_size)
        x_0 = torch.randn(size, generator=torch.Generator().manual_seed(number))
        attributes = torch.ones(config.batch_size, len(config.attributes), device=device)
        return x_0.clamp(-1, 1).to(device), attributes if config.attributes else None

    parts = make_state(config, device, unet_arguments(config))
    diffusion = Diffusion(**diffusion_arguments(config), device=device)
    return Run(config, parts, diffusion, batches, parts.model, dtype)


# The device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, kind", [([], "cpu"), (["-m", "gpu"], "cuda")])
def test_the_suite_uses_a_gpu_only_if_it_is_asked_to(monkeypatch, words, kind):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "PYTEST_XDIST_WORKER"):
        monkeypatch.setenv(name, "0")  # so that it is as before after the test
        monkeypatch.delenv(name)
    visible = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", visible)
    monkeypatch.setattr(sys, "argv", ["pytest", *words])
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    assert find_device().type == kind


@pytest.mark.parametrize("driver, hidden, warned", [(1, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, capsys, driver, hidden, warned):
    monkeypatch.setattr(device_module, "NVIDIA_DRIVER", ROOT if driver else ROOT / "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if hidden else "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == CPU
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == warned and all("cannot use the GPU" in line for line in errors)


def test_set_up_makes_a_gpu_fast_or_deterministic(gpu, kept_settings, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(inductor, "deterministic", False)
    gpu((9, 0))
    set_up_generation()
    assert torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"  # what is measured is not rounded
    set_up_device(CUDA, deterministic=True)
    assert not torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    assert inductor.deterministic and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_up_device(CUDA)  # the next run of this process need not be
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"
    assert not inductor.deterministic and not torch.are_deterministic_algorithms_enabled()


def test_a_training_sets_up_its_device_and_pins_its_threads(here, monkeypatch):
    asked = []
    pin = lambda device: asked.append(device) or nullcontext()  # noqa: E731
    monkeypatch.setattr(session, "set_up_device", lambda *rest: asked.append(rest))
    monkeypatch.setattr(session, "pinned_threads", pin)
    for deterministic in (False, True):
        train(tiny(num_training_steps=1, resume=deterministic, deterministic=deterministic))
    assert asked == [(CPU, False), CPU, (CPU, True), CPU]


@pytest.mark.parametrize("begin", [check_gpu, set_up_device, partial(load_trained, "a run")])
def test_a_gpu_without_kernels_is_one_error_before_anything_else(monkeypatch, begin):
    def zeros(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    monkeypatch.setattr(torch, "zeros", zeros)
    what = r"^Tesla V100: .* \(CUDA error: no kernel image is available\)\. Fix: .*CUDA 12\.6"
    with pytest.raises(ResourceError, match=what):
        begin(device=CUDA)
    check_gpu(CPU)


@pytest.mark.parametrize("capability, bf16", [((8, 0), True), ((7, 5), False)])
def test_gpus_that_emulate_bf16_do_without(gpu, monkeypatch, capability, bf16):
    gpu(capability)
    dtype = torch.bfloat16 if bf16 else torch.float16
    assert autocast_dtype("bf16", CUDA) == dtype and autocast_dtype("fp16", CUDA) == torch.float16
    assert ("training in float16" in precision_note("bf16", dtype, CUDA)) != bf16
    # Muon takes bf16 whatever the network computes in.
    monkeypatch.setattr(UNet, "to", lambda model, *rest, **options: model)
    monkeypatch.setitem(OPTIMIZERS, "muon", lambda model, lr, dtype: dtype)
    config = tiny(optimizer="muon", mixed_precision="fp16")
    used = make_state(config, CUDA, unet_arguments(config)).optimizer
    assert used == (torch.bfloat16 if bf16 else torch.float32)


# The step -----------------------------------------------------------------------------------------


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
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    for module in (sys.modules["torch.optim.optimizer"], torch.utils._foreach_utils):
        for kind in ("fused", "foreach"):
            name = f"_get_{kind}_kernels_supported_devices"
            monkeypatch.setattr(module, name, lambda: ["meta"])
    return META


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_wait_for_nothing_and_mix_no_devices(meta, monkeypatch, optimizer):
    monkeypatch.setattr(state, "autocast_dtype", lambda *_: torch.float16)
    changes = dict(gradient_accumulation_steps=2, dropout=0.1, attributes=("Smiling",))
    run, meter = small_run(meta, **changes, optimizer=optimizer), Meter(meta)
    batch = run.batches(0)
    run.batches = lambda number: batch
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    with DrawWithoutGenerator():
        for _ in range(3):
            loss, grad_norm = train_step(run).values()
            meter(loss=loss, grad_norm=grad_norm)
    assert run.state.step == run.state.ema.num_updates == 3 and run.state.scaler.is_enabled()
    everything = run.state.model, run.state.ema, run.state.optimizer
    tensors = [tensor for part in everything for _, tensor in tensors_in(part.state_dict())]
    assert {tensor.device for tensor in tensors} == {meta}
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        meter.read(lambda totals: totals)  # what reads must fail here, or nothing is tested


# The compiler -------------------------------------------------------------------------------------


def test_a_compiled_network_is_one_graph_and_trying_it_leaves_no_trace():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = small_run(CPU, dropout=0.2, attributes=("Smiling",), gradient_accumulation_steps=2)
    train_step(run)
    before, random = copy.deepcopy(run.state.state_dict()), torch.get_rng_state()
    loss = partial(loss_of, run, 0)
    assert compile_network(run.forward, loss, backend=backend, fullgraph=True) > 0
    assert tensors_equal(run.state.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in run.state.model.parameters())
    for _ in range(3):
        train_step(run)
    assert len(graphs) == 1


class Network(torch.nn.Linear):
    """torch 2.10 compiles no module that is all its own."""

    def forward(self, x):
        return super().forward(x)


def works(graph, inputs):
    return graph


def no_compiler(graph, inputs):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


@pytest.mark.parametrize("forward, backward", [(no_compiler, works), (works, no_compiler)])
def test_without_a_compiler_the_network_stays_as_it_is(capsys, forward, backward):
    network = Network(1, 1)
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    loss = lambda: network(torch.ones(1, 1)).sum()  # noqa: E731
    assert compile_network(network, loss, backend=backend) is None
    told = capsys.readouterr().err
    assert told.startswith("warning: torch.compile failed (") and told.count("\n") == 1
    assert "C compiler" in told and "--no_compile" in told
    loss().backward()


def test_a_batch_that_does_not_fit_is_no_fault_of_the_compiler():
    def backend(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    network = Network(1, 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        compile_network(network, lambda: network(torch.ones(1, 1)).sum(), backend=backend)


@pytest.mark.parametrize("seconds, told", [(12.3, ["compiled in 12 s"]), (None, [])])
def test_a_run_on_a_gpu_tries_its_network_before_the_first_step(monkeypatch, capsys, seconds, told):
    compiled = []
    monkeypatch.setattr(session, "compile_network", lambda *rest: compiled.append(rest) or seconds)
    for compile in (True, False):
        run = small_run(CPU, compile=compile)
        run.diffusion.device = CUDA
        session.prepare_network(run, lambda run, number: f"loss {number}")
    ((_, loss),) = compiled
    assert loss() == "loss 0" and capsys.readouterr().out.splitlines()[1:] == told
