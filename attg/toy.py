"""
The embedded `toy` set: objects on textured backgrounds, generated in seconds.

    python -m attg.toy --out toy.png      # draws a sheet of it
    python -m attg.toy --pairs DIR        # pictures of two objects, and their masks

    images, masks, labels = toy("train")    # 10,000 pictures of 32 x 32 pixels
    images, masks, labels = toy("test")     # 2,000, and as many of each variant

How a picture arises:
    1. The object. Its class gives the silhouette, the texture and, roughly, the hue.
       Random numbers give place, size, turn, hue and brightness; all of it is visible.
    2. The background. Each class has a family of patterns, which goes with it most of
       the time but not always. Random numbers give place, period, turn and two colours.
    3. The object covers the background; its silhouette is the exact mask.

The variants show the objects of the test split on other backgrounds, after "Noise or
Signal: The Role of Image Backgrounds in Object Recognition" (arXiv 2006.09994):
    only_fg       on black
    mixed_same    on the pattern of their own class
    mixed_rand    on the pattern of a random class
    mixed_next    on the pattern of the next class

Silhouettes, textures and patterns are drawn once, as small tables rounded to 8 bits. A
picture looks them up at turned and scaled coordinates, with a table of cosines as well:
that is fast, and gives the same bits on every machine.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from attg.cli import Parser, end
from attg.figures import save_sheet

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

TOY_SEED = 2402
# Pixels a side of a picture, and cells a side of a table.
TOY_SIZE, TABLE = 32, 64
# Directions in a full circle: all that a picture can be turned by.
DIRECTIONS = 1024
# Pictures drawn at once, to bound the memory.
CHUNK = 500

TOY_CLASSES = (
    "ball",
    "box",
    "star",
    "flower",
    "heart",
    "cross",
    "gear",
    "leaf",
    "fish",
    "clover",
)
TOY_VARIANTS = ("only_fg", "mixed_same", "mixed_rand", "mixed_next")

# The limits decide how hard the set is. They are to be chosen on vanilla runs alone, so
# that k-NN on raw pixels stays below 45 % and on vanilla features gets clearly above.

# Radius of the object, in pixels.
TOY_RADIUS = (7.0, 10.0)
# Turns of the hue, either way. Classes are 0.1 apart, so neighbours overlap.
TOY_HUE_JITTER = 0.10
# Brightness of the object's light tone, and the part of it that its dark tone has.
TOY_LIGHT = (0.6, 1.0)
TOY_DARK = 0.42
# Probability of the pattern of the class; otherwise that of a random class.
TOY_OWN_BACKGROUND = 0.7
# Length of a background's period, in pixels.
TOY_PERIOD = (11.0, 20.0)
# Brightness between a background's two tones, and the difference of the two.
TOY_MIDDLE = (0.3, 0.8)
TOY_CONTRAST = (0.5, 0.9)


# -- Shapes and patterns ---------------------------------------------------------------


def toy_objects(x, y, r, t):
    """(silhouette, light part of the texture) of each class, as in TOY_CLASSES.

    x (right), y (down) and the polar r, t: arrays of one shape, as are the results,
    which are bool. The silhouettes lie within r < 1.
    """
    square = np.maximum(abs(x), abs(y))

    ball = r < 0.9
    ball_light = np.sin(3 * t) > 0

    box = square < 0.8
    box_light = np.sin(6 * x) * np.sin(6 * y) > 0

    # From 0 between two of the five points to 1 at a point.
    point = abs(5 * t / np.pi % 2 - 1)
    star = r < 0.4 + 0.58 * point**1.3
    star_light = r < 0.45

    flower = r < 0.74 + 0.24 * np.cos(6 * t)
    flower_light = r > 0.36

    heart = np.hypot(x, 0.15 - 1.15 * y - 0.75 * np.sqrt(abs(x))) < 0.87
    heart_light = np.sin(9 * x + 0.6) > 0

    cross = (np.minimum(abs(x), abs(y)) < 0.3) & (square < 0.95)
    cross_light = np.sin(8 * (x + y)) > 0

    gear = r < 0.8 + 0.16 * np.sign(np.cos(8 * t))
    gear_light = abs(r - 0.44) < 0.17

    leaf = abs(y) < 0.55 * (1 - x * x)
    # Veins on both sides of a dark midrib.
    leaf_light = (abs(y) > 0.09) & (np.sin(11 * (x - abs(y))) > -0.5)

    body = np.hypot((x - 0.24) / 0.7, y / 0.5) < 1
    tail = (abs(x + 0.6) < 0.36) & (abs(y) < -0.75 * x - 0.1)
    fish = body | tail
    fish_light = (x < 0.3) & (np.sin(10 * x) < 0.5)

    clover = r < 0.2 + 0.76 * abs(np.sin(2 * t)) ** 0.6
    # A dark spot on each of the four leaves.
    clover_light = np.hypot(abs(x) - 0.45, abs(y) - 0.42) > 0.21

    return (
        (ball, ball_light),
        (box, box_light),
        (star, star_light),
        (flower, flower_light),
        (heart, heart_light),
        (cross, cross_light),
        (gear, gear_light),
        (leaf, leaf_light),
        (fish, fish_light),
        (clover, clover_light),
    )


def toy_backgrounds(x, y):
    """The pattern of each class, as in TOY_CLASSES: > 0 is one tone, < 0 the other.

    x (right) and y (down) are arrays of one shape, as are the results. All patterns
    have the period 1 in x and in y.
    """
    wave = 2 * np.pi

    stripes = np.sin(2 * wave * x)
    checks = np.sin(wave * x) * np.sin(wave * y)

    # Two rows of bricks, one shifted by half a brick; the mortar is below 0.
    along = (x + (y > 0.5) / 2) % 1
    bricks = np.minimum(2 * y % 1, 1.6 * along) - 0.22

    dots = np.hypot(2 * x % 1 - 0.5, 2 * y % 1 - 0.5) - 0.26
    zigzag = (2 * y + 2 * abs(2 * x % 1 - 0.5)) % 1 - 0.5
    waves = np.sin(2 * wave * y + 2 * np.sin(wave * x))
    # The only pattern with a third tone: 0, where the bands do not agree.
    plaid = np.sign(x - 0.5) + np.sign(y - 0.5)
    rings = np.sin(5 * wave * np.hypot(x - 0.5, y - 0.5))
    mesh = 0.93 - np.maximum(abs(np.sin(wave * x)), abs(np.sin(wave * y)))

    bent = np.sin(wave * (x + y) + 2 * np.sin(wave * y))
    blots = bent + np.sin(wave * (2 * x - y))

    return (
        stripes,
        checks,
        bricks,
        dots,
        zigzag,
        waves,
        plaid,
        rings,
        mesh,
        blots,
    )


# -- Tables ----------------------------------------------------------------------------


class Tables(NamedTuple):
    """What pictures are looked up in; the first three are (10, 64, 64), by class."""

    # Silhouettes, bool.
    shapes: np.ndarray
    # Textures of the objects in [0, 1], 1 = light tone.
    lights: np.ndarray
    # Patterns of the backgrounds in [0, 1], 1 = first tone.
    tiles: np.ndarray
    # Cosines of all directions (1024,).
    cosines: np.ndarray


@functools.cache
def toy_tables():
    """The Tables. Rounding takes away the last bits, in which machines differ."""
    # The centres of the cells: in [0, 1] for patterns, in [-1, 1] for objects.
    y, x = (np.mgrid[0:TABLE, 0:TABLE] + 0.5) / TABLE
    tiles = (np.sign(np.stack(toy_backgrounds(x, y))) + 1) / 2

    x, y = 2 * x - 1, 2 * y - 1
    shapes, lights = [], []
    for shape, light in toy_objects(x, y, np.hypot(x, y), np.arctan2(y, x)):
        shapes.append(shape)
        lights.append(light)
    shapes, lights = np.stack(shapes), np.stack(lights)
    # Coordinates outside the table are clamped to its border: no object may lie there.
    shapes[:, [0, -1], :] = False
    shapes[:, :, [0, -1]] = False

    angles = np.arange(DIRECTIONS) * np.pi / (DIRECTIONS // 2)
    cosines = np.round(np.cos(angles) * 2**20) / 2**20
    return Tables(shapes, soften(lights), soften(tiles), cosines)


def soften(table):
    """Means over 3 x 3 cells of (10, 64, 64), rounded to 8 bits: against aliasing."""
    table = table.astype(float)
    for axis in (1, 2):
        before, after = np.roll(table, -1, axis), np.roll(table, 1, axis)
        table = (before + table + after) / 3
    return np.round(table * 255) / 255


# -- Pictures --------------------------------------------------------------------------


def between(limits, u):
    """Random numbers u in [0, 1) -> from the lower limit to the upper."""
    lower, upper = limits
    return lower + (upper - lower) * u


def toy_coordinates(cx, cy, turn, unit):
    """x, y (n, 32, 32) of all pixels in n frames.

    Frames are centred at (cx, cy) px and turned by `turn` circles; their unit is `unit`
    px long. All four are (n,).
    """
    cosines = toy_tables().cosines
    angle = (turn * DIRECTIONS).astype(int)
    quarter = DIRECTIONS // 4
    cos = cosines[angle % DIRECTIONS]
    sin = cosines[(angle - quarter) % DIRECTIONS]
    cos = cos[:, None, None] / unit[:, None, None]
    sin = sin[:, None, None] / unit[:, None, None]

    centre = np.arange(TOY_SIZE) + 0.5
    # dx (n, 1, 32) along the columns, dy (n, 32, 1) along the rows.
    dx = centre - cx[:, None, None]
    dy = centre[:, None] - cy[:, None, None]
    return cos * dx + sin * dy, cos * dy - sin * dx


def toy_colour(hue, saturation, value):
    """HSV, each (n,), the hue in turns -> RGB (n, 1, 1, 3) in [0, 1]."""
    # Each of red, green and blue is full in a third of the circle, fades over a sixth.
    sixths = 6 * hue[:, None] + np.array([0, 4, 2])
    ramp = np.clip(abs(sixths % 6 - 3) - 1, 0, 1)
    rgb = value[:, None] * (1 - saturation[:, None] * (1 - ramp))
    return rgb[:, None, None]


def render_objects(labels, numbers):
    """Colours (n, 32, 32, 3) in [0, 1] and masks (n, 32, 32), bool.

    labels (n,), numbers (n, 6) in [0, 1).
    """
    right, down, size, turn, jitter, light = numbers.T
    tables = toy_tables()

    radius = between(TOY_RADIUS, size)
    # The whole object lies in the picture.
    inside = (radius, TOY_SIZE - radius)
    cx, cy = between(inside, right), between(inside, down)
    x, y = toy_coordinates(cx, cy, turn, radius)
    column = np.clip((x + 1) * TABLE / 2, 0, TABLE - 1).astype(int)
    row = np.clip((y + 1) * TABLE / 2, 0, TABLE - 1).astype(int)
    cells = (labels[:, None, None], row, column)

    hue = labels / len(TOY_CLASSES) + TOY_HUE_JITTER * (2 * jitter - 1)
    bright = between(TOY_LIGHT, light)
    light = toy_colour(hue, np.full_like(hue, 0.75), bright)
    dark = toy_colour(hue + 0.03, np.full_like(hue, 0.9), TOY_DARK * bright)

    colours = dark + tables.lights[cells][..., None] * (light - dark)
    return colours, tables.shapes[cells]


def render_backgrounds(family, numbers):
    """Colours (n, 32, 32, 3) in [0, 1] of the patterns `family` (n,), -1 = black.

    numbers (n, 13) in [0, 1), of which the last two have chosen the family.
    """
    right, down, turn, period = numbers.T[0:4]
    middle, contrast, brighter = numbers.T[4:7]
    hue, saturation, hue_step, other_saturation = numbers.T[7:11]

    x, y = toy_coordinates(
        TOY_SIZE * right, TOY_SIZE * down, turn, between(TOY_PERIOD, period)
    )
    # Patterns are periodic, unlike objects.
    column = np.floor(x * TABLE).astype(int) % TABLE
    row = np.floor(y * TABLE).astype(int) % TABLE
    tone = toy_tables().tiles[family[:, None, None], row, column][..., None]

    value = between(TOY_MIDDLE, middle)
    # Either tone may be the brighter one.
    half = between(TOY_CONTRAST, contrast) / 2 * np.sign(brighter - 0.5)
    one = toy_colour(hue, 0.15 + 0.5 * saturation, np.clip(value + half, 0, 1))
    two = toy_colour(
        hue + 0.3 * (hue_step - 0.5),
        0.15 + 0.5 * other_saturation,
        np.clip(value - half, 0, 1),
    )
    visible = (family >= 0)[:, None, None, None]
    return (two + tone * (one - two)) * visible


def toy_render(labels, family, p, q):
    """Images uint8 (n, 32, 32, 3) and masks uint8 (n, 32, 32), 1 = object.

    labels (n,): classes of the objects; family (n,): classes whose patterns lie behind
    them, -1 = black. p (n, 6), q (n, 13): random numbers in [0, 1) for the two.
    """
    objects, masks = render_objects(labels, p)
    backgrounds = render_backgrounds(family, q)
    images = np.where(masks[..., None], objects, backgrounds)
    # Adding a half rounds to the nearest of 256 levels.
    return np.uint8(images * 255 + 0.5), np.uint8(masks)


# -- The set ---------------------------------------------------------------------------


@functools.cache
def toy(split):
    """Images uint8 (n, 32, 32, 3), masks uint8 (n, 32, 32), labels int (n,).

    split: "train", n = 10,000; "test" or one of TOY_VARIANTS, n = 2,000. The labels are
    0 1 .. 9 0 1 .. in all of them.
    """
    stream = ("train", "test", *TOY_VARIANTS).index(split)
    n = 10_000 if split == "train" else 2_000
    classes = len(TOY_CLASSES)
    labels = np.arange(n) % classes

    # The variants have the objects of the test split, and backgrounds of their own.
    objects = min(stream, 1)
    p = np.random.default_rng([TOY_SEED, 0, objects]).random((n, 6))
    q = np.random.default_rng([TOY_SEED, 1, stream]).random((n, 13))
    any_class, own = q[:, 11], q[:, 12]

    other = (any_class * classes).astype(int)
    if split == "only_fg":
        family = np.full(n, -1)
    elif split == "mixed_same":
        family = labels
    elif split == "mixed_rand":
        family = other
    elif split == "mixed_next":
        family = (labels + 1) % classes
    else:
        family = np.where(own < TOY_OWN_BACKGROUND, labels, other)

    images, masks = [], []
    for i in range(0, n, CHUNK):
        part = slice(i, i + CHUNK)
        drawn, shapes = toy_render(labels[part], family[part], p[part], q[part])
        images.append(drawn)
        masks.append(shapes)
    return np.concatenate(images), np.concatenate(masks), labels


def toy_pairs(n):
    """Two objects in a picture: images uint8 (n, 64, 64, 3), masks uint8 (n, 2, 64, 64).

    Side by side in the upper or the lower half, of different classes, on one background;
    a mask for each, 1 = object. They are other pictures than those of the set.
    """
    random = np.random.default_rng([TOY_SEED, 2])
    classes = len(TOY_CLASSES)
    left = random.integers(classes, size=n)
    right = (left + random.integers(1, classes, size=n)) % classes
    family = random.integers(classes, size=n)
    numbers = random.random((2, n, 6))
    q = random.random((n, 13))
    lower = random.random(n) < 0.5

    # A background of 64 x 64 pixels is four of 32, of one pattern and two colours.
    empty = np.uint8(render_backgrounds(family, q) * 255 + 0.5)
    images = np.tile(empty, (1, 2, 2, 1))
    masks = np.zeros((n, 2, 2 * TOY_SIZE, 2 * TOY_SIZE), np.uint8)
    for place, labels in enumerate((left, right)):
        drawn, shapes = toy_render(labels, family, numbers[place], q)
        columns = slice(place * TOY_SIZE, (place + 1) * TOY_SIZE)
        for i in range(n):
            rows = slice(lower[i] * TOY_SIZE, (lower[i] + 1) * TOY_SIZE)
            images[i, rows, columns] = drawn[i]
            masks[i, place, rows, columns] = shapes[i]
    return images, masks


def save_pairs(folder, n):
    """Writes toy_pairs(n) as folder/pictures/NUMBER.png and folder/masks/NUMBER.png."""
    images, masks = toy_pairs(n)
    for name in ("pictures", "masks"):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(images[i]).save(Path(folder, "pictures", f"{i:04d}.png"))
        both = Image.fromarray(masks[i].max(axis=0) * np.uint8(255))
        both.save(Path(folder, "masks", f"{i:04d}.png"))


# -- Command line ----------------------------------------------------------------------


def toy_sheet(path, pairs=5):
    """Writes a sheet with a row for each class.

    `pairs` training images with their masks, then a test image and its variants.
    """
    classes = len(TOY_CLASSES)
    images, masks, _ = toy("train")
    columns = []
    for pair in range(pairs):
        # Labels run through the classes, so this is one picture of each.
        rows = slice(pair * classes, (pair + 1) * classes)
        grey = np.repeat(masks[rows][..., None] * np.uint8(255), 3, axis=3)
        columns += [("train", images[rows]), ("mask", grey)]
    for split in ("test", *TOY_VARIANTS):
        columns.append((split, toy(split)[0][:classes]))

    sheet = []
    for title, pictures in columns:
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
        sheet.append((title, pictures))
    save_sheet(path, sheet, TOY_CLASSES)


def main(argv=None):
    parser = Parser(
        prog="python -m attg.toy",
        description="Draws a sheet of the toy set: images, masks, test variants.",
    )
    parser.add_argument(
        "--out", default="toy.png", help="picture to write (default: %(default)s)"
    )
    text = "instead, write 200 pictures of two objects, and masks, into a folder"
    parser.add_argument("--pairs", metavar="DIR", help=text)
    args = parser.parse_args(argv)
    if args.pairs:
        save_pairs(args.pairs, 200)
        print(f"200 pictures of two objects, and their masks: {args.pairs}")
        return
    out = Path(args.out)
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: must end as pictures do, such as toy.png")
    toy_sheet(out)
    for split in ("train", "test", *TOY_VARIANTS):
        counts = np.bincount(toy(split)[2])
        names = [f"{c} {n}" for c, n in zip(TOY_CLASSES, counts, strict=True)]
        print(f"{split:10s} {counts.sum()} images:", *names)
    print(f"sheet written to {out.resolve()}")


if __name__ == "__main__":
    end(main)
