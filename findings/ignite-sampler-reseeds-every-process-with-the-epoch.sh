#!/usr/bin/env bash
# ignite: around a sampler of one's own auto_dataloader resets torch's seed to the epoch's number in
# every process; all ranks then draw the same masks, whatever the seed of the run.
#
# Versions: pytorch-ignite 0.5.5, torch 2.14.1, numpy 2.4.6.
# Expected: idist.auto_dataloader(sampler=...) shares the sampler's images out among the processes.
# What these draw themselves (masks, dropout, crops) follows the seed that each of them was given.
# Behavior: with more than one process the sampler is wrapped into a DistributedProxySampler, which
# calls torch.manual_seed(epoch) when an epoch starts, to have one order in all of them, and leaves
# it so, on GPUs, too. From then on all ranks draw the same masks for different images, and runs of
# different seeds are one run but for their first weights. Without set_epoch, which ignite's Engine
# does not call, each epoch repeats the order and the masks of the one before. Crops of workers
# follow from the second epoch on. Without a sampler, or in one process, the seed is left alone.
# The documentation does not tell.
# Workaround: class Kept below.
#
# Output seen (two processes seeded by seed + rank; share of draws after the first epoch that are
# alike on both ranks, in epochs 2 and 3, and for seeds 100 and 200):
#                            masks drawn by a rank  crops drawn by workers
#   no sampler                   0.00  0.00  0.00     0.00  0.00  0.00
#   own sampler                  1.00  1.00  1.00     1.00  1.00  1.00
#   own sampler, set_epoch       1.00  0.00  1.00     1.00  0.00  1.00
#   Kept(own sampler)            0.00  0.00  0.00     0.00  0.00  0.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 pytorch-ignite==0.5.5
"$dir/venv/bin/python" -W ignore - <<'EOF'
import logging

import ignite.distributed as idist
import numpy as np
import torch
from ignite.distributed.auto import DistributedProxySampler
from ignite.utils import manual_seed
from torch.utils.data import WeightedRandomSampler


class Images(list):
    def __getitem__(self, index):
        return torch.randint(1_000_000, ())  # the place of a random crop


class Kept(DistributedProxySampler):
    def __iter__(self):
        with torch.random.fork_rng():
            return super().__iter__()


def train(seed, wrap, set_epoch):
    """The masks and the crops of three epochs, each an array (rank, epoch, draw)."""
    manual_seed(seed + idist.get_rank())
    sampler = {"sampler": wrap(WeightedRandomSampler([1.0] * 64, 64))} if wrap else {}
    loader = idist.auto_dataloader(Images(range(64)), batch_size=16, num_workers=2, **sampler)
    masks, crops = [], []
    for epoch in range(3):
        if set_epoch:
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            crops.append(batch)
            masks.append(torch.randint(1_000_000, (len(batch),)))
    draws = [idist.all_gather(torch.cat(part)[None]) for part in (masks, crops)]
    return [part.reshape(2, 3, -1).numpy() for part in draws]


def main(rank):
    logging.disable()
    for name, wrap, set_epoch, expected in [
        ("no sampler", None, True, [0, 0, 0]),
        ("own sampler", lambda sampler: sampler, False, [1, 1, 1]),
        ("own sampler, set_epoch", lambda sampler: sampler, True, [1, 0, 1]),
        ("Kept(own sampler)", Kept, True, [0, 0, 0]),
    ]:
        shares = []
        for a, b in zip(train(100, wrap, set_epoch), train(200, wrap, set_epoch)):
            pairs = (a[0, 1:], a[1, 1:]), (a[:, 1], a[:, 2]), (a[:, 1:], b[:, 1:])
            shares.append([np.mean(one == two) for one, two in pairs])
        if rank == 0:
            print(f"{name:24}", *("{:8.2f}{:6.2f}{:6.2f}".format(*row) for row in shares))
        assert np.allclose(shares, expected, atol=0.1), name


idist.spawn("gloo", main, args=(), nproc_per_node=2, start_method="fork")
EOF
