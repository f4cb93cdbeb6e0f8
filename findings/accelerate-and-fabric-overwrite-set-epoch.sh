#!/usr/bin/env bash
# accelerate, Lightning Fabric: their loaders undo set_epoch. Epochs cut to a number of steps train
# on the same rows forever; a resumed epoch loses a quarter of its rows.
#
# Versions: accelerate 1.15.0, lightning-fabric 2.6.6, datasets 5.2.0, torch 2.14.1, numpy 2.4.6.
# Expected: set_epoch(epoch) of the sampler, or of a stream of datasets as its documentation asks
# for, decides the order of the epoch that follows, as with a plain DataLoader.
# Behavior: every loop over a loader from prepare() or setup_dataloaders() begins with a set_epoch
# of its own, to a count of its own. accelerate counts the loops that came to their end: one
# left by break or islice is repeated, row for row. Fabric counts the loops begun. Both counts
# start at 0 in a resumed run, so the epoch to go on with has the order of the first one, and
# leaving out as many batches as were done leaves out other rows.
# Workaround: accelerate: set_epoch of the prepared loader. Fabric: leave the loader out of
# setup_dataloaders and use fabric.to_device.
#
# Output seen (1000 rows; in 8 epochs of 250 the rows seen of a stream and with a sampler; of an
# epoch resumed halfway the rows that came twice and never):
#   DataLoader                       903     917       0       0
#   accelerate                       250     250     250     250
#   accelerate, loader.set_epoch     903     917       0       0
#   Fabric                           903     917     250     250
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 accelerate==1.15.0 \
    lightning-fabric==2.6.6 datasets==5.2.0
"$dir/venv/bin/python" -W ignore - <<'EOF'
from itertools import islice

from accelerate import Accelerator
from datasets import Dataset
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler

ROWS, BATCH, EPOCHS, STEPS, HALF, RESUMED = 1000, 10, 8, 25, 50, 3
rows = Dataset.from_dict({"row": list(range(ROWS))})


def stream(wrap):
    data = rows.to_iterable_dataset(num_shards=100).shuffle(seed=0, buffer_size=100)
    return data, wrap(DataLoader(data, batch_size=BATCH))


def sampler(wrap):
    order = DistributedSampler(rows, num_replicas=1, rank=0)
    return order, wrap(DataLoader(rows, batch_size=BATCH, sampler=order))


def read(batches):
    return [int(row) for batch in batches for row in batch["row"]]


def compare(title, wrap, of_loader=False):
    counts = []
    for kind in (stream, sampler):
        data, loader = kind(wrap)
        seen = set()
        for epoch in range(EPOCHS):
            (loader if of_loader else data).set_epoch(epoch)
            seen.update(read(islice(loader, STEPS)))
        counts.append(len(seen))
    order, loader = sampler(wrap)
    for epoch in range(RESUMED + 1):
        (loader if of_loader else order).set_epoch(epoch)
        first = read(loader)[: HALF * BATCH]
    order, loader = sampler(wrap)  # a new process
    (loader if of_loader else order).set_epoch(RESUMED)
    second = read(islice(loader, HALF, None))
    twice, never = len(set(first) & set(second)), ROWS - len({*first, *second})
    print(f"{title:28}", *(f"{count:7}" for count in (*counts, twice, never)))
    return *counts, twice, never


plain = compare("DataLoader", lambda loader: loader)
assert plain[0] > 700 and plain[1] > 700 and plain[2:] == (0, 0)
accelerator, fabric = Accelerator(cpu=True), Fabric(accelerator="cpu", devices=1)
result = compare("accelerate", accelerator.prepare)
assert result[:2] == (250, 250) and min(result[2:]) > 200
assert compare("accelerate, loader.set_epoch", accelerator.prepare, of_loader=True) == plain
result = compare("Fabric", fabric.setup_dataloaders)
assert result[:2] == plain[:2] and min(result[2:]) > 200
EOF
