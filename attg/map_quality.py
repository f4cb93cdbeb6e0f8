"""Quality of attention maps against object masks: IoU, CorLoc, AUROC."""

import numpy as np
import torch
import torch.nn.functional as F

from attg.log import log_line


def ground_truth_masks(masks, rows):
    """Yield the mask of each of the rows, bool (H, W), or None if it cannot be read.

    masks: a MaskFolder, or arrays uint8 (H, W), 255 = object.
    """
    errors = []
    for i in rows:
        try:
            yield masks[i] > 127
        # Missing, or not an image: decoders raise OSError, SyntaxError, ValueError.
        except Exception as error:
            errors.append(error)
            yield None
    if errors:
        log_line(f"{len(errors)} masks are missing or refused, the first: {errors[0]}")


def quality(maps, truth):
    """Compare maps (h, w) with true masks, an iterable of bool (H, W) or None.

    Returns {"IoU", "CorLoc", "AUROC": mean in percent, "images": number}. Images whose
    mask is missing, empty or full are skipped, and pixels that a masked array leaves out.
    ValueError if none is left.
    """
    scores = []
    for m, mask in zip(maps, truth, strict=True):
        if mask is None or mask.all() or not mask.any():
            continue
        m, mask = np.float32(m), np.ma.asarray(mask)
        upsampled = torch.from_numpy(m)[None, None]
        upsampled = F.interpolate(upsampled, mask.shape, mode="bilinear")[0, 0].numpy()
        # As in TokenCut, the threshold is the mean of the map before upsampling.
        region = upsampled > m.mean()
        iou = (region & mask).sum() / (region | mask).sum()
        valid = ~np.ma.getmaskarray(mask)
        area = auroc(upsampled[valid], mask.data[valid])
        scores.append((iou, is_localized(m, mask.filled(False)), area))
    if not scores:
        raise ValueError(
            "--masks: no image has a mask with both object and background; "
            "is it the right folder?"
        )
    iou, corloc, area = (100 * np.mean(scores, axis=0)).tolist()
    return {"IoU": iou, "CorLoc": corloc, "AUROC": area, "images": len(scores)}


def is_localized(m, mask):
    """CorLoc of one image: do the boxes of map and mask overlap with IoU > 0.5?

    m (h, w): the box of the component that holds its maximum. mask: bool (H, W).
    """
    part = peak_component(m, m.mean())
    if not part.any():
        return False
    regions = [torch.from_numpy(region)[None] for region in (part, mask)]
    from torchvision.ops import box_iou, masks_to_boxes

    # Boxes (x0, y0, x1, y1); torchvision's end at the last pixel, not behind it.
    ends = torch.tensor([0, 0, 1, 1])
    box, true_box = (masks_to_boxes(region).double() + ends for region in regions)
    h, w = (side / cells for side, cells in zip(mask.shape, m.shape, strict=True))
    return box_iou(box * torch.tensor([w, h, w, h]), true_box).item() > 0.5


def auroc(values, mask):
    """Area under the ROC curve: how often a value in the mask is above one outside.

    Ties count half.
    """
    inside, outside = values[mask], np.sort(values[~mask])
    below = np.searchsorted(outside, inside, "left")
    not_above = np.searchsorted(outside, inside, "right")
    return (below + not_above).mean() / (2 * outside.size)


def peak_component(m, threshold):
    """bool (h, w): the 4-connected component of m > threshold that holds the maximum."""
    region = torch.from_numpy(m > threshold)[None].float()
    part = torch.zeros_like(region)
    part.view(-1)[m.argmax()] = 1
    part *= region
    # Grow by the neighbors of each cell until nothing is added.
    while True:
        across = F.max_pool2d(part, (1, 3), stride=1, padding=(0, 1))
        along = F.max_pool2d(part, (3, 1), stride=1, padding=(1, 0))
        grown = torch.maximum(across, along) * region
        if grown.equal(part):
            return part[0].bool().numpy()
        part = grown
