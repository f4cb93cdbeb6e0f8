#!/usr/bin/env bash
# litdata: train_test_split and subsample take runs of neighbors; of data packed class by class
# the test set has other classes than the training set.
#
# Versions: litdata 0.2.76, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6.
# Expected: train_test_split(shuffle=True, the default), "whether to shuffle the data before
# splitting", and subsample=0.2, "randomly sampled", draw images at random, as scikit-learn's
# function of that name does.
# Behavior: they put the chunks in a random order and cut that list, so a subset is a row of
# whole chunks and a piece of one more. A chunk (64 MB) is one or two thousand photographs or
# more, a few classes of ImageNet in the order of its folders, and one chunk holds all of a
# small set, which is cut like a list. Test classes are then absent from training, a
# validation accuracy is near 0, and a fifth of the data for a quick run or a label-efficiency
# curve has a fifth of the classes. Sizes are right, and nothing is said. shuffle=True of the
# dataset comes after the cut.
# Workaround: shuffle before packing, or dataset.subset(indices drawn by yourself).
#
# Output seen (images of each of 10 classes):
#   chunks of 500: training          50 50 50 50 50 50 50 50  0  0
#   chunks of 500: test               0  0  0  0  0  0  0  0 50 50
#   chunks of 500: subsample=0.2     50 50  0  0  0  0  0  0  0  0
#   chunks of 500: own indices        8 13  8  6 14 10 11  9 12  9
#   chunks of 30: training           50 50 50 50 50 20 50 50 20 10
#   chunks of 30: test                0  0  0  0  0 30  0  0 30 40
#   chunks of 30: subsample=0.2       0  0  0 30 10  0 30 10 20  0
#   chunks of 30: own indices         8 13  8  6 14 10 11  9 12  9
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 litdata==0.2.76
cd "$dir"
cat >split.py <<'EOF'
import numpy as np
from litdata import StreamingDataset, optimize, train_test_split

CLASSES, EACH = 10, 50


def sample(index):
    return {"image": np.full((8, 8, 3), index % 256, np.uint8), "label": index // EACH}


def counts(dataset, name):
    values = np.bincount([item["label"] for item in dataset], minlength=CLASSES)
    print(f"{name:32}", *(f"{value:2}" for value in values), flush=True)
    return (values > 0).tolist()


if __name__ == "__main__":
    for size in (500, 30):
        folder = f"chunks of {size}"
        inputs = list(range(CLASSES * EACH))
        optimize(sample, inputs, folder, chunk_size=size, num_workers=1, verbose=False)
        data = StreamingDataset(folder)
        train, test = train_test_split(data, splits=[0.8, 0.2])
        assert len(train) == 400 and len(test) == 100
        in_train = counts(train, f"{folder}: training")
        in_test = counts(test, f"{folder}: test")
        fifth = StreamingDataset(folder, subsample=0.2, shuffle=True)
        in_fifth = counts(fifth, f"{folder}: subsample=0.2")
        if size == 500:  # all in one chunk
            assert in_train == [True] * 8 + [False] * 2
            assert in_test == [False] * 8 + [True] * 2
            assert in_fifth == [True] * 2 + [False] * 8
        assert len(fifth) == 100 and sum(in_test) < 7 and sum(in_fifth) < 7
        own = data.subset(np.random.default_rng(0).permutation(500)[:100].tolist())
        assert all(counts(own, f"{folder}: own indices"))
EOF
"$dir/venv/bin/python" -W ignore split.py 2>log.txt || { cat log.txt; exit 1; }
