"""
Data sets: everything that --data accepts, as indexed samples of 8-bit images.

    train = open_data("toy", "train", size=32, augment=True, seed=0)
    sample = train[epoch, index]    # a random crop, a function of (seed, epoch, index)
    sample = train[index]           # the evaluation view: whole image or center crop
    image, label, index, box, flip = sample

Loader workers decode and crop in 8 bits. A Sample carries the box and the flip of its
crop: the device normalizes and flips the image, and crops its attention map alike.
"""

import contextlib
import functools
import os
import re
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from attg.distributed import broadcast_from_rank0
from attg.files import sha256
from attg.images import MAX_PIXELS, MODES, ImageData, as_label, generator_for
from attg.log import log_line
from attg.toy import TOY_CLASSES, toy


def open_data(
    name,
    split="train",
    size=32,
    augment=False,
    seed=0,
    classes=None,
    channels=3,
    max_pixels=MAX_PIXELS,
    white=None,
    verify=False,
):
    """Open one split of a data set: ImageData, or None if there is no such split.

        name        a value of --data, see docs/data.md; or a map-style data set
                    of (PIL image, label), or a dict {"train": ..., "test": ...} of them
        split       "train" or "test"; for toy also one of TOY_VARIANTS; for class
                    folders also another folder of the same classes
        size        of the samples in pixels, int or (h, w)
        augment     True = random crop and flip for keys (epoch, index); or another
                    function (PIL image, size, seed) -> (PIL image, box, flip)
        classes     --classes: a text file with the class folders to keep, one per line
        channels    3 = RGB, 1 = gray
        max_pixels  images with more pixels are treated as unreadable
        white       level of white in gray of more than 8 bits, see to_8_bits
        verify      the fingerprint covers the contents of all files

    A label from Python is an int, or -1 or None for no label. Attributes `targets` (all
    labels) and `classes`, as in torchvision, avoid a pass over the images.
    ValueError names --data or --classes, the value and the remedy.
    """
    if channels not in MODES:
        raise ValueError(f"--in_chans {channels}: must be 3 (RGB) or 1 (gray)")
    named = isinstance(name, str | os.PathLike)
    path = Path(os.path.expanduser(name)) if named else None
    if classes and not (named and path.is_dir()):
        raise ValueError(f"--classes {classes}: only for a folder of class folders")
    if not named:
        source = open_python(name, split)
    elif name == "toy":
        images, masks, labels = toy(split)
        names = [f"toy/{split}/{i:05d}" for i in range(len(images))]
        pairs = list(zip(map(Image.fromarray, images), labels, strict=True))
        source = pairs, names, labels, len(TOY_CLASSES), "", masks
    elif name in TORCHVISION:
        source = open_torchvision(name, split)
    else:
        source = open_path(path, split, classes)
    if source is None:
        return None
    view = {"augment": augment, "seed": seed, "channels": channels, "white": white}
    view["verify"] = verify
    return ImageData(*source, size=size, max_pixels=max_pixels, **view)


# The functions below return the first fields of ImageData, or None without such a split.
def open_python(data, split):
    """A map-style data set, or a dict of them by split."""
    sources = data if isinstance(data, Mapping) else {"train": data}
    if split not in sources and split != "train":
        return None
    source = sources[split]
    labels, classes = (getattr(source, x, None) for x in ("targets", "classes"))
    lists = []
    for x in (sources.get("train"), source):
        while isinstance(x, Subset):
            x = x.dataset
        lists.append(getattr(x, "classes", None))
    if all(x is not None for x in lists) and list(lists[0]) != list(lists[1]):
        odd = sorted(set(lists[0]) ^ set(lists[1]))[:5]
        reason = f"the classes of {split} and training differ, {odd} are in one only"
        raise ValueError(f"data: {reason}; give both the same `classes` and `targets`")
    if labels is not None:
        labels = list(map(as_label, labels))
    names = [f"data/{split}/{i:06d}" for i in range(len(source))]
    return source, names, labels, None if classes is None else len(classes)


# Class in torchvision.datasets, number of classes; then the second argument of the class:
# for each part of the training split, and for the test split.
TORCHVISION = {
    "cifar10": ("CIFAR10", 10, [True], False),
    "cifar100": ("CIFAR100", 100, [True], False),
    "flowers102": ("Flowers102", 102, ["train", "val"], "test"),
    "dtd": ("DTD", 47, ["train"], "test"),
    "pets": ("OxfordIIITPet", 37, ["trainval"], "test"),
    "stl10": ("STL10", 10, ["train+unlabeled"], "test"),
    "imagenette": ("Imagenette", 10, ["train"], "val"),
    "stanford_cars": ("StanfordCars", 196, ["train"], "test"),
}


def open_torchvision(name, split):
    """A data set of torchvision, downloaded if it is missing."""
    import torchvision

    kind, num_classes, train_parts, test_part = TORCHVISION[name]
    root = os.path.expanduser(os.environ.get("ATTG_DATA") or "~/.cache/attg_mae")
    parts = {"train": train_parts, "test": [test_part]}.get(split)
    if parts is None:
        raise ValueError(f"split {split!r} of --data {name}: must be train or test")

    def open_part(part):
        dataset = getattr(torchvision.datasets, kind)
        try:
            return dataset(root, part)
        # How torchvision says that files are missing.
        except RuntimeError:
            return dataset(root, part, download=True)

    try:
        # The other ranks wait for the download.
        if dist.is_initialized():
            broadcast_from_rank0(lambda: len(list(map(open_part, parts))))
        pairs = ConcatDataset(map(open_part, parts))
    # No network, a full disk, a broken archive, scipy missing for MATLAB files.
    except Exception as error:
        raise ValueError(
            f"--data {name}: not downloaded ({error!r}); put what torchvision.datasets."
            f"{kind} needs into {root}, or set ATTG_DATA to another folder"
        ) from error
    names = [f"{name}/{split}/{i:06d}" for i in range(len(pairs))]
    return pairs, names, None, num_classes


LAYOUTS = (
    "A folder must hold train/CLASS/*.jpg and, for a test split, val/CLASS/*.jpg or "
    "test/CLASS/*.jpg; or CLASS/*.jpg; or images directly, here or in train/ (a flat "
    "folder, for pre-training only)."
)
# Folders that operating systems and NAS boxes leave behind.
JUNK = {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot"}
JUNK |= {"$RECYCLE.BIN", "System Volume Information", "lost+found"}
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif")
# The last four cannot be read: they are reported as such instead of being left out.
SUFFIXES += (".tiff", ".webp", ".avif", ".jp2", ".heic", ".heif", ".jxl", ".dcm")
# Names of folders: of splits, such as Training, test_set, seg_val and train2017; of masks.
SPLIT_PATTERN = r"(.*[ _-])?(train|e?val|test)(ing|val|id|idation)?"
SPLIT = re.compile(rf"(?i){SPLIT_PATTERN}([ _-]?(set|data|images?|\d+))?")
MASK = r"mask|label(?!l?ed)|annot|segm|trimap|ground.?truth|(?<![a-z])(gt|seg)(?![a-z])"
IMAGE = re.compile("(?i)image|img|original|input|rgb|^[ab]$")  # beside masks
# 1_mask and 1_mask_2, which lie beside the image 1 or 1_sat.
MASK_OF = re.compile(f"(?i)(.+?)[ ._-]({MASK}).*")
MASK = re.compile(f"(?i){MASK}")


def open_path(path, split, classes):
    """An image, or a folder in one of LAYOUTS; split and classes as in open_data."""
    if path.is_file() and path.name.lower().endswith(SUFFIXES):
        image = None, [path.name], np.array([-1]), 0, path.parent
        return image if split == "train" else None
    if not path.is_dir():
        raise ValueError(
            f"--data {path}: neither a folder, an image ({', '.join(SUFFIXES[:-4])}) "
            f"nor one of toy, {', '.join(TORCHVISION)}. {LAYOUTS}"
        )
    train = path / "train" if (path / "train").is_dir() else path
    candidates = [Path(split, "val"), Path(split, "test"), Path(split)]
    if split == "train":
        candidates = [train]
    elif split == "test":
        names = ("val", "valid", "validation", "test") if train != path else ()
        candidates = [path / name for name in names]
    folder = next(filter(Path.is_dir, candidates), None)
    if folder is None:
        if split == "test":
            return None
        raise ValueError(f"split {split!r} of --data {path}: no such folder")
    found = find_images(path, train, folder, classes)
    names = [name for below in found.values() for name in below]
    check_names(path, folder, names)
    labels = np.repeat(np.arange(len(found)), [len(below) for below in found.values()])
    # The images of a flat folder have no class.
    flat = "" in found
    return None, names, labels - flat, len(found) - flat, folder


def find_images(path, train, folder, classes):
    """{class: names of its images, relative to folder}; the class "" of a flat folder.

    ValueError unless the folder has images of each class of the training folder, or of
    the file `classes`.
    """
    here, images = list_folder(folder)
    expected = list_folder(train)[0]
    if images and folder != train and not here:
        # ImageNet's val/ as it is unpacked: training needs no labels there.
        return {"": images}
    if classes:
        # Bytes that are not text give unknown names.
        lines = Path(classes).read_text(errors="replace").splitlines()
        expected = sorted({line.strip() for line in lines} - {""})
        here, images = [c for c in here if c in expected], []
    found = walk_images(folder, here)
    filled = [c for c, names in found.items() if names]
    if folder == train != path and not classes and (images or filled):
        check_train_is_no_class(path, filled)
    if images and not filled:
        return {"": images}

    odd = sorted(set(expected) ^ set(filled))[:5]
    if filled and not images and not odd:
        return found
    reason = f"no class folders and no images in {folder}"
    if images:
        reason = f"{folder} mixes images ({images[0]}) and class folders ({filled[0]}/)"
    elif odd:
        listed = f"--classes {classes}" if classes else train
        reason = f"{folder} has images of {filled[:5]}, the classes of {listed} are "
        reason += f"{expected[:5]}; {odd} are in one only"
    raise ValueError(
        f"--data {path}: {reason}; move what does not belong there elsewhere, or list "
        f"the classes to use in a file for --classes. {LAYOUTS}"
    )


def check_train_is_no_class(path, filled):
    """Raise ValueError if train/, with images in the folders `filled`, may be a class."""
    others = set(list_folder(path)[0]) - {"train"}
    if any(map(SPLIT.fullmatch, others)):
        return
    for other in sorted(others):
        folders, images = list_folder(path / other)
        if filled:
            images = folders == filled and list_folder(path / other / filled[0])[1]
        if images and not MASK.search(other):
            raise ValueError(
                f"--data {path}: is train/ a class, as {other}/ beside it? If so, move all "
                f"class folders into a new train/; otherwise pass --data {path / 'train'}"
            )


def check_names(path, folder, names):
    """Raise ValueError if some images, by their names, are test images, masks or copies."""
    stems = {name.rpartition(".")[0] for name in names}
    masks = {}
    # A set is in no order: if most images have masks, some of its first names are masks.
    if any(map(MASK_OF.fullmatch, list(stems)[:1000])):
        masks = {x: m[1] for x in stems if (m := MASK_OF.fullmatch(x))}
        bases = stems | {re.sub("[ ._-][^/ ._-]+$", "", x) for x in stems - set(masks)}
        masks = {x for x, base in masks.items() if base in bases}
    images = len(stems) - len(masks)
    if len(names) - images > images / 2:
        reason = f"most images appear twice, {names[:2]} ...; move masks elsewhere"
        raise ValueError(f"--data {path}: {reason} (for --masks), delete copies")
    below = defaultdict(set)  # {folder: its subfolders that have images}
    for place in map(Path, {name.rpartition("/")[0] for name in names}):
        for x in [place, *place.parents][:-1]:
            below[x.parent].add(x.name)
    for parent, inside in list(below.items()):
        splits = {x: m[2].lower() for x in sorted(inside) if (m := SPLIT.fullmatch(x))}
        masks = set(filter(MASK.search, inside))
        images = sorted(filter(IMAGE.search, inside - masks)) if masks else []
        copies = [x for x in inside if inside <= below[parent / x] | {x}]
        all_splits = parent == Path() and len(splits) == len(inside)
        meant = images or (copies if len(inside) > 2 else [])
        if all_splits or len(set(splits.values())) > 1:
            meant = sorted(splits, key=lambda x: splits[x] != "train")
        if meant:
            raise ValueError(
                f"--data {path}: {sorted(inside)[:5]} seem to be splits, images and masks, "
                f"or copies, not classes; pass --data {folder / parent / meant[0]} (others "
                "as --val or --masks), or rename or move them"
            )
    top = sorted(below[Path()])
    inner = [below[Path(x)] for x in top]
    if len(top) > 1 and len(inner[0]) > 1 and inner.count(inner[0]) == len(top):
        reason = f"all of {top[:3]} have the folders {sorted(inner[0])[:3]}; are those"
        log_line(f"--data {path}: {reason} the classes? Pass --data {folder / top[0]}")


def list_folder(folder):
    """(folders, images) directly in a folder: two sorted lists of names.

    Only regular files are images: opening a pipe or a device could block for ever.
    Hidden names and JUNK are left out. ValueError if over 1 % are links without a target.
    """
    folders, images, missing = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            # A link to itself raises OSError.
            with contextlib.suppress(OSError):
                if entry.name.startswith(".") or entry.name in JUNK:
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(SUFFIXES):
                    if entry.is_file():
                        images.append(entry.name)
                    elif not os.path.exists(entry.path):
                        missing.append(entry.name)
    if len(missing) > (len(images) + len(missing)) / 100:
        reason = f"{len(missing)} links without a target in {folder}, as {missing[0]}"
        raise ValueError(f"--data: {reason}; fetch what they point to, or delete them")
    return sorted(folders), sorted(images)


def walk_images(root, classes):
    """{class: images below root/class, relative to root, in the order of ImageFolder}.

    Links are followed, but no folder is entered twice, nor one above root: a link
    cannot lead in circles, or from one class into another.
    """
    root = root.resolve()
    entered = {root, *root.parents}
    found = {c: [] for c in classes}
    # Links come last: a folder that is reachable without them keeps its own path.
    queue = deque((c, c) for c in classes)
    while queue:
        c, name = queue.popleft()
        folder = (root / name).resolve()
        if folder in entered:
            continue
        entered.add(folder)
        below, images = list_folder(folder)
        found[c].append((name, images))
        for x in below:
            add = queue.append if (folder / x).is_symlink() else queue.appendleft
            add((c, f"{name}/{x}"))
    return {
        c: [f"{name}/{image}" for name, images in sorted(below) for image in images]
        for c, below in found.items()
    }


def resolve_dataset(data, name):
    """The first argument of open_data: a data set passed from Python, or `name`.

    ValueError if its name is that of other data, which would mix up runs and results.
    """
    if data is not None and (name in ("toy", *TORCHVISION) or os.path.exists(name)):
        remedy = "--data NAME, or Config(data=NAME)"
        raise ValueError(f"data: its name must be other than {name}: {remedy}")
    return name if data is None else data


def open_labeled(name, tests, size, augment=False, seed=0, **options):
    """Open the training split and the splits `tests`: (train_set, {test: test_set}).

    options: of open_data. All must have labels, or ValueError.
    """
    from_python = not isinstance(name, str | os.PathLike)
    sets = {"train": open_data(name, "train", size, augment, seed, **options)}
    sets |= {test: open_data(name, test, size, **options) for test in tests}
    for split, dataset in sets.items():
        # The first image of a user's data may have no label.
        labeled = dataset is not None and (from_python or dataset.labeled)
        # Most training images of stl10 have no labels; some of a user's data may not.
        if labeled and (from_python or name == "stl10"):
            rows = (dataset.labels >= 0).nonzero().flatten()
            check_unreadable(dataset)
            labeled, sets[split] = len(rows) > 0, dataset.subset(rows)
        if not labeled:
            raise ValueError(
                f"--data {'' if from_python else name}: needs labels in {split}; sort "
                "the images into train/CLASS/ and val/CLASS/, or name another folder "
                f"of the same classes with --{'data' if split == 'train' else 'val'}"
            )
    train_set = sets.pop("train")
    for test, dataset in sets.items():
        if train_set.pairs is dataset.pairs is None:
            known = files_in_common(train_set, dataset)
            if known > len(dataset) / 100:
                reason = f"{known} of {len(dataset)} are training images"
                raise ValueError(f"--val {test}: {reason}; remove them, or name others")
        # The classes of folders are the same.
        if from_python and dataset.labels.max() >= train_set.num_classes:
            reason = f"label {dataset.labels.max()} in {test} is not a training class"
            raise ValueError(f"data: {reason}; count both from 0, or set `classes`")
    return train_set, sets


def files_in_common(train_set, test_set):
    """Number of test files with the name and content of a training file."""
    train, test = ([x.path(i) for i in range(len(x))] for x in (train_set, test_set))
    # Most files differ in the name or in the size, so that few contents are read.
    for key in map(functools.cache, (os.path.basename, os.path.getsize, sha256)):
        both = set(map(key, train)).intersection(map(key, test))
        train, test = ([x for x in paths if key(x) in both] for paths in (train, test))
    return len(test)


def check_unreadable(dataset):
    """ValueError if more images are unreadable than dataset.max_unreadable.

    Collective: all ranks call it at once.
    """
    rows = dataset.unreadable.nonzero().flatten().tolist()
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        rows = sorted(set().union(*parts))
    if len(rows) > dataset.max_unreadable:
        reason = f"{len(rows)} of {len(dataset)} images are unreadable, over 1 %"
        first = f"repair or remove them, the first is {dataset.path(rows[0])}"
        raise ValueError(f"--data: {reason}; {first}")


def shot_indices(labels, shots, seed):
    """Draw a few images of each class: int64 indices (m,) into labels (n,).

    shots: images per class if an int, a fraction (at least one image) if a float. A
    class that has fewer gives all it has. The draw depends on labels, shots and seed
    alone; fewer shots are a subset of more. ValueError for a class without images.
    """
    chosen = []
    for c in range(int(labels.max()) + 1):
        members = (labels == c).nonzero().flatten()
        # The order is the same for any number of shots.
        order = torch.randperm(len(members), generator=generator_for("shots", seed, c))
        count = shots
        if isinstance(shots, float):
            count = max(1, round(shots * len(members)))
        elif len(members) == 0:
            raise ValueError(f"--shots {shots}: class {c} has no images; add some")
        chosen.append(members[order[:count]])
    return torch.cat(chosen)
