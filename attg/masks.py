"""
Masks of the images of a data set: PNGs of the same relative paths in a folder.

One rule for the whole folder, decided by the values of up to 200 evenly spaced masks:

    alpha       object where it is opaque, if it is not the same everywhere
    two values  object is the higher; in palettes and colors without black, the one that
                does not prevail on the border of the images; other values are refused
    ids         palettes, colors, at most 64 grays below 128, grays in even areas: object
                is any but 0 (black); 255, in colors that of VOC's borders or ImageNet-S's
                1000, is ignored unless it is an id
    soft        other grays: parts of 255 or 65535, or of their maximum if it is far below

Palettes whose black is not the first color are read as colors.
--mask_values names the values that are object, numbers or colors as 0xRRGGBB, or the rule:
ids or soft.
"""

import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from attg.images import load_image
from attg.log import log_line

SAMPLE, MAX_IDS, MAX_ID = 200, 64, 127
# Neither object nor background: the first that occurs, or else the last. In colors: 1000 =
# 0x3E8 of ImageNet-S, whose ids are red + 256 * green; VOC's border.
IGNORED = {"gray": (255,), "palette": (255,), "color": (0xE80300, 0xE0E0C0)}
# Share of even steps (count_steps) up to which grays are soft, and from which they are ids.
# Drawn masks have at most 0.09 if soft (anti-aliased, blurred, JPEG, saliency of 320 x 320
# and maps of 14 x 14 enlarged with any filter; maps of 7 x 7 that are mostly 0 up to 0.3),
# 0.78 to 1 if ids (150 cells of radius 1 to 15, touching or not; dense and sparse scenes).
MAX_SOFT, MIN_IDS = 0.2, 0.7
# In EXIF; images of 2 to 8 are mirrored or turned, from 5 on their sides are swapped.
ORIENTATION = 0x0112


def read_values(path, palettes=True):
    """(kind, int64 (H, W), alpha (H, W) or None, whether black comes first) of a PNG.

    kind: gray, palette or color; black comes first unless a palette says otherwise.
    palettes=False reads them as colors.
    """
    # Opening a named pipe or a device would block.
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    image, alpha = load_image(path), None
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    black = True
    if image.mode.startswith("P"):
        colors = np.reshape(image.getpalette(), (-1, 3)).any(axis=1)
        used = np.unique(image.getchannel(0))  # 255 need not be in the palette
        black = not colors[0]
        # Programs that shrink files sort the colors: black comes later, indices are no ids.
        is_sorted = not black and not colors[used[used < len(colors)]].all()
        if is_sorted or not palettes:
            image = image.convert("RGBA")
    if image.mode not in ("RGB", "RGBA"):
        kind = "palette" if image.mode.startswith("P") else "gray"
        first = image.getchannel(0) if len(image.getbands()) > 1 else image
        return kind, np.asarray(first, np.int64), alpha, black
    red, green, blue = np.moveaxis(np.asarray(image, np.int64), 2, 0)[:3]
    if (red == green).all() and (red == blue).all():
        return "gray", red, alpha, black
    return "color", (red << 16) + (green << 8) + blue, alpha, black


def count_steps(x):
    """Numbers of even steps and of all: neighbors that differ by more than 1.

    A step is even if both neighbors have an equal one behind them. Steps from black to
    white do not count: soft masks have them, too.
    """
    counts = np.zeros(2)
    for lines in (x, x.T):
        lines = lines[:: len(lines) // 64 + 1]
        columns = np.flatnonzero(np.diff(lines).any(0)) + 1
        gaps = np.diff(columns)
        # A coarse mask was enlarged by repeating its pixels.
        if len(gaps) > 3 and 1 < gaps.min() >= np.median(gaps) - 1:
            lines = lines[:, [0, *columns]]
        sizes = abs(np.diff(lines))
        steps = ~np.isin(sizes[:, 1:-1], [0, 1, *range(250, 256), 65535])
        even = steps & (sizes[:, :-2] == 0) & (sizes[:, 2:] == 0)
        counts += even.sum(), steps.sum()
    return counts


class MaskFolder:
    """[i] -> the mask of image i: a masked array uint8 (H, W), without what is ignored.

    An object is 255, soft masks are in between. OSError or ValueError if there is no mask
    that fits the image. .rule says how the folder is read; ValueError if it cannot know.
    """

    def __init__(self, folder, dataset, mask_values=()):
        self.folder, self.dataset = Path(folder), dataset
        stems = Counter(os.path.splitext(name)[0] for name in dataset.names)
        stem, images = stems.most_common(1)[0]
        if images > 1:
            message = f"{images} images would share {stem}.png; rename or move them"
            raise ValueError(f"--masks {folder}: {message}")
        self.has_alpha, self.has_black, self.has_binary = False, True, False
        found, counts = self.read_sample()
        if not found:
            message = f"no mask can be read, such as {self.path(0)}; give PNGs of the"
            raise ValueError(f"--masks {folder}: {message} images' relative paths")
        kinds = {kind for kind, *_ in found}
        self.kind = "color" if "color" in kinds else max(kinds)
        if {"color", "palette"} <= kinds:
            found, counts = self.read_sample(palettes=False)
        values, border = set(), Counter()
        for kind, distinct, edges in found:
            self.has_binary |= kind == "gray" and distinct.tolist() == [0, 255]
            values |= set(self.convert(kind, distinct).tolist())
            border.update(self.convert(kind, edges).tolist())
        self.scale, self.ignored, self.listed, self.is_object = None, -1, set(), True
        self.two_values = None
        share = counts[0] / max(counts[1], 1)
        rule = self.decide(sorted(values), border, share, mask_values)
        form = "0x{:06X}" if self.kind == "color" else "{}"
        listed = " ".join(map(form.format, sorted(self.listed)))
        rule = rule.format(listed=listed, ignored=form.format(self.ignored))
        self.rule = f"--masks {folder}: {self.kind}, {rule}"
        if self.has_alpha and self.scale:
            return
        parts = self.object_part(sorted(values))
        if parts.min() == 1 or not parts.any():
            lacks = "background, as in heat maps in colors" if parts.any() else "object"
            message = f"no mask has {lacks}; give gray masks, or other --mask_values"
            raise ValueError(f"{self.rule}: {message}")
        edges, counts = zip(*border.items(), strict=True)
        if np.average(self.object_part(edges), weights=counts) > 0.5:
            log_line(f"--masks {folder}: most of the border is object; inverted?")

    def read_sample(self, palettes=True):
        """[(kind, values, values on the border)] of up to SAMPLE masks, and count_steps."""
        found, counts = [], np.zeros(2)
        sample = np.linspace(0, len(self.dataset) - 1, min(SAMPLE, len(self.dataset)))
        for i in sample.round().astype(int).tolist():
            try:
                kind, x, alpha, black = read_values(self.path(i), palettes)
            # Missing, or damaged: decoders raise OSError, SyntaxError, ValueError.
            except Exception:
                continue
            self.has_alpha |= alpha is not None and np.ptp(alpha) > 0
            self.has_black &= black
            counts += count_steps(x)
            edges = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
            found.append((kind, np.unique(x), edges))
        return found, counts

    def decide(self, values, border, share, mask_values):
        """Choose the rule by the sampled values, all and on the border; describe it.

        share: of even steps, see count_steps.
        """
        is_gray, choice = self.kind == "gray", " ".join(mask_values)
        if choice not in ("", "ids", "soft" if is_gray else "ids"):
            try:
                self.listed = {int(value, 0) for value in mask_values}
            except ValueError as error:
                message = f"--mask_values {choice}: give 1, 0xC08080, ids, soft (gray)"
                raise ValueError(message) from error
            return "object is {listed}"
        if self.has_alpha and choice != "ids":
            self.scale = 255
            return "object is where alpha is opaque"
        if len(values) <= 2 and not choice:
            self.two_values = values
            if self.has_black and (is_gray or values[0] == 0):
                self.listed = set(values[-1:]) - {0}
                return "object is {listed}"
            self.listed, self.is_object = {border.most_common(1)[0][0]}, False
            return "object is any but {listed}, which prevails on the border"

        are_few = len(values) <= MAX_IDS and max(set(values) - {255}) <= MAX_ID
        if choice or not is_gray or are_few:
            share = float(choice != "soft")
        if share <= MAX_SOFT:
            limit = 255 if values[-1] < 256 else 65535
            self.scale = values[-1] if values[-1] < limit / 4 else limit
            return f"soft, parts of {self.scale}"
        if not choice:
            gaps = np.diff(values)
            # Gray levels far apart, or equally
            levels = gaps[0] >= 32 or gaps[0] > 1 and np.ptp(gaps) <= 1
            white_is_object = values[-1] == 255 and (levels or self.has_binary)
            # 1, 2, 3 in Oxford-IIIT Pet: object, background, border
            if share < MIN_IDS or white_is_object or values == [1, 2, 3]:
                message = f"{values[:9]} may be ids, soft, trimaps or of several kinds"
                remedy = "pass the objects' values, --mask_values 1 255, or ids or soft"
                raise ValueError(f"--masks {self.folder}: {message}; {remedy}")
        self.listed, self.is_object = {0}, False
        is_id = 254 in values or values[-1] > 255 or self.has_binary
        if is_id and self.kind != "color":
            return "object is any but {listed}"
        *others, usual = IGNORED[self.kind]
        self.ignored = next((x for x in others if x in values), usual)
        return "object is any but {listed}, {ignored} is ignored"

    def convert(self, kind, values):
        """Gray values as colors if there are colors: a mask without an object is black."""
        return values * 0x10101 if (kind, self.kind) == ("gray", "color") else values

    def path(self, i):
        return Path(self.folder, self.dataset.names[i]).with_suffix(".png")

    def image_header(self, i):
        """Width, height and EXIF orientation of image i."""
        if self.dataset.pairs is None:
            file = Image.open(self.dataset.path(i))
        else:
            file = nullcontext(self.dataset.read(i)[0])
        with file as image:
            return *image.size, image.getexif().get(ORIENTATION, 1)

    def __getitem__(self, i):
        path = self.path(i)
        kind, values, alpha, _ = read_values(path, self.kind != "color")
        width, height, orientation = self.image_header(i)
        h, w = values.shape
        stretch = np.array([width / height, height / width]) * h / w
        fits, fits_turned = abs(stretch - 1) <= 0.02
        if not fits:
            raise ValueError(f"{path}: {w} x {h}, but the image is {width} x {height}")
        if orientation in range(2, 9 if fits_turned else 5):
            message = f"drawn before or after EXIF orientation {orientation}?"
            raise ValueError(f"{path}: {message} Turn the image, or remove that tag")
        if self.has_alpha and self.scale:
            kind, values = self.kind, alpha
        elif kind == "gray" and self.kind == "color":
            kind, values = "color", self.convert(kind, values)
        if kind != self.kind or values is None:
            raise ValueError(f"{path}: not {self.kind} as the others are")
        if self.two_values and not np.isin(values, self.two_values).all():
            other = np.setdiff1d(values, self.two_values)[:3]
            message = f"has {other}, others {self.two_values}; pass --mask_values"
            raise ValueError(f"{path}: {message} ids, or those of objects")
        mask = (self.object_part(values) * 255).round().astype(np.uint8)
        if mask.max() < 4:
            mask[:] = 0  # a JPEG's noise, which a map would stretch to the full range
        return np.ma.array(mask, mask=values == self.ignored)

    def object_part(self, values):
        """How far values are object, from 0 to 1, by the rule."""
        if self.scale:
            return np.clip(np.asarray(values) / self.scale, 0, 1)
        return np.isin(values, list(self.listed)) == self.is_object
