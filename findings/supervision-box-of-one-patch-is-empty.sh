#!/usr/bin/env bash
# supervision: the box of a one-patch mask has no area and no overlap with itself.
#
# Versions: supervision 0.31.2, pycocotools 2.0.11, scikit-image 0.26.0, numpy 2.4.6,
# opencv-python-headless 5.0.0.93.
# Expected: mask_to_xyxy returns the box of pycocotools, OpenCV and scikit-image: x2 and y2
# are one past the last pixel, so that the areas of box and mask agree.
# Behavior: x2 and y2 are the last pixel (as in torchvision's masks_to_boxes), while
# box_iou_batch and Detections.box_area use x2 - x1 as the width. At image resolution
# this costs one pixel. On a 14 x 14 patch grid, where attention masks live, a box of
# 2 x 3 patches keeps a third of its area, and an object of one patch has IoU 0 with
# itself, without a warning. Workaround: upsample the mask first, or add 1 to x2 and y2.
#
# Output seen:
#   1 x 1 patches: IoU with itself 0.00, with the true box 0.00, area 0 of 1
#   2 x 3 patches: IoU with itself 1.00, with the true box 0.33, area 2 of 6
#   32 x 48 pixels: IoU with itself 1.00, with the true box 0.95, area 1457 of 1536
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 supervision==0.31.2 pycocotools==2.0.11 \
    scikit-image==0.26.0 opencv-python-headless==5.0.0.93
"$dir/venv/bin/python" - <<'EOF'
import cv2
import numpy as np
import supervision as sv
from pycocotools import mask as coco
from skimage.measure import regionprops


def boxes_of_peers(mask):
    """(x1, y1, x2, y2) of a mask's only region by three other libraries."""
    x, y, w, h = coco.toBbox(coco.encode(np.asfortranarray(mask.astype(np.uint8))))
    yield (x, y, x + w, y + h)
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    yield (x, y, x + w, y + h)
    y1, x1, y2, x2 = regionprops(mask.astype(int))[0].bbox
    yield (x1, y1, x2, y2)


cases = [(14, 1, 1, 0, 0, 0), (14, 2, 3, 1, 0.3333, 2), (224, 32, 48, 1, 0.9486, 1457)]
for size, height, width, with_itself, with_truth, area in cases:
    mask = np.zeros((size, size), bool)
    mask[3 : 3 + height, 5 : 5 + width] = True
    truth = (5, 3, 5 + width, 3 + height)
    for box in boxes_of_peers(mask):
        assert box == truth
    boxes = sv.mask_to_xyxy(mask[None]).astype(float)
    assert boxes.tolist() == [[5, 3, 4 + width, 2 + height]]
    iou = sv.box_iou_batch(boxes, np.array([boxes[0], truth], float))[0]
    detections = sv.Detections(xyxy=boxes, mask=mask[None])
    assert np.allclose(iou, [with_itself, with_truth], atol=1e-4)
    assert detections.box_area == [area] and detections.area == [height * width]
    unit = "patches" if size == 14 else "pixels"
    print(
        f"{height} x {width} {unit}: IoU with itself {iou[0]:.2f}, with the true box "
        f"{iou[1]:.2f}, area {area} of {height * width}"
    )
EOF
