"""
Features of whole images, nothing masked, and the k-NN on them.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common.data import make_loader

FEATURES = ("class_token", "patch_mean")


@torch.no_grad()
def extract_features(model, loader, dtype=None):
    """Class tokens (n, D), means of the patch tokens (n, D), labels (n,) of a loader of data.Sample, on the CPU.
    After the last norm, nothing masked; dtype autocasts the forward pass."""
    device, parts = model.cls_token.device, []
    for sample in tqdm(loader, desc="features", leave=False, disable=None):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            tokens = model.forward_features(
                model.normalize(sample.image.to(device))
            ).float()  # (B, N, D)
        parts.append(
            (tokens[:, 0].cpu(), tokens[:, 1:].mean(dim=1).cpu(), sample.label)
        )
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@torch.no_grad()
def knn_classify(
    train_features,
    train_labels,
    test_features,
    k=20,
    temperature=0.07,
    num_classes=None,
):
    """Weighted k-NN (DINO's): each of the k neighbours of highest cosine s votes exp(s / temperature) for its class.
    train_features (n, D), train_labels (n,) int64, test_features (B, D). Returns classes, best first: (B, min(5, C)),
    or (K, B, min(5, C)) for a list of k. Takes 2^26 similarities at a time on a GPU, 2^23 on a CPU (its cache)."""
    num_classes = num_classes or int(train_labels.max()) + 1
    bank = F.normalize(train_features.float(), dim=1).T  # (D, n)
    ks, rankings, size = (
        [k] if isinstance(k, int) else k,
        [],
        2 ** (26 if bank.is_cuda else 23),
    )
    for x in F.normalize(test_features.float(), dim=1).split(
        max(1, size // bank.shape[1])
    ):
        similarity, ids = (x @ bank).topk(min(max(ks), bank.shape[1]), dim=1)  # (b, k)
        labels, weights = (
            train_labels[ids],
            ((similarity - 1) / temperature).exp(),
        )  # - 1: no overflow
        votes = torch.zeros(len(ks), len(x), num_classes, device=x.device)  # (K, b, C)
        for vote, n in zip(votes, ks, strict=True):
            vote.scatter_add_(1, labels[:, :n], weights[:, :n])
        rankings.append(
            votes.sort(dim=2, descending=True, stable=True).indices[..., :5]
        )
    return (
        torch.cat(rankings, dim=1)[0]
        if isinstance(k, int)
        else torch.cat(rankings, dim=1)
    )


def features_of(model, dataset, loader_args, dtype, rank, world):
    """extract_features of a data set, in its order, in every process; each of them extracts its share."""
    share = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    parts = [extract_features(model, make_loader(share, **loader_args), dtype)] * world
    if world > 1:
        dist.all_gather_object(parts, parts[rank])
    order = torch.cat(
        [torch.arange(r, len(dataset), world) for r in range(world)]
    ).argsort()
    return [torch.cat(x)[order] for x in zip(*parts, strict=True)]


def knn_accuracy(model, train_set, test_set, *setup):
    """Top-1 in percent of the k-NN (k = 20) from train_set to test_set, by feature. setup: what features_of takes."""
    features = [
        features_of(model, dataset, *setup) for dataset in (train_set, test_set)
    ]
    (*banks, labels), (*queries, truth) = [
        [x.to(model.cls_token.device) for x in split] for split in features
    ]
    known = labels >= 0
    hits = [
        knn_classify(bank[known], labels[known], x)[:, 0] == truth
        for bank, x in zip(banks, queries, strict=True)
    ]
    return dict(
        zip(FEATURES, [100 * hit.float().mean().item() for hit in hits], strict=True)
    )
