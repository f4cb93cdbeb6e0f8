#!/usr/bin/env bash
# OpenCV 5: bitwise_not of a bool mask is True everywhere, so the background holds the object.
#
# Versions: opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Expected: version 4 refuses NumPy's bool ("data type = bool is not supported"). Version 5 takes it
# in many functions and refuses it in most others, so where it is taken, bitwise_not is ~mask.
# Behavior: bitwise_not flips all eight bits of a byte, 1 to 254 and 0 to 255, and calls the result
# bool. Neither byte is 0, so each is True for NumPy, PyTorch and OpenCV's mask=. It is printed as
# True and converted as 1; dtype and shape are right. What selects by it selects every pixel: a
# mean or a loss of the background is one of the whole image. Some uses hide it: the bits are
# right in bitwise_and with a mask and after a second bitwise_not. Other functions that take
# bool are right (nearest resize, compare, drawing, mask=). So a line that was an error in
# version 4 now runs.
# Workaround: ~mask or np.logical_not(mask); or hand OpenCV masks of 0 and 255 in uint8.
#
# Output seen:
#   share of True               ~mask  0.75  bitwise_not   1.00
#   object in its background    ~mask     0  bitwise_not   1024
#   mean of the background      ~mask  40.0  bitwise_not   80.0
#   erased image, object's sum  ~mask     0  bitwise_not 204800
#   equal to ~mask: 0.75 of the pixels; as 0 and 255 in uint8: 1.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 opencv-python-headless==5.0.0.93
"$dir/venv/bin/python" - <<'PY'
import cv2
import numpy as np

mask = np.zeros((64, 64), bool)
mask[8:40, 8:40] = True
image = np.where(mask, np.uint8(200), np.uint8(40))
right, found = ~mask, cv2.bitwise_not(mask)
assert found.dtype == bool and found.shape == mask.shape


def compare(title, measure, format):
    values = measure(right), measure(found)
    print(f"{title:27} ~mask {values[0]:5{format}}  bitwise_not {values[1]:6{format}}")
    return values


assert compare("share of True", np.mean, ".2f") == (0.75, 1)
assert compare("object in its background", lambda m: (m & mask).sum(), "d") == (0, 1024)
means = compare("mean of the background", lambda m: cv2.mean(image, mask=m)[0], ".1f")
assert means == (40, 80), means
erased = compare(
    "erased image, object's sum",
    lambda m: cv2.bitwise_and(image, image, mask=m)[mask].sum(dtype=int),
    "d",
)
assert erased == (0, 1024 * 200), erased

in_bytes = cv2.bitwise_not(mask.astype(np.uint8) * 255) > 0
print(
    f"equal to ~mask: {(found == right).mean():.2f} of the pixels;",
    f"as 0 and 255 in uint8: {(in_bytes == right).mean():.2f}",
)
assert found.all() and (in_bytes == right).all()

# What is right all the same: two of bitwise_not's own uses, and other functions on bool.
assert (cv2.bitwise_not(found) == mask).all() and not cv2.bitwise_and(mask, found).any()
small = cv2.resize(mask, (32, 32), interpolation=cv2.INTER_NEAREST)
assert (small == mask[::2, ::2]).all() and cv2.countNonZero(mask) == 1024
assert (cv2.compare(mask, right, cv2.CMP_EQ) == 0).all()
PY
