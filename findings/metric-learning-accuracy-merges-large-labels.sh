#!/usr/bin/env bash
# pytorch-metric-learning: with large integers as labels random features have an accuracy of 1,
# and with k=10 perfect features a mean average precision of 0.1.
#
# Versions: pytorch-metric-learning 2.9.0, faiss-cpu 1.15.1, torch 2.14.1, scikit-learn 1.9.1,
# numpy 2.4.6.
# Expected: AccuracyCalculator only compares labels, so any distinct integers will do, as in
# scikit-learn; and average precision over the k nearest is 1 where all of them are right.
# Behavior: labels are cast to float32. From 2 ** 24 on neighboring integers are one label: ids
# of a database, dates and times, numbers in nanoseconds. The wider apart float32 is at that
# size, the more classes merge: accuracy goes up, in the end to 1 for random features, without
# a message. mean_average_precision with k=10 divides by all relevant images, not by the 10 that
# can be found: of classes of 100 images perfect features score 10 / 99, and small classes count
# most. The warning for mean_average_precision_at_r with a small k recommends this very metric
# for MAP@k.
# Workaround: labels from np.unique(labels, return_inverse=True); k=None or "max_bin_count".
#
# Output seen (1,000 features of 10 classes; precision at 1: AccuracyCalculator, scikit-learn):
#   random, labels from 0              0.109 0.109
#   random, labels from 2 ** 24        0.249 0.109
#   random, labels from 20261130120000 1.000 0.109
#   the same, renumbered               0.109 0.109
#   perfect, mean average precision, k=None: 1.000
#   perfect, mean average precision, k=10: 0.101
#   perfect, mean average precision, k=50: 0.505
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 scikit-learn==1.9.1 \
    faiss-cpu==1.15.1 pytorch-metric-learning==2.9.0
"$dir/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.neighbors import NearestNeighbors

random = np.random.default_rng(0)
classes = np.repeat(np.arange(10), 100)
noise = random.normal(size=(1000, 32)).astype(np.float32)
perfect = 100 * random.normal(size=(10, 32)).astype(np.float32)[classes] + noise


def calculate(metric, features, labels, **options):
    calculator = AccuracyCalculator(include=(metric,), device=torch.device("cpu"), **options)
    result = calculator.get_accuracy(torch.tensor(features), torch.tensor(labels))
    return result[metric]


def compare(label, features, labels):
    nearest = NearestNeighbors(n_neighbors=1).fit(features).kneighbors(return_distance=False)
    expected = (labels[nearest[:, 0]] == labels).mean()
    found = calculate("precision_at_1", features, labels)
    print(f"{label:34} {found:.3f} {expected:.3f}")
    return found, expected


found, expected = compare("random, labels from 0", noise, classes)
assert np.isclose(found, expected) and found < 0.15
found, expected = compare("random, labels from 2 ** 24", noise, classes + 2**24)
assert found > 2 * expected
found, expected = compare("random, labels from 20261130120000", noise, classes + 20261130120000)
assert found == 1 and expected < 0.15
_, renumbered = np.unique(classes + 20261130120000, return_inverse=True)
found, expected = compare("the same, renumbered", noise, renumbered)
assert np.isclose(found, expected)

for k in (None, 10, 50):
    value = calculate("mean_average_precision", perfect, classes, k=k)
    print(f"perfect, mean average precision, k={k}: {value:.3f}")
    assert np.isclose(value, 1 if k is None else k / 99)
PY
