"""
Training batches: a resumable batch sampler, the DataLoader and finished micro-batches on
the device.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import time
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from attg.distributed import STOP_SIGNALS
from attg.images import generator_for


# Two are kept: near the end of an epoch the workers are ahead, in the next one.
@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n images in an epoch, int64 (n,)."""
    return torch.randperm(n, generator=generator_for("order", seed, epoch))


class ResumableBatchSampler(Sampler):
    """Micro-batches of keys (epoch, index) of one rank, for the steps start to stop - 1.

    An epoch over n images has n // batch_size steps, and the global batch of a step is a
    slice of the epoch's permutation. Micro-batch a of a rank has its rows (a * world +
    rank) * b to (a * world + rank + 1) * b - 1, b = batch_size / (accum * world): the
    images of a step depend on neither accum nor world.

    Keys carry the epoch because persistent workers would not see an attribute of the data
    set that is set later.
    """

    def __init__(self, n, batch_size, start, stop, seed=0, accum=1, rank=0, world=1):
        if not 0 < batch_size <= n or batch_size % (accum * world):
            raise ValueError(
                f"--batch_size {batch_size}: there are {n} images, --accum {accum} and "
                f"{world} processes; use a multiple of {accum * world} up to {n}"
            )
        self.n, self.batch_size = n, batch_size
        self.start, self.stop, self.seed = start, stop, seed
        self.accum, self.rank, self.world = accum, rank, world
        self.steps_per_epoch = n // batch_size
        # Rows of this rank's micro-batches in a global batch: (accum, b).
        self.rows = torch.arange(batch_size).view(accum, world, -1)[:, rank]

    def indices(self, step):
        """Image indices of the global batch of a step: int64 (batch_size,)."""
        epoch, i = divmod(step, self.steps_per_epoch)
        order = permutation(self.n, self.seed, epoch)
        return order[i * self.batch_size : (i + 1) * self.batch_size]

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch = step // self.steps_per_epoch
            for indices in self.indices(step)[self.rows].tolist():
                yield [(epoch, index) for index in indices]


def default_workers(device):
    """Loader workers per process: none beside a CPU that is busy with training."""
    if device.type == "cpu":
        return 0
    # slurm and taskset leave a process some of the cores; macOS and Windows do not tell.
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # torchrun, the parent, has the cores of all ranks; it may bind a rank to some, which
    # others share.
    cores = len(affinity(os.getppid() if ranks > 1 else 0)) // ranks
    return min(16, len(affinity(0)), cores)


def ignore_stop_signals(exiting, _):
    """worker_init_fn: only the main process decides when a run ends.

    Ctrl-C and stop signals often reach the workers, too. exiting: an event that is set
    when the main process exits.
    """

    def terminate(number, frame):
        if exiting.is_set():
            os._exit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


def make_loader(
    dataset, batch_size=256, workers=0, batch_sampler=None, pin_memory=False
):
    """DataLoader of batched Samples.

    Without batch_sampler, images come in order, with the last incomplete batch.
    """
    if batch_sampler is None:
        batch_sampler = BatchSampler(range(len(dataset)), batch_size, drop_last=False)
    init = None
    if workers:
        # At exit Python sends the workers SIGTERM and waits for them: from then on they
        # must obey it.
        exiting = multiprocessing.Event()
        atexit.register(exiting.set)
        init = functools.partial(ignore_stop_signals, exiting)
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=init,
        # The loader draws a seed, by default from torch's global generator.
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )


class Batch(NamedTuple):
    """A micro-batch of B images on the device; see attg_mae.model_inputs."""

    # uint8 (B, C, H, W): random crops, not flipped yet.
    image: torch.Tensor
    # (B, h, w): maps of the whole images: floats, or the uint8 masks of toy.
    maps: torch.Tensor | None
    # float32 (B, 4) and bool (B,): see Sample.
    box: torch.Tensor
    flip: torch.Tensor
    # float32 (B, L): decides the mask.
    noise: torch.Tensor
    # float32 (B, L): breaks ties between patches, see attg_mae.patch_order.
    ties: torch.Tensor | None = None


class BatchIterator:
    """The Batches of a run on one rank, from the step `start` on.

    run: attg.trainer.Run. patches: L. ties: whether batches need them. waited: seconds
    spent waiting for images and maps, until the reader resets it. unreadable: number of
    images of this epoch that were replaced.
    """

    def __init__(self, run, start, patches, ties=False):
        cfg, self.run, self.patches = run.cfg, run, patches
        # Field of a Batch: name of its random stream.
        self.streams = {"noise": "masks"} | ({"ties": "ties"} if ties else {})
        self.waited, self.unreadable = 0.0, 0
        shape = (run.train_set.num_images, cfg.batch_size, start, run.total_steps)
        shard = (cfg.accum, run.rank, run.world)
        self.sampler = ResumableBatchSampler(*shape, cfg.seed, *shard)
        options = {"workers": run.workers, "pin_memory": run.device.type == "cuda"}
        self.loader = make_loader(run.train_set, batch_sampler=self.sampler, **options)

    def __iter__(self):
        run, sampler, samples = self.run, self.sampler, iter(self.loader)
        for step in range(sampler.start, sampler.stop):
            if step % sampler.steps_per_epoch == 0:
                self.unreadable = 0
            for micro, ids in enumerate(sampler.indices(step)[sampler.rows]):
                began = time.perf_counter()
                sample = next(samples)
                batch = {"image": sample.image, "box": sample.box, "flip": sample.flip}
                if run.maps is not None:
                    # Memory-mapped: what is not in memory is read now.
                    batch["maps"] = torch.from_numpy(run.maps[sample.index.numpy()])
                self.waited += time.perf_counter() - began
                self.unreadable += int(run.train_set.unreadable[ids].sum())
                if micro == 0:
                    # Noise and ties of the global batch are functions of seed and step, and
                    # are sharded as the images are: a run depends on neither accum nor
                    # world, and has no generator state to save.
                    draws = {}
                    for name, stream in self.streams.items():
                        generator = generator_for(stream, sampler.seed, step)
                        shape = (sampler.batch_size, self.patches)
                        noise = torch.rand(shape, generator=generator)
                        draws[name] = noise[sampler.rows]  # (accum, b, L)
                batch |= {name: noise[micro] for name, noise in draws.items()}
                for name, x in batch.items():
                    # The copy of pageable memory would wait for the GPU.
                    x = x.pin_memory() if run.device.type == "cuda" else x
                    batch[name] = x.to(run.device, non_blocking=True)
                yield Batch(**{"maps": None} | batch)
