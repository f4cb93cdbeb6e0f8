"""
Features of whole images (nothing is masked), their files, and the k-NN classifier.

Shapes: n training images, B test images, D width, C classes, k neighbors.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Subset

from attg.checkpoint import check_like, load_checkpoint, read_settings, save_checkpoint
from attg.datasets import check_unreadable
from attg.loader import make_loader
from attg.log import progress

FEATURES = ("class_token", "patch_mean")
# Settings that determine the features; they are stored in the file of --save_features.
SOURCE = ("checkpoint", "sha256", "data", "classes", "val", "img_size", "precision")
SOURCE += ("heads", "weights_key", "weights_prefix", "white")


@torch.no_grad()
def extract_features(model, loader, dtype=None):
    """Class tokens (n, D), means of the patch tokens (n, D) and labels (n,), on the CPU.

    The tokens are those after the last norm. loader yields Samples; dtype: for autocast.
    """
    device = next(model.parameters()).device
    class_tokens, patch_means, labels = [], [], []
    for sample in progress(loader, desc="features"):
        imgs = model.normalize(sample.image.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            tokens = model.forward_features(imgs).float()  # (B, 1 + L, D)
        class_token, patch_mean = pool_tokens(model, tokens)
        class_tokens.append(class_token.cpu())
        patch_means.append(patch_mean.cpu())
        labels.append(sample.label)
    return torch.cat(class_tokens), torch.cat(patch_means), torch.cat(labels)


def pool_tokens(model, tokens):
    """Class tokens and means of the patch tokens, (B, D) each, of tokens (B, 1 + L, D)."""
    # A fine-tuned encoder normalizes the mean (fc_norm of timm and mae), not the tokens.
    norm = getattr(model, "fc_norm", lambda x: x)
    return norm(tokens[:, 0]), norm(tokens[:, 1:].mean(dim=1))


def extract_sharded(model, dataset, dtype, rank, world, **loader_args):
    """{feature or "labels": (n, ...)} of a data set in its order on rank 0, else (0, ...).

    Each rank extracts every world-th image and sends the features to rank 0: those of
    ImageNet, on all ranks of a machine, would fill its memory. An unreadable image has the
    features and label of its replacement (see ImageData).
    """
    n = len(dataset)
    # All shards have one size; the last image fills them up.
    last = math.ceil(n / world) * world
    ids = torch.arange(rank, last, world).clamp(max=n - 1)
    loader = make_loader(Subset(dataset, ids.tolist()), **loader_args)
    features = extract_features(model, loader, dtype)
    check_unreadable(dataset)
    if world > 1:
        features = [gather_shards(x, rank, world)[:n] for x in features]
    return dict(zip((*FEATURES, "labels"), features, strict=True))


def gather_shards(x, rank, world):
    """The rows of x (n, ...) on all ranks in turn, (n * world, ...); on rank 0 only."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    x = x.to(device)
    shards = [torch.empty_like(x) for _ in range(world if rank == 0 else 0)]
    dist.gather(x, shards)
    shards = [shard.cpu() for shard in shards] or [x[:0].cpu()]
    return torch.stack(shards, dim=1).flatten(0, 1)


def make_features(model, datasets, settings, dist_info):
    """{name of a data set: extract_sharded}, also saved as the flags say.

    settings: attg.evaluation's flags. dist_info: (device, rank, world).
    """
    _, rank, world = dist_info
    dtype = torch.bfloat16 if settings.precision == "bf16" else None
    options = {"batch_size": settings.batch_size, "workers": settings.workers}
    parts = {}
    for name, dataset in datasets.items():
        parts[name] = extract_sharded(model, dataset, dtype, rank, world, **options)
    if settings.save_features and rank == 0:
        source = {name: getattr(settings, name) for name in SOURCE}
        save_checkpoint(settings.save_features, settings=source, **parts)
    return parts


def read_features(path):
    """Parts of a file of make_features without unlabeled images, and its SOURCE.

    ValueError for other files.
    """
    parts = load_checkpoint(path)
    try:
        settings = read_settings(parts.pop("settings"), "settings")
        width = parts["train"]["class_token"].shape[1]
        for name, part in parts.items():
            labels = part["labels"]
            rows = torch.empty(len(labels), width)
            for feature in FEATURES:
                check_like(part[feature], rows, f"{feature} of {name}")
            check_like(labels, rows[:, 0].long(), f"labels of {name}")
            # A larger one is damage: k-NN counts votes for each class.
            if not 0 <= labels.max() < 10**6:
                raise ValueError(f"labels of {name}: none, or out of range")
            parts[name] = labeled_rows(part)
        if len(parts) < 2:
            raise ValueError("no test set")
        most = parts["train"]["labels"].max()
        if any(part["labels"].max() > most for part in parts.values()):
            raise ValueError("test labels beyond those of training; count both from 0")
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(
            f"--features {path}: not a file of --save_features ({error!r})"
        ) from error
    return parts, {name: settings.get(name) for name in SOURCE}


def labeled_rows(part):
    """The features and labels of labeled images (label >= 0)."""
    labeled = part["labels"] >= 0
    return {name: x[labeled] for name, x in part.items()}


@torch.no_grad()
def knn_classify(
    train_features,
    train_labels,
    test_features,
    k=20,
    temperature=0.07,
    num_classes=None,
):
    """Classify by weighted k-NN (DINO's): the classes of each test image, best first.

    train_features (n, D), train_labels (n,) int64, test_features (B, D); all on one
    device. Each of the k neighbors of highest cosine s votes exp(s / temperature) for
    its class; of equal cosines the lower row is nearer. Returns (B, min(5, C)), or
    (K, B, min(5, C)) if k is a sequence of K values; -1 in place of classes without a
    vote.
    """
    ks = [k] if isinstance(k, int) else k
    num_classes = num_classes or int(train_labels.max()) + 1
    bank = unit_rows(train_features).T  # (D, n)
    queries = unit_rows(test_features)  # (B, D)
    neighbors = min(max(ks), bank.shape[1])
    # Similarities or votes per chunk: limited by a GPU's memory, or by a CPU's cache.
    max_values = 2**26 if bank.is_cuda else 2**23
    row = max(bank.shape[1], len(ks) * num_classes)
    rankings = []
    chunk = max(1, max_values // row)
    for x in queries.split(chunk):
        similarity, ids = nearest(x @ bank, neighbors)  # (b, k)
        labels = train_labels[ids]
        # A common factor changes no ranking, and subtracting 1 rules out an overflow.
        weights = ((similarity - 1) / temperature).exp()
        weights = weights.clamp(min=torch.finfo().tiny)  # a vote is never 0
        votes = torch.zeros(len(ks), len(x), num_classes, device=x.device)
        for vote, n in zip(votes, ks, strict=True):
            vote.scatter_add_(1, labels[:, :n], weights[:, :n])
        # stable: of classes with equal votes the lower number comes first
        ranking = votes.sort(dim=2, descending=True, stable=True)
        votes, classes = (x[..., :5] for x in ranking)
        rankings.append(classes.masked_fill(votes == 0, -1))
    rankings = torch.cat(rankings, dim=1)
    return rankings[0] if isinstance(k, int) else rankings


def unit_rows(features):
    """Features (n, D) in fp32, each of length 1; ValueError if they are not finite."""
    if not features.isfinite().all():
        raise ValueError("features are not finite; did the encoder's training finish?")
    return F.normalize(features.float(), dim=1)


def nearest(similarity, k):
    """topk of rows (b, n): values and indices (b, k), of equal values the lower index first.

    The order of topk, and which of the equal values it takes, depends on k.
    """
    n = similarity.shape[1]
    values, ids = similarity.topk(min(k + 1, n), dim=1)
    if k < n:
        # Equal values on both sides of the last place, which is rare.
        tied = values[:, k - 1] == values[:, k]
        values, ids = values[:, :k], ids[:, :k]
        ordered = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied] = ordered.values[:, :k]
        ids[tied] = ordered.indices[:, :k]
    # By index first, which the stable sort by value keeps.
    ids, order = ids.sort(dim=1)
    values = values.gather(1, order)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def knn_accuracy(model, train_set, test_set, dtype, rank, world, **loader_args):
    """{feature: top-1 in percent} of the k-NN (k = 20) from train_set to test_set.

    On rank 0; {} on the others.
    """
    device = next(model.parameters()).device
    # Some training images of stl10 have no labels.
    train, test = (
        labeled_rows(extract_sharded(model, dataset, dtype, rank, world, **loader_args))
        for dataset in (train_set, test_set)
    )
    accuracy = {}
    for name in FEATURES:
        # Of one class all would be right.
        if len(train["labels"].unique()) > 1 and len(test["labels"]):
            # One feature at a time: 5 GB for ViT-L on ImageNet.
            sets = train[name], train["labels"], test[name]
            classes = knn_classify(*(x.to(device) for x in sets))
            correct = classes[:, 0].cpu() == test["labels"]
            accuracy[name] = 100 * correct.float().mean().item()
    return accuracy
