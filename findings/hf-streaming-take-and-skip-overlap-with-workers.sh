#!/usr/bin/env bash
# datasets: take(n) and skip(n) of a stream overlap as soon as the numbers of workers differ.
#
# Versions: datasets 5.2.0, torch 2.14.1, numpy 2.4.6.
# Expected: validation = stream.take(n), training = stream.skip(n), the usual way to split a
# stream, are disjoint and complete in whatever way each of them is read.
# Behavior: DataLoader workers divide the shards and n among themselves: with two workers
# each one skips, or takes, n/2 samples at the start of its own shards. So n means other
# samples for each number of workers. If validation is read in the main process and training
# by two workers, half of the validation images are trained on, and as many are never used;
# with four, seven of ten. The validation set itself changes with num_workers. The same
# happens if training is divided by split_dataset_by_node after skip(n). No warning.
# Workaround: split by files, or filter by a key of the samples.
#
# Output seen (40 images in 4 shards, n = 10; workers of validation and training):
#   0 and 0: validation 0-9, also trained on 0, never read 0
#   0 and 2: validation 0-9, also trained on 5, never read 5
#   0 and 4: validation 0-9, also trained on 7, never read 7
#   2 and 2: validation 0-4 10-14, also trained on 0, never read 0
#   2 and 4: validation 0-4 10-14, also trained on 4, never read 4
#   0 and two nodes: also trained on 5
#   filtered by a key, 0 and 4: also trained on 0, never read 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 datasets==5.2.0
cd "$dir"
HF_HOME="$dir/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
    "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

ALL = set(range(40))
stream = Dataset.from_dict({"id": sorted(ALL)}).to_iterable_dataset(num_shards=4)
head, tail = stream.take(10), stream.skip(10)


def read(dataset, workers=0):
    ids = [int(i) for batch in DataLoader(dataset, 5, num_workers=workers) for i in batch["id"]]
    assert len(ids) == len(set(ids))
    return set(ids)


def show(ids):
    starts = sorted(i for i in ids if i - 1 not in ids)
    ends = sorted(i for i in ids if i + 1 not in ids)
    return " ".join(f"{a}-{b}" for a, b in zip(starts, ends))


expected = {(0, 0): 0, (0, 2): 5, (0, 4): 7, (2, 2): 0, (2, 4): 4}
for (few, many), overlap in expected.items():
    validation, training = read(head, few), read(tail, many)
    both, never = validation & training, ALL - validation - training
    print(f"{few} and {many}: validation {show(validation)}, ", end="")
    print(f"also trained on {len(both)}, never read {len(never)}")
    assert len(validation) == 10 and len(training) == 30
    assert len(both) == len(never) == overlap
assert read(head, 0) != read(head, 2)

nodes = set().union(*(read(split_dataset_by_node(tail, rank, 2)) for rank in range(2)))
print("0 and two nodes: also trained on", len(nodes & read(head)))
assert len(nodes & read(head)) == 5

held_out = stream.filter(lambda sample: sample["id"] % 4 == 0)
rest = stream.filter(lambda sample: sample["id"] % 4 != 0)
validation, training = read(held_out, 0), read(rest, 4)
print("filtered by a key, 0 and 4: also trained on", len(validation & training), end=", ")
print("never read", len(ALL - validation - training))
assert not validation & training and validation | training == ALL
EOF
