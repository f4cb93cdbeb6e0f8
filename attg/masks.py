"""
Masks of the images of a data set: PNGs of the same relative paths in a folder.

One rule for the whole folder, decided by the values of up to 200 evenly spaced masks:

    alpha       object where it is opaque, if it is not opaque everywhere
    two values  object is the higher; in palettes and colors, the one that does not prevail
                on the border of the images
    ids         palettes, colors, at most 64 grays below 128: object is any but 0 (black);
                255, in colors that of VOC's borders, is ignored
    soft        other grays: parts of 255 or 65535, or of their maximum if it is far below

--mask_values names the values that are object: numbers, or colors as 0xRRGGBB.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from attg.images import load_image

SAMPLE, MAX_IDS, MAX_ID = 200, 64, 127
# Neither object nor background
IGNORED = {"gray": 255, "palette": 255, "color": 0xE0E0C0}
# Of Oxford-IIIT Pet (object, background, border), and of matting
TRIMAPS = ([1, 2, 3], [0, 127, 255], [0, 128, 255])


def read_values(path):
    """(kind, int64 (H, W), alpha (H, W) or None) of a PNG; kind: gray, palette or color."""
    # Opening a named pipe or a device would block.
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    image, alpha = load_image(path), None
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    if image.mode not in ("RGB", "RGBA"):
        kind = "palette" if image.mode.startswith("P") else "gray"
        first = image.getchannel(0) if len(image.getbands()) > 1 else image
        return kind, np.asarray(first, np.int64), alpha
    red, green, blue = np.moveaxis(np.asarray(image, np.int64), 2, 0)[:3]
    if (red == green).all() and (red == blue).all():
        return "gray", red, alpha
    return "color", (red << 16) + (green << 8) + blue, alpha


class MaskFolder:
    """[i] -> the mask of image i: a masked array uint8 (H, W), without what is ignored.

    An object is 255, soft masks are in between. OSError or ValueError if there is no mask
    that fits the image. .rule says how the folder is read; ValueError if it cannot know.
    """

    def __init__(self, folder, dataset, mask_values=()):
        self.folder, self.dataset = Path(folder), dataset
        found, self.has_alpha = [], False
        sample = np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset)))
        for i in sample.round().astype(int).tolist():
            try:
                kind, x, alpha = read_values(self.path(i))
            # Missing, or damaged: decoders raise OSError, SyntaxError, ValueError.
            except Exception:
                continue
            self.has_alpha |= alpha is not None and alpha.min() < 255
            edges = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
            found.append((kind, np.unique(x), edges))
        if not found:
            message = f"no mask can be read, such as {self.path(0)}; give PNGs of the"
            raise ValueError(f"--masks {folder}: {message} images' relative paths")
        kinds = {kind for kind, *_ in found}
        self.kind = "color" if "color" in kinds else max(kinds)
        values, border = set(), Counter()
        for kind, distinct, edges in found:
            values |= set(self.convert(kind, distinct).tolist())
            border.update(self.convert(kind, edges).tolist())
        self.scale, self.ignored, self.listed, self.is_object = None, -1, set(), True
        rule = self.decide(sorted(values), border, mask_values)
        form = "0x{:06X}" if self.kind == "color" else "{}"
        listed = " ".join(map(form.format, sorted(self.listed)))
        rule = rule.format(listed=listed, ignored=form.format(self.ignored))
        self.rule = f"--masks {folder}: {self.kind}, {rule}"

    def decide(self, values, border, mask_values):
        """Choose the rule by all sampled values, and those on the border; describe it."""
        is_gray = self.kind == "gray"
        if mask_values:
            try:
                self.listed = {int(value, 0) for value in mask_values}
            except ValueError as error:
                message = f"--mask_values {' '.join(mask_values)}: give 1, 0xC08080 ..."
                raise ValueError(message) from error
            return "object is {listed}"
        if self.has_alpha:
            self.scale = 255
            return "object is where alpha is opaque"
        if values in TRIMAPS:
            message = f"{values} look like trimaps; name the values of objects, such as"
            raise ValueError(f"--masks {self.folder}: {message} --mask_values 1")
        if len(values) <= 2 and is_gray:
            self.listed = set(values[-1:]) - {0}
            return "object is {listed}"
        if len(values) <= 2:
            self.listed, self.is_object = {border.most_common(1)[0][0]}, False
            return "object is any but {listed}, which prevails on the border"
        if not is_gray or len(values) <= MAX_IDS and max(set(values) - {255}) <= MAX_ID:
            self.listed, self.is_object, self.ignored = {0}, False, IGNORED[self.kind]
            return "object is any but {listed}, {ignored} is ignored"
        limit = 255 if values[-1] < 256 else 65535
        self.scale = values[-1] if values[-1] < limit / 4 else limit
        return f"soft, parts of {self.scale}"

    def convert(self, kind, values):
        """Gray values as colors if there are colors: a mask without an object is black."""
        return values * 0x10101 if (kind, self.kind) == ("gray", "color") else values

    def path(self, i):
        return Path(self.folder, self.dataset.names[i]).with_suffix(".png")

    def image_size(self, i):
        if self.dataset.pairs is not None:
            return self.dataset.read(i)[0].size
        with Image.open(self.dataset.path(i)) as image:
            return image.size

    def __getitem__(self, i):
        path = self.path(i)
        kind, values, alpha = read_values(path)
        (h, w), (width, height) = values.shape, self.image_size(i)
        if abs(w * height / (h * width) - 1) > 0.02:
            raise ValueError(f"{path}: {w} x {h}, but the image is {width} x {height}")
        if self.has_alpha and self.scale:
            kind, values = self.kind, alpha
        elif kind == "gray" and self.kind == "color":
            kind, values = "color", self.convert(kind, values)
        if kind != self.kind or values is None:
            raise ValueError(f"{path}: not {self.kind} as the others are")
        if self.scale:
            mask = np.clip(values / self.scale, 0, 1)
        else:
            mask = np.isin(values, list(self.listed)) == self.is_object
        mask = (mask * 255).round().astype(np.uint8)
        return np.ma.array(mask, mask=values == self.ignored)
