"""
k-NN: the vote of the 20 nearest neighbors beside a one-hot vote and scikit-learn's.
"""

from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F

from attg.features import knn_classify
from benchmarks.measure import (
    machine,
    nothing,
    peak_memory,
    percentiles,
    table,
    take_turns,
)


def knn_one_hot(bank, labels, queries, k, num_classes, chunks=100):
    """k-NN as it is usually written: a vote through a one-hot (b, k, C), in chunks."""
    bank = F.normalize(bank, dim=1).T
    guesses = []
    for x in F.normalize(queries, dim=1).chunk(chunks):
        similarity, ids = (x @ bank).topk(k, dim=1)
        one_hot = F.one_hot(labels[ids], num_classes)  # (b, k, C)
        votes = one_hot * (similarity / 0.07).exp()[..., None]
        guesses.append(votes.sum(dim=1).topk(5).indices)
    return torch.cat(guesses)


def knn_sklearn(bank, labels, queries, k):
    """scikit-learn's classifier; returns the best class (q, 1)."""
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distances):
        return np.exp((1 - distances) / 0.07)

    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes)
    guesses = peer.fit(bank.numpy(), labels.numpy()).predict(queries.numpy())
    return torch.from_numpy(guesses)[:, None]


def noisy_copies(points, count, device, seed):
    """Features (count, width) around points (C, width) in turn, and their labels."""
    generator = torch.Generator(device).manual_seed(seed)
    labels = torch.arange(count, device=device) % len(points)
    x = torch.randn(count, points.shape[1], generator=generator, device=device)
    # In place: a bank of ImageNet's size takes 5 GB.
    return x.mul_(1.5).add_(points[labels]), labels


def run(args, device, out):
    """Measure seconds, and peak memory on a GPU, for noisy copies of 1,000 points."""
    large = (
        (1_281_167, 50_000, 1024) if device.type == "cuda" else (128_117, 5_000, 102)
    )
    n, q, width = args.knn or large
    classes, k = min(1000, n), 20
    points, _ = noisy_copies(torch.zeros(1, width, device=device), classes, device, 0)
    bank, labels = noisy_copies(points / 1.5, n, device, 1)
    x, truth = noisy_copies(points / 1.5, q, device, 2)
    calls = {
        "knn_classify": partial(knn_classify, bank, labels, x, k, num_classes=classes),
        "one-hot": partial(knn_one_hot, bank, labels, x, k, classes),
    }
    if device.type == "cpu" and find_spec("sklearn"):
        calls["scikit-learn"] = partial(knn_sklearn, bank, labels, x, k)

    memory, correct = {}, {}
    for name, call in calls.items():
        memory[name] = peak_memory(call, device)
        correct[name] = 100 * (call()[:, 0] == truth).double().mean().item()
    turns = {name: (nothing, lambda _, c=call: c()) for name, call in calls.items()}
    times = take_turns(turns, device, min(args.repeats, 5))
    base, rows = percentiles(times["knn_classify"])[0], []
    for name, seconds in times.items():
        median, p20, p80 = percentiles(seconds)
        row = {"k-NN": name, "bank": n, "queries": q, "width": width, "k": k}
        row |= {
            "classes": classes,
            "s": median / 1e3,
            "p20": p20 / 1e3,
            "p80": p80 / 1e3,
        }
        row |= {"x knn_classify": median / base, "top-1 %": correct[name]}
        rows.append(row | memory[name])
    table(rows, out, "knn", machine(device))
