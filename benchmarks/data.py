"""
The data path: decode, crop and collate JPEG files, beside torchvision's pipelines.

This project's loader yields 8-bit crops, which the device flips and normalizes. MAE's
pipeline (RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize) does all of it in
the worker. torchvision's fastest decodes to a tensor and stays in 8 bits, as ours.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import io, transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from attg.datasets import open_data
from attg.loader import ResumableBatchSampler, make_loader
from attg_mae import IMAGENET_MEAN, IMAGENET_STD
from benchmarks.measure import compare, take_turns

CROP = {"scale": (0.2, 1.0), "interpolation": v2.InterpolationMode.BICUBIC}


def write_sets(folder, photographs, count):
    """Write copies of photographs to FOLDER/SET/train/a. Returns {SET: number}.

    As they are, with halved colors (4:2:0), and an eighth enlarged to 12 megapixels.
    """
    sets = {"as they are": count, "4:2:0": count, "12 megapixels": max(1, count // 8)}
    folders = [Path(folder, name, "train", "a") for name in sets]
    for path in folders:
        path.mkdir(parents=True)
    paths = sorted(Path(photographs or "?").rglob("*.[jJ][pP]*[gG]"))
    if not paths:
        raise ValueError(f"--data {photographs}: name a folder of JPEG photographs")
    for i in range(count):
        path = paths[i * len(paths) // count]
        copy, halved, large = (x / f"{i}.jpg" for x in folders)
        shutil.copy(path, copy)
        image = Image.open(path).convert("RGB")
        image.save(halved, quality=90, subsampling="4:2:0")
        if i < sets["12 megapixels"]:
            scale = (12e6 / (image.width * image.height)) ** 0.5
            size = round(scale * image.width), round(scale * image.height)
            image.resize(size).save(large, quality=90)
    return sets


def our_batches(folder, size, batch_size):
    dataset = open_data(folder, "train", size, augment=True)
    batches = ResumableBatchSampler(len(dataset), batch_size, start=0, stop=10**6)
    return iter(make_loader(dataset, batch_sampler=batches))


def torchvision_batches(dataset, batch_size):
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def mae_batches(folder, size, batch_size):
    crop = transforms.RandomResizedCrop(size, **CROP)
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    dataset = ImageFolder(Path(folder, "train"), transforms.Compose(steps))
    return torchvision_batches(dataset, batch_size)


def fastest_batches(folder, size, batch_size):
    def decode(path):
        return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)

    crop = v2.RandomResizedCrop(size, **CROP)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    dataset = ImageFolder(Path(folder, "train"), transform, loader=decode)
    return torchvision_batches(dataset, batch_size)


PIPELINES = {"ours": our_batches, "torchvision's fastest": fastest_batches}
PIPELINES["MAE's"] = mae_batches


def run(settings, device):
    """Rows: CPU time of an image of each set of files in each pipeline."""
    with tempfile.TemporaryDirectory() as parent:
        sets = write_sets(parent, settings.data, settings.batch_size)
        for name, count in sets.items():
            calls = {}
            for pipeline, open_batches in PIPELINES.items():
                batches = open_batches(Path(parent, name), settings.size, count)
                calls[pipeline] = partial(next, batches)
            times = take_turns(calls, torch.device("cpu"), settings.repeats)
            for pipeline, columns in compare(times, count).items():
                case = {"files": name, "pipeline": pipeline}
                yield case | {"img/s": 1e3 / columns["ms"]} | columns
