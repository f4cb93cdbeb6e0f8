"""
`bench.py gpu`: the other benchmarks, the kernel's tests and short training runs on a GPU,
the most important first, until the time is up.

Each is a command in a process of its own, so one that crashes or hangs costs its own
results only. OUT/gpu.jsonl records how each ended, OUT/NAME.log holds its output, and
tables go to OUT/NAME. The same command continues with what has not ended well.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands(settings):
    """{name: command} in order of importance; the first word is a Python script or -m."""

    def bench(name, *flags):
        return ["bench.py", name, *flags]

    peers = ["--mae_repo", settings.mae_repo] if settings.mae_repo else []
    train = ["attg_mae.py", "--log_every", 1, "--epochs", 1, "--out"]
    runs = settings.out / "runs"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    large = ["--model", "vit_large", "--batch_size", 1024, "--accum", "auto"]
    kernel = ["--dtypes", "bfloat16", "--batches", 256]
    p16 = ["--shapes", "ViT-B/L 16", "--images", "float32", "bfloat16", "uint8"]
    return {
        "tests": ["-m", "pytest", "-q", "tests/test_kernel.py", "tests/test_loss.py"],
        "kernel": bench("kernel", *kernel, *p16),
        "step": bench("step", "--dtypes", "bfloat16", *peers),
        "headline": [*torchrun, *train, runs / "headline", *large],
        "step-compiled": bench("step", "--compile", "--models", "vit_base", *peers),
        "maps": bench("maps"),
        "knn": bench("knn"),
        "data": bench("data", "--workers", 0, 8),
        "kernel-shapes": bench("kernel", "--batches", 256),
        "kernel-batches": bench("kernel", *p16[:2], "--dtypes", "bfloat16"),
        "fp16": [*train, runs / "fp16", "--precision", "fp16"],
        "compiled": [*train, runs / "compiled", "--compile"],
    }


def finished(path):
    """Names of the commands that ended well, from the records in a file."""
    if not path.exists():
        return set()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["name"] for record in records if record["code"] == 0}


def run(settings):
    """Run the commands until the time is up. Returns the records of this call."""
    end = time.monotonic() + 60 * settings.minutes
    path = settings.out / "gpu.jsonl"
    done, records = finished(path), []
    for name, command in commands(settings).items():
        seconds = end - time.monotonic()
        if name in done or seconds <= 0:
            continue
        if command[0] == "bench.py":
            command = [*command, "--out", settings.out / name]
        if settings.device and command[0] != "-m":
            command = [*command, "--device", settings.device]
        command = [sys.executable, *map(str, command)]
        print("$", *command, flush=True)
        began = time.monotonic()
        with open(settings.out / f"{name}.log", "w") as log:
            try:
                result = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=log, timeout=seconds
                )
                code = result.returncode
            except subprocess.TimeoutExpired:
                code = "time is up"
        record = {"name": name, "code": code, "s": round(time.monotonic() - began, 1)}
        records.append(record)
        print(record, flush=True)
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    return records
