#!/usr/bin/env bash
# Deep Lake: a random sample without replacement is filled up with runs of neighboring rows; SAMPLE
# BY 0.1 is no tenth of the data, and SAMPLE BY labels never draws class 0.
#
# Versions: deeplake 4.7.4, numpy 2.4.6.
# Expected: SAMPLE BY 1 REPLACE false LIMIT 5000 draws 5000 images at random. The guide to the query
# language explains SAMPLE BY 0.1 as "10% random sample", SAMPLE BY labels as "Sample by label
# distribution".
# Behavior: some 700 rows are drawn at random, all others are neighbors of each other, whatever the
# size of the data. A tenth of 50,000 images lies in runs of thousands, so of data packed class by
# class it has mostly one or two classes. As a subset for a label-efficiency curve, or as a split,
# it is not what it seems: the size is right and no row is repeated. Another sample has nearly the
# same runs. Small samples, as in a test, are random; weights change nothing. Apart from that,
# SAMPLE BY takes its argument for the weight of a row: 0.1, the same for all, gives a bootstrap of
# the whole size (63% of the rows, with repeats); labels gives class 9 nine times the images of
# class 1, and class 0 none. No message.
# Workaround: ORDER BY RANDOM() LIMIT n, or indices drawn by NumPy.
#
# Output seen (rows, distinct rows, share in runs of 50 or more, images of each class):
#   SAMPLE BY 1 ... LIMIT 500       500   500 0%    46   51   50   51   44   54   51   48   46   59
#   ORDER BY RANDOM() LIMIT 500     500   500 0%    55   44   53   42   47   47   58   53   51   50
#   SAMPLE BY 1 ... LIMIT 5000     5000  5000 86%   69 3086 1321   75   84   70   69   79   80   67
#   ORDER BY RANDOM() LIMIT 5000   5000  5000 0%   516  491  490  447  478  466  515  485  573  539
#   SAMPLE BY 1 ... LIMIT 25000   25000 25000 98% 5000 5000 5000 4639 5000   66   67   80   73   75
#   ORDER BY RANDOM() LIMIT 25000 25000 25000 0%  2533 2546 2462 2556 2486 2492 2457 2488 2530 2450
#   SAMPLE BY 0.1                 50000 31756 0%  5091 5125 5032 4902 5006 5013 4966 5015 4937 4913
#   SAMPLE BY labels              50000 26129 0%     0 1067 2218 3304 4425 5636 6706 7869 8844 9931
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 deeplake==4.7.4
cd "$dir"
venv/bin/python - <<'EOF'
import deeplake
import numpy as np
from deeplake import types

# As many images as CIFAR-10 has, packed folder by folder.
labels = np.repeat(np.arange(10), 5000)
images = deeplake.create("images")
images.add_column("id", "int32")
images.add_column("labels", types.ClassLabel("int32"))
images.append({"id": np.arange(50000, dtype=np.int32), "labels": labels.astype(np.int32)})
images.commit()


def draw(clause):
    """Rows that the query returns, and how many there are of each class."""
    ids = np.asarray(images.query(f"SELECT * {clause}")["id"][:])
    return ids, np.bincount(labels[ids], minlength=10)


def inside_runs(ids):
    """Share of the rows that lie among 50 or more neighbors, all of them drawn."""
    chosen = np.zeros(50001, bool)
    chosen[ids] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen]).astype(int)))
    lengths = edges[1::2] - edges[::2]
    return lengths[lengths >= 50].sum() / len(ids)


def show(clause, ids, counts):
    numbers = f"{len(ids):5} {len(np.unique(ids)):5} {inside_runs(ids):.0%}"
    print(f"{clause:30}{numbers:15}", *(f"{count:4}" for count in counts))


for size in (500, 5000, 25000):
    clause = f"SAMPLE BY 1 REPLACE false LIMIT {size}"
    ids, counts = draw(clause)
    show(clause.replace("REPLACE false", "..."), ids, counts)
    assert len(ids) == len(np.unique(ids)) == size
    if size == 500:
        assert counts.max() < 100 and inside_runs(ids) == 0, counts
    else:
        assert counts.max() > 2500 and counts.min() < 150 and inside_runs(ids) > 0.7, counts

    clause = f"ORDER BY RANDOM() LIMIT {size}"
    ids, counts = draw(clause)
    show(clause, ids, counts)
    assert abs(counts - size / 10).max() < 0.1 * size and inside_runs(ids) == 0, counts

ids, counts = draw("SAMPLE BY 0.1")
show("SAMPLE BY 0.1", ids, counts)
assert len(ids) == 50000 and 30000 < len(np.unique(ids)) < 33000

ids, counts = draw("SAMPLE BY labels")
show("SAMPLE BY labels", ids, counts)
assert counts[0] == 0 and counts[9] > 6 * counts[1] > 0, counts
EOF
