#!/usr/bin/env bash
# pylabel: GroupShuffleSplit(group_col="img_filename") splits boxes, not images; most test images
# are training images, too.
#
# Versions: pylabel 0.1.55, pandas 3.1.1, scikit-learn 1.9.1, numpy 2.4.6.
# Expected: the boxes of one image stay together. That is what scikit-learn's function of this name
# is for, and images are the default of group_col.
# Behavior: the column is passed on as the classes, which that function does not look at, and
# the numbers of the rows as the groups. Each box is a group of its own, and group_col has no
# effect, whatever it names (image, patient, camera). Of images with four objects nearly all
# test images are trained on, with labels that lack the test boxes, so that these objects are
# taught as background. The share of boxes is right, and nothing warns. A set with one box an
# image, as in a first test, is split as expected.
# Workaround: StratifiedGroupShuffleSplit of the same class, which keeps images together.
#
# Output seen (100 images):
#   four boxes, GroupShuffleSplit: test has 20% of the boxes, 59 images, 58 of them also in
#     training
#   one box, GroupShuffleSplit: test has 20% of the boxes, 20 images, 0 of them also in training
#   four boxes, StratifiedGroupShuffleSplit: test has 22% of the boxes, 22 images, 0 of them
#     also in training
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pandas==3.1.1 scikit-learn==1.9.1 pylabel==0.1.55
cd "$dir"
"$dir/venv/bin/python" -W ignore - 2>log.txt <<'EOF' || { cat log.txt; exit 1; }
import json

import numpy as np
from pylabel import importer

IMAGES, BOXES = 100, 4


def save(name, boxes):
    images = [dict(id=i, file_name=f"{i}.jpg", width=64, height=64) for i in range(IMAGES)]
    annotations = [
        dict(id=i * boxes + k, image_id=i, category_id=1, bbox=[15 * k, 10, 8, 8], area=64)
        for i in range(IMAGES)
        for k in range(boxes)
    ]
    categories = [dict(id=1, name="bird", supercategory="animal")]
    with open(name, "w") as file:
        json.dump(dict(images=images, annotations=annotations, categories=categories), file)


def split(name, function, **options):
    """The number of test images, and of those that are training images, too."""
    data = importer.ImportCoco(name)
    getattr(data.splitter, function)(train_pct=0.8, test_pct=0.2, val_pct=0, **options)
    rows = data.df
    test = set(rows.img_filename[rows.split == "test"])
    both = test & set(rows.img_filename[rows.split == "train"])
    share = (rows.split == "test").mean()
    print(f"{name}, {function}: test has {share:.0%} of the boxes, {len(test)} images,", end=" ")
    print(f"{len(both)} of them also in training")
    return len(test), len(both)


np.random.seed(0)
save("four boxes", BOXES)
save("one box", 1)
group = dict(group_col="img_filename", random_state=0)
test, both = split("four boxes", "GroupShuffleSplit", **group)
assert test > 50 and both > 0.9 * test
assert split("one box", "GroupShuffleSplit", **group) == (20, 0)
test, both = split("four boxes", "StratifiedGroupShuffleSplit", batch_size=5)
assert 15 <= test <= 25 and both == 0
EOF
