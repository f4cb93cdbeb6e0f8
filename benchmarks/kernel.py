"""
The loss, forward and backward: PyTorch, torch.compile and the fused kernels.
"""

import importlib
import shutil
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from benchmarks.measure import (
    copy_bandwidth,
    machine,
    nothing,
    peak_memory,
    percentiles,
    print_row,
    table,
    take_turns,
    time_alone,
)

# The package exports a function of the same name, which hides the module from `import`.
K = importlib.import_module("attg.kernels.attg_loss")

# Patch sizes, of 224 px images unless --size says otherwise.
SHAPES = {"ViT-B/L 16": 16, "ViT-H 14": 14, "patch 8": 8, "patch 4": 4}
PASSES = ("forward", "backward", "both")
IMAGES = ("float32", "bfloat16", "uint8")


class Case(NamedTuple):
    """Sizes and dtypes (names in torch) that the losses are measured on."""

    shape: str
    pred: str
    images: str
    batch: int
    size: int = 224


def loss_passes(loss, case, device):
    """{"forward": (prepare, call, bytes), "backward": ..., "both": ...} of one loss.

    pred is a slice, as MAE passes it, and 75 % of the patches are masked. bytes are those
    that must move: forward reads pred and image of the masked patches; backward reads
    them again and writes the whole gradient. (Memory moves sectors of 32 bytes, so small
    patches in images cost more.)
    """
    batch, size, patch = case.batch, case.size, SHAPES[case.shape]
    L = (size // patch) ** 2
    P = patch * patch * 3
    kept = L // 4
    dtype = getattr(torch, case.pred)
    whole = torch.randn(batch, L + 1, P, device=device, dtype=dtype)
    pred = whole[:, 1:].requires_grad_()
    imgs = torch.rand(batch, 3, size, size, device=device)
    if case.images == "uint8":
        imgs = imgs * 255
    imgs = imgs.to(getattr(torch, case.images))
    attn = torch.rand(batch, L, device=device)
    mask = (torch.rand(batch, L, device=device).argsort(1) >= kept).float()
    # A float would be copied to the GPU at each call.
    tau = torch.tensor(0.75, device=device)

    def forward(_=None):
        pred.grad = None
        return loss(pred, imgs, mask, attn, tau=tau, patch_size=patch)

    def backward(result):
        result.backward()

    def both(_=None):
        forward().backward()

    read = batch * (L - kept) * P * (pred.element_size() + imgs.element_size())
    written = batch * L * P * pred.element_size()
    return {
        "forward": (nothing, forward, read),
        "backward": (forward, backward, read + written),
        "both": (nothing, both, 2 * read + written),
    }


def available_losses(device):
    """{name: loss} of the implementations that run here; prints the others."""
    eager = partial(K.attg_loss, impl="torch")
    losses = {"eager": eager}
    if device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++"))):
        losses["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    else:
        print("no C++ compiler: without torch.compile")
    if device.type == "cuda":
        losses["triton"] = partial(K.attg_loss, impl="triton")
    else:
        print("no GPU: measures the PyTorch path on the CPU")
    return losses


def run(args, device, out):
    """Measure time, memory, and GB/s beside the copy bandwidth of the device."""
    resolve(args)
    if args.sweep:
        return sweep(args, device, out)
    batches = args.batches
    if not batches:
        batches = [32, 64, 128, 256, 512, 1024] if device.type == "cuda" else [32]
    losses = available_losses(device)
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows = []
    for names in product(args.shapes, args.dtypes, args.images, batches):
        case = Case(*names, args.size)
        rows += measure_case(losses, case, device, args.repeats, bandwidth)
        print_row(rows[-1])
    table(rows, out, "kernel", f"{machine(device)}; copy {bandwidth / 1e9:.0f} GB/s")


def resolve(args):
    """Fill in --shapes and --dtypes; raise ValueError for unknown names."""
    args.shapes = args.shapes or tuple(SHAPES)
    args.dtypes = args.dtypes or ("bfloat16", "float32")
    known = {
        "shapes": tuple(SHAPES),
        "dtypes": ("bfloat16", "float32"),
        "images": IMAGES,
    }
    for flag, names in known.items():
        for name in getattr(args, flag):
            if name not in names:
                raise ValueError(f"--{flag} {name}: choose from {', '.join(names)}")


def measure_case(losses, case, device, repeats, bandwidth):
    """A row for each loss and pass; prints the losses that fail."""
    torch.compiler.reset()
    passes, memory = {}, {}
    for name, loss in losses.items():
        try:
            passes[name] = loss_passes(loss, case, device)
            forward, both = passes[name]["forward"][1], passes[name]["both"][1]
            # Compiles; then another forward pass clears the gradient.
            both()
            forward()
            memory[name] = peak_memory(both, device)
        # Compilers raise errors of many kinds.
        except Exception as error:
            if name == "eager":
                raise
            print(f"{name} fails on {case}: {error}")
            del passes[name]

    rows = []
    for which in PASSES:
        calls = {name: passes[name][which][:2] for name in passes}
        times = take_turns(calls, device, repeats)
        eager_ms = percentiles(times["eager"])[0]
        for name in passes:
            median, p20, p80 = percentiles(times[name])
            # Bytes per millisecond, as GB/s.
            rate = passes[name][which][2] / median / 1e6
            row = case._asdict() | {"pass": which, "loss": name}
            row |= {"ms": median, "p20": p20, "p80": p80, "x eager": eager_ms / median}
            row |= {"GB/s": rate, "% of copy": 1e11 * rate / bandwidth}
            rows.append(row | memory[name])
    return rows


def sweep(args, device, out):
    """Time forward + backward with all combinations of --sweep, the fastest first.

    --sweep: constants of the kernel file that its launches read at each call.
    """
    if device.type != "cuda":
        raise ValueError("--sweep: the kernel needs a GPU")
    choices = {}
    for item in args.sweep:
        name, _, values = item.partition("=")
        if not isinstance(getattr(K, name, None), int) or not values:
            raise ValueError(
                f"--sweep {item}: must be NAME=VALUE,VALUE, a constant of {K.__file__}"
            )
        choices[name] = [int(value) for value in values.split(",")]
    before = {name: getattr(K, name) for name in choices}
    loss = partial(K.attg_loss, impl="triton")
    batch = max(args.batches or [256])
    rows = []
    for shape, dtype, images in product(args.shapes, args.dtypes, args.images):
        case = Case(shape, dtype, images, batch, args.size)
        prepare, call, _ = loss_passes(loss, case, device)["both"]
        for values in product(*choices.values()):
            chosen = dict(zip(choices, values, strict=True))
            vars(K).update(chosen)
            seconds = time_alone((prepare, call), device, args.repeats)
            median, p20, p80 = percentiles(seconds)
            rows.append(
                case._asdict() | chosen | {"ms": median, "p20": p20, "p80": p80}
            )
    vars(K).update(before)
    rows.sort(key=lambda row: (row["shape"], row["pred"], row["images"], row["ms"]))
    table(rows, out, "sweep", machine(device))
