#!/usr/bin/env bash
# torchmetrics: the AUROC of saliency maps in 8 bits is near chance; of maps that come image
# by image it depends on which of them stay below 1.
#
# Versions: torchmetrics 1.9.0, torch 2.14.1, scikit-learn 1.9.1, numpy 2.4.6.
# Expected: AUROC and average precision are ranks, so maps in [0, 1], the same in 8 bits and
# the same times 5 give the same value, as in scikit-learn.
# Behavior: scores are taken for logits as soon as one lies outside [0, 1], and pass through
# a sigmoid, which in fp32 is 1 from 17 on: nearly all levels of 8 bits tie. With
# thresholds=200, which saves memory, it is far below chance. The decision is made for each
# update: raw attention maps, one update an image, are squashed or not by their own maximum,
# and no longer compare with each other. No warning. Workaround: scale all maps to [0, 1] by one
# factor first.
#
# Output seen (AUROC: torchmetrics, with thresholds=200, scikit-learn; average precision:
# torchmetrics, scikit-learn):
#   in [0, 1]                   0.947 0.947 0.947   0.865 0.865
#   times 5                     0.947 0.947 0.947   0.865 0.865
#   8 bits                      0.555 0.110 0.947   0.202 0.863
#   maxima 0.5 to 1.5, at once  0.889 0.889 0.889   0.709 0.709
#   the same, image by image    0.801 0.801 0.889   0.666 0.709
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchmetrics==1.9.0 \
    scikit-learn==1.9.1
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

random = np.random.default_rng(0)
# A square object of 6 x 6 of the 14 x 14 cells; maps are higher on it by 0.4 on average.
truth = np.zeros((200, 14, 14), int)
for mask, (y, x) in zip(truth, random.integers(0, 8, (200, 2))):
    mask[y : y + 6, x : x + 6] = 1
maps = np.float32(0.6 * random.random(truth.shape) + 0.4 * truth)
scaled = maps / maps.max((1, 2), keepdims=True) * random.uniform(0.5, 1.5, (200, 1, 1))


def compare(name, maps, updates=1):
    values = []
    for metric in (BinaryAUROC(), BinaryAUROC(thresholds=200), BinaryAveragePrecision()):
        for x, y in zip(np.split(maps, updates), np.split(truth, updates)):
            metric.update(torch.tensor(x).flatten(), torch.tensor(y).flatten())
        values.append(float(metric.compute()))
    values.insert(2, roc_auc_score(truth.ravel(), maps.ravel()))
    values.append(average_precision_score(truth.ravel(), maps.ravel()))
    print("{:27} {:.3f} {:.3f} {:.3f}   {:.3f} {:.3f}".format(name, *values))
    return values


for name, x in (("in [0, 1]", maps), ("times 5", 5 * maps)):
    values = compare(name, x)
    assert np.allclose(values[:3], 0.947, atol=0.003)
    assert np.allclose(values[3:], 0.865, atol=0.003)
values = compare("8 bits", (255 * maps).round())
assert values[0] < 0.6 and values[1] < 0.15 and values[3] < 0.21
assert np.allclose([values[2], values[4]], [0.947, 0.863], atol=0.003)
once = compare("maxima 0.5 to 1.5, at once", scaled)
assert np.ptp(once[:3]) < 0.01 and abs(once[3] - once[4]) < 0.01
each = compare("the same, image by image", scaled, 200)
assert max(each[:2]) < once[2] - 0.05 and each[3] < once[4] - 0.03
EOF
