"""Devices, process groups, collectives, locks and stop signals."""

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def processes(name, timeout=30):
    """(device, rank, world) for the duration of the block.

    name: --device, or None for the first of cuda, mps and cpu that is available. Under
    torchrun the block has a process group. If a rank is lost, or does not answer for
    `timeout` minutes, the others raise ConnectionError.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    found = {"cuda": torch.cuda.is_available()}
    found |= {"mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in found if found[kind]]
    match = re.fullmatch(r"(\w+)(:\d+)?", name or available[0])
    if not match or match[1] not in available:
        raise ValueError(
            f"--device {name}: not available, use {' or '.join(available)}"
        )
    device = torch.device(match[0])
    if device.type == "cuda":
        if device.index is None:
            # slurm may show each rank a single GPU, which is number 0 in all of them.
            local = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    try:
        if world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            limit = datetime.timedelta(minutes=timeout)
            dist.init_process_group(backend, timeout=limit)
        yield device, rank, world
    except RuntimeError as error:
        # gloo also reports "Application timeout caused pair closure", and the store
        # "1/2 clients joined".
        words = "gloo|nccl|peer|pair closure|clients joined"
        if world == 1 or not re.search(words, str(error), re.I):
            raise
        reason = f"one of {world} ranks has exited, or has not answered for {timeout:g}"
        raise ConnectionError(f"rank {rank} ends: {reason} min (--timeout)") from error
    # Not in a finally: after an error it would wait for ranks that torchrun ends.
    if world > 1:
        # A gloo thread may still hold a tensor of the last collective; up to PyTorch 2.7
        # it and destroy_process_group then deadlock (pytorch PR 154976).
        time.sleep(0.2)
        dist.destroy_process_group()


def barrier():
    """Barrier over all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_rank0(function):
    """Call function() on rank 0; every rank returns its result or raises its error.

    Tensors in dicts and lists are sent one by one: pickled together, a checkpoint would
    take four times its size on every rank.
    """
    if not dist.is_initialized():
        return function()
    rank, result, message = dist.get_rank(), None, [None, None]
    if rank == 0:
        try:
            result = function()
            message[0] = map_tensors(result, lambda x: x.to("meta"))
        except (ValueError, OSError) as raised:
            message[1] = raised
    dist.broadcast_object_list(message)
    shapes, error = message
    if error:
        raise error
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"

    def exchange(x):
        content = x if rank == 0 else torch.empty(x.shape, dtype=x.dtype)
        content = content.contiguous().to(device)
        dist.broadcast(content, 0)
        return content.cpu()

    return map_tensors(result if rank == 0 else shapes, exchange)


def map_tensors(x, function):
    """Nested dicts and lists with function(tensor) in place of each tensor."""
    if isinstance(x, dict):
        return {key: map_tensors(value, function) for key, value in x.items()}
    if isinstance(x, list):
        return [map_tensors(value, function) for value in x]
    return function(x) if isinstance(x, torch.Tensor) else x


@contextlib.contextmanager
def exclusive_run(path, output):
    """Hold an exclusive lock file on rank 0 for the duration of the block.

    ValueError on every rank, with the holder, if another process has the lock. output:
    what the lock protects, for messages. The lock is released when its process exits,
    even if it is killed. Without file locks (Windows, some network file systems) it
    only warns.
    """
    path, held = Path(path), []
    is_new_folder = not path.parent.exists()
    try:
        broadcast_from_rank0(lambda: held.append(acquire_lock(path, output)))
        yield
    finally:
        for file in held:
            # Removed while the lock is held: a waiting process notices and creates a new
            # file. Windows cannot remove an open file, and has no lock to hold.
            with contextlib.suppress(OSError):
                path.unlink()
            file.close()
            if is_new_folder:
                # Succeeds only if nothing was written.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()


def acquire_lock(path, output):
    """Create a lock file with its folder, and lock it; see exclusive_run."""
    began = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+")
            try:
                if fcntl is None:
                    raise OSError("no file locks on this system")
                # Not flock: forked loader workers would inherit its locks.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read() or "another process"
                file.close()
                # The processes of a killed run may still exit, and a network file system
                # frees the locks of a lost machine after a minute or two.
                if time.monotonic() - began >= (120 if is_restarted() else 0):
                    message = f"{holder} is writing here; wait, or choose another path"
                    raise ValueError(f"{output}: {message}") from None
                time.sleep(0.1)
                continue
            except OSError as error:
                print(
                    f"{output}: not locked against other runs ({error})",
                    file=sys.stderr,
                )
                return file
            # The previous holder may have removed the file after this process opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                    return file
            file.close()
    except OSError as error:
        raise OSError(f"{output}: cannot write here ({error})") from error


def is_restarted():
    """Whether torchrun has restarted this process, or slurm has requeued its job."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") != "0" for name in counts)


# SIGHUP and SIGUSR1 do not exist on Windows.
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals():
    """A list that collects STOP_SIGNALS in the block, instead of an exit.

    A second signal of the same kind takes effect at once, in a rank after a second.
    """
    received = []

    def receive(number, _):
        received.append(number)
        if "RANK" in os.environ:
            # Of a signal to all processes of a job, torchrun sends its ranks another copy.
            signal.signal(number, signal.SIG_IGN)
            time.sleep(1)
        signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGTERM, signal.SIGINT]
    for number in set(STOP_SIGNALS) - set(numbers):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets for SIGHUP
            numbers.append(number)
    previous = [signal.signal(number, receive) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
