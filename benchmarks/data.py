"""
The data path: decode, crop and collate JPEG files of ImageNet's size, beside
torchvision's own pipelines.

The workers of this project hand over 8-bit crops that are not flipped yet; the device
flips and normalizes them with the attention map. MAE's pipeline, of torchvision's
RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, does all of it in the
worker. torchvision's v2 in 8 bits does as much as ours, and the flip.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from attg.datasets import open_data
from attg.distributed import default_workers
from attg.images import load_image
from attg.loader import ResumableBatchSampler, make_loader, to_device
from attg_mae import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.measure import (
    machine,
    percentiles,
    print_row,
    quiet_clock,
    table,
    take_turns,
    time_alone,
)

# ImageNet's pictures have 500 x 375 pixels most often, and 110 KB on average.
WIDTH, HEIGHT, QUALITY = 500, 375, 92


# -- Pictures --------------------------------------------------------------------------


def picture(seed, width, height):
    """Smooth shapes and fine grain, uint8 (height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, height, width)
    # The last two make files as large as photographs.
    for cell, contrast in ((128, 60), (64, 30), (32, 15), (16, 8), (4, 12), (2, 28)):
        coarse = torch.randn(
            1, 3, height // cell + 2, width // cell + 2, generator=generator
        )
        x += contrast * F.interpolate(coarse, (height, width), mode="bicubic")
    x = (x[0] + 128).clamp(0, 255).byte()
    return x.permute(1, 2, 0).numpy()


def write_pictures(folder, count, different=64, width=WIDTH, height=HEIGHT):
    """JPEG files FOLDER/train/a/NNNNNN.jpg, every second one upright.

    Only `different` of them differ: more would take longer to make.
    """
    target = Path(folder, "train", "a")
    target.mkdir(parents=True)
    files = []
    for i in range(min(count, different)):
        size = (width, height) if i % 2 == 0 else (height, width)
        path = target / f"{i:06d}.jpg"
        Image.fromarray(picture(i, *size)).save(path, quality=QUALITY)
        files.append(path.read_bytes())
    for i in range(different, count):
        (target / f"{i:06d}.jpg").write_bytes(files[i % different])


# -- Pipelines: endless iterators of batches -------------------------------------------


def our_batches(folder, size, batch_size, workers, pin_memory=False):
    dataset = open_data(folder, "train", size, augment=True)
    # Far more steps than are taken.
    batches = ResumableBatchSampler(len(dataset), batch_size, start=0, stop=10**6)
    loader = make_loader(
        dataset, workers=workers, batch_sampler=batches, pin_memory=pin_memory
    )
    return iter(loader)


def torchvision_batches(transform, folder, size, batch_size, workers):
    dataset = ImageFolder(Path(folder, "train"), transform(size))
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def mae_transform(size):
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def v2_transform(size):
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(
                size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(),
        ]
    )


def decoded_batches(folder, size, batch_size, workers):
    """Nothing but the decoder, the part that no pipeline can leave out."""
    root = Path(folder, "train", "a")
    paths = sorted(root.iterdir())
    i = 0
    while True:
        batch = []
        for _ in range(batch_size):
            picture = load_image(paths[i % len(paths)])
            batch.append(np.asarray(picture.convert("RGB")))
            i += 1
        yield batch


PIPELINES = {
    "ours": our_batches,
    "torchvision, MAE's": partial(torchvision_batches, mae_transform),
    "torchvision v2, 8 bits": partial(torchvision_batches, v2_transform),
    "decoding alone": decoded_batches,
}


# -- The table -------------------------------------------------------------------------


def rate_row(name, workers, batch_size, seconds, base):
    """seconds: of batches of this pipeline; base: of ours."""
    median, p20, p80 = percentiles(seconds)
    return {
        "pipeline": name,
        "workers": workers,
        "batch": batch_size,
        "img/s": 1e3 * batch_size / median,
        "p20": 1e3 * batch_size / p80,
        "p80": 1e3 * batch_size / p20,
        "x ours": percentiles(base)[0] / median,
    }


def measure_core(folder, size, batch_size, repeats):
    """Rows of all pipelines in one process with one thread, taking turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = {}
    for name, open_pipeline in PIPELINES.items():
        batches = open_pipeline(folder, size, batch_size, 0)
        calls[name] = (partial(iter, batches), next)
    times = take_turns(calls, torch.device("cpu"), repeats, quiet_clock())
    torch.set_num_threads(threads)
    rows = []
    for name, seconds in times.items():
        rows.append(rate_row(name, 0, batch_size, seconds, times["ours"]))
    return rows


def measure_workers(folder, size, batch_size, workers, device, repeats):
    """Rows with loader processes, one pipeline after the other.

    A call takes a batch from each worker. `ours, to the device` has the batch on the
    device at the end, through pinned memory if it is a GPU.
    """

    def take(batches):
        for _ in range(workers):
            next(batches)

    def take_to_device(batches):
        for _ in range(workers):
            to_device(next(batches), torch.zeros(1), None, device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    pinned = partial(our_batches, pin_memory=device.type == "cuda")
    pipelines = {
        "ours": (our_batches, take),
        "ours, to the device": (pinned, take_to_device),
        "torchvision, MAE's": (PIPELINES["torchvision, MAE's"], take),
    }
    times = {}
    for name, (open_pipeline, call) in pipelines.items():
        batches = open_pipeline(folder, size, batch_size, workers)
        # What was fetched ahead is used up first.
        call(batches)
        call(batches)
        host = torch.device("cpu")
        times[name] = time_alone((partial(iter, batches), call), host, repeats)
        # Ends its workers.
        del batches
    rows = []
    for name, seconds in times.items():
        row = rate_row(name, workers, batch_size * workers, seconds, times["ours"])
        rows.append(row | {"batch": batch_size})
    return rows


def measure(folder, size, batch_size, workers, device, repeats):
    """Rows for each number of workers."""
    rows = []
    for number in workers:
        if number == 0:
            more = measure_core(folder, size, batch_size, repeats)
        else:
            more = measure_workers(
                folder, size, batch_size, number, device, max(1, repeats // 5)
            )
        for row in more:
            print_row(row)
        rows += more
    return rows


def run(args, device, out):
    """Images a second of a core, and with loader processes."""
    batch_size = (args.batches or [64])[0]
    workers = args.workers
    if workers is None:
        workers = sorted({0, default_workers(device)})
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(folder, max(args.pictures, batch_size), args.pictures)
        files = list(Path(folder, "train", "a").iterdir())
        mean = sum(path.stat().st_size for path in files) / len(files)
        title = f"{machine(device)}; JPEG files of {WIDTH} x {HEIGHT}, "
        title += (
            f"{mean / 1e3:.0f} KB, cropped to {args.size}; without workers CPU time"
        )
        rows = measure(folder, args.size, batch_size, workers, device, args.repeats)
    table(rows, out, "data", title)
