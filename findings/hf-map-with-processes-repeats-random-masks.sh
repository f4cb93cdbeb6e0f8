#!/usr/bin/env bash
# datasets: map() with num_proc=4 draws the same random masks, crops or noise for each quarter of
# the rows, and Python's random does not follow its seed.
#
# Versions: datasets 5.2.0, numpy 2.4.6, Python 3.11.
# Expected: num_proc changes the speed only; or the draws, but then as in the workers of PyTorch's
# DataLoader, each of which has a seed of its own.
# Behavior: each process starts from a copy of the Generator that the function uses, or of np.random
# where processes are forked, and map() seeds nothing. With 4 processes the rows 0, n/4, n/2 and
# 3n/4 get one mask, written to a file that all epochs read. Python seeds its own random anew in a
# new process, so there the masks differ, also between two runs with one seed. num_proc=1 is
# a process, too: the caller's state stays where it was, and two calls, made for two views of
# the images, give one view twice.
# Workaround: with_indices=True and np.random.default_rng([seed, index]), the same for any num_proc.
#
# Output seen (distinct masks of 64 rows; rows that change from one seeded run to the next):
#   with_generator, num_proc=None:  64   0
#   with_generator, num_proc=4:     16   0
#   with_random, num_proc=None:     64   0
#   with_random, num_proc=4:        64  64
#   with_index, num_proc=None:      64   0
#   with_index, num_proc=4:         64   0
#   two views with num_proc=1 are the same: True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 datasets==5.2.0
HF_HOME="$dir" "$dir/venv/bin/python" -W ignore - <<'EOF'
import random

import numpy as np
from datasets import Dataset, disable_caching, disable_progress_bars

disable_caching()
disable_progress_bars()
ROWS, PATCHES, KEPT = 64, 196, 49
data = Dataset.from_dict({"image": list(range(ROWS))})
generator = None


def with_generator(row, index):
    return {"kept": generator.permutation(PATCHES)[:KEPT].tolist()}


def with_random(row, index):
    return {"kept": random.sample(range(PATCHES), KEPT)}


def with_index(row, index):
    return {"kept": np.random.default_rng([0, index]).permutation(PATCHES)[:KEPT].tolist()}


def seed():
    global generator
    generator = np.random.default_rng(0)
    random.seed(0)


def masks(draw, processes):
    return data.map(draw, num_proc=processes, with_indices=True)["kept"][:]


expected = {with_generator: (16, 0), with_random: (64, 64), with_index: (64, 0)}
for function in expected:
    for processes in (None, 4):
        seed()
        first = masks(function, processes)
        seed()
        second = masks(function, processes)
        distinct = len(set(map(tuple, first)))
        changed = sum(one != two for one, two in zip(first, second))
        print(f"{function.__name__}, num_proc={processes}:".ljust(30), f"{distinct:3} {changed:3}")
        assert (distinct, changed) == (expected[function] if processes else (ROWS, 0))

views = [masks(with_generator, 1) for _ in range(2)]
print("two views with num_proc=1 are the same:", views[0] == views[1])
assert views[0] == views[1]
EOF
