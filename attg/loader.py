"""Batches of training: a resumable batch sampler, the loader and the transfer to the device."""

import atexit
import functools
import multiprocessing
import os
import signal
import time
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler

from attg.seeding import generator_for

# -- Batches ---------------------------------------------------------------------------


class ResumableBatchSampler(Sampler):
    """Batches of keys (epoch, index), those of one process, for a whole run.

    It runs over the steps start .. stop - 1 of training on n pictures. An epoch has
    n // batch_size steps; the global batch of a step is a slice of the epoch's
    permutation. Each of `world` processes takes `accum` micro-batches of
    b = batch_size / (accum * world) pictures from it: micro-batch a of process `rank`
    is rows (a * world + rank) * b to (a * world + rank + 1) * b - 1. So the pictures of
    a step do not depend on accum and world.

    Keys carry the epoch because workers that outlive an epoch have copies of the data
    set: they would not see an attribute set later.
    """

    def __init__(self, n, batch_size, start, stop, seed=0, accum=1, rank=0, world=1):
        if not 0 < batch_size <= n:
            raise ValueError(
                f"--batch_size {batch_size}: there are {n} pictures; use 1 to {n}"
            )
        if batch_size % (accum * world):
            raise ValueError(
                f"--batch_size {batch_size}: the global batch must be divisible by "
                f"--accum {accum} times {world} processes; use a multiple of "
                f"{accum * world}"
            )
        self.n = n
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.seed = seed
        self.accum = accum
        self.rank = rank
        self.world = world
        self.steps_per_epoch = n // batch_size
        # The permutation of one epoch is kept, and the epoch that it belongs to.
        self.order = None
        self.order_epoch = None

    def indices(self, step):
        """Global batch of a step: int64 (batch_size,)."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if self.order_epoch != epoch:
            generator = generator_for("order", self.seed, epoch)
            self.order = torch.randperm(self.n, generator=generator)
            self.order_epoch = epoch
        return self.order[i * self.batch_size : (i + 1) * self.batch_size]

    def __len__(self):
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch = step // self.steps_per_epoch
            batches = self.indices(step).view(self.accum, self.world, -1)
            for batch in batches[:, self.rank].tolist():
                yield [(epoch, index) for index in batch]


def ignore_signals(leaving, _):
    """At the start of a worker: only the main process decides when a run ends.

    Ctrl-C and stop signals often reach the workers as well. leaving: an event, set when
    the main process ends.
    """

    def terminate(number, frame):
        if leaving.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


def make_loader(
    dataset, batch_size=256, workers=0, batch_sampler=None, pin_memory=False
):
    """DataLoader of batched Samples.

    Without batch_sampler the pictures come in order, the last short batch included.
    """
    if batch_sampler is not None:
        options = {"batch_sampler": batch_sampler}
    else:
        options = {"batch_size": batch_size}
    if workers:
        # Python sends the workers SIGTERM at exit and waits for them: from then on they
        # have to obey it.
        leaving = multiprocessing.Event()
        atexit.register(leaving.set)
        options["persistent_workers"] = True
        options["worker_init_fn"] = functools.partial(ignore_signals, leaving)
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        # Its own: the loader draws a seed, which would change torch's random numbers.
        generator=torch.Generator(),
        **options,
    )


class BatchIterator:
    """Iterator over the Samples of `batches` (ResumableBatchSampler).

    waited: seconds spent waiting for them. unreadable: indices of the pictures that
    were replaced. Whoever reads the two resets them.
    """

    def __init__(self, dataset, batches, **options):
        self.samples = iter(make_loader(dataset, batch_sampler=batches, **options))
        self.asked = iter(batches)
        self.unreadable = set()
        self.waited = 0.0

    def __next__(self):
        began = time.perf_counter()
        sample = next(self.samples)
        self.waited += time.perf_counter() - began
        keys = next(self.asked)
        for (_, asked), got in zip(keys, sample.index.tolist(), strict=True):
            if asked != got:
                self.unreadable.add(asked)
        return sample


class Batch(NamedTuple):
    """A micro-batch of training on the device; see attg_mae.model_inputs."""

    # uint8 (B, C, h, w): random crops, not flipped yet.
    image: torch.Tensor
    # float32 (B, h, w): attention maps of the whole pictures.
    maps: torch.Tensor | None
    # float32 (B, 4) and bool (B,): see Sample.
    box: torch.Tensor
    flip: torch.Tensor
    # float32 (B, L): decides the mask.
    noise: torch.Tensor
    # float32 (B, L): breaks ties between patches, see attg_mae.patch_order.
    ties: torch.Tensor | None = None


def to_device(sample, noise, all_maps, device):
    """The Batch of a batched Sample; all_maps (n, h, w) on the host, or None."""

    def move(x):
        # From pinned memory, or the copy waits for the GPU.
        if device.type == "cuda":
            x = x.pin_memory()
        return x.to(device, non_blocking=True)

    maps = None
    if all_maps is not None:
        rows = torch.from_numpy(all_maps[sample.index.numpy()])
        maps = move(rows).float()
    image, box, flip = move(sample.image), move(sample.box), move(sample.flip)
    return Batch(image, maps, box, flip, move(noise))
