"""Quality of attention maps beside object masks: IoU, CorLoc, AUROC."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from attg.images import load_image, to_rgb

# -- True masks ------------------------------------------------------------------------


def read_mask(folder, name):
    """
    The PNG in `folder` with the relative path of the picture `name`: grey, 0 to 255.
    OSError if there is none; see load_image.

    Palette pictures: index 0 is background, all else object. Pictures of 0 and 1: 1 is
    object.
    """
    path = Path(folder, name).with_suffix(".png")
    # To open a pipe or a device may take for ever.
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    picture = load_image(path)
    if picture.mode == "P":
        grey = np.asarray(picture) > 0
    else:
        grey = np.asarray(to_rgb(picture).convert("L"))
    if grey.max() <= 1:
        grey = np.uint8(grey) * 255
    return Image.fromarray(grey)


def true_masks(dataset, folder, ids):
    """
    The masks, bool (H, W), of a folder or, without one, of the toy set; None for a
    picture that has none.

    Object is what lies above half of the mask's own maximum, so that 0/1 and 0/255
    both do.
    """
    for i in ids:
        try:
            if folder:
                mask = np.asarray(read_mask(folder, dataset.names[i]))
            else:
                mask = dataset.masks[i]
            yield mask > mask.max() / 2
        # No such file, or no picture: decoders raise OSError, SyntaxError, ValueError.
        except Exception:
            yield None


# -- Quality of maps -------------------------------------------------------------------


def quality(maps, truth):
    """
    Mean IoU, CorLoc and area under the ROC, in percent, of maps against truth: an
    iterable of bool (H, W) or None. Returns {"IoU", "CorLoc", "AUROC", "images"}.

    Images whose mask is missing, empty or full are left out; ValueError if none is
    left.
    """
    scores = []
    for m, mask in zip(maps, truth, strict=True):
        if mask is None or mask.all() or not mask.any():
            continue
        m = np.float32(m)
        large = enlarge(m, mask.shape)
        # As in TokenCut, a map is cut at its mean: the small map's, not the large one's.
        region = large > m.mean()
        scores.append((overlap(region, mask), located(m, mask), auroc(large, mask)))
    if not scores:
        raise ValueError(
            "--masks: no picture has a mask with both object and background; "
            "is it the right folder?"
        )
    iou, corloc, area = (100 * np.mean(scores, axis=0)).tolist()
    return {"IoU": iou, "CorLoc": corloc, "AUROC": area, "images": len(scores)}


def enlarge(m, shape):
    """A map float32 (h, w), bilinearly, as (H, W) = shape."""
    m = torch.from_numpy(m)[None, None]
    return F.interpolate(m, shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def overlap(region, mask):
    """IoU of two regions, bool (H, W): what they share, as a part of their union."""
    return (region & mask).sum() / (region | mask).sum()


def located(m, mask):
    """
    CorLoc of one picture: whether the box around the part of the map m (h, w) that
    holds its maximum overlaps the box of the mask, bool (H, W), with IoU > 0.5.
    """
    zoom = np.array(mask.shape) / m.shape
    low, high = box(part_of_maximum(m)) * zoom
    true_low, true_high = box(mask)
    sides = np.minimum(high, true_high) - np.maximum(low, true_low)
    common = np.prod(np.clip(sides, 0, None))
    both = np.prod(high - low) + np.prod(true_high - true_low)
    return common > 0.5 * (both - common)


def auroc(values, mask):
    """
    Area under the ROC of values (H, W) as a classifier of pixels: the probability that
    a pixel of the object has a greater value than one of the background, ties counting
    half. Calculated from ranks (Mann-Whitney).
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Ties share their mean rank. The shape of `inverse` depends on NumPy's version.
    mean_ranks = counts.cumsum() - (counts - 1) / 2
    rank = mean_ranks[inverse.reshape(values.shape)]
    n = int(mask.sum())
    return (rank[mask].sum() - n * (n + 1) / 2) / (n * (mask.size - n))


def part_of_maximum(m, threshold=None):
    """
    bool (h, w): the 4-connected part of m > threshold, by default the mean, that holds
    the (first) maximum; nothing of a flat map.
    """
    region = m > (m.mean() if threshold is None else threshold)
    part = (np.arange(m.size).reshape(m.shape) == m.argmax()) & region
    # Grows by the neighbours of each cell until nothing is added.
    while True:
        padded = np.pad(part, 1)
        beside = padded[1:-1, :-2] | padded[1:-1, 2:]
        above_or_below = padded[:-2, 1:-1] | padded[2:, 1:-1]
        grown = (part | beside | above_or_below) & region
        if (grown == part).all():
            return part
        part = grown


def box(region):
    """
    The corners ((y0, x0), (y1, x1)) of a region, bool (h, w), in cells; zeros if it is
    empty.
    """
    cells = np.argwhere(region)
    if len(cells) == 0:
        return np.zeros((2, 2))
    return np.stack([cells.min(0), cells.max(0) + 1])
