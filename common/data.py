"""
Pictures and attention maps in step: data sets, decoding, crop boxes, map files, and the embedded `toy` set.

    python -m common.data --out toy.png        # draws a sheet of the toy set: images, exact masks, test variants (seconds)

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    image, label, index, box, flip = train[epoch, index]        # a Sample, function of (seed, epoch, index) alone
    image, label, index, box, flip = train[index]               # evaluation transform
    steps = TrainBatches(len(train), batch_size=256, start=0, stop=1000)    # a whole run: workers start once
    for batch in make_loader(train, workers=2, batch_sampler=steps): ...
    maps, manifest = load_maps("maps.npy", train)               # maps[batch.index.numpy()] belong to batch.image

What `--data` accepts (the `name` of open_data):
    toy                                     generated in seconds, no download
    cifar10 cifar100 flowers102 dtd pets    torchvision's, downloaded to $ATTG_DATA (default ~/.cache/attg_mae);
    stl10 imagenette stanford_cars          flowers102 trains on train+val, stl10 on train+unlabeled; cars: local only
    PATH with train/CLASS/*.jpg             ImageFolder; test split in val/CLASS or test/CLASS (val/ goes first)
    PATH with pictures in it                flat folder without labels, for pre-training only

The workers decode and crop, uint8; a Sample carries the crop box and the coin of the flip. The device normalises,
flips, and pools the map with the same box. No random state is kept: every draw is seeded with what it depends on
(seed_for). EXIF rotation is ignored, as it is when maps are made.
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

CROP_SCALE, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # MAE's pre-training


def seed_for(*words):
    """A 64-bit seed mixed from ints and strings, the same on every machine. The first word keeps the streams apart."""
    words = repr([word if isinstance(word, str) else int(word) for word in words])
    return int.from_bytes(
        hashlib.blake2b(words.encode(), digest_size=8).digest(), "little"
    )


def generator_for(*words):
    return torch.Generator().manual_seed(seed_for(*words))


# ---------------------------------------------------------------------------------------------------------------------
# One picture


class Sample(NamedTuple):
    """What a data set yields; default_collate makes a Sample of batched tensors of it."""

    image: torch.Tensor  # uint8 (3, h, w), RGB, not flipped yet
    label: int  # -1 = none
    index: int  # row of the map file; not the one asked for if that file could not be decoded
    box: torch.Tensor  # float32 (4,): x0, y0, x1, y1 of the region seen, fractions of the picture's width, height
    flip: bool  # mirror image and map


def read_file(root, names, labels, i):
    with Image.open(root / names[i]) as picture:
        picture.load()  # raises if the file is truncated
        return picture, labels[i]


def read_array(images, labels, i):
    return Image.fromarray(images[i]), labels[i]


def read_row(read, rows, i):
    return read(rows[i])


def to_rgb(picture):
    """Any PIL mode -> 8-bit RGB. Alpha is dropped, as by torchvision's loader; wide grey is scaled (PIL clips)."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        grey = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0)
        tops = (
            (1, 255, 65535) if picture.mode == "F" else (65535,)
        )  # mode I: 16-bit PNGs in older Pillows
        top = next((t for t in tops if grey.max() <= t), grey.max())
        picture = Image.fromarray(np.uint8(np.clip(grey / top, 0, 1) * 255 + 0.5))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL warns on the direct way
    return picture.convert("RGB")


def train_view(picture, size, seed, scale=CROP_SCALE, after=None):
    """
    Random crop of a share in `scale` of the area -> image of `size` (h, w), box in fractions, flip. Aspect ratios are
    relative to that of `size`. after(image) may augment it further, by torch's random numbers.
    """
    state = torch.get_rng_state()  # fork_rng costs three times as much
    torch.default_generator.manual_seed(
        seed
    )  # torch.manual_seed would reseed the GPUs as well
    y, x, h, w = RandomResizedCrop.get_params(
        picture, scale, [r * size[1] / size[0] for r in CROP_RATIO]
    )
    flip = torch.rand(()).item() < 0.5
    image = picture.crop((x, y, x + w, y + h)).resize(
        size[::-1], Image.Resampling.BICUBIC
    )
    image = after(image) if after else image
    torch.set_rng_state(state)
    return (
        image,
        (
            x / picture.width,
            y / picture.height,
            (x + w) / picture.width,
            (y + h) / picture.height,
        ),
        flip,
    )


def rand_augment(mean):
    """
    For train_view's `after`: timm's rand-m9-mstd0.5-inc1 (MAE's fine-tuning) as near as torchvision comes to it: two
    operations at magnitude 9 of 10, each with probability 0.5; without Invert, SolarizeAdd and noise of magnitudes.
    """
    fill = [round(255 * x) for x in mean]
    one = v2.RandAugment(
        1,
        magnitude=9,
        num_magnitude_bins=11,
        interpolation=v2.InterpolationMode.BICUBIC,
        fill=fill,
    )
    return v2.Compose([v2.RandomApply([one], 0.5), v2.RandomApply([one], 0.5)])


def eval_view(picture, size):
    """The centre of the smallest picture that covers size * 256/224; if the shorter side is <= 32 px, all of it."""
    (w, h), (ch, cw) = picture.size, size
    if min(w, h) <= 32:
        return (
            picture.resize((cw, ch), Image.Resampling.BICUBIC),
            (0.0, 0.0, 1.0, 1.0),
            False,
        )
    rh, rw = round(ch * 256 / 224), round(cw * 256 / 224)
    rw, rh = (
        (rw, rw * h // w) if rw * h > rh * w else (rh * w // h, rh)
    )  # one side binds, the other is rounded down
    x, y = (
        round((rw - cw) / 2),
        round((rh - ch) / 2),
    )  # both as torchvision's Resize, CenterCrop
    image = picture.resize((rw, rh), Image.Resampling.BICUBIC).crop(
        (x, y, x + cw, y + ch)
    )
    return image, (x / rw, y / rh, (x + cw) / rw, (y + ch) / rh), False


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


class ImageData(Dataset):
    """
    One split. data[epoch, index] is the augmented Sample if `augment`: train_view's if True, or what another function
    of (picture, size, seed) returns; else, and for data[index], the evaluation's.
    A picture that cannot be decoded is replaced by the next one that can; ValueError if there is none.
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
        self.read = read  # read(i) -> (PIL picture, label)
        self.names = names  # one per picture: order and identity of the map file's rows
        self.num_classes, self.labelled = (
            num_classes,
            num_classes > 0,
        )  # 0 without; stl10 mixes in labels of -1
        self.masks = masks  # toy only: uint8 (n, 32, 32), 1 = object
        self.known = labels  # (n,), None: only read() tells them
        self.size = (
            (size, size) if isinstance(size, int) else tuple(size)
        )  # (h, w) of the images
        self.augment, self.seed = train_view if augment is True else augment, seed

    @functools.cached_property
    def fingerprint(self):
        """sha256 over the number and the names."""
        return hashlib.sha256(
            "\0".join([str(len(self)), *self.names]).encode(errors="surrogateescape")
        ).hexdigest()

    @functools.cached_property
    def labels(self):
        """int64 (n,), -1 = none. Sets of torchvision are read for them, once."""
        return torch.tensor(
            [self.read(i)[1] for i in range(len(self))]
            if self.known is None
            else self.known
        )

    def subset(self, rows):
        """These rows (m,) of it, as a data set of its own."""
        rows, labels = rows.tolist(), self.labels[rows].tolist()
        masks = None if self.masks is None else self.masks[rows]
        read, names = (
            functools.partial(read_row, self.read, rows),
            [self.names[i] for i in rows],
        )
        return ImageData(
            read,
            names,
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
        epoch, start = key if isinstance(key, tuple) else (None, key)
        start = range(len(self))[start]  # IndexError ends `for sample in data`
        for index in (i % len(self) for i in range(start, start + len(self))):
            try:
                picture, label = self.read(index)
                picture = to_rgb(picture)
                break
            except (
                Exception
            ) as error:  # decoders raise OSError, SyntaxError, ValueError ...
                warnings.warn(
                    f"unreadable, the next picture replaces it: {self.names[index]} ({error})",
                    stacklevel=2,
                )
        else:
            raise ValueError(
                f"--data: none of the {len(self)} pictures can be decoded, the first is {self.names[0]}"
            )
        if self.augment and epoch is not None:
            image, box, flip = self.augment(
                picture, self.size, seed_for("crop", self.seed, epoch, start)
            )
        else:
            image, box, flip = eval_view(picture, self.size)
        return Sample(pil_to_tensor(image), int(label), index, torch.tensor(box), flip)


# name: class in torchvision.datasets, number of classes, folder under root, arguments of the parts of train, of test
TORCHVISION = {
    "cifar10": (
        "CIFAR10",
        10,
        "cifar-10-batches-py",
        [{"train": True}],
        [{"train": False}],
    ),
    "cifar100": (
        "CIFAR100",
        100,
        "cifar-100-python",
        [{"train": True}],
        [{"train": False}],
    ),
    "flowers102": (
        "Flowers102",
        102,
        "flowers-102",
        [{"split": "train"}, {"split": "val"}],
        [{"split": "test"}],
    ),
    "dtd": ("DTD", 47, "dtd", [{"split": "train"}], [{"split": "test"}]),
    "pets": (
        "OxfordIIITPet",
        37,
        "oxford-iiit-pet",
        [{"split": "trainval"}],
        [{"split": "test"}],
    ),
    "stl10": (
        "STL10",
        10,
        "stl10_binary",
        [{"split": "train+unlabeled"}],
        [{"split": "test"}],
    ),
    "imagenette": (
        "Imagenette",
        10,
        "imagenette2",
        [{"split": "train"}],
        [{"split": "val"}],
    ),
    "stanford_cars": (
        "StanfordCars",
        196,
        "stanford_cars",
        [{"split": "train"}],
        [{"split": "test"}],
    ),
}
LAYOUTS = (
    "A folder must hold train/CLASS/*.jpg and, for a test split, val/CLASS/*.jpg or test/CLASS/*.jpg; "
    "or pictures directly (a flat folder, for pre-training only)."
)


def open_data(
    name, split="train", size=32, augment=False, seed=0, classes=None, root=None
):
    """
    One split of what --data names (see the top of this file); None if there is no such split.

        split    "train" or "test"; toy also "only_fg", "mixed_same", "mixed_rand", "mixed_next"; for a folder with
                 train/CLASS/ also another folder of the same classes, DIR/CLASS/, DIR/val/CLASS/ or DIR/test/CLASS/
        size     px, int or (h, w)
        augment  random crop and flip for keys (epoch, index), or a function instead (see ImageData)
        classes  text file, one class folder a line: only these are kept (--classes)
        root     where torchvision's sets lie or are downloaded to (by the first process)

    ValueError names --data or --classes, what is wrong and the remedy.
    """
    made = functools.partial(ImageData, size=size, augment=augment, seed=seed)
    path = Path(name).expanduser()
    nested = name != "toy" and name not in TORCHVISION and (path / "train").is_dir()
    splits = ("train", "test", *(TOY_VARIANTS if name == "toy" else ()))
    if split not in splits and not (nested and Path(split).is_dir()):
        raise ValueError(
            f"split {split!r} of --data {name}: must be one of {', '.join(splits)}"
            + ", or a folder with the same class folders as train/" * nested
        )
    if classes and not (nested and Path(classes).is_file()):
        raise ValueError(
            f"--classes {classes}: must be a text file that lists class folders, one a line, and --data a "
            f"folder with train/CLASS/, not {name}"
        )
    if name == "toy":
        images, masks, labels = toy(split)
        names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
        return made(
            functools.partial(read_array, images, labels),
            names,
            len(TOY_CLASSES),
            masks=masks,
            labels=labels,
        )
    if name in TORCHVISION:
        root = Path(
            root or os.environ.get("ATTG_DATA") or "~/.cache/attg_mae"
        ).expanduser()
        source = open_torchvision(name, split, root)
        return made(
            source.__getitem__,
            [f"{name}/{split}/{i:06d}" for i in range(len(source))],
            TORCHVISION[name][1],
        )
    if nested:
        return open_folder(path, split, classes, made)
    if not path.is_dir():
        raise ValueError(
            f"--data {name}: neither a folder nor one of toy, {', '.join(TORCHVISION)}. {LAYOUTS}"
        )
    names = sorted(
        entry.name
        for entry in path.iterdir()
        if is_image_file(entry.name) and entry.is_file()
    )
    if not names:
        raise ValueError(
            f"--data {name}: no folder train/ and no pictures in it. {LAYOUTS}"
        )
    if split != "train":
        return None
    labels = [-1] * len(names)
    return made(
        functools.partial(read_file, path, names, labels), names, 0, labels=labels
    )


def open_folder(path, split, classes, made):
    """Order and labels as torchvision's ImageFolder has them, after the selection of classes."""
    root = path if split in ("train", "test") else Path(split)
    parts = (
        ("train",)
        if split == "train"
        else ("val", "test")
        if root is path
        else ("val", "test", "")
    )
    part = next((p for p in parts if (root / p).is_dir()), None)
    if part is None:
        return None
    base = str(root / part)
    try:
        found, here = find_classes(path / "train")[0], find_classes(base)[0]
        if classes:
            listed = {
                line.strip() for line in Path(classes).read_text().splitlines()
            } - {""}
            if not listed or listed - set(found):
                raise ValueError(
                    f"--classes {classes}: {sorted(listed - set(found))[:5] or 'nothing'} listed, but the "
                    f"folders in {path / 'train'} are {found[:5]} ...; list their names, one a line"
                )
            found, here = (
                [name for name in names if name in listed] for names in (found, here)
            )
        if found != here:
            odd = sorted({*found} ^ {*here})[:5]
            raise ValueError(
                f"--data {path}: {path / 'train'} and {base} hold different classes, {odd} are in one "
                "only; make them equal or list the common ones with --classes"
            )
        items = make_dataset(
            base, {name: i for i, name in enumerate(found)}, IMG_EXTENSIONS
        )
    except FileNotFoundError as error:  # no class folder, or one without pictures
        raise ValueError(f"--data {path}: {error} {LAYOUTS}") from error
    names, labels = (
        [file[len(base) + 1 :].replace(os.sep, "/") for file, _ in items],
        [label for _, label in items],
    )
    return made(
        functools.partial(read_file, root / part, names, labels),
        names,
        len(found),
        labels=labels,
    )


def open_torchvision(name, split, root):
    kind, _, folder, train, test = TORCHVISION[name]
    if kind in ("Flowers102", "StanfordCars") and find_spec("scipy") is None:
        raise ValueError(
            f"--data {name}: the labels are MATLAB files and scipy is missing; pip install scipy"
        )
    dataset = getattr(torchvision.datasets, kind)

    def open_part(options):
        try:
            return dataset(str(root), **options)
        except RuntimeError:  # torchvision's word for "not there"
            return dataset(str(root), download=True, **options)

    later = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
    try:
        if later:  # the first process may have to download
            torch.distributed.barrier()
        parts = [
            open_part(options) for options in (train if split == "train" else test)
        ]
        if torch.distributed.is_initialized() and not later:
            torch.distributed.barrier()
    except (
        Exception
    ) as error:  # no network, full disk, broken archive, withdrawn download
        raise ValueError(
            f"--data {name}: not found in {root} and not downloaded ({type(error).__name__}: {error}); "
            f"put the files of torchvision.datasets.{kind} into {root / folder}, or set ATTG_DATA to the "
            f"folder that holds {folder}"
        ) from error
    return ConcatDataset(parts)


def open_labelled(name, tests, size, augment=False, seed=0, classes=None):
    """The training set and {test: test set} of what --data names, all labelled, or ValueError; see open_data."""
    train_set = open_data(name, "train", size, augment, seed, classes)
    test_sets = {test: open_data(name, test, size, classes=classes) for test in tests}
    if not all(x and x.labelled for x in (train_set, *test_sets.values())):
        raise ValueError(
            f"--data {name}: needs labelled images, train/CLASS and val/CLASS or test/CLASS"
        )
    if name == "stl10":  # most of it has no labels
        train_set = train_set.subset((train_set.labels >= 0).nonzero().flatten())
    return train_set, test_sets


def shot_indices(labels, shots, seed):
    """
    The images (m,) chosen of labels (n,): `shots` of each class, or that share of it (at least one) if shots is a
    float. A function of labels, shots and seed alone; fewer shots are a part of more. ValueError if there are too few.
    """
    chosen = []
    for c in labels[labels >= 0].unique().tolist():
        members = (labels == c).nonzero().flatten()
        count = (
            max(1, round(shots * len(members))) if isinstance(shots, float) else shots
        )
        if len(members) < count:
            raise ValueError(
                f"--shots {shots}: class {c} has {len(members)} images; use fewer shots"
            )
        order = torch.randperm(
            len(members),
            generator=torch.Generator().manual_seed(seed_for("shots", seed, c)),
        )
        chosen.append(members[order[:count]])
    return torch.cat(chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class TrainBatches(Sampler):
    """
    Batches of keys (epoch, index) for the steps start .. stop - 1 of a run over n pictures, those of one rank.

    The global batch of a step is a slice of the epoch's permutation; an epoch has n // batch_size steps. Micro-batch a
    of a rank is rows [(a*world + rank)*b, (a*world + rank + 1)*b) of it, b = batch_size / (accum*world), so that ranks
    and accumulation change nothing. Keys carry the epoch, for persistent workers do not see attributes set later.
    """

    def __init__(self, n, batch_size, start, stop, seed=0, accum=1, rank=0, world=1):
        if not 0 < batch_size <= n:
            raise ValueError(
                f"--batch_size {batch_size}: there are {n} pictures; use 1 to {n}"
            )
        if batch_size % (accum * world):
            raise ValueError(
                f"--batch_size {batch_size}: the global batch must be divisible by --accum {accum} times "
                f"{world} processes; use a multiple of {accum * world}"
            )
        self.n, self.batch_size, self.start, self.stop, self.seed = (
            n,
            batch_size,
            start,
            stop,
            seed,
        )
        self.accum, self.rank, self.world = accum, rank, world
        self.order = (None, None)  # (epoch, permutation)

    def indices(self, step):
        """Global batch of a step: int64 (batch_size,)."""
        epoch, i = divmod(step, self.n // self.batch_size)
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(
                seed_for("order", self.seed, epoch)
            )
            self.order = (epoch, torch.randperm(self.n, generator=generator))
        return self.order[1][i * self.batch_size : (i + 1) * self.batch_size]

    def __len__(self):
        return (self.stop - self.start) * self.accum

    def __iter__(self):
        for step in range(self.start, self.stop):
            rows = self.indices(step).view(self.accum, self.world, -1)[:, self.rank]
            for row in rows.tolist():
                yield [(step // (self.n // self.batch_size), index) for index in row]


def ignore_signals(leaving, _):
    """Only the main process decides when a run ends: Ctrl-C and stop signals often reach the workers as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.is_set() else None)


def make_loader(
    dataset, batch_size=256, workers=0, batch_sampler=None, pin_memory=False
):
    """DataLoader of Samples; without batch_sampler in order, the last short batch included."""
    options = (
        {"batch_sampler": batch_sampler}
        if batch_sampler is not None
        else {"batch_size": batch_size}
    )
    if workers:
        leaving = (
            multiprocessing.Event()
        )  # at exit Python sends workers SIGTERM and waits for them
        atexit.register(leaving.set)
        options |= {
            "persistent_workers": True,
            "worker_init_fn": functools.partial(ignore_signals, leaving),
        }
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        **options,
    )


class Feed:
    """
    Iterator over the Samples of `batches` (TrainBatches). waited: seconds spent waiting for them; unreadable: indices
    of the pictures that were replaced. Whoever reads the two resets them.
    """

    def __init__(self, dataset, batches, **options):
        self.samples = iter(make_loader(dataset, batch_sampler=batches, **options))
        self.asked, self.unreadable, self.waited = iter(batches), set(), 0.0

    def __next__(self):
        began = time.perf_counter()
        sample = next(self.samples)
        self.waited += time.perf_counter() - began
        pairs = zip(next(self.asked), sample.index.tolist(), strict=True)
        self.unreadable |= {asked for (_, asked), got in pairs if asked != got}
        return sample


# ---------------------------------------------------------------------------------------------------------------------
# Map files: NAME.npy, float16 (n, h, w) in [0, 1] in the order of the training split; NAME.json, what it is made of


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data set: objects on textured backgrounds. Shapes and textures are drawn once as small tables, rounded to
# 8 bit; a picture looks them up at turned and scaled coordinates: fast, and the same bits on every machine.


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
