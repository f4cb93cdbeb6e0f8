"""
Where images come from: files in folders, and torchvision's data sets.

In a class folder, folders may be nested and links are followed, but no folder is entered
twice. Only regular files with an image suffix count.
"""

import contextlib
import os
from collections import deque
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torchvision
from torch.utils.data import ConcatDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

# -- Folders ---------------------------------------------------------------------------

LAYOUTS = (
    "A folder must hold train/CLASS/*.jpg and, for a test split, val/CLASS/*.jpg or "
    "test/CLASS/*.jpg; or CLASS/*.jpg; or images directly, here or in train/ (a flat "
    "folder, for pre-training only)."
)


def check_split(name, split, splits=("train", "test"), folders=()):
    """ValueError unless --data `name` has this split.

    folders: its class folders, if any; then a split may be another folder.
    """
    if split not in splits and not (folders and Path(split).is_dir()):
        raise ValueError(
            f"split {split!r} of --data {name}: must be one of {', '.join(splits)}; or, "
            "for class folders, another folder of the same classes"
        )


def find_images(path, split, classes):
    """The images of a split: (folder, names relative to it, int64 labels (n,)), or None.

    path: an image, or a folder in one of LAYOUTS; split and classes as in open_data.
    Labels are -1 without class folders. None if there is no such split.
    """
    if path.is_file():
        if not is_image_file(path.name):
            suffixes = ", ".join(IMG_EXTENSIONS)
            raise ValueError(f"--data {path}: must be an image file, {suffixes}")
        check_split(path, split)
        return (path.parent, [path.name], np.array([-1])) if split == "train" else None

    train = path / "train" if (path / "train").is_dir() else path
    class_names = find_class_folders(path, train, classes)
    check_split(path, split, folders=class_names)
    candidates = [Path(split, "val"), Path(split, "test"), Path(split)]
    if split == "train":
        candidates = [train]
    elif split == "test":
        candidates = [path / "val", path / "test"] if train != path else []
    folder = next(filter(Path.is_dir, candidates), None)
    if folder is None:
        return None
    below = {"": list_folder(folder)[1]}
    if class_names or classes:
        selected = select_classes(path, train, class_names, folder, classes)
        below = walk_images(folder, selected)
    empty = [c for c, names in below.items() if not names]
    if empty:
        what = f"of the classes {', '.join(empty[:5])} " if class_names else ""
        raise ValueError(
            f"--data {path}: no images {what}in {folder}; add them, or list the classes "
            f"that have some in a file for --classes. {LAYOUTS}"
        )
    names = [name for names in below.values() for name in names]
    labels = np.repeat(np.arange(len(below)), [len(names) for names in below.values()])
    return folder, names, labels if class_names else labels - 1


def find_class_folders(path, train, classes):
    """The names of the class folders in the training folder, [] if it is flat."""
    class_names, images = list_folder(train)
    # Without a train folder, val and test are not classes.
    if not images and set(class_names) <= {"val", "test"}:
        raise ValueError(
            f"--data {path}: no class folders and no images in {train}. {LAYOUTS}"
        )
    if not images or classes:
        return class_names
    filled = [c for c, below in walk_images(train, class_names).items() if below]
    if filled:
        raise ValueError(
            f"--data {path}: {train} contains images, such as {images[0]}, beside folders "
            f"with images, such as {filled[0]}/; move one or the other elsewhere, or list "
            "the class folders in a file for --classes"
        )
    return []


def select_classes(path, train, class_names, folder, classes):
    """The class folders of `folder`, which must be those of the training folder.

    class_names: the class folders in train; classes: the file that selects some of them.
    """
    here, _ = list_folder(folder)
    if classes:
        # Bytes that are not text give unknown names.
        lines = Path(classes).read_text(errors="replace").splitlines()
        selected = {line.strip() for line in lines} - {""}
        unknown = sorted(selected - set(class_names))[:5]
        if not selected or unknown:
            raise ValueError(
                f"--classes {classes}: {unknown or 'nothing'} listed, but the folders in "
                f"{train} are {class_names[:5]} ...; list their names, one per line"
            )
        class_names = [c for c in class_names if c in selected]
        here = [c for c in here if c in selected]
    if class_names != here:
        odd = sorted(set(class_names) ^ set(here))[:5]
        raise ValueError(
            f"--data {path}: {train} and {folder} hold different classes, {odd} are in "
            "one only; make them equal or list the common ones with --classes"
        )
    return here


def list_folder(folder, hidden=False):
    """(folders, images) directly in a folder: two sorted lists of names.

    Only regular files are images: opening a pipe or a device could block for ever.
    Hidden folders (.thumbnails, .ipynb_checkpoints) are left out unless hidden is True.
    """
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            # A link to itself raises OSError.
            with contextlib.suppress(OSError):
                if entry.is_dir() and (hidden or not entry.name.startswith(".")):
                    folders.append(entry.name)
                elif entry.is_file() and is_image_file(entry.name):
                    images.append(entry.name)
    return sorted(folders), sorted(images)


def walk_images(root, classes):
    """{class: paths of all images below root/class, relative to root}, as ImageFolder.

    Links are followed, but no folder is entered twice, nor one above root: a link
    cannot lead in circles, or from one class into another.
    """
    real = root.resolve()
    entered = {(p.stat().st_dev, p.stat().st_ino) for p in (real, *real.parents)}
    found = {c: [] for c in classes}
    # Links come last: a folder that is reachable without them keeps its own path.
    queue = deque((c, c) for c in classes)
    while queue:
        c, folder = queue.popleft()
        status = os.stat(root / folder)
        inode = status.st_dev, status.st_ino
        if inode not in entered:
            entered.add(inode)
            below, images = list_folder(root / folder, hidden=True)
            found[c].append((folder, images))
            for name in below:
                path = f"{folder}/{name}"
                add = queue.append if os.path.islink(root / path) else queue.appendleft
                add((c, path))
    return {
        c: [f"{folder}/{name}" for folder, names in sorted(below) for name in names]
        for c, below in found.items()
    }


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
    # No network, a full disk, a broken archive, scipy missing for MATLAB files.
    except Exception as error:
        raise ValueError(
            f"--data {name}: not opened from {root} and not downloaded "
            f"({type(error).__name__}: {error}); put the files of "
            f"torchvision.datasets.{kind} into {root / folder}, or set ATTG_DATA to the "
            f"folder that contains {folder}"
        ) from error
    return ConcatDataset(opened)
