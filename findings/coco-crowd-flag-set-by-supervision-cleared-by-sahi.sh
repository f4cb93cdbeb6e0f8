#!/usr/bin/env bash
# COCO converters: supervision writes every object in two parts as a crowd, which evaluation
# leaves out; sahi writes every crowd as an object, which must then be found.
#
# Versions: supervision 0.31.2, sahi 0.12.8, pycocotools 2.0.11, numpy 2.4.6,
# opencv-python-headless 5.0.0.93.
# Expected: iscrowd is a label of the annotator. A converter keeps it, and writes 0 where there is
# none; whether a mask is stored as polygon or as run lengths is a matter of storage, as
# supervision's manual says.
# Behavior: supervision's as_coco picks run lengths for masks with a hole or in several parts,
# and with them iscrowd=1. Objects behind a pole or a branch then count neither as found nor
# as missed, and training code drops them: a detector that misses all of them has AP 1.
# sahi reads and writes annotations (merge, split, slice_coco) without the flag, so a crowd
# region is one large object that no detector finds. No warning in either case.
# Workaround: supervision: data={"iscrowd": zeros} in the Detections. sahi: take crowds out first.
#
# Output seen (half of the images show a plain square, half one behind a pole):
#   truth                      crowds 0 of 20, AP of plain squares only: 0.505
#   supervision.as_coco        crowds 10 of 20, AP of plain squares only: 1.000
#   the same with iscrowd=0    crowds 0 of 20, AP of plain squares only: 0.505
#   truth with 10 crowds       crowds 10 of 20, AP of all squares: 1.000
#   sahi, read and written     crowds 0 of 20, AP of all squares: 0.505
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 supervision==0.31.2 sahi==0.12.8 \
    pycocotools==2.0.11 opencv-python-headless==5.0.0.93
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import contextlib
import io
import json

import cv2
import numpy as np
import supervision as sv
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sahi.utils.coco import Coco

N = 20
plain = np.zeros((64, 64), bool)
plain[16:48, 16:48] = True
behind_pole = plain.copy()
behind_pole[:, 30:34] = False
masks = [plain if i < N // 2 else behind_pole for i in range(N)]
images = [dict(id=i + 1, file_name=f"{i}.png", height=64, width=64) for i in range(N)]
objects = [  # all masks have one box
    dict(id=i + 1, image_id=i + 1, category_id=1, bbox=[16, 16, 32, 32], area=1024, iscrowd=0)
    for i in range(N)
]
truth = dict(info={}, images=images, annotations=objects, categories=[dict(id=1, name="square")])


def report(name, data, found, what):
    """AP of exact boxes in the first `found` images."""
    results = [dict(o, score=0.9) for o in objects[:found]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(data))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    crowds = sum(a["iscrowd"] for a in data["annotations"])
    ap = evaluation.stats[0]
    print(f"{name:26} crowds {crowds} of {len(data['annotations'])}, AP of {what}: {ap:.3f}")
    return crowds, round(ap, 2)


def exported(**extra):
    """The masks through supervision's DetectionDataset."""
    box = np.array([[16, 16, 48, 48]], float)
    detections = {
        f"{i}.png": sv.Detections(
            xyxy=box, mask=mask[None], class_id=np.array([0]), data=dict(extra)
        )
        for i, mask in enumerate(masks)
    }
    for name in detections:
        cv2.imwrite(name, np.zeros((64, 64, 3), np.uint8))
    dataset = sv.DetectionDataset(["square"], images=list(detections), annotations=detections)
    dataset.as_coco(annotations_path="coco.json")
    return json.load(open("coco.json"))


half = N // 2
plain_only = "plain squares only"
assert report("truth", truth, half, plain_only) == (0, 0.5)
assert report("supervision.as_coco", exported(), half, plain_only) == (half, 1)
flagged = exported(iscrowd=np.array([0]))
assert report("the same with iscrowd=0", flagged, half, plain_only) == (0, 0.5)

for annotation in objects[half:]:
    annotation["iscrowd"] = 1
assert report("truth with 10 crowds", truth, half, "all squares") == (half, 1)
copied = Coco.from_coco_dict_or_path(truth).json
assert report("sahi, read and written", copied, half, "all squares") == (0, 0.5)
EOF
