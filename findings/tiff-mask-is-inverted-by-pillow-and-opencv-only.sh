#!/usr/bin/env bash
# TIFF masks in which 0 is white: Pillow and OpenCV exchange object and background (label 3 is
# 252) in 8 bits, not in 16; other readers never do.
#
# Versions: Pillow 13.0.0, opencv-python-headless 5.0.0.93, tifffile 2026.3.3, imageio 2.38.1,
# scikit-image 0.26.0, SimpleITK 2.5.7, rasterio 1.4.4, numpy 2.4.6.
# Expected: readers of a TIFF with one channel agree on the numbers that are stored.
# Behavior: a tag says whether 0 is drawn black or white. ImageJ writes "white" for masks with
# its inverting table, which its binary commands make, and scanners do so for line drawings.
# Pillow and OpenCV then return 255 - value, but only for 8 bits: a label mask of 16 bits
# comes back as stored. tifffile, scikit-image, imageio, SimpleITK and rasterio return what is
# stored in any case. So a mask made and checked with one group is the mask of the background
# in a loader of the other, and a folder of label masks in both depths is half wrong. A model
# trained on such masks learns the background; no step warns.
# Workaround: read masks with tifffile, or write them once more with photometric="minisblack".
#
# Output seen (background and object as read):
#   Pillow        mask 255   0, label in 8 bits 255 252, in 16 bits   0   3
#   OpenCV        mask 255   0, label in 8 bits 255 252, in 16 bits   0   3
#   tifffile      mask   0 255, label in 8 bits   0   3, in 16 bits   0   3
#   scikit-image  mask   0 255, label in 8 bits   0   3, in 16 bits   0   3
#   imageio       mask   0 255, label in 8 bits   0   3, in 16 bits   0   3
#   SimpleITK     mask   0 255, label in 8 bits   0   3, in 16 bits   0   3
#   rasterio      mask   0 255, label in 8 bits   0   3, in 16 bits   0   3
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    tifffile==2026.3.3 imageio==2.38.1 scikit-image==0.26.0 simpleitk==2.5.7 rasterio==1.4.4
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import cv2
import imageio.v3
import numpy as np
import rasterio
import SimpleITK
import skimage.io
import tifffile
from PIL import Image

mask = np.zeros((6, 8), np.uint8)
mask[2:5, 2:6] = 255
label = mask // 85  # object 3
for name, stored in (("mask", mask), ("label_8", label), ("label_16", label.astype(np.uint16))):
    tifffile.imwrite(f"{name}.tif", stored, photometric="miniswhite")

readers = {
    "Pillow": lambda file: np.asarray(Image.open(file)),
    "OpenCV": lambda file: cv2.imread(file, cv2.IMREAD_UNCHANGED),
    "tifffile": tifffile.imread,
    "scikit-image": skimage.io.imread,
    "imageio": imageio.v3.imread,
    "SimpleITK": lambda file: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file)),
    "rasterio": lambda file: rasterio.open(file).read(1),
}
for reader, read in readers.items():
    images = [read(f"{name}.tif") for name in ("mask", "label_8", "label_16")]
    found = [[int(image[0, 0]), int(image[3, 3])] for image in images]
    texts = [f"{background:3} {object_:3}" for background, object_ in found]
    print(f"{reader:13} mask {texts[0]}, label in 8 bits {texts[1]}, in 16 bits {texts[2]}")
    inverted = reader in ("Pillow", "OpenCV")
    assert found == ([[255, 0], [255, 252]] if inverted else [[0, 255], [0, 3]]) + [[0, 3]]
EOF
