#!/usr/bin/env bash
# SimpleITK: a constant is cut to the image's pixel type first; half of an 8-bit map is black,
# and a mask is at least 0.5 everywhere.
#
# Versions: SimpleITK 2.5.7, numpy 2.4.6.
# Expected: image * 0.5 computes with 0.5. It rounds at the end if the result has the type of the
# image, as in OpenCV and in SimpleITK's own ShiftScale, or is float, as in NumPy. A comparison
# with 0.5 is one with 0.5.
# Behavior: of integer images the constant becomes an integer of that type, toward zero, before
# anything is computed. So * 0.5 gives zeros, * 1.2 and / 1.5 the image itself, ** 0.5 ones.
# mask >= 0.5 holds everywhere and mask < 0.5 nowhere, also in BinaryThreshold; mask > 0.5
# happens to be right. Constants that do not fit wrap around: no 8-bit pixel is below 256.
# Overlays, brightness, gamma and weighted sums of maps are wrong without a message; the same
# lines are right for float images. Signatures say "double constant". Known upstream
# (SimpleITK pull request 2728, open in September 2026).
# Workaround: sitk.Cast(image, sitk.sitkFloat32) before any constant; ShiftScale; or NumPy.
#
# Output seen (means: NumPy, SimpleITK on 8 bits, SimpleITK on the same image in float32):
#   image * 0.5                        60.20    0.00   60.20
#   image * 1.2                       144.48  120.40  144.48
#   image / 1.5                        80.26  120.40   80.26
#   image / 2                          60.20   60.20   60.20
#   image ** 0.5                       10.32    1.00   10.32
#   0.5 * image + 0.5 * other         127.50    0.00  127.50
#   image < 256                         1.00    0.00    1.00
#   mask > 0.5                          0.25    0.25    0.25
#   mask >= 0.5                         0.25    1.00    0.25
#   mask < 0.5                          0.75    0.00    0.75
#   BinaryThreshold(mask, 0.5, 1.5)     0.25    1.00    0.25
#   ShiftScale(image, 0, 0.5)          60.20   59.94   60.20
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 SimpleITK==2.5.7
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
import SimpleITK as sitk

random = np.random.default_rng(0)
pixels = random.integers(0, 240, (64, 64)).astype(np.uint8)
square = np.zeros((64, 64), np.uint8)
square[16:48, 16:48] = 1
ours = {"image": pixels, "other": 255 - pixels, "mask": square}

lines = """
image * 0.5
image * 1.2
image / 1.5
image / 2
image ** 0.5
0.5 * image + 0.5 * other
image < 256
mask > 0.5
mask >= 0.5
mask < 0.5
BinaryThreshold(mask, 0.5, 1.5)
ShiftScale(image, 0, 0.5)
"""
in_numpy = {
    "BinaryThreshold": lambda image, low, high: (low <= image) & (image <= high),
    "ShiftScale": lambda image, shift, scale: (image + shift) * scale,
}
right = []
for line in lines.strip().splitlines():
    arrays = {name: array.astype(np.float32) for name, array in ours.items()}
    means = [eval(line, in_numpy | arrays).mean()]
    for kind in (sitk.sitkUInt8, sitk.sitkFloat32):
        images = {n: sitk.Cast(sitk.GetImageFromArray(a), kind) for n, a in ours.items()}
        result = eval(line, vars(sitk) | images)
        means.append(sitk.GetArrayFromImage(result).mean())
    print(f"{line:32}", *(f"{mean:7.2f}" for mean in means))
    assert abs(means[2] - means[0]) < 1e-3 * means[0], line
    if abs(means[1] - means[0]) < 0.3:  # Rounding.
        right.append(line)
assert right == ["image / 2", "mask > 0.5", "ShiftScale(image, 0, 0.5)"], right
EOF
