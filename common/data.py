"""
Pictures in step with attention maps: data sets, decoding, views, batches.

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    image, label, index, box, flip = train[epoch, index]    # a Sample, the same for the
                                                            # same seed, epoch and index
    image, label, index, box, flip = train[index]           # evaluation transform
    steps = TrainBatches(len(train), batch_size=256, start=0, stop=1000)
    for batch in make_loader(train, workers=2, batch_sampler=steps):
        ...    # a whole run: workers start once

What `--data` accepts (the `name` of open_data):
    toy                                     generated in seconds, no download
    cifar10 cifar100 flowers102 dtd pets    torchvision's, downloaded to $ATTG_DATA
    stl10 imagenette stanford_cars          (default ~/.cache/attg_mae); flowers102 trains
                                            on train+val, stl10 on train+unlabeled; cars:
                                            local only
    PATH with train/CLASS/*.jpg             ImageFolder; test split in val/CLASS or
                                            test/CLASS (val/ goes first)
    PATH with pictures in it                flat folder without labels, for pre-training
                                            only

The workers decode and crop, uint8; a Sample carries the crop box and the coin of the
flip. The device normalises, flips, and pools the map with the same box: with
maps, _ = common.maps.load_maps("maps.npy", train), the rows
maps[batch.index.numpy()] belong to batch.image. EXIF rotation is ignored, as it is when
maps are made.

No random state is kept: every draw is seeded with what it depends on (seed_for), so
that a run resumes at any step.

common.toy makes the toy set, common.maps reads and writes map files.
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

# MAE's pre-training: share of the area, aspect ratio of a random crop.
CROP_SCALE = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# Evaluation sees all of a picture whose shorter side has at most so many px, ...
EVAL_WHOLE = 32
# ... and of others the usual centre: 224 of 256 px.
EVAL_RESIZE, EVAL_CROP = 256, 224


# ----------------------------------------------------------------------------
# Random numbers


def seed_for(*words):
    """
    A 64-bit seed mixed from ints and strings, the same on every machine. The first word
    keeps the streams apart.
    """
    words = [word if isinstance(word, str) else int(word) for word in words]
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*words):
    """A torch.Generator on the CPU, seeded by seed_for."""
    return torch.Generator().manual_seed(seed_for(*words))


# ----------------------------------------------------------------------------
# One picture


class Sample(NamedTuple):
    """What a data set yields; default_collate makes a Sample of batched tensors of it."""

    image: torch.Tensor  # uint8 (3, h, w), RGB, not flipped yet
    label: int  # -1 = none
    index: int  # row of the map file; of the picture's replacement if it is unreadable
    box: torch.Tensor  # float32 (4,): x0, y0, x1, y1, fractions of width and height
    flip: bool  # mirror image and map


# The readers: read(i) -> (PIL picture, label). Functions of this module, bound to their
# arguments by functools.partial, because spawned workers get them pickled.


def read_file(root, names, labels, i):
    with Image.open(root / names[i]) as picture:
        picture.load()  # raises if the file is truncated
        return picture, labels[i]


def read_array(images, labels, i):
    return Image.fromarray(images[i]), labels[i]


def read_row(read, rows, i):
    return read(rows[i])


def scale_wide_grey(picture):
    """Grey of 16 or 32 bit or floats -> 8 bit. Not finite: black."""
    grey = np.asarray(picture, dtype=np.float64)
    grey = np.nan_to_num(grey, posinf=0, neginf=0)
    # Floats may be in [0, 1], 8 bit or 16 bit: the narrowest range that holds them.
    # Mode I is what older Pillows make of 16-bit PNGs.
    ranges = (1, 255, 65535) if picture.mode == "F" else (65535,)
    white = grey.max()
    for largest in ranges:
        if grey.max() <= largest:
            white = largest
            break
    return Image.fromarray(np.uint8(np.clip(grey / white, 0, 1) * 255 + 0.5))


def to_rgb(picture):
    """
    Any PIL mode -> 8-bit RGB. Alpha is dropped, as by torchvision's loader; wide grey
    is scaled, where PIL would clip it.
    """
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = scale_wide_grey(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL warns on the direct way
    return picture.convert("RGB")


def train_view(picture, size, seed, scale=CROP_SCALE, after=None):
    """
    A random crop of a share in `scale` of the area: (image of `size` (h, w), box in
    fractions of the picture, flip).

    Aspect ratios are relative to that of `size`. after(image) may augment it further,
    by torch's random numbers.
    """
    height, width = size
    # Torchvision draws from the global generator: it is seeded, used and put back.
    # fork_rng costs three times as much; torch.manual_seed would reseed the GPUs too.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    ratio = [r * width / height for r in CROP_RATIO]
    y, x, h, w = RandomResizedCrop.get_params(picture, scale, ratio)
    flip = torch.rand(()).item() < 0.5
    image = picture.crop((x, y, x + w, y + h))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if after:
        image = after(image)
    torch.set_rng_state(state)

    left, right = x / picture.width, (x + w) / picture.width
    top, bottom = y / picture.height, (y + h) / picture.height
    return image, (left, top, right, bottom), flip


def eval_view(picture, size):
    """
    The centre of the smallest picture that covers size * 256/224, as train_view returns
    it; if the shorter side is <= 32 px, all of the picture.
    """
    width, height = picture.size
    crop_h, crop_w = size
    if min(width, height) <= EVAL_WHOLE:
        image = picture.resize((crop_w, crop_h), Image.Resampling.BICUBIC)
        return image, (0.0, 0.0, 1.0, 1.0), False

    # One side binds, the other follows and is rounded down; these roundings are those
    # of torchvision's Resize and CenterCrop.
    new_h = round(crop_h * EVAL_RESIZE / EVAL_CROP)
    new_w = round(crop_w * EVAL_RESIZE / EVAL_CROP)
    if new_w * height > new_h * width:
        new_h = new_w * height // width
    else:
        new_w = new_h * width // height
    x = round((new_w - crop_w) / 2)
    y = round((new_h - crop_h) / 2)

    image = picture.resize((new_w, new_h), Image.Resampling.BICUBIC)
    image = image.crop((x, y, x + crop_w, y + crop_h))
    box = (x / new_w, y / new_h, (x + crop_w) / new_w, (y + crop_h) / new_h)
    return image, box, False


def rand_augment(mean):
    """
    For train_view's `after`: timm's rand-m9-mstd0.5-inc1 (MAE's fine-tuning) as near as
    torchvision comes to it: two operations at magnitude 9 of 10, each with probability
    0.5; without Invert, SolarizeAdd and noise of magnitudes.

    mean: RGB in [0, 1], fills what a turned or shifted picture leaves empty.
    """
    operation = v2.RandAugment(
        1,
        magnitude=9,
        num_magnitude_bins=11,
        interpolation=v2.InterpolationMode.BICUBIC,
        fill=[round(255 * channel) for channel in mean],
    )
    return v2.Compose([v2.RandomApply([operation], 0.5) for _ in range(2)])


# ----------------------------------------------------------------------------
# Data sets


class ImageData(Dataset):
    """
    One split. data[epoch, index] is the augmented Sample if `augment`: train_view's if
    True, or what another function of (picture, size, seed) returns; else, and for
    data[index], the evaluation's.

    A picture that cannot be decoded is replaced by the next one that can; ValueError if
    there is none.

        read         read(i) -> (PIL picture, label), must be picklable
        names        one for each picture: order and identity of the map file's rows
        num_classes  0 without labels
        size         px, int or (h, w), of the images
        seed         of the augmentation
        masks        toy only: uint8 (n, 32, 32), 1 = object
        labels       (n,), -1 = none (stl10 has such pictures among others); None if only
                     read() tells them
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
        self.read = read
        self.names = names
        self.num_classes = num_classes
        self.labelled = num_classes > 0
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.augment = train_view if augment is True else augment
        self.seed = seed
        self.masks = masks
        self.known = labels

    @functools.cached_property
    def fingerprint(self):
        """sha256 over the number and the names."""
        text = "\0".join([str(len(self)), *self.names])
        # File names need not be valid UTF-8.
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    @functools.cached_property
    def labels(self):
        """int64 (n,), -1 = none. Sets of torchvision are read for them, once."""
        if self.known is not None:
            return torch.tensor(self.known)
        return torch.tensor([self.read(i)[1] for i in range(len(self))])

    def subset(self, rows):
        """These rows (m,) of it, as a data set of its own."""
        labels = self.labels[rows].tolist()
        rows = rows.tolist()
        return ImageData(
            functools.partial(read_row, self.read, rows),
            [self.names[i] for i in rows],
            self.num_classes,
            self.size,
            self.augment,
            self.seed,
            None if self.masks is None else self.masks[rows],
            labels,
        )

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, asked = key if isinstance(key, tuple) else (None, key)
        # Counts negative ones from the end; IndexError ends `for sample in data`.
        asked = range(len(self))[asked]
        picture, label, index = self.first_readable(asked)
        if self.augment and epoch is not None:
            # Seeded with the index asked for: a replacement gets a crop of its own.
            seed = seed_for("crop", self.seed, epoch, asked)
            image, box, flip = self.augment(picture, self.size, seed)
        else:
            image, box, flip = eval_view(picture, self.size)
        return Sample(pil_to_tensor(image), int(label), index, torch.tensor(box), flip)

    def first_readable(self, start):
        """(RGB picture, label, index) of the first readable one from `start` on."""
        n = len(self)
        for offset in range(n):
            index = (start + offset) % n
            try:
                picture, label = self.read(index)
                return to_rgb(picture), label, index
            except (
                Exception
            ) as error:  # decoders raise OSError, SyntaxError, ValueError
                warnings.warn(
                    "unreadable, the next picture replaces it: "
                    f"{self.names[index]} ({error})",
                    stacklevel=3,  # the line that indexes the data set
                )
        raise ValueError(
            f"--data: none of the {n} pictures can be decoded, "
            f"the first is {self.names[0]}"
        )


class Source(NamedTuple):
    """A data set of torchvision."""

    kind: str  # class in torchvision.datasets
    classes: int
    folder: str  # that it lies in, below the root
    train: list  # for each part of the training split, the arguments of the class
    test: list  # the same for the test split


TORCHVISION = {
    "cifar10": Source(
        kind="CIFAR10",
        classes=10,
        folder="cifar-10-batches-py",
        train=[{"train": True}],
        test=[{"train": False}],
    ),
    "cifar100": Source(
        kind="CIFAR100",
        classes=100,
        folder="cifar-100-python",
        train=[{"train": True}],
        test=[{"train": False}],
    ),
    "flowers102": Source(
        kind="Flowers102",
        classes=102,
        folder="flowers-102",
        train=[{"split": "train"}, {"split": "val"}],
        test=[{"split": "test"}],
    ),
    "dtd": Source(
        kind="DTD",
        classes=47,
        folder="dtd",
        train=[{"split": "train"}],
        test=[{"split": "test"}],
    ),
    "pets": Source(
        kind="OxfordIIITPet",
        classes=37,
        folder="oxford-iiit-pet",
        train=[{"split": "trainval"}],
        test=[{"split": "test"}],
    ),
    "stl10": Source(
        kind="STL10",
        classes=10,
        folder="stl10_binary",
        train=[{"split": "train+unlabeled"}],
        test=[{"split": "test"}],
    ),
    "imagenette": Source(
        kind="Imagenette",
        classes=10,
        folder="imagenette2",
        train=[{"split": "train"}],
        test=[{"split": "val"}],
    ),
    "stanford_cars": Source(
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
    """
    One split of what --data names (see the top of this file), an ImageData; None if
    there is no such split.

        split    "train" or "test"; toy also "only_fg", "mixed_same", "mixed_rand",
                 "mixed_next"; for a folder with train/CLASS/ also another folder of the
                 same classes, DIR/CLASS/, DIR/val/CLASS/ or DIR/test/CLASS/
        size     px, int or (h, w)
        augment  random crop and flip for keys (epoch, index), or a function instead
                 (see ImageData)
        classes  text file, one class folder a line: only these are kept (--classes)
        root     where torchvision's sets lie or are downloaded to (by the first process)

    ValueError names --data or --classes, what is wrong and the remedy.
    """
    path = Path(name).expanduser()
    embedded = name == "toy" or name in TORCHVISION
    nested = not embedded and (path / "train").is_dir()
    check_split(name, split, nested)
    if classes and not (nested and Path(classes).is_file()):
        raise ValueError(
            f"--classes {classes}: must be a text file that lists class folders, one a "
            f"line, and --data a folder with train/CLASS/, not {name}"
        )

    # What all branches make an ImageData with; each adds what it has found.
    made = functools.partial(ImageData, size=size, augment=augment, seed=seed)
    if name == "toy":
        return open_toy(split, made)
    if name in TORCHVISION:
        return open_downloaded(name, split, root, made)
    if nested:
        return open_folder(path, split, classes, made)
    return open_flat(name, path, split, made)


def check_split(name, split, nested):
    splits = ["train", "test"]
    if name == "toy":
        splits += TOY_VARIANTS
    if split in splits or (nested and Path(split).is_dir()):
        return
    choice = ", ".join(splits)
    if nested:
        choice += ", or a folder with the same class folders as train/"
    raise ValueError(f"split {split!r} of --data {name}: must be one of {choice}")


def open_toy(split, made):
    images, masks, labels = toy(split)
    names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
    read = functools.partial(read_array, images, labels)
    return made(read, names, len(TOY_CLASSES), masks=masks, labels=labels)


def open_downloaded(name, split, root, made):
    root = root or os.environ.get("ATTG_DATA") or "~/.cache/attg_mae"
    source = open_torchvision(name, split, Path(root).expanduser())
    names = [f"{name}/{split}/{i:06d}" for i in range(len(source))]
    return made(source.__getitem__, names, TORCHVISION[name].classes)


def open_flat(name, path, split, made):
    """The pictures directly in a folder, by name, without labels: training only."""
    if not path.is_dir():
        known = ", ".join(TORCHVISION)
        raise ValueError(
            f"--data {name}: neither a folder nor one of toy, {known}. {LAYOUTS}"
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
    return made(read, names, 0, labels=labels)


def open_folder(path, split, classes, made):
    """
    A folder with train/CLASS/. Order and labels as torchvision's ImageFolder has them,
    after the selection of classes.
    """
    part = split_folder(path, split)
    if part is None:
        return None
    base = str(part)
    try:
        kept = common_classes(path, base, classes)
        numbers = {name: number for number, name in enumerate(kept)}
        items = make_dataset(base, numbers, IMG_EXTENSIONS)
    except FileNotFoundError as error:  # no class folder, or one without pictures
        raise ValueError(f"--data {path}: {error} {LAYOUTS}") from error
    names = []
    labels = []
    for file, label in items:
        # Relative and with slashes: the fingerprint is the same wherever it lies.
        names.append(file[len(base) + 1 :].replace(os.sep, "/"))
        labels.append(label)
    read = functools.partial(read_file, part, names, labels)
    return made(read, names, len(kept), labels=labels)


def split_folder(path, split):
    """The folder of the class folders of a split of the data set `path`, or None."""
    if split == "train":
        candidates = [path / "train"]
    elif split == "test":
        candidates = [path / "val", path / "test"]
    else:
        other = Path(split)
        candidates = [other / "val", other / "test", other]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    return None


def common_classes(path, base, classes):
    """
    The class folders of path/train, sorted, which must be those of `base` as well; if
    `classes` is given, those that this file lists.
    """
    train = path / "train"
    in_train = find_classes(train)[0]
    in_base = find_classes(base)[0]
    if classes:
        lines = Path(classes).read_text().splitlines()
        listed = {line.strip() for line in lines} - {""}
        unknown = listed - set(in_train)
        if not listed or unknown:
            raise ValueError(
                f"--classes {classes}: {sorted(unknown)[:5] or 'nothing'} listed, but "
                f"the folders in {train} are {in_train[:5]} ...; list their names, "
                "one a line"
            )
        in_train = [name for name in in_train if name in listed]
        in_base = [name for name in in_base if name in listed]
    if in_train != in_base:
        odd = sorted(set(in_train) ^ set(in_base))[:5]
        raise ValueError(
            f"--data {path}: {train} and {base} hold different classes, {odd} are in "
            "one only; make them equal or list the common ones with --classes"
        )
    return in_train


def open_torchvision(name, split, root):
    """
    A split of one of TORCHVISION, downloaded to `root` if it is not there: a Dataset of
    (PIL picture, label). ValueError if it cannot be had.
    """
    source = TORCHVISION[name]
    if source.kind in ("Flowers102", "StanfordCars") and find_spec("scipy") is None:
        raise ValueError(
            f"--data {name}: the labels are MATLAB files and scipy is missing; "
            "pip install scipy"
        )
    # The first process may have to download; the others wait until it is done.
    distributed = torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    try:
        if not first:
            torch.distributed.barrier()
        parts = []
        for options in source.train if split == "train" else source.test:
            parts.append(open_part(source.kind, root, options))
        if distributed and first:
            torch.distributed.barrier()
    # No network, full disk, broken archive, withdrawn download.
    except Exception as error:
        raise ValueError(
            f"--data {name}: not found in {root} and not downloaded "
            f"({type(error).__name__}: {error}); put the files of "
            f"torchvision.datasets.{source.kind} into {root / source.folder}, or set "
            f"ATTG_DATA to the folder that holds {source.folder}"
        ) from error
    return ConcatDataset(parts)


def open_part(kind, root, options):
    dataset = getattr(torchvision.datasets, kind)
    try:
        return dataset(str(root), **options)
    except RuntimeError:  # torchvision's word for "not there"
        return dataset(str(root), download=True, **options)


def open_labelled(name, tests, size, augment=False, seed=0, classes=None):
    """
    The training set and {test: test set} of what --data names, all labelled; see
    open_data. ValueError if one is missing or has no labels.
    """
    train_set = open_data(name, "train", size, augment, seed, classes)
    test_sets = {test: open_data(name, test, size, classes=classes) for test in tests}
    for dataset in (train_set, *test_sets.values()):
        # No such split, an empty one, or one without labels.
        if not dataset or not dataset.labelled:
            raise ValueError(
                f"--data {name}: needs labelled images, train/CLASS and val/CLASS or "
                "test/CLASS"
            )
    if name == "stl10":  # most of it has no labels
        train_set = train_set.subset((train_set.labels >= 0).nonzero().flatten())
    return train_set, test_sets


# ----------------------------------------------------------------------------
# Few shots


def shot_indices(labels, shots, seed):
    """
    The images (m,) chosen of labels (n,): `shots` of each class, or that share of it
    (at least one) if shots is a float.

    A function of labels, shots and seed alone; fewer shots are a part of more.
    ValueError if there are too few.
    """
    chosen = []
    for label in labels[labels >= 0].unique().tolist():
        members = (labels == label).nonzero().flatten()
        count = shots
        if isinstance(shots, float):
            count = max(1, round(shots * len(members)))
        if len(members) < count:
            raise ValueError(
                f"--shots {shots}: class {label} has {len(members)} images; "
                "use fewer shots"
            )
        generator = generator_for("shots", seed, label)
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:count]])
    return torch.cat(chosen)


# ----------------------------------------------------------------------------
# Batches


class TrainBatches(Sampler):
    """
    Batches of keys (epoch, index) for the steps start .. stop - 1 of a run over n
    pictures, those of one rank.

    The global batch of a step is a slice of the epoch's permutation; an epoch has
    n // batch_size steps. Micro-batch a of a rank is rows
    [(a*world + rank)*b, (a*world + rank + 1)*b) of it, b = batch_size / (accum*world),
    so that ranks and accumulation change nothing. Keys carry the epoch, for persistent
    workers do not see attributes set later.
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
        self.epoch_steps = n // batch_size
        self.start = start
        self.stop = stop
        self.seed = seed
        self.accum = accum
        self.rank = rank
        self.world = world
        # The permutation in use, and the epoch that it belongs to.
        self.order = None
        self.order_epoch = None

    def indices(self, step):
        """Global batch of a step: int64 (batch_size,)."""
        epoch, position = divmod(step, self.epoch_steps)
        if self.order_epoch != epoch:
            generator = generator_for("order", self.seed, epoch)
            self.order = torch.randperm(self.n, generator=generator)
            self.order_epoch = epoch
        first = position * self.batch_size
        return self.order[first : first + self.batch_size]

    def __len__(self):
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch = step // self.epoch_steps
            batch = self.indices(step).view(self.accum, self.world, -1)
            for micro_batch in batch[:, self.rank].tolist():
                yield [(epoch, index) for index in micro_batch]


def ignore_signals(leaving, _):
    """
    A worker's first act, after which only the main process decides when a run ends:
    Ctrl-C and stop signals often reach the workers as well.
    """

    def terminated(*_):
        # At exit Python sends workers SIGTERM and waits for them: that one counts.
        if leaving.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminated)


def make_loader(
    dataset, batch_size=256, workers=0, batch_sampler=None, pin_memory=False
):
    """DataLoader of Samples; without batch_sampler in order, the last short batch too."""
    options = {}
    if batch_sampler is not None:
        options["batch_sampler"] = batch_sampler
    else:
        options["batch_size"] = batch_size
    if workers:
        leaving = multiprocessing.Event()
        atexit.register(leaving.set)
        options["persistent_workers"] = True
        options["worker_init_fn"] = functools.partial(ignore_signals, leaving)
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        # Its own: a DataLoader without one draws from torch's global numbers.
        generator=torch.Generator(),
        **options,
    )


class Feed:
    """
    Iterator over the Samples of `batches` (TrainBatches).

    waited: seconds spent waiting for them; unreadable: indices of the pictures that were
    replaced. Whoever reads the two resets them.
    """

    def __init__(self, dataset, batches, **options):
        self.samples = iter(make_loader(dataset, batch_sampler=batches, **options))
        # The same batches once more: what was asked for, beside what came.
        self.asked = iter(batches)
        self.unreadable = set()
        self.waited = 0.0

    def __next__(self):
        began = time.perf_counter()
        sample = next(self.samples)
        self.waited += time.perf_counter() - began
        keys = next(self.asked)
        for (_, asked), got in zip(keys, sample.index.tolist(), strict=True):
            if got != asked:
                self.unreadable.add(asked)
        return sample


class Batch(NamedTuple):
    """A micro-batch of training on the device; see attg_mae.model_inputs."""

    image: torch.Tensor  # uint8 (B, 3, h, w), random crops, not flipped yet
    maps: torch.Tensor | None  # float32 (B, h, w) of the whole pictures
    box: torch.Tensor  # float32 (B, 4)
    flip: torch.Tensor  # bool (B,)
    noise: torch.Tensor  # float32 (B, L), decides the mask


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
