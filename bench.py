"""
Speed beside peers, which take turns in one run.

    python bench.py kernel            # the loss: PyTorch, torch.compile, fused kernels
    python bench.py step              # training steps, beside HF's and MAE's
    python bench.py data --data DIR   # decode, crop and collate, beside torchvision
    python bench.py maps              # TokenCut's normalized cut, beside scipy
    python bench.py knn               # k-NN, beside faiss, scikit-learn, one-hot votes

Each prints a Markdown table. Peers that are not installed are left out by name.
docs/speed.md describes what is measured. benchmarks/gpu.sh runs all of them on a GPU, the
most important first.
"""

if __name__ == "__main__":
    import os

    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()
    # PyTorch and the libraries of scipy and scikit-learn read this when they load.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import dataclasses
import importlib

from attg.cli import flag, parse, run_cli

BENCHMARKS = ("kernel", "step", "data", "maps", "knn")
COUNT = {"low": 1, "high": 10**9}


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of all benchmarks."""

    benchmark: str | None = flag(
        None, "what to measure", choices=BENCHMARKS, positional=True
    )
    device: str | None = flag(None, "[cuda if there is one]", choices=("cuda", "cpu"))
    repeats: int | None = flag(None, "rounds [50, CPU 7]", **COUNT)
    batch_size: int | None = flag(None, "images in a call [128, CPU 32]", **COUNT)
    size: int = flag(224, "side of the images in pixels", 1, 8192)
    models: tuple[str, ...] = flag(("vit_base",), "step: presets")
    precision: tuple[str, ...] = flag(("bf16", "fp32"), "step: types of autocast")
    compile: bool = flag(False, "step: with torch.compile")
    mae_repo: str | None = flag(None, "step: a copy of facebookresearch/mae")
    data: str | None = flag(None, "data: folder of JPEG photographs")


def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    if settings.benchmark is None:
        raise ValueError(f"benchmark: name one of {', '.join(BENCHMARKS)}")
    benchmark = importlib.import_module(f"benchmarks.{settings.benchmark}")
    import torch

    from attg.log import describe_machine
    from benchmarks.measure import print_table

    on_gpu = torch.cuda.is_available() and settings.device != "cpu"
    settings.repeats = settings.repeats or (50 if on_gpu else 7)
    settings.batch_size = settings.batch_size or (128 if on_gpu else 32)
    device = torch.device(settings.device or ("cuda" if on_gpu else "cpu"))
    machine = describe_machine(device, {"torch": torch.__version__})
    print(f"{machine}, {'GPU' if on_gpu else 'CPU'} time\n")
    print_table(benchmark.run(settings, device))


if __name__ == "__main__":
    run_cli(main, memory_hint="name smaller --models, --batch_size or --size")
