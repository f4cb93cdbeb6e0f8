"""Log lines and progress bars; the log of a training run: log.jsonl, config.json."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from attg.files import atomic_write, path_in_errors
from attg.pretraining import MAE_IMAGES, RULE

# Names of settings and metrics in older configs, logs and results, and their new names.
RENAMED_SETTINGS = {"knn_every": "eval_every", "keep_every": "keep_ckpt_every"}
RENAMED_SETTINGS |= {"fraction": "label_fraction", "cut": "affinity_threshold"}
RENAMED_SETTINGS |= {"mse_test": "val_mse"}
LINE = (
    "step {step:6}/{total} epoch {epoch:6.2f} loss {loss:.4f} mse {mse:.4f} "
    "lr {lr:.2e} tau {tau:.3f} {img_s:7.1f} img/s data {data_wait:4.0%} ETA {eta}"
)


def log_line(text):
    """Print a line at once on rank 0, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") != "0":
        return
    write = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    # Names of folders need not be UTF-8.
    text = text.encode(errors="backslashreplace").decode()
    with path_in_errors("standard output"):
        write(text)
        # Without it, output that is piped to a file arrives in blocks of 8 KB.
        sys.stdout.flush()


def print_table(rows):
    """Print dicts as the rows of a table with a column for each key of any of them."""
    columns = []
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [key, *(row.get(key, "") for row in rows)]
        texts = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
        width = max(map(len, texts))
        columns.append([text.ljust(width) for text in texts])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    log_line("\n".join(lines))


def progress(steps, total=None, desc=None, **options):
    """Wrap steps in a progress bar in a terminal with tqdm, otherwise log the progress.

    Rank 0 alone shows either. The first line comes after 5 s, the next after twice as
    long, up to 5 minutes; without desc there is none. total: by default len(steps).
    options: further ones of tqdm.
    """
    if os.environ.get("RANK", "0") != "0":
        return steps
    if sys.stderr.isatty() and find_spec("tqdm") is not None:
        from tqdm import tqdm

        return tqdm(steps, total=total, desc=desc, leave=False, **options)
    if desc is None:
        return steps
    return log_steps(steps, len(steps) if total is None else total, desc)


def log_steps(steps, total, desc):
    """Yield the steps and log how many are done, see progress."""
    start, wait = time.monotonic(), 5
    due = start + wait
    for done, step in enumerate(steps):
        now = time.monotonic()
        if done and now >= due:
            left = (now - start) / done * (total - done)
            log_line(f"{desc}: {done} of {total}, {left:.0f} s left")
            wait = min(2 * wait, 300)
            due = now + wait
        yield step


def rename_settings(settings):
    """A dict of settings or metrics with today's names."""
    return {RENAMED_SETTINGS.get(name, name): settings[name] for name in settings}


def revision():
    """Git revision of this code, with "-dirty" if files were changed."""
    root = Path(__file__).resolve().parents[1]
    # An installed copy may lie in a repository of the user's.
    if not (root / ".git").exists() or not shutil.which("git"):
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


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
                records.append(rename_settings(record))
    return records


def describe_machine(device, versions):
    """Log lines on versions and device, and on other programs that keep the cores busy."""
    name, threads = device.type, torch.get_num_threads()
    if name == "cuda":
        name = torch.cuda.get_device_name(device)
    python = sys.version.split()[0]
    packages = ", ".join(map(" ".join, versions.items()))
    line = f"attg_mae {revision()}, python {python}, {packages}, {name}"
    line += f", {threads} threads"
    load, cores = getattr(os, "getloadavg", lambda: [0])()[0], os.cpu_count()
    if name == "cpu" and threads > 1 and load > cores:
        line += f"\nload {load:.1f} on {cores} cores: CPU oversubscribed, "
        line += "OMP_NUM_THREADS=1 may be several times faster"
    return line


def describe_files(dataset):
    """Part of a log line: the classes, if any, and the folder of a data set of files."""
    first, last = dataset.names[[0, -1]]
    folder, classes = f"{dataset.root} ({first} ... {last})", dataset.num_classes
    return f"{classes} classes in {folder}" if classes else folder


def describe_run(run, model):
    """Log lines on what will be trained. run: attg.trainer.Run."""
    cfg, kind, tau = run.cfg, "a vanilla MAE", ""
    if run.maps is not None:
        kind = f"an MAE guided by attention maps ({cfg.guidance})"
        if cfg.guidance != "input_masking":  # which has no weights
            end = "" if cfg.tau_schedule == "constant" else f" to {cfg.tau_end}"
            tau = f", tau {cfg.tau}{end} ({cfg.tau_schedule})"
    if cfg.data == "toy" and cfg.model != "vit_micro":
        kind += ", a smoke test on the enlarged toy set"
    number, rule = run.train_set.num_images, "MAE's"
    source = describe_files(run.train_set) if run.train_set.pairs is None else cfg.data
    if number < MAE_IMAGES:
        rule = f"below {MAE_IMAGES:,} images: {RULE}"
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    height, width = run.train_set.size
    micro = cfg.batch_size // (cfg.accum * run.world)
    stop = f", stopped after {cfg.max_steps} steps" if cfg.max_steps else ""
    return (
        f"training {kind}: {cfg.model}, {sum(trained) / 1e6:.1f} M parameters\n"
        f"{number} images of {source}, {height} x {width} pixels, "
        f"patches {cfg.patch_size} x {cfg.patch_size}; {cfg.epochs} epochs of "
        f"{run.steps_per_epoch} steps{stop}\n"
        f"batch size {cfg.batch_size} = {micro} x {run.world} (processes) x "
        f"{cfg.accum} (--accum), {cfg.precision}; lr {cfg.lr:.2e} (base lr "
        f"{cfg.blr:.2e}, cosine), warm-up {cfg.warmup_epochs:.3g} epochs{tau}\n"
        f"defaults {rule}\n"
        f"run folder {cfg.out}: settings in config.json, all metrics in log.jsonl"
    )


def tensorboard_hook(folder, step):
    """A function that writes records for TensorBoard, instead of those after `step`."""
    from torch.utils.tensorboard import SummaryWriter

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
    continues: bool = True  # not if the run resumes from another folder

    def info(self, text):
        if not self.is_rank0:
            return
        try:
            log_line(text)
        except BrokenPipeError:
            # The reader has ended, as `| head` does: the run saves and ends, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.signals.append(13)  # SIGPIPE, which Windows does not define
            with contextlib.suppress(OSError):  # `2>&1 | head` has closed both
                print("the reader of the output has ended: saving", file=sys.stderr)

    def write(self, record, line):
        """Print a record as `line` and append it to log.jsonl."""
        if self.is_rank0:
            self.info(line)
            with path_in_errors(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            for hook in self.hooks:
                hook(record)

    def begin(self, run, model, start):
        """Print what will be trained, write config.json and drop the records to repeat.

        A run that resumes after the step `start` repeats all later steps, and the
        evaluation after `start` itself.
        """
        self.path = Path(run.cfg.out, "log.jsonl")
        if not self.is_rank0:
            return
        # The last bits of an image or a loss depend on these.
        packages = ("torch", "torchvision", "Pillow")
        versions = {name: importlib.metadata.version(name) for name in packages}
        self.info(
            f"{describe_machine(run.device, versions)}\n{describe_run(run, model)}"
        )
        if run.cfg.tensorboard:
            self.hooks.append(tensorboard_hook(self.path.parent, start))
        kept = []
        if start and self.continues and self.path.exists():
            kept = read_log(self.path)
        # Only evaluations have no loss.
        kept = [r for r in kept if r["step"] + ("loss" not in r) <= start]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        with atomic_write(self.path.with_name("config.json")) as temporary:
            config = dataclasses.asdict(run.cfg) | {"versions": versions}
            temporary.write_text(json.dumps(config, indent=1))
        # Left by processes that were killed while they wrote it.
        for path in self.path.parent.glob("last.pt*.tmp"):
            path.unlink()
        if start < run.total_steps:
            # Of another run or of earlier steps: an evaluation would take it for this one's.
            self.path.with_name("encoder.pt").unlink(missing_ok=True)
        last = f"epoch{start // run.steps_per_epoch:04d}.pt"
        saved = sorted(path.name for path in self.path.parent.glob("epoch*.pt"))
        if saved and saved[-1] > last:
            self.info(f"--out {run.cfg.out}: {saved[-1]} is of an earlier run")


@dataclasses.dataclass
class Meter:
    """Turns the metrics of the steps between two log lines into a record and a line."""

    run: object  # attg.trainer.Run
    start: int  # steps done before
    began: float = dataclasses.field(default_factory=time.perf_counter)
    # End of the time that the last record, or an evaluation, accounts for.
    logged: float = dataclasses.field(default_factory=time.perf_counter)

    def summarize(self, step, rows, lr, tau, waited, unreadable):
        """(record, log line) after `step`.

        rows: [loss, mse, gradient norm] of each step since the last record; their means
        are over finite values. waited: seconds spent waiting for data, the ranks' mean.
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
