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

Class folders may be nested and may contain symbolic links; no folder is entered twice.
Only regular files with an image suffix count. An image that cannot be decoded, or that
has more than max_pixels pixels, is replaced by the next readable one.

Loader workers decode and crop in 8 bits. A Sample carries the box and the flip of its
crop, and the device normalizes and flips the image and crops its attention map alike.
Every random draw is seeded with what it depends on (attg/seeding.py), so resuming or
changing the number of workers changes nothing. EXIF rotation is ignored, as it is when
maps are made.
"""

import contextlib
import functools
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms.functional import pil_to_tensor

from attg.images import (
    MAX_PIXELS,
    MODES,
    check_pixels,
    eval_view,
    load_image,
    to_8_bits,
    train_view,
)
from attg.seeding import generator_for, seed_for
from attg.toy import TOY_CLASSES, TOY_VARIANTS, toy

# Unreadable images that are reported one by one; further ones are counted.
LINES = 10


class Sample(NamedTuple):
    """One item of a data set. default_collate makes a Sample of batched tensors."""

    # uint8 (C, h, w), RGB or gray, not flipped yet.
    image: torch.Tensor
    # -1 = none.
    label: int
    # Row of the map file. Differs from the requested index if that image is unreadable.
    index: int
    # float32 (4,): x0, y0, x1, y1 of the crop, as fractions of the image's width and
    # height.
    box: torch.Tensor
    # Whether to mirror image and map.
    flip: bool


class Names(Sequence):
    """A list of strings, stored in one array of bytes.

    Forked workers share the parent's memory until someone writes to it, and Python
    writes a reference count whenever a string is read: a list of a million names would
    soon be copied into every worker.
    """

    def __init__(self, names):
        # File names need not be valid UTF-8.
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.offsets = np.cumsum([0, *map(len, encoded)])

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        # range accepts negative indices and raises the IndexError that ends a loop.
        i = range(len(self))[i]
        name = self.text[self.offsets[i] : self.offsets[i + 1]].tobytes()
        return name.decode(errors="surrogateescape")


@dataclass(eq=False)
class ImageData(Dataset):
    """One split of a data set.

    data[epoch, index] is a Sample made by `augment`, if there is one; otherwise, and for
    data[index], by eval_view. An unreadable image is replaced by the next readable one:
    the first few are reported, further ones only counted. ValueError if there is none.
    """

    # Map-style data set of (PIL image, label).
    source: Sequence
    # One name per image: order and identity of the rows of a map file.
    names: Sequence[str]
    # (n,), -1 = none; None if only the source knows the labels.
    known_labels: Sequence[int] | None
    # 0 = no labels; None = the largest label + 1.
    known_classes: int | None
    # The folder that names are relative to, if they are names of files.
    root: Path | None = None
    # uint8 (n, h, w), 1 = object; only the toy set has masks.
    masks: np.ndarray | None = None
    # The view, see open_data.
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
        image, label = check_pair(self.source[i])
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
        if count <= LINES:
            more = "; further ones are only counted" if count == LINES else ""
            message = (
                f"unreadable, the next image replaces it: {self.path(i)} ({error})"
            )
            print(message + more, file=sys.stderr, flush=True)

    @property
    def labelled(self):
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
            source=Subset(self.source, rows.tolist()),
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


def check_pair(pair):
    """(PIL image, label, -1 = none) of an item of a data set, or ValueError."""
    if isinstance(pair, tuple | list) and len(pair) == 2:
        image, label = pair
        if isinstance(image, Image.Image):
            return image, -1 if label is None else int(label)
        pair = image
    raise ValueError(
        f"data: found a {type(pair).__name__}; every [i] must be (PIL image, label), the "
        "label an int or None"
    )


class Pairs(Dataset):
    """Map-style data set of (load(items[i]), labels[i])."""

    def __init__(self, load, items, labels):
        self.load = load
        self.items = items
        self.labels = labels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.load(self.items[i]), self.labels[i]


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
    view = {
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "augment": train_view if augment is True else augment,
        "seed": seed,
        "channels": channels,
        "max_pixels": max_pixels,
    }
    if not isinstance(name, str | os.PathLike):
        check_choice("passed from Python", split, classes, splits=None)
        return open_python(name, split, view)
    name = str(name)
    if name == "toy":
        check_choice(name, split, classes, ("train", "test", *TOY_VARIANTS))
        images, masks, labels = toy(split)
        names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
        source = Pairs(Image.fromarray, images, labels)
        return ImageData(source, names, labels, len(TOY_CLASSES), masks=masks, **view)
    if name in TORCHVISION:
        check_choice(name, split, classes)
        root = Path(root or os.environ.get("ATTG_DATA") or "~/.cache/attg_mae")
        source = open_torchvision(name, split, root.expanduser())
        names = [f"{name}/{split}/{i:06d}" for i in range(len(source))]
        return ImageData(source, names, None, TORCHVISION[name][1], **view)
    # Path.expanduser raises an error for unknown users.
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return open_file(name, path, split, classes, view)
    return open_folder(name, path, split, classes, view)


def check_choice(name, split, classes, splits=("train", "test"), folders=()):
    """ValueError unless --data `name` takes this split and --classes.

    splits: names of its splits, None = any; folders: its class folders, if any.
    """
    if classes and not (folders and Path(classes).is_file()):
        raise ValueError(
            f"--classes {classes}: must be a text file with one class folder per line, "
            f"and --data a folder with train/CLASS/ or CLASS/, not {name}"
        )
    if splits is None or split in splits or (folders and Path(split).is_dir()):
        return
    message = f"split {split!r} of --data {name}: must be one of {', '.join(splits)}"
    if folders:
        message += ", or a folder with the same class folders as train/"
    raise ValueError(message)


def open_python(data, split, view):
    """open_data of a map-style data set, or of a dict of them by split."""
    if not isinstance(data, Mapping):
        data = {"train": data}
    source = data.get(split)
    if source is None and split == "train":
        raise ValueError(f"data: has {list(data)}; one must be named 'train'")
    if source is None:
        return None
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise ValueError(
            f"data: a {type(source).__name__} has no [i] and len(); pass a map-style "
            "data set of (PIL image, label)"
        )
    if not len(source):
        raise ValueError(f"data: the {split} split is empty; it needs an image")
    try:
        first = source[0]
    # Unreadable: it will be replaced.
    except Exception:
        label = 0
    else:
        _, label = check_pair(first)
    labels = getattr(source, "targets", None)
    if labels is not None:
        labels = [-1 if label is None else int(label) for label in labels]
    num_classes = None
    if getattr(source, "classes", None) is not None:
        num_classes = len(source.classes)
    elif labels is None and label < 0:
        num_classes = 0
    names = [f"data/{split}/{i:06d}" for i in range(len(source))]
    return ImageData(source, names, labels, num_classes, **view)


# -- Files and folders -----------------------------------------------------------------

LAYOUTS = (
    "A folder must hold train/CLASS/*.jpg and, for a test split, val/CLASS/*.jpg or "
    "test/CLASS/*.jpg; or CLASS/*.jpg; or images directly, here or in train/ (a flat "
    "folder, for pre-training only)."
)


def files_as_data(folder, names, labels, num_classes, view):
    """ImageData of the files `names`, relative to folder."""
    # The same arrays in both: pickled once, shared by the workers.
    names, labels = Names(names), np.array(labels)
    load = functools.partial(load_from, folder, view["max_pixels"])
    source = Pairs(load, names, labels)
    return ImageData(source, names, labels, num_classes, root=folder, **view)


def load_from(folder, max_pixels, name):
    return load_image(os.path.join(folder, name), max_pixels)


def open_file(name, path, split, classes, view):
    """A single image as a data set of one."""
    check_choice(name, split, classes)
    if not is_image_file(path.name):
        raise ValueError(
            f"--data {name}: not an image file by its name; must end in "
            f"{', '.join(IMG_EXTENSIONS)}"
        )
    if split == "test":
        return None
    return files_as_data(path.parent, [path.name], [-1], 0, view)


def open_folder(name, path, split, classes, view):
    """Class folders or a flat folder of images; None if there is no such split."""
    if not path.is_dir():
        raise ValueError(
            f"--data {name}: neither a folder, an image nor one of toy, "
            f"{', '.join(TORCHVISION)}. {LAYOUTS}"
        )
    train = path / "train" if (path / "train").is_dir() else path
    class_names = find_class_folders(name, train, classes)
    check_choice(name, split, classes, folders=class_names)
    folder = train
    if split == "test":
        candidates = (path / "val", path / "test") if train != path else ()
        folder = next(filter(Path.is_dir, candidates), None)
    elif split != "train":
        candidates = (Path(split, "val"), Path(split, "test"), Path(split))
        folder = next(filter(Path.is_dir, candidates))
    if folder is None:
        return None
    if class_names:
        return open_classes(name, train, class_names, folder, classes, view)
    _, names = list_folder(folder)
    if not names:
        raise ValueError(
            f"--data {name}: {train} is a flat folder of images, but {folder} contains "
            f"none directly. {LAYOUTS}"
        )
    return files_as_data(folder, names, [-1] * len(names), 0, view)


def find_class_folders(name, train, classes):
    """The names of the class folders in the training folder, [] if it is flat."""
    class_names, images = list_folder(train)
    # Without a train folder, val and test are not classes.
    if not images and set(class_names) <= {"val", "test"}:
        raise ValueError(
            f"--data {name}: no class folders and no images in {train}. {LAYOUTS}"
        )
    if not images or classes:
        return class_names
    filled = [c for c, below in walk_images(train, class_names).items() if below]
    if filled:
        raise ValueError(
            f"--data {name}: {train} contains {len(images)} images, such as {images[0]}, "
            f"beside {len(filled)} folders with images, such as {filled[0]}/; move one "
            "or the other elsewhere, or list the class folders in a file for --classes"
        )
    return []


def open_classes(name, train, class_names, folder, classes, view):
    """The class folders in `folder`, in the order and with the labels of ImageFolder.

    class_names: the class folders in train; classes: the file that selects some of them.
    """
    here = all_here = list_folder(folder)[0]
    if classes:
        selected = read_classes(classes, train, class_names)
        class_names = [c for c in class_names if c in selected]
        here = [c for c in here if c in selected]
    if class_names != here:
        odd = sorted(set(class_names) ^ set(here))[:5]
        raise ValueError(
            f"--data {name}: {train} and {folder} hold different classes, {odd} are in "
            "one only; make them equal or list the common ones with --classes"
        )
    below = walk_images(folder, here, skip=set(all_here) - set(here))
    empty = [c for c in here if not below[c]]
    if empty:
        raise ValueError(
            f"--data {name}: no images of the classes {', '.join(empty[:5])} in "
            f"{folder}; remove these folders or list the others with --classes. {LAYOUTS}"
        )
    names = [image for c in here for image in below[c]]
    labels = np.repeat(np.arange(len(here)), [len(below[c]) for c in here])
    return files_as_data(folder, names, labels, len(here), view)


def read_classes(file, train, class_names):
    """The set of class folders listed in a --classes file."""
    # Bytes that are not text give unknown names.
    lines = Path(file).read_text(errors="replace").splitlines()
    selected = {line.strip() for line in lines} - {""}
    unknown = sorted(selected - set(class_names))[:5]
    if not selected or unknown:
        raise ValueError(
            f"--classes {file}: {unknown or 'nothing'} listed, but the folders in "
            f"{train} are {class_names[:5]} ...; list their names, one per line"
        )
    return selected


def inode(path):
    """Identity of a folder, the same through all links to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def inodes_above(folder):
    """Inodes of a folder and all its parents: links to them would lead in circles."""
    real = folder.resolve()
    return {inode(path) for path in (real, *real.parents)}


def list_folder(folder):
    """(class folders, images) directly in a folder: two sorted lists of names.

    Hidden folders and links to the folders above are no classes.
    """
    above = inodes_above(folder)
    folders, images = scan(folder)
    classes = [c for c in folders if c[0] != "." and inode(folder / c) not in above]
    return classes, images


def scan(folder):
    """(folders, images) directly in a folder: two sorted lists of names.

    Only regular files are images: opening a pipe or a device could block for ever.
    """
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a link to itself
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file() and is_image_file(entry.name):
                    images.append(entry.name)
    return sorted(folders), sorted(images)


def walk_images(root, classes, skip=()):
    """{class: paths of the images below root/class}, relative, in ImageFolder's order.

    Links are followed, but no folder is entered twice, and none of the classes `skip`:
    a link cannot lead from one class into another.
    """
    entered = inodes_above(root) | {inode(root / c) for c in skip}
    found = {c: [] for c in classes}
    # Links come last: a folder that is reachable without them keeps its own path.
    queue, links = deque((c, c) for c in classes), deque()
    while queue or links:
        c, folder = (queue or links).popleft()
        if inode(root / folder) in entered:
            continue
        entered.add(inode(root / folder))
        folders, images = scan(root / folder)
        found[c].append((folder, images))
        for name in folders:
            path = f"{folder}/{name}"
            (links if os.path.islink(root / path) else queue).append((c, path))
    paths = {}
    for c in classes:
        paths[c] = [
            f"{folder}/{i}" for folder, images in sorted(found[c]) for i in images
        ]
    return paths


# -- torchvision's data sets -----------------------------------------------------------

# Class in torchvision.datasets, number of classes, folder below the root; then the
# second argument of the class: for each part of the training split, and for the test
# split.
TORCHVISION = {
    "cifar10": ("CIFAR10", 10, "cifar-10-batches-py", [True], False),
    "cifar100": ("CIFAR100", 100, "cifar-100-python", [True], False),
    "flowers102": ("Flowers102", 102, "flowers-102", ["train", "val"], "test"),
    "dtd": ("DTD", 47, "dtd", ["train"], "test"),
    "pets": ("OxfordIIITPet", 37, "oxford-iiit-pet", ["trainval"], "test"),
    "stl10": ("STL10", 10, "stl10_binary", ["train+unlabeled"], "test"),
    "imagenette": ("Imagenette", 10, "imagenette2", ["train"], "val"),
    "stanford_cars": ("StanfordCars", 196, "stanford_cars", ["train"], "test"),
}


def open_torchvision(name, split, root):
    """torchvision's data set of (PIL image, label), downloaded if it is missing."""
    kind, _, folder, train_parts, test_part = TORCHVISION[name]
    if kind in ("Flowers102", "StanfordCars") and find_spec("scipy") is None:
        raise ValueError(
            f"--data {name}: its labels are MATLAB files, and scipy is missing; pip "
            "install scipy"
        )
    dataset = getattr(torchvision.datasets, kind)
    # Rank 0 may have to download, the others wait for it.
    distributed = dist.is_initialized()
    rank0 = not distributed or dist.get_rank() == 0
    opened = []
    try:
        if not rank0:
            dist.barrier()
        for part in train_parts if split == "train" else [test_part]:
            try:
                opened.append(dataset(str(root), part))
            # How torchvision says that files are missing.
            except RuntimeError:
                opened.append(dataset(str(root), part, download=True))
        if distributed and rank0:
            dist.barrier()
    # No network, a full disk, a broken archive, a download that was withdrawn.
    except Exception as error:
        raise ValueError(
            f"--data {name}: not found in {root} and not downloaded "
            f"({type(error).__name__}: {error}); put the files of "
            f"torchvision.datasets.{kind} into {root / folder}, or set ATTG_DATA to the "
            f"folder that contains {folder}"
        ) from error
    return ConcatDataset(opened)


# -- Helpers of training and evaluation ------------------------------------------------


def resolve_dataset(data, name):
    """The argument of open_data: a data set passed from Python, if any, or `name`.

    ValueError if such a data set is named toy, the default: run folders, results and
    checkpoints are identified by the name.
    """
    if data is None:
        return name
    if name == "toy":
        raise ValueError(
            "data: a data set passed from Python needs a name other than toy, for run "
            "folders and results: --data NAME, or Config(data=NAME)"
        )
    return data


def open_labelled(name, tests, size, augment=False, seed=0, **options):
    """Open the training split and the splits `tests`: (train_set, {test: test_set}).

    options: of open_data. All must have labels, or ValueError.
    """
    train_set = open_data(name, "train", size, augment, seed, **options)
    test_sets = {test: open_data(name, test, size, **options) for test in tests}
    from_python = not isinstance(name, str | os.PathLike)
    for dataset in (train_set, *test_sets.values()):
        if not dataset or not dataset.labelled:
            raise ValueError(
                f"--data {'passed from Python' if from_python else name}: needs labelled "
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
