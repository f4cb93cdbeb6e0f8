#!/usr/bin/env bash
# torchmetrics: the adjusted Rand score of 100,000 samples is any number, at times a plausible
# one.
#
# Versions: torchmetrics 1.9.0, torch 2.14.1, scikit-learn 1.9.1, numpy 2.4.6.
# Expected: AdjustedRandScore agrees with scikit-learn for any number of samples, as torchmetrics'
# RandScore and FowlkesMallowsIndex do.
# Behavior: the products of counts of pairs are taken in int64. They grow with N ** 4 and pass
# 2 ** 63 soon after N = 55,000, sooner for few clusters than for many. Clusters of the 50,000
# images of CIFAR-10 are scored right; for larger sets the products wrap around without a
# warning. Most results are absurd, some are not: in the size of SVHN's extra images,
# clusters of which 30 % follow the classes score 0.65 instead of 0.09, better than ones of
# 60 %. scikit-learn multiplies in Python's integers.
# Workaround: sklearn.metrics.adjusted_rand_score.
#
# Output seen (share of samples in the cluster of their class, the others anywhere;
# torchmetrics, scikit-learn; torchmetrics' Rand score, scikit-learn's):
#     50000 in   10, 30 %:   0.089 0.089   0.836 0.836
#     50000 in   10, 80 %:   0.642 0.642   0.936 0.936
#    531131 in   10, 30 %:   0.654 0.090   0.836 0.836
#    531131 in   10, 60 %:   0.105 0.361   0.885 0.885
#    531131 in   10, 80 %:   0.740 0.641   0.935 0.935
#   1281167 in 1000, 80 %:  -1.395 0.640   0.999 0.999
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchmetrics==1.9.0 \
    scikit-learn==1.9.1
"$dir/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score, rand_score
from torchmetrics.clustering import AdjustedRandScore, RandScore


def score(samples, classes, share):
    random = np.random.default_rng(0)
    target = np.arange(samples) % classes
    follow = random.random(samples) < share
    clusters = np.where(follow, target, random.integers(0, classes, samples))
    values = []
    for metric, reference in ((AdjustedRandScore, adjusted_rand_score), (RandScore, rand_score)):
        values.append(float(metric()(torch.tensor(clusters), torch.tensor(target))))
        values.append(reference(target, clusters))
    print(f"{samples:9} in {classes:4}, {share:.0%}".replace("%", " %"), end=": ")
    print("{:7.3f} {:.3f}   {:.3f} {:.3f}".format(*values))
    assert np.isclose(values[2], values[3], atol=1e-4)
    assert np.isclose(values[1], share**2, atol=0.005)
    return values[:2]


for share in (0.3, 0.8):
    assert np.isclose(*score(50_000, 10, share), atol=1e-4)
low, middle, high = (score(531_131, 10, share) for share in (0.3, 0.6, 0.8))
assert 0.6 < low[0] < 1 and 0 < middle[0] < 0.2, (low, middle)
assert 0.05 < high[0] - high[1] < 0.2, high
many = score(1_281_167, 1000, 0.8)
assert abs(many[0]) > 1, many
EOF
