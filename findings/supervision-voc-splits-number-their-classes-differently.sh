#!/usr/bin/env bash
# supervision: two splits of one Pascal VOC data set get different class numbers; written as YOLO
# labels, the validation objects have wrong names.
#
# Versions: supervision 0.31.2, numpy 2.4.6, opencv-python-headless 5.0.0.93.
# Expected: names become numbers by sorted(), so splits that show the same classes number them
# alike, as the folders of ImageFolder do, and as from_labelme and from_createml of this package.
# Behavior: from_pascal_voc numbers classes as they appear, image after image, so the first
# pictures of each split decide. train.as_yolo and val.as_yolo then write numbers of two
# meanings, for which there is one data.yaml: a detector is selected and judged by validation
# objects with permuted names. The same happens without files, if a model trained on the
# numbers of train is scored against the Detections of val. Each split by itself is right, and
# so are sets with one class. No warning.
# Workaround: DetectionDataset.merge([train, val]), which numbers by sorted names.
#
# Output seen:
#   train: ['dog', 'cat', 'bird', 'cow']
#   val:   ['cow', 'bird', 'cat', 'dog']
#   train as YOLO: 5 of 5 names right: ['dog', 'cat', 'bird', 'dog', 'cow']
#   val as YOLO: 0 of 4 names right: ['dog', 'cat', 'bird', 'cow']
#   merged: ['bird', 'cat', 'cow', 'dog']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 supervision==0.31.2 opencv-python-headless==5.0.0.93
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
from pathlib import Path

import cv2
import numpy as np
import supervision as sv

SPLITS = {"train": ["dog", "cat", "bird", "dog", "cow"], "val": ["cow", "bird", "cat", "dog"]}


def write(split, names):
    """One image an object, in VOC's format."""
    for folder in ("images", "voc"):
        Path(split, folder).mkdir(parents=True)
    for i, name in enumerate(names):
        cv2.imwrite(f"{split}/images/{i}.png", np.zeros((64, 64, 3), np.uint8))
        Path(f"{split}/voc/{i}.xml").write_text(
            f"<annotation><object><name>{name}</name><bndbox><xmin>9</xmin><ymin>9</ymin>"
            "<xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )
    return sv.DetectionDataset.from_pascal_voc(f"{split}/images", f"{split}/voc")


def names_of(dataset):
    paths = sorted(dataset.image_paths)
    return [dataset.classes[int(dataset.annotations[path].class_id[0])] for path in paths]


train, val = (write(split, names) for split, names in SPLITS.items())
print("train:", train.classes)
print("val:  ", val.classes)
train.as_yolo(annotations_directory_path="train/yolo", data_yaml_path="data.yaml")
val.as_yolo(annotations_directory_path="val/yolo")
for split, names in SPLITS.items():
    read = sv.DetectionDataset.from_yolo(f"{split}/images", f"{split}/yolo", "data.yaml")
    right = sum(a == b for a, b in zip(names_of(read), names))
    print(f"{split} as YOLO: {right} of {len(names)} names right: {names_of(read)}")
    assert right == (len(names) if split == "train" else 0)
merged = sv.DetectionDataset.merge([train, val])
print("merged:", merged.classes)
assert sorted(merged.classes) == sorted(train.classes) == sorted(val.classes)
assert names_of(merged) == SPLITS["train"] + SPLITS["val"]
EOF
