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


def knn_plain(bank, labels, queries, k, num_classes, chunks=100):
    """k-NN as it is usually written: a vote through a one-hot (b, k, C), in chunks."""
    bank = F.normalize(bank, dim=1).T
    guesses = []
    for x in F.normalize(queries, dim=1).chunk(chunks):
        similarity, ids = (x @ bank).topk(k, dim=1)
        one_hot = F.one_hot(labels[ids], num_classes)  # (b, k, C)
        votes = one_hot * (similarity / 0.07).exp()[..., None]
        guesses.append(votes.sum(dim=1).topk(5).indices)
    return torch.cat(guesses)


def noisy_copies(n, queries, width, classes, device):
    """Random bank (n, width), labels (n,), queries (q, width) and labels (q,)."""
    generator = torch.Generator(device).manual_seed(0)
    where = {"generator": generator, "device": device}
    points = torch.randn(classes, width, **where)
    labels = torch.arange(n, device=device) % classes
    truth = torch.arange(queries, device=device) % classes
    # In place: a bank of ImageNet's size takes 5 GB.
    bank = torch.randn(n, width, **where).mul_(1.5).add_(points[labels])
    x = torch.randn(queries, width, **where).mul_(1.5).add_(points[truth])
    return bank, labels, x, truth


def knn_sklearn(bank, labels, x, k):
    """A call of scikit-learn's classifier, which returns the best class (q, 1)."""
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distances):
        return np.exp((1 - distances) / 0.07)

    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes)
    bank, labels, x = bank.numpy(), labels.numpy(), x.numpy()

    def call(_=None):
        return torch.from_numpy(peer.fit(bank, labels).predict(x))[:, None]

    return call


def append_result(results, call):
    results.append(call())


def run(args, device, out):
    """Measure seconds and peak memory."""
    if args.knn:
        sizes = args.knn
    elif device.type == "cuda":
        sizes = 1_281_167, 50_000, 1024
    else:
        sizes = 128_117, 5_000, 102
    rows = measure_knn(*sizes, device, min(args.repeats, 5))
    table(rows, out, "knn", machine(device))


def measure_knn(n, queries, width, device, repeats, k=20):
    """A row for each vote on features that are noisy copies of 1,000 points."""
    classes = min(1000, n)
    bank, labels, x, truth = noisy_copies(n, queries, width, classes, device)

    def ours(_=None):
        return knn_classify(bank, labels, x, k, num_classes=classes)

    def one_hot(_=None):
        return knn_plain(bank, labels, x, k, classes)

    calls = {"knn_classify": ours, "one-hot": one_hot}
    if device.type == "cpu" and find_spec("sklearn"):
        calls["scikit-learn"] = knn_sklearn(bank, labels, x, k)

    memory, correct = {}, {}
    for name, call in calls.items():
        guesses = []
        memory[name] = peak_memory(partial(append_result, guesses, call), device)
        right = guesses[0][:, 0] == truth
        correct[name] = 100 * right.double().mean().item()
    turns = {name: (nothing, call) for name, call in calls.items()}
    times = take_turns(turns, device, repeats)

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
    return rows
