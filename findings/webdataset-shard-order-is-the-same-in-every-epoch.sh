#!/usr/bin/env bash
# webdataset: shardshuffle without a seed orders the shards once; all epochs follow that order, and
# epochs of a set length never reach the last shards.
#
# Versions: webdataset 1.0.2, numpy 2.4.6.
# Expected: without a seed every loop takes the shards in a new order, as .shuffle() does with
# samples and as shardshuffle itself did in older versions.
# Behavior: WebDataset draws a seed when it is made and restarts its shuffle of the shards from it
# in every loop, also with .repeat() and with_epoch(). The buffer of .shuffle() mixes neighbors
# only, so shards packed class by class come in one order of classes forever; where
# with_epoch() or a break ends the epoch early, the same classes are left out of all of them.
# Workaround: a DataPipeline with wds.shuffle() after the list of shards, or resampled=True.
# (detshuffle=True counts its epochs in the process that reads: in DataLoader workers that are
# started for each epoch it does not help.)
#
# Output seen (10 shards of one class each):
#   shardshuffle, epoch 1: classes 2 0 9 3 1 4 5 7 6 8
#   shardshuffle, epoch 2: classes 2 0 9 3 1 4 5 7 6 8
#   shardshuffle, epoch 3: classes 2 0 9 3 1 4 5 7 6 8
#   with_epoch(half), 20 epochs:  6 of 10 classes
#   the same with a DataPipeline: 10 of 10 classes, 20 orders
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 webdataset==1.0.2
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import random

import webdataset as wds

SHARDS, SAMPLES, EPOCHS = 10, 100, 20
for label in range(SHARDS):
    with wds.TarWriter(f"{label}.tar") as shard:
        for number in range(SAMPLES):
            shard.write({"__key__": f"{label}-{number}", "cls": str(label)})
urls = "{0..9}.tar"


def classes(dataset):
    """Class numbers in the order in which an epoch reaches them."""
    return list(dict.fromkeys(sample["__key__"][0] for sample in dataset))


random.seed(0)
dataset = wds.WebDataset(urls, shardshuffle=100)
orders = [classes(dataset) for _ in range(3)]
for epoch, order in enumerate(orders, 1):
    print(f"shardshuffle, epoch {epoch}: classes", *order)
assert orders[0] == orders[1] == orders[2] != sorted(orders[0])

half = SHARDS * SAMPLES // 2
dataset = wds.WebDataset(urls, shardshuffle=100).shuffle(100).with_epoch(half)
seen = {label for _ in range(EPOCHS) for label in classes(dataset)}
print(f"with_epoch(half), {EPOCHS} epochs:  {len(seen)} of {SHARDS} classes")
assert len(seen) < 8

pipeline = wds.DataPipeline(
    wds.SimpleShardList(urls), wds.split_by_worker, wds.shuffle(100), wds.tarfile_to_samples()
)
orders = [classes(pipeline.with_epoch(half)) for _ in range(EPOCHS)]
seen = {label for order in orders for label in order}
distinct = len({tuple(order) for order in orders})
print(f"the same with a DataPipeline: {len(seen)} of {SHARDS} classes, {distinct} orders")
assert len(seen) == SHARDS and distinct > EPOCHS // 2
EOF
