#!/usr/bin/env bash
# rasterio: merge takes class 0 of overlapping tiles for missing: "first" fills the first tile's
# background with the second tile's objects, "min" of 0/1 masks is the last mask.
#
# Versions: rasterio 1.4.4, numpy 2.4.6.
# Expected: where tiles overlap, merge (method="first") keeps the first one's pixels, "min" takes
# the smallest value; tiles that declare no nodata value have no missing pixels.
# Behavior: if the first tile has no nodata value, merge assumes 0, and takes each 0 that is in its
# result (each value below 1e-8 of a float map) for a pixel that no tile has covered yet. So a
# background pixel of the first tile gets whatever the second one has there; a minimum of 0 is
# replaced by the next tile's value and depends on the order of tiles. Images are hardly ever 0
# and are merged right: in the overlap the image is that of the first date, the labels show objects
# of the second. "last" and "sum" are right, "max" where nothing is negative. The docstring says
# that nodata is taken from the first tile, not what happens if it has none. rioxarray's
# merge_arrays and torchgeo's RasterDataset merge by this function.
# Workaround: merge(..., nodata=255), or another value that no tile holds; NaN for float maps.
#
# Output seen (two tiles, each with a building that the other date lacks; merged with the default
# and with nodata=255):
#   image, first  10 10 10 10 10 10 20 20 | 10 10 10 10 10 10 20 20
#   label, first   0  3  3  0  3  3  0  0 |  0  3  3  0  0  0  0  0
#   label, last    0  3  0  0  3  3  0  0 |  0  3  0  0  3  3  0  0
#   label, max     0  3  3  0  3  3  0  0 |  0  3  3  0  3  3  0  0
#   three random masks, share of objects by min: 0.30, the last mask's; with nodata=255 0.03
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.4.6
cd "$dir"
venv/bin/python -W ignore - <<'EOF'
import numpy as np
import rasterio
from rasterio.merge import merge


def write(name, rows, column):
    """A GeoTIFF of pixels of one meter, its left edge at the given column."""
    rows = np.atleast_2d(rows).astype("uint8")
    height, width = rows.shape
    place = rasterio.transform.from_origin(column, height, 1, 1)
    options = dict(count=1, dtype="uint8", crs="EPSG:32633", transform=place)
    with rasterio.open(name, "w", width=width, height=height, **options) as file:
        file.write(rows, 1)
    return name


def merged(tiles, method, **options):
    return merge(tiles, method=method, **options)[0][0]


images = [write("image1.tif", [10] * 6, 0), write("image2.tif", [20] * 6, 2)]
labels = [write("label1.tif", [0, 3, 3, 0, 0, 0], 0), write("label2.tif", [0, 0, 3, 3, 0, 0], 2)]
CASES = [("image", images, "first")]
CASES += [("label", labels, method) for method in ("first", "last", "max")]
found = {}
for name, tiles, method in CASES:
    default = merged(tiles, method)[0]
    right = merged(tiles, method, nodata=255)[0]
    show = [" ".join(f"{value:2}" for value in row) for row in (default, right)]
    print(f"{name}, {method:6} {show[0]} | {show[1]}")
    found[name, method] = default.tolist(), right.tolist()

for key in (("image", "first"), ("label", "last"), ("label", "max")):
    assert found[key][0] == found[key][1], key
assert found["label", "first"] == ([0, 3, 3, 0, 3, 3, 0, 0], [0, 3, 3, 0, 0, 0, 0, 0])

masks = np.random.default_rng(0).random((3, 256, 256)) < 0.3
tiles = [write(f"mask{i}.tif", mask, 0) for i, mask in enumerate(masks)]
default, right = (merged(tiles, "min", nodata=nodata) for nodata in (None, 255))
print(f"three random masks, share of objects by min: {default.mean():.2f}, the last mask's;",
      f"with nodata=255 {right.mean():.2f}")  # fmt: skip
assert (default == masks[-1]).all() and (right == masks.all(axis=0)).all()
EOF
