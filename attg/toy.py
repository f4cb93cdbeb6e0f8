"""
The embedded `toy` set: objects on textured backgrounds, generated in seconds.

    images, masks, labels = toy("train")    # 10,000 images of 32 x 32 pixels
    images, masks, labels = toy("test")     # 2,000, and as many of each variant

How an image is made:
    1. The object. Its class determines the silhouette, the texture and, roughly, the
       hue; position, size, rotation, hue and brightness are random. It is never cut off
       by the image border.
    2. The background. Each class has a pattern, which its images show most of the time;
       position, period, rotation and two colors are random.
    3. The object covers the background; its silhouette is the exact mask.

The variants show the objects of the test split on other backgrounds, after "Noise or
Signal: The Role of Image Backgrounds in Object Recognition" (arXiv 2006.09994):
    only_fg       black
    mixed_same    the pattern of the object's class
    mixed_rand    the pattern of a random class
    mixed_next    the pattern of the next class

Silhouettes, textures and patterns are drawn once, as small tables rounded to 8 bits, and
images look them up at rotated and scaled coordinates, with a table of cosines as well.
That is fast, and gives the same bits on every machine.
"""

import functools
from typing import NamedTuple

import numpy as np

TOY_SEED = 2402
# Side of an image in pixels, and of a table in cells.
TOY_SIZE = 32
TABLE = 64
# Rotation angles in a full circle.
DIRECTIONS = 1024
# Images drawn at once, to bound the memory.
CHUNK = 500

TOY_CLASSES = ("ball", "box", "star", "flower", "heart")
TOY_CLASSES += ("cross", "gear", "leaf", "fish", "clover")
TOY_VARIANTS = ("only_fg", "mixed_same", "mixed_rand", "mixed_next")

# These ranges set the difficulty. They were chosen on vanilla runs alone, so that k-NN is
# below 45 % on raw pixels and clearly better on vanilla features.

# Radius of the object in pixels.
TOY_RADIUS = (7.0, 10.0)
# In turns, either way. Classes are 0.1 apart, so neighbors overlap.
TOY_HUE_JITTER = 0.10
# Brightness of the object's light tone, and its dark tone relative to that.
TOY_LIGHT = (0.6, 1.0)
TOY_DARK = 0.42
# Probability of the pattern of the object's class; otherwise that of a random class.
TOY_OWN_BACKGROUND = 0.7
# Period of a background pattern in pixels.
TOY_PERIOD = (11.0, 20.0)
# Mean brightness of a background's two tones, and their difference.
TOY_MIDDLE = (0.3, 0.8)
TOY_CONTRAST = (0.5, 0.9)


def toy_shapes(x, y, r, t):
    """The silhouettes of all classes, as in TOY_CLASSES.

    x (right), y (down) and polar r, t: arrays of one shape, as are the results, which
    are bool. All silhouettes lie within r < 1.
    """
    width, height = abs(x), abs(y)
    square = np.maximum(width, height)
    bars = np.minimum(width, height)
    # 0 between two of the five points, 1 at a point.
    point = abs(5 * t / np.pi % 2 - 1)
    middle = 0.15 - 1.15 * y - 0.75 * np.sqrt(width)
    teeth = np.sign(np.cos(8 * t))
    body = np.hypot((x - 0.24) / 0.7, y / 0.5) < 1
    tail = (abs(x + 0.6) < 0.36) & (height < -0.75 * x - 0.1)
    leaves = abs(np.sin(2 * t))

    return [
        r < 0.9,  # ball
        square < 0.8,  # box
        r < 0.4 + 0.58 * point**1.3,  # star
        r < 0.74 + 0.24 * np.cos(6 * t),  # flower
        np.hypot(x, middle) < 0.87,  # heart
        (bars < 0.3) & (square < 0.95),  # cross
        r < 0.8 + 0.16 * teeth,  # gear
        height < 0.55 * (1 - x * x),  # leaf
        body | tail,  # fish
        r < 0.2 + 0.76 * leaves**0.6,  # clover
    ]


def toy_lights(x, y, r, t):
    """The light parts of the objects' textures, like toy_shapes."""
    width, height = abs(x), abs(y)
    # Veins on both sides of a dark midrib.
    veins = np.sin(11 * (x - height)) > -0.5
    # Distance from a dark spot on each of the four leaves.
    spot = np.hypot(width - 0.45, height - 0.42)

    return [
        np.sin(3 * t) > 0,  # ball
        np.sin(6 * x) * np.sin(6 * y) > 0,  # box
        r < 0.45,  # star
        r > 0.36,  # flower
        np.sin(9 * x + 0.6) > 0,  # heart
        np.sin(8 * (x + y)) > 0,  # cross
        abs(r - 0.44) < 0.17,  # gear
        veins & (height > 0.09),  # leaf
        (x < 0.3) & (np.sin(10 * x) < 0.5),  # fish
        spot > 0.21,  # clover
    ]


def toy_backgrounds(x, y):
    """The patterns of all classes, as in TOY_CLASSES: > 0 is one tone, < 0 the other.

    x (right) and y (down): arrays of one shape, as are the results. The period is 1 in
    both directions.
    """
    wave = 2 * np.pi
    wave_x = np.sin(wave * x)
    wave_y = np.sin(wave * y)
    # From -0.5 to 0.5, twice in a period.
    saw_x = 2 * x % 1 - 0.5
    saw_y = 2 * y % 1 - 0.5
    # Two rows of bricks, one shifted by half a brick; the mortar is below 0.
    along = (x + (y > 0.5) / 2) % 1
    bent = np.sin(wave * (x + y) + 2 * wave_y)

    return [
        np.sin(2 * wave * x),  # stripes
        wave_x * wave_y,  # checks
        np.minimum(2 * y % 1, 1.6 * along) - 0.22,  # bricks
        np.hypot(saw_x, saw_y) - 0.26,  # dots
        (2 * y + 2 * abs(saw_x)) % 1 - 0.5,  # zigzag
        np.sin(2 * wave * y + 2 * wave_x),  # waves
        # The only pattern with a third tone: 0, where the bands do not agree.
        np.sign(x - 0.5) + np.sign(y - 0.5),  # plaid
        np.sin(5 * wave * np.hypot(x - 0.5, y - 0.5)),  # rings
        0.93 - np.maximum(abs(wave_x), abs(wave_y)),  # mesh
        bent + np.sin(wave * (2 * x - y)),  # blots
    ]


class Tables(NamedTuple):
    """Lookup tables; the first three are (10, 64, 64), by class."""

    shapes: np.ndarray  # silhouettes, bool
    lights: np.ndarray  # textures of the objects in [0, 1], 1 = light tone
    tiles: np.ndarray  # patterns of the backgrounds in [0, 1], 1 = first tone
    cosines: np.ndarray  # of all directions, (1024,)


@functools.cache
def toy_tables():
    """The Tables, rounded: machines differ in the last bits."""
    # Centers of the cells: in [0, 1] for patterns, in [-1, 1] for objects.
    y, x = (np.mgrid[0:TABLE, 0:TABLE] + 0.5) / TABLE
    tiles = (np.sign(np.stack(toy_backgrounds(x, y))) + 1) / 2

    x, y = 2 * x - 1, 2 * y - 1
    polar = np.hypot(x, y), np.arctan2(y, x)
    shapes = np.stack(toy_shapes(x, y, *polar))
    lights = np.stack(toy_lights(x, y, *polar))
    # Coordinates outside the table are clamped to its border, where no object may be.
    shapes[:, [0, -1], :] = False
    shapes[:, :, [0, -1]] = False

    angles = np.arange(DIRECTIONS) * np.pi / (DIRECTIONS // 2)
    cosines = np.round(np.cos(angles) * 2**20) / 2**20
    return Tables(shapes, soften(lights), soften(tiles), cosines)


def soften(table):
    """Box blur of 3 x 3 cells against aliasing, rounded to 8 bits: (10, 64, 64)."""
    table = table.astype(float)
    for axis in (1, 2):
        table = (np.roll(table, -1, axis) + table + np.roll(table, 1, axis)) / 3
    return np.round(table * 255) / 255


def between(limits, u):
    """Scale u in [0, 1) to the range `limits`."""
    lower, upper = limits
    return lower + (upper - lower) * u


def toy_coordinates(cx, cy, turn, unit):
    """Coordinates x, y (n, 32, 32, 1) of all pixels in n frames.

    Each frame has its origin at the pixel (cx, cy), is rotated by `turn` full circles,
    and its unit is `unit` pixels long; all four are (n, 1, 1, 1).
    """
    cosines = toy_tables().cosines
    angle = (turn * DIRECTIONS).astype(int)
    cos = cosines[angle % DIRECTIONS] / unit
    sin = cosines[(angle - DIRECTIONS // 4) % DIRECTIONS] / unit

    center = np.arange(TOY_SIZE)[:, None] + 0.5
    dx = center - cx  # (n, 1, 32, 1), along the columns
    dy = center[:, None] - cy  # (n, 32, 1, 1), along the rows
    return cos * dx + sin * dy, cos * dy - sin * dx


def toy_color(hue, saturation, value):
    """HSV, each (n, 1, 1, 1), hue in turns -> RGB (n, 1, 1, 3) in [0, 1]."""
    # Red, green and blue are full over a third of the circle and fade over a sixth.
    sixths = 6 * hue + [0, 4, 2]
    ramp = np.clip(abs(sixths % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - ramp))


def render_objects(labels, numbers):
    """Draw objects: colors (n, 32, 32, 3) in [0, 1] and masks (n, 32, 32, 1), bool.

    labels (n, 1, 1, 1); numbers (6, n, 1, 1, 1), random in [0, 1).
    """
    right, down, size, turn, jitter, light = numbers
    tables = toy_tables()
    radius = between(TOY_RADIUS, size)
    # The whole object is inside the image.
    inside = (radius, TOY_SIZE - radius)
    cx = between(inside, right)
    cy = between(inside, down)
    x, y = toy_coordinates(cx, cy, turn, radius)
    cells = (np.stack([y, x]) + 1) * TABLE / 2
    cells = np.clip(cells, 0, TABLE - 1).astype(int)

    hue = labels / len(TOY_CLASSES)
    hue = hue + TOY_HUE_JITTER * (2 * jitter - 1)
    bright = between(TOY_LIGHT, light)
    light = toy_color(hue, 0.75, bright)
    dark = toy_color(hue + 0.03, 0.9, TOY_DARK * bright)
    colors = dark + tables.lights[labels, *cells] * (light - dark)
    return colors, tables.shapes[labels, *cells]


def render_backgrounds(family, numbers):
    """Draw patterns: colors (n, 32, 32, 3) in [0, 1].

    family (n, 1, 1, 1): classes of the patterns, -1 = black; numbers (11, n, 1, 1, 1),
    random in [0, 1).
    """
    right, down, turn, period = numbers[:4]
    middle, contrast, brighter = numbers[4:7]
    hue, saturation, hue_step, other = numbers[7:]
    corner = TOY_SIZE * right, TOY_SIZE * down
    x, y = toy_coordinates(*corner, turn, between(TOY_PERIOD, period))
    # Patterns are periodic, unlike objects.
    cells = np.floor(np.stack([y, x]) * TABLE).astype(int)
    tone = toy_tables().tiles[family, *cells % TABLE]

    value = between(TOY_MIDDLE, middle)
    # Either tone may be the brighter one.
    half = between(TOY_CONTRAST, contrast) / 2 * np.sign(brighter - 0.5)
    one = toy_color(hue, 0.15 + 0.5 * saturation, np.clip(value + half, 0, 1))
    hue = hue + 0.3 * (hue_step - 0.5)
    two = toy_color(hue, 0.15 + 0.5 * other, np.clip(value - half, 0, 1))
    return (two + tone * (one - two)) * (family >= 0)


def toy_render(labels, family, p, q):
    """Draw images uint8 (n, 32, 32, 3) and masks uint8 (n, 32, 32), 1 = object.

    labels (n,): classes of the objects; family (n,): classes of the background patterns,
    -1 = black; p (n, 6) and q (n, 11): random numbers in [0, 1) for the two.
    """
    # Whatever is drawn has the shape (n, rows, columns, channels).
    labels, family, p, q = (x.T[..., None, None, None] for x in (labels, family, p, q))
    objects, masks = render_objects(labels, p)
    backgrounds = render_backgrounds(family, q)
    images = np.where(masks, objects, backgrounds)
    # Adding 0.5 rounds to the nearest of 256 levels.
    return np.uint8(images * 255 + 0.5), np.uint8(masks[..., 0])


@functools.cache
def toy(split):
    """Images uint8 (n, 32, 32, 3), masks uint8 (n, 32, 32), labels int (n,).

    split: "train", n = 10,000; "test" or one of TOY_VARIANTS, n = 2,000. Labels are
    0 1 .. 9 0 1 .. in all of them.
    """
    splits = ("train", "test", *TOY_VARIANTS)
    if split not in splits:
        raise ValueError(f"split {split!r} of --data toy: choose from {splits}")
    stream = splits.index(split)
    n = 10_000 if split == "train" else 2_000
    classes = len(TOY_CLASSES)
    labels = np.arange(n) % classes

    # The variants share the objects of the test split, but not the backgrounds.
    p = np.random.default_rng([TOY_SEED, 0, min(stream, 1)]).random((n, 6))
    q = np.random.default_rng([TOY_SEED, 1, stream]).random((n, 13))
    other = (q[:, 11] * classes).astype(int)
    usual = np.where(q[:, 12] < TOY_OWN_BACKGROUND, labels, other)
    family = {
        "only_fg": np.full(n, -1),
        "mixed_same": labels,
        "mixed_rand": other,
        "mixed_next": (labels + 1) % classes,
    }.get(split, usual)

    parts = (np.split(x, n // CHUNK) for x in (labels, family, p, q[:, :11]))
    images, masks = zip(*map(toy_render, *parts), strict=True)
    return np.concatenate(images), np.concatenate(masks), labels
