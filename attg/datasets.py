"""
Data sets: everything that --data accepts, as indexed samples of 8-bit images.

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    sample = train[epoch, index]    # a random crop, a function of (seed, epoch, index)
    sample = train[index]           # the evaluation view: whole image or center crop
    image, label, index, box, flip = sample

Values of --data:
    toy
        generated in seconds, no download; see attg/toy.py
    cifar10 cifar100 flowers102 dtd pets stl10 imagenette stanford_cars
        torchvision's data sets, downloaded to $ATTG_DATA (default ~/.cache/attg_mae);
        stanford_cars must be there already. flowers102 trains on train + val, stl10 on
        train + unlabeled
    DIR with train/CLASS/*.jpg
        class folders; the test split is val/CLASS/ or, without val/, test/CLASS/
    DIR with CLASS/*.jpg
        torchvision's ImageFolder layout, without a test split
    DIR with images, or with images in train/
        a flat folder without labels, for pre-training only
    FILE
        a single image
From Python, also any map-style data set of (PIL image, label), see open_data.

Loader workers decode and crop in 8 bits. A Sample carries the box and the flip of its
crop: the device normalizes and flips the image, and crops its attention map alike.
Random draws are functions of (seed, epoch, index), so resuming, or another number of
workers, changes nothing. EXIF rotation is ignored, as it is when maps are made.
"""

import functools
import hashlib
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from attg.images import (
    MAX_PIXELS,
    MODES,
    check_pixels,
    eval_view,
    to_8_bits,
    train_view,
)
from attg.seeding import generator_for, seed_for
from attg.sources import Names, check_pair, open_source

# Unreadable images that are reported one by one; further ones are counted.
MAX_REPORTED = 10


class Sample(NamedTuple):
    """One item of a data set. default_collate makes a Sample of batched tensors."""

    image: torch.Tensor  # uint8 (C, h, w), RGB or gray, not flipped yet
    label: int  # -1 = none
    index: int  # row of the map file; the next readable one if the image is unreadable
    box: torch.Tensor  # float32 (4,): x0, y0, x1, y1 in fractions of width and height
    flip: bool  # whether to mirror image and map


@dataclass(eq=False)
class ImageData(Dataset):
    """One split of a data set.

    data[epoch, index] is a Sample made by `augment`, if there is one; otherwise, and for
    data[index], by eval_view. An unreadable image is replaced by the next readable one:
    the first few are reported, further ones only counted. ValueError if there is none.
    """

    pairs: Sequence  # of (PIL image, label): any map-style data set
    names: Sequence[str]  # one per image: order and identity of the rows of a map file
    known_labels: Sequence[int] | None  # None: only the source knows them
    known_classes: int | None  # 0 = no labels; None = the largest label + 1
    root: Path | None = None  # the folder of the images, if names are names of files
    masks: np.ndarray | None = None  # of toy alone: uint8 (n, h, w), 1 = object
    # See open_data.
    size: tuple[int, int] = (32, 32)
    augment: Callable | None = None
    seed: int = 0
    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if not isinstance(self.names, Names):
            self.names = Names(self.names)
        # Shared memory: what a worker marks, its parent and the other workers see.
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, requested = key if isinstance(key, tuple) else (None, key)
        # The IndexError of an index too large ends `for sample in data`.
        requested = range(len(self))[requested]
        index, image, label = self.decode(requested)
        if self.augment and epoch is not None:
            seed = seed_for("crop", self.seed, epoch, requested)
            image, box, flip = self.augment(image, self.size, seed)
        else:
            image, box, flip = eval_view(image, self.size)
        return Sample(pil_to_tensor(image), label, index, torch.tensor(box), flip)

    def decode(self, start):
        """(index, 8-bit PIL image, label) of the first readable image from start on."""
        first = None
        for step in range(len(self)):
            index = (start + step) % len(self)
            try:
                image, label = self.read(index)
                return index, to_8_bits(image, MODES[self.channels]), label
            # Decoders raise OSError, SyntaxError, ValueError and others.
            except Exception as error:
                first = first or f"{self.path(index)} ({error})"
                self.report_unreadable(index, error)
        raise ValueError(
            f"--data: none of the {len(self)} images can be decoded, the first is "
            f"{first}; repair them or choose another folder"
        )

    def read(self, i):
        """(PIL image of any mode, label) of image i. Raises what its decoder raises."""
        image, label = check_pair(self.pairs[i])
        check_pixels(image, self.max_pixels)
        return image, label

    def path(self, i):
        """The path of image i, or its name if it is not a file."""
        return os.path.join(self.root or "", self.names[i])

    def report_unreadable(self, i, error):
        """Mark image i, and report it once in all workers of this rank."""
        if self.unreadable[i]:
            return
        self.unreadable[i] = True
        count = int(self.unreadable.sum())
        if count <= MAX_REPORTED:
            more = "; further ones are only counted" if count == MAX_REPORTED else ""
            print(
                f"unreadable, the next image replaces it: {self.path(i)} ({error}){more}",
                file=sys.stderr,
                flush=True,
            )

    @property
    def labeled(self):
        """Whether there are labels. Single images may still have none, as in stl10."""
        return self.known_classes != 0

    @functools.cached_property
    def num_classes(self):
        if self.known_classes is not None:
            return self.known_classes
        return int(self.labels.max()) + 1

    @functools.cached_property
    def labels(self):
        """int64 (n,), -1 = none. Some data sets have to be read once to find them."""
        labels = self.known_labels
        if labels is None:
            labels = [self.read_label(i) for i in range(len(self))]
        return torch.as_tensor(labels, dtype=torch.int64)

    def read_label(self, i):
        try:
            return self.read(i)[1]
        except Exception as error:
            self.report_unreadable(i, error)
            return -1

    def subset(self, rows):
        """The images of these rows, an int tensor (m,), as another ImageData."""
        return replace(
            self,
            # An array gives Python ints, as users' data sets may expect, in little memory.
            pairs=Subset(self.pairs, array("q", rows.tolist())),
            names=[self.names[i] for i in rows],
            known_labels=self.labels[rows].numpy(),
            known_classes=self.num_classes,
            masks=None if self.masks is None else self.masks[rows.numpy()],
        )

    def file_sizes(self):
        """Sizes in bytes, as strings; none if the images are not files."""
        if self.root is None:
            return []
        return [str(os.stat(self.path(i)).st_size) for i in range(len(self))]

    @functools.cached_property
    def fingerprint(self):
        """Identity of the data set in map files: "v2:" and a sha256.

        The hash is over the version, the number of images, their names and, if they are
        files, their sizes. Another version takes another prefix.
        """
        number = str(len(self))
        return "v2:" + sha256_of(["v2", number, *self.names, *self.file_sizes()])

    def matches(self, fingerprint):
        """How the fingerprint stored in a map file fits this data set.

        "exact"; "names" for the oldest map files, which did not record file sizes; or
        None for other data.
        """
        if fingerprint == self.fingerprint:
            return "exact"
        # Before v2 there was no prefix, and at first there were no sizes.
        names_only = sha256_of([str(len(self)), *self.names])
        sizes = self.file_sizes()
        if sizes and fingerprint == names_only:
            return "names"
        with_sizes = sha256_of([names_only, *sizes]) if sizes else names_only
        return "exact" if fingerprint == with_sizes else None


def sha256_of(strings):
    text = "\0".join(strings)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


# -- Opening a data set ----------------------------------------------------------------


def open_data(
    name,
    split="train",
    size=32,
    augment=False,
    seed=0,
    classes=None,
    root=None,
    channels=3,
    max_pixels=MAX_PIXELS,
):
    """Open one split of a data set: ImageData, or None if there is no such split.

        name        a value of --data, see the top of this file; or a map-style data set
                    of (PIL image, label), or a dict {"train": ..., "test": ...} of them
        split       "train" or "test"; for toy also one of TOY_VARIANTS; for class
                    folders also another folder of the same classes: DIR/CLASS/,
                    DIR/val/CLASS/ or DIR/test/CLASS/
        size        of the samples in pixels, int or (h, w)
        augment     True = random crop and flip for keys (epoch, index); or another
                    function (PIL image, size, seed) -> (PIL image, box, flip)
        classes     --classes: a text file with the class folders to keep, one per line
        root        folder of torchvision's data sets
        channels    3 = RGB, 1 = gray
        max_pixels  images with more pixels are treated as unreadable

    A label from Python is an int, or -1 or None for no label. Attributes `targets` (all
    labels) and `classes`, as in torchvision, spare a pass over the images.

    ValueError names --data or --classes, the value and the remedy.
    """
    if channels not in MODES:
        raise ValueError(f"--in_chans {channels}: must be 3 (RGB) or 1 (gray)")
    opened = open_source(name, split, classes, root, max_pixels)
    if opened is None:
        return None
    return ImageData(
        *opened,
        size=(size, size) if isinstance(size, int) else tuple(size),
        augment=train_view if augment is True else augment,
        seed=seed,
        channels=channels,
        max_pixels=max_pixels,
    )


# -- Helpers of training and evaluation ------------------------------------------------


def resolve_dataset(data, name):
    """The first argument of open_data: a data set passed from Python, if any, or `name`.

    ValueError if such a data set is named toy, the default: run folders and results are
    identified by the name.
    """
    if data is not None and name == "toy":
        raise ValueError(
            "data: a data set passed from Python needs a name other than toy: --data "
            "NAME, or Config(data=NAME)"
        )
    return name if data is None else data


def open_labeled(name, tests, size, augment=False, seed=0, **options):
    """Open the training split and the splits `tests`: (train_set, {test: test_set}).

    options: of open_data. All must have labels, or ValueError.
    """
    train_set = open_data(name, "train", size, augment, seed, **options)
    test_sets = {test: open_data(name, test, size, **options) for test in tests}
    from_python = not isinstance(name, str | os.PathLike)
    for dataset in (train_set, *test_sets.values()):
        if not dataset or not dataset.labeled:
            raise ValueError(
                f"--data {'passed from Python' if from_python else name}: needs labeled "
                "images, train/CLASS and val/CLASS or test/CLASS, or another folder of "
                "the same classes for --val"
            )
    # Most training images of stl10 have no labels; some of a user's data may not.
    if from_python or name == "stl10":
        train_set = train_set.subset((train_set.labels >= 0).nonzero().flatten())
    return train_set, test_sets


def max_unreadable(number):
    """Maximum number of unreadable images tolerated: 1 %, and at least one."""
    return max(1, number / 100)


def refuse_unreadable(dataset):
    """ValueError if more images are unreadable than max_unreadable allows.

    Collective: all ranks call it at once.
    """
    rows = dataset.unreadable.nonzero().flatten().tolist()
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        rows = sorted(set().union(*parts))
    if len(rows) > max_unreadable(len(dataset)):
        raise ValueError(
            f"--data: {len(rows)} of {len(dataset)} images are unreadable, over 1 %; "
            f"repair or remove them, the first is {dataset.path(rows[0])}"
        )


def shot_indices(labels, shots, seed):
    """Draw a few images of each class: int64 indices (m,) into labels (n,).

    shots: images per class if an int, a fraction (at least one image) if a float. A
    class that has fewer gives all it has. The draw depends on labels, shots and seed
    alone; fewer shots are a subset of more. ValueError for less than one shot, and for
    a class without images.
    """
    counts = labels[labels >= 0].bincount().tolist()
    if not shots > 0 or not counts or (isinstance(shots, int) and 0 in counts):
        empty = [c for c, count in enumerate(counts) if count == 0]
        raise ValueError(
            f"--shots {shots} of {len(counts)} classes: must be above 0, and every class "
            f"needs an image; without one are {empty[:5]}"
        )
    chosen = []
    for c, available in enumerate(counts):
        count = shots
        if isinstance(shots, float):
            count = max(1, round(shots * available))
        members = (labels == c).nonzero().flatten()
        # The order is the same for any number of shots.
        generator = generator_for("shots", seed, c)
        order = torch.randperm(available, generator=generator)
        chosen.append(members[order[:count]])
    return torch.cat(chosen)
