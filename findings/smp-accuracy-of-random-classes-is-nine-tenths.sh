#!/usr/bin/env bash
# segmentation-models-pytorch: random classes have an accuracy of 0.91, and masks without a
# single object a mean IoU of 0.93.
#
# Versions: segmentation-models-pytorch 0.6.0, torch 2.14.1, torchvision 0.29.1, timm 1.0.31,
# scikit-learn 1.9.1, numpy 2.4.6.
# Expected: accuracy after get_stats(mode="multiclass") is pixel accuracy, and the IoU averaged
# over classes and images ("macro-imagewise") leaves out classes that an image does not show.
# Behavior: accuracy counts true negatives too, and of 21 classes a wrong pixel is still right
# about 19. Every reduction gives a number from 0.90 to 1, and ten points of pixel accuracy
# become one. "macro" IoU is right, but the imagewise mean gives each class that is neither
# shown nor predicted a 1. So most of it is for absent classes: it prefers masks without any
# object to half of each object and five stray pixels. It is the same for F1 and recall.
# Workaround: recall with reduction="micro" is pixel accuracy; "macro" for the IoU.
#
# Output seen (accuracy: smp, scikit-learn; IoU: smp macro, scikit-learn, smp macro-imagewise):
#   random classes            0.909 0.049   0.020 0.020 0.004
#   background only           0.946 0.438   0.021 0.021 0.926
#   half of each object       0.973 0.719   0.505 0.505 0.958
#   the same, 5 stray pixels  0.973 0.714   0.501 0.501 0.758
#   perfect                   1.000 1.000   1.000 1.000 1.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
    segmentation-models-pytorch==0.6.0 scikit-learn==1.9.1
"$dir/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import torch
from segmentation_models_pytorch import metrics
from sklearn.metrics import accuracy_score, jaccard_score

IMAGES, CLASSES = 64, 21
random = np.random.default_rng(0)
# One object an image, of one of 20 classes, on background.
truth = np.zeros((IMAGES, 32, 32), int)
for i, mask in enumerate(truth):
    mask[4:28, 4:28] = 1 + i % (CLASSES - 1)
half = truth.copy()
half[:, :, :16] = 0
stray = half.copy()
stray[:, 0, :5] = random.integers(1, CLASSES, (IMAGES, 5))
predictions = {
    "random classes": random.integers(0, CLASSES, truth.shape),
    "background only": np.zeros_like(truth),
    "half of each object": half,
    "the same, 5 stray pixels": stray,
    "perfect": truth,
}


def score(name, found):
    stats = metrics.get_stats(
        torch.tensor(found), torch.tensor(truth), mode="multiclass", num_classes=CLASSES
    )
    pixels = float(metrics.recall(*stats, reduction="micro"))
    accuracy = float(metrics.accuracy(*stats, reduction="micro"))
    for reduction in ("macro", "micro-imagewise", "macro-imagewise"):
        assert np.isclose(float(metrics.accuracy(*stats, reduction=reduction)), accuracy)
    for metric in (metrics.f1_score, metrics.recall):
        value = float(metric(*stats, reduction="macro-imagewise"))
        assert name != "background only" or value > 0.9
    whole, imagewise = (
        float(metrics.iou_score(*stats, reduction=r)) for r in ("macro", "macro-imagewise")
    )
    right = accuracy_score(truth.ravel(), found.ravel())
    iou = jaccard_score(truth.ravel(), found.ravel(), average="macro")
    print(f"{name:25} {accuracy:.3f} {right:.3f}   {whole:.3f} {iou:.3f} {imagewise:.3f}")
    assert np.isclose(pixels, right) and np.isclose(whole, iou)
    assert np.isclose(accuracy, 1 - 2 * (1 - right) / CLASSES)
    return imagewise


values = {name: score(name, found) for name, found in predictions.items()}
assert values["background only"] > 0.9 and values["perfect"] == 1
assert values["the same, 5 stray pixels"] < 0.8
EOF
