#!/usr/bin/env bash
# pyoxipng, zopflipy: lossless PNG optimizers give the labels of a mask new numbers, other ones in
# each file.
#
# Versions: pyoxipng 9.1.1 (the newer pyoxipng-ng 10.0.0 and oxipng-pybind 10.2.1 do the same),
# zopflipy 1.14, Pillow 13.0.0, numpy 2.4.6.
# Expected: lossless means that a reader gets the numbers it got before; photographs, and what
# Pillow itself writes with optimize=True, keep them.
# Behavior: colors on the screen are kept, numbers are not. Of a palette (masks in VOC's format)
# the unused entries are dropped and the others reordered, so labels become 0, 1, 2 ... in an
# order of each file's own, and the ignored border, 255, becomes a class. A gray mask becomes a
# palette image if that is smaller; np.array(Image.open(mask)), as in most data set classes, then
# gives indices. A mask of 0 and 255 becomes a 1-bit one that Pillow reads as bool: mask == 255
# finds nothing. A folder that was cleaned up this way trains without an error. The documentation
# lists the options that do this as reductions, without a word on indices.
# Workaround: optimize(..., palette_reduction=False, color_type_reduction=False,
# bit_depth_reduction=False); ZopfliPNG(keep_color_type=True); or no masks at all.
#
# Output seen (masks whose numbers stayed the same, labels of the last mask before and after):
#   Pillow                  palette 5 of 5  gray 5 of 5  0 and 255 5 of 5
#   pyoxipng                palette 0 of 5  gray 3 of 5  0 and 255 0 of 5
#       palette: {0: 0, 7: 1, 13: 3, 255: 2}
#   zopflipy                palette 0 of 5  gray 0 of 5  0 and 255 0 of 5
#       palette: {0: 0, 7: 3, 13: 2, 255: 1}
#   pyoxipng, no reduction  palette 5 of 5  gray 5 of 5  0 and 255 5 of 5
#   zopflipy, keep type     palette 5 of 5  gray 5 of 5  0 and 255 5 of 5
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 pyoxipng==9.1.1 zopflipy==1.14
"$dir/venv/bin/python" - <<'EOF'
import io

import numpy as np
import oxipng
import zopfli
from PIL import Image, ImageDraw

random = np.random.default_rng(0)
PALETTE = random.integers(0, 256, 768).tolist()


def draw():
    """A mask with 2 to 4 objects of 20 classes, each with a border to be ignored."""
    image = Image.new("L", (256, 256))
    for label in random.choice(np.arange(1, 21), random.integers(2, 5), replace=False):
        left, top = random.integers(0, 180, 2)
        width, height = random.integers(25, 75, 2)
        box = [left, top, left + width, top + height]
        ImageDraw.Draw(image).ellipse(box, fill=int(label), outline=255, width=3)
    return np.array(image)


def encode(mask, palette):
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def decode(data):
    return Image.open(io.BytesIO(data))


def save_again(data):
    file = io.BytesIO()
    decode(data).save(file, "PNG", optimize=True)
    return file.getvalue()


quick = dict(filter_strategies="0", auto_filter_strategy=False, iterations=1)
off = dict(palette_reduction=False, color_type_reduction=False, bit_depth_reduction=False)
TOOLS = {
    "Pillow": save_again,
    "pyoxipng": oxipng.optimize_from_memory,
    "zopflipy": zopfli.ZopfliPNG(**quick).optimize,
    "pyoxipng, no reduction": lambda data: oxipng.optimize_from_memory(data, **off),
    "zopflipy, keep type": zopfli.ZopfliPNG(keep_color_type=True, **quick).optimize,
}
labels = [draw() for _ in range(5)]
binary = [(mask > 0) * np.uint8(255) for mask in labels]
FOLDERS = {"palette": (labels, PALETTE), "gray": (labels, None), "0 and 255": (binary, None)}

for name, optimize in TOOLS.items():
    changes = name in ("pyoxipng", "zopflipy")
    print(f"{name:22}", end="")
    for folder, (masks, palette) in FOLDERS.items():
        same = 0
        for mask in masks:
            before = encode(mask, palette)
            after = optimize(before)
            # No pixel looks different.
            colors = [np.array(decode(data).convert("RGB")) for data in (before, after)]
            assert np.array_equal(*colors)
            read = np.array(decode(after))
            same += np.array_equal(read, mask)
            if changes and folder == "0 and 255":
                assert read.dtype == bool and not (read == 255).any()
        print(f"  {folder} {same} of {len(masks)}", end="")
        assert same < 4 if changes else same == len(masks), (name, folder, same)
        if changes and folder == "palette":
            example = {int(v): int(read[mask == v][0]) for v in np.unique(mask)}
    print()
    if changes:
        print(f"    palette: {example}")
EOF
