"""The log of a run: log.jsonl, log lines and the meters behind them."""

import dataclasses
import datetime
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from attg.cli import say
from attg.files import replacing


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
