"""Devices, process groups, collectives and stop signals."""

import contextlib
import datetime
import os
import re
import signal
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from attg.files import locked


@contextlib.contextmanager
def processes(name, timeout=30):
    """(device, rank, world) for the duration of the block.

    name: --device, or None for the first of cuda, mps and cpu that is available. Under
    torchrun the block has a process group. If a rank is lost, or does not answer for
    `timeout` minutes, the others raise ConnectionError that names it.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    try:
        device = torch.device(name or available[0])
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise ValueError(
            f"--device {name}: not available here; choose from {', '.join(available)}"
        )
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    members = []
    if world > 1:
        members = init_group(device, world, timeout)
    try:
        yield device, rank, max(1, world)
    except RuntimeError as error:
        # gloo also reports "Application timeout caused pair closure".
        from_group = re.search("gloo|nccl|peer|pair closure", str(error), re.I)
        if world == 1 or not from_group:
            raise
        message = f"{find_lost_rank(members)}, so rank {rank} ends as well"
        raise ConnectionError(message) from error
    # Not in a finally: after an error it would wait for ranks that torchrun ends.
    if world > 1:
        # A gloo thread may still hold a tensor of the last collective; up to PyTorch 2.7
        # it and destroy_process_group then deadlock (pytorch PR 154976).
        time.sleep(0.2)
        dist.destroy_process_group()


def init_group(device, world, timeout):
    """Initialize the process group; returns (host, pid) of each rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    members = [None] * world
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout))
        dist.all_gather_object(members, (socket.gethostname(), os.getpid()))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"--timeout {timeout:g}: not all {world} ranks have connected in these "
            f"minutes; start all of them, or raise --timeout ({reason})"
        ) from error
    return members


def find_lost_rank(members):
    """Describe the rank that has exited or is suspended; members: of init_group."""
    # A process's connections are closed before its entry in /proc changes.
    time.sleep(0.5)
    has_proc = Path("/proc/self/stat").exists()  # only on Linux
    for rank, (host, pid) in enumerate(members):
        if not has_proc or host != socket.gethostname():
            continue
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            state = stat.rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in "XZ":
            return f"rank {rank} (process {pid}) has exited"
        if state in "Tt":
            return f"rank {rank} (process {pid}) is suspended"
    return "a rank on another machine has exited, or one did not answer in --timeout"


def wait(world):
    """Barrier over all ranks."""
    if world > 1:
        dist.barrier()


def all_reduce_sum(values, device, world):
    """Sums of a list of numbers over all ranks, as a list of floats."""
    totals = torch.tensor(values, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def broadcast_from_rank0(function, rank, world):
    """Call function() on rank 0; every rank returns its result or raises its error."""
    if world == 1:
        return function()
    result = [None]
    if rank == 0:
        try:
            result = [function()]
        except (ValueError, OSError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


@contextlib.contextmanager
def exclusive_run(lock, output, rank, world, read=lambda: None):
    """Hold a lock file on rank 0 for the duration of the block; see files.locked.

    Every rank raises what rank 0 raises, and gets the result of read(), which rank 0
    calls while it holds the lock.
    """
    # torchrun restarts a killed run before all of its processes have exited.
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    with contextlib.ExitStack() as stack:
        held = locked(lock, output, timeout=30 if restarted else 0)
        # enter_context returns None here, so the result is that of read().
        enter_and_read = lambda: stack.enter_context(held) or read()  # noqa: E731
        yield broadcast_from_rank0(enter_and_read, rank, world)


@contextlib.contextmanager
def stop_signals():
    """A list that collects SIGTERM and SIGINT during the block, instead of an exit.

    A second signal of the same kind takes effect at once.
    """
    received = []

    def receive(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, receive) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
