"""The log of a training run: log.jsonl, config.json and log lines."""

import dataclasses
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from attg.cli import log_line
from attg.files import replacing

# Names of settings and metrics in older configs, logs and results, and their new names.
RENAMED_SETTINGS = {
    "knn_every": "eval_every",
    "keep_every": "keep_ckpt_every",
    "mse_test": "val_mse",
    "fraction": "label_fraction",
    "cut": "affinity_threshold",
}
LINE = (
    "step {step:6}/{total} epoch {epoch:6.2f} loss {loss:.4f} mse {mse:.4f} "
    "lr {lr:.2e} tau {tau:.3f} {img_s:7.1f} img/s data {data_wait:4.0%} ETA {eta}"
)


def rename(settings):
    """A dict of settings or metrics with today's names."""
    return {RENAMED_SETTINGS.get(name, name): settings[name] for name in settings}


def revision():
    """Git revision of this code, with "-dirty" if files were changed."""
    folder = Path(__file__).parent.parent
    status, text = subprocess.getstatusoutput(
        f'git -C "{folder}" describe --always --dirty'
    )
    return text if status == 0 else "unknown"


def parse_record(line):
    """A line of log.jsonl, bytes, as a dict; None if it is damaged."""
    try:
        record = json.loads(line)
    # RecursionError: thousands of brackets.
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and type(record.get("step")) is int:
        return rename(record)
    return None


def read_log(path):
    """The undamaged lines of a log.jsonl as dicts."""
    records = [parse_record(line) for line in Path(path).read_bytes().splitlines()]
    return [record for record in records if record]


@dataclasses.dataclass
class Log:
    """Prints log lines and writes log.jsonl, on rank 0 only."""

    path: Path
    is_rank0: bool

    def say(self, text):
        if self.is_rank0:
            log_line(text)

    def write(self, record, line):
        """Append a record to log.jsonl and print it as `line`."""
        if self.is_rank0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            log_line(line)

    def begin(self, cfg, step, device, header):
        """Write config.json, drop the records that will be repeated, print versions.

        header: further lines to print.

        A run that resumes after `step` repeats all later steps, and the evaluation after
        `step` itself. A killed run may leave an incomplete last line, which is dropped;
        other damaged lines are moved to a file of their own.
        """
        if not self.is_rank0:
            return
        if step and self.path.exists():
            self.truncate(step)
        else:
            self.path.write_bytes(b"")
        config = json.dumps(dataclasses.asdict(cfg), indent=1)
        self.path.with_name("config.json").write_text(config)
        name = device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(device)
        log_line(
            f"attg_mae {revision()}, python {sys.version.split()[0]}, torch "
            f"{torch.__version__}, {name}, {torch.get_num_threads()} threads, "
            f"{cfg.precision}\n{header}"
        )

    def truncate(self, step):
        """Drop what a run that resumes after `step` repeats; see begin."""
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        kept, damaged = [], []
        for line in complete:
            record = parse_record(line)
            if record is None:
                damaged.append(line)
            # Only evaluations have no loss.
            elif record["step"] < step or record["step"] == step and "loss" in record:
                kept.append(line)
        if damaged:
            moved = self.path.with_name("log.jsonl.damaged")
            with open(moved, "ab") as file:
                file.writelines(damaged)
            log_line(f"{self.path}: {len(damaged)} damaged lines, moved to {moved}")
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))


@dataclasses.dataclass
class Meter:
    """Turns the metrics of the steps between two log lines into a record and a line."""

    start: int
    total_steps: int
    steps_per_epoch: int
    batch_size: int
    began: float = dataclasses.field(default_factory=time.perf_counter)
    logged: float = dataclasses.field(default_factory=time.perf_counter)

    def pause(self):
        """Exclude the time up to now, of an evaluation, from the speed of the steps."""
        self.logged = time.perf_counter()

    def summarize(self, step, rows, lr, tau, waited, unreadable):
        """(record, log line) after `step`.

        rows: [loss, mse, gradient norm] of each step since the last record; their means
        are over finite values. waited: seconds spent waiting for data.
        """
        now = time.perf_counter()
        seconds, self.logged = now - self.logged, now
        values = torch.tensor(rows, dtype=torch.float64)
        finite = values.isfinite()
        means = torch.where(finite, values, 0.0).sum(0) / finite.sum(0).clamp(min=1)
        loss, mse, grad_norm = means.tolist()
        record = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss,
            "mse": mse,
            "grad_norm": grad_norm,
            "lr": lr,
            "tau": tau,
            # Steps skipped by the gradient scaler of fp16.
            "skipped": int((~finite[:, 2]).sum()),
            "img_s": len(rows) * self.batch_size / seconds,
            "data_wait": waited / seconds,
            "unreadable": unreadable,
        }
        per_step = (now - self.began) / (step - self.start)
        eta = datetime.timedelta(seconds=round((self.total_steps - step) * per_step))
        line = LINE.format(**record, total=self.total_steps, eta=eta)
        for name in ("skipped", "unreadable"):
            if record[name]:
                line += f" {name} {record[name]}"
        return record, line
