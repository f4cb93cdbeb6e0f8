#!/usr/bin/env bash
# miseval: the Hausdorff distance of a mask that is moved up or down is 0; the average Hausdorff
# distance is the maximum, and the boundary distance of a mask to itself is not 0.
#
# Versions: miseval 1.3.0, hausdorff 0.2.6, scikit-image 0.26.0, scipy 1.17.1, numpy 2.4.6.
# Expected: "HD" is the largest distance, in pixels, from a point of one mask to the other mask, of
# the class asked for; "AHD" averages these distances; each is 0 for equal masks only.
# Behavior: HD hands the label map itself to a function that wants a list of points, one a row. So
# each row of the image is a point in as many dimensions as the image has columns. The same rows
# in another order are the same set: 0, however far up or down the object is. Sideways it is the
# root of the number of pixels that differ in a row: 4 for a move by 40 pixels, and for a mask never
# more than the root of the width, so that a mean HD looks fine for any model. The class is left
# out: in a map of several classes all get one value, which depends on their numbers. AHD, which the
# package's own guideline recommends, is the maximum over the border, that is, HD. BD, a mean over
# all pairs of border points, grows with the object. No warning. (Maps in 3-d raise an error in HD.)
# Workaround: skimage.metrics.hausdorff_distance(mask, mask, method="standard" or "modified").
#
# Output seen (a square of 16 x 16 in 64 x 64; "modified" is the mean distance, of the worse side):
#                      miseval: HD    AHD     BD  scikit-image: HD  modified
#   the same                  0.00   0.00  11.79              0.00      0.00
#   1 down                    0.00   1.00  11.84              1.00      0.06
#   40 down                   0.00  40.00  38.44             40.00     32.50
#   40 right                  4.00  40.00  38.45             40.00     32.50
#   40 down and right         4.00  56.57  51.55             56.57     46.19
#   a corner of 4 x 4         3.46  16.97  11.55             16.97      7.97
#   empty                     4.00  33.24    nan               inf       inf
#   three classes: Dice 1.0 0.0 0.38 HD 11.14 11.14 11.14 right 0.0 30.0 10.0
#   class 1 taken for 2 and for 3: HD 4.00 8.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
# (Later releases of dictances ask for support_developer, which pip did not find.)
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 scikit-image==0.26.0 miseval==1.3.0 \
    hausdorff==0.2.6 dictances==1.5.3
"$dir/venv/bin/python" - <<'PY'
import numpy as np
from miseval import evaluate
from skimage.metrics import hausdorff_distance


def square(top, left, side=16, label=1):
    image = np.zeros((64, 64), int)
    image[top : top + side, left : left + side] = label
    return image


TRUTH = square(8, 8)
PREDICTIONS = {
    "the same": TRUTH,
    "1 down": square(9, 8),
    "40 down": square(48, 8),
    "40 right": square(8, 48),
    "40 down and right": square(48, 48),
    "a corner of 4 x 4": square(8, 8, side=4),
    "empty": np.zeros_like(TRUTH),
}

found = {}
print(f"{'':19}miseval: HD    AHD     BD  scikit-image: HD  modified")
for name, prediction in PREDICTIONS.items():
    if prediction.any():
        boundary = evaluate(TRUTH, prediction, metric="BD")
    else:
        boundary = np.nan  # (as miseval says, with a message)
    values = (
        evaluate(TRUTH, prediction, metric="HD"),
        evaluate(TRUTH, prediction, metric="AHD"),
        boundary,
        hausdorff_distance(TRUTH > 0, prediction > 0),
        hausdorff_distance(TRUTH > 0, prediction > 0, method="modified"),
    )
    print("{:19}{:11.2f} {:6.2f} {:6.2f} {:17.2f} {:9.2f}".format(name, *values))
    found[name] = values

for name, distance in (("1 down", 1), ("40 down", 40)):
    assert found[name][0] == 0 and found[name][3] == distance, name
assert found["40 right"][0] == found["40 down and right"][0] == found["empty"][0] == 4
for name in list(PREDICTIONS)[:-1]:
    # (The average is the maximum. The true average of moved squares is far below.)
    assert np.isclose(found[name][1], found[name][3]), name
assert found["40 down"][4] < 33 and found["a corner of 4 x 4"][4] < 9
assert found["the same"][2] > 11

# Three classes: the first is exact, the others have been moved sideways.
truth = square(4, 4) + square(24, 4, label=2) + square(44, 4, label=3)
prediction = square(4, 4) + square(24, 34, label=2) + square(44, 14, label=3)
options = {"multi_class": True, "n_classes": 4}
distances = evaluate(truth, prediction, metric="HD", **options)[1:]
dice = evaluate(truth, prediction, metric="DSC", **options)[1:]
right = [hausdorff_distance(truth == label, prediction == label) for label in (1, 2, 3)]
print("three classes: Dice", *np.round(dice, 2), "HD", *np.round(distances, 2), "right", *right)
assert np.ptp(distances) == 0 and right == [0, 30, 10], (distances, right)

# A row of 16 pixels of class 1 here, of class 3 there: 4 times the difference of the numbers.
print("class 1 taken for 2 and for 3: HD", end="")
for label, expected in ((2, 4), (3, 8)):
    distance = evaluate(TRUTH, label * TRUTH, metric="HD")
    print(f" {distance:.2f}", end="")
    assert distance == expected
print()
PY
