#!/usr/bin/env bash
# rasterio: labels stored as a COG and read smaller by nearest neighbor, or by mode, are mixtures
# that the raster does not hold.
#
# Versions: rasterio 1.4.4 (with GDAL 3.10.3), numpy 2.4.6.
# Expected: read(out_shape=...) takes nearest neighbors by default, so each value it returns is one
# of the raster's, from a GeoTIFF as from a cloud-optimized one; at full size the two agree.
# Behavior: driver="COG" adds the raster at half size, quarter size and so on (overviews) if it is
# larger than a block of 512 pixels, by cubic interpolation if it has no palette. A smaller read
# starts from the next larger overview without a word; its nearest neighbors, or most frequent
# values, are picked among interpolated ones. So are windows read at a lower resolution. Small
# rasters, as in tests, have no overviews and are right. GDAL's page of the driver tells the
# default; the file as rasterio shows it does not (its tag for it is empty).
# Workaround: overview_resampling="nearest" or "mode" when writing, or overview_level="NONE" in
# open.
#
# Output seen (2048 x 2048, squares of 9 pixels labeled 0, 7 or 200; share of pixels that have
# another label, read at 2048, 1024, 224, at 224 by mode, and a window of 512 at 224):
#   GTiff                        0.00 0.00 0.00 0.00 0.00
#   COG                          0.00 0.49 0.76 0.45 0.48
#   COG, written by nearest      0.00 0.00 0.00 0.00 0.00
#   COG, read without overviews  0.00 0.00 0.00 0.00 0.00
#   labels in COG at 224: 185, among them 0 1 2 3 4 5 6 7 8 9
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 rasterio==1.4.4
cd "$dir"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.windows import Window

LABELS = [0, 7, 200]
squares = np.random.default_rng(0).choice(np.uint8(LABELS), (228, 228))
labels = squares.repeat(9, 0).repeat(9, 1)[:2048, :2048]
READS = [
    dict(),
    dict(out_shape=(1024, 1024)),
    dict(out_shape=(224, 224)),
    dict(out_shape=(224, 224), resampling=Resampling.mode),
    dict(out_shape=(224, 224), window=Window(0, 0, 512, 512)),
]


def invented(title, driver, reading={}, **writing):
    shape = dict(width=2048, height=2048, count=1, dtype="uint8")
    with rasterio.open("labels.tif", "w", driver=driver, **shape, **writing) as file:
        file.write(labels, 1)
    with rasterio.open("labels.tif", **reading) as file:
        assert not file.tags(ns="rio_overview")
        found = [file.read(1, **options) for options in READS]
    assert (found[0] == labels).all()
    shares = np.array([(~np.isin(part, LABELS)).mean() for part in found])
    print(f"{title:28}", *(f"{share:.2f}" for share in shares))
    return shares, np.unique(found[2])


shares, _ = invented("GTiff", "GTiff")
assert (shares == 0).all()
shares, numbers = invented("COG", "COG")
assert (shares[1:] > 0.3).all() and len(numbers) > 50
for title, reading, writing in (
    ("COG, written by nearest", {}, dict(overview_resampling="nearest")),
    ("COG, read without overviews", dict(overview_level="NONE"), {}),
):
    shares, _ = invented(title, "COG", reading, **writing)
    assert (shares == 0).all()
print(f"labels in COG at 224: {len(numbers)}, among them", *numbers[:10])
PY
