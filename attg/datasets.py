"""
Data sets: what a training step or an evaluation sees of a picture, and in what order.

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    sample = train[epoch, index]    # a random crop, a function of seed, epoch and index
    sample = train[index]           # the whole picture or its centre, for evaluation
    image, label, index, box, flip = sample

    steps = ResumableBatchSampler(len(train), batch_size=256, start=0, stop=1000)
    for batch in make_loader(train, workers=2, batch_sampler=steps):
        ...                         # a Sample of tensors for each step of the whole run

What --data accepts (the `name` of open_data):
    toy
        generated in seconds, no download; see attg/toy.py
    cifar10 cifar100 flowers102 dtd pets stl10 imagenette stanford_cars
        torchvision's, downloaded to $ATTG_DATA (default ~/.cache/attg_mae), except
        stanford_cars, which has to be there. flowers102 trains on train and val, stl10
        on train and unlabeled
    PATH with train/CLASS/*.jpg
        a folder for each class; the test split lies in val/CLASS/ or test/CLASS/, val/
        goes first
    PATH with CLASS/*.jpg
        what torchvision calls an ImageFolder; there is no test split
    PATH with pictures in it, or in PATH/train/
        a flat folder without labels, for pre-training only
    PATH of a picture
        a data set of one

In Python it may also be a data set of your own, see open_data and docs/data.md.

In all folders only regular files count whose names end as those of pictures do. A class
may have folders within folders; links are followed, but no folder is entered twice. A
file that cannot be decoded, or has more than max_pixels pixels, is replaced by the next.

The workers decode and crop, in 8 bits. A Sample carries the box of its crop and the
coin of its flip: the device normalizes and flips the image, and crops the attention map
of the picture (attg/maps.py) with the same box.

No random state is kept. Every draw is seeded with what it depends on (seed_for), so a
run that is continued, or that has other workers, sees the same. EXIF rotation is
ignored, here as in the making of maps.
"""

import functools
import hashlib
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms.functional import pil_to_tensor

from attg.images import (
    MAX_PIXELS,
    MODES,
    check_image,
    check_pixels,
    eval_view,
    load_image,
    to_8_bits,
    train_view,
)
from attg.seeding import generator_for, seed_for
from attg.toy import TOY_CLASSES, TOY_VARIANTS, toy

# Pictures that get a line of their own when they cannot be read.
LINES = 10


# -- One picture -----------------------------------------------------------------------


class Sample(NamedTuple):
    """What a data set yields; default_collate makes one Sample of batched tensors."""

    # uint8 (C, h, w), RGB or grey, not flipped yet.
    image: torch.Tensor
    # -1 = none.
    label: int
    # Row of the map file. It differs from the index asked for where that file could not
    # be decoded.
    index: int
    # float32 (4,): x0, y0, x1, y1 of the region seen, as fractions of the picture's
    # width and height.
    box: torch.Tensor
    # Whether image and map are to be mirrored.
    flip: bool


# ImageData.read is one of these with all arguments but the last bound by
# functools.partial, which can be sent to workers, unlike a lambda.


def read_file(root, names, labels, max_pixels, i):
    return load_image(os.path.join(root, names[i]), max_pixels), labels[i]


def read_array(images, labels, i):
    return Image.fromarray(images[i]), labels[i]


def read_pair(source, max_pixels, i):
    picture, label = source[i]
    check_image(picture)
    check_pixels(picture, max_pixels)
    return picture, as_label(label)


def read_row(read, rows, i):
    return read(int(rows[i]))


def as_label(label):
    return -1 if label is None else int(label)


# -- Data sets -------------------------------------------------------------------------


class Names(Sequence):
    """Strings in one array of bytes.

    Workers are copies of the main process that share its memory until it is written to,
    and Python writes to a string, to count its uses, whenever it is looked at: a list
    of a million names soon has a copy in each worker.
    """

    def __init__(self, names):
        # Names of files need not be valid UTF-8.
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        # Where each begins, and where the last one ends.
        lengths = [0, *map(len, encoded)]
        self.bounds = np.cumsum(lengths)

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, i):
        # Accepts negative numbers; the IndexError of one too large ends a loop.
        i = range(len(self))[i]
        name = self.text[self.bounds[i] : self.bounds[i + 1]].tobytes()
        return name.decode(errors="surrogateescape")


class ImageData(Dataset):
    """One split of a data set.

    data[epoch, index] is the augmented Sample if `augment`: train_view's if it is True,
    or that of another function of (picture, size, seed). Otherwise, and for
    data[index], it is eval_view's.

    A picture that cannot be decoded is replaced by the next one that can. The first few
    are named in a line each, further ones are counted. ValueError if none can.
    """

    def __init__(
        self,
        read,
        names,
        num_classes,
        size,
        augment=False,
        seed=0,
        masks=None,
        labels=None,
        root=None,
        channels=3,
    ):
        # read(i) -> (PIL picture, label)
        self.read = read
        # One per picture: order and identity of the map file's rows.
        self.names = names if isinstance(names, Names) else Names(names)
        # The folder in which the names are those of files, or None.
        self.root = root
        # 0 = no labels. In stl10 most pictures have none (-1) all the same. None: one
        # more than the largest label.
        if num_classes is not None:
            self.num_classes = num_classes
        self.labelled = num_classes != 0
        # Only the toy set has them: uint8 (n, 32, 32), 1 = object.
        self.masks = masks
        # (n,), or None where only read() tells them.
        self.known = labels
        # (h, w) of the images.
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.augment = train_view if augment is True else augment
        self.seed = seed
        self.mode = MODES[channels]
        # Which pictures could not be read. Workers write to the same memory.
        self.unreadable = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    @functools.cached_property
    def num_classes(self):
        return int(self.labels.max()) + 1

    @functools.cached_property
    def fingerprint(self):
        """sha256 over the number of pictures, their names and, of files, their sizes."""
        if self.root is None:
            return self.names_fingerprint
        words = [self.names_fingerprint]
        for i in range(len(self)):
            words.append(str(os.stat(self.path(i)).st_size))
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    @functools.cached_property
    def names_fingerprint(self):
        """Without the sizes, as it was in older map files."""
        words = "\0".join([str(len(self)), *self.names])
        return hashlib.sha256(words.encode(errors="surrogateescape")).hexdigest()

    @functools.cached_property
    def labels(self):
        """int64 (n,), -1 = none. Some sets have to be read for them, once."""
        labels = self.known
        if labels is None:
            labels = [self.read_label(i) for i in range(len(self))]
        return torch.as_tensor(labels, dtype=torch.int64)

    def read_label(self, i):
        """The label of picture i; none if the picture cannot be read."""
        try:
            return self.read(i)[1]
        except Exception as error:
            self.tell(i, error)
            return -1

    def subset(self, rows):
        """These rows, a tensor (m,), as a data set of its own."""
        labels = self.labels[rows].numpy()
        rows = rows.numpy()
        masks = None
        if self.masks is not None:
            masks = self.masks[rows]
        return ImageData(
            functools.partial(read_row, self.read, rows),
            [self.names[i] for i in rows],
            self.num_classes,
            self.size,
            self.augment,
            self.seed,
            masks,
            labels,
            self.root,
            len(self.mode),
        )

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, asked = key if isinstance(key, tuple) else (None, key)
        # The IndexError of an index too large ends `for sample in data`.
        asked = range(len(self))[asked]
        index, picture, label = self.decode(asked)
        if self.augment and epoch is not None:
            seed = seed_for("crop", self.seed, epoch, asked)
            image, box, flip = self.augment(picture, self.size, seed)
        else:
            image, box, flip = eval_view(picture, self.size)
        return Sample(pil_to_tensor(image), int(label), index, torch.tensor(box), flip)

    def decode(self, start):
        """(index, 8-bit picture, label) of `start` or the next that can be decoded."""
        first = None
        for step in range(len(self)):
            index = (start + step) % len(self)
            try:
                picture, label = self.read(index)
                return index, to_8_bits(picture, self.mode), label
            # Decoders raise OSError, SyntaxError, ValueError and others.
            except Exception as error:
                first = first or f"{self.path(index)} ({error})"
                self.tell(index, error)
        raise ValueError(
            f"--data: none of the {len(self)} pictures can be decoded, not {first}"
        )

    def path(self, i):
        """What to call picture i: its file, or its name where there is none."""
        return os.path.join(self.root or "", self.names[i])

    def tell(self, i, error):
        """Says once, in whichever process, that picture i cannot be read."""
        if self.unreadable[i]:
            return
        self.unreadable[i] = True
        count = int(self.unreadable.sum())
        line = f"unreadable, the next picture replaces it: {self.path(i)} ({error})"
        if count == LINES:
            line += "; further ones are only counted"
        if count > LINES:
            # At 20, 40, 80 ...
            doublings, rest = divmod(count, LINES)
            if rest or doublings.bit_count() > 1:
                return
            line = f"unreadable so far: {count} of {len(self)} pictures"
        print(line, file=sys.stderr, flush=True)


class TorchvisionSet(NamedTuple):
    """How torchvision spells a data set."""

    # Class in torchvision.datasets.
    kind: str
    # Number of labels.
    classes: int
    # Its folder under the root.
    folder: str
    # Arguments of `kind`, for each part that the split is made of.
    train: list
    test: list


TORCHVISION = {
    "cifar10": TorchvisionSet(
        kind="CIFAR10",
        classes=10,
        folder="cifar-10-batches-py",
        train=[{"train": True}],
        test=[{"train": False}],
    ),
    "cifar100": TorchvisionSet(
        kind="CIFAR100",
        classes=100,
        folder="cifar-100-python",
        train=[{"train": True}],
        test=[{"train": False}],
    ),
    "flowers102": TorchvisionSet(
        kind="Flowers102",
        classes=102,
        folder="flowers-102",
        train=[{"split": "train"}, {"split": "val"}],
        test=[{"split": "test"}],
    ),
    "dtd": TorchvisionSet(
        kind="DTD",
        classes=47,
        folder="dtd",
        train=[{"split": "train"}],
        test=[{"split": "test"}],
    ),
    "pets": TorchvisionSet(
        kind="OxfordIIITPet",
        classes=37,
        folder="oxford-iiit-pet",
        train=[{"split": "trainval"}],
        test=[{"split": "test"}],
    ),
    "stl10": TorchvisionSet(
        kind="STL10",
        classes=10,
        folder="stl10_binary",
        train=[{"split": "train+unlabeled"}],
        test=[{"split": "test"}],
    ),
    "imagenette": TorchvisionSet(
        kind="Imagenette",
        classes=10,
        folder="imagenette2",
        train=[{"split": "train"}],
        test=[{"split": "val"}],
    ),
    "stanford_cars": TorchvisionSet(
        kind="StanfordCars",
        classes=196,
        folder="stanford_cars",
        train=[{"split": "train"}],
        test=[{"split": "test"}],
    ),
}

LAYOUTS = (
    "A folder must hold train/CLASS/*.jpg and, for a test split, val/CLASS/*.jpg or "
    "test/CLASS/*.jpg; or CLASS/*.jpg; or pictures directly, here or in train/ (a flat "
    "folder, for pre-training only)."
)


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
    """One split of what --data names; None if there is no such split.

        name        see the top of this file; or a map-style data set of (PIL picture,
                    label) for training, or a dict {"train": one, "test": another}
        split       "train" or "test"; for toy also one of TOY_VARIANTS; for a folder
                    with classes also another folder of the same classes: DIR/CLASS/,
                    DIR/val/CLASS/ or DIR/test/CLASS/
        size        pixels, int or (h, w)
        augment     random crop and flip for keys (epoch, index), or a function instead;
                    see ImageData
        classes     --classes: a text file, one class folder a line; only these are kept
        root        where torchvision's sets lie, or are downloaded to
        channels    3 for RGB, 1 for grey
        max_pixels  a picture with more is unreadable

    Labels of a data set of one's own are ints, -1 or None = none. They are read from its
    attribute `targets` where it has one, else, if they are needed ahead, by a pass over
    the pictures; the number of classes is that of its `classes`, or their largest + 1.

    ValueError names --data or --classes, what is wrong and the remedy.
    """
    if channels not in MODES:
        raise ValueError(
            f"--in_chans {channels}: pictures are read as RGB, 3 channels, or as grey, 1"
        )
    view = {"size": size, "augment": augment, "seed": seed, "channels": channels}
    if not isinstance(name, str | os.PathLike):
        check_classes("a data set of your own", classes)
        return open_own(name, split, max_pixels, view)
    name = str(name)
    if name == "toy" or name in TORCHVISION:
        check_split(name, split)
        check_classes(name, classes)
        if name == "toy":
            return open_toy(split, view)
        return open_known(name, split, root, view)

    return open_files(name, split, classes, max_pixels, view)


def open_files(name, split, classes, max_pixels, view):
    """open_data of a folder or a picture."""
    # Path.expanduser raises an error for unknown users.
    path = Path(os.path.expanduser(name))
    found, listed = [], None
    if path.is_file():
        listed = list_one(name, path, split)
    else:
        folder, found = find_layout(name, path, classes)
    check_split(name, split, found)
    check_classes(name, classes, found)
    if found:
        listed = list_classes(path, folder, split, found, classes)
    elif path.is_dir():
        listed = list_flat(path, folder, split)
    if listed is None:
        return None

    labels = np.array(listed.labels)
    names = Names(listed.names)
    read = functools.partial(read_file, listed.folder, names, labels, max_pixels)
    view |= {"labels": labels, "root": listed.folder}
    return ImageData(read, names, listed.num_classes, **view)


class Listed(NamedTuple):
    """The pictures of a split on the disk."""

    folder: Path
    # Relative to it, with the same slashes on every system: maps are matched by them.
    names: list
    labels: list
    num_classes: int


def check_split(name, split, found=()):
    """found: the class folders of --data, if it has any."""
    splits = ("train", "test")
    if name == "toy":
        splits += TOY_VARIANTS
    if split in splits or (found and Path(split).is_dir()):
        return
    message = f"split {split!r} of --data {name}: must be one of {', '.join(splits)}"
    if found:
        message += ", or a folder with the same class folders as train/"
    raise ValueError(message)


def check_classes(name, classes, found=()):
    if classes and not (found and Path(classes).is_file()):
        raise ValueError(
            f"--classes {classes}: must be a text file that lists class folders, one a "
            f"line, and --data a folder with train/CLASS/ or CLASS/, not {name}"
        )


def open_toy(split, view):
    images, masks, labels = toy(split)
    read = functools.partial(read_array, images, labels)
    names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
    return ImageData(read, names, len(TOY_CLASSES), masks=masks, labels=labels, **view)


def find_layout(name, path, classes):
    """The folder of the training pictures, and the names of its class folders if any."""
    if not path.is_dir():
        raise ValueError(
            f"--data {name}: neither a folder, a picture nor one of toy, "
            f"{', '.join(TORCHVISION)}. {LAYOUTS}"
        )
    folder = path
    if (path / "train").is_dir():
        folder = path / "train"
    found = class_folders(folder)
    pictures = images_in(folder)
    # Without train/, val/ and test/ are no classes.
    if not pictures and set(found) <= {"val", "test"}:
        raise ValueError(
            f"--data {name}: no class folders and no pictures in {folder}. {LAYOUTS}"
        )
    if not pictures or classes:
        return folder, found

    below = images_below(folder, found, folders_above(folder))
    filled = [c for c in found if below[c]]
    if filled:
        raise ValueError(
            f"--data {name}: {folder} holds {len(pictures)} pictures, as {pictures[0]}, "
            f"beside {len(filled)} folders with pictures, as {filled[0]}/; move the ones "
            "or the others elsewhere, or list the folders that are classes in a file for "
            "--classes"
        )
    return folder, []


def list_one(name, path, split):
    """A picture as a data set of one, without a test split."""
    if not is_image_file(path.name):
        raise ValueError(
            f"--data {name}: a file, but no picture by its name; must end in "
            f"{', '.join(IMG_EXTENSIONS)}"
        )
    if split == "test":
        return None
    return Listed(path.parent, [path.name], [-1], 0)


def list_flat(path, folder, split):
    """The pictures that lie directly in a folder, by name, without labels."""
    if split == "test":
        test = None
        if folder != path:
            test = find_split(path, split)
        if test is None:
            return None
        folder = test
    names = images_in(folder)
    if not names:
        raise ValueError(
            f"--data {path}: {path / 'train'} holds pictures, but {folder} none that lie "
            f"in it directly. {LAYOUTS}"
        )
    return Listed(folder, names, [-1] * len(names), 0)


def list_classes(path, train, split, found, classes):
    """Order and labels as in torchvision's ImageFolder of the selected classes.

    train: the folder of the class folders `found`. None if there is no such split.
    """
    folder = train
    if split == "test" and train == path:
        return None
    if split != "train":
        folder = find_split(path, split)
    if folder is None:
        return None
    here = class_folders(folder)
    taken = folders_above(folder)
    if classes:
        listed = read_classes(classes, train, found)
        found = [name for name in found if name in listed]
        taken |= {identity(folder / name) for name in here if name not in listed}
        here = [name for name in here if name in listed]
    if found != here:
        odd = sorted(set(found) ^ set(here))[:5]
        raise ValueError(
            f"--data {path}: {train} and {folder} hold different classes, {odd} are in "
            "one only; make them equal or list the common ones with --classes"
        )

    names, labels, empty = [], [], []
    below = images_below(folder, found, taken)
    for label, c in enumerate(found):
        if not below[c]:
            empty.append(c)
        start = len(str(folder / c))
        for file in below[c]:
            names.append(c + file[start:].replace(os.sep, "/"))
            labels.append(label)
    if empty:
        raise ValueError(
            f"--data {path}: no pictures of the classes {', '.join(empty[:5])} in "
            f"{folder}; remove these folders or list the others with --classes. {LAYOUTS}"
        )
    return Listed(folder, names, labels, len(found))


def find_split(path, split):
    """The folder that holds the pictures or class folders of a test split, or None."""
    if split == "test":
        candidates = [path / "val", path / "test"]
    else:
        candidates = [Path(split, "val"), Path(split, "test"), Path(split)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    return None


def read_classes(file, folder, found):
    """The names listed in a file, as a set; ValueError if not all of them are found."""
    # Of a file that is no text the names are unknown.
    lines = Path(file).read_text(errors="replace").splitlines()
    listed = {line.strip() for line in lines} - {""}
    unknown = sorted(listed - set(found))[:5]
    if not listed or unknown:
        raise ValueError(
            f"--classes {file}: {unknown or 'nothing'} listed, but the folders in "
            f"{folder} are {found[:5]} ...; list their names, one a line"
        )
    return listed


# -- Folders ---------------------------------------------------------------------------


def identity(path):
    """Device and number of a folder, the same by all links to it."""
    about = os.stat(path)
    return about.st_dev, about.st_ino


def folders_above(folder):
    """The identities of a folder and all above it: links to them would lead in circles."""
    real = folder.resolve()
    return {identity(path) for path in (real, *real.parents)}


def is_folder(entry):
    # entry.is_dir() raises an error for a link to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_image(entry):
    """A regular file: to open a pipe or a device may take for ever."""
    if not is_image_file(entry.name):
        return False
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def class_folders(folder):
    """The names of the folders in a folder, sorted, without hidden ones."""
    above = folders_above(folder)
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # Such as .thumbnails and .ipynb_checkpoints.
            if entry.name.startswith(".") or not is_folder(entry):
                continue
            if identity(entry.path) not in above:
                names.append(entry.name)
    return sorted(names)


def images_in(folder):
    """The names of the pictures that lie directly in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image(entry))


def images_below(folder, classes, taken):
    """{class: paths of the pictures in its folder and below, in ImageFolder's order}.

    Links are followed, but no folder is entered twice, nor one of the identities
    `taken`: so a link cannot lead from one class into another.
    """
    entered = set(taken)
    found = {c: [] for c in classes}
    left = deque((c, str(folder / c)) for c in classes)
    # They come last: what can be reached without them has its own path.
    links = deque()
    while left or links:
        c, here = left.popleft() if left else links.popleft()
        if identity(here) in entered:
            continue
        entered.add(identity(here))
        found[c].append((here, images_in(here)))
        with os.scandir(here) as entries:
            folders = [entry for entry in entries if is_folder(entry)]
        for entry in sorted(folders, key=lambda entry: entry.name):
            queue = links if entry.is_symlink() else left
            queue.append((c, entry.path))

    below = {}
    for c, folders in found.items():
        below[c] = []
        for place, names in sorted(folders):
            below[c] += [os.path.join(place, name) for name in names]
    return below


# -- torchvision's sets, sets of one's own ---------------------------------------------


def open_known(name, split, root, view):
    root = root or os.environ.get("ATTG_DATA") or "~/.cache/attg_mae"
    source = open_torchvision(name, split, Path(root).expanduser())
    names = [f"{name}/{split}/{i:06d}" for i in range(len(source))]
    return ImageData(source.__getitem__, names, TORCHVISION[name].classes, **view)


def first_label(source):
    """The label of the first picture, 0 if it cannot be read; ValueError if it has none."""
    try:
        pair = source[0]
    except Exception:
        return 0
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"data: [0] is a {type(pair).__name__}, must be (PIL picture, label), the "
            "label an int or None"
        )
    check_image(pair[0])
    return as_label(pair[1])


def open_own(data, split, max_pixels, view):
    """A map-style data set of (PIL picture, label), or a dict of them by split."""
    source = data if split == "train" else None
    if isinstance(data, Mapping):
        source = data.get(split)
    if source is None and split == "train":
        raise ValueError(f"data: has {list(data)}; one must be named 'train'")
    if source is None:
        return None
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise ValueError(
            f"data: a {type(source).__name__} has no [i] and len(); give a map-style "
            "data set of (PIL picture, label)"
        )
    if not len(source):
        raise ValueError(f"data: the {split} set is empty")
    first = first_label(source)
    # Names that torchvision uses, too.
    classes = getattr(source, "classes", None)
    labels = getattr(source, "targets", None)
    if labels is not None:
        labels = [as_label(x) for x in labels]
    num_classes = None
    if classes is not None:
        num_classes = len(classes)
    elif labels is None and first < 0:
        num_classes = 0
    read = functools.partial(read_pair, source, max_pixels)
    names = [f"data/{split}/{i:06d}" for i in range(len(source))]
    return ImageData(read, names, num_classes, labels=labels, **view)


def open_torchvision(name, split, root):
    """torchvision's data set of (PIL picture, label), downloaded if it is not there."""
    known = TORCHVISION[name]
    if known.kind in ("Flowers102", "StanfordCars") and find_spec("scipy") is None:
        raise ValueError(
            f"--data {name}: the labels are MATLAB files and scipy is missing; pip "
            "install scipy"
        )
    dataset = getattr(torchvision.datasets, known.kind)
    parts = known.train if split == "train" else known.test
    distributed = torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    try:
        # The first process may have to download: the others come after it.
        if not first:
            torch.distributed.barrier()
        opened = [open_part(dataset, root, options) for options in parts]
        if distributed and first:
            torch.distributed.barrier()
    # No network, a full disk, a broken archive, a download that was withdrawn.
    except Exception as error:
        raise ValueError(
            f"--data {name}: not found in {root} and not downloaded "
            f"({type(error).__name__}: {error}); put the files of "
            f"torchvision.datasets.{known.kind} into {root / known.folder}, or set "
            f"ATTG_DATA to the folder that holds {known.folder}"
        ) from error
    return ConcatDataset(opened)


def open_part(dataset, root, options):
    try:
        return dataset(str(root), **options)
    # torchvision's word for "not there".
    except RuntimeError:
        return dataset(str(root), download=True, **options)


def resolve_dataset(data, name):
    """What open_data is to open: data of one's own, if there are any, or `name`.

    ValueError if data of one's own go by the name of toy, the default: results, run
    folders and checkpoints are told apart by the name.
    """
    if data is None:
        return name
    if name == "toy":
        raise ValueError(
            "data: needs a name of its own, by which results and run folders are known: "
            "--data NAME, or Config(data=NAME)"
        )
    return data


def open_labelled(name, tests, size, augment=False, seed=0, classes=None, **options):
    """The training set and {test: test set} of what --data names; see open_data.

    tests: names of splits. options: further ones of open_data. All sets are labelled, or
    ValueError.
    """
    options |= {"classes": classes}
    train_set = open_data(name, "train", size, augment, seed, **options)
    test_sets = {}
    for test in tests:
        test_sets[test] = open_data(name, test, size, **options)
    own = not isinstance(name, str | os.PathLike)
    for part in (train_set, *test_sets.values()):
        if not part or not part.labelled:
            raise ValueError(
                f"--data {'of your own' if own else name}: needs labelled images, "
                "train/CLASS and val/CLASS or test/CLASS, or another folder of the same "
                "classes for --val"
            )
    # Most training pictures of stl10 have no labels, and some of your own may not.
    if own or name == "stl10":
        rows = (train_set.labels >= 0).nonzero().flatten()
        train_set = train_set.subset(rows)
    return train_set, test_sets


def max_unreadable(number):
    """So many of a number of pictures may be unreadable: 1 %, and a single one always."""
    return max(1, number / 100)


def refuse_unreadable(dataset):
    """ValueError if too much of a data set turned out to be unreadable.

    All processes come here at once.
    """
    rows = dataset.unreadable.nonzero().flatten().tolist()
    if torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, rows)
        rows = sorted(set().union(*parts))
    if len(rows) > max_unreadable(len(dataset)):
        raise ValueError(
            f"--data: {len(rows)} of {len(dataset)} pictures are unreadable, over 1 %; "
            f"mend or remove them, the first is {dataset.path(rows[0])}"
        )


# -- Few shots -------------------------------------------------------------------------


def shot_indices(labels, shots, seed):
    """Indices (m,) of the images chosen of labels (n,), a few of each class.

    shots: their number if an int, their share (at least one image) if a float. A class
    that has fewer gives all it has. The choice depends on labels, shots and seed alone;
    fewer shots are a part of more. ValueError for less than one shot, and for a class
    without images.
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
