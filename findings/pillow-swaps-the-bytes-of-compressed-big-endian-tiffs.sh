#!/usr/bin/env bash
# Pillow: compressed big-endian TIFFs of floats or signed integers are read with their bytes in the
# wrong order: a map from 0 to 1 is noise of any size, id 1 is 256 or 16777216.
#
# Versions: Pillow 13.0.0, tifffile 2026.3.3, rasterio 1.4.4, opencv-python-headless 5.0.0.93,
# numpy 2.4.6.
# Expected: byte order and compression are matters of the file; a reader returns the numbers that
# were written, or an error.
# Behavior: libtiff decompresses and returns the machine's own order, which Pillow takes for the
# order of the file and swaps once more; it allows for that only in unsigned 16-bit types. Modes
# I (of int16 and int32) and F are garbled without a warning, and stay so if they are saved again.
# Big-endian files without compression are right, and so are little-endian ones with it, which is
# what a test written in Python covers: tifffile and GDAL write the order of the machine unless
# told otherwise. Programs in Java, such as ImageJ with Bio-Formats, write big-endian. OpenCV and
# tifffile read all of these files.
# Workaround: tifffile.
#
# Output seen (first two numbers, the same as read by Pillow, share of numbers that are right; each
# written by GDAL, big-endian and compressed):
#   mask uint8        7     10   Pillow          7         10  100%
#   ids uint16     2353    428   Pillow       2353        428  100%
#   ids int16       433    494   Pillow -2.022e+04      -4607    0%
#   ids int32      1478   1814   Pillow -9.728e+08  3.696e+08    0%
#   map float32  0.6631 0.8284   Pillow  -1.32e-15  7.362e-30    0%
#   map from 1e-05 to 1; read by Pillow from -3e+38 to 3e+38; 8 NaN or inf
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 tifffile==2026.3.3 \
    imagecodecs==2026.3.6 opencv-python-headless==5.0.0.93 rasterio==1.4.4
cd "$dir"
venv/bin/python -W ignore - <<'EOF'
import cv2
import numpy as np
import rasterio
import tifffile
from PIL import Image

random = np.random.default_rng(0)
ARRAYS = {
    "mask uint8": random.integers(0, 21, (64, 64), np.uint8),
    "ids uint16": random.integers(0, 3000, (64, 64), np.uint16),
    "ids int16": random.integers(0, 3000, (64, 64), np.int16),
    "ids int32": random.integers(0, 3000, (64, 64), np.int32),
    "map float32": random.random((64, 64), np.float32),
}


def with_tifffile(path, array, big, compressed):
    tifffile.imwrite(
        path, array, byteorder=">" if big else "<", compression="deflate" if compressed else None
    )


def with_gdal(path, array, big, compressed):
    profile = dict(driver="GTiff", width=64, height=64, count=1, dtype=array.dtype.name)
    profile |= dict(ENDIANNESS="BIG" if big else "LITTLE", compress="lzw" if compressed else None)
    with rasterio.open(path, "w", **profile) as target:
        target.write(array, 1)


for name, array in ARRAYS.items():
    for write in (with_tifffile, with_gdal):
        for big in (False, True):
            for compressed in (False, True):
                write("a.tif", array, big, compressed)
                assert np.array_equal(tifffile.imread("a.tif"), array)
                assert np.array_equal(cv2.imread("a.tif", cv2.IMREAD_UNCHANGED), array)
                read = np.array(Image.open("a.tif"))
                garbled = big and compressed and name.split()[1] in ("int16", "int32", "float32")
                assert np.array_equal(read, array) != garbled, (name, write, big, compressed)
    # The last one: by GDAL, big-endian and compressed.
    right = np.mean(read == array)
    print(f"{name:12} {array[0, 0]:6.4g} {array[0, 1]:6.4g}", end="   ")
    print(f"Pillow {read[0, 0]:10.4g} {read[0, 1]:10.4g}  {right:4.0%}")

finite = read[np.isfinite(read)].astype(float)
for text, values in (("map", array), ("read by Pillow", finite)):
    print(f"{text} from {values.min():.1g} to {values.max():.1g}", end="; ")
print(f"{read.size - len(finite)} NaN or inf")
assert finite.max() > 1e30
EOF
