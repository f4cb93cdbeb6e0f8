"""
k-NN on frozen features, with all labels or with few (arXiv 2402.15172, Tables 1, 3, 6).

    python eval_knn.py out/NAME/encoder.pt --data PATH_OR_NAME --k 10 20
    python eval_knn.py out/NAME/encoder.pt --data PATH_OR_NAME --shots 1 5 10 20
    torchrun --nproc_per_node=8 eval_knn.py CHECKPOINT --data imagenet --k 20

Reports top-1 and top-5 for the class token and for the mean of the patch tokens. The
encoder sees whole images, nothing is masked. --shots: labeled images per class, drawn
with five seeds. Reads checkpoints of this project, MAE, DINO, timm and Hugging Face.

Shapes: n training images, B test images, D width, C classes, K values of k.
"""

if __name__ == "__main__":
    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()

import dataclasses
import itertools

from attg.cli import RunFlags, flag, parse, run_cli
from attg.evaluation import (
    EvalFlags,
    FeatureFlags,
    LabelFlags,
    draw_shots,
    evaluate,
    labeled_features,
    mean_and_std,
    save_figures,
    topk_accuracy,
)
from attg.features import FEATURES, knn_classify
from attg_mae import load_encoder
from eval_retrieval import retrieval_map  # noqa: F401, for others to import


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, LabelFlags, FeatureFlags, RunFlags):
    k: tuple[int, ...] = flag((), "numbers of neighbors [20; 5 with --shots]", 1, 10**7)


def evaluate_knn(settings, data, dist_info):
    """Results of both features on all test sets."""
    train, tests = labeled_features(load_encoder, settings, data, dist_info)
    if dist_info[1] != 0:
        return []  # rank 0 has all features
    draws = draw_shots(train["labels"], settings, "k-NN")
    results = []
    for feature, name, protocol in itertools.product(FEATURES, tests, draws):
        queries, truth = tests[name][feature], tests[name]["labels"]
        percent = []
        for rows in draws[protocol]:
            bank, labels = train[feature][rows], train["labels"][rows]
            tensors = (x.to(dist_info[0]) for x in (bank, labels, queries))
            classes = knn_classify(*tensors, settings.k).cpu()  # (K, B, 5)
            percent.append(topk_accuracy(classes, truth))
        for k, *runs in zip(settings.k, *percent, strict=True):
            result = {"feature": feature, "test": name, "protocol": protocol, "k": k}
            counts = {"seeds": len(runs), "images": len(bank)}
            counts["test_images"] = len(queries)
            results.append(result | mean_and_std(runs) | counts)
    if settings.show:
        bank, labels = train[FEATURES[1]], train["labels"]
        test = tests[settings.val[0]]
        queries, truth = test[FEATURES[1]], test["labels"]
        tensors = (x.to(dist_info[0]) for x in (bank, labels, queries))
        guesses = knn_classify(*tensors, settings.k[0])[:, 0].cpu()
        title = f"{FEATURES[1]}, k = {settings.k[0]}, all labels"
        save_figures(settings, data, truth, guesses, title, (bank, queries))
    return results


def main(argv=None, data=None):
    """Returns the results, a list of dicts; data: see attg.evaluation.evaluate."""
    settings = parse(Settings, __doc__, argv)
    settings.k = settings.k or ((5,) if settings.shots else (20,))
    return evaluate("eval_knn", settings, evaluate_knn, data)


if __name__ == "__main__":
    run_cli(main)
