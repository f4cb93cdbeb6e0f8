#!/usr/bin/env bash
# torchmetrics: the generalized Dice score of the same masks depends on batch size and order;
# of one class it is the share of images that show the class.
#
# Versions: torchmetrics 1.9.0, torch 2.14.1, numpy 2.4.6.
# Expected: a mean over images, so neither batch size nor order matters, as in DiceScore and
# MeanIoU; perfect masks score 1, for each class too.
# Behavior: a class that an image lacks has the weight 1 / 0. It is replaced by a weight that
# comes from other images of the batch, and not always from the same class. With 21 classes
# and one object an image, as in Pascal VOC, images of one batch lower each other's scores:
# 0.81 for one image at a time, 0.67 for all at once, another value for each order. With
# per_class=True an image without the class counts as 0, so perfect masks of a rare class
# score near 0. weight_type="linear" is free of the first.
# Workaround: one image an update, or MONAI's metric.
#
# Output seen (60 masks; batches of 1, 8, 60, and 60 in another order):
#   GeneralizedDiceScore, square  0.809 0.799 0.665 0.653
#   GeneralizedDiceScore, linear  0.940 0.940 0.940 0.940
#   DiceScore                     0.586 0.586 0.586 0.586
#   MeanIoU                       0.541 0.541 0.541 0.541
#   perfect masks: 1.000; by class 1.000 0.083 0.050 0.033 0.033 ...
#   images with the class:         1.000 0.083 0.050 0.033 0.033 ...
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchmetrics==1.9.0
"$dir/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import torch
from torchmetrics.segmentation import DiceScore, GeneralizedDiceScore, MeanIoU

IMAGES, CLASSES = 60, 21
random = np.random.default_rng(0)
# One square object an image; predictions miss its upper rows and add a patch of another class.
truth = torch.zeros(IMAGES, 32, 32, dtype=torch.long)
for mask in truth:
    end = random.integers(6, 30)
    mask[2:end, 2:end] = int(random.integers(1, CLASSES))
found = truth.clone()
for mask in found:
    mask[: random.integers(2, 10)] = 0
    mask[30:, 30:] = int(random.integers(1, CLASSES))
order = torch.arange(IMAGES)
shuffled = torch.tensor(random.permutation(IMAGES))


def score(metric, found, order=order, batch=IMAGES, **options):
    metric = metric(num_classes=CLASSES, input_format="index", **options)
    for images in order.split(batch):
        metric.update(found[images], truth[images])
    return metric.compute().numpy()


def compare(metric, **options):
    values = [score(metric, found, batch=batch, **options).item() for batch in (1, 8, IMAGES)]
    values.append(score(metric, found, shuffled, **options).item())
    name = ", ".join([metric.__name__, *options.values()])
    print(f"{name:29}", *(f"{value:.3f}" for value in values))
    return np.array(values)


values = compare(GeneralizedDiceScore, weight_type="square")
assert values[0] - values[1] > 0.005 and values[1] - values[2] > 0.1, values
assert abs(values[2] - values[3]) > 0.005, values
linear = compare(GeneralizedDiceScore, weight_type="linear")
for values in (linear, compare(DiceScore), compare(MeanIoU)):
    assert np.ptp(values) < 1e-4, values

whole = score(GeneralizedDiceScore, truth)
by_class = score(GeneralizedDiceScore, truth, per_class=True)
share = np.array([(truth == c).flatten(1).any(1).float().mean() for c in range(CLASSES)])
print(f"perfect masks: {whole:.3f}; by class", *(f"{value:.3f}" for value in by_class[:5]), "...")
print("images with the class:        ", *(f"{value:.3f}" for value in share[:5]), "...")
assert np.isclose(whole, 1) and np.allclose(by_class, share) and share[1:].max() < 0.2
EOF
