#!/usr/bin/env bash
# COCO masks: the run-length code of a mask with more than one value is not its foreground.
#
# Versions: pycocotools 2.0.11, faster-coco-eval 1.8.0, numpy 2.4.6.
# Expected: encode takes nonzero as foreground, or refuses anything but 0 and 1. It takes a
# mask of 0 and 255 and a bool mask, as expected.
# Behavior: a run ends where the value changes, and runs are read in turn as background and
# foreground. Of a label mask (object 1 beside object 2) or a soft attention map in 8 bits
# every second run of a column is lost, and where their number is odd object and background
# change places below. No error: the decoded mask has stripes, area and IoU are wrong. A
# border of another value around each object, as in Pascal VOC's masks, is enough: the
# object is lost, its border is kept. Workaround: encode(mask > threshold).
#
# Output seen (IoU with what is not 0, both packages alike):
#   0 and 255                              1.00
#   bool                                   1.00
#   two objects, 1 above 2                 0.43
#   object 1 in a border of 255            0.56
#   soft map, 8 bits                       0.51
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pycocotools==2.0.11 faster-coco-eval==1.8.0
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from faster_coco_eval.core import mask as faster
from pycocotools import mask as coco

plain = np.zeros((16, 16), np.uint8)
plain[2:14, 2:14] = 1
bordered = plain * 255
bordered[4:12, 4:12] = 1
two = plain.copy()
two[8:14, 2:14] = 2
axis = np.arange(16) - 7.5
soft = (255 * np.exp(-(axis[:, None] ** 2 + axis**2) / 20)).astype(np.uint8)
masks = {
    "0 and 255": 255 * plain,
    "bool": plain > 0,
    "two objects, 1 above 2": two,
    "object 1 in a border of 255": bordered,
    "soft map, 8 bits": soft,
}
for name, mask in masks.items():
    values = []
    for package in (coco, faster):
        decoded = package.decode(package.encode(np.asfortranarray(mask))) > 0
        values.append((decoded & (mask > 0)).sum() / (decoded | (mask > 0)).sum())
    print(f"{name:38} {values[0]:.2f}")
    assert values[0] == values[1], values
    assert (values[0] == 1) == (name in ("0 and 255", "bool")), name
EOF
