"""One run in several processes: what they agree on, who speaks, and how they end together.

`accelerate` starts the processes' group and names each one's device. Gradients, and what a resumed
run takes from rank 0, go through the group. All else goes through the group's store, a small server
of keys and values on the first machine: a process that waits there is never out of reach of a
signal, and learns within a second that another has failed. Of one process nothing here does
anything.
"""

import contextlib
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from system.errors import Interrupted, OtherFailed, ResourceError, UsageError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # how long an exchange waits for a process that is late
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
HEARTBEAT = 3.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one after which a process is taken for lost
GRACE = 10.0  # seconds that a process has to end by itself once another has failed


class Processes:
    """The processes of one run, seen from one of them: a context manager around the run."""

    runs = 0  # of this process: each has keys of its own

    def __init__(self, device: torch.device):
        self.rank, self.world_size, self.device = 0, 1, device
        self.keys = 0  # handed out so far: the processes ask for them in the same order
        self.asked, self.stop = False, None  # to stop; (signal, step to stop after)
        self.events = deque()  # the ends of the last steps on a GPU
        self.warned = False  # that another process has failed
        self.ended = threading.Event()
        try:
            if any(int(os.environ.get(name, "1")) > 1 for name in WORLD_SIZES):
                self._start()
        except ValueError as error:  # accelerate's, too
            fix = "start by torchrun, or unset what another launcher has left"
            raise UsageError("the launcher", str(error), fix) from error
        self.is_main = self.rank == 0

    def _start(self) -> None:
        """Join the other processes."""
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            join_again(self.device)
        options = [
            InitProcessGroupKwargs(timeout=TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        cpu = self.device.type == "cpu"  # said, or accelerate takes each process for a run
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=options)
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes

    # The store --------------------------------------------------------------------------------

    def __enter__(self) -> "Processes":
        if self.world_size > 1:
            Processes.runs += 1
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.prefix = f"faces/{attempt}/{Processes.runs}/"
            self.store = self._connect()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _connect(self) -> dist.Store:
        """A connection of our own, which no waiting of the group's can block."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
        return dist.PrefixStore(self.prefix, store)

    def key(self, name: str) -> str:
        """The same new key in all processes."""
        self.keys += 1
        return f"{name}/{self.keys}"

    def wait(self, key: str, until: Callable[[], bool] | None = None) -> None:
        """Wait until the store has a key. Raises OtherFailed where a process has failed."""
        pause = 0.001
        while not (until() if until else self.store.check([key])):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def check(self) -> None:
        """Raise OtherFailed where a process has failed."""
        if self.store.check(["failed"]) and self.store.get("failed") != str(self.rank).encode():
            raise OtherFailed

    # What is agreed on ------------------------------------------------------------------------

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, a small thing, in every process."""
        if self.world_size == 1:
            return make()
        key = self.key("made")
        if self.is_main:
            made = make()
            self.store.set(key, pickle.dumps(made))
            return made
        self.wait(key)
        return pickle.loads(self.store.get(key))

    def share(self, state: Any) -> Any:
        """Rank 0's nested dictionaries and lists of tensors and plain values, in every process."""
        if self.world_size == 1:
            return state
        outline = self.from_main(lambda: change_tensors(state, lambda tensor: tensor.to("meta")))

        def broadcast(tensor: Tensor) -> Tensor:
            ours = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
            sent = ours.to(self.device).contiguous()
            dist.broadcast(sent, 0)
            return ours.copy_(sent)  # with the strides it has in rank 0, as fused AdamW counts on

        shared = change_tensors(state if self.is_main else outline, broadcast)
        return state if self.is_main else shared

    def everyone(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            key = self.key("everyone")
            self.store.add(key, 1)
            self.wait(key, lambda: self.store.add(key, 0) == self.world_size)

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise UsageError where these facts, plain values, are not those of rank 0."""
        facts = json.loads(json.dumps(facts, default=str))
        for name, value in self.from_main(lambda: facts).items():
            if facts[name] != value:
                what = f"{name} is {facts[name]}, in rank 0 it is {value}"
                fix = "start every process with the same flags, on the same faces"
                raise UsageError(f"rank {self.rank}", what, fix)
        self.everyone()

    @contextlib.contextmanager
    def first_of_each_machine_first(self) -> Iterator[None]:
        """Let one process of each machine do the block before the others of it do."""
        if self.world_size > 1:
            machine = os.environ.get("GROUP_RANK", socket.gethostname())
            key = f"{self.key('machine')}/{machine}"
            first = self.accelerator.local_process_index == 0
            if not first:
                self.wait(key)
        yield
        if self.world_size > 1 and first:
            self.store.set(key, "done")

    # Gradients --------------------------------------------------------------------------------

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model as a step calls it: its gradients are averaged over the processes."""
        return model if self.world_size == 1 else self.accelerator.prepare_model(model)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        return tensor if self.world_size == 1 else self.accelerator.reduce(tensor, "mean")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU, once all are there."""
        if self.world_size == 1:
            return tensor
        self.everyone()
        return self.accelerator.reduce(tensor.to(self.device), "sum").cpu()

    # The end ----------------------------------------------------------------------------------

    def stop_after(self, step: int, received: int) -> int:
        """The signal that all processes stop for after this step, or 0; received: by this process.

        Asked between two steps. Nobody waits: who has a signal names, before it begins the next
        step, the step to stop after; no other can end that one without it, so all find the name in
        time. A GPU works behind its process: here at most one step, and the stop is one later."""
        if self.world_size == 1:
            return received
        lag = 0
        if self.device.type == "cuda":
            lag, event = 1, torch.cuda.Event()
            event.record()
            self.events.append(event)
            if len(self.events) > lag:
                self.events.popleft().synchronize()
        if received and not self.asked:
            self.asked = True
            self.store.compare_set("stop", "", f"{received} {step + 1 + lag}")
        if self.stop is None and self.store.check(["stop"]):
            self.stop = tuple(map(int, self.store.get("stop").split()))
        return self.stop[0] if self.stop and step >= self.stop[1] else 0

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if self.world_size == 1:
            return
        planned = error is None or isinstance(error, Interrupted) and self.stop
        try:
            if not planned and not isinstance(error, OtherFailed):
                first = self._first_to_fail(error)
                if not first and not isinstance(error, Interrupted):
                    raise OtherFailed from None
                if first and is_lost(error):
                    raise lost(str(error).strip().split("\n")[0]) from None
        finally:
            self.ended.set()
            with contextlib.suppress(RuntimeError):
                self._leave(GRACE if planned else HEARTBEAT + 1)
        if error is None:
            self.accelerator.end_training()

    def _leave(self, seconds: float) -> None:
        """Give a last sign of life; where the store is in this process, keep it for so long that
        the others can read what they need."""
        self.store.set(f"alive/{self.rank}", "ended")
        left = self.store.add("left", 1)
        if self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            end = time.monotonic() + seconds
            while left < self.world_size and time.monotonic() < end:
                time.sleep(0.05)
                left = self.store.add("left", 0)

    def _first_to_fail(self, error: BaseException) -> bool:
        """Whether no other process has failed before; from now on one has."""
        ours = str(self.rank).encode()
        try:
            if is_lost(error):  # who lost us may have a reason and be about to tell it
                for _ in range(20):
                    if self.store.check(["failed"]):
                        break
                    time.sleep(0.1)
            return self.store.compare_set("failed", "", str(self.rank)) == ours
        except RuntimeError:  # the process that holds the store is gone
            return not self.warned

    def _watch(self) -> None:
        """In a thread: give signs of life; where another process has failed, or gives none, end
        this one, which may wait in an exchange for ever."""
        with contextlib.suppress(RuntimeError):
            self._watch_until_the_end()
        if not self.ended.wait(GRACE):
            text = f"error: rank {self.rank}: the other processes are gone. Fix: --resume"
            print(text, file=sys.stderr, flush=True)
            os._exit(OtherFailed.exit_code)

    def _watch_until_the_end(self) -> None:
        store, seen, beats = self._connect(), {}, 0
        others = range(1, self.world_size) if self.is_main else [0]
        while not self.ended.wait(HEARTBEAT):
            beats += 1
            store.set(f"alive/{self.rank}", str(beats))
            for rank in others:
                key, now = f"alive/{rank}", time.monotonic()
                value = store.get(key) if store.check([key]) else b""
                if seen.get(rank, (None, 0))[0] != value:
                    seen[rank] = value, now
                elif value != b"ended" and now - seen[rank][1] > SILENCE:
                    store.compare_set("failed", "", str(rank))
            if store.check(["failed"]):
                self.warned = True
                if not self.ended.wait(GRACE):
                    os._exit(OtherFailed.exit_code)
                return


def join_again(device: torch.device) -> None:
    """Start the processes' group where `torchrun` has restarted them: its store may still hold the
    addresses of those that are gone, so each attempt has keys of its own."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # has the store's server
    store = dist.TCPStore(address, port, is_master=not agent and rank == 0, timeout=TIMEOUT)
    store = dist.PrefixStore(f"attempt/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    options = dict(store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    dist.init_process_group(backend, **options)


def is_lost(error: BaseException) -> bool:
    """Whether an exchange failed since another process is gone, or does not come."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection", "broken pipe")
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def lost(reason: str) -> ResourceError:
    """The line for it."""
    what = f"is gone, or waited for too long ({reason})"
    return ResourceError("another process", what, "see what ended it, then go on with --resume")


def change_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested dictionaries, lists and tuples with each tensor changed, in the order they have."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: change_tensors(value, change) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(change_tensors(value, change) for value in state)
    return state
