"""The log of a training run: log.jsonl, config.json and log lines."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from attg.cli import log_line
from attg.files import naming, replacing

# Names of settings and metrics in older configs, logs and results, and their new names.
RENAMED_SETTINGS = {"knn_every": "eval_every", "keep_every": "keep_ckpt_every"}
RENAMED_SETTINGS |= {"fraction": "label_fraction", "cut": "affinity_threshold"}
RENAMED_SETTINGS |= {"mse_test": "val_mse"}
LINE = (
    "step {step:6}/{total} epoch {epoch:6.2f} loss {loss:.4f} mse {mse:.4f} "
    "lr {lr:.2e} tau {tau:.3f} {img_s:7.1f} img/s data {data_wait:4.0%} ETA {eta}"
)


def rename(settings):
    """A dict of settings or metrics with today's names."""
    return {RENAMED_SETTINGS.get(name, name): settings[name] for name in settings}


def revision():
    """Git revision of this code, with "-dirty" if files were changed."""
    command = f'git -C "{Path(__file__).parent}" describe --always --dirty'
    status, text = subprocess.getstatusoutput(command)
    return text if status == 0 else "unknown"


def read_log(path):
    """The records of a log.jsonl, with today's names.

    Damaged lines, such as the incomplete last one of a killed run, are left out.
    """
    records = []
    for line in Path(path).read_bytes().splitlines():
        # RecursionError: thousands of brackets.
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(rename(record))
    return records


def versions():
    """{package: version}, of those that the last bits of an image or a loss depend on."""
    packages = ("torch", "torchvision", "Pillow")
    return {name: importlib.metadata.version(name) for name in packages}


def describe_machine(device):
    """Log lines on versions and device, and on other programs that keep the cores busy."""
    name, threads = device.type, torch.get_num_threads()
    if name == "cuda":
        name = torch.cuda.get_device_name(device)
    python = sys.version.split()[0]
    packages = ", ".join(map(" ".join, versions().items()))
    line = f"attg_mae {revision()}, python {python}, {packages}, {name}"
    line += f", {threads} threads"
    load, cores = getattr(os, "getloadavg", lambda: [0])()[0], os.cpu_count()
    if name == "cpu" and threads > 1 and load > cores:
        line += f"\nload {load:.1f} on {cores} cores: threads wait for each other on a "
        line += "busy machine, OMP_NUM_THREADS=1 may be several times faster"
    return line


def tensorboard_hook(folder, step):
    """A function that writes records for TensorBoard, instead of those after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard: needs pip install tensorboard") from error
    writer = SummaryWriter(folder, purge_step=step + 1)

    def write(record):
        for name, value in (record | record.get("knn", {})).items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


@dataclasses.dataclass
class Log:
    """Prints log lines and writes log.jsonl, on rank 0 only.

    hooks: functions that get each record. signals: see attg.distributed.stop_signals.
    """

    is_rank0: bool
    hooks: list
    signals: list
    path: Path | None = None  # of log.jsonl, from begin on

    def say(self, text):
        if not self.is_rank0:
            return
        try:
            log_line(text)
        except BrokenPipeError:
            # The reader has ended, as `| head` does: the run saves and ends, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print("the reader of the output has ended: saving", file=sys.stderr)
            self.signals.append(13)  # SIGPIPE, which Windows does not define

    def write(self, record, line):
        """Append a record to log.jsonl and print it as `line`."""
        if self.is_rank0:
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            for hook in self.hooks:
                hook(record)
            self.say(line)

    def begin(self, cfg, step, header):
        """Write config.json, drop the records that will be repeated, print the header.

        A run that resumes after `step` repeats all later steps, and the evaluation after
        `step` itself.
        """
        self.path = Path(cfg.out, "log.jsonl")
        if not self.is_rank0:
            return
        if cfg.tensorboard:
            self.hooks.append(tensorboard_hook(self.path.parent, step))
        kept = read_log(self.path) if step and self.path.exists() else []
        # Only evaluations have no loss.
        kept = [r for r in kept if r["step"] + ("loss" not in r) <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        with replacing(self.path.with_name("config.json")) as temporary:
            config = dataclasses.asdict(cfg) | {"versions": versions()}
            temporary.write_text(json.dumps(config, indent=1))
        # Of processes that were killed while they wrote it.
        for path in self.path.parent.glob("last.pt*.tmp"):
            path.unlink()
        self.say(header)


class Meter:
    """Turns the metrics of the steps between two log lines into a record and a line."""

    def __init__(self, run, start):
        self.run, self.start = run, start  # attg.trainer.Setup, steps done before
        self.began = self.logged = time.perf_counter()

    def summarize(self, step, rows, lr, tau, waited, unreadable):
        """(record, log line) after `step`.

        rows: [loss, mse, gradient norm] of each step since the last record; their means
        are over finite values. waited: seconds spent waiting for data.
        """
        run, now = self.run, time.perf_counter()
        seconds, self.logged = now - self.logged, now
        values = torch.tensor(rows, dtype=torch.float64)
        finite = values.isfinite()
        means = torch.where(finite, values, 0.0).sum(0) / finite.sum(0).clamp(min=1)
        loss, mse, grad_norm = means.tolist()
        record = {
            "step": step,
            "epoch": step / run.steps_per_epoch,
            "loss": loss,
            "mse": mse,
            "grad_norm": grad_norm,
            "lr": lr,
            "tau": tau,
            # Steps skipped by the gradient scaler of fp16.
            "skipped": int((~finite[:, 2]).sum()),
            "img_s": len(rows) * run.cfg.batch_size / seconds,
            "data_wait": waited / seconds,
            "unreadable": unreadable,
        }
        per_step = (now - self.began) / (step - self.start)
        eta = datetime.timedelta(seconds=round((run.total_steps - step) * per_step))
        line = LINE.format(**record, total=run.total_steps, eta=eta)
        for name in ("skipped", "unreadable"):
            if record[name]:
                line += f" {name} {record[name]}"
        return record, line
