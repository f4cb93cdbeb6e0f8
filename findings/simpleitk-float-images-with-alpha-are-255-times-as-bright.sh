#!/usr/bin/env bash
# SimpleITK, itk: an image with an alpha channel, or an 8-bit TIFF in tiles, is 255 times as
# bright if it is read as float or int32.
#
# Versions: SimpleITK 2.5.7, itk-io 5.4.7, Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6.
# Expected: ReadImage(path, sitkFloat32) gives gray values from 0 to 255, with or without an alpha
# channel (which is 255 everywhere in screenshots and in most exports).
# Behavior: gray is luminance times alpha, and alpha is divided by 255 only if the type asked for
# has 8 or 16 bits; else values go up to 65025. A comment in ITK's source keeps this for backward
# compatibility; the docstrings of the readers do not. RGB files are right, so in a folder of both
# kinds some images are 255 times as bright, and windows, thresholds, statistics or differences
# between two images are wrong without a message. Gray TIFFs in tiles, as pathology and GDAL
# write them, have no alpha, but ITK reads them by way of RGBA: labels 1 and 2 become 255 and 510.
# Workaround: sitk.Cast(sitk.ReadImage(path, sitk.sitkUInt8), sitk.sitkFloat32).
#
# Output seen (mean of the same image; labels of a mask):
#                            uint8    int16    int32  float32  float64
#   gray.png                 127.5    127.5    127.5    127.5    127.5
#   rgb.png                  127.5    127.5    127.5    127.5    127.5
#   rgba.png                 127.5    127.5  32512.5  32512.5  32512.5
#   gray_strips.tif          127.5    127.5    127.5    127.5    127.5
#   gray_tiles.tif           127.5    127.5  32512.5  32512.5  32512.5
#   labels_strips.tif   uint8 [0, 1, 2]  int32 [0, 1, 2]
#   labels_tiles.tif    uint8 [0, 1, 2]  int32 [0, 255, 510]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 SimpleITK==2.5.7 itk-io==5.4.7 \
    tifffile==2026.3.3
cd "$dir"
venv/bin/python - <<'EOF'
import itk
import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image

y, x = np.mgrid[:256, :256]
gray = ((x + 2 * y) % 256).astype(np.uint8)
color = np.stack([gray, gray, gray], axis=-1)
labels = np.repeat(np.arange(3, dtype=np.uint8), 64)[:, None].repeat(192, axis=1)
Image.fromarray(gray).save("gray.png")
Image.fromarray(color).save("rgb.png")
Image.fromarray(np.dstack([color, np.full_like(gray, 255)])).save("rgba.png")
for name, array in (("gray", gray), ("labels", labels)):
    tifffile.imwrite(f"{name}_strips.tif", array)
    tifffile.imwrite(f"{name}_tiles.tif", array, tile=(64, 64))


def read_simpleitk(path, name):
    return sitk.GetArrayFromImage(sitk.ReadImage(path, getattr(sitk, "sitk" + name)))


def read_itk(path, name):
    return itk.array_from_image(itk.imread(path, getattr(itk, name)))


print(" " * 21, *(f"{name:>8}" for name in ("uint8", "int16", "int32", "float32", "float64")))
for path in ("gray.png", "rgb.png", "rgba.png", "gray_strips.tif", "gray_tiles.tif"):
    assert np.array_equal(np.array(Image.open(path).convert("L")), gray), path
    types = ("UInt8", "Int16", "Int32", "Float32", "Float64")
    means = [read_simpleitk(path, name).mean() for name in types]
    through_itk = [read_itk(path, name).mean() for name in ("UC", "SS", "F", "D")]
    print(f"{path:21}", *(f"{mean:8.1f}" for mean in means))
    wrong = path in ("rgba.png", "gray_tiles.tif")
    for mean in means[2:] + through_itk[2:]:
        assert np.isclose(mean, gray.mean() * (255 if wrong else 1)), (path, mean)
    assert np.allclose(means[:2] + through_itk[:2], gray.mean(), atol=1), (path, means)

for path in ("labels_strips.tif", "labels_tiles.tif"):
    found = [np.unique(read_simpleitk(path, name)).astype(int) for name in ("UInt8", "Int32")]
    print(f"{path:19} uint8 {found[0].tolist()}  int32 {found[1].tolist()}")
    assert found[0].tolist() == [0, 1, 2]
    assert (found[1].tolist() == [0, 255, 510]) == ("tiles" in path)

cast = sitk.Cast(sitk.ReadImage("rgba.png", sitk.sitkUInt8), sitk.sitkFloat32)
assert np.array_equal(sitk.GetArrayFromImage(cast), gray)
EOF
