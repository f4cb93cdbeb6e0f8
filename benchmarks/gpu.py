"""
`bench.py gpu`: the other benchmarks, the kernel's tests and short training runs on a GPU,
the most important first, until the time is up.

Each is a command in a process of its own, so one that crashes or hangs costs its own
results only. OUT/NAME.log holds its output, renamed to NAME.txt when it has ended well.
The same command continues with what has not.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands(settings):
    """{name: arguments of Python} in order of importance."""
    runs = Path(settings.out, "runs")
    peers = ["--mae_repo", settings.mae_repo] if settings.mae_repo else []
    step = ["bench.py", "step", "--precision", "bf16", *peers, "--models", "vit_base"]
    train = ["attg_mae.py", "--log_every", 1, "--epochs", 1, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    large = ["--model", "vit_large", "--batch_size", 1024, "--accum", 4]
    return {
        "tests": ["-m", "pytest", "-q", "tests/test_kernel.py", "tests/test_loss.py"],
        "kernel": ["bench.py", "kernel", "--batch_size", 256],
        "step": [*step, "vit_large"],
        "headline": [*torchrun, *train, runs / "headline", *large],
        "step-compiled": [*step, "--compile"],
        "maps": ["bench.py", "maps"],
        "knn": ["bench.py", "knn"],
        "data": ["bench.py", "data", "--data", settings.data],
        "fp16": [*train, runs / "fp16", "--precision", "fp16"],
        "compiled": [*train, runs / "compiled", "--compile"],
    }


def run(settings):
    """Run the commands until the time is up. Returns {name: how it ended}."""
    end = time.monotonic() + 60 * settings.minutes
    out, codes = Path(settings.out), {}
    out.mkdir(parents=True, exist_ok=True)
    for name, command in commands(settings).items():
        seconds = end - time.monotonic()
        log = out / f"{name}.log"
        if log.with_suffix(".txt").exists() or seconds <= 0:
            continue
        print("$ python", *command, flush=True)
        command = [sys.executable, *map(str, command)]
        with open(log, "w") as file:
            options = {"stdout": file, "stderr": file, "timeout": seconds}
            try:
                codes[name] = subprocess.run(command, cwd=ROOT, **options).returncode
            except subprocess.TimeoutExpired:
                codes[name] = "time is up"
        print(f"exit code: {codes[name]}", flush=True)
        if codes[name] == 0:
            log.rename(log.with_suffix(".txt"))
    return codes
