#!/usr/bin/env bash
# pyarrow: in a tensor column images upside down come back lying on their side, mirrored ones
# garbled; from CHW to HWC pixels get lost.
#
# Versions: pyarrow 26.0.1 (25.0.0 and 17.0.0 alike), numpy 2.4.6.
# Expected: FixedShapeTensorArray.from_numpy_ndarray copies what is not contiguous, as its docstring
# says and as np.save does. So any batch comes back from to_numpy_ndarray as it was.
# Behavior: values are stored in the order in which they lie in memory, and with them an order of
# the axes, by which they are read. That order comes from sorting the strides. The stride of a
# flipped axis is negative and sorted last, so the axes after it are taken for others. With the
# height flipped, CHW images and square maps come back turned by 90 degrees, and HWC images
# in another shape, that of CHW; mirrored HWC images keep shape, dtype and histogram, but pixels
# and channels are mixed. A cyclic order as in the step from CHW to HWC is read the wrong way
# round: another shape, with few of the pixels, many times. The step back raises. Swaps of two
# axes and flips of the last one, as in a quick test, are right. No warning; Parquet is innocent.
# Workaround: np.ascontiguousarray before storing.
#
# Output seen (shape of a row before and after, share of values in their place):
#   images                   (32, 32, 3)  -> (32, 32, 3)  1.00
#   images mirrored          (32, 32, 3)  -> (32, 32, 3)  0.02
#   images upside down       (32, 32, 3)  -> (3, 32, 32)  0.00
#   CHW images mirrored      (3, 32, 32)  -> (3, 32, 32)  1.00
#   CHW images upside down   (3, 32, 32)  -> (3, 32, 32)  0.03
#   CHW to HWC               (32, 32, 3)  -> (32, 3, 32)  0.00
#   maps transposed          (14, 14)     -> (14, 14)     1.00
#   maps mirrored            (14, 14)     -> (14, 14)     1.00
#   maps upside down         (14, 14)     -> (14, 14)     0.07
#   maps upside down are the maps turned by 90 degrees: True
#   CHW to HWC: 10% of the values are read
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pyarrow==26.0.1
"$dir/venv/bin/python" - "$dir" <<'EOF'
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

random = np.random.default_rng(0)
hwc = random.random((8, 32, 32, 3), np.float32)
chw = np.ascontiguousarray(hwc.transpose(0, 3, 1, 2))
maps = random.random((8, 14, 14), np.float32)


def stored(batch):
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(batch)
    pq.write_table(pa.table({"x": column}), f"{sys.argv[1]}/file")
    return pq.read_table(f"{sys.argv[1]}/file")["x"].combine_chunks().to_numpy_ndarray()


def compare(name, batch, right=False):
    back = stored(batch)
    same = np.mean(back == batch) if back.shape == batch.shape else 0
    print(f"{name:24} {str(batch.shape[1:]):12} -> {str(back.shape[1:]):12} {same:.2f}")
    assert same == 1 if right else same < 0.1, name
    assert np.array_equal(stored(np.ascontiguousarray(batch)), batch)
    return back


compare("images", hwc, right=True)
compare("images mirrored", hwc[:, :, ::-1])
compare("images upside down", hwc[:, ::-1])
compare("CHW images mirrored", chw[..., ::-1], right=True)
compare("CHW images upside down", chw[:, :, ::-1])
mixed = compare("CHW to HWC", chw.transpose(0, 2, 3, 1))
compare("maps transposed", maps.transpose(0, 2, 1), right=True)
compare("maps mirrored", maps[..., ::-1], right=True)
turned = compare("maps upside down", maps[:, ::-1])
turned = np.array_equal(turned, np.rot90(maps, -1, axes=(1, 2)))
read = len(np.unique(mixed)) / len(np.unique(hwc))
print("maps upside down are the maps turned by 90 degrees:", turned)
print(f"CHW to HWC: {read:.0%} of the values are read")
assert turned and read < 0.9
EOF
