"""
The photographs with boxes of docs/study.md: images, maps made of the boxes, and test images
with changed backgrounds.

    wget http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip tiny-imagenet-200.zip
    python -m docs.study_data tiny-imagenet-200 tinymid30        # or tinybox20

The folder receives:

    train/          training images whose box is neither too small nor too large
    val/            validation images, and the other training images
    original/       validation images whose box covers 10 to 65 %
    grey/           the same, gray outside the box
    same_class/     the same, outside the box another of these images, of the same class
    other_class/    the same, outside the box one of another class
    box.npy         maps of train/: 1 inside the box, 0 outside
    shuffled.npy    the same maps, each given to another image
"""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from attg.datasets import open_data
from attg.maps import save_maps
from study import shuffle

SIDE = 64
GRAY = np.full((SIDE, SIDE, 3), 128, np.uint8)
# Shares of the image that the boxes of test images cover; of training images, with classes.
TEST_SHARES = 0.10, 0.65
SUBSETS = {
    "tinymid30": (
        (0.12, 0.60),
        "n01629819 n01944390 n01945685 n02279972 n02281406 n02321529 n02669723 n02793495 "
        "n02814860 n02815834 n02823428 n02837789 n03179701 n03201208 n03444034 n03447447 "
        "n03617480 n03837869 n03937543 n03983396 n04023962 n04133789 n04254777 n04259630 "
        "n04487081 n04562935 n04597913 n07614500 n07711569 n09428293",
    ),
    "tinybox20": (
        (0.03, 0.50),
        "n02165456 n02814860 n02837789 n02948072 n03250847 n03255030 n03355925 n03770439 "
        "n03804744 n03814639 n03837869 n03970156 n03976657 n04251144 n04356056 n04371430 "
        "n04376876 n04456115 n07615774 n12267677",
    ),
}


class Photo(NamedTuple):
    path: Path
    wnid: str
    mask: np.ndarray  # of the box, bool (SIDE, SIDE)


def read_photos(boxes, folder, wnid=None):
    """Photos of the lines of the file boxes: name, class unless given, x0, y0, x1, y1."""
    photos = []
    for line in boxes.read_text().splitlines():
        name, *wnids, x0, y0, x1, y1 = line.split()
        mask = np.zeros((SIDE, SIDE), bool)
        mask[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = True
        photos.append(Photo(folder / name, wnid or wnids[0], mask))
    return photos


def pixels_of(photo):
    """uint8 (SIDE, SIDE, 3)"""
    return np.asarray(Image.open(photo.path).convert("RGB"))


def select(photos, shares):
    """The photos whose box covers a share of the image between the two `shares`."""
    return [photo for photo in photos if shares[0] <= photo.mask.mean() <= shares[1]]


def draw_partner(photo, photos, same, rng):
    """Another photo at random, of the same class or of any other class."""
    others = [x for x in photos if (x.wnid == photo.wnid) == same and x is not photo]
    return others[rng.integers(len(others))]


def write_photos(photos, folder, backgrounds=None):
    """Copy photos to folder/WNID/, or paste their boxes into backgrounds and write PNGs."""
    for i, photo in enumerate(photos):
        file = folder / photo.wnid / photo.path.name
        file.parent.mkdir(parents=True, exist_ok=True)
        if backgrounds is None:
            shutil.copyfile(photo.path, file)
            continue
        pasted = np.where(photo.mask[..., None], pixels_of(photo), backgrounds[i])
        Image.fromarray(pasted).save(file.with_suffix(".png"))


def main(tiny, out):
    """Write the subset that the folder out is named after."""
    tiny, out = Path(tiny), Path(out)
    shares, wnids = SUBSETS[out.name]
    wnids, training = wnids.split(), []
    for wnid in wnids:
        folder = tiny / "train" / wnid
        training += read_photos(folder / f"{wnid}_boxes.txt", folder / "images", wnid)
    boxes = tiny / "val" / "val_annotations.txt"
    validation = read_photos(boxes, boxes.with_name("images"))
    validation = [photo for photo in validation if photo.wnid in wnids]

    masks = {f"{x.wnid}/{x.path.name}": x.mask for x in select(training, shares)}
    for photo in training:
        chosen = f"{photo.wnid}/{photo.path.name}" in masks
        write_photos([photo], out / ("train" if chosen else "val"))
    write_photos(validation, out / "val")
    photos = select(validation, TEST_SHARES)
    write_photos(photos, out / "original")
    write_photos(photos, out / "grey", [GRAY] * len(photos))
    rng = np.random.default_rng(0)
    for name in ("same_class", "other_class"):
        partners = [draw_partner(x, photos, name == "same_class", rng) for x in photos]
        write_photos(photos, out / name, [pixels_of(x) for x in partners])

    dataset = open_data(out, "train")
    maps = np.stack([masks[name] for name in dataset.names])
    save_maps(out / "box.npy", maps, dataset, method="box")
    save_maps(out / "shuffled.npy", shuffle(maps, 0), dataset, "box, shuffled", seed=0)
    print(f"{out}: {len(maps)} training images, {len(photos)} on each background")


if __name__ == "__main__":
    main(*sys.argv[1:])
