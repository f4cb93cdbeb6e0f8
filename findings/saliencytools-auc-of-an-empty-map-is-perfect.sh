#!/usr/bin/env bash
# saliencytools: to its AUC-Judd a map of zeros is perfect, and a spot in the wrong corner beats a
# noisy map of the right place; its earth mover's distance does not see places at all.
#
# Versions: saliencytools 0.35, scikit-image 0.26.0, scikit-learn 1.9.1, scipy 1.17.1,
# numpy 2.4.6.
# Expected: auc_judd(map, reference) is 1 minus the area under the ROC curve: 0.5 for a map that
# says nothing, which its docstring calls the level of chance, as "0 means perfect recovery". emd
# is the cost of moving one map onto the other; its docstring recommends it for "spatial
# distributions of importance", and the package says that all its metrics keep spatial structure.
# Behavior: auc_judd gives each salient pixel a point for the others that are lower or equal (the
# comment in the source says strictly lower), so a tie is a full hit instead of half of one. Maps
# with many zeros, as after a ReLU or a threshold, and the superpixels of LIME profit from it, the
# more the less they show. Maps without ties are right. emd compares histograms of the values, each
# from the smallest to the largest value of its own map: a map that is mirrored, shuffled, or a
# thousand times as large is at distance 0, and a single bright pixel is worse than noise. Neither
# gives a warning.
# Workaround: 1 - roc_auc_score(reference >= reference.mean(), map) of scikit-learn, both flattened;
# for places scipy.stats.wasserstein_distance_nd on the pixels' coordinates, weighted by the maps.
#
# Output seen:
#   1 - AUC                    auc_judd  scikit-learn
#   the right place, noisy        0.087         0.087
#   noise                         0.495         0.495
#   the right place, ReLU         0.000         0.315
#   one pixel in 20               0.061         0.506
#   the wrong corner              0.068         0.534
#   zeros                         0.000         0.500
#   distance to the reference       emd
#   mirrored both ways              0.0
#   pixels shuffled                 0.0
#   times 1000, plus 5              0.0
#   noise of 0.05                  21.3
#   one pixel of 3                 26.4
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q saliencytools==0.35 scikit-image==0.26.0 scikit-learn==1.9.1 \
    scipy==1.17.1 numpy==2.4.6
# The package imports torch and does not use it; a stand-in saves the download. SciPy looks up the
# class if there is such a module.
mkdir -p "$dir/stand-in/torch/nn"
echo "class Tensor: pass" >"$dir/stand-in/torch/__init__.py"
touch "$dir/stand-in/torch/nn/__init__.py" "$dir/stand-in/torch/nn/functional.py"
PYTHONPATH=$dir/stand-in "$dir/venv/bin/python" - <<'EOF'
import numpy as np
from saliencytools.maskcompare import auc_judd, emd
from sklearn.metrics import roc_auc_score

SIZE = 28
random = np.random.default_rng(0)
y, x = np.mgrid[:SIZE, :SIZE]


def spot(row, column, radius):
    return np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * radius**2))


reference = spot(9, 9, 4.5)
salient = reference >= reference.mean()
maps = {
    "the right place, noisy": reference + random.normal(0, 0.15, y.shape),
    "noise": random.random(y.shape),
    "the right place, ReLU": np.maximum(reference - 0.5, 0),
    "one pixel in 20": np.where(random.random(y.shape) < 0.05, random.random(y.shape), 0),
    "the wrong corner": np.where(spot(23, 23, 3) > 0.5, 1.0, 0.0),
    "zeros": np.zeros(y.shape),
}
found = {}
print(f"{'1 - AUC':26} auc_judd  scikit-learn")
for name, saliency in maps.items():
    expected = 1 - roc_auc_score(salient.ravel(), saliency.ravel())
    found[name] = auc_judd(saliency, reference)
    print(f"{name:26} {found[name]:8.3f}  {expected:12.3f}")
    if name in ("the right place, noisy", "noise"):  # no ties
        assert np.isclose(found[name], expected), name
    elif name != "the right place, ReLU":
        assert expected > 0.45, (name, expected)
        assert found[name] < found["the right place, noisy"], name
assert found["zeros"] == 0, found

print("distance to the reference       emd")
changed = {
    "mirrored both ways": reference[::-1, ::-1],
    "pixels shuffled": random.permutation(reference.ravel()).reshape(y.shape),
    "times 1000, plus 5": 1000 * reference + 5,
    "noise of 0.05": reference + random.normal(0, 0.05, y.shape),
    "one pixel of 3": np.where((y == 0) & (x == 0), 3, reference),
}
for name, saliency in changed.items():
    distance = emd(saliency, reference)
    print(f"{name:26} {distance:8.1f}")
    assert (distance < 1e-6) == (name in list(changed)[:3]), (name, distance)
EOF
