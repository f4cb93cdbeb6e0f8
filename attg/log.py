"""The log of a training run: log.jsonl, config.json and log lines."""

import contextlib
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

        A run that resumes after `step` repeats all later steps, and the evaluation after
        `step` itself. header: further lines to print.
        """
        if not self.is_rank0:
            return
        kept = read_log(self.path) if step and self.path.exists() else []
        # Only evaluations have no loss.
        kept = [r for r in kept if r["step"] + ("loss" not in r) <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
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
