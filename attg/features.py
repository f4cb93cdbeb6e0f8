"""
Features of whole images, nothing masked, and the k-NN classifier on them.

Shapes: n training images, B test images, D width, C classes, k neighbours.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Subset

from attg.checkpoint import load_checkpoint, read_settings, save_checkpoint
from attg.cli import progress
from attg.datasets import ImageData, refuse_unreadable
from attg.files import require, sha256
from attg.loader import make_loader

FEATURES = ("class_token", "patch_mean")


@torch.no_grad()
def extract_features(model, loader, dtype=None):
    """Class tokens (n, D), means of the patch tokens (n, D) and labels (n,), on the CPU.

    loader yields data.Sample; the tokens are those after the last norm, nothing is
    masked; dtype autocasts the forward pass.
    """
    device = model.cls_token.device
    class_tokens, patch_means, labels = [], [], []
    for sample in progress(loader, desc="features"):
        imgs = model.normalize(sample.image.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            tokens = model.forward_features(imgs).float()  # (B, 1 + L, D)
        class_tokens.append(tokens[:, 0].cpu())
        patch_means.append(tokens[:, 1:].mean(dim=1).cpu())
        labels.append(sample.label)
    return torch.cat(class_tokens), torch.cat(patch_means), torch.cat(labels)


def features_of(model, dataset, loader_args, dtype, rank, world):
    """extract_features of a data set, in its order, in every process.

    Each process extracts every world-th image, then all exchange what they have. What
    cannot be read has the features and the label of the next; see data.ImageData.
    """
    share = Subset(dataset, range(rank, len(dataset), world))
    mine = extract_features(model, make_loader(share, **loader_args), dtype)
    # Other data sets have no replacements: what they cannot read is an error at once.
    if isinstance(dataset, ImageData):
        refuse_unreadable(dataset)
    if world == 1:
        return mine
    parts = [None] * world
    dist.all_gather_object(parts, mine)
    ids = [torch.arange(r, len(dataset), world) for r in range(world)]
    order = torch.cat(ids).argsort()
    return tuple(torch.cat(part)[order] for part in zip(*parts, strict=True))


# Settings that say where features are from; a file of them holds these.
SOURCE = ("checkpoint", "sha256", "data", "classes", "val", "img_size", "precision")


def make_features(model, sets, batch_size, settings, place):
    """{"settings": where from, name of each set: {feature or "labels": (n, ...)}}.

    sets: {name: data set}. settings: of the program, as they are reported; the file
    settings["save_features"] is written if it is not None. place: (device, rank, world).
    """
    _, rank, world = place
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else None
    loader = {"batch_size": batch_size, "workers": settings["workers"]}
    settings = settings | {"sha256": sha256(settings["checkpoint"])}
    parts = {"settings": {name: settings[name] for name in SOURCE}}
    for name, dataset in sets.items():
        found = features_of(model, dataset, loader, dtype, rank, world)
        parts[name] = dict(zip((*FEATURES, "labels"), found, strict=True))
    if settings["save_features"] and rank == 0:
        save_checkpoint(settings["save_features"], **parts)
    return parts


# A label from here on is a fault: the k-NN keeps a vote for each class.
MAX_CLASSES = 10**6


def read_features(path):
    """What make_features gave and wrote to this file."""
    parts = load_checkpoint(path)
    found = sorted(map(str, parts))[:5]
    require(
        {"train", "settings"} < set(parts),
        f"--features {path}: holds {found}; name a file of --save_features",
    )
    settings = read_settings(parts["settings"], f"--features {path}")
    others = sorted(set(settings) - set(SOURCE))
    require(
        not others, f"--features {path}: has the settings {others}, which say nothing"
    )
    for name in parts:
        if name != "settings":
            check_set(parts[name], parts["train"], f"--features {path}: {name}")
    return parts | {"settings": settings}


def check_set(part, like, name):
    """ValueError unless part is a set of make_features, and as wide as the set like."""
    for own in (part, like):
        right = isinstance(own, dict) and set(own) == {*FEATURES, "labels"}
        right = right and all(isinstance(x, torch.Tensor) for x in own.values())
        require(right, f"{name} or train is no set of features and labels")
    labels = part["labels"]
    require(
        labels.dtype == torch.int64 and labels.dim() == 1 and len(labels) > 0,
        f"{name}: its labels are {labels.dtype} {tuple(labels.shape)}",
    )
    low, high = labels.min().item(), labels.max().item()
    require(
        -1 <= low and high < MAX_CLASSES, f"{name}: its labels go from {low} to {high}"
    )
    for feature in FEATURES:
        x = part[feature]
        wanted = (len(labels), *like[feature].shape[-1:])
        require(
            x.is_floating_point() and x.shape == wanted,
            f"{name}: its {feature} is {x.dtype} {tuple(x.shape)}, must be floats {wanted}",
        )


def knn_classify(
    train_features,
    train_labels,
    test_features,
    k=20,
    temperature=0.07,
    num_classes=None,
):
    """Weighted k-NN (DINO's): the classes of each test image, best first.

    train_features (n, D), train_labels (n,) int64, test_features (B, D); all on one
    device. Each of the k neighbours of highest cosine s votes exp(s / temperature) for
    its class. Returns (B, min(5, C)).
    """
    rankings = knn_rankings(
        train_features, train_labels, test_features, [k], temperature, num_classes
    )
    return rankings[0]


@torch.no_grad()
def knn_rankings(
    train_features,
    train_labels,
    test_features,
    ks,
    temperature=0.07,
    num_classes=None,
):
    """knn_classify for each k of ks in one pass: (len(ks), B, min(5, C))."""
    num_classes = num_classes or int(train_labels.max()) + 1
    bank = F.normalize(train_features.float(), dim=1).T  # (D, n)
    queries = F.normalize(test_features.float(), dim=1)  # (B, D)
    neighbours = min(max(ks), bank.shape[1])
    # Similarities or votes at a time: what is left of a GPU's memory, or what fits a
    # CPU's cache.
    most = 2**26 if bank.is_cuda else 2**23
    row = max(bank.shape[1], len(ks) * num_classes)
    rankings = []
    for x in queries.split(max(1, most // row)):
        similarity, ids = (x @ bank).topk(neighbours, dim=1)  # (b, k)
        labels = train_labels[ids]
        # The same factor for all votes changes no ranking; minus 1 it cannot overflow.
        weights = ((similarity - 1) / temperature).exp()
        votes = torch.zeros(len(ks), len(x), num_classes, device=x.device)
        for vote, k in zip(votes, ks, strict=True):
            vote.scatter_add_(1, labels[:, :k], weights[:, :k])
        # stable: of classes with equal votes the lower number comes first
        ranking = votes.sort(dim=2, descending=True, stable=True).indices
        rankings.append(ranking[..., :5])
    return torch.cat(rankings, dim=1)


def knn_accuracy(model, train_set, test_set, loader_args, dtype, rank, world):
    """{feature: top-1 in percent} of the k-NN (k = 20) from train_set to test_set."""
    device = model.cls_token.device
    setup = (loader_args, dtype, rank, world)
    *banks, labels = features_of(model, train_set, *setup)
    *queries, truth = features_of(model, test_set, *setup)
    labelled = labels >= 0  # stl10 trains on pictures without labels as well
    labels, truth = labels[labelled].to(device), truth.to(device)
    accuracy = {}
    for name, bank, query in zip(FEATURES, banks, queries, strict=True):
        guess = knn_classify(bank[labelled].to(device), labels, query.to(device))[:, 0]
        accuracy[name] = 100 * (guess == truth).float().mean().item()
    return accuracy
