#!/usr/bin/env bash
# pysodmetrics: a bool or 0/1 mask counts as an image without an object; saliency maps then score
# plausibly, and the best one is empty.
#
# Versions: pysodmetrics 1.6.2, numpy 2.3.4, scipy 1.17.1, scikit-image 0.25.2.
# Expected: the object is what is not 0, or the type is checked, as with normalize=False, which
# takes bool masks and raises an error for all others.
# Behavior: by default the object is "mask > 128", and neither True nor 1 is. Each metric takes
# its branch for images without an object: MAE is the mean of the map, S-measure 1 less that, and
# E-measure the share of empty pixels. A map in the wrong place scores like one on the object, and
# a map of a single pixel beats both. Only IoU and the F-measures, 0 for all, give it away. Each
# map is also stretched to 0..1, so a faint one (at most 0.02) scores like a strong one. The
# metrics ask for a "gray scale image"; only an inner helper's docstring names 0 to 255.
# Workaround: masks of 0 and 255; or normalize=False with bool masks and float maps in 0..1.
#
# Output seen (means of 20 images; MAE: lower is better, others: higher; 0 and 1 as bool):
#   mask            map                    MAE       S       E      wF
#   bool            on the object        0.112   0.888   0.974   0.000
#   bool            in the wrong place   0.112   0.888   0.974   0.000
#   bool            one pixel            0.000   1.000   1.000   0.000
#   0 and 255       on the object        0.052   0.914   1.000   0.734
#   0 and 255       in the wrong place   0.213   0.337   0.832   0.000
#   0 and 255       one pixel            0.101   0.446   0.253   0.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.3.4 scipy==1.17.1 scikit-image==0.25.2 \
    opencv-python-headless==4.13.0.92 pysodmetrics==1.6.2
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from py_sod_metrics import MAE, Emeasure, Smeasure, WeightedFmeasure

y, x = np.mgrid[:64, :64]
random = np.random.default_rng(0)
masks, maps = [], {"on the object": [], "in the wrong place": [], "faint": [], "one pixel": []}
for _ in range(20):
    row, column, radius = random.integers(20, 44), random.integers(20, 44), random.integers(8, 16)
    distance = np.hypot(y - row, x - column)
    masks.append(distance < radius)
    good = np.clip(1.5 - distance / radius, 0, 1)
    maps["on the object"].append(good)
    maps["in the wrong place"].append(np.roll(good, (32, 32), (0, 1)))
    maps["faint"].append(good / 50)
    maps["one pixel"].append((distance == distance.max()).astype(float))
kinds = {
    "bool": (masks, True),
    "0 and 1": ([mask.astype(np.uint8) for mask in masks], True),
    "0 and 255": ([mask.astype(np.uint8) * 255 for mask in masks], True),
    "bool, as it is": (masks, False),
}


def score(masks, maps, normalize):
    metrics = MAE(), Smeasure(), Emeasure(), WeightedFmeasure()
    for mask, map in zip(masks, maps):
        for metric in metrics:
            metric.step(map, mask, normalize=normalize)
    mae, s, e, f = (metric.get_results() for metric in metrics)
    return np.array([mae["mae"], s["sm"], e["em"]["curve"].max(), f["wfm"]])


print("mask            map                    MAE       S       E      wF")
for kind, (truth, normalize) in kinds.items():
    scores = {name: score(truth, maps[name], normalize) for name in maps}
    for name, values in scores.items():
        print(f"{kind:15} {name:18}", *(f"{value:7.3f}" for value in values))
    good, wrong, faint, pixel = scores.values()
    if kind in ("bool", "0 and 1"):
        assert np.allclose(good, wrong) and np.allclose(good, faint), (good, wrong, faint)
        assert good[0] < 0.15 and good[1] > 0.85 and good[2] > 0.95 and good[3] == 0, good
        assert pixel[0] < good[0] and (pixel[1:3] > good[1:3]).all(), pixel
    else:
        assert (np.abs(good - wrong) > 0.1).all() and (good[1:] > pixel[1:] + 0.3).all()
        assert np.allclose(good, faint) == normalize, faint
EOF
