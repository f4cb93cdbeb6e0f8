"""
Speed and memory, each beside its peers in the same run, taking turns.

    python bench.py kernel            # the loss: PyTorch, torch.compile, fused kernels
    python bench.py kernel --sweep --batches 256     # the kernels' constants, on a GPU
    python bench.py maps              # TokenCut's normalised cut, beside scipy
    python bench.py knn               # k-NN, beside a plain one and scikit-learn's

`kernel` takes minutes on a GPU or a CPU. `maps` also gives the cut's share of the
backbone's time. `knn` searches 50,000 queries in 1,281,167 features of 1024 values; on
a CPU a tenth of each.

Prints a table and writes it, every figure behind it and a picture to --out (default
out/bench).
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

from attg_mae import Config, build_model, normalize
from common.features import knn_classify
from common.toy import toy
from object_discovery import tokencut

# The package exports a function of the same name, which hides the module from `import`.
K = importlib.import_module("kernels.attg_loss")


# -- Timing ----------------------------------------------------------------------------


def nothing():
    """The preparation of a call that needs none."""
    return None


def percentiles(times):
    """Seconds -> median, 20th and 80th percentile in ms."""
    times = torch.tensor(times, dtype=torch.float64) * 1e3
    return [times.quantile(q).item() for q in (0.5, 0.2, 0.8)]


def take_turns(calls, device, repeats):
    """Times several calls, one of each a round, so that all meet the same conditions.

    calls is {name: (prepare, call)}; call gets what prepare() returned. Returns {name:
    seconds of each call}. The first round and prepare() are not counted.
    """
    if device.type == "cuda":
        times = take_turns_on_gpu(calls, device, repeats)
    else:
        times = {name: [] for name in calls}
        # The first round warms caches up and compiles.
        for _ in range(repeats + 1):
            for name, (prepare, call) in calls.items():
                x = prepare()
                start = time.perf_counter()
                call(x)
                times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def take_turns_on_gpu(calls, device, repeats):
    """`take_turns` by the GPU's own clock, the first round included."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    cache = torch.empty(2**27, device=device)
    events = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, (prepare, call) in calls.items():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            x = prepare()
            # A matrix product keeps the device busy while the host queues the call, so
            # that the time is the device's alone. A write of 512 MB empties its cache.
            a @ a
            cache.zero_()
            start.record()
            call(x)
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()

    times = {}
    for name, pairs in events.items():
        times[name] = [start.elapsed_time(end) / 1e3 for start, end in pairs]
    return times


def time_alone(call, device, repeats):
    """`take_turns` for one (prepare, call): the seconds of each call."""
    return take_turns({"alone": call}, device, repeats)["alone"]


def copy_bandwidth(device, repeats=20):
    """Bytes read and written in a second by a copy that is larger than any cache."""
    # 1 GiB on a GPU, 256 MiB on a CPU.
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    seconds = time_alone((lambda: x, y.copy_), device, repeats)
    return 2 * x.nbytes / statistics.median(seconds)


# -- Memory ----------------------------------------------------------------------------


def peak_memory(call, device):
    """MiB that the call needs at most, beyond what there was before.

    "not measured" on a CPU whose system is not Linux.
    """
    if device.type == "cuda":
        return peak_memory_on_gpu(call)
    try:
        # glibc gives free memory back to the system; else the call would use it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # Linux counts the peak from here.
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_of_process()
        call()
        return (peak_of_process() - before) / 2**10
    except (AttributeError, OSError):
        return "not measured"


def peak_memory_on_gpu(call):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_of_process():
    """KiB, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# -- Tables ----------------------------------------------------------------------------


def machine(device):
    """The title of a table: device, threads and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
    packages = [package for package in ("torch", "triton") if find_spec(package)]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{name}, {torch.get_num_threads()} CPU threads, "
        f"Python {platform.python_version()}, {versions}"
    )


def shown(value):
    """Floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_row(row):
    """One line of progress: the texts and integers alone, floats after their names."""
    words = []
    for name, value in row.items():
        if isinstance(value, float):
            words.append(f"{name} {shown(value)}")
        else:
            words.append(str(value))
    print(" ".join(words), flush=True)


def table(rows, out, name, title):
    """Prints rows, dicts of one set of keys, as a Markdown table.

    Writes the table to out/name.md, and title and rows as JSON lines to out/name.jsonl.
    """
    cells = [list(rows[0])]
    for row in rows:
        cells.append([shown(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for line in cells:
        padded = map(str.rjust, line, widths)
        lines.append("| " + " | ".join(padded) + " |")

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join([title, "", *lines, ""]))
    with open(out / f"{name}.jsonl", "w") as file:
        for row in [{"on": title}, *rows]:
            file.write(json.dumps(row) + "\n")
    print("\n".join(lines), f"\nwritten: {out}/{name}.md, {name}.jsonl", flush=True)


# -- The loss --------------------------------------------------------------------------

# Patch sizes, of 224 px images unless --size says otherwise.
SHAPES = {
    "ViT-B/L 16": 16,
    "ViT-H 14": 14,
    "patch 8": 8,
    "patch 4": 4,
}
PASSES = ("forward", "backward", "both")


def loss_passes(loss, batch, patch, size, dtype, device):
    """{"forward": (prepare, call, bytes), "backward": ..., "both": ...} of one loss.

    pred is a slice, as MAE hands it over, and 75 % of the patches are masked. These
    bytes must move: forward reads pred and image of the masked patches; backward reads
    them again and writes the whole gradient. (Memory moves sectors of 32 bytes: small
    patches in images cost more than these bytes.)
    """
    L = (size // patch) ** 2
    P = patch * patch * 3
    kept = L // 4
    whole = torch.randn(batch, L + 1, P, device=device, dtype=dtype)
    pred = whole[:, 1:].requires_grad_()
    imgs = torch.randn(batch, 3, size, size, device=device)
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


def available_losses(device):
    """{name: loss} of what runs here; says what does not."""
    eager = partial(K.attg_loss, impl="torch")
    losses = {"eager": eager}
    if device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++"))):
        losses["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    else:
        print("no C++ compiler: without torch.compile")
    if device.type == "cuda":
        losses["triton"] = partial(K.attg_loss, impl="triton")
    else:
        print(
            "no GPU: this measures the PyTorch path on the CPU; the kernel is for GPUs"
        )
    return losses


def kernel(args, device, out):
    """Time and memory of the loss, and GB/s beside the device's own copy."""
    losses = available_losses(device)
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows = []
    for shape, dtype, batch in product(args.shapes, args.dtypes, args.batches):
        torch.compiler.reset()
        passes, memory = {}, {}
        for name, loss in losses.items():
            passes[name] = loss_passes(
                loss, batch, SHAPES[shape], args.size, getattr(torch, dtype), device
            )
            memory[name] = warm_up(passes[name], device)
        for which in PASSES:
            calls = {name: passes[name][which][:2] for name in losses}
            times = take_turns(calls, device, args.repeats)
            eager_ms = percentiles(times["eager"])[0]
            for name in losses:
                median, p20, p80 = percentiles(times[name])
                bytes_moved = passes[name][which][2]
                # Bytes in a millisecond, as GB/s.
                rate = bytes_moved / median / 1e6
                rows.append(
                    {
                        "shape": shape,
                        "pred": dtype,
                        "batch": batch,
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
        print_row(rows[-1])
    table(rows, out, "kernel", f"{machine(device)}; copy {bandwidth / 1e9:.0f} GB/s")
    figure(rows, bandwidth, out / "kernel.png")


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
            lines.setdefault(row["loss"], []).append(row)
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
    """The kernels' constants, forward + backward.

    For the largest of --batches and each of --shapes; the fastest come first.
    """
    if device.type != "cuda":
        raise SystemExit("--sweep: the kernel needs a GPU")
    loss = partial(K.attg_loss, impl="triton")
    batch = max(args.batches)
    constants = K.TILE, K.STEPS, K.WARP
    choices = list(product((1024, 2048, 4096), (1, 2, 4, 8), (128, 256, 512)))
    rows = []
    for shape, dtype in product(args.shapes, args.dtypes):
        passes = loss_passes(
            loss, batch, SHAPES[shape], args.size, getattr(torch, dtype), device
        )
        prepare, call, _ = passes["both"]
        for tile, steps, warp in choices:
            # The launches read the constants from the module at each call.
            K.TILE, K.STEPS, K.WARP = tile, steps, warp
            seconds = time_alone((prepare, call), device, args.repeats)
            median, p20, p80 = percentiles(seconds)
            rows.append(
                {
                    "shape": shape,
                    "pred": dtype,
                    "batch": batch,
                    "TILE": tile,
                    "STEPS": steps,
                    "WARP": warp,
                    "ms": median,
                    "p20": p20,
                    "p80": p80,
                }
            )
    K.TILE, K.STEPS, K.WARP = constants
    rows.sort(key=lambda row: (row["shape"], row["pred"], row["ms"]))
    table(rows, out, "sweep", machine(device))


# -- The maps --------------------------------------------------------------------------


def cut_features(L, batch, keys):
    """{kind: features (B, L, d)} of five kinds of graphs, easy ones and hard ones."""
    side = math.isqrt(L)
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    inside = (torch.rand(batch, L, 1, generator=generator) < 0.3).float()
    object_ = randn(batch, 1, 64)
    background = randn(batch, 1, 64)
    noise = randn(batch, L, 64)
    coarse = randn(batch, 64, 4, 4)
    smooth = F.interpolate(coarse, side, mode="bilinear").flatten(2).mT
    return {
        "keys of ViT-S": keys,
        "keys, centred": keys - keys.mean(1, keepdim=True),
        "two blocks": inside * object_ + (1 - inside) * background + 0.3 * noise,
        "smooth": smooth,
        "noise": noise,
    }


def cut_problems(features):
    """(D - A, D) of each image in turn, for ever, as NumPy arrays (L, L)."""
    x = F.normalize(features.double(), dim=-1)
    # TokenCut's edges: a cosine above 0.2, else 1e-5.
    affinity = torch.where(x @ x.mT > 0.2, 1.0, 1e-5).numpy()
    problems = []
    for a in affinity:
        # The degree of a patch is the sum of its row.
        degree = np.diag(a.sum(1))
        problems.append((degree - a, degree))
    return cycle(problems)


def cut_times(features, device, repeats):
    """Seconds of scipy, for one image, and of tokencut, for the batch.

    scipy.linalg.eigh(D - A, D, subset_by_index=[1, 2]) is given both matrices; tokencut
    makes them.
    """
    import scipy.linalg

    problems = cut_problems(features)

    def peer(problem):
        difference, degree = problem
        scipy.linalg.eigh(difference, degree, subset_by_index=[1, 2])

    host = torch.device("cpu")
    scipy_call = {"scipy": (partial(next, problems), peer)}
    our_call = {"tokencut": (partial(features.to, device), tokencut)}
    if device == host:
        times = take_turns(scipy_call | our_call, host, repeats)
    else:
        # scipy's time is the host's, ours the GPU's: they cannot take turns.
        times = take_turns(scipy_call, host, repeats)
        times |= take_turns(our_call, device, repeats)
    return times["scipy"], times["tokencut"]


def backbone_time(model, imgs, device, repeats):
    """Milliseconds an image: what comes before the cut."""
    seconds = time_alone((lambda: imgs, model.last_qkv), device, repeats)
    return percentiles(seconds)[0] / len(imgs)


def maps(args, device, out):
    """Milliseconds an image of scipy and of tokencut, with one CPU thread each.

    The backbone is a ViT-S of random weights on toy images.
    """
    try:
        import scipy.linalg  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r requirements-test.txt") from error

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = args.batches[0]
    rows = []
    # Of 224 px images, 196 and 784 patches.
    for patch in (16, 8):
        L = (args.size // patch) ** 2
        cfg = Config("vit_small", img_size=args.size, patch_size=patch)
        model = build_model(cfg).eval().to(device)
        toy_images, *_ = toy("test")
        imgs = torch.from_numpy(toy_images[:batch]).permute(0, 3, 1, 2)
        imgs = imgs.float().to(device)
        imgs = normalize(F.interpolate(imgs, args.size, mode="bilinear"), model.cfg)
        # The limit is for the threads of NumPy and SciPy.
        with torch.no_grad(), threadpool_limits(1):
            keys = model.last_qkv(imgs)[1]  # (B, heads, 1 + L, D / heads)
            keys = keys[:, :, 1:].transpose(1, 2).flatten(2).cpu()  # (B, L, D)
            backbone_ms = backbone_time(model, imgs, device, args.repeats)
            for kind, features in cut_features(L, batch, keys).items():
                theirs, ours = cut_times(features, device, args.repeats)
                scipy_ms = percentiles(theirs)[0]
                median, p20, p80 = percentiles(ours)
                rows.append(
                    {
                        "graphs": kind,
                        "L": L,
                        "batch": batch,
                        "scipy ms": scipy_ms,
                        "ms": median / batch,
                        "p20": p20 / batch,
                        "p80": p80 / batch,
                        "x scipy": scipy_ms * batch / median,
                        "backbone ms": backbone_ms,
                        "% of backbone": 100 * median / batch / backbone_ms,
                    }
                )
                print_row(rows[-1])
    table(rows, out, "maps", machine(device))
    torch.set_num_threads(threads)


# -- k-NN ------------------------------------------------------------------------------


def knn_plain(bank, labels, queries, k, num_classes, chunks=100):
    """k-NN as it is usually written: votes through a one-hot (b, k, C).

    It takes a hundredth of the queries at a time.
    """
    bank = F.normalize(bank, dim=1).T
    guesses = []
    for x in F.normalize(queries, dim=1).chunk(chunks):
        similarity, ids = (x @ bank).topk(k, dim=1)
        one_hot = F.one_hot(labels[ids], num_classes)  # (b, k, C)
        votes = one_hot * (similarity / 0.07).exp()[..., None]
        guesses.append(votes.sum(dim=1).topk(5).indices)
    return torch.cat(guesses)


def noisy_copies(n, queries, width, classes):
    """bank (n, width), its labels (n,), queries (q, width), their labels (q,)."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(classes, width, generator=generator)
    labels = torch.arange(n) % classes
    truth = torch.arange(queries) % classes
    bank = points[labels] + 1.5 * torch.randn(n, width, generator=generator)
    x = points[truth] + 1.5 * torch.randn(queries, width, generator=generator)
    return bank, labels, x, truth


def knn_sklearn(bank, labels, x, k):
    """A call of scikit-learn's classifier: best class (q, 1)."""
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distances):
        return np.exp((1 - distances) / 0.07)

    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes)
    bank, labels, x = bank.numpy(), labels.numpy(), x.numpy()

    def call(_=None):
        return torch.from_numpy(peer.fit(bank, labels).predict(x))[:, None]

    return call


def knn(args, device, out):
    """Seconds and memory of the vote of the 20 nearest.

    The features are noisy copies of 1,000 points.
    """
    if args.knn:
        n, queries, width = args.knn
    elif device.type == "cuda":
        n, queries, width = 1_281_167, 50_000, 1024
    else:
        n, queries, width = 128_117, 5_000, 102
    classes = min(1000, n)
    k = 20
    bank, labels, x, truth = noisy_copies(n, queries, width, classes)
    bank, labels, x = bank.to(device), labels.to(device), x.to(device)

    def ours(_=None):
        return knn_classify(bank, labels, x, k, num_classes=classes)

    def one_hot(_=None):
        return knn_plain(bank, labels, x, k, classes)

    calls = {"knn_classify": ours, "one-hot": one_hot}
    if device.type == "cpu" and find_spec("sklearn"):
        calls["scikit-learn"] = knn_sklearn(bank, labels, x, k)

    memory, correct = {}, {}
    for name, call in calls.items():
        memory[name] = peak_memory(call, device)
    for name, call in calls.items():
        # The classes come best first.
        right = call()[:, 0].cpu() == truth
        correct[name] = 100 * right.double().mean().item()
    turns = {name: (nothing, call) for name, call in calls.items()}
    times = take_turns(turns, device, min(args.repeats, 5))

    ours_ms = percentiles(times["knn_classify"])[0]
    rows = []
    for name in calls:
        median, p20, p80 = percentiles(times[name])
        rows.append(
            {
                "k-NN": name,
                "bank": n,
                "queries": queries,
                "width": width,
                "classes": classes,
                "k": k,
                "s": median / 1e3,
                "p20": p20 / 1e3,
                "p80": p80 / 1e3,
                "x knn_classify": median / ours_ms,
                "peak MiB": memory[name],
                "top-1 %": correct[name],
            }
        )
    table(rows, out, "knn", machine(device))


# -- Command line ----------------------------------------------------------------------


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["kernel", "maps", "knn"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", default="out/bench", type=Path)
    repeats = "calls of each, taking turns (default 50, CPU 7)"
    add("--repeats", type=int, help=repeats)
    batches = "default 32 to 1024, CPU 32; maps takes the first"
    add("--batches", type=int, nargs="+", help=batches)
    dtypes = ["bfloat16", "float32"]
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--size", type=int, default=224, help="images, in pixels")
    sizes = ("BANK", "QUERIES", "WIDTH")
    add("--knn", type=int, nargs=3, metavar=sizes, help="sizes of knn")
    add("--sweep", action="store_true", help="the kernel's constants")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if not args.repeats:
        args.repeats = 50 if on_gpu else 7
    if not args.batches:
        args.batches = [32, 64, 128, 256, 512, 1024] if on_gpu else [32]
    print(machine(device), flush=True)

    benchmarks = {"kernel": kernel, "maps": maps, "knn": knn}
    benchmark = benchmarks[args.what]
    if args.what == "kernel" and args.sweep:
        benchmark = sweep
    with torch.cuda.device(device) if on_gpu else nullcontext():
        benchmark(args, device, args.out)


if __name__ == "__main__":
    main()
