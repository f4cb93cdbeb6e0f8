"""
Speed and memory, each beside its peers, which take turns in one run.

    python bench.py kernel            # the loss: PyTorch, torch.compile, fused kernels
    python bench.py step              # training steps, beside HF's and MAE's
    python bench.py data              # decode, crop and collate, beside torchvision
    python bench.py maps              # TokenCut's normalized cut, beside scipy
    python bench.py knn               # k-NN, beside a one-hot vote and scikit-learn's
    python bench.py gpu --minutes 9   # all of these on a GPU, the most important first

Each prints a table and writes it to --out with the timings behind it. Peers that are not
installed are left out by name. docs/speed.md describes what is measured. `gpu` stops when
the time is up; the same command continues with what is left.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import importlib
from contextlib import nullcontext
from pathlib import Path

from attg.cli import flag, make_folder, parse, run_cli

BENCHMARKS = ("kernel", "step", "data", "maps", "knn", "gpu")


COUNT = {"low": 1, "high": 10**9}


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of all benchmarks."""

    benchmark: str | None = flag(
        None, "what to measure", choices=BENCHMARKS, positional=True
    )
    device: str | None = flag(None, "cuda or cpu [the GPU if there is one]")
    out: str = flag("out/bench", "folder of the tables")
    repeats: int | None = flag(None, "calls of each [50, CPU 7]", **COUNT)
    batches: tuple[int, ...] = flag(
        (), "batch sizes, all but kernel take the first [32 to 1024, CPU 32]", **COUNT
    )
    dtypes: tuple[str, ...] = flag((), "kernel, step: bfloat16, float32 [kernel: both]")
    shapes: tuple[str, ...] = flag((), "kernel: some of its shapes [all]")
    images: tuple[str, ...] = flag(("float32",), "kernel: float32, bfloat16, uint8")
    sweep: tuple[str, ...] = flag(
        (), "kernel: NAME=VALUE,VALUE ... constants of the kernel file to try"
    )
    size: int = flag(224, "images, in pixels", 1, 8192)
    models: tuple[str, ...] = flag(("vit_base", "vit_large"), "step: presets")
    impls: tuple[str, ...] = flag((), "step: some of ours, HF, mae [all]")
    compile: bool = flag(False, "step: with torch.compile as well")
    mae_repo: str | None = flag(None, "step, gpu: a copy of facebookresearch/mae")
    workers: tuple[int, ...] = flag((0,), "data: loader workers", 0, 1024)
    files: int = flag(64, "data: number of different images", **COUNT)
    knn: tuple[int, ...] = flag((), "knn: sizes of bank, queries and features", **COUNT)
    minutes: float = flag(9, "gpu: stop after", 0, 10**6)


def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    if settings.benchmark is None:
        raise ValueError(f"benchmark: name one of {', '.join(BENCHMARKS)}")
    settings.out = Path(settings.out)
    make_folder("out", settings.out)
    benchmark = importlib.import_module(f"benchmarks.{settings.benchmark}")
    if settings.benchmark == "gpu":
        return benchmark.run(settings)

    import torch

    from benchmarks.measure import machine

    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(settings.device or default)
    except RuntimeError as error:
        raise ValueError(f"--device {settings.device}: try cpu or cuda") from error
    on_gpu = device.type == "cuda"
    settings.repeats = settings.repeats or (50 if on_gpu else 7)
    print(machine(device), flush=True)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        benchmark.run(settings, device, settings.out)


if __name__ == "__main__":
    run_cli(main, memory_hint="name smaller --models, --batches or --size")
