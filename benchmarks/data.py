"""
The data path: decode, crop and collate JPEG files of ImageNet's size, beside
torchvision's pipelines.

Workers of this project return 8-bit crops, which the device flips and normalizes. MAE's
pipeline (RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize) does all of it in
the worker. torchvision's v2 in 8 bits does as much as ours, and the flip.
"""

import tempfile
import time
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
from attg.images import load_image
from attg.loader import ResumableBatchSampler, make_loader
from attg_mae import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.measure import (
    machine,
    percentiles,
    print_row,
    quiet_clock,
    table,
    take_turns,
)

# The most frequent size of ImageNet's images; they have 110 KB on average.
WIDTH, HEIGHT, QUALITY = 500, 375, 92


# -- Images --------------------------------------------------------------------------


def random_image(seed, width, height):
    """Random smooth shapes with fine grain, uint8 (height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, height, width)
    # The last two make the files as large as those of photographs.
    for cell, contrast in ((128, 60), (64, 30), (32, 15), (16, 8), (4, 12), (2, 28)):
        coarse = torch.randn(
            1, 3, height // cell + 2, width // cell + 2, generator=generator
        )
        x += contrast * F.interpolate(coarse, (height, width), mode="bicubic")
    x = (x[0] + 128).clamp(0, 255).byte()
    return x.permute(1, 2, 0).numpy()


def write_images(folder, count, different=64, width=WIDTH, height=HEIGHT):
    """Write JPEG files FOLDER/train/a/NNNNNN.jpg, every second one upright.

    Only `different` of them differ, to save time.
    """
    target = Path(folder, "train", "a")
    target.mkdir(parents=True)
    files = []
    for i in range(min(count, different)):
        size = (width, height) if i % 2 == 0 else (height, width)
        path = target / f"{i:06d}.jpg"
        Image.fromarray(random_image(i, *size)).save(path, quality=QUALITY)
        files.append(path.read_bytes())
    for i in range(different, count):
        (target / f"{i:06d}.jpg").write_bytes(files[i % different])


# -- Pipelines: endless iterators of batches -------------------------------------------


def our_batches(folder, size, batch_size, workers):
    dataset = open_data(folder, "train", size, augment=True)
    batches = ResumableBatchSampler(len(dataset), batch_size, start=0, stop=10**6)
    return iter(make_loader(dataset, workers=workers, batch_sampler=batches))


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


BICUBIC = v2.InterpolationMode.BICUBIC


def mae_transform(size):
    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC)
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    flip = transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, flip, transforms.ToTensor(), normalize])


def v2_transform(size):
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC)
    return v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip()])


def decoded_batches(folder, size, batch_size, workers):
    """Batches of decoded images, the part that every pipeline has."""
    root = Path(folder, "train", "a")
    paths = sorted(root.iterdir())
    i = 0
    while True:
        batch = []
        for _ in range(batch_size):
            image = load_image(paths[i % len(paths)])
            batch.append(np.asarray(image.convert("RGB")))
            i += 1
        yield batch


PIPELINES = {
    "ours": our_batches,
    "torchvision, MAE's": partial(torchvision_batches, mae_transform),
    "torchvision v2, 8 bits": partial(torchvision_batches, v2_transform),
    "decoding alone": decoded_batches,
}


# -- The table -------------------------------------------------------------------------


def measure(folder, size, batch_size, workers, repeats):
    """Rows of all pipelines, alternating; with workers a call takes a batch of each."""
    names = list(PIPELINES) if workers == 0 else ["ours", "torchvision, MAE's"]
    count = max(1, workers)

    def take(batches):
        for _ in range(count):
            next(batches)

    calls = {}
    for name in names:
        batches = PIPELINES[name](folder, size, batch_size, workers)
        if workers:
            # Use up the prefetched batches.
            take(batches)
            take(batches)
        calls[name] = (partial(iter, batches), take)
    clock = quiet_clock() if workers == 0 else time.perf_counter
    times = take_turns(calls, torch.device("cpu"), repeats, clock)
    base, rows = percentiles(times["ours"])[0], []
    for name, seconds in times.items():
        median, p20, p80 = percentiles(seconds)
        images = 1e3 * count * batch_size
        row = {"pipeline": name, "workers": workers, "batch": batch_size}
        row |= {"img/s": images / median, "p20": images / p80, "p80": images / p20}
        rows.append(row | {"x ours": base / median})
        print_row(rows[-1])
    return rows


def run(args, device, out):
    """Measure images per second of one core, and with loader workers."""
    batch_size = (args.batches or [64])[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, max(args.files, batch_size), args.files)
        sizes = [path.stat().st_size for path in Path(folder, "train", "a").iterdir()]
        rows = []
        for workers in args.workers:
            repeats = max(1, args.repeats // 5) if workers else args.repeats
            rows += measure(folder, args.size, batch_size, workers, repeats)
    torch.set_num_threads(threads)
    title = f"{machine(device)}; JPEG files of {WIDTH} x {HEIGHT}, "
    title += f"{sum(sizes) / len(sizes) / 1e3:.0f} KB, cropped to {args.size}; "
    title += "CPU time of one core without workers, else wall time"
    table(rows, out, "data", title)
