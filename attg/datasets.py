"""
Data sets: everything that --data accepts, as indexed samples of 8-bit images.

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    sample = train[epoch, index]    # a random crop, a function of (seed, epoch, index)
    sample = train[index]           # the evaluation view: whole image or center crop
    image, label, index, box, flip = sample

docs/data.md lists the values of --data.

Loader workers decode and crop in 8 bits. A Sample carries the box and the flip of its
crop: the device normalizes and flips the image, and crops its attention map alike.
Random draws are functions of (seed, epoch, index), so resuming, or another number of
workers, changes nothing. EXIF rotation is ignored, as it is when maps are made.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from attg.images import (
    MAX_PIXELS,
    MODES,
    ImageData,
    check_pair,
    generator_for,
    train_view,
)
from attg.sources import (
    LAYOUTS,
    TORCHVISION,
    check_split,
    find_images,
    open_torchvision,
)
from attg.toy import TOY_CLASSES, toy

# -- Opening a data set ----------------------------------------------------------------


def open_data(
    name,
    split="train",
    size=32,
    augment=False,
    seed=0,
    classes=None,
    channels=3,
    max_pixels=MAX_PIXELS,
):
    """Open one split of a data set: ImageData, or None if there is no such split.

        name        a value of --data, see docs/data.md; or a map-style data set
                    of (PIL image, label), or a dict {"train": ..., "test": ...} of them
        split       "train" or "test"; for toy also one of TOY_VARIANTS; for class
                    folders also another folder of the same classes: DIR/CLASS/,
                    DIR/val/CLASS/ or DIR/test/CLASS/
        size        of the samples in pixels, int or (h, w)
        augment     True = random crop and flip for keys (epoch, index); or another
                    function (PIL image, size, seed) -> (PIL image, box, flip)
        classes     --classes: a text file with the class folders to keep, one per line
        channels    3 = RGB, 1 = gray
        max_pixels  images with more pixels are treated as unreadable

    A label from Python is an int, or -1 or None for no label. Attributes `targets` (all
    labels) and `classes`, as in torchvision, spare a pass over the images.

    ValueError names --data or --classes, the value and the remedy.
    """
    if channels not in MODES:
        raise ValueError(f"--in_chans {channels}: must be 3 (RGB) or 1 (gray)")
    opened = open_source(name, split, classes)
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


def open_source(name, split, classes):
    """Find one split, see open_data: the first fields of ImageData; None if there is none."""
    named = isinstance(name, str | os.PathLike)
    if classes and not (named and os.path.isdir(os.path.expanduser(name))):
        raise ValueError(f"--classes {classes}: only for a folder of class folders")
    if classes and not os.path.isfile(classes):
        raise ValueError(f"--classes {classes}: must be a text file, one class a line")
    if not named:
        return open_python(name, split)
    name = str(name)
    if name == "toy":
        images, masks, labels = toy(split)
        names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
        pairs = list(zip(map(Image.fromarray, images), labels, strict=True))
        return pairs, names, labels, len(TOY_CLASSES), None, masks
    if name in TORCHVISION:
        check_split(name, split)
        root = os.environ.get("ATTG_DATA") or "~/.cache/attg_mae"
        pairs = open_torchvision(name, split, Path(root).expanduser())
        names = [f"{name}/{split}/{i:06d}" for i in range(len(pairs))]
        return pairs, names, None, TORCHVISION[name][1]
    # Path.expanduser raises an error for unknown users.
    path = Path(os.path.expanduser(name))
    if not path.exists():
        raise ValueError(
            f"--data {name}: neither a folder, an image nor one of toy, "
            f"{', '.join(TORCHVISION)}. {LAYOUTS}"
        )
    found = find_images(path, split, classes)
    if found is None:
        return None
    folder, names, labels = found
    return None, names, labels, int(labels.max()) + 1, folder


def open_python(data, split):
    """open_source for a map-style data set, or a dict of them by split."""
    if not isinstance(data, Mapping):
        data = {"train": data}
    source = data.get(split)
    if source is None and split != "train":
        return None
    map_style = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if not map_style or not len(source):
        raise ValueError(
            f"data: the {split} split is a {type(source).__name__} without images; must "
            "be a map-style data set, with [i] and len(), of (PIL image, label), or a "
            'dict {"train": ..., "test": ...} of them'
        )
    try:
        first = source[0]
    # Unreadable: it will be replaced.
    except Exception:
        first = None
    label = 0 if first is None else check_pair(first)[1]
    labels = getattr(source, "targets", None)
    if labels is not None:
        labels = [-1 if label is None else int(label) for label in labels]
    num_classes = None
    if getattr(source, "classes", None) is not None:
        num_classes = len(source.classes)
    elif labels is None and label < 0:
        num_classes = 0
    names = [f"data/{split}/{i:06d}" for i in range(len(source))]
    return source, names, labels, num_classes


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


def refuse_unreadable(dataset):
    """ValueError if more images are unreadable than dataset.max_unreadable.

    Collective: all ranks call it at once.
    """
    rows = dataset.unreadable.nonzero().flatten().tolist()
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        rows = sorted(set().union(*parts))
    if len(rows) > dataset.max_unreadable:
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
        fraction = isinstance(shots, float)
        count = max(1, round(shots * available)) if fraction else shots
        members = (labels == c).nonzero().flatten()
        # The order is the same for any number of shots.
        generator = generator_for("shots", seed, c)
        order = torch.randperm(available, generator=generator)
        chosen.append(members[order[:count]])
    return torch.cat(chosen)
