"""
The loss, forward and backward: PyTorch, torch.compile and the fused kernels.
"""

import importlib
import shutil
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from attg.files import require
from benchmarks.measure import (
    copy_bandwidth,
    machine,
    nothing,
    peak_memory_on_gpu,
    percentiles,
    print_row,
    table,
    take_turns,
    time_alone,
)

# The package exports a function of the same name, which hides the module from `import`.
K = importlib.import_module("attg.kernels.attg_loss")

# Patch sizes, of 224 px images unless --size says otherwise.
SHAPES = {
    "ViT-B/L 16": 16,
    "ViT-H 14": 14,
    "patch 8": 8,
    "patch 4": 4,
}
PASSES = ("forward", "backward", "both")
IMAGES = ("float32", "bfloat16", "uint8")


class Case(NamedTuple):
    """What the losses are measured on; types by their names in torch."""

    shape: str
    pred: str
    images: str
    batch: int
    size: int = 224


def loss_passes(loss, case, device):
    """{"forward": (prepare, call, bytes), "backward": ..., "both": ...} of one loss.

    pred is a slice, as MAE hands it over, and 75 % of the patches are masked. These
    bytes must move: forward reads pred and image of the masked patches; backward reads
    them again and writes the whole gradient. (Memory moves sectors of 32 bytes: small
    patches in images cost more than these bytes.)
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
    # A tensor, as a float would be copied to the GPU at each call.
    tau = torch.tensor(0.75, device=device)

    def forward(_=None):
        # Else backward would add to the gradient of the call before.
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


def available_losses(device, say=print, backend="inductor"):
    """{name: loss} of what runs here; says what does not."""
    eager = partial(K.attg_loss, impl="torch")
    losses = {"eager": eager}
    if device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++"))):
        losses["compile"] = torch.compile(
            eager, fullgraph=True, dynamic=False, backend=backend
        )
    else:
        say("no C++ compiler: without torch.compile")
    if device.type == "cuda":
        losses["triton"] = partial(K.attg_loss, impl="triton")
    else:
        say("no GPU: this measures the PyTorch path on the CPU; the kernel is for GPUs")
    return losses


def run(args, device, out):
    """Time and memory of the loss, and GB/s beside the device's own copy."""
    check_names(args)
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
    figure(rows, bandwidth, out / "kernel.png")


def check_names(args):
    """Fills in --shapes and --dtypes; ValueError for shapes that are unknown."""
    args.shapes = args.shapes or list(SHAPES)
    args.dtypes = args.dtypes or ["bfloat16", "float32"]
    for shape in args.shapes:
        require(shape in SHAPES, f"--shapes {shape}: choose from {', '.join(SHAPES)}")


def measure_case(losses, case, device, repeats, bandwidth, say=print):
    """A row for each loss and each of PASSES. A loss that fails is left out, by name."""
    torch.compiler.reset()
    passes, memory = {}, {}
    for name, loss in losses.items():
        try:
            passes[name] = loss_passes(loss, case, device)
            memory[name] = warm_up(passes[name], device)
        # Compilers raise errors of many kinds.
        except Exception as error:
            require(name != "eager", f"{case}: {error}")
            say(f"{name} fails on {case}: {error}")
            del passes[name]

    rows = []
    for which in PASSES:
        calls = {name: passes[name][which][:2] for name in passes}
        times = take_turns(calls, device, repeats)
        eager_ms = percentiles(times["eager"])[0]
        for name in passes:
            median, p20, p80 = percentiles(times[name])
            bytes_moved = passes[name][which][2]
            # Bytes in a millisecond, as GB/s.
            rate = bytes_moved / median / 1e6
            rows.append(
                {
                    "shape": case.shape,
                    "pred": case.pred,
                    "images": case.images,
                    "batch": case.batch,
                    "pass": which,
                    "loss": name,
                    "ms": median,
                    "p20": p20,
                    "p80": p80,
                    "x eager": eager_ms / median,
                    "GB/s": rate,
                    # The bandwidth is in bytes a second.
                    "% of copy": 1e11 * rate / bandwidth,
                    "peak MiB": memory[name],
                }
            )
    return rows


def warm_up(passes, device):
    """Calls forward and backward, which compiles them; returns their peak MiB."""
    _, forward, _ = passes["forward"]
    _, both, _ = passes["both"]
    both()
    if device.type != "cuda":
        return "not measured"
    # Another forward pass clears the gradient.
    forward()
    torch.cuda.synchronize()
    return peak_memory_on_gpu(both)


def figure(rows, bandwidth, path):
    """Forward + backward: GB/s over the batch size, a panel for each shape and type."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    # Dicts keep the order of first occurrence, which sets do not.
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    dtypes = list(dict.fromkeys(row["pred"] for row in rows))
    size = (1.5 + 2.5 * len(shapes), 0.5 + 2.3 * len(dtypes))
    canvas = Figure(figsize=size, layout="constrained")
    axes = canvas.subplots(len(dtypes), len(shapes), sharey=True, squeeze=False)
    for (dtype, shape), axis in zip(product(dtypes, shapes), axes.flat, strict=True):
        panel(axis, rows, bandwidth, shape, dtype)
    axes.flat[-1].legend()
    canvas.supylabel("GB/s, forward + backward")
    canvas.savefig(path, dpi=150)
    print(f"picture: {path}")


def panel(axis, rows, bandwidth, shape, dtype):
    """A line for each loss, and one for the copy."""
    lines = {}
    for row in rows:
        if (row["shape"], row["pred"], row["pass"]) == (shape, dtype, "both"):
            name = f"{row['loss']}, {row['images']} images"
            lines.setdefault(name, []).append(row)
    for name, line in lines.items():
        batches = [row["batch"] for row in line]
        rates = [row["GB/s"] for row in line]
        axis.plot(batches, rates, marker="o", label=name)
    axis.axhline(bandwidth / 1e9, color="grey", linestyle="--", label="copy")
    axis.set(title=f"{shape}, {dtype}", xlabel="batch", xscale="log", ylim=(0, None))
    # All losses were measured for the same batches.
    axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axis.minorticks_off()


def sweep(args, device, out):
    """Constants of the kernel file, NAME=VALUE,VALUE ..., in all combinations.

    Forward + backward, for the largest of --batches and each of --shapes; the fastest
    come first. The constants must be such as the launches read at each call.
    """
    require(device.type == "cuda", "--sweep: the kernel needs a GPU")
    choices = {}
    for words in args.sweep:
        name, _, values = words.partition("=")
        require(
            isinstance(getattr(K, name, None), int) and values,
            f"--sweep {words}: must be NAME=VALUE,VALUE, with a constant of {K.__file__}",
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
            row = {"shape": shape, "pred": dtype, "images": images, "batch": batch}
            rows.append(row | chosen | {"ms": median, "p20": p20, "p80": p80})
    vars(K).update(before)
    rows.sort(key=lambda row: (row["shape"], row["pred"], row["images"], row["ms"]))
    table(rows, out, "sweep", machine(device))
