"""One run in several processes, which torchrun or `accelerate launch` starts, ends and restarts.

DistributedDataParallel averages the gradients in a group of the device's backend. Everything else
is exchanged in a second group, of gloo: it runs on the CPU, so a process may wait there for hours
without a GPU's watchdog, and an exchange fails at once when another process dies."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from system.errors import Interrupted, OtherFailed, ResourceError, UsageError
from system.terminal import say

STEP = timedelta(minutes=10)  # how long the start, or an exchange of gradients, waits for a process
PATIENCE = timedelta(hours=12)  # how long all else waits: rank 0 may save and sample meanwhile
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds between torchrun's SIGTERM and its SIGKILL


class Processes(contextlib.AbstractContextManager):
    """The processes of one run, seen from one of them: a context manager around the run. Raises
    UsageError for more processes than GPUs, ResourceError if the other processes do not come."""

    runs = 0  # that this process has begun

    def __init__(self, device: torch.device):
        self.rank, self.local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        self.world_size, self.device = int(os.environ.get("WORLD_SIZE", 1)), device
        self.is_main, self.parent = self.rank == 0, os.getppid()
        if self.world_size == 1:
            return
        if device.type == "cuda":
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if here > gpus:
                what, fix = f"{here} processes for {gpus} GPUs", f"start {gpus} on this machine"
                raise OtherFailed if self.local else UsageError("the launcher", what, fix)
            self.device = torch.device("cuda", self.local)
            torch.cuda.set_device(self.device)
        try:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, None, STEP, self.world_size, self.rank, self._meet())
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _meet(self) -> dist.Store:
        """A store that rank 0 has just started. The launcher's own store is older than a restart
        and still holds the addresses of dead processes; here it only tells the new one's port."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        ours = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.launcher = dist.TCPStore(host, port, None, ours, STEP, multi_tenant=True)
        Processes.runs += 1
        key = f"ddpm/{Processes.runs}"
        if self.is_main:
            store = dist.TCPStore(host, 0, None, True, STEP, wait_for_workers=False)
            self.launcher.set(key, str(store.port))
            return store
        while True:
            with contextlib.suppress(OSError):  # of a port whose rank 0 has been killed
                port = int(self.launcher.get(key))
                socket.create_connection((host, port), timeout=5).close()
                return dist.TCPStore(host, port, None, False, STEP)
            time.sleep(0.2)

    def _lost(self, error: BaseException) -> BaseException:
        """The error of an exchange that failed. Two of each machine print it: one may be dead."""
        reason = str(error).split("] ", 1)[-1].split(". ")[0].split("\n")[0]
        what = f"another one has ended or does not answer ({reason})"
        fix = "find out what ended it, then continue with --resume"
        return OtherFailed() if self.local > 1 else ResourceError("the processes", what, fix)

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if dist.is_initialized() and (error is None or isinstance(error, Interrupted)):
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
            raise self._lost(error) from error

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Call `make` in rank 0 only, and return its result in every process."""
        made = [make() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(made, 0, group=self.group)
        return made[0]

    def everyone(self) -> None:
        """Wait until all processes are here."""
        self._reduce(torch.zeros(()), dist.ReduceOp.SUM)

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise UsageError for the first name whose value is not the same in all processes."""
        every = [facts] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(every, facts, group=self.group)
        for rank, theirs in enumerate(every):
            for name in (name for name in every[0] if theirs[name] != every[0][name]):
                what = f"is {theirs[name]} in rank {rank}, but {every[0][name]} in rank 0"
                fix = "start all processes with the same flags, on the same images"
                raise OtherFailed if self.local else UsageError(name, what, fix)

    @contextlib.contextmanager
    def first_of_each_machine_first(self) -> Iterator[None]:
        """Let one process of each machine run the block before the machine's others do."""
        if self.local:
            self.everyone()
        yield
        if not self.local:
            self.everyone()

    def stop_after(self, step: int, received: int) -> int:
        """The signal for which all processes stop after this step, or 0; to call in each step.
        received: that of this process, or 0. If torchrun was killed, that counts as SIGTERM."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            received = received or signal.SIGTERM
        return int(self._reduce(torch.tensor(int(received)), dist.ReduceOp.MAX))

    def check_grace(self, seconds: float) -> None:
        """Print a note if a step and a save take so many seconds that torchrun would kill them."""
        if "TORCHELASTIC_RUN_ID" in os.environ and seconds > int(os.environ.get(GRACE, 30)):
            longer = f"a step and a save take {seconds:.0f} s, longer than torchrun waits"
            say(f"note: {longer} after SIGTERM. Fix: set {GRACE}={2 * seconds:.0f}")

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model as a step calls it: its gradients are averaged over the processes."""
        parallel = nn.parallel.DistributedDataParallel
        return parallel(model, gradient_as_bucket_view=True) if self.world_size > 1 else model

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, on the CPU."""
        return self.sum(tensor) / self.world_size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        return self._reduce(tensor.to("cpu", copy=True), dist.ReduceOp.SUM)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor
