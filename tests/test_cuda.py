"""What is promised for CUDA GPUs, as far as a machine without one can tell."""

import pytest
import torch
from conftest import tiny

import train as train_module
from benchmarks import peers
from device import OLD_GPUS, autocast_dtype, check_gpu, precision_note, set_up_device
from errors import ResourceError

CUDA = torch.device("cuda")
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
    set_up_device(torch.device("cpu"))
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
    set_up_device(CUDA)
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"


def test_training_and_the_benchmark_set_the_device_up_by_one_function(here, monkeypatch):
    devices = []
    for module in (train_module, peers):
        monkeypatch.setattr(module, "set_up_device", lambda device, *rest: devices.append(device))
    train_module.train(tiny(num_training_steps=1))
    peers.Ours(peers.make_config(8, 64, (1, 1), batch_size=1), torch.device("cpu"))
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
    check_gpu(torch.device("cpu"))


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
