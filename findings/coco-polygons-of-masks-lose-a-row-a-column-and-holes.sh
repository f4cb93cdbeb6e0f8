#!/usr/bin/env bash
# Label Studio, sahi: masks written as COCO polygons come back without one row, one column and
# their holes; a thin object then counts as missed, however exact its prediction.
#
# Versions: label-studio-sdk 2.1.2, sahi 0.12.8, pycocotools 2.0.11, opencv-python(-headless)
# 4.12.0.88, numpy 2.2.6.
# Expected: the outline of a mask, stored as the polygon that COCO asks for, is read back by COCO's
# own tools as that mask, but for a few pixels of its edge.
# Behavior: both take the outline from cv2.findContours, whose corners are the centers of the
# outermost pixels. COCO has corners on the edges between pixels. So each object shrinks by a row
# and a column: a patch of 16 x 16 keeps 15 x 15, of a line two pixels wide one is left. Outlines
# of holes are left out (Label Studio) or stored as further polygons (sahi), which COCO adds: all
# holes are filled. Label Studio also makes one object of each part of a brush label. sahi's own
# reader returns these masks unchanged. A model that finds every pixel is marked down.
# Workaround: the run-length code of pycocotools.mask.encode, which COCO takes as well.
#
# Output seen (pixels as read by pycocotools, IoU with the mask, number of objects):
#                  16 x 16         ring   line of 2    two parts
#   run_lengths     256 1.00 1   1280 1.00 1     90 1.00 1    128 1.00 1
#   label_studio    225 0.88 1   2209 0.51 1     44 0.49 1     98 0.77 2
#   sahi            225 0.88 1   2209 0.51 1     44 0.49 1     98 0.77 1
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.2.6 label-studio-sdk==2.1.2 sahi==0.12.8 \
    pycocotools==2.0.11 opencv-python==4.12.0.88
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import json

import numpy as np
from label_studio_sdk.converter.brush import mask2rle
from label_studio_sdk.converter.exports.brush_to_coco import convert_to_coco
from pycocotools import mask as coco
from sahi.annotation import ObjectAnnotation

masks = np.zeros((4, 64, 64), bool)
masks[0, 16:32, 16:32] = True  # 16 x 16
masks[1, 8:56, 8:56] = True  # a ring
masks[1, 16:48, 16:48] = False
masks[2, 10:12, 5:50] = True  # a line of two pixels
masks[3, 4:12, 4:12] = masks[3, 40:48, 40:48] = True  # two parts


def run_lengths(mask):
    return [coco.encode(np.asfortranarray(mask.astype(np.uint8)))]


def label_studio(mask):
    """What the export of a task with one brush label holds."""
    brush = dict(type="brushlabels", brushlabels=["object"], original_width=64,
                 original_height=64, rle=mask2rle(mask.astype(np.uint8) * 255))
    task = dict(id=1, input={"image": "a.png"}, output={"tag": [brush]}, completed_by=1)
    with open(convert_to_coco([task], "out")) as file:
        return [annotation["segmentation"] for annotation in json.load(file)["annotations"]]


def sahi(mask):
    annotation = ObjectAnnotation.from_bool_mask(mask, category_id=1, full_shape=[64, 64])
    return [annotation.to_coco_annotation().json["segmentation"]]


print(" " * 13, " 16 x 16         ring   line of 2    two parts")
for exporter in (run_lengths, label_studio, sahi):
    pixels, ious, numbers = [], [], []
    for mask in masks:
        objects = exporter(mask)
        codes = objects if exporter is run_lengths else [
            coco.merge(coco.frPyObjects(polygons, 64, 64)) for polygons in objects]
        read = coco.merge(codes)
        pixels.append(int(coco.area(read)))
        ious.append(coco.iou([read], run_lengths(mask), [0]).item())
        numbers.append(len(objects))
    cells = (f"{p:6} {iou:.2f} {n}" for p, iou, n in zip(pixels, ious, numbers))
    print(f"{exporter.__name__:12}", *cells)
    if exporter is run_lengths:
        assert min(ious) == 1 and numbers == [1] * 4
    else:
        assert pixels == [15 * 15, 47 * 47, 44, 2 * 7 * 7] and ious[2] < 0.5, pixels
        assert numbers == [1, 1, 1, 2 if exporter is label_studio else 1], numbers
EOF
