"""
Speed and memory, each beside its peers in the same run, taking turns.

    python bench.py kernel            # the loss: PyTorch, torch.compile, fused kernels
    python bench.py step              # training steps, beside HF's, lightly's and MAE's
    python bench.py data              # decode, crop and collate, beside torchvision
    python bench.py maps              # TokenCut's normalized cut, beside scipy
    python bench.py knn               # k-NN, beside a plain one and scikit-learn's
    python bench.py gpu --minutes 9   # all that a GPU has to show, in order of worth

Each prints a table and writes it, and every figure behind it, to --out (default
out/bench). Peers that are not installed are left out by name. docs/speed.md tells what
is measured, and how. `gpu` stops when the time is up; the same command goes on with
what is left.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import argparse
import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

from attg.cli import Parser, check_numbers, end, make_folder

# (least, most) of the numbers that only this program has.
RANGES = {
    "repeats": (1, 10**6),
    "batches": (1, 10**6),
    "size": (1, 8192),
    "pictures": (1, 10**6),
    "knn": (1, 10**9),
    "minutes": (0, 10**6),
}


def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("what", choices=["kernel", "step", "data", "maps", "knn", "gpu"])
    add("--device", help="default: the GPU if there is one")
    add("--out", default="out/bench", type=Path)
    repeats = "calls of each, taking turns (default 50, CPU 7)"
    add("--repeats", type=int, help=repeats)
    batches = "kernel: default 32 to 1024, CPU 32; the others take the first"
    add("--batches", type=int, nargs="+", help=batches)
    dtypes = ["bfloat16", "float32"]
    add("--dtypes", nargs="+", choices=dtypes, help="kernel: default both")
    add("--shapes", nargs="+", help="kernel: default all")
    images = ["float32", "bfloat16", "uint8"]
    add("--images", nargs="+", choices=images, default=["float32"], help="kernel")
    add("--size", type=int, default=224, help="images, in pixels")
    sweep = "kernel: constants of the kernel file to try, on a GPU"
    add("--sweep", nargs="+", metavar="NAME=VALUE,VALUE", help=sweep)
    models = ["vit_base", "vit_large"]
    add("--models", nargs="+", default=models, help="step: presets")
    codes = "step: some of ours, HF, lightly, mae (default all: 16 bytes a parameter)"
    add("--codes", nargs="+", help=codes)
    add("--compile", action="store_true", help="step: with torch.compile as well")
    mae_repo = "step, gpu: a copy of facebookresearch/mae, to measure it too"
    add("--mae_repo", type=Path, help=mae_repo)
    workers = "data: loader processes (default 0, on a GPU also one for each core)"
    add("--workers", type=int, nargs="+", help=workers)
    add("--pictures", type=int, default=64, help="data: different pictures")
    sizes = ("BANK", "QUERIES", "WIDTH")
    add("--knn", type=int, nargs=3, metavar=sizes, help="knn: sizes")
    add("--minutes", type=float, default=9, help="gpu: stop after")
    add("--tiny", action="store_true", help="gpu: a trial of everything, also on a CPU")
    items = "gpu: only items whose names begin so, done before or not"
    add("--items", nargs="+", help=items)
    # How `gpu` calls itself: when to stop, since when items count as done, and where
    # pictures and run folders go.
    for name, kind in (("--until", float), ("--since", float), ("--scratch", Path)):
        add(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_numbers(vars(args), **RANGES)
    return args


def main(argv=None):
    args = parse(argv)
    make_folder("out", args.out)
    if args.what == "gpu" and not args.until:
        # The work is done in another process; this one watches it.
        from benchmarks.gpu import supervise

        return supervise(args, sys.argv[1:] if argv is None else argv)

    import torch

    from benchmarks.measure import machine

    try:
        device = torch.device(args.device or default_device())
    except RuntimeError as error:
        words = f"--device {args.device}: there is no such device; try cpu or cuda"
        raise ValueError(words) from error
    on_gpu = device.type == "cuda"
    args.repeats = args.repeats or (50 if on_gpu else 7)
    print(machine(device), flush=True)
    name = "gpu_items" if args.what == "gpu" else args.what
    benchmark = importlib.import_module(f"benchmarks.{name}")
    with torch.cuda.device(device) if on_gpu else nullcontext():
        benchmark.run(args, device, args.out)


def default_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    end(main, memory="name smaller --models, --batches or --size")
