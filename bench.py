"""
Speed and memory, each beside its peers in the same run, taking turns.

    python bench.py kernel            # the loss: PyTorch, torch.compile and the fused kernel; minutes on a GPU or a CPU
    python bench.py kernel --sweep --batches 256     # the kernel's constants, on a GPU
    python bench.py maps              # TokenCut's normalised cut against scipy, and its share of the backbone's time
    python bench.py knn               # k-NN of 50,000 in 1,281,167 features of 1024 values; on a CPU a tenth of each

Prints a table and writes it, every figure behind it and a picture to --out (default out/bench).
"""

import argparse
import ctypes
import importlib
import json
import math
import platform
import re
import shutil
import statistics
import time
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from attg_mae import Config, build_model, knn_classify, normalize
from common.toy import toy
from object_discovery import tokencut

K = importlib.import_module(
    "kernels.attg_loss"
)  # the package re-exports a function of the same name


def percentiles(times):
    """Seconds -> median, 20th and 80th percentile in ms."""
    times = torch.tensor(times, dtype=torch.float64) * 1e3
    return [times.quantile(q).item() for q in (0.5, 0.2, 0.8)]


def take_turns(calls, device, repeats):
    """{name: (prepare, call)} -> {name: seconds of each call}, one of each a round. The first round and prepare()
    are not counted.

    On a GPU a matrix product keeps the device busy while the host queues the call, so that the time is the device's
    alone, and a write of 512 MB empties its cache.
    """
    times = {name: [] for name in calls}
    if device.type == "cuda":
        a, cache = (
            torch.randn(8192, 8192, device=device, dtype=torch.bfloat16),
            torch.empty(2**27, device=device),
        )
        for _ in range(repeats + 1):
            for name, (prepare, call) in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                x = prepare()
                a @ a
                cache.zero_()
                start.record()
                call(x)
                end.record()
                times[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: [a.elapsed_time(b) / 1e3 for a, b in pairs[1:]]
            for name, pairs in times.items()
        }
    for _ in range(repeats + 1):
        for name, (prepare, call) in calls.items():
            x = prepare()
            start = time.perf_counter()
            call(x)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def copy_bandwidth(device, repeats=20):
    """Bytes read and written in a second by a copy that is larger than any cache."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return (
        2
        * x.nbytes
        / statistics.median(take_turns({"": (lambda: x, y.copy_)}, device, repeats)[""])
    )


def machine(device):
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = ", ".join(
        f"{p} {version(p)}" for p in ("torch", "triton") if find_spec(p)
    )
    return f"{name}, {torch.get_num_threads()} CPU threads, Python {platform.python_version()}, {versions}"


def table(rows, out, name, title):
    """Prints rows (dicts of one set of keys) as a Markdown table, and writes it, and title and rows as JSON lines."""
    cells = [
        list(rows[0]),
        *(
            [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join([title, "", *lines, ""]))
    (out / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"on": title}, *rows])
    )
    print("\n".join(lines), f"\nwritten: {out}/{name}.md, {name}.jsonl", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

SHAPES = {
    "ViT-B/L 16": 16,
    "ViT-H 14": 14,
    "patch 8": 8,
    "patch 4": 4,
}  # of 224 px images


def loss_passes(loss, batch, patch, size, dtype, device):
    """{"forward": (prepare, call, bytes), "backward": ..., "both": ...} of one implementation.

    pred is a slice, as MAE hands it over, and 75 % of the patches are masked. These bytes must move: forward reads pred
    and image of the masked patches; backward reads them again and writes the whole gradient. (Memory moves sectors of
    32 bytes: small patches in images cost more than these bytes.)
    """
    L, P, kept = (size // patch) ** 2, patch * patch * 3, (size // patch) ** 2 // 4
    pred = torch.randn(batch, L + 1, P, device=device, dtype=dtype)[
        :, 1:
    ].requires_grad_()
    imgs, attn = (
        torch.randn(batch, 3, size, size, device=device),
        torch.rand(batch, L, device=device),
    )
    mask = (torch.rand(batch, L, device=device).argsort(1) >= kept).float()
    tau = torch.tensor(0.75, device=device)

    def forward(_=None):
        pred.grad = None
        return loss(pred, imgs, mask, attn, tau=tau, patch_size=patch)

    read = batch * (L - kept) * P * (pred.element_size() + imgs.element_size())
    written = batch * L * P * pred.element_size()
    nothing, both = (lambda: None), (lambda _=None: forward().backward())
    return {"forward": (nothing, forward, read), "backward": (forward, torch.Tensor.backward, read + written),
            "both": (nothing, both, 2 * read + written)}  # fmt: skip


def kernel(args, device, out):
    losses = {"eager": partial(K.attg_loss, impl="torch")}
    if device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++"))):
        losses["compile"] = torch.compile(
            losses["eager"], fullgraph=True, dynamic=False
        )
    else:
        print("no C++ compiler: without torch.compile")
    if device.type == "cuda":
        losses["triton"] = partial(K.attg_loss, impl="triton")
    else:
        print(
            "no GPU: this measures the PyTorch path on the CPU; the kernel is for GPUs"
        )
    bandwidth, rows = copy_bandwidth(device), []
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    for shape, dtype, batch in product(args.shapes, args.dtypes, args.batches):
        torch.compiler.reset()
        make = partial(
            loss_passes, batch=batch, patch=SHAPES[shape], size=args.size, device=device
        )
        passes, memory = {}, {}
        for name, loss in losses.items():
            passes[name] = make(loss, dtype=getattr(torch, dtype))
            passes[name]["both"][1]()  # compiles
            if device.type == "cuda":
                passes[name]["forward"][1]()  # clears the gradient
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                passes[name]["both"][1]()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        for which in ("forward", "backward", "both"):
            times = take_turns(
                {name: calls[which][:2] for name, calls in passes.items()},
                device,
                args.repeats,
            )
            for name in losses:
                median, p20, p80 = percentiles(times[name])
                rate = passes[name][which][2] / median / 1e6  # GB/s
                rows.append(
                    {
                        "shape": shape,
                        "pred": dtype,
                        "batch": batch,
                        "pass": which,
                        "loss": name,
                        "ms": median,
                    }
                )
                rows[-1] |= {
                    "p20": p20,
                    "p80": p80,
                    "x eager": percentiles(times["eager"])[0] / median,
                    "GB/s": rate,
                }
                rows[-1] |= {
                    "% of copy": 1e11 * rate / bandwidth,
                    "peak MiB": memory.get(name, "not measured"),
                }
        print(
            *(
                f"{k} {v:.4g}" if isinstance(v, float) else v
                for k, v in rows[-1].items()
            ),
            flush=True,
        )
    table(rows, out, "kernel", f"{machine(device)}; copy {bandwidth / 1e9:.0f} GB/s")
    figure(rows, bandwidth, out / "kernel.png")


def figure(rows, bandwidth, path):
    """Forward + backward: GB/s over the batch size, a panel for each shape and type."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: pip install matplotlib")
    shapes, dtypes = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "pred")
    )
    canvas = Figure(
        figsize=(1.5 + 2.5 * len(shapes), 0.5 + 2.3 * len(dtypes)), layout="constrained"
    )
    axes = canvas.subplots(len(dtypes), len(shapes), sharey=True, squeeze=False)
    for (dtype, shape), axis in zip(product(dtypes, shapes), axes.flat, strict=True):
        for name in dict.fromkeys(row["loss"] for row in rows):
            mine = [
                r
                for r in rows
                if (r["shape"], r["pred"], r["pass"], r["loss"])
                == (shape, dtype, "both", name)
            ]
            axis.plot(
                [r["batch"] for r in mine],
                [r["GB/s"] for r in mine],
                marker="o",
                label=name,
            )
        axis.axhline(bandwidth / 1e9, color="grey", linestyle="--", label="copy")
        axis.set(
            title=f"{shape}, {dtype}", xlabel="batch", xscale="log", ylim=(0, None)
        )
        axis.set_xticks(
            [r["batch"] for r in mine], [str(r["batch"]) for r in mine], minor=False
        )
        axis.minorticks_off()
    axes.flat[-1].legend()
    canvas.supylabel("GB/s, forward + backward")
    canvas.savefig(path, dpi=150)
    print(f"picture: {path}")


def sweep(args, device, out):
    """The kernel's constants, forward + backward, for the largest of --batches and each of --shapes."""
    if device.type != "cuda":
        raise SystemExit("--sweep: the kernel needs a GPU")
    rows = []
    loss, constants = partial(K.attg_loss, impl="triton"), (K.TILE, K.STEPS, K.WARP)
    for shape, dtype in product(args.shapes, args.dtypes):
        call = loss_passes(
            loss,
            max(args.batches),
            SHAPES[shape],
            args.size,
            getattr(torch, dtype),
            device,
        )["both"][:2]
        for K.TILE, K.STEPS, K.WARP in product(
            (1024, 2048, 4096), (1, 2, 4, 8), (128, 256, 512)
        ):
            median, p20, p80 = percentiles(
                take_turns({"": call}, device, args.repeats)[""]
            )
            rows.append({"shape": shape, "pred": dtype, "batch": max(args.batches)})
            rows[-1] |= {
                "TILE": K.TILE,
                "STEPS": K.STEPS,
                "WARP": K.WARP,
                "ms": median,
                "p20": p20,
                "p80": p80,
            }
    K.TILE, K.STEPS, K.WARP = constants
    table(
        sorted(rows, key=lambda row: (row["shape"], row["pred"], row["ms"])),
        out,
        "sweep",
        machine(device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The maps


def cut_features(L, batch, keys):
    """{kind: features (B, L, d)}: keys of a ViT, an object before a background, smooth and plain noise."""
    side, normal = math.isqrt(L), torch.Generator().manual_seed(0)
    inside = (torch.rand(batch, L, 1, generator=normal) < 0.3).float()
    object_, background = (
        torch.randn(batch, 1, 64, generator=normal) for _ in range(2)
    )
    noise = torch.randn(batch, L, 64, generator=normal)
    smooth = (
        F.interpolate(
            torch.randn(batch, 64, 4, 4, generator=normal), side, mode="bilinear"
        )
        .flatten(2)
        .mT
    )
    blocks = inside * object_ + (1 - inside) * background + 0.3 * noise
    return {"keys of ViT-S": keys, "keys, centred": keys - keys.mean(1, keepdim=True), "two blocks": blocks,
            "smooth": smooth, "noise": noise}  # fmt: skip


def maps(args, device, out):
    """Milliseconds an image, one CPU thread each: scipy.linalg.eigh(D - A, D, subset_by_index=[1, 2]), which is given
    both matrices, and tokencut, which makes them. The backbone is a ViT-S of random weights on toy images."""
    try:
        import scipy.linalg
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r requirements-test.txt") from error

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, batch, host, nothing = [], args.batches[0], torch.device("cpu"), lambda: None
    for patch in (16, 8):
        L = (args.size // patch) ** 2
        model = (
            build_model(Config("vit_small", img_size=args.size, patch_size=patch))
            .eval()
            .to(device)
        )
        imgs = (
            torch.from_numpy(toy("test")[0][:batch])
            .permute(0, 3, 1, 2)
            .float()
            .to(device)
        )
        imgs = normalize(F.interpolate(imgs, args.size, mode="bilinear"), model.cfg)
        with torch.no_grad(), threadpool_limits(1):
            keys = model.last_qkv(imgs)[1][:, :, 1:].transpose(1, 2).flatten(2).cpu()
            forward = {"": (nothing, lambda _, m=model, x=imgs: m.last_qkv(x))}
            backbone = (
                percentiles(take_turns(forward, device, args.repeats)[""])[0] / batch
            )
            for kind, features in cut_features(L, batch, keys).items():
                x = F.normalize(features.double(), dim=-1)
                affinity = torch.where(x @ x.mT > 0.2, 1.0, 1e-5).numpy()
                degree = [np.diag(a.sum(1)) for a in affinity]
                problems = cycle(
                    [(d - a, d) for a, d in zip(affinity, degree, strict=True)]
                )
                calls = {
                    "scipy": (
                        lambda p=problems: next(p),
                        lambda x: scipy.linalg.eigh(*x, subset_by_index=[1, 2]),
                    )
                }
                ours = {
                    "tokencut": (partial(torch.Tensor.to, features, device), tokencut)
                }
                if device == host:
                    times = take_turns(calls | ours, host, args.repeats)
                else:
                    times = take_turns(calls, host, args.repeats) | take_turns(
                        ours, device, args.repeats
                    )
                scipy_ms, (median, p20, p80) = (
                    percentiles(times["scipy"])[0],
                    percentiles(times["tokencut"]),
                )
                rows.append(
                    {
                        "graphs": kind,
                        "L": L,
                        "batch": batch,
                        "scipy ms": scipy_ms,
                        "ms": median / batch,
                    }
                )
                rows[-1] |= {
                    "p20": p20 / batch,
                    "p80": p80 / batch,
                    "x scipy": scipy_ms * batch / median,
                }
                rows[-1] |= {
                    "backbone ms": backbone,
                    "% of backbone": 100 * median / batch / backbone,
                }
                print(
                    *(
                        f"{k} {v:.4g}" if isinstance(v, float) else v
                        for k, v in rows[-1].items()
                    ),
                    flush=True,
                )
    table(rows, out, "maps", machine(device))
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# k-NN


def peak_memory(call, device):
    """MiB that the call needs at most, beyond what there was before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # glibc: free memory goes back, or the call would use it unseen
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # Linux: the peak starts from here
        before = int(
            re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        )
        call()
        return (
            int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
            - before
        ) / 2**10
    except (AttributeError, OSError):
        return "not measured"


def knn_plain(bank, labels, queries, k, num_classes, chunks=100):
    """The usual way to write it: a hundredth of the queries at a time, votes through a one-hot (b, k, C)."""
    bank, guesses = F.normalize(bank, dim=1).T, []
    for x in F.normalize(queries, dim=1).chunk(chunks):
        similarity, ids = (x @ bank).topk(k, dim=1)
        votes = (
            F.one_hot(labels[ids], num_classes) * (similarity / 0.07).exp()[..., None]
        )  # (b, k, C)
        guesses.append(votes.sum(dim=1).topk(5).indices)
    return torch.cat(guesses)


def knn(args, device, out):
    """Seconds and memory of the vote of the 20 nearest among noisy copies of 1,000 points."""
    n, queries, width = args.knn or (
        (1_281_167, 50_000, 1024) if device.type == "cuda" else (128_117, 5_000, 102)
    )
    generator, classes, k = torch.Generator().manual_seed(0), min(1000, n), 20
    points = torch.randn(classes, width, generator=generator)
    labels, truth = torch.arange(n) % classes, torch.arange(queries) % classes
    bank = (points[labels] + 1.5 * torch.randn(n, width, generator=generator)).to(
        device
    )
    x = (points[truth] + 1.5 * torch.randn(queries, width, generator=generator)).to(
        device
    )
    labels, nothing = labels.to(device), lambda: None
    calls = {
        "knn_classify": lambda _=None: knn_classify(
            bank, labels, x, k, num_classes=classes
        )
    }
    calls["one-hot"] = lambda _=None: knn_plain(bank, labels, x, k, classes)
    if device.type == "cpu" and find_spec("sklearn"):
        from sklearn.neighbors import KNeighborsClassifier

        peer = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda d: np.exp((1 - d) / 0.07),
        )
        arrays = bank.numpy(), labels.numpy(), x.numpy()
        calls["scikit-learn"] = lambda _=None: torch.from_numpy(
            peer.fit(*arrays[:2]).predict(arrays[2])
        )[:, None]
    memory = {name: peak_memory(call, device) for name, call in calls.items()}
    right = {
        name: 100 * (call()[:, 0].cpu() == truth).double().mean().item()
        for name, call in calls.items()
    }
    times = take_turns(
        {name: (nothing, call) for name, call in calls.items()},
        device,
        min(args.repeats, 5),
    )
    rows, ours = [], percentiles(times["knn_classify"])[0]
    for name in calls:
        median, p20, p80 = (t / 1e3 for t in percentiles(times[name]))
        rows.append(
            {
                "k-NN": name,
                "bank": n,
                "queries": queries,
                "width": width,
                "classes": classes,
                "k": k,
            }
        )
        rows[-1] |= {
            "s": median,
            "p20": p20,
            "p80": p80,
            "x knn_classify": median * 1e3 / ours,
        }
        rows[-1] |= {"peak MiB": memory[name], "top-1 %": right[name]}
    table(rows, out, "knn", machine(device))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kernel", "maps", "knn"])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", default="out/bench", type=Path)
    parser.add_argument(
        "--repeats", type=int, help="calls of each, taking turns (default 50, CPU 7)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        help="default 32 to 1024, CPU 32; maps takes the first",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["bfloat16", "float32"],
        default=["bfloat16", "float32"],
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--size", type=int, default=224, help="images, in pixels")
    parser.add_argument(
        "--knn",
        type=int,
        nargs=3,
        metavar=("BANK", "QUERIES", "WIDTH"),
        help="sizes of knn",
    )
    parser.add_argument("--sweep", action="store_true", help="the kernel's constants")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    args.repeats = args.repeats or (50 if device.type == "cuda" else 7)
    args.batches = args.batches or (
        [32, 64, 128, 256, 512, 1024] if device.type == "cuda" else [32]
    )
    print(machine(device), flush=True)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        {"kernel": sweep if args.sweep else kernel, "maps": maps, "knn": knn}[
            args.what
        ](args, device, args.out)


if __name__ == "__main__":
    main()
