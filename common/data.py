"""
Data sets: what a training step or an evaluation sees of a picture, and in what order.

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    sample = train[epoch, index]    # a random crop, a function of seed, epoch and index
    sample = train[index]           # the whole picture or its centre, for evaluation
    image, label, index, box, flip = sample

    steps = TrainBatches(len(train), batch_size=256, start=0, stop=1000)
    for batch in make_loader(train, workers=2, batch_sampler=steps):
        ...                         # a Sample of tensors for each step of the whole run

What --data accepts (the `name` of open_data):
    toy
        generated in seconds, no download; see common/toy.py
    cifar10 cifar100 flowers102 dtd pets stl10 imagenette stanford_cars
        torchvision's, downloaded to $ATTG_DATA (default ~/.cache/attg_mae), except
        stanford_cars, which has to be there. flowers102 trains on train and val, stl10
        on train and unlabeled
    PATH with train/CLASS/*.jpg
        as torchvision's ImageFolder; the test split lies in val/CLASS/ or test/CLASS/,
        val/ goes first
    PATH with pictures in it
        a flat folder without labels, for pre-training only

The workers decode and crop, in 8 bits. A Sample carries the box of its crop and the
coin of its flip: the device normalises and flips the image, and crops the attention map
of the picture (common/maps.py) with the same box.

No random state is kept. Every draw is seeded with what it depends on (seed_for), so a
run that is continued, or that has other workers, sees the same. EXIF rotation is
ignored, here as in the making of maps.
"""

import atexit
import functools
import hashlib
import multiprocessing
import os
import signal
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler
from torchvision.datasets.folder import (
    IMG_EXTENSIONS,
    find_classes,
    is_image_file,
    make_dataset,
)
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.functional import pil_to_tensor

from common.toy import TOY_CLASSES, TOY_VARIANTS, toy

# Share of the area and aspect ratio of a crop, as in MAE's pre-training.
CROP_SCALE = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


# -- Random numbers --------------------------------------------------------------------


def seed_for(*words):
    """A 64-bit seed mixed from ints and strings, the same on every machine.

    The first word keeps the streams apart: "crop", "order", "masks" ...
    """
    plain = []
    for word in words:
        # Numbers of NumPy and torch are written differently from Python's.
        plain.append(word if isinstance(word, str) else int(word))
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*words):
    """A torch.Generator on the CPU, seeded with seed_for(*words)."""
    return torch.Generator().manual_seed(seed_for(*words))


# -- One picture -----------------------------------------------------------------------


class Sample(NamedTuple):
    """What a data set yields; default_collate makes one Sample of batched tensors."""

    # uint8 (3, h, w), RGB, not flipped yet.
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


def read_file(root, names, labels, i):
    with Image.open(root / names[i]) as picture:
        # Decodes, and raises an error if the file is truncated.
        picture.load()
        return picture, labels[i]


def read_array(images, labels, i):
    return Image.fromarray(images[i]), labels[i]


def read_row(read, rows, i):
    return read(rows[i])


def to_rgb(picture):
    """A PIL picture of any mode -> 8-bit RGB. Alpha is dropped, as by torchvision."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = wide_grey_to_8_bits(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        # PIL warns on the direct way.
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def wide_grey_to_8_bits(picture):
    """Scales 16-bit and float grey, which PIL's own conversion would clip at 255."""
    grey = np.asarray(picture, dtype=np.float64)
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    # Older Pillows open 16-bit PNGs in the mode I, of 32 bits.
    whites = (65535,)
    if picture.mode == "F":
        # Nothing in the file says what white is: the least of these that will do.
        whites = (1, 255, 65535)
    white = grey.max()
    for candidate in whites:
        if grey.max() <= candidate:
            white = candidate
            break
    return Image.fromarray(np.uint8(np.clip(grey / white, 0, 1) * 255 + 0.5))


def train_view(picture, size, seed, scale=CROP_SCALE, after=None):
    """A random crop of a PIL picture: (PIL image of `size`, box, flip); see Sample.

    size: (h, w). scale: limits of the crop's share of the area; aspect ratios are
    relative to that of `size`. after(image) may augment it further, with torch's random
    numbers.
    """
    # fork_rng costs three times as much.
    state = torch.get_rng_state()
    # torch.manual_seed would reseed the GPUs as well.
    torch.default_generator.manual_seed(seed)

    height, width = size
    ratio = [r * width / height for r in CROP_RATIO]
    y, x, h, w = RandomResizedCrop.get_params(picture, scale, ratio)
    flip = torch.rand(()).item() < 0.5
    image = picture.crop((x, y, x + w, y + h))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if after:
        image = after(image)
    torch.set_rng_state(state)

    box = (
        x / picture.width,
        y / picture.height,
        (x + w) / picture.width,
        (y + h) / picture.height,
    )
    return image, box, flip


def eval_view(picture, size):
    """The centre of a PIL picture: (PIL image of `size` (h, w), box, False).

    It is cut from the smallest picture that covers size * 256/224. A picture whose
    shorter side has at most 32 pixels is seen whole.
    """
    width, height = picture.size
    h, w = size
    if min(width, height) <= 32:
        image = picture.resize((w, h), Image.Resampling.BICUBIC)
        return image, (0.0, 0.0, 1.0, 1.0), False

    # One side binds, the other is rounded down, as by torchvision's Resize; the centre
    # is rounded as by its CenterCrop.
    resized_h, resized_w = round(h * 256 / 224), round(w * 256 / 224)
    if resized_w * height > resized_h * width:
        resized_h = resized_w * height // width
    else:
        resized_w = resized_h * width // height
    x = round((resized_w - w) / 2)
    y = round((resized_h - h) / 2)

    image = picture.resize((resized_w, resized_h), Image.Resampling.BICUBIC)
    image = image.crop((x, y, x + w, y + h))
    box = (
        x / resized_w,
        y / resized_h,
        (x + w) / resized_w,
        (y + h) / resized_h,
    )
    return image, box, False


def rand_augment(mean):
    """RandAugment for train_view's `after`; mean: three fractions, the colour of gaps.

    timm's rand-m9-mstd0.5-inc1, which MAE fine-tunes with, as near as torchvision comes
    to it: two operations at magnitude 9 of 10, each with probability 0.5. Invert,
    SolarizeAdd and the noise of the magnitudes are missing.
    """
    one = v2.RandAugment(
        num_ops=1,
        magnitude=9,
        num_magnitude_bins=11,
        interpolation=v2.InterpolationMode.BICUBIC,
        fill=[round(255 * x) for x in mean],
    )
    return v2.Compose([v2.RandomApply([one], 0.5), v2.RandomApply([one], 0.5)])


# -- Data sets -------------------------------------------------------------------------


class ImageData(Dataset):
    """One split of a data set.

    data[epoch, index] is the augmented Sample if `augment`: train_view's if it is True,
    or that of another function of (picture, size, seed). Otherwise, and for
    data[index], it is eval_view's.

    A picture that cannot be decoded is replaced by the next one that can, with a
    warning; ValueError if there is none.
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
    ):
        # read(i) -> (PIL picture, label)
        self.read = read
        # One per picture: order and identity of the map file's rows.
        self.names = names
        # 0 = no labels. In stl10 most pictures have none (-1) all the same.
        self.num_classes = num_classes
        self.labelled = num_classes > 0
        # Only the toy set has them: uint8 (n, 32, 32), 1 = object.
        self.masks = masks
        # (n,), or None where only read() tells them.
        self.known = labels
        # (h, w) of the images.
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.augment = train_view if augment is True else augment
        self.seed = seed

    @functools.cached_property
    def fingerprint(self):
        """sha256 over the number of pictures and their names."""
        words = "\0".join([str(len(self)), *self.names])
        # File names need not be valid UTF-8.
        return hashlib.sha256(words.encode(errors="surrogateescape")).hexdigest()

    @functools.cached_property
    def labels(self):
        """int64 (n,), -1 = none. A set of torchvision's is read for them, once."""
        labels = self.known
        if labels is None:
            labels = [self.read(i)[1] for i in range(len(self))]
        return torch.tensor(labels)

    def subset(self, rows):
        """These rows, a tensor (m,), as a data set of its own."""
        labels = self.labels[rows].tolist()
        rows = rows.tolist()
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
        """(index, RGB picture, label) of `start` or the next that can be decoded."""
        for step in range(len(self)):
            index = (start + step) % len(self)
            try:
                picture, label = self.read(index)
                return index, to_rgb(picture), label
            # Decoders raise OSError, SyntaxError, ValueError and others.
            except Exception as error:
                # Level 3 is the line that asked for data[...].
                warnings.warn(
                    f"unreadable, the next picture replaces it: {self.names[index]} "
                    f"({error})",
                    stacklevel=3,
                )
        raise ValueError(
            f"--data: none of the {len(self)} pictures can be decoded, the first is "
            f"{self.names[0]}"
        )


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
    "test/CLASS/*.jpg; or pictures directly (a flat folder, for pre-training only)."
)


def open_data(
    name, split="train", size=32, augment=False, seed=0, classes=None, root=None
):
    """One split of what --data names; None if there is no such split.

        name     see the top of this file
        split    "train" or "test"; for toy also one of TOY_VARIANTS; for a folder with
                 train/CLASS/ also another folder of the same classes: DIR/CLASS/,
                 DIR/val/CLASS/ or DIR/test/CLASS/
        size     pixels, int or (h, w)
        augment  random crop and flip for keys (epoch, index), or a function instead;
                 see ImageData
        classes  --classes: a text file, one class folder a line; only these are kept
        root     where torchvision's sets lie, or are downloaded to

    ValueError names --data or --classes, what is wrong and the remedy.
    """
    view = {"size": size, "augment": augment, "seed": seed}
    path = Path(name).expanduser()
    nested = False
    if name != "toy" and name not in TORCHVISION:
        nested = (path / "train").is_dir()
    check_split(name, split, nested)
    check_classes(name, classes, nested)

    if name == "toy":
        return open_toy(split, view)
    if name in TORCHVISION:
        return open_known(name, split, root, view)
    if nested:
        return open_folder(path, split, classes, view)
    return open_flat(name, split, view)


def check_split(name, split, nested):
    splits = ("train", "test")
    if name == "toy":
        splits += TOY_VARIANTS
    if split in splits or (nested and Path(split).is_dir()):
        return
    message = f"split {split!r} of --data {name}: must be one of {', '.join(splits)}"
    if nested:
        message += ", or a folder with the same class folders as train/"
    raise ValueError(message)


def check_classes(name, classes, nested):
    if classes and not (nested and Path(classes).is_file()):
        raise ValueError(
            f"--classes {classes}: must be a text file that lists class folders, one a "
            f"line, and --data a folder with train/CLASS/, not {name}"
        )


def open_toy(split, view):
    images, masks, labels = toy(split)
    read = functools.partial(read_array, images, labels)
    names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
    return ImageData(read, names, len(TOY_CLASSES), masks=masks, labels=labels, **view)


def open_flat(name, split, view):
    """The pictures that lie directly in a folder, by name; they have no test split."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"--data {name}: neither a folder nor one of toy, "
            f"{', '.join(TORCHVISION)}. {LAYOUTS}"
        )
    names = []
    for entry in path.iterdir():
        if is_image_file(entry.name) and entry.is_file():
            names.append(entry.name)
    names.sort()
    if not names:
        raise ValueError(
            f"--data {name}: no folder train/ and no pictures in it. {LAYOUTS}"
        )
    if split != "train":
        return None
    labels = [-1] * len(names)
    read = functools.partial(read_file, path, names, labels)
    return ImageData(read, names, num_classes=0, labels=labels, **view)


def open_folder(path, split, classes, view):
    """Order and labels as in torchvision's ImageFolder of the selected classes."""
    folder = find_split(path, split)
    if folder is None:
        return None
    try:
        found, _ = find_classes(path / "train")
        here, _ = find_classes(folder)
        if classes:
            listed = read_classes(classes, path / "train", found)
            found = [name for name in found if name in listed]
            here = [name for name in here if name in listed]
        if found != here:
            odd = sorted(set(found) ^ set(here))[:5]
            raise ValueError(
                f"--data {path}: {path / 'train'} and {folder} hold different classes, "
                f"{odd} are in one only; make them equal or list the common ones with "
                "--classes"
            )
        numbers = {name: i for i, name in enumerate(found)}
        items = make_dataset(str(folder), numbers, IMG_EXTENSIONS)
    # No class folder, or one without pictures.
    except FileNotFoundError as error:
        raise ValueError(f"--data {path}: {error} {LAYOUTS}") from error

    names, labels = [], []
    for file, label in items:
        # Relative, with the same slashes on every system: maps are matched by them.
        names.append(file[len(str(folder)) + 1 :].replace(os.sep, "/"))
        labels.append(label)
    read = functools.partial(read_file, folder, names, labels)
    return ImageData(read, names, num_classes=len(found), labels=labels, **view)


def find_split(path, split):
    """The folder that holds the class folders of a split, or None."""
    if split == "train":
        candidates = [path / "train"]
    elif split == "test":
        candidates = [path / "val", path / "test"]
    else:
        candidates = [Path(split, "val"), Path(split, "test"), Path(split)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    return None


def read_classes(file, folder, found):
    """The names listed in a file, as a set; ValueError if not all of them are found."""
    lines = Path(file).read_text().splitlines()
    listed = {line.strip() for line in lines} - {""}
    unknown = sorted(listed - set(found))[:5]
    if not listed or unknown:
        raise ValueError(
            f"--classes {file}: {unknown or 'nothing'} listed, but the folders in "
            f"{folder} are {found[:5]} ...; list their names, one a line"
        )
    return listed


def open_known(name, split, root, view):
    root = root or os.environ.get("ATTG_DATA") or "~/.cache/attg_mae"
    source = open_torchvision(name, split, Path(root).expanduser())
    names = [f"{name}/{split}/{i:06d}" for i in range(len(source))]
    return ImageData(source.__getitem__, names, TORCHVISION[name].classes, **view)


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


def open_labelled(name, tests, size, augment=False, seed=0, classes=None):
    """The training set and {test: test set} of what --data names; see open_data.

    tests: names of splits. All sets are labelled, or ValueError.
    """
    train_set = open_data(name, "train", size, augment, seed, classes)
    test_sets = {}
    for test in tests:
        test_sets[test] = open_data(name, test, size, classes=classes)
    for part in (train_set, *test_sets.values()):
        if not part or not part.labelled:
            raise ValueError(
                f"--data {name}: needs labelled images, train/CLASS and val/CLASS or "
                "test/CLASS"
            )
    # Most of its training pictures have no labels.
    if name == "stl10":
        rows = (train_set.labels >= 0).nonzero().flatten()
        train_set = train_set.subset(rows)
    return train_set, test_sets


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


# -- Batches ---------------------------------------------------------------------------


class TrainBatches(Sampler):
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


class Feed:
    """Iterator over the Samples of `batches` (TrainBatches).

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

    # uint8 (B, 3, h, w): random crops, not flipped yet.
    image: torch.Tensor
    # float32 (B, h, w): attention maps of the whole pictures.
    maps: torch.Tensor | None
    # float32 (B, 4) and bool (B,): see Sample.
    box: torch.Tensor
    flip: torch.Tensor
    # float32 (B, L): decides the mask.
    noise: torch.Tensor


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
