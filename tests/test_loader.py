"""
Order and batches of training: the sampler, the loader, seeds.
"""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attg.datasets import open_data
from attg.images import Sample, seed_for
from attg.loader import (
    BatchIterator,
    ResumableBatchSampler,
    default_workers,
    make_loader,
)
from tests.helpers import ROOT, python, same


def test_seeds_separate_lengths_and_values():
    words = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), ("0",), (2**63,)]
    seeds = {seed_for(*x) for x in words}
    assert len(seeds) == len(words) and all(0 <= seed < 2**64 for seed in seeds)
    assert seed_for(3, 4) == seed_for(np.int64(3), 4)


@given(
    *[st.integers(1, 4)] * 3,
    *[st.integers(0, 20)] * 2,
    st.integers(1, 30),
    st.integers(0, 2**32),
)
def test_sampler(b, accum, world, extra, start, length, seed):
    """Each epoch is a new permutation; ranks and micro-batches tile the global batch."""
    batch_size = b * accum * world
    n = batch_size + extra
    per_epoch = n // batch_size
    whole = list(ResumableBatchSampler(n, batch_size, 0, start + length, seed=seed))
    for step, keys in enumerate(whole):
        assert [epoch for epoch, _ in keys] == [step // per_epoch] * batch_size
    epochs = []
    for first in range(0, len(whole), per_epoch):
        epochs.append([i for k in whole[first : first + per_epoch] for _, i in k])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert set(epochs[-1]) <= set(range(n))
    other = list(ResumableBatchSampler(n, batch_size, 0, per_epoch, seed=seed + 1))
    orders = [*epochs[:2], [i for keys in other for _, i in keys]]
    assert n < 12 or len(set(map(tuple, orders))) == len(orders)
    ranks = []
    for rank in range(world):
        args = (n, batch_size, start, start + length, seed, accum, rank, world)
        ranks.append(list(ResumableBatchSampler(*args)))
        assert len(ranks[rank]) == length * accum
    for step, keys in enumerate(whole[start:]):
        micro_batches = range(step * accum, (step + 1) * accum)
        tiled = [key for a in micro_batches for rank in ranks for key in rank[a]]
        assert tiled == keys


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    """While workers fetch images of the next epoch, the last steps of one are trained."""
    drawn, randperm = [], torch.randperm

    def count(n, **options):
        drawn.append(n)
        return randperm(n, **options)

    monkeypatch.setattr(torch, "randperm", count)
    sampler = ResumableBatchSampler(1009, 100, 0, 30, seed=12345)
    for step in range(27):
        sampler.indices(step + 3)
        sampler.indices(step)
    assert drawn == [1009] * 3


def test_waiting_for_maps_counts(labelled):
    """A map file on a network file system can be slower than the images."""

    class Slow:
        def __getitem__(self, rows):
            time.sleep(0.2)
            return np.zeros((len(rows), 4, 4))

    run = SimpleNamespace(rank=0, world=1, workers=0, total_steps=1, maps=Slow())
    run.cfg = SimpleNamespace(batch_size=4, accum=1, seed=0)
    run.device = torch.device("cpu")
    run.train_set = open_data(labelled["data"], "train", 16, augment=True)
    iterator = BatchIterator(run, 0, 16)
    (batch,) = iterator
    assert len(batch.maps) == 4 and iterator.waited > 0.19


@pytest.mark.parametrize("n, b, parts", [(8, 9, 1), (80, 10, 2), (8, 0, 1)])
def test_sampler_errors(n, b, parts):
    remedy = f"multiple of {parts**2} up to {n}"
    with pytest.raises(ValueError, match=f"--batch_size {b}: .*{remedy}"):
        ResumableBatchSampler(n, b, 0, 1, accum=parts, world=parts)


@pytest.mark.parametrize("augment", [True, False])
def test_workers_change_nothing(folder, augment):
    dataset = open_data(folder, size=16, augment=augment, seed=1)
    state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        sampler = ResumableBatchSampler(len(dataset), 5, 1, 5, seed=3)
        sampler = sampler if augment else None
        runs.append(list(make_loader(dataset, 5, workers, sampler)))
    assert same(*runs) and len(runs[0]) == (4 if augment else 3)
    # Evaluation keeps the incomplete batch.
    batch = runs[0][-1]
    assert type(batch) is Sample and len(batch.image) == (5 if augment else 2)
    assert torch.get_rng_state().equal(state)


def test_ranks_share_the_cores(monkeypatch):
    """Those that are left to torchrun or, without it, to this process."""
    gpu, cores = torch.device("cuda"), {0: 24, os.getppid(): 36}
    affinity = lambda pid: range(cores[pid])  # noqa: E731
    monkeypatch.setattr("os.cpu_count", lambda: 99)
    monkeypatch.setattr("os.sched_getaffinity", affinity, raising=False)
    for ranks, workers in (("1", 16), ("3", 12), ("5", 7)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers(gpu) == workers
    cores[0] = 6  # torchrun binds a rank to the cores near its GPU
    assert default_workers(gpu) == 6
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert default_workers(gpu) == 6
    assert default_workers(torch.device("cpu")) == 0
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    assert default_workers(gpu) == 16


def test_workers_ignore_signals_and_exit():
    """Stop signals reach the whole process group, but only the main process acts."""
    # Workers start with the usual handlers; the second loader is left in mid-epoch.
    code = """
import os, signal
from attg.datasets import open_data
from attg.loader import ResumableBatchSampler, make_loader

def batches():
    steps = ResumableBatchSampler(len(data), 50, 0, 60)
    return iter(make_loader(data, workers=2, batch_sampler=steps))

data = open_data("toy", "test", augment=True)
first = batches()
next(first)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
    os.killpg(0, number)
print("batches", 1 + sum(1 for _ in first))
next(batches())
raise SystemExit(3)
"""
    done = python("-c", code, cwd=ROOT, timeout=100, start_new_session=True)
    assert (done.returncode, done.stdout) == (3, "batches 60\n"), done.stderr
