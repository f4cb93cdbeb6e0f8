#!/usr/bin/env bash
# SimpleITK, mahotas: morphology of masks in 8 bits. One leaves a 0/255 mask as it is or erases
# it, the other erases a 0/1 mask and turns labels into other classes.
#
# Versions: SimpleITK 2.5.7, mahotas 1.4.19, scipy 1.17.1, numpy 2.4.6.
# Expected: in an 8-bit mask all that is not 0 is the object, as in SciPy, and in the label filters
# of both libraries; grey dilation and erosion are maximum and minimum over the neighborhood.
# Behavior: SimpleITK's binary filters take the value 1 alone for the object. A 0/255 mask passes
# dilation, erosion, opening, closing and hole filling unchanged, loses everything in BinaryMedian
# and has no objects in BinaryImageToLabelMap, while ConnectedComponent and BinaryThinning go by
# "not 0". mahotas has binary morphology for bool arrays only. For others it adds the structuring
# element, whose default is 1, not 0: dilation raises each value by 1, erosion lowers it by 1. A
# 0/1 mask in 8 bits does not survive erosion or opening, a dilated label map holds class k + 1
# for k, and in signed integers the background is 1 after dilation, -1 after erosion.
# Workaround: mask != 0 (mahotas: as bool, SimpleITK: as 0/1), or foregroundValue=255; for labels
# scipy.ndimage.grey_dilation.
#
# Output seen:
#   object of 81 pixels     dilation erosion opening closing
#     scipy, 0/1                 122       44       76       82
#     scipy, 0/255               122       44       76       82
#     SimpleITK, 0/1             122       44       76       82
#     SimpleITK, 0/255            81       81       81       81
#     mahotas, bool              122       44       76       82
#     mahotas, 0/1               122        0        0       82
#     mahotas, 0/1 in int64      256      212      256       82
#   SimpleITK, 0/255: objects 2 and 0, holes filled 81, median 0
#   mahotas, labels 0, 5, 9 dilated: 0 6 10
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 mahotas==1.4.19 simpleitk==2.5.7
"$dir/venv/bin/python" - <<'EOF'
import mahotas
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

mask = np.zeros((16, 16), np.uint8)
mask[3:12, 3:12] = 1
mask[6, 6] = 0  # a hole
mask[14, 14] = 1  # a speck
STEPS = ("dilation", "erosion", "opening", "closing")
ITK = ("BinaryDilate", "BinaryErode", "BinaryMorphologicalOpening", "BinaryMorphologicalClosing")


def scipy(mask):
    return [getattr(ndimage, f"binary_{step}")(mask) for step in STEPS]


def simpleitk(mask):
    image = sitk.GetImageFromArray(mask)
    results = (getattr(sitk, name)(image, [1, 1], sitk.sitkCross) for name in ITK)
    return [sitk.GetArrayFromImage(result) for result in results]


def mahotas_(mask):
    steps = (mahotas.dilate, mahotas.erode, mahotas.open, mahotas.close)
    return [step(mask) for step in steps]


print(f"object of {int(mask.sum())} pixels    ", *STEPS)
counts = {}
for name, steps, image in (
    ("scipy, 0/1", scipy, mask), ("scipy, 0/255", scipy, mask * 255),
    ("SimpleITK, 0/1", simpleitk, mask), ("SimpleITK, 0/255", simpleitk, mask * 255),
    ("mahotas, bool", mahotas_, mask > 0), ("mahotas, 0/1", mahotas_, mask),
    ("mahotas, 0/1 in int64", mahotas_, mask.astype(np.int64)),
):
    counts[name] = [int(np.count_nonzero(result)) for result in steps(image)]
    print(f"  {name:21}", *(f"{count:8}" for count in counts[name]))
right = counts["scipy, 0/1"]
for name in ("scipy, 0/255", "SimpleITK, 0/1", "mahotas, bool"):
    assert counts[name] == right, name
assert counts["SimpleITK, 0/255"] == [81] * 4 and counts["mahotas, 0/1"][1:3] == [0, 0]
assert counts["mahotas, 0/1 in int64"][0] == mask.size

image = sitk.GetImageFromArray(mask * 255)
found = [int(sitk.GetArrayFromImage(result).max()) for result in (
    sitk.ConnectedComponent(image), sitk.LabelMapToLabel(sitk.BinaryImageToLabelMap(image)))]
pixels = [int(np.count_nonzero(sitk.GetArrayFromImage(result))) for result in (
    sitk.BinaryFillhole(image), sitk.BinaryMedian(image))]
print("SimpleITK, 0/255: objects {} and {}, holes filled {}, median {}".format(*found, *pixels))
assert found == [2, 0] and pixels == [81, 0]

labels = np.repeat(np.array([0, 5, 9], np.uint8), 6)[None].repeat(6, 0)
dilated = {int(label) for label in np.unique(mahotas.dilate(labels))}
print("mahotas, labels 0, 5, 9 dilated:", *sorted(dilated))
assert dilated == {0, 6, 10} and set(np.unique(ndimage.grey_dilation(labels, 3))) == {0, 5, 9}
EOF
