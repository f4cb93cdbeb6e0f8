#!/usr/bin/env bash
# datasets: with a class named "train", imagefolder trains on test images, or on that
# class alone.
#
# Versions: datasets 5.2.0, Pillow 13.0.0, numpy 2.4.6.
# Expected: in train/CLASS and test/CLASS the first folder decides the split; in CLASS/ alone
# everything is the training split.
# Behavior: the word train or test counts wherever it stands between separators in a path,
# the name of a class included, and an image can be in two splits. CIFAR-100 has a class
# "train". As train/CLASS, test/CLASS its training split also holds the test images of
# that class. A class "test tube" makes a test split out of training images. As CLASS/ alone
# the class train is the whole data set, without labels, and the others are left out. All
# of it without a warning.
# Workaround: data_files={"train": "DIR/train/**", "test": "DIR/test/**"}.
#
# Output seen (5 images in each folder; images by their folder):
#   train/ and test/ of bus, car, train
#     train: test/train 5, train/bus 5, train/car 5, train/train 5
#     test: test/bus 5, test/car 5, test/train 5
#   train/ of bus, test tube
#     train: train/bus 5, train/test tube 5
#     test: train/test tube 5
#   bus, car, train
#     train: train 5 without labels
#   train/ and test/ of bus, car, train with data_files
#     train: train/bus 5, train/car 5, train/train 5
#     test: test/bus 5, test/car 5, test/train 5
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 datasets==5.2.0
cd "$dir"
HF_HOME="$dir/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
    "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
from collections import Counter
from pathlib import Path

from datasets import Image, load_dataset
from PIL import Image as Pillow


def splits(title, folders, **options):
    """{split: {folder: number of images}} of a new data set with 5 images in each folder."""
    root = Path(title.replace(" ", "-").replace("/", "").replace(",", ""))
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(5):
            Pillow.new("RGB", (8, 8), (0, 0, i)).save(root / folder / f"{i}.png")
    options = {k: {s: f"{root}/{p}" for s, p in v.items()} for k, v in options.items()}
    loaded = load_dataset("imagefolder", **(options or {"data_dir": str(root)}))
    print(title)
    found = {}
    for split, rows in loaded.items():
        files = rows.cast_column("image", Image(decode=False))["image"]
        paths = [Path(file["path"]).relative_to(root.resolve()) for file in files]
        found[split] = dict(sorted(Counter(str(path.parent) for path in paths).items()))
        text = ", ".join(f"{folder} {n}" for folder, n in found[split].items())
        print(f"  {split}: {text}" + " without labels" * ("label" not in rows.features))
    return found, loaded


both = [f"{split}/{c}" for split in ("train", "test") for c in ("bus", "car", "train")]
train, test = (dict.fromkeys(both[i : i + 3], 5) for i in (0, 3))
found, _ = splits("train/ and test/ of bus, car, train", both)
assert found == {"train": {"test/train": 5} | train, "test": test}
tube = dict.fromkeys(["train/bus", "train/test tube"], 5)
found, _ = splits("train/ of bus, test tube", tube)
assert found == {"train": tube, "test": {"train/test tube": 5}}
found, loaded = splits("bus, car, train", ["bus", "car", "train"])
assert found == {"train": {"train": 5}} and "label" not in loaded["train"].features
files = {"train": "train/**", "test": "test/**"}
found, _ = splits("train/ and test/ of bus, car, train with data_files", both, data_files=files)
assert found == {"train": train, "test": test}
EOF
