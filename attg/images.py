"""Images: decoding, conversion to 8 bits, and the crops of training and evaluation."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

# Share of the area and aspect ratio of a crop, as in MAE's pre-training.
CROP_SCALE = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# A picture with more pixels is not decoded. So many take about 1 GB at worst.
MAX_PIXELS = 100_000_000
# JPEGs are decoded at a half, quarter or eighth of their size where both sides keep this
# many pixels: in a part of the time, and enough for views of up to 1792 pixels.
MIN_DRAFT_SIDE = 2048
# PIL's modes by the number of channels, grey and colour.
MODES = {1: "L", 3: "RGB"}


def load_image(path, max_pixels=MAX_PIXELS):
    """The decoded PIL picture of a file, of any mode.

    ValueError if it has more than max_pixels, before anything is decoded; otherwise
    what the decoders raise: OSError, SyntaxError, ValueError and others.
    """
    # Pillow warns above a limit of its own, and refuses twice as many.
    if Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(path) as picture:
        check_pixels(picture, max_pixels)
        if min(picture.size) >= 2 * MIN_DRAFT_SIDE:
            picture.draft(None, (MIN_DRAFT_SIDE, MIN_DRAFT_SIDE))
        # Raises an error if the file is truncated.
        picture.load()
        return picture


def check_image(picture):
    if not isinstance(picture, Image.Image):
        raise ValueError(f"data: a {type(picture).__name__} instead of a PIL picture")


def check_pixels(picture, max_pixels):
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, above --max_pixels {max_pixels}")


def to_rgb(picture):
    """A PIL picture of any mode -> 8-bit RGB. Alpha is dropped, as by torchvision."""
    return to_8_bits(picture, "RGB")


def to_8_bits(picture, mode):
    """A PIL picture of any mode -> mode, "RGB" or "L" (grey)."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = wide_grey_to_8_bits(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        # PIL warns on the direct way.
        picture = picture.convert("RGBA")
    if picture.mode == mode:
        return picture
    return picture.convert(mode)


def wide_grey_to_8_bits(picture):
    """Scales 16-bit and float grey, which PIL's own conversion would clip at 255."""
    largest = max(strip.max() for _, strip in strips(picture))
    # Older Pillows open 16-bit PNGs in the mode I, of 32 bits.
    whites = (65535,)
    if picture.mode == "F":
        # Nothing in the file says what white is: the least of these that will do.
        whites = (1, 255, 65535)
    white = largest
    for candidate in whites:
        if largest <= candidate:
            white = candidate
            break
    grey = np.empty((picture.height, picture.width), dtype=np.uint8)
    for top, strip in strips(picture):
        rows = np.uint8(np.clip(strip / white, 0, 1) * 255 + 0.5)
        grey[top : top + len(rows)] = rows
    return Image.fromarray(grey)


def strips(picture, values=2**20):
    """(first row, finite float64 (rows, width)): about `values` grey values at a time."""
    width, height = picture.size
    rows = max(1, values // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        strip = np.asarray(strip, dtype=np.float64)
        yield top, np.nan_to_num(strip, posinf=0, neginf=0)


def train_view(picture, size, seed, scale=CROP_SCALE, after=None):
    """A random crop of a PIL picture: (PIL image of `size`, box, flip); see Sample.

    size: (h, w). scale: limits of the crop's share of the area; aspect ratios are
    relative to that of `size`. after(image) may augment it further, with torch's random
    numbers.
    """
    # fork_rng costs three times as much.
    state = torch.get_rng_state()
    # torch.manual_seed would reseed the GPUs as well.
    torch.default_generator.manual_seed(seed)

    height, width = size
    ratio = [r * width / height for r in CROP_RATIO]
    y, x, h, w = RandomResizedCrop.get_params(picture, scale, ratio)
    flip = torch.rand(()).item() < 0.5
    image = picture.crop((x, y, x + w, y + h))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if after:
        image = after(image)
    torch.set_rng_state(state)

    box = (
        x / picture.width,
        y / picture.height,
        (x + w) / picture.width,
        (y + h) / picture.height,
    )
    return image, box, flip


def eval_view(picture, size):
    """The centre of a PIL picture: (PIL image of `size` (h, w), box, False).

    It is cut from the smallest picture that covers size * 256/224. A picture whose
    shorter side has at most 32 pixels is seen whole.
    """
    width, height = picture.size
    h, w = size
    if min(width, height) <= 32:
        image = picture.resize((w, h), Image.Resampling.BICUBIC)
        return image, (0.0, 0.0, 1.0, 1.0), False

    # One side binds, the other is rounded down, as by torchvision's Resize; the centre
    # is rounded as by its CenterCrop.
    resized_h, resized_w = round(h * 256 / 224), round(w * 256 / 224)
    if resized_w * height > resized_h * width:
        resized_h = resized_w * height // width
    else:
        resized_w = resized_h * width // height
    x = round((resized_w - w) / 2)
    y = round((resized_h - h) / 2)

    box = (
        x / resized_w,
        y / resized_h,
        (x + w) / resized_w,
        (y + h) / resized_h,
    )
    # All of a strip of 2,000,000 x 40 pixels, resized, would take gigabytes. Its middle
    # alone gives the same but for rounding.
    if resized_w * resized_h > 16 * w * h:
        region = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        image = picture.resize((w, h), Image.Resampling.BICUBIC, box=region)
    else:
        image = picture.resize((resized_w, resized_h), Image.Resampling.BICUBIC)
        image = image.crop((x, y, x + w, y + h))
    return image, box, False


def rand_augment(mean):
    """RandAugment for train_view's `after`; mean: fractions (C,), the colour of gaps.

    timm's rand-m9-mstd0.5-inc1, which MAE fine-tunes with, as near as torchvision comes
    to it: two operations at magnitude 9 of 10, each with probability 0.5. Invert,
    SolarizeAdd and the noise of the magnitudes are missing.
    """
    one = v2.RandAugment(
        num_ops=1,
        magnitude=9,
        num_magnitude_bins=11,
        interpolation=v2.InterpolationMode.BICUBIC,
        fill=[round(255 * x) for x in mean],
    )
    return v2.Compose([v2.RandomApply([one], 0.5), v2.RandomApply([one], 0.5)])
