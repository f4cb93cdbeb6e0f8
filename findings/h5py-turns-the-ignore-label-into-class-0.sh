#!/usr/bin/env bash
# h5py: labels of -1 (ignore) stored as uint8 become class 0, not 255; 255 stored as int8 becomes
# 127, not -1.
#
# Versions: h5py 3.16.0, zarr 3.1.6, numpy 2.4.6.
# Expected: dtype="uint8" means what astype means in NumPy, so an ignored -1 is stored as 255, the
# ignored label of Pascal VOC and Cityscapes, and an ignored 255 in int8 as -1. As all values
# pass through NumPy, dataset.astype("uint8")[:] equals dataset[:].astype("uint8").
# Behavior: HDF5 converts, and to the nearest value that fits. So -1 is 0: ignored pixels, boxes
# or images become examples of the first class or of the background, and ignore_index=255 finds
# nothing. 255 becomes 127, which is no label at all. It is so in assignment, in create_dataset
# with data and in reading by dataset.astype; zarr does what NumPy does. Ids above 255 become 255,
# that is ignored, and NaN in a map becomes 0. No warning; HDF5's documents tell it, h5py's
# docstrings do not.
# Workaround: labels.astype("uint8") before h5py gets them, after a check of their range.
#
# Output seen (h5py: assigned, created with data and read by astype alike):
#   labels to uint8  [-1, 0, 20, 255]
#     numpy, zarr    [255, 0, 20, 255]
#     h5py           [0, 0, 20, 255]
#   255 to int8      [0, 20, 255]
#     numpy, zarr    [0, 20, -1]
#     h5py           [0, 20, 127]
#   ids to uint8     [255, 256, 257, 1000]
#     numpy, zarr    [255, 0, 1, 232]
#     h5py           [255, 255, 255, 255]
#   share of class 0 in a mask with 40 % ignored: zarr 0.30, h5py 0.70
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 h5py==3.16.0 zarr==3.1.6 numcodecs==0.16.6
"$dir/venv/bin/python" -W ignore - "$dir" <<'EOF'
import sys

import h5py
import numpy as np
import zarr

file = h5py.File(f"{sys.argv[1]}/labels.h5", "w")


def zarr_assign(values, dtype):
    array = zarr.create_array({}, shape=values.shape, dtype=dtype)
    array[:] = values
    return array[:]


def h5py_assign(values, dtype):
    file.clear()
    file.create_dataset("y", values.shape, dtype)[:] = values
    return file["y"][:]


def h5py_create(values, dtype):
    file.clear()
    return file.create_dataset("y", data=values, dtype=dtype)[:]


def h5py_read(values, dtype):
    file.clear()
    return file.create_dataset("y", data=values).astype(dtype)[:]


def compare(name, values, dtype):
    print(f"{name:16}", values.tolist())
    ways = zarr_assign, h5py_assign, h5py_create, h5py_read
    in_numpy, in_h5py = values.astype(dtype).tolist(), h5py_assign(values, dtype).tolist()
    assert [way(values, dtype).tolist() for way in ways] == [in_numpy] + 3 * [in_h5py]
    print("  numpy, zarr   ", in_numpy)
    print("  h5py          ", in_h5py)
    return in_h5py


assert compare("labels to uint8", np.array([-1, 0, 20, 255]), "uint8") == [0, 0, 20, 255]
assert compare("255 to int8", np.array([0, 20, 255], np.uint8), "int8") == [0, 20, 127]
assert compare("ids to uint8", np.array([255, 256, 257, 1000]), "uint8") == 4 * [255]

mask = np.repeat([-1, 0, 7], [40, 30, 30])
shares = [np.mean(way(mask, "uint8") == 0) for way in (zarr_assign, h5py_assign)]
print("share of class 0 in a mask with 40 %% ignored: zarr %.2f, h5py %.2f" % tuple(shares))
assert np.allclose(shares, (0.3, 0.7))
EOF
