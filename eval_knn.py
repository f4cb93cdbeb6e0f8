"""
k-NN on frozen features, with all labels or with few (arXiv 2402.15172, Tables 1, 3, 6).

    python eval_knn.py out/NAME/last.pt --data PATH_OR_NAME --k 10 20
    python eval_knn.py out/NAME/last.pt --data PATH_OR_NAME --shots 1 5 10 20
    torchrun --nproc_per_node=8 eval_knn.py CHECKPOINT --data imagenet --k 20

Reports top-1 and top-5 for the class token and for the mean of the patch tokens. The
encoder sees whole images, nothing is masked. --shots: labeled images per class, drawn
with five seeds. Reads checkpoints of this project, MAE, DINO, timm and Hugging Face.

Shapes: n training images, B test images, D width, C classes, K values of k.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses

import torch

from attg.cli import DataFlags, RunFlags, flag, parse, run_cli
from attg.datasets import shot_indices
from attg.evaluation import (
    EvalFlags,
    FeatureFlags,
    LabelFlags,
    evaluate,
    labeled_features,
    mean_and_deviation,
)
from attg.features import FEATURES, knn_classify
from attg_mae import load_encoder
from eval_retrieval import retrieval_map

__all__ = ["accuracy", "knn_classify", "main", "retrieval_map"]


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, DataFlags, LabelFlags, FeatureFlags, RunFlags):
    k: tuple[int, ...] = flag((), "numbers of neighbors [20; 5 with --shots]", 1, 10**7)


# -- k-NN ------------------------------------------------------------------------------


def accuracy(bank, labels, queries, truth, ks, num_classes, device):
    """[[top-1, top-5] in percent for each k of ks].

    bank (n, D), labels (n,), queries (B, D), truth (B,).
    """
    bank, labels, queries = (x.to(device) for x in (bank, labels, queries))
    classes = knn_classify(bank, labels, queries, ks, num_classes=num_classes)
    correct = classes.cpu() == truth[:, None]  # (K, B, min(5, C))
    counts = torch.stack([correct[..., 0].sum(dim=1), correct.any(dim=2).sum(dim=1)])
    return (100 * counts.T.double() / len(truth)).tolist()


def knn_results(x, labels, queries, truth, settings, device):
    """Results of one feature x (n, D) on one test set, queries (B, D)."""
    options = settings.k, int(labels.max()) + 1, device
    results = []
    if not settings.shots:
        percent = accuracy(x, labels, queries, truth, *options)
        for k, (top1, top5) in zip(settings.k, percent, strict=True):
            results.append({"protocol": "k-NN", "k": k, "top-1": top1, "top-5": top5})
    for shots in settings.shots:
        percent = []
        for seed in range(settings.seeds):
            rows = shot_indices(labels, shots, seed)
            percent.append(accuracy(x[rows], labels[rows], queries, truth, *options))
        counts = {"seeds": settings.seeds, "images": len(rows)}
        for k, *runs in zip(settings.k, *percent, strict=True):
            result = {"protocol": f"{shots} shots", "k": k}
            results.append(result | mean_and_deviation(runs) | counts)
    return results


def evaluate_knn(settings, data, dist_info):
    """Results of both features on all test sets, and all settings."""
    parts = labeled_features(load_encoder, settings, data, dist_info)
    record = dataclasses.asdict(settings) | parts.pop("settings")
    train = parts.pop("train")
    results = []
    for feature in FEATURES:
        bank = train[feature], train["labels"]
        for name, test in parts.items():
            queries = test[feature], test["labels"]
            for result in knn_results(*bank, *queries, settings, dist_info[0]):
                labels = {"feature": feature, "protocol": result.pop("protocol")}
                # A column of its own if there is a choice.
                if list(parts) != ["test"]:
                    labels["test"] = name
                results.append(labels | result)
    return results, record


def main(argv=None, data=None):
    """Returns the results, a list of dicts; data: see attg.evaluation.evaluate."""
    settings = parse(Settings, __doc__, argv)
    settings.k = settings.k or ((5,) if settings.shots else (20,))
    return evaluate("eval_knn", settings, evaluate_knn, data)


if __name__ == "__main__":
    run_cli(main)
