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

CPU = torch.device("cpu")


def cut_features(L, batch, keys):
    """{kind: features (B, L, d)} of five kinds of graphs, easy and hard."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inside = (randn(batch, L, 1) > 0.5).float()
    blocks = inside * randn(batch, 1, 64) + (1 - inside) * randn(batch, 1, 64)
    coarse = randn(batch, 64, 4, 4)
    smooth = F.interpolate(coarse, math.isqrt(L), mode="bilinear").flatten(2).mT
    return {
        "keys of ViT-S": keys,
        "keys, centered": keys - keys.mean(1, keepdim=True),
        "two blocks": blocks + 0.3 * randn(batch, L, 64),
        "smooth": smooth,
        "noise": randn(batch, L, 64),
    }


def scipy_cut(features):
    """(prepare, call): scipy.linalg.eigh(D - A, D) of one image; prepare makes D and A."""
    import scipy.linalg

    x = F.normalize(features.double(), dim=-1)
    # TokenCut's edges: a cosine above 0.2, else 1e-5.
    images = cycle(torch.where(x @ x.mT > 0.2, 1.0, 1e-5).numpy())

    def prepare():
        affinity = next(images)
        degree = np.diag(affinity.sum(1))
        return degree - affinity, degree

    def call(problem):
        scipy.linalg.eigh(*problem, subset_by_index=[1, 2])

    return prepare, call


def measure_cut(patch, size, batch, device, repeats):
    """A row for each kind of graph of images of `size` pixels.

    The backbone is a ViT-S with random weights on toy images, one CPU thread for each.
    """
    model = build_model(Config("vit_small", img_size=size, patch_size=patch))
    model.eval().to(device)
    imgs = torch.from_numpy(toy("test")[0][:batch]).permute(0, 3, 1, 2).float()
    imgs = normalize(F.interpolate(imgs.to(device), size, mode="bilinear"), model.cfg)
    keys = model.last_qkv(imgs)[1]  # (B, heads, 1 + L, D / heads)
    keys = keys[:, :, 1:].transpose(1, 2).flatten(2).cpu()  # (B, L, D)
    seconds = time_alone((lambda: imgs, model.last_qkv), device, repeats)
    backbone_ms = percentiles(seconds)[0] / batch
    rows = []
    for kind, features in cut_features(keys.shape[1], batch, keys).items():
        calls = {"tokencut": (partial(features.to, device), tokencut)}
        peers = {"scipy": scipy_cut(features)} if find_spec("scipy") else {}
        if device == CPU:
            times = take_turns(peers | calls, CPU, repeats)
        else:
            # The clocks of CPU and GPU differ, so they cannot alternate.
            times = take_turns(peers, CPU, repeats)
            times |= take_turns(calls, device, repeats)
        median, p20, p80 = (x / batch for x in percentiles(times["tokencut"]))
        row = {"graphs": kind, "L": keys.shape[1], "batch": batch}
        row |= {"ms": median, "p20": p20, "p80": p80}
        if peers:
            row["scipy ms"] = percentiles(times["scipy"])[0]
            row["x scipy"] = row["scipy ms"] / median
        row["backbone ms"] = backbone_ms
        row["% of backbone"] = 100 * median / backbone_ms
        rows.append(row)
        print_row(row)
    return rows


@torch.no_grad()
def run(args, device, out):
    """Measure milliseconds per image of 196 and 784 patches, at the default size."""
    limit = nullcontext()
    if find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        limit = threadpool_limits(1)
    else:
        print("threadpoolctl is not installed: scipy may use several threads")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch, rows = (args.batches or [32])[0], []
    with limit:
        for patch in (16, 8):
            rows += measure_cut(patch, args.size, batch, device, args.repeats)
    torch.set_num_threads(threads)
    table(rows, out, "maps", machine(device))
