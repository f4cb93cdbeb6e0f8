"""
A run: its processes and signals, its log, its checkpoints, and how it is continued.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common.checkpoint import load_checkpoint, read_settings
from common.commandline import say
from common.files import locked, replacing, require

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


def total_over_processes(numbers, device, world):
    """Sums of a few numbers over all processes, as a list."""
    totals = torch.tensor(numbers, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def from_first(find, rank, world):
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
def only_run(lock, what, rank, world):
    """Refuses, in all processes, to run while another run writes to the same place.

    lock: a file beside or in `what`, held by the first process; see files.locked.
    """
    # torchrun has killed a run, and starts it again before all of it is gone.
    patience = 30 if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else 0
    with contextlib.ExitStack() as held:

        def take():
            held.enter_context(locked(lock, what, patience))

        from_first(take, rank, world)
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


def revision():
    """The git revision of this code, "-dirty" behind it if files were changed."""
    folder = Path(__file__).parent.parent
    status, text = subprocess.getstatusoutput(
        f'git -C "{folder}" describe --always --dirty'
    )
    return text if status == 0 else "unknown"


def describe_machine(device):
    """Versions, git revision, device and threads, in a line."""
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    python = sys.version.split()[0]
    versions = f"attg_mae {revision()}, python {python}, torch {torch.__version__}"
    return f"{versions}, {name}, {torch.get_num_threads()} threads"


# -- Checkpoints -----------------------------------------------------------------------


def checkpoint_to_continue(cfg):
    """Path of the checkpoint that --resume and --out name, or None."""
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto":
        return Path(cfg.resume)
    own = Path(cfg.out, "last.pt")
    return own if own.exists() else None


def checkpoint_to_show(cfg):
    """Path of the checkpoint of which --epochs 0 draws pictures, or None.

    The pictures of a run are not replaced by those of other weights: ValueError.
    """
    own = Path(cfg.out, "last.pt")
    asked = checkpoint_to_continue(cfg)
    if not own.exists():
        return asked
    others = None
    if cfg.init:
        others = f"--init {cfg.init}"
    elif asked is None or asked.resolve() != own.resolve():
        others = f"--resume {cfg.resume}"
    require(
        others is None,
        f"--epochs 0: {own} is of a run, whose reconstructions.png is kept; for pictures "
        f"of {others} name another folder: --out",
    )
    return own


def read_run(path):
    """The parts of a checkpoint of this project's training, or ValueError."""
    parts = load_checkpoint(path)
    lacks = {"model", "optimizer", "scaler", "step", "config"} - set(parts)
    for name in ("model", "optimizer"):
        if not parts.get(name):
            lacks.add(name)
    require(
        not lacks,
        f"{path}: not a training checkpoint of this project, lacks {sorted(lacks)}; "
        "try --init",
    )
    step = parts["step"]
    require(type(step) is int and 0 <= step < 2**53, f"{path}: its step is no number")
    config = read_settings(parts["config"], path)
    return parts | {"config": config, "path": str(path)}


def keep_settled(cfg, parts):
    """What a continued run has settled itself stays so, unless it is given now.

    That is what stood for "auto", and a warm-up that was the default of its time. parts:
    of the checkpoint.
    """
    old = parts["config"]
    usual = dataclasses.replace(cfg, warmup_epochs=None).warmup_epochs
    for name in ("precision", "accum"):
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, old.get(name, "auto"))
    if cfg.warmup_epochs == usual and old.get("epochs") == cfg.epochs:
        cfg.warmup_epochs = old.get("warmup_epochs", usual)
    try:
        cfg.check()
    except ValueError as error:
        words = f"{parts['path']}: its settings are damaged ({error})"
        raise ValueError(words) from error


def compare_settings(path, parts, cfg, total_steps, fixed, free):
    """[--NAME OLD -> NEW] of the settings that differ from those in the checkpoint.

    fixed: settings that may not change in a run. free: those that may even change once
    it has ended (any other would pass an old result off as new). ValueError names them.
    """
    new = json.loads(json.dumps(dataclasses.asdict(cfg)))
    old = parts["config"]
    require(
        cfg.resume != "auto" or old.get("epochs") == cfg.epochs or not cfg.epochs,
        f"{path} was made for --epochs {old.get('epochs')}, not {cfg.epochs}, and its lr "
        "and tau follow that number; train in another folder: --out, or go on from it "
        f"by these epochs: --resume {path}",
    )
    ended = parts["step"] >= total_steps
    differences, refused = [], []
    for name, value in new.items():
        if old.get(name) == value:
            continue
        words = f"--{name} {old.get(name)} -> {value}"
        differences.append(words)
        if name in fixed or (ended and name not in free):
            refused.append(words)
    require(
        not refused,
        f"{path} is of another run: {', '.join(refused)}; "
        "change --out, or start anew: --resume none",
    )
    return differences


def find_checkpoint(cfg, total_steps, log, fixed, free):
    """The parts of the checkpoint that this run continues, or None.

    fixed, free: see compare_settings. cfg takes over what that run has settled.
    """
    path = checkpoint_to_continue(cfg)
    if path is None:
        return None
    parts = read_run(path)
    keep_settled(cfg, parts)
    differences = compare_settings(path, parts, cfg, total_steps, fixed, free)
    note = f"; the new value holds: {differences}" if differences else ""
    log.say(f"continuing {path} after step {parts['step']}{note}")
    return parts


def find_model(cfg, log, fixed):
    """The parts of the checkpoint that --epochs 0 shows, or None.

    fixed: settings by which its model must be that of cfg.
    """
    path = checkpoint_to_show(cfg)
    if path is None:
        return None
    parts = read_run(path)
    everything = set(dataclasses.asdict(cfg))
    compare_settings(path, parts, cfg, 0, fixed, everything)
    log.say(f"pictures of {path} after step {parts['step']}")
    return parts


# -- The log ---------------------------------------------------------------------------

LINE = (
    "step {step:6}/{total} epoch {epoch:6.2f} loss {loss:.4f} mse {mse:.4f} "
    "lr {lr:.2e} tau {tau:.3f} {img_s:7.1f} img/s data {data_wait:4.0%} ETA {eta}"
)


class Log:
    """What a run says, and what it writes to log.jsonl; only the first process does."""

    def __init__(self, out, rank):
        self.path = Path(out, "log.jsonl")
        self.first = rank == 0

    def say(self, text):
        if self.first:
            say(text)

    def record(self, values):
        """Adds a line of JSON."""
        if self.first:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def records(self):
        """The lines of log.jsonl, as dicts, without damaged ones."""
        found = [as_record(line) for line in self.path.read_bytes().splitlines()]
        return [record for record in found if record]

    def begin(self, cfg, step):
        """Writes config.json, and keeps of an earlier log what this run does not repeat.

        It goes on after `step`: later steps come again, and so does the k-NN of `step`
        itself. A killed run leaves half a line; other damaged ones are set aside.
        """
        if not self.first:
            return
        content = b""
        if step and self.path.exists():
            content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        kept, damaged = [], []
        for line in whole:
            record = as_record(line)
            if record is None:
                damaged.append(line)
                continue
            # An evaluation is what has no loss.
            repeated = record["step"] == step and "loss" not in record
            if record["step"] <= step and not repeated:
                kept.append(line)
        if damaged:
            aside = self.path.with_name("log.jsonl.damaged")
            with open(aside, "ab") as file:
                file.writelines(damaged)
            self.say(f"{self.path}: {len(damaged)} damaged lines, moved to {aside}")
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        config = json.dumps(dataclasses.asdict(cfg), indent=1)
        self.path.with_name("config.json").write_text(config)


def as_record(line):
    """The dict of a line of log.jsonl, bytes; None if it is damaged."""
    try:
        record = json.loads(line)
    # RecursionError: of thousands of brackets.
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and type(record.get("step")) is int:
        return record
    return None


class Meter:
    """Loss, unweighted error and gradient norm of the steps since the last log line.

    They stay on the device until they are read, so that no step waits for it.
    """

    def __init__(self, start, total, steps_per_epoch, batch_size, world):
        self.start, self.total = start, total
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.world = world
        self.values = []  # (3,) a step
        self.began = self.logged = time.perf_counter()

    def add(self, values):
        self.values.append(values)

    def read(self):
        """[[loss, mse, gradient norm], ...] of these steps, means of the processes."""
        values = torch.stack(self.values) / self.world
        if self.world > 1:
            dist.all_reduce(values)
        self.values.clear()
        return values.tolist()

    def pause(self):
        """Time up to here, of an evaluation, is not that of a step."""
        self.logged = time.perf_counter()

    def record(self, step, rows, lr, tau, waited, unreadable):
        """What a line of the log tells after `step`; rows: of read()."""
        now = time.perf_counter()
        seconds = now - self.logged
        loss, mse, norm = (mean_of_finite(row[i] for row in rows) for i in range(3))
        self.logged = now
        return {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss,
            "mse": mse,
            "grad_norm": norm,
            "lr": lr,
            "tau": tau,
            # steps that fp16's scaler left out
            "skipped": sum(not math.isfinite(row[2]) for row in rows),
            "img_s": len(rows) * self.batch_size / seconds,
            "data_wait": waited / seconds,
            "unreadable": unreadable,
        }

    def line(self, record):
        """The record in words, with the time that is left."""
        each = (self.logged - self.began) / (record["step"] - self.start)
        eta = datetime.timedelta(seconds=round((self.total - record["step"]) * each))
        line = LINE.format(**record, total=self.total, eta=eta)
        for name in ("skipped", "unreadable"):
            if record[name]:
                line += f" {name} {record[name]}"
        return line


def mean_of_finite(values):
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / max(1, len(finite))


def refuse_not_finite(rows, step, batches, precision, log):
    """ValueError if a loss, an error or a gradient is NaN or inf.

    rows: Meter.read() of the steps up to `step`. Names the first such step, its images
    and what went wrong first. fp16's scaler skips steps of infinite gradients itself.
    """
    for at, (loss, mse, norm) in enumerate(rows, step - len(rows)):
        if precision == "fp16":
            norm = 0.0
        if math.isfinite(loss + mse + norm):
            continue
        if math.isfinite(loss):
            part = "gradient"
        elif math.isfinite(mse):
            part = "weight"
        else:
            part = "prediction or input"
        ids = batches.indices(at).tolist()
        log.record({"step": at + 1, "not_finite": part, "indices": ids})
        raise ValueError(
            f"step {at + 1}: {part} not finite; images {ids[:9]} ... (all in log.jsonl). "
            "Checkpoints are from before. "
            "Try a lower --lr, --clip_grad 1 or --precision fp32"
        )
