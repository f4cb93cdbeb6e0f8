#!/usr/bin/env bash
# quantus: a random binary map always wins the pointing game; the rank accuracy of a map with equal
# values depends on where in the image the object is.
#
# Versions: quantus 0.6.0, numpy 2.4.6, scikit-learn 1.9.1, pandas 3.1.1.
# Expected: a map that knows nothing of the object scores by chance, the object's share of the
# image, binary or not, wherever the object is. Equal values share their credit or are picked at
# random.
# Behavior: the pointing game is a hit if any of the pixels that share the maximum is on the object,
# so a map cut at a threshold (such as the 60 % of attention that DINO shows) is a hit as soon as
# it touches the object, and an attention map enlarged by nearest neighbor if the largest patch
# does. Rank accuracy and top-k fill up with equal values in the order of NumPy's argsort, which
# goes by position (another order on another CPU, perhaps). Where a ReLU left fewer pixels than the
# object has, as in Grad-CAM, the rest comes from certain parts of the image: a random map finds
# objects at the upper edge five times as often as at the lower one. Maps of a single value are
# refused, so ties were thought of. No warning.
# Workaround: AUC, which counts ties as halves, or a little noise added to the map.
#
# Output seen (100 random maps, object of a tenth of the image; pointing game, rank accuracy,
# top-k intersection, AUC):
#   noise
#     anywhere   0.12  0.10  0.10  0.50
#     upper edge 0.05  0.10  0.10  0.50
#     lower edge 0.06  0.10  0.10  0.50
#   noise, a different value for each 8 x 8 patch
#     anywhere   0.15  0.09  0.09  0.50
#     upper edge 0.11  0.10  0.10  0.50
#     lower edge 0.21  0.11  0.11  0.48
#   noise > 0.5
#     anywhere   1.00  0.05  0.05  0.50
#     upper edge 1.00  0.14  0.14  0.50
#     lower edge 1.00  0.14  0.14  0.50
#   noise, the upper 2 %
#     anywhere   0.12  0.04  0.04  0.50
#     upper edge 0.05  0.25  0.25  0.50
#     lower edge 0.06  0.05  0.05  0.50
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scikit-learn==1.9.1 pandas==3.1.1 scikit-image==0.26.0 \
    opencv-python-headless==5.0.0.93 matplotlib==3.11.2 tqdm==4.70.1 cachetools==8.0.2
"$dir/venv/bin/pip" install -q --no-deps quantus==0.6.0  # it asks for OpenCV with windows
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import quantus

IMAGES, SIZE = 100, 64
random = np.random.default_rng(0)
noise = random.random((IMAGES, 1, SIZE, SIZE))
grid = np.kron(random.random((IMAGES, 1, 8, 8)), np.ones((8, 8)))
maps = {
    "noise": noise,
    "noise, a different value for each 8 x 8 patch": grid,
    "noise > 0.5": (noise > 0.5).astype(float),
    "noise, the upper 2 %": np.maximum(noise - 0.98, 0),
}
names = ("PointingGame", "RelevanceRankAccuracy", "TopKIntersection", "AUC")
metrics = {name: getattr(quantus, name)(disable_warnings=True) for name in names}
metrics["TopKIntersection"].k = 400  # as many as the object has pixels


def objects(first, last):
    """Squares of 20 x 20 pixels, a tenth of the image, the upper edge in rows first to last."""
    masks = np.zeros((IMAGES, 1, SIZE, SIZE), int)
    for mask in masks[:, 0]:
        row, column = random.integers((first, 0), (last + 1, SIZE - 19))
        mask[row : row + 20, column : column + 20] = 1
    return masks


def scores(a_batch, s_batch):
    batch = dict(x_batch=np.zeros_like(noise), y_batch=np.zeros(IMAGES, int), model=None)
    return [np.mean(metrics[name](a_batch=a_batch, s_batch=s_batch, **batch)) for name in names]


places = {"anywhere": objects(0, 44), "upper edge": objects(0, 0), "lower edge": objects(44, 44)}
found = {}
for kind, values in maps.items():
    print(kind)
    for place, masks in places.items():
        found[kind, place] = scores(values.copy(), masks)
        print(f"  {place:10}", "  ".join(f"{score:.2f}" for score in found[kind, place]))

chance = 400 / SIZE**2
for place in places:
    assert np.allclose(found["noise", place][:3], chance, atol=0.1)
    assert found["noise > 0.5", place][0] == 1
    assert all(abs(found[kind, place][3] - 0.5) < 0.05 for kind in maps)
upper, lower = (found["noise, the upper 2 %", f"{edge} edge"] for edge in ("upper", "lower"))
assert np.abs(np.subtract(upper, lower))[1:3].min() > 0.5 * chance
PY
