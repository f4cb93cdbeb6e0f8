#!/usr/bin/env bash
# MONAI: PersistentDataset returns what the transforms of an earlier run made, also with
# hash_transform=json_hashing.
#
# Versions: monai 1.6.1, torch 2.14.1, numpy 2.4.6, Pillow 13.0.0.
# Expected: as its manual says, names of cached files contain a hash of the transforms, so that a
# run with another threshold, size or normalization computes its inputs again. At the latest
# hash_transform, which the manual offers against changes of transforms, does that.
# Behavior: by default no transform is hashed. A second run with the same cache_dir gets the
# inputs of the first, whatever its own transforms are, without a message. json_hashing, one
# of the two functions offered, hashes only the names of the classes, because transforms do
# not go into JSON: other arguments are not noticed. Maps written again under the old names
# are never noticed. So an ablation over the threshold of a mask or over a normalization
# compares a setting with itself. CacheDataset, in memory, is right.
# Workaround: hash_transform=pickle_hashing, or a cache_dir for each setting.
#
# Output seen (share of each map above a threshold of 64, then of 192):
#   Dataset                               0.748 0.251
#   CacheDataset                          0.748 0.251
#   PersistentDataset                     0.748 0.748
#   PersistentDataset, json_hashing       0.748 0.748
#   PersistentDataset, pickle_hashing     0.748 0.251
#   all maps black now, the same names    0.251 (in truth 0)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 monai==1.6.1 pillow==13.0.0
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.data.utils import json_hashing, pickle_hashing
from monai.transforms import AsDiscreted, Compose, LoadImaged
from PIL import Image

random = np.random.default_rng(0)
files = [{"map": f"{i}.png"} for i in range(8)]
for file in files:
    Image.fromarray(random.integers(0, 256, (64, 64), np.uint8)).save(file["map"])


def share(kind, threshold, **options):
    transform = Compose([LoadImaged("map"), AsDiscreted("map", threshold=threshold)])
    dataset = kind(files, transform, **options)
    return round(float(np.mean([float(item["map"].mean()) for item in dataset])), 3)


def report(name, kind, **options):
    shares = [share(kind, threshold, **options) for threshold in (64, 192)]
    print(f"{name:37}", *(f"{value:.3f}" for value in shares))
    return shares


low, high = truth = report("Dataset", Dataset)
assert abs(low - 0.75) < 0.01 and abs(high - 0.25) < 0.01
assert report("CacheDataset", CacheDataset, progress=False) == truth
name = "PersistentDataset"
assert report(name, PersistentDataset, cache_dir="a") == [low, low]
by_json = dict(cache_dir="b", hash_transform=json_hashing)
assert report(f"{name}, json_hashing", PersistentDataset, **by_json) == [low, low]
by_pickle = dict(cache_dir="c", hash_transform=pickle_hashing)
assert report(f"{name}, pickle_hashing", PersistentDataset, **by_pickle) == truth

for file in files:
    Image.new("L", (64, 64)).save(file["map"])
after = share(PersistentDataset, 192, **by_pickle)
print(f"all maps black now, the same names    {after:.3f} (in truth {share(Dataset, 192):.0f})")
assert after == high and share(Dataset, 192) == 0
EOF
