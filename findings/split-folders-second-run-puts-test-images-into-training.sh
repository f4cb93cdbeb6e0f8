#!/usr/bin/env bash
# split-folders: a second run is laid over the first. With one image more a class, or another seed,
# many test images are training images, too.
#
# Versions: split-folders 0.6.1, Pillow 13.0.0, numpy 2.4.6.
# Expected: a run makes the split of what is in the input folder now: it empties the output
# folder, or refuses one that is not empty. As seed and ratio are fixed, a new image moves few of
# the others.
# Behavior: it adds files and removes none, without a word. The sorted names of a class are
# shuffled by the seed, so a name that comes in or goes away shifts all names behind it to other
# places, and what changes its split lies in the old one as well. The test folder grows, and the
# nearest training image of a test image is often that image. Another seed does so for most images.
# What was deleted from the input, or moved to its right class, stays where it was, too. Nothing is
# twice in one folder, so nothing shows. The manual says only that the output folder is made if it
# does not exist.
# Workaround: remove the output folder before each run.
#
# Output seen (5 classes of 100 random images; accuracy of the nearest training image; chance 0.2):
#   first run                    train 400, test  50, in both   0, accuracy 0.20
#   again, nothing has changed   train 400, test  50, in both   0, accuracy 0.20
#   again, 1 image more a class  train 431, test  70, in both  28, accuracy 0.50
#   in a new output folder       train 400, test  55, in both   0, accuracy 0.16
#   again, another seed          train 475, test 105, in both  80, accuracy 0.84
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q split-folders==0.6.1 numpy==2.4.6 pillow==13.0.0
cat >"$dir/split.py" <<'EOF'
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import splitfolders
from PIL import Image

os.chdir(sys.argv[1])
random = np.random.default_rng(0)
CLASSES = [f"class{number}" for number in range(5)]


def add_images(number):
    for name in CLASSES:
        for _ in range(number):
            path = Path("images", name, f"{random.bytes(8).hex()}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def read(split):
    paths = sorted(Path("output", split).glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path), dtype=float).ravel() for path in paths])
    return {path.name for path in paths}, pixels, np.array([path.parent.name for path in paths])


def split(name, seed=0):
    splitfolders.ratio("images", output="output", seed=seed, ratio=(0.8, 0.1, 0.1))
    train, pixels, labels = read("train")
    test, queries, answers = read("test")
    distances = (pixels**2).sum(1) - 2 * queries @ pixels.T
    accuracy = (labels[distances.argmin(axis=1)] == answers).mean()
    both = len(train & test)
    print(f"{name:28} train {len(train)}, test {len(test):3}, in both {both:3}, "
          f"accuracy {accuracy:.2f}")
    return len(test), both, accuracy


add_images(100)
assert split("first run")[:2] == (50, 0)
assert split("again, nothing has changed")[:2] == (50, 0)
add_images(1)
size, both, accuracy = split("again, 1 image more a class")
assert size > 60 and both > 20 and accuracy > 0.4

shutil.rmtree("output")
assert split("in a new output folder")[:2] == (55, 0)
size, both, accuracy = split("again, another seed", seed=1)
assert size > 90 and both > 70 and accuracy > 0.7
EOF
"$dir/venv/bin/python" "$dir/split.py" "$dir"
