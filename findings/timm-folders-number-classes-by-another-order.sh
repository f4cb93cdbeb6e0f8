#!/usr/bin/env bash
# timm: the folder reader numbers the classes in another order than torchvision and Hugging
# Face, and leaves out images they read.
#
# Versions: timm 1.0.31, torch 2.14.1, torchvision 0.29.1, datasets 5.2.0, Pillow 13.0.0,
# numpy 2.4.6.
# Expected: CLASS/ folders are numbered by sorted(), so labels, predictions and the head of a
# checkpoint mean the same in every package; a folder's images are those Pillow reads.
# Behavior: timm sorts naturally: 2 before 10, b before C. Labels agree for WordNet ids, all of
# one length, but not for classes named by numbers, by class_1 .. class_10 or with a
# capital. A head trained with one package is evaluated with permuted labels in the other.
# And only .png, .jpg and .jpeg count: .webp, .bmp and .tif are left out silently,
# where torchvision and datasets read them.
# Workaround: class_map=FILE; timm.data.set_img_extensions for further suffixes.
#
# Output seen (classes in the order of their numbers; images found of six suffixes):
#   torchvision  1 10 2 Cat ant bee           6
#   datasets     1 10 2 Cat ant bee           6
#   timm         1 2 10 ant bee Cat           3
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 timm==1.0.31 \
    datasets==5.2.0 pillow==13.0.0
cd "$dir"
HF_HOME="$dir/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
    "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
from pathlib import Path

from datasets import load_dataset
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

NAMES = ["1", "2", "10", "ant", "bee", "Cat"]
SUFFIXES = ["png", "jpg", "jpeg", "webp", "bmp", "tif"]
for i, name in enumerate(NAMES):
    Path("classes", name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(f"classes/{name}/0.png")
Path("suffixes/a").mkdir(parents=True)
for i, suffix in enumerate(SUFFIXES):
    Image.new("RGB", (8, 8)).save(f"suffixes/a/{i}.{suffix}")


def by_number(numbers):
    return sorted(numbers, key=numbers.get)


def hugging_face(folder):
    return load_dataset("imagefolder", data_dir=folder)["train"]


found = {
    "torchvision": (ImageFolder("classes").classes, len(ImageFolder("suffixes"))),
    "datasets": (
        hugging_face("classes").features["label"].names,
        len(hugging_face("suffixes")),
    ),
    "timm": (
        by_number(create_dataset("", root="classes").reader.class_to_idx),
        len(create_dataset("", root="suffixes")),
    ),
}
for package, (names, images) in found.items():
    print(f"{package:12} {' '.join(names):28} {images}")
    assert names == (NAMES if package == "timm" else sorted(NAMES))
    assert images == (3 if package == "timm" else 6)
EOF
