#!/usr/bin/env bash
# grain: processes that take their share of a dataset by slicing draw the same random masks, and two
# augmented views of an image are one and the same view.
#
# Versions: grain 0.2.18, numpy 2.4.6.
# Expected: seed() gives "every downstream random transformation" its "unique seed", which spares
# one "accidentally reusing the same seed"; a seed together with the position of an element makes
# draws that are independent between all elements, as with grain's own DataLoader and its shards.
# Behavior: the seed of a transformation is made of that of seed() and of the number of steps in
# between; the position is counted in the dataset it is applied to. After ds[process::processes],
# for the tutorial "the easiest way to shard", the k-th elements of all processes have one position,
# so that they mask the same patches, or crop and flip alike: 8 processes with 16 images each draw
# 16 masks. Two branches of one dataset, zipped for a contrastive loss, have one seed: both views
# are the same, and the loss has nothing to learn. So it is with two datasets that are mixed or
# joined. No message; the reference says what a seed is made of, not what follows from it. Workers
# of mp_prefetch do draw apart.
# Workaround: slice behind the random transformation (it costs nothing, as elements are made on
# demand); random_map(transform, seed=...) in each branch.
#
# Output seen:
#   slice, then mask      16 masks for 128 images, 1 in the first step of 8 processes
#   mask, then slice     128 masks for 128 images, 8 in the first step of 8 processes
#   DataLoader, shards   128 masks for 128 images, 8 in the first step of 8 processes
#   two views            128 of 128 pairs have one mask
#   two datasets         128 of 128 pairs have one mask
#   views, own seeds       0 of 128 pairs have one mask
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 grain==0.2.18
"$dir/venv/bin/python" - 2>"$dir/log" <<'PROGRAM' || { cat "$dir/log" >&2; exit 1; }
import grain
import numpy as np
from grain.experimental import ZipMapDataset

IMAGES, PROCESSES = 128, 8


class Mask(grain.transforms.RandomMap):
    def random_map(self, image, rng):
        """The 49 patches of 196 that a masked autoencoder sees."""
        return image, tuple(sorted(rng.permutation(196)[:49].tolist()))


def loader(process):
    shards = grain.sharding.ShardOptions(process, PROCESSES)
    sampler = grain.samplers.IndexSampler(
        IMAGES, shard_options=shards, shuffle=True, num_epochs=1, seed=0
    )
    images = list(range(IMAGES))
    return grain.DataLoader(data_source=images, sampler=sampler, operations=[Mask()])


dataset = grain.MapDataset.range(IMAGES).seed(0).shuffle()
WAYS = {
    "slice, then mask": lambda process: dataset[process::PROCESSES].random_map(Mask()),
    "mask, then slice": lambda process: dataset.random_map(Mask())[process::PROCESSES],
    "DataLoader, shards": loader,
}
for name, way in WAYS.items():
    parts = [list(way(process)) for process in range(PROCESSES)]
    images = [image for part in parts for image, _ in part]
    assert sorted(images) == list(range(IMAGES))  # each image once
    masks = {mask for part in parts for _, mask in part}
    first = {part[0][1] for part in parts}
    print(f"{name:20} {len(masks):3} masks for {len(images)} images,"
          f" {len(first)} in the first step of {PROCESSES} processes")
    assert (len(masks), len(first)) == ((16, 1) if name == "slice, then mask" else (128, 8))


def equal(first, second):
    """In how many pairs of images the masks are equal."""
    return sum(a[1] == b[1] for a, b in ZipMapDataset([first, second]))


other = grain.MapDataset.range(1000, 1000 + IMAGES).seed(0).shuffle()
for name, first, second, count in (
    ("two views", dataset.random_map(Mask()), dataset.random_map(Mask()), IMAGES),
    ("two datasets", dataset.random_map(Mask()), other.random_map(Mask()), IMAGES),
    ("views, own seeds", dataset.random_map(Mask(), seed=1), dataset.random_map(Mask(), seed=2), 0),
):
    found = equal(first, second)
    print(f"{name:20} {found:3} of {IMAGES} pairs have one mask")
    assert found == count, name
PROGRAM
