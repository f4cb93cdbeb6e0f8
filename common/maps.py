"""
Map files: NAME.npy, float16 (n, h, w) in [0, 1] in the order of the training split; NAME.json, what it is made of.
And how good maps are, beside true masks.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.data import to_rgb
from common.files import replacing


def chunks(maps, values=2**22):
    """(first row, rows) of about `values` numbers each, 32 MiB in float64."""
    rows = max(1, values // max(1, maps.shape[1] * maps.shape[2]))
    return ((first, maps[first : first + rows]) for first in range(0, len(maps), rows))


def save_maps(path, maps, dataset, method, **settings):
    """
    Writes NAME.npy (= path) and NAME.json, each under a temporary name first. settings: plain types.
    maps: array (n, h, w) of any real type, may be memory-mapped. Each map is min-max normalised over the whole picture;
    flat (max - min <= 1e-5 max|M|) and failed (not finite) ones become zeros and are listed.
    """
    path = Path(path)
    if path.suffix != ".npy" or len(maps.shape) != 3 or len(maps) != len(dataset):
        raise ValueError(
            f"map file {path}: needs a name ending in .npy and maps ({len(dataset)}, h, w), one for each "
            f"picture, not {tuple(maps.shape)}"
        )
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f2", "fortran_order": False, "shape": tuple(maps.shape)}
    )
    checksum, flat, failed = hashlib.sha256(header.getvalue()), [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header.getvalue())
        for first, chunk in chunks(maps):
            m = np.array(chunk, dtype=np.float64, order="C").reshape(len(chunk), -1)
            bad = ~np.isfinite(m).all(1)
            m[bad] = 0
            low, high = m.min(1, keepdims=True), m.max(1, keepdims=True)
            even = high - low <= 1e-5 * abs(m).max(1, keepdims=True)
            m = np.where(even, 0, (m - low) / np.where(even, 1, high - low)).astype(
                "<f2"
            )
            failed += (first + np.flatnonzero(bad)).tolist()
            flat += (first + np.flatnonzero(even[:, 0] & ~bad)).tolist()
            checksum.update(m)
            file.write(m)
        manifest = {
            "method": method,
            "fingerprint": dataset.fingerprint,
            "number": len(maps),
            "shape": list(maps.shape),
            "flat": flat,
            "failed": failed,
            "checksum": checksum.hexdigest(),
            "settings": settings,
        }
        text = json.dumps(manifest, indent=1)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(text)


def load_maps(path, dataset):
    """
    (maps: memory-mapped float16 (n, h, w) in [0, 1], manifest: dict) of a file of save_maps, after one pass over it.
    ValueError, naming --maps, what is wrong and the remedy, unless it is whole and made for `dataset`.
    """
    path = Path(path)
    json_path = path.with_suffix(".json")

    def refuse(what, remedy="make the maps again with object_discovery.py"):
        raise ValueError(f"--maps {path}: {what}; {remedy}")

    if path.suffix != ".npy" or not path.is_file():
        refuse("no such .npy file", "give the NAME.npy that object_discovery.py wrote")
    if not json_path.is_file():
        refuse(f"the manifest {json_path.name} is missing", "keep it beside the .npy")
    try:
        manifest = json.loads(json_path.read_text())
        number, fingerprint, checksum = (
            manifest[key] for key in ("number", "fingerprint", "checksum")
        )
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"the manifest {json_path.name} is damaged ({error!r})")
    if (number, fingerprint) != (len(dataset), dataset.fingerprint):
        refuse(
            f"made for other data ({number} pictures, fingerprint {str(fingerprint)[:12]}, but --data has "
            f"{len(dataset)}, {dataset.fingerprint[:12]})",
            "use the --data and --classes it was made with",
        )
    try:
        maps = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        refuse(f"truncated or not a .npy file ({error})")
    if (
        maps.dtype != np.float16
        or maps.ndim != 3
        or len(maps) != len(dataset)
        or not maps.flags.c_contiguous
    ):
        refuse(
            f"holds {maps.dtype} {maps.shape}, must be float16 ({len(dataset)}, h, w)"
        )
    with open(path, "rb") as file:
        digest, bad = hashlib.sha256(file.read(maps.offset)), []
    for first, chunk in chunks(maps):
        digest.update(chunk)
        bad += (
            first + np.flatnonzero(~((chunk >= 0) & (chunk <= 1)).all((1, 2)))
        ).tolist()  # NaN fails both
    if bad:
        refuse(
            f"NaN, inf or values outside [0, 1] in {len(bad)} of {len(maps)} maps, the first is number {bad[0]}"
        )
    if (
        digest.hexdigest() != checksum
        or path.stat().st_size != maps.offset + maps.nbytes
    ):
        refuse("does not match the checksum in its manifest")
    return maps, manifest


def open_maps(path, dataset, name):
    """The maps (n, h, w) that guide training, on the host: of the map file `path`, or those the data set brings."""
    if path is None and dataset.masks is None:
        raise ValueError(
            f"--data {name} needs attention maps: make them with python object_discovery.py --method "
            f"tokencut --backbone dino_vits16 --data {name} --out maps.npy and pass --maps maps.npy, or "
            "train a vanilla MAE with --guidance none"
        )
    return dataset.masks if path is None else load_maps(path, dataset)[0]


def read_mask(folder, name):
    """The PNG of the same relative path, grey, 0 to 255. Palette pictures: index 0 is background, all else object.
    Pictures of 0 and 1: 1 is object."""
    picture = Image.open(Path(folder, name).with_suffix(".png"))
    grey = (
        np.asarray(picture) > 0
        if picture.mode == "P"
        else np.asarray(to_rgb(picture).convert("L"))
    )
    return Image.fromarray(np.uint8(grey) * 255 if grey.max() <= 1 else grey)


def quality(maps, truth):
    """Mean IoU, CorLoc and area under the ROC, in percent, of maps against truth: an iterable of bool (H, W) or None.

    A map is cut at its mean, as in TokenCut. IoU: the enlarged map's region and the mask. CorLoc: share of images where
    the box around the part of the region that holds the maximum overlaps the mask's box by half (IoU > 0.5). ROC: the
    enlarged map's values, over pixels, mean of the images. Images whose mask is missing, empty or full are left out.
    """
    scores = []
    for m, mask in zip(maps, truth, strict=True):
        if mask is None or mask.all() or not mask.any():
            continue
        m = np.float32(m)
        large = F.interpolate(
            torch.from_numpy(m)[None, None],
            mask.shape,
            mode="bilinear",
            align_corners=False,
        )
        large = large[0, 0].numpy()
        region, zoom = large > m.mean(), np.array(mask.shape) / m.shape
        iou = (region & mask).sum() / (region | mask).sum()
        (a0, a1), (b0, b1) = box(part_of_maximum(m)) * zoom, box(mask)  # corners (y, x)
        common = np.prod(np.clip(np.minimum(a1, b1) - np.maximum(a0, b0), 0, None))
        found = common > 0.5 * (np.prod(a1 - a0) + np.prod(b1 - b0) - common)
        _, inverse, counts = np.unique(large, return_inverse=True, return_counts=True)
        rank = (counts.cumsum() - (counts - 1) / 2)[
            inverse.reshape(large.shape)
        ]  # ties share their mean rank
        n = int(mask.sum())
        scores.append(
            (iou, found, (rank[mask].sum() - n * (n + 1) / 2) / (n * (mask.size - n)))
        )
    if not scores:
        raise ValueError(
            "--masks: no picture has a mask with both object and background; is it the right folder?"
        )
    means = (100 * np.mean(scores, axis=0)).tolist()
    return dict(zip(("IoU", "CorLoc", "AUROC"), means, strict=True)) | {
        "images": len(scores)
    }


def part_of_maximum(m):
    """bool (h, w): the 4-connected part of m > mean that holds the (first) maximum; nothing of a flat map."""
    region = m > m.mean()
    part = (np.arange(m.size).reshape(m.shape) == m.argmax()) & region
    while True:
        p = np.pad(part, 1)
        grown = (
            part | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
        ) & region
        if (grown == part).all():
            return part
        part = grown


def box(region):
    """The corners ((y0, x0), (y1, x1)) of a region, bool (h, w), in cells; zeros if it is empty."""
    cells = np.argwhere(region)
    return (
        np.stack([cells.min(0), cells.max(0) + 1]) if len(cells) else np.zeros((2, 2))
    )


def true_masks(dataset, folder, ids):
    """The masks, bool (H, W), of a folder or of the toy set; None for a picture that has none. Object is what lies
    above half of the mask's own maximum, so that 0/1 and 0/255 both do."""
    for i in ids:
        try:
            mask = (
                np.asarray(read_mask(folder, dataset.names[i]))
                if folder
                else dataset.masks[i]
            )
            yield mask > mask.max() / 2
        except Exception:  # no such file, or no picture: decoders raise OSError, SyntaxError, ValueError ...
            yield None
