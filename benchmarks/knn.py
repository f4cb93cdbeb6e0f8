"""
k-NN: the vote of the 20 nearest neighbors beside one-hot votes, faiss and scikit-learn.
"""

from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F

from attg.features import knn_classify
from benchmarks.measure import compare, peak_memory, take_turns

# Images in the bank, queries, width: ImageNet's with a ViT-L, and a tenth of these.
SIZES = {"cuda": (1_281_167, 50_000, 1024), "cpu": (128_117, 5_000, 102)}
K, CLASSES = 20, 1000
# Queries at once in the peers, to bound the memory.
CHUNK = 500


def ours(bank, labels, queries):
    return knn_classify(bank, labels, queries, K, num_classes=CLASSES)[:, 0]


def votes_of(search, labels, queries):
    """k-NN's vote as it is usually written.

    search(queries (b, width)) -> similarities and indices (b, K).
    """
    guesses = []
    for x in F.normalize(queries, dim=1).split(CHUNK):
        similarity, ids = search(x)
        weights = (similarity / 0.07).exp()
        one_hot = F.one_hot(labels[ids], CLASSES)  # (b, K, C)
        votes = (one_hot * weights[..., None]).sum(dim=1)
        guesses.append(votes.argmax(dim=1))
    return torch.cat(guesses)


def one_hot(bank, labels, queries):
    bank = F.normalize(bank, dim=1).T
    return votes_of(lambda x: (x @ bank).topk(K, dim=1), labels, queries)


def faiss_flat(bank, labels, queries):
    """faiss's exact index of inner products, and the same votes."""
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(F.normalize(bank, dim=1).numpy())

    def search(x):
        return map(torch.from_numpy, index.search(x.numpy(), K))

    return votes_of(search, labels, queries)


def scikit_learn(bank, labels, queries):
    from sklearn.neighbors import KNeighborsClassifier

    def votes(distances):
        return np.exp((1 - distances) / 0.07)

    peer = KNeighborsClassifier(K, metric="cosine", algorithm="brute", weights=votes)
    peer.fit(bank.numpy(), labels.numpy())
    guesses = peer.predict(queries.numpy())
    return torch.from_numpy(guesses)


def noisy_copies(points, count, generator):
    """Features (count, width) around points (C, width) in turn, and their labels."""
    labels = torch.arange(count, device=points.device) % len(points)
    # In place: a bank of ImageNet's size takes 5 GB.
    x = torch.empty(count, points.shape[1], device=points.device)
    x.normal_(0, 1.5, generator=generator)
    x.add_(points[labels])
    return x, labels


def run(settings, device):
    """Rows: time and accuracy of each implementation, for noisy copies of 1,000 points."""
    n, q, width = SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    points = torch.empty(CLASSES, width, device=device).normal_(generator=generator)
    bank, labels = noisy_copies(points, n, generator)
    queries, truth = noisy_copies(points, q, generator)
    functions = {"knn_classify": ours, "one-hot": one_hot}
    if device.type == "cpu":
        for name, peer in (("faiss", faiss_flat), ("sklearn", scikit_learn)):
            if find_spec(name):
                functions[name] = peer
            else:
                print(f"without {name}: not installed")
    calls = {}
    for name, function in functions.items():
        calls[name] = partial(function, bank, labels, queries)
    times = take_turns(calls, device, min(settings.repeats, 7))
    for name, columns in compare(times).items():
        correct = calls[name]() == truth
        row = {"k-NN": name, "bank": n, "queries": q, "width": width}
        row |= columns
        row["top-1 %"] = 100 * correct.double().mean().item()
        yield row | peak_memory(calls[name], device)
