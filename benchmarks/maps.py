"""
TokenCut's normalized cut beside scipy's, and relative to the backbone's time.
"""

import math
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F

from attg.toy import toy
from attg_mae import Config, build_model, normalize
from benchmarks.measure import (
    machine,
    percentiles,
    print_row,
    table,
    take_turns,
    time_alone,
)
from object_discovery import tokencut


def cut_features(L, batch, keys):
    """{kind: features (B, L, d)} of five kinds of graphs, easy and hard."""
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
        "keys, centered": keys - keys.mean(1, keepdim=True),
        "two blocks": inside * object_ + (1 - inside) * background + 0.3 * noise,
        "smooth": smooth,
        "noise": noise,
    }


def cut_problems(features):
    """Endless iterator over (D - A, D) of the images, NumPy arrays (L, L)."""
    x = F.normalize(features.double(), dim=-1)
    # TokenCut's edges: a cosine above 0.2, else 1e-5.
    affinity = torch.where(x @ x.mT > 0.2, 1.0, 1e-5).numpy()
    problems = []
    for a in affinity:
        # The degree of a patch is the sum of its row.
        degree = np.diag(a.sum(1))
        problems.append((degree - a, degree))
    return cycle(problems)


def scipy_call(features):
    """(prepare, call) of scipy.linalg.eigh(D - A, D), one image per call."""
    import scipy.linalg

    problems = cut_problems(features)

    def peer(problem):
        difference, degree = problem
        scipy.linalg.eigh(difference, degree, subset_by_index=[1, 2])

    return partial(next, problems), peer


def cut_times(features, device, repeats):
    """Seconds of tokencut for the batch, and of scipy for one image or None.

    scipy.linalg.eigh(D - A, D, subset_by_index=[1, 2]) gets both matrices; tokencut
    computes them.
    """
    host = torch.device("cpu")
    ours = {"tokencut": (partial(features.to, device), tokencut)}
    if not find_spec("scipy"):
        return take_turns(ours, device, repeats)["tokencut"], None
    theirs = {"scipy": scipy_call(features)}
    if device == host:
        times = take_turns(theirs | ours, host, repeats)
    else:
        # scipy's time is the host's, ours the GPU's: they cannot take turns.
        times = take_turns(theirs, host, repeats)
        times |= take_turns(ours, device, repeats)
    return times["tokencut"], times["scipy"]


def backbone_time(model, imgs, device, repeats):
    """Milliseconds per image of the forward pass before the cut."""
    seconds = time_alone((lambda: imgs, model.last_qkv), device, repeats)
    return percentiles(seconds)[0] / len(imgs)


def run(args, device, out):
    """Measure milliseconds per image of scipy and tokencut, one CPU thread each.

    The backbone is a ViT-S with random weights on toy images.
    """
    batch = (args.batches or [32])[0]
    rows = []
    # 196 and 784 patches of a 224 px image.
    for patch in (16, 8):
        rows += measure_cut(patch, args.size, batch, device, args.repeats)
    table(rows, out, "maps", machine(device))


def one_thread():
    """Limit NumPy and SciPy to one thread if threadpoolctl is installed."""
    if not find_spec("threadpoolctl"):
        return nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def toy_pixels(count, size, device):
    """Enlarged toy images (count, 3, size, size) in 0 .. 255."""
    toy_images, *_ = toy("test")
    imgs = torch.from_numpy(toy_images[:count]).permute(0, 3, 1, 2)
    return F.interpolate(imgs.float().to(device), size, mode="bilinear")


def measure_cut(patch, size, batch, device, repeats):
    """A row for each kind of graph of images of `size` pixels."""
    for peer in ("scipy", "threadpoolctl"):
        if not find_spec(peer):
            print(f"without {peer}: not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    L = (size // patch) ** 2
    cfg = Config("vit_small", img_size=size, patch_size=patch)
    model = build_model(cfg).eval().to(device)
    imgs = normalize(toy_pixels(batch, size, device), model.cfg)
    rows = []
    with torch.no_grad(), one_thread():
        keys = model.last_qkv(imgs)[1]  # (B, heads, 1 + L, D / heads)
        keys = keys[:, :, 1:].transpose(1, 2).flatten(2).cpu()  # (B, L, D)
        backbone_ms = backbone_time(model, imgs, device, repeats)
        for kind, features in cut_features(L, batch, keys).items():
            ours, theirs = cut_times(features, device, repeats)
            median, p20, p80 = percentiles(ours)
            row = {"graphs": kind, "L": L, "batch": batch}
            if theirs:
                row["scipy ms"] = percentiles(theirs)[0]
            row |= {"ms": median / batch, "p20": p20 / batch, "p80": p80 / batch}
            if theirs:
                row["x scipy"] = row["scipy ms"] / row["ms"]
            row["backbone ms"] = backbone_ms
            row["% of backbone"] = 100 * row["ms"] / backbone_ms
            rows.append(row)
            print_row(row)
    torch.set_num_threads(threads)
    return rows
