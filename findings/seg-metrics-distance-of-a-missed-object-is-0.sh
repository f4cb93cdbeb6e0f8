#!/usr/bin/env bash
# seg-metrics: where the model finds nothing, or finds something where nothing is, all surface
# distances are 0, the best value there is; a model gets better by giving up on hard images.
#
# Versions: seg-metrics 1.2.8, SimpleITK 2.5.7, scikit-image 0.26.0, numpy 2.4.6.
# Expected: the Hausdorff distance to an empty mask is infinite, as in scikit-image, or an error, as
# in SimpleITK, with which seg-metrics computes; or the image is reported and left out.
# Behavior: for an empty mask the map of distances is replaced by zeros (lest SimpleITK raise an
# error, as a comment says), and each border point of the other mask reads its 0 there. So hd, hd95,
# msd, mdsd, and stdsd of a missed object are those of a perfect one, and so are those of a false
# alarm. The mean over a data set then rewards each object that is missed: a model whose worst
# quarter of predictions is erased has a third of the hd95. If only distances are asked for, nothing
# is logged; with Dice there is a note on precision and recall, none on distances. For a prediction
# of the whole image the distance is 1.8e19, so one such image ruins the mean. Readme and appendix
# define the distances for two borders and say nothing of empty masks.
# Workaround: set distances to nan where either mask is empty, and report how many these are.
#
# Output seen (40 images with one disk each):
#   mean of               Dice      hd   hd95    msd   mdsd  stdsd  empty
#   all predictions       0.71    7.19   6.85   3.99   4.30   2.19      0
#   worst ones left out   0.64    2.74   2.54   1.44   1.54   0.82     10
#   none at all           0.00    0.00   0.00   0.00   0.00   0.00     40
#   no object, one found: 0.0 0.0 0.0 0.0 0.0 scikit-image: inf; SimpleITK: an error
#   the whole image found: hd 1.8e+19, scikit-image: 68.6
# and, if Dice is asked for as well, one log line, on precision and recall
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 SimpleITK==2.5.7 scikit-image==0.26.0 \
    seg-metrics==1.2.8
"$dir/venv/bin/python" - <<'PY'
import logging

import numpy as np
import SimpleITK as sitk
from seg_metrics.seg_metrics import write_metrics
from skimage.metrics import hausdorff_distance

random = np.random.default_rng(0)
DISTANCES = ["hd", "hd95", "msd", "mdsd", "stdsd"]
rows, columns = np.mgrid[:96, :96]
logged = []
logging.getLogger().addHandler(logging.Handler())
logging.getLogger().handlers[0].emit = lambda record: logged.append(record.getMessage())


def disk(center, radius):
    distance = np.hypot(rows - center[0], columns - center[1])
    return (distance <= radius).astype(np.uint8)


def measure(truth, prediction, names=DISTANCES):
    result = write_metrics([1], gdth_img=truth, pred_img=prediction, metrics=list(names))
    result = result[0] if isinstance(result, list) else result
    return [float(result[name][0]) for name in names]


truths, exact, careful = [], [], []
for _ in range(40):
    center, radius = random.uniform(30, 66, 2), random.uniform(8, 20)
    error = random.exponential(6)
    angle = random.uniform(0, 2 * np.pi)
    shifted = center + error * np.array([np.sin(angle), np.cos(angle)])
    truths.append(disk(center, radius))
    exact.append(disk(shifted, radius))
    # The same model, which leaves out what it is not sure of.
    careful.append(exact[-1] if error < 8 else np.zeros_like(exact[-1]))
nothing = [np.zeros_like(truth) for truth in truths]

print("mean of               Dice " + "".join(f"{name:>7}" for name in DISTANCES) + "  empty")
means = {}
models = {"all predictions": exact, "worst ones left out": careful, "none at all": nothing}
for name, masks in models.items():
    dice = np.mean([measure(*pair, ["dice"]) for pair in zip(truths, masks)])
    logged.clear()
    means[name] = np.mean([measure(*pair) for pair in zip(truths, masks)], axis=0)
    empty = sum(not mask.any() for mask in masks)
    print(f"{name:20} {dice:5.2f} " + "".join(f"{mean:7.2f}" for mean in means[name]), f"{empty:6}")
    assert not logged, logged
assert np.all(means["worst ones left out"] < 0.7 * means["all predictions"])
assert np.all(means["none at all"] == 0)

truth, empty = truths[0], nothing[0]
print("no object, one found:", *measure(empty, truth), "scikit-image:", end=" ")
print(hausdorff_distance(empty > 0, truth > 0), end="; SimpleITK: ")
assert measure(empty, truth) == [0] * 5
try:
    images = map(sitk.GetImageFromArray, (empty, truth))
    sitk.HausdorffDistanceImageFilter().Execute(*images)
    raise SystemExit("SimpleITK accepts empty masks")
except RuntimeError:
    print("an error")
whole = measure(truth, np.ones_like(truth))
print(f"the whole image found: hd {whole[0]:.2g}, scikit-image:", end=" ")
print(f"{hausdorff_distance(truth > 0, np.ones_like(truth) > 0):.1f}")
assert whole[0] > 1e19

# What is said if Dice is asked for as well:
measure(truth, empty, ["dice", "hd95"])
print(*logged, sep="\n")
assert logged and not any("distance" in line.lower() for line in logged)
PY
