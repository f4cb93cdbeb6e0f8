#!/usr/bin/env bash
# SimpleITK: a TIFF in float16 is read as the bit patterns of its values, integers; divided by its
# maximum a map still looks plausible, but 0.5 stands for 0.006, and negative values are highest.
#
# Versions: SimpleITK 2.5.7, tifffile 2026.3.3, pyvips 3.2.0 with pyvips-binary 8.18.7, Pillow
# 13.0.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Expected: what SimpleITK does not know is refused, as GetImageFromArray refuses arrays in float16
# and ReadImage TIFFs in float64. Pillow and OpenCV refuse the file; tifffile and pyvips read it.
# Behavior: the TIFF reader (ITK's) asks whether samples are floats only if they have 32 bits; with
# 16 bits all that is not a signed integer is uint16. 0, 0.25, 0.5, 1 become 0, 13312, 14336,
# 15360. Shape, minimum and the order of positive values are right, so scores by ranks are, too.
# What depends on the values is not: divided by the maximum, 0.25 is 0.87, the map is nearly flat,
# and a threshold of one half finds most of the image. Negative values lie above all positive
# ones, so a signed map has its peak where it is lowest. Also with outputPixelType=sitkFloat32,
# compressed or not, and for RGB. No message.
# Workaround: convert maps to float32 before they are stored; .view(numpy.float16) on the array
# that was read brings the values back.
#
# Output seen (a smooth map with one object in float16; in the last row stored in float32):
#   float16 TIFF in Pillow: refused
#   float16 TIFF in OpenCV: refused
#   float64 TIFF in SimpleITK: refused
#   float16 array in SimpleITK: refused
#   values 0, 0.25, 0.5, 1, -0.25
#     tifffile  0 0.25 0.5 1 -0.25
#     pyvips    0 0.25 0.5 1 -0.25
#     SimpleITK 0 13312 14336 15360 46080
#   map / max >= 0.5    area   IoU  mean  Otsu's area  peak of map - 0.5
#     tifffile          0.09  0.97  0.12         0.14  row 70, column 50
#     pyvips            0.09  0.97  0.12         0.14  row 70, column 50
#     SimpleITK         0.62  0.13  0.57         0.61  row 0, column 0
#     SimpleITK float32 0.09  0.97  0.12         0.14  row 70, column 50
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 SimpleITK==2.5.7 tifffile==2026.3.3 pyvips==3.2.0 \
    pyvips-binary==8.18.7 pillow==13.0.0 opencv-python-headless==5.0.0.93
cd "$dir"
OPENCV_LOG_LEVEL=SILENT venv/bin/python - <<'EOF'
import cv2
import numpy as np
import pyvips
import SimpleITK as sitk
import tifffile
from PIL import Image


def simpleitk(path, *pixel_type):
    return sitk.GetArrayFromImage(sitk.ReadImage(path, *pixel_type))


def vips(path):
    return pyvips.Image.new_from_file(path).numpy()


def refuses(what, function, *arguments):
    try:
        result = function(*arguments)
    except (OSError, RuntimeError, TypeError):
        result = None
    assert result is None, what
    print(f"{what}: refused")


values = np.array([[0, 0.25, 0.5, 1, -0.25]], np.float16)
tifffile.imwrite("values.tif", values)
tifffile.imwrite("float64.tif", values.astype(float))
refuses("float16 TIFF in Pillow", Image.open, "values.tif")
refuses("float16 TIFF in OpenCV", cv2.imread, "values.tif", cv2.IMREAD_UNCHANGED)
refuses("float64 TIFF in SimpleITK", simpleitk, "float64.tif")
refuses("float16 array in SimpleITK", sitk.GetImageFromArray, values)

READERS = {"tifffile": tifffile.imread, "pyvips": vips, "SimpleITK": simpleitk}
print("values 0, 0.25, 0.5, 1, -0.25")
for name, read in READERS.items():
    found = read("values.tif")
    print(f"  {name:9}", *(f"{value:g}" for value in found[0]))
    assert np.array_equal(found, values.view(np.uint16) if name == "SimpleITK" else values)
assert np.array_equal(simpleitk("values.tif", sitk.sitkFloat32), values.view(np.uint16))
assert np.array_equal(simpleitk("values.tif").view(np.float16), values)  # the way back

rows, columns = np.mgrid[:128, :128]
distance = (rows - 70) ** 2 + (columns - 50) ** 2
smooth = np.exp(-distance / (2 * 18**2))
truth = distance < 21**2


def report(name, read, dtype):
    tifffile.imwrite("map.tif", smooth.astype(dtype), compression="zlib")
    tifffile.imwrite("signed.tif", (smooth - 0.5).astype(dtype))
    found = read("map.tif").astype(np.float32)
    found /= found.max()
    mask = found >= 0.5
    iou = (mask & truth).sum() / (mask | truth).sum()
    otsu = sitk.GetArrayFromImage(sitk.OtsuThreshold(sitk.GetImageFromArray(found), 0, 1)).mean()
    signed = read("signed.tif")
    row, column = np.unravel_index(signed.argmax(), signed.shape)
    print(f"  {name:18}{mask.mean():.2f}  {iou:.2f}  {found.mean():.2f}  {otsu:11.2f}", end="")
    print(f"  row {row}, column {column}")
    return iou > 0.9 and (row, column) == (70, 50)


print("map / max >= 0.5    area   IoU  mean  Otsu's area  peak of map - 0.5")
right = [report(name, read, np.float16) for name, read in READERS.items()]
assert right == [True, True, False], right
assert report("SimpleITK float32", simpleitk, np.float32)
EOF
