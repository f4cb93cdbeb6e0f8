"""Samples of images: decoding, 8 bits, random crops by seeds, and data sets of them."""

import functools
import hashlib
import io
import itertools
import math
import os
import struct
import sys
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, Subset

from attg.files import in_fork, in_threads, sha256_or_errno

BICUBIC = Image.Resampling.BICUBIC
# Area fraction and aspect ratio of a random crop, as in MAE's pre-training.
CROP_SCALE = (0.2, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Images with more pixels are not decoded. That many take 0.4 GB in RGB, 1.7 GB as floats.
MAX_PIXELS = 100_000_000
MAX_VERIFIED, SAMPLE = 10_000, 1000  # of more files the contents of 1,000 count
MODES = {1: "L", 3: "RGB"}  # PIL's, by number of channels


# -- Seeds -----------------------------------------------------------------------------
# Random numbers are functions of what they depend on: there is no generator state to save.
def seed_for(*parts):
    """64-bit seed hashed from ints and strings, the same on every machine.

    The first part names the stream: "crop", "order", "masks" ...
    """
    # NumPy's and torch's integers have another repr than Python's.
    plain = [part if isinstance(part, str) else int(part) for part in parts]
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sha256_of(*parts):
    """Hex digest of the strings of all parts."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def generator_for(*parts):
    """A torch.Generator on the CPU, seeded with seed_for(*parts)."""
    return torch.Generator().manual_seed(seed_for(*parts))


# -- Decoding --------------------------------------------------------------------------
def check_pixels(size, max_pixels):
    width, height = size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, above --max_pixels {max_pixels}")


def load_image(file, max_pixels=MAX_PIXELS, scale=1):
    """Decode an image file. Returns a PIL image of any mode.

    scale: decode a JPEG at 1/2, 1/4 or 1/8 of its size. ValueError if it has more than
    max_pixels, before anything is decoded; otherwise whatever the decoders raise: OSError,
    SyntaxError, ValueError and others.
    """
    # Pillow has a limit of its own: it warns above it, and fails at twice as many.
    if Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(file) as image:
        check_pixels(image.size, max_pixels)
        if scale > 1:
            image.draft("RGB", [side // scale for side in image.size])
        has_16_bits = image.mode.startswith("RGB") and ";16" in str(image.tile)
        # Raises an error if the file is truncated.
        image.load()
        if has_16_bits and max(high for _, high in image.getextrema()[:3]) < 64:
            message = "a 16-bit RGB image has no value above 16383 and comes out dark: "
            warnings.warn(f"{message}convert it to 8 bits", stacklevel=2)  # shown once
        return image


def to_8_bits(image, mode="RGB", white=None):
    """Convert a PIL image of any mode to "RGB" or "L" (gray).

    Alpha is dropped, as by torchvision. white: the level of white in gray of more than
    8 bits; by default 65535 in integers of 16 bits, 255 in those of 32 bits and 1 in
    floats, and ValueError if the image is brighter or has values below 0.
    """
    if image.mode.startswith("I") or image.mode == "F":
        # PIL's own conversion clips at 255. 16-bit PGMs open in mode I, in Pillow 10 such
        # PNGs as well.
        has_16_bits = image.format in ("PNG", "PPM")
        default = {"F": 1, "I": 65535 if has_16_bits else 255}.get(image.mode, 65535)
        gray = np.nan_to_num(np.array(image, dtype=np.float32), posinf=0, neginf=0)
        low, high = gray.min(), gray.max()
        if white is None and (high > 1.01 * default or low < -0.01 * default):
            reason = f"gray from {low:g} to {high:g} in mode {image.mode}, where"
            raise ValueError(f"{reason} black is 0, white is {default}; set --white")
        if white is None and default == 65535 and 0 < high < 16384:
            message = "a 16-bit image has no gray above 16383 and comes out dark: "
            warnings.warn(f"{message}for 12 bits set --white 4095", stacklevel=2)
        white = white or default
        image = Image.fromarray(np.uint8(gray.clip(0, white) * (255 / white) + 0.5))
    if image.mode == "P" and "transparency" in image.info:
        # Without this detour PIL warns.
        image = image.convert("RGBA")
    return image.convert(mode)


# -- Views -----------------------------------------------------------------------------
def to_tensor(image):
    """uint8 (C, h, w) of a PIL image in RGB or gray."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class Jpeg:
    """A JPEG file of three channels, decoded once region and size of a view are known."""

    mode = "RGB"

    def __init__(self, content, size):
        self.content, self.size = content, size  # width, height

    @classmethod
    def open(cls, path, max_pixels=MAX_PIXELS):
        """Read a file; None if it is not such a JPEG. ValueError: see load_image."""
        with open(path, "rb") as file:
            content = bytearray(file.read())
        at = 2 if content.startswith(b"\xff\xd8") else len(content)
        # A segment: 255, marker, length ...
        while content[at : at + 1] == b"\xff":
            marker, length = struct.unpack_from(">BH", content, at + 1)
            if marker in (0xC0, 0xC1, 0xC2):
                # ... and, in a frame header, bits, height, width, channels.
                bits, h, w, channels = struct.unpack_from(">BHHB", content, at + 4)
                if (bits, channels) != (8, 3):
                    return None
                check_pixels((w, h), max_pixels)
                return cls(content, (w, h))
            at += 2 + length
        return None

    def load(self, scale=1):
        """Decode with Pillow, at 1/scale of its size."""
        return load_image(io.BytesIO(self.content), math.prod(self.size), scale)

    def resize_region(self, region, size):
        """Like the function resize_region, in half of Pillow's time."""
        x, y, w, h = region
        ratio = min(h / size[0], w / size[1])
        # Decoded at 1/scale, each side still has at least twice as many pixels.
        scale = next((s for s in (8, 4, 2) if ratio >= 2 * s), 1)
        if scale > 1:
            box = [v / scale for v in (x, y, x + w, y + h)]
            return to_tensor(self.load(scale).resize(size[::-1], BICUBIC, box))
        from torchvision import io as torchvision_io

        try:
            content = torch.frombuffer(self.content, dtype=torch.uint8)
            rgb = torchvision_io.ImageReadMode.RGB
            image = torchvision_io.decode_jpeg(content, rgb)
        except (RuntimeError, AttributeError):
            # Damaged; or torchvision, which calls its decoders deprecated, has none.
            image = to_tensor(self.load())
        part = image[None, :, y : y + h, x : x + w]
        return F.interpolate(part, size, mode="bicubic", antialias=True)[0]


def resize_region(image, region, size):
    """Region (x, y, w, h) of an 8-bit PIL image or Jpeg, resized: uint8 (C, *size)."""
    if isinstance(image, Jpeg):
        return image.resize_region(region, size)
    x, y, w, h = region
    return to_tensor(image.crop((x, y, x + w, y + h)).resize(size[::-1], BICUBIC))


def train_view(image, size, seed, scale=CROP_SCALE, after=None):
    """Random crop, resized to size (h, w): (uint8 (C, h, w), box, flip), see Sample.

    image: an 8-bit PIL image or a Jpeg. seed: of all random draws. scale: range of the
    crop's area fraction; aspect ratios are relative to that of `size`. after(PIL image):
    further augmentation, which may use torch's global random numbers.
    """
    # Importing torchvision takes as long as importing torch: not before it is needed.
    from torchvision.transforms import RandomResizedCrop

    # torch.random.fork_rng costs three times as much.
    state = torch.get_rng_state()
    # torch.manual_seed would reseed the GPUs as well.
    torch.default_generator.manual_seed(seed)
    try:
        ratio = [r * size[1] / size[0] for r in CROP_RATIO]
        width, height = image.size
        shape = torch.empty(1, height, width, device="meta")
        y, x, h, w = RandomResizedCrop.get_params(shape, scale, ratio)
        flip = torch.rand(()).item() < 0.5
        crop = resize_region(image, (x, y, w, h), size)
        if after:
            image = Image.fromarray(crop.permute(1, 2, 0).squeeze(-1).numpy())
            crop = to_tensor(after(image))
    finally:
        torch.set_rng_state(state)
    return crop, (x / width, y / height, (x + w) / width, (y + h) / height), flip


def eval_view(image, size):
    """Center crop of a resized image: (uint8 (C, *size), box, False).

    The image is resized to the smallest one that covers size * 256/224, as in MAE's
    evaluation. If its shorter side has at most 32 pixels, it is squashed to `size`.
    """
    width, height = image.size
    whole = 0, 0, width, height
    h, w = size
    if min(width, height) <= 32:
        return resize_region(image, whole, size), (0.0, 0.0, 1.0, 1.0), False

    # Rounded as by torchvision's Resize (down) and CenterCrop (to nearest).
    resized_h, resized_w = round(h * 256 / 224), round(w * 256 / 224)
    if resized_w * height > resized_h * width:
        resized_h = resized_w * height // width
    else:
        resized_w = resized_h * width // height
    x = round((resized_w - w) / 2)
    y = round((resized_h - h) / 2)

    box = (x / resized_w, y / resized_h, (x + w) / resized_w, (y + h) / resized_h)
    # A strip of 2,000,000 x 40 pixels would take gigabytes. Its middle gives the same.
    if resized_w * resized_h > 16 * w * h:
        region = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        image = image.load() if isinstance(image, Jpeg) else image
        crop = to_tensor(image.resize((w, h), BICUBIC, region))
    else:
        resized = resize_region(image, whole, (resized_h, resized_w))
        crop = resized[:, y : y + h, x : x + w]
    return crop, box, False


# -- Data sets -------------------------------------------------------------------------
class Sample(NamedTuple):
    """One item of a data set. default_collate makes a Sample of batched tensors."""

    image: torch.Tensor  # uint8 (C, h, w), RGB or gray, not flipped yet
    label: int  # -1 = none
    index: int  # row of the map file; the next readable one if the image is unreadable
    box: torch.Tensor  # float32 (4,): x0, y0, x1, y1 in fractions of width and height
    flip: bool  # whether to mirror image and map


def as_label(label):
    """A label from Python as an int, -1 for None; ValueError for 0.7 and "7"."""
    # MedMNIST's are arrays of one.
    label = label.item() if hasattr(label, "item") else label
    if label is None:
        return -1
    if int(label) != label:
        raise ValueError(f"the label {label!r} is not a whole number")
    return int(label)


@dataclass(eq=False)
class ImageData(Dataset):
    """One split of a data set.

    data[epoch, index] is a Sample made by `augment`, if there is one; otherwise, and for
    data[index], by eval_view. An unreadable image is replaced by the next readable one:
    the first ten are reported. ValueError if there is none.
    """

    pairs: Dataset | None  # map-style, of (PIL image, label); None: files, see root
    # One per image: order and identity of the rows of a map file. An array, because
    # reading a list changes reference counts, and each worker would come to copy it.
    names: np.ndarray
    known_labels: Sequence[int] | None  # None: only the source knows them
    known_classes: int | None  # 0 = no labels; None = the largest label + 1
    root: Path | str = ""  # the folder of the images, if pairs is None
    masks: np.ndarray | None = None  # of toy alone: uint8 (n, h, w), 1 = object
    # See open_data.
    size: int | tuple[int, int] = 32
    augment: Callable | bool = False
    seed: int = 0
    channels: int = 3
    max_pixels: int = MAX_PIXELS
    white: float | None = None
    verify: bool = False

    def __post_init__(self):
        self.num_images = len(self.names)
        self.names = np.array(self.names)
        if isinstance(self.size, int):
            self.size = self.size, self.size
        if self.augment is True:
            self.augment = train_view
        self.max_unreadable = max(1, self.num_images / 100)  # 1 %, and at least one
        # In shared memory: all workers and their parent see what one of them marks.
        self.unreadable = torch.zeros(self.num_images, dtype=torch.bool).share_memory_()
        # Whether there are labels. Single images may still have none, as in stl10.
        self.labeled = self.known_labels is not None
        if self.known_classes is not None:
            self.labeled = self.known_classes > 0
        elif not self.labeled:
            # Now, while a data set from Python has no file open yet.
            first = in_fork(self.read_labels, min(10, self.num_images))
            self.labeled = first.max(initial=-1) >= 0

    def __len__(self):
        return self.num_images

    def __getitem__(self, key):
        epoch, requested = key if isinstance(key, tuple) else (None, key)
        # The IndexError of an index too large ends `for sample in data`.
        requested = range(self.num_images)[requested]
        view = eval_view
        if self.augment and epoch is not None:
            seed = seed_for("crop", self.seed, epoch, requested)
            view = functools.partial(self.augment, seed=seed)
        reason = None
        after, before = range(requested, self.num_images), range(requested)
        for index in itertools.chain(after, before):
            try:
                image, label = self.read(index, self.channels)
                image, box, flip = view(image, self.size)
                return Sample(image, label, index, torch.tensor(box), flip)
            # Decoders raise OSError, SyntaxError, ValueError and others.
            except Exception as error:
                reason = reason or f"{self.path(index)} ({error})"
                self.report_unreadable(index, error)
        raise ValueError(
            f"--data: none of the {self.num_images} images can be decoded, the first is "
            f"{reason}; repair them or choose another folder"
        )

    def read(self, i, channels=None):
        """(image, label) of image i. Raises what its decoder raises.

        channels: 3 gives a Jpeg or a PIL image in RGB, 1 one in gray, None one of any mode.
        """
        if self.pairs is None:
            image, label = None, self.known_labels[i]
            if channels == 3:
                image = Jpeg.open(self.path(i), self.max_pixels)
            image = image or load_image(self.path(i), self.max_pixels)
        else:
            image, label = self.pairs[i]
            if not isinstance(image, Image.Image):
                kind = type(image).__name__
                raise ValueError(f"is {kind}, items must be (PIL image, label)")
        if channels and image.mode != MODES[channels]:
            image = to_8_bits(image, MODES[channels], self.white)
        is_int = isinstance(label, int | np.integer)
        return image, int(label) if is_int else as_label(label)

    def path(self, i):
        """The path of image i, or its name if it is not a file."""
        return os.path.join(self.root, self.names[i])

    def report_unreadable(self, i, error):
        """Mark image i; the first ten of all workers of this rank are reported."""
        if not self.unreadable[i]:
            self.unreadable[i] = True
            if self.unreadable.sum() <= 10:
                path = self.path(i)
                message = f"unreadable, the next image replaces it: {path} ({error})\n"
                # In one piece, as other workers write to the same place.
                print(message, end="", file=sys.stderr, flush=True)

    @functools.cached_property
    def num_classes(self):
        if self.known_classes is not None:
            return self.known_classes
        return int(self.labels.max()) + 1

    @functools.cached_property
    def labels(self):
        """int64 (n,), -1 = none. Some data sets have to be read once to find them."""
        labels = self.known_labels
        if labels is None:
            labels = in_fork(self.read_labels, len(self))
        return torch.as_tensor(labels, dtype=torch.int64)

    def read_labels(self, number):
        """Labels of the first images of a data set from Python, in an array."""
        labels = np.full(number, -1)
        for i in range(number):
            try:
                labels[i] = self.read(i)[1]
            except Exception as error:
                self.report_unreadable(i, error)
        return labels

    def subset(self, rows):
        """The images of these rows, an int tensor (m,), as another ImageData."""
        return replace(
            self,
            # An array gives Python ints, as users' data sets may expect.
            pairs=Subset(self.pairs, array("q", rows.tolist())) if self.pairs else None,
            names=self.names[rows.numpy()],
            known_labels=self.labels[rows].numpy(),
            known_classes=self.num_classes,
            masks=None if self.masks is None else self.masks[rows.numpy()],
        )

    def map_files(self, function, step=1):
        """[function(path)] of every step-th file, in threads."""
        rows = range(0, len(self), step)
        return in_threads(lambda i: function(self.path(i)), rows)

    @functools.cached_property
    def fingerprint(self):
        """Identity of the data set in map files and checkpoints: "v3:" and a sha256.

        Of number, names and, for files, sizes and contents (above 10,000 of 1,000). ":" and
        another may follow: with `verify` all contents; from Python targets and subsets.
        """
        parts, full, labels = [self.num_images, *self.names], "", self.known_labels
        if self.pairs is None:
            step = len(self) // SAMPLE if len(self) > MAX_VERIFIED else 1
            parts += self.map_files(os.path.getsize)
            parts += self.map_files(sha256_or_errno, step)
            if self.verify and step > 1:
                full = f":{sha256_of(*self.map_files(sha256_or_errno))}"
        elif self.num_images and self.names[0].startswith("data/"):
            source, rows = self.pairs, [*([] if labels is None else labels)]
            while isinstance(source, Subset):
                rows += map(int, source.indices)
                source = source.dataset
            full = f":{sha256_of(*rows)}" if rows else ""
        return f"v3:{sha256_of(*parts)}{full}"

    def matches(self, fingerprint):
        """Whether a map file or checkpoint with this fingerprint is of these images."""
        if fingerprint.startswith("v3:"):
            # Either may lack the part for all contents, which is not compared then.
            parts = self.fingerprint.split(":"), fingerprint.split(":")
            return all(a == b for a, b in zip(*parts, strict=False))
        names = len(self), *self.names
        sizes = self.map_files(os.path.getsize) if self.pairs is None else []
        oldest = sha256_of(*names)
        oldest = sha256_of(oldest, *sizes) if sizes else oldest
        return fingerprint in (oldest, "v2:" + sha256_of("v2", *names, *sizes))
