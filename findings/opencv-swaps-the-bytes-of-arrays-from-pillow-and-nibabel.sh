#!/usr/bin/env bash
# OpenCV, pyarrow, edt: arrays in the byte order of big-endian files, as Pillow, nibabel, h5py and
# netpbmfile return them, are read with swapped bytes; label 1 is 256, a map from 0 to 1 is noise.
#
# Versions: opencv-python-headless 5.0.0.93, pyarrow 25.0.1, edt 3.1.2, Pillow 13.0.0,
# nibabel 5.4.2, h5py 3.16.0, netpbmfile 2026.1.29, tifffile 2026.3.3, scipy 1.17.1, numpy 2.4.6.
# Expected: byte order is part of an array's type, so a library follows it or refuses the array.
# Behavior: 16-bit TIFFs of ImageJ and of many microscopes, all 16-bit PGMs, and some NIfTI and
# HDF5 files are big-endian. The readers above keep that as type >u2 or >f4, with which printing,
# comparing, plotting, and NumPy are right. OpenCV looks at kind and size of the type only and
# takes the memory as it is, in every function, so anything built on it does, too; pyarrow.Tensor
# likewise. edt knows none of these types and leaves all distances at 0. No message, and no
# reference page mentions byte order. SciPy and Pillow follow it, pyarrow.array refuses.
# Workaround: array.astype(array.dtype.newbyteorder("=")); tifffile returns native arrays.
#
# Output seen (largest value of each result; labels 0 to 2, map from 0 to 1):
#                             resize      flip   imwrite    Tensor       edt     SciPy    Pillow
#     native          <u2          2         2         2         2        16         2         2
#   TIFF by Pillow    >u2        512       512       512       512         0         2         2
#     native          <u2          2         2         2         2        16         2         2
#   PGM by netpbmfile >u2        512       512       512       512         0         2         2
#     native          <f4          1         1         1         1        16         1         1
#   NIfTI by nibabel  >f4        nan       nan       nan       nan         0         1         1
#     native          <f4          1         1         1         1        16         1         1
#   HDF5 by h5py      >f4        nan       nan       nan       nan         0         1         1
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 opencv-python-headless==5.0.0.93 pyarrow==25.0.1 edt==3.1.2 \
    Pillow==13.0.0 nibabel==5.4.2 h5py==3.16.0 netpbmfile==2026.1.29 tifffile==2026.3.3 \
    scipy==1.17.1
venv/bin/python - <<'EOF'
import cv2
import edt
import h5py
import netpbmfile
import nibabel
import numpy as np
import pyarrow as pa
import scipy.ndimage
import tifffile
from PIL import Image

labels = np.zeros((64, 64), np.uint16)
labels[8:40, 8:40], labels[20:60, 44:60] = 1, 2
saliency = scipy.ndimage.gaussian_filter((labels > 0).astype(np.float32), 3)

tifffile.imwrite("labels.tif", labels, byteorder=">")
netpbmfile.imwrite("labels.pgm", labels, maxval=65535)
with h5py.File("map.h5", "w") as file:
    file["map"] = saliency.astype(">f4")
header = nibabel.Nifti1Header(endianness=">")
nibabel.Nifti1Image(saliency.astype(">f4"), np.eye(4), header).to_filename("map.nii")

FILES = {
    "TIFF by Pillow": (labels, lambda: np.asarray(Image.open("labels.tif"))),
    "PGM by netpbmfile": (labels, lambda: netpbmfile.imread("labels.pgm")),
    "NIfTI by nibabel": (saliency, lambda: np.asarray(nibabel.load("map.nii").dataobj)),
    "HDF5 by h5py": (saliency, lambda: h5py.File("map.h5")["map"][()]),
}


def written(array):
    cv2.imwrite("out.tif", array)
    return np.asarray(Image.open("out.tif"))


WRONG = {
    "resize": lambda array: cv2.resize(array, (32, 32), interpolation=cv2.INTER_NEAREST),
    "flip": lambda array: cv2.flip(array, 1),
    "imwrite": written,
    "Tensor": lambda array: pa.Tensor.from_numpy(array).to_numpy(),
    "edt": lambda array: edt.edt((array > 0.5).astype(array.dtype)),
}
RIGHT = {
    "SciPy": lambda array: scipy.ndimage.zoom(array, 0.5, order=0),
    "Pillow": lambda array: np.asarray(Image.fromarray(array).transpose(Image.Transpose.ROTATE_90)),
}


def show(name, array):
    print(f"{name:18}{array.dtype.str:4}", end="")
    results = {}
    for function, apply in (WRONG | RIGHT).items():
        results[function] = apply(array)
        print(f"{results[function].max():10.3g}", end="")
    print()
    return results


print(f"{'':22}", *(f"{function:>9}" for function in WRONG | RIGHT))
for name, (native, read) in FILES.items():
    array = read()
    assert array.dtype.byteorder == ">" and np.array_equal(array, native), array.dtype
    expected, found = show("  native", native), show(name, array)
    for function in RIGHT:
        assert np.array_equal(expected[function], found[function]), function
    for function in WRONG:
        assert not np.array_equal(expected[function], found[function]), function
    if native is labels:
        assert np.array_equal(found["flip"], 256 * expected["flip"])
    assert not found["edt"].any()
    try:
        pa.array(array.ravel())
    except pa.ArrowNotImplementedError:
        continue
    raise AssertionError("pyarrow.array took it")
EOF
