"""Images: decoding, conversion to 8 bits, and the crops of training and evaluation."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

# Area fraction and aspect ratio of a random crop, as in MAE's pre-training.
CROP_SCALE = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# Images with more pixels are not decoded. So many take about 1 GB at worst.
MAX_PIXELS = 100_000_000
# JPEGs are decoded at 1/2, 1/4 or 1/8 of their size as long as both sides keep this many
# pixels: that takes a fraction of the time and suffices for crops of up to 1792 pixels.
MIN_DRAFT_SIDE = 2048
# PIL's mode by number of channels.
MODES = {1: "L", 3: "RGB"}


def load_image(path, max_pixels=MAX_PIXELS):
    """Decode an image file. Returns a PIL image of any mode.

    ValueError if it has more than max_pixels, before anything is decoded; otherwise
    whatever the decoders raise: OSError, SyntaxError, ValueError and others.
    """
    # Pillow has a limit of its own: it warns above it, and fails at twice as many.
    if Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(path) as image:
        check_pixels(image, max_pixels)
        if min(image.size) >= 2 * MIN_DRAFT_SIDE:
            image.draft(None, (MIN_DRAFT_SIDE, MIN_DRAFT_SIDE))
        # Raises an error if the file is truncated.
        image.load()
        return image


def check_pixels(image, max_pixels):
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, above --max_pixels {max_pixels}")


def to_rgb(image):
    """Convert a PIL image of any mode to 8-bit RGB, see to_8_bits."""
    return to_8_bits(image, "RGB")


def to_8_bits(image, mode):
    """Convert a PIL image of any mode to "RGB" or "L" (gray).

    Alpha is dropped, as torchvision does.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = wide_gray_to_8_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        # Without this detour PIL warns.
        image = image.convert("RGBA")
    if image.mode == mode:
        return image
    return image.convert(mode)


def wide_gray_to_8_bits(image):
    """Scale 16-bit and float gray to 8 bits; PIL's own conversion clips at 255."""
    largest = max(rows.max() for _, rows in gray_rows(image))
    # Older versions of Pillow open 16-bit PNGs in mode I (32 bits).
    whites = (65535,)
    if image.mode == "F":
        # Float files do not record their white level: take the smallest that fits.
        whites = (1, 255, 65535)
    white = next((candidate for candidate in whites if largest <= candidate), largest)
    gray = np.empty((image.height, image.width), dtype=np.uint8)
    for top, rows in gray_rows(image):
        rows = np.uint8(np.clip(rows / white, 0, 1) * 255 + 0.5)
        gray[top : top + len(rows)] = rows
    return Image.fromarray(gray)


def gray_rows(image, values=2**20):
    """Yield (first row, finite float64 (rows, width)), about `values` numbers at a time."""
    width, height = image.size
    step = max(1, values // width)
    for top in range(0, height, step):
        rows = image.crop((0, top, width, min(top + step, height)))
        rows = np.asarray(rows, dtype=np.float64)
        yield top, np.nan_to_num(rows, posinf=0, neginf=0)


def train_view(image, size, seed, scale=CROP_SCALE, after=None):
    """Random crop, resized to size (h, w): (PIL image, box, flip), see Sample.

    seed: of all random draws. scale: range of the crop's area fraction; aspect ratios
    are relative to that of `size`. after(image): further augmentation, which may use
    torch's global random numbers.
    """
    # torch.random.fork_rng costs three times as much.
    state = torch.get_rng_state()
    # torch.manual_seed would reseed the GPUs as well.
    torch.default_generator.manual_seed(seed)

    height, width = size
    ratio = [r * width / height for r in CROP_RATIO]
    y, x, h, w = RandomResizedCrop.get_params(image, scale, ratio)
    flip = torch.rand(()).item() < 0.5
    crop = image.crop((x, y, x + w, y + h))
    crop = crop.resize((width, height), Image.Resampling.BICUBIC)
    if after:
        crop = after(crop)
    torch.set_rng_state(state)

    return crop, box_of(x, y, w, h, image.width, image.height), flip


def eval_view(image, size):
    """Center crop of a resized image: (PIL image of size (h, w), box, False).

    The image is resized to the smallest one that covers size * 256/224, as in MAE's
    evaluation. If its shorter side has at most 32 pixels, it is squashed to `size`.
    """
    width, height = image.size
    h, w = size
    if min(width, height) <= 32:
        resized = image.resize((w, h), Image.Resampling.BICUBIC)
        return resized, (0.0, 0.0, 1.0, 1.0), False

    # Rounded as by torchvision's Resize (down) and CenterCrop (to nearest).
    resized_h, resized_w = round(h * 256 / 224), round(w * 256 / 224)
    if resized_w * height > resized_h * width:
        resized_h = resized_w * height // width
    else:
        resized_w = resized_h * width // height
    x = round((resized_w - w) / 2)
    y = round((resized_h - h) / 2)

    box = box_of(x, y, w, h, resized_w, resized_h)
    # Resizing a strip of 2,000,000 x 40 pixels would take gigabytes. Resizing its middle
    # gives the same up to rounding.
    if resized_w * resized_h > 16 * w * h:
        region = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        crop = image.resize((w, h), Image.Resampling.BICUBIC, box=region)
    else:
        resized = image.resize((resized_w, resized_h), Image.Resampling.BICUBIC)
        crop = resized.crop((x, y, x + w, y + h))
    return crop, box, False


def box_of(x, y, w, h, width, height):
    """A region in pixels -> (x0, y0, x1, y1) as fractions of width and height."""
    return x / width, y / height, (x + w) / width, (y + h) / height


def rand_augment(mean):
    """RandAugment for train_view's `after`; mean: fractions (C,), the fill color.

    timm's rand-m9-mstd0.5-inc1, which MAE fine-tunes with, as closely as torchvision
    allows: two operations at magnitude 9 of 10, each with probability 0.5. Invert,
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
