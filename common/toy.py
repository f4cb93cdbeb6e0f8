"""
The embedded `toy` set: objects on textured backgrounds, generated from a seed in seconds, with exact masks.

    python -m common.toy --out toy.png        # draws a sheet of it: images, exact masks, test variants

Shapes and textures are drawn once as small tables, rounded to 8 bit; a picture looks them up at turned and scaled
coordinates: fast, and the same bits on every machine.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch

from common.files import save_sheet

TOY_SEED, TOY_SIZE, TABLE = 2402, 32, 64  # px a side: pictures, tables


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


TOY_VARIANTS = (
    "only_fg",
    "mixed_same",
    "mixed_rand",
    "mixed_next",
)  # the test's objects on other backgrounds


# Difficulty, to be set on vanilla runs only: k-NN on raw pixels below 45 %, vanilla pre-training clearly above.
TOY_RADIUS = (7.0, 10.0)  # px


TOY_HUE_JITTER = 0.10  # +- turns around the hue of the class; classes are 0.1 apart


TOY_LIGHT = (0.6, 1.0)  # brightness of the object's light tone


TOY_DARK = 0.42  # its dark tone has this part of it


TOY_OWN_BACKGROUND = (
    0.7  # probability of the family of the class, otherwise a random one
)


TOY_PERIOD = (11.0, 20.0)  # px per period of a background


TOY_CONTRAST = (0.5, 0.9)  # between its two tones


def toy_objects(x, y, r, t):
    """Per class the silhouette (within r < 1) and the light part of its texture; x right, y down, r and t polar."""
    box, spot = np.maximum(abs(x), abs(y)), np.hypot(abs(x) - 0.45, abs(y) - 0.42)
    body, tail = (
        np.hypot((x - 0.24) / 0.7, y / 0.5) < 1,
        (abs(x + 0.6) < 0.36) & (abs(y) < -0.75 * x - 0.1),
    )
    return (
        (r < 0.9, np.sin(3 * t) > 0),
        (box < 0.8, np.sin(6 * x) * np.sin(6 * y) > 0),
        (r < 0.4 + 0.58 * abs(5 * t / np.pi % 2 - 1) ** 1.3, r < 0.45),
        (r < 0.74 + 0.24 * np.cos(6 * t), r > 0.36),
        (
            np.hypot(x, 0.15 - 1.15 * y - 0.75 * np.sqrt(abs(x))) < 0.87,
            np.sin(9 * x + 0.6) > 0,
        ),
        ((np.minimum(abs(x), abs(y)) < 0.3) & (box < 0.95), np.sin(8 * (x + y)) > 0),
        (r < 0.8 + 0.16 * np.sign(np.cos(8 * t)), abs(r - 0.44) < 0.17),
        (
            abs(y) < 0.55 * (1 - x * x),
            (abs(y) > 0.09) & (np.sin(11 * (x - abs(y))) > -0.5),
        ),
        (body | tail, (x < 0.3) & (np.sin(10 * x) < 0.5)),
        (r < 0.2 + 0.76 * abs(np.sin(2 * t)) ** 0.6, spot > 0.21),
    )


def toy_backgrounds(x, y):
    """The family of each class: > 0 is one tone, < 0 the other; period 1 in x and y."""
    wave = 2 * np.pi
    return (
        np.sin(2 * wave * x),  # stripes
        np.sin(wave * x) * np.sin(wave * y),  # checks
        np.minimum(2 * y % 1, 1.6 * ((x + (y > 0.5) / 2) % 1)) - 0.22,  # bricks
        np.hypot(2 * x % 1 - 0.5, 2 * y % 1 - 0.5) - 0.26,  # dots
        (2 * y + 2 * abs(2 * x % 1 - 0.5)) % 1 - 0.5,  # zigzag
        np.sin(2 * wave * y + 2 * np.sin(wave * x)),  # waves
        np.sign(x - 0.5) + np.sign(y - 0.5),  # plaid, 0 is a third tone
        np.sin(5 * wave * np.hypot(x - 0.5, y - 0.5)),  # rings
        0.93 - np.maximum(abs(np.sin(wave * x)), abs(np.sin(wave * y))),  # mesh
        np.sin(wave * (x + y) + 2 * np.sin(wave * y))
        + np.sin(wave * (2 * x - y)),  # blots
    )


@functools.cache
def toy_tables():
    """Silhouettes, bool; tones of objects and of backgrounds in [0, 1]: (10, 64, 64) each; cosines (1024,)."""

    def soften(table):  # 3 x 3 mean, against aliasing
        for axis in (1, 2):
            table = sum(np.roll(table, k, axis) for k in (-1, 0, 1)) / 3
        return np.round(table * 255) / 255

    y, x = (np.mgrid[0:TABLE, 0:TABLE] + 0.5) / TABLE
    tiles = (np.sign(np.stack(toy_backgrounds(x, y))) + 1) / 2
    x, y = 2 * x - 1, 2 * y - 1
    shapes, lights = (
        np.stack(part)
        for part in zip(
            *toy_objects(x, y, np.hypot(x, y), np.arctan2(y, x)), strict=True
        )
    )
    shapes[:, [0, -1]] = shapes[:, :, [0, -1]] = (
        False  # coordinates outside are clamped to the border
    )
    return (
        shapes,
        soften(lights),
        soften(tiles),
        np.round(np.cos(np.arange(1024) * np.pi / 512) * 2**20) / 2**20,
    )


def toy_coordinates(cx, cy, turn, unit):
    """x, y (n, 32, 32) of all pixels in frames centred at (cx, cy) px, turned by `turn` circles, `unit` px long."""
    angle, centre, cos = (
        (turn * 1024).astype(int),
        np.arange(TOY_SIZE) + 0.5,
        toy_tables()[3],
    )
    c, s = (
        cos[a % 1024][:, None, None] / unit[:, None, None] for a in (angle, angle - 256)
    )
    dx, dy = centre - cx[:, None, None], centre[:, None] - cy[:, None, None]
    return c * dx + s * dy, c * dy - s * dx


def toy_colour(hue, saturation, value):
    """HSV (n,) each, hue in turns -> RGB (n, 1, 1, 3) in [0, 1]."""
    ramp = np.clip(abs((6 * hue[:, None] + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * (1 - ramp)))[:, None, None]


def toy_render(labels, family, p, q):
    """Images and masks for (n,) classes and background families (-1: black); p, q: random numbers in [0, 1)."""

    def between(limits, u):
        return limits[0] + (limits[1] - limits[0]) * u

    shapes, lights, tiles, _ = toy_tables()
    radius, bright, hue = (
        between(TOY_RADIUS, p[:, 2]),
        between(TOY_LIGHT, p[:, 5]),
        TOY_HUE_JITTER * (2 * p[:, 4] - 1),
    )
    cx, cy = (
        between((radius, TOY_SIZE - radius), p[:, i]) for i in (0, 1)
    )  # wholly in the picture
    x, y = toy_coordinates(cx, cy, p[:, 3], radius)
    u, v = (np.clip((w + 1) * TABLE / 2, 0, TABLE - 1).astype(int) for w in (x, y))
    spot, hue = (labels[:, None, None], v, u), labels / len(TOY_CLASSES) + hue
    light, dark = (
        toy_colour(hue, 0 * hue + 0.75, bright),
        toy_colour(hue + 0.03, 0 * hue + 0.9, TOY_DARK * bright),
    )
    objects, mask = dark + lights[spot][..., None] * (light - dark), shapes[spot]

    x, y = toy_coordinates(
        TOY_SIZE * q[:, 0], TOY_SIZE * q[:, 1], q[:, 2], between(TOY_PERIOD, q[:, 3])
    )
    u, v = (np.floor(w * TABLE).astype(int) % TABLE for w in (x, y))
    tone = tiles[family[:, None, None], v, u][..., None]
    value, half = (
        between((0.3, 0.8), q[:, 4]),
        between(TOY_CONTRAST, q[:, 5]) / 2 * np.sign(q[:, 6] - 0.5),
    )
    one = toy_colour(q[:, 7], 0.15 + 0.5 * q[:, 8], np.clip(value + half, 0, 1))
    two = toy_colour(
        q[:, 7] + 0.3 * (q[:, 9] - 0.5),
        0.15 + 0.5 * q[:, 10],
        np.clip(value - half, 0, 1),
    )
    ground = (two + tone * (one - two)) * (family >= 0)[:, None, None, None]
    return np.uint8(np.where(mask[..., None], objects, ground) * 255 + 0.5), np.uint8(
        mask
    )


@functools.cache
def toy(split):
    """Images uint8 (n, 32, 32, 3), masks uint8 (n, 32, 32), labels int (n,) = 0 1 .. 9 0 1 ..; n = 10,000 or 2,000."""
    n, classes = (10_000 if split == "train" else 2_000), len(TOY_CLASSES)
    labels, stream = (
        np.arange(n) % classes,
        ("train", "test", *TOY_VARIANTS).index(split),
    )
    p = np.random.default_rng([TOY_SEED, 0, min(stream, 1)]).random(
        (n, 6)
    )  # variants share objects,
    q = np.random.default_rng([TOY_SEED, 1, stream]).random((n, 13))  # no backgrounds
    other = (q[:, 11] * classes).astype(int)
    usual, following = (
        np.where(q[:, 12] < TOY_OWN_BACKGROUND, labels, other),
        (labels + 1) % classes,
    )
    variants = {
        "only_fg": np.full(n, -1),
        "mixed_same": labels,
        "mixed_rand": other,
        "mixed_next": following,
    }
    family = variants.get(split, usual)
    parts = [
        toy_render(*(a[i : i + 500] for a in (labels, family, p, q)))
        for i in range(0, n, 500)
    ]
    images, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images, masks, labels


def toy_sheet(path, pairs=5):
    """A row per class: `pairs` training images with masks, then a test image and its four variants."""
    images, masks, labels = toy("train")
    rows = [np.flatnonzero(labels == c) for c in range(len(TOY_CLASSES))]
    columns = []
    for i in ([row[pair] for row in rows] for pair in range(pairs)):
        columns += [
            ("train", images[i]),
            ("mask", np.repeat(masks[i][..., None] * np.uint8(255), 3, axis=3)),
        ]
    columns += [
        (split, toy(split)[0][: len(rows)]) for split in ("test", *TOY_VARIANTS)
    ]  # one of each class
    save_sheet(
        path,
        [(name, torch.from_numpy(x).permute(0, 3, 1, 2) / 255) for name, x in columns],
        TOY_CLASSES,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Draws a sheet of the toy set: images, masks, test variants."
    )
    parser.add_argument(
        "--out", default="toy.png", help="picture to write (default: %(default)s)"
    )
    out = Path(parser.parse_args(argv).out)
    toy_sheet(out)
    for split in ("train", "test", *TOY_VARIANTS):
        counts = np.bincount(toy(split)[2])
        print(
            f"{split:10s} {counts.sum()} images:",
            *(f"{c} {n}" for c, n in zip(TOY_CLASSES, counts, strict=True)),
        )
    print(f"sheet written to {out.resolve()}")


if __name__ == "__main__":
    main()
