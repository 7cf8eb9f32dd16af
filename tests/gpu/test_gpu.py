"""What a CUDA GPU computes. They run on their own, without the CPU's tests, in minutes:

    python -m pytest -m gpu -n 0 tests/gpu

Without a GPU they run on the CPU, where they must pass too. None of them forks this process."""

import pytest
import torch
from conftest import assert_same_state, final, tiny

from benchmarks.peers import Ours, make_config, random_faces
from benchmarks.speed import write_checkpoint
from dataset.faces import Batches
from generate import generate, load_trained
from optimizers import OPTIMIZERS
from system.device import find_device
from train import train, train_step
from unet import UNet

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    """The GPU. Afterwards the settings of the process are as before."""
    cudnn, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    yield find_device("auto")
    torch.backends.cudnn.benchmark = cudnn
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype, near", [(None, 1e-3), (torch.bfloat16, 0.1)])
def test_the_network_computes_what_it_does_on_the_cpu(device, dtype, near):
    torch.manual_seed(0)
    network = UNet(16, 64, (1, 2), num_res_blocks=1).eval()
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999])
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = network(x_t, t)
        network.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = network(x_t.to(device), t.to(device)).float().cpu()
    assert expected.std() > 0.1
    assert (output - expected).abs().max() < near * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_wait_for_nothing_and_learn(device, precision, optimizer):
    changes = dict(mixed_precision=precision, optimizer=optimizer, warmup_steps=0, compile=False)
    run = Ours(make_config(8, 64, (1,), batch_size=8, learning_rate=1e-3, **changes), device).run
    batch = run.batches(0)
    run.batches = lambda number: batch
    first = train_step(run)["loss"].item()
    wait = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    wait("error")
    try:
        for _ in range(20):
            loss = train_step(run)["loss"]
    finally:
        wait("default")
    assert loss.item() < first


def test_batches_are_those_of_the_cpu(device):
    faces = random_faces(20, 8)
    for number in (0, 7):
        expected, _ = Batches(faces, 4)(number)
        x_0, _ = Batches(faces, 4, device=device)(number)
        assert x_0.device.type == device.type and torch.equal(x_0.cpu(), expected)


@pytest.mark.parametrize("half, near", [(False, 0.005), (True, 0.02)])
def test_images_are_those_of_the_cpu(device, tmp_path, half, near):
    write_checkpoint(make_config(8, 64, (1,)), tmp_path / "random.pt")
    images = []
    for where in ("cpu", device):
        trained = load_trained(tmp_path / "random.pt", device=where, half=half and where == device)
        images.append(next(generate(trained, range(4), steps=5)).float().cpu())
    assert images[0].std() > 0.1
    assert (images[1] - images[0]).abs().mean() < near


def test_a_resumed_run_equals_an_unbroken_one(device, here):
    """Compiled, with dropout, as `--deterministic` promises."""
    changes = dict(device=device.type, mixed_precision="fp16", deterministic=True, dropout=0.1)
    changes |= dict(lr_schedule="constant")
    train(tiny(experiment_name="whole", **changes))
    train(tiny(num_training_steps=3, **changes))
    train(tiny(resume=True, **changes))
    assert_same_state(final("whole"), final())
