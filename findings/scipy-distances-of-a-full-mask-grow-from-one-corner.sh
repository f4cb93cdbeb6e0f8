#!/usr/bin/env bash
# SciPy: in a mask without background distance_transform_edt measures to a pixel outside, above
# the upper left corner.
#
# Versions: scipy 1.17.1, numpy 2.4.6, opencv-python-headless 5.0.0.93, edt 3.1.2.
# Expected: where there is no background, distances are infinite or 0 or go to the image's border.
# It is at least a constant, or mirrors with the mask.
# Behavior: crops inside of an object are all object. Distances are then those to the pixel
# (-1, 0), which does not exist: 1 in one corner, 89.8 in the opposite one of 64 x 64, a smooth
# and plausible map that does not mirror with the image. Border weights, signed distances of
# a boundary loss or a Hausdorff loss so pull at one corner, for these crops only. Indices of
# the nearest background pixel are (-1, 0), which NumPy reads as the last row. The manual does
# not mention it. The sister functions give -1 (cdt) and 1e154 (bf), OpenCV 3e38, edt inf, so
# all of them are easily found. MONAI's distance_transform_edt is SciPy's on a CPU.
# Workaround: test mask.all() first, or np.pad(mask, 1) if the image's border counts as background.
#
# Output seen (the four corners of a crop of a disk):
#   inside, distances of the whole image: [55.0, 55.6, 55.6, 56.4]
#   inside: [1.0, 63.0, 64.0, 89.8], turned and turned back: [89.8, 64.0, 63.0, 1.0]
#   upper edge: [0.0, 0.0, 46.0, 47.0], turned and turned back: [0.0, 0.0, 46.0, 47.0]
#   distance_transform_cdt: -1 to -1
#   distance_transform_bf: 1.34e+154 to 1.34e+154
#   OpenCV: 3.4e+38 to 3.4e+38
#   edt: inf to inf
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 edt==3.1.2 \
    opencv-python-headless==5.0.0.93
"$dir/venv/bin/python" - <<'EOF'
import cv2
import edt
import numpy as np
from scipy import ndimage

rows, columns = np.mgrid[:224, :224]
image = (rows - 112) ** 2 + (columns - 112) ** 2 < 100**2
crops = {"inside": image[80:144, 80:144], "upper edge": image[:64, 80:144]}
assert crops["inside"].all() and not crops["upper edge"].all()


def corners(distances):
    return [round(float(value), 1) for value in distances[[0, 0, -1, -1], [0, -1, 0, -1]]]


truth = ndimage.distance_transform_edt(image)[80:144, 80:144]
print("inside, distances of the whole image:", corners(truth))
for name, crop in crops.items():
    found = ndimage.distance_transform_edt(crop)
    turned = ndimage.distance_transform_edt(crop[::-1, ::-1])[::-1, ::-1]
    print(f"{name}: {corners(found)}, turned and turned back: {corners(turned)}")
    assert np.allclose(found, turned) == (name == "upper edge")

full = crops["inside"]
found, nearest = ndimage.distance_transform_edt(full, return_indices=True)
i, j = np.indices(full.shape)
assert np.allclose(found, np.hypot(i + 1, j))
assert (nearest[0] == -1).all() and (nearest[1] == 0).all()

full = full.astype(np.uint8)
others = {
    "distance_transform_cdt": ndimage.distance_transform_cdt(full),
    "distance_transform_bf": ndimage.distance_transform_bf(full),
    "OpenCV": cv2.distanceTransform(full, cv2.DIST_L2, 5),
    "edt": edt.edt(full),
}
for name, distances in others.items():
    print(f"{name}: {distances.min():.3g} to {distances.max():.3g}")
    assert (distances == distances[0, 0]).all() and not 0 <= distances[0, 0] < 1e30
EOF
