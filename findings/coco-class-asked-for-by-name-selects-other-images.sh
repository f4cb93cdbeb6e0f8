#!/usr/bin/env bash
# COCO API: getCatIds(catNms="hot dog") also finds "dog" in pycocotools, and nothing in
# faster-coco-eval; nothing found then selects all images.
#
# Versions: pycocotools 2.0.11, faster-coco-eval 1.8.0, numpy 2.4.6.
# Expected: a single name means what a list of that name means, as a single id does, and a class
# that is not there has no images. The second package is a drop-in replacement of the first.
# Behavior: a string has a length and can be iterated, so it is taken for a list. pycocotools then
# asks `name in "hot dog"`, which holds for each part of the string: "dog", in COCO also "car" for
# "carrot" and "bear" for "teddy bear". getImgIds wants all the ids it gets in one image, so what
# is left of the hot dogs are those beside a dog, while getAnnIds takes the boxes of either class.
# faster-coco-eval compares with the letters of the string and finds no class at all. An empty
# list, finally, is no filter in both: the "images of hot dogs" are all images, and so for a
# misspelled name or a class this split lacks. The first is known (cocoapi issue 291, 2019).
# Workaround: getCatIds(catNms=["hot dog"]), and assert that it found one id.
#
# Output seen (images with a dog, a hot dog, both, a cat, a person: 4, 4, 2, 5, 5):
#   pycocotools       "hot dog"    ids [2, 3]  images  2, with a hot dog  2  boxes 12
#   pycocotools       ["hot dog"]  ids [3]     images  6, with a hot dog  6  boxes  6
#   pycocotools       ["hotdog"]   ids []      images 20, with a hot dog  6  boxes 22
#   faster_coco_eval  "hot dog"    ids []      images 20, with a hot dog  6  boxes 22
#   faster_coco_eval  ["hot dog"]  ids [3]     images  6, with a hot dog  6  boxes  6
#   faster_coco_eval  ["hotdog"]   ids []      images 20, with a hot dog  6  boxes 22
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pycocotools==2.0.11 faster-coco-eval==1.8.0
"$dir/venv/bin/python" - <<'PY'
import contextlib
import io

import faster_coco_eval
import pycocotools.coco

NAMES = ["person", "dog", "hot dog", "cat"]  # ids from 1 on
shown = [["dog"]] * 4 + [["hot dog"]] * 4 + [["dog", "hot dog"]] * 2 + [["cat"]] * 5
shown += [["person"]] * 5
boxes = [(image, NAMES.index(name) + 1) for image, names in enumerate(shown) for name in names]
data = dict(
    images=[dict(id=i, width=9, height=9, file_name=f"{i}.jpg") for i in range(len(shown))],
    categories=[dict(id=i, name=name) for i, name in enumerate(NAMES, 1)],
    annotations=[
        dict(id=i, image_id=image, category_id=c, bbox=[0, 0, 3, 3], area=9, iscrowd=0)
        for i, (image, c) in enumerate(boxes, 1)
    ],
)


def ask(api, name):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = api()
        coco.dataset = data
        coco.createIndex()
    ids = coco.getCatIds(catNms=name)
    images, count = coco.getImgIds(catIds=ids), len(coco.getAnnIds(catIds=ids))
    with_hot_dog = sum("hot dog" in shown[image] for image in images)
    package, name = api.__module__.split(".")[0], str(name).replace("'", '"')
    name = name if name[0] == "[" else f'"{name}"'
    print(
        f"{package:17} {name:12} ids {str(ids):7} images {len(images):2},"
        f" with a hot dog {with_hot_dog:2}  boxes {count:2}"
    )
    return ids, len(images), with_hot_dog, count


everything = [], len(shown), 6, len(boxes)
for api, as_string in (
    (pycocotools.coco.COCO, ([2, 3], 2, 2, 12)),
    (faster_coco_eval.COCO, everything),
):
    assert ask(api, "hot dog") == as_string
    assert ask(api, ["hot dog"]) == ([3], 6, 6, 6)
    assert ask(api, ["hotdog"]) == everything
PY
