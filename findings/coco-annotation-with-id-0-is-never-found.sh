#!/usr/bin/env bash
# COCO evaluation: the annotation with id 0 counts as missed, however good the detection.
#
# Versions: pycocotools 2.0.11, faster-coco-eval 1.8.0, numpy 2.4.6.
# Expected: ids are arbitrary keys. Two images with one box each, both detected exactly,
# score AP 1.
# Behavior: they do with ids 1 and 2. With ids 0 and 1, as enumerate() numbers them, AP
# is 0.252 and recall 0.5: a match is stored as the annotation's id, and 0 also means "no
# match", so annotation 0 counts as missed and its detection as a false positive.
# pycocotools is silent; faster-coco-eval gives the same numbers with a UserWarning. In a
# large set one lost box goes unnoticed; in a small single-object set it does not.
#
# Output seen:
#   pycocotools      ids from 1: AP 1.000 AR 1.000; from 0: AP 0.252 AR 0.500, warnings 0
#   faster_coco_eval ids from 1: AP 1.000 AR 1.000; from 0: AP 0.252 AR 0.500, warnings 1
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pycocotools==2.0.11 faster-coco-eval==1.8.0
"$dir/venv/bin/python" - <<'EOF'
import contextlib
import io
import warnings

import faster_coco_eval
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

BOX = [8, 8, 20, 20]


def evaluate(coco, evaluator, first_id):
    """AP and AR (100 detections) of two images whose only boxes are detected exactly."""
    truth, scores = coco(), [0.9, 0.8]
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "width": 64, "height": 64} for i in (1, 2)],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            dict(id=first_id + i, image_id=i + 1, category_id=1, bbox=BOX, area=400, iscrowd=0)
            for i in range(2)
        ],
    }
    truth.createIndex()
    found = [
        dict(image_id=i + 1, category_id=1, bbox=list(BOX), score=scores[i]) for i in range(2)
    ]
    run = evaluator(truth, truth.loadRes(found), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return np.array([run.stats[0], run.stats[8]])


peers = {
    "pycocotools": (COCO, COCOeval),
    "faster_coco_eval": (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
}
expected_warnings = {"pycocotools": 0, "faster_coco_eval": 1}
for name, peer in peers.items():
    with contextlib.redirect_stdout(io.StringIO()):
        good = evaluate(*peer, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bad = evaluate(*peer, 0)
    warned = sum("annotation id 0" in str(w.message) for w in caught)
    line = "{:16} ids from 1: AP {:.3f} AR {:.3f}; from 0: AP {:.3f} AR {:.3f}, warnings {}"
    print(line.format(name, *good, *bad, warned))
    assert np.allclose(good, 1)
    assert np.allclose(bad, [0.2525, 0.5], atol=1e-3)
    assert warned == expected_warnings[name]
EOF
