"""
A run: its processes and signals, its log, its checkpoints, and how it is continued.
"""

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

from attg.files import locked, require

# -- Processes and signals -------------------------------------------------------------

# Minutes that the processes of a run wait for each other.
TIMEOUT = 30


def add_timeout(flag):
    """flag: add_argument of a parser."""
    text = "minutes after which a silent process is given up [%(default)s]"
    flag("--timeout", type=float, default=TIMEOUT, help=text)


@contextlib.contextmanager
def processes(name, timeout=TIMEOUT):
    """(device, rank, world): the named device or the best there is.

    Under torchrun the group of processes exists for as long as the block runs. If one of
    them is lost, or does not answer for `timeout` minutes, ConnectionError says which.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    kinds = ["cpu"]
    if torch.backends.mps.is_available():
        kinds.insert(0, "mps")
    if torch.cuda.is_available():
        kinds.insert(0, "cuda")
    known = not name or name.split(":")[0] in kinds
    require(known, f"--device {name}: there is none here; choose from {kinds}")
    try:
        device = torch.device(name or kinds[0])
    except RuntimeError as error:
        words = f"--device {name}: there is no such device; choose from {kinds}"
        raise ValueError(words) from error
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    members = []
    if world > 1:
        members = gather_processes(device, world, timeout)
    try:
        yield device, rank, max(1, world)
    except RuntimeError as error:
        # gloo also says "Application timeout caused pair closure".
        of_group = re.search("gloo|nccl|peer|pair closure", str(error), re.I)
        if world == 1 or not of_group:
            raise
        words = f"{lost_process(members)}, so rank {rank} ends as well"
        raise ConnectionError(words) from error
    # Not after an error: it would wait for the other processes, which torchrun ends.
    if world > 1:
        # A thread of gloo's may still hold a tensor of the last exchange. Up to PyTorch
        # 2.7 it and destroy would wait for each other for ever (pytorch PR 154976).
        time.sleep(0.2)
        dist.destroy_process_group()


def gather_processes(device, world, timeout):
    """Makes the group of processes. Returns (host, pid) of each, by rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    members = [None] * world
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout))
        dist.all_gather_object(members, (socket.gethostname(), os.getpid()))
    except RuntimeError as error:
        words = str(error).partition("\n")[0]
        raise ConnectionError(
            f"--timeout {timeout:g}: so many minutes were not enough for all {world} "
            f"processes to come together ({words})"
        ) from error
    return members


def lost_process(members):
    """In words which of these processes, (host, pid) by rank, is gone or stopped."""
    # The system closes the connections of a process before it is gone.
    time.sleep(0.5)
    told = Path("/proc/self/stat").exists()  # by Linux alone
    for rank, (host, pid) in enumerate(members):
        if not told or host != socket.gethostname():
            continue
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            state = stat.rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in "XZ":
            return f"rank {rank} (process {pid}) is gone"
        if state in "Tt":
            return f"rank {rank} (process {pid}) is stopped"
    return "a process on another machine is gone, or one has not answered in --timeout"


def wait(world):
    """Until all processes are here."""
    if world > 1:
        dist.barrier()


def all_reduce_sum(numbers, device, world):
    """Sums of a few numbers over all processes, as a list."""
    totals = torch.tensor(numbers, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def broadcast_from_rank0(find, rank, world):
    """find() of the first process, in all of them: what it returns, or raises."""
    if world == 1:
        return find()
    found = [None]
    if rank == 0:
        try:
            found = [find()]
        except (ValueError, OSError) as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@contextlib.contextmanager
def exclusive_run(lock, what, rank, world):
    """Refuses, in all processes, to run while another run writes to the same place.

    lock: a file beside or in `what`, held by the first process; see files.locked.
    """
    # torchrun has killed a run, and starts it again before all of it is gone.
    patience = 30 if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else 0
    with contextlib.ExitStack() as held:

        def take():
            held.enter_context(locked(lock, what, patience))

        broadcast_from_rank0(take, rank, world)
        yield


@contextlib.contextmanager
def stop_signals():
    """A list that receives SIGTERM and SIGINT as they come, for the run to end well.

    A second signal of the kind acts at once. The old handlers return afterwards.
    """
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def default_workers(device):
    """Loader processes of each process: none beside a CPU that is busy training."""
    if device.type == "cpu":
        return 0
    cores = os.cpu_count() or 1
    return min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def choose_precision(name, device, width):
    """(name, dtype of autocast or None) of --precision; auto is the best for the device.

    width: the encoder's. On a CPU narrow models lose more by the conversions than the
    products gain: so it was in a trial on one processor, whose log is not kept.
    """
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        elif device.type == "cpu" and width >= 384 and cpu_has_bf16():
            name = "bf16"
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return name, dtypes[name]


def cpu_has_bf16(file="/proc/cpuinfo"):
    """Whether the processor multiplies in bf16, by AVX512-BF16 or AMX; file: Linux's."""
    try:
        words = set(Path(file).read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})
