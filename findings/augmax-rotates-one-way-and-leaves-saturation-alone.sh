#!/usr/bin/env bash
# augmax: Rotate with p=0.5 turns one way only, ColorJitter never changes the saturation, and
# RandomSizedCrop shrinks images into a black frame, against an option that is on.
#
# Versions: augmax 0.4.1, jax 0.10.2, numpy 2.4.6, albumentations 2.0.8 (whose interface augmax
# follows), opencv-python-headless 5.0.0.93.
# Expected: p decides whether an image is rotated, not where to; ColorJitter(saturation=0.5)
# changes the saturation; prevent_underzoom, "whether to prevent zooming beyond the image size" and
# on by default, keeps the crop inside the image.
# Behavior: Rotate draws "whether" and "how far" with one key, so only a share p of the angles can
# occur, from one end: for p=0.5 half of them, all to one side, 14 degrees on average. ColorJitter
# calculates a new saturation and drops it. It also deals out too few keys if some strengths are 0:
# hue alone does nothing, contrast alone nothing at p=1. RandomSizedCrop compares the zoom with the
# logarithm of its limit, so that there is none: from 256 to 224 pixels four of ten images get a
# black frame. No message.
# Workaround: Rotate with p=1; zoom_range from the crop's size over the image's; no ColorJitter.
#
# Output seen:
#   p=1.0: augmax -30 to 30 degrees, mean  -0; albumentations -30 to 30 degrees, mean   0
#   p=0.8: augmax -18 to 30 degrees, mean   6; albumentations -30 to 30 degrees, mean  -0
#   p=0.5: augmax   0 to 30 degrees, mean  14; albumentations -30 to 30 degrees, mean  -0
#   strength 0.5 for     p=1: pixels, saturation    p=0.5: pixels, saturation
#   brightness           changed, not               changed, not
#   contrast             not, not                   changed, not
#   hue                  not, not                   not, not
#   saturation           not, not                   not, not
#   all four             changed, not               changed, not
#   saturation in albumentations: changed, changed
#   RandomSizedCrop(224) of 256: 41 % of images with a black frame, up to 67 % of the image
#   zoom_range=(0.875, 2) added: 0 % of images with a black frame, up to 0 % of the image
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 jax==0.10.2 augmax==0.4.1 albumentations==2.0.8 \
    opencv-python-headless==5.0.0.93
export JAX_PLATFORMS=cpu NO_ALBUMENTATIONS_UPDATE=1
"$dir/venv/bin/python" - <<'PROGRAM'
import albumentations as A
import augmax
import cv2
import jax
import numpy as np

keys = jax.random.split(jax.random.key(0), 1000)
blank, point = np.zeros((129, 129, 1), np.float32), np.array([[64.0, 104.0]])  # 40 to the right
types = [augmax.InputType.IMAGE, augmax.InputType.KEYPOINTS]


def angles(points, p):
    y, x = (np.asarray(points) - 64).T
    turned = np.degrees(np.arctan2(y, x))
    turned = turned[abs(turned) > 0.01]
    assert abs(len(turned) / len(keys) - p) < 0.05
    low, high, mean = turned.min(), turned.max(), turned.mean()
    return low, mean, f"{low:3.0f} to {high:.0f} degrees, mean {mean:3.0f}"


for p in (1.0, 0.8, 0.5):
    rotate = augmax.Chain(augmax.Rotate((-30, 30), p=p), input_types=types)
    points = jax.jit(jax.vmap(lambda key: rotate(key, [blank, point])[1][0]))(keys)
    low, mean, text = angles(points, p)
    other = A.Compose([A.Rotate((-30, 30), p=p)], keypoint_params=A.KeypointParams("yx"), seed=0)
    points = [other(image=blank, keypoints=point)["keypoints"][0] for _ in keys]
    other_low, other_mean, other_text = angles(points, p)
    print(f"p={p}: augmax {text}; albumentations {other_text}")
    assert abs(low - (30 - 60 * p)) < 1 and abs(mean - (30 - 30 * p)) < 2
    assert other_low < -29 and abs(other_mean) < 2

image = np.random.default_rng(0).random((16, 16, 3), np.float32)


def changes(jitter):
    """Whether any of 50 calls changes a pixel, and its saturation."""
    hsv = [cv2.cvtColor(np.asarray(jitter(key)), cv2.COLOR_RGB2HSV) for key in keys[:50]]
    change = abs(np.stack(hsv) - cv2.cvtColor(image, cv2.COLOR_RGB2HSV)) > 0.01
    return ", ".join("changed" if some.any() else "not" for some in (change, change[..., 1]))


print("strength 0.5 for     p=1: pixels, saturation    p=0.5: pixels, saturation")
for name in ("brightness", "contrast", "hue", "saturation", "all four"):
    strengths = ("brightness", "contrast", "hue", "saturation")
    strengths = {s: 0.5 if name in (s, "all four") else 0 for s in strengths}
    row = []
    for p in (1, 0.5):
        chain = jax.jit(augmax.Chain(augmax.ColorJitter(**strengths, p=p)))
        row.append(changes(lambda key: chain(key, image)))
    print(f"{name:20} {row[0]:26} {row[1]}")
    first = name in ("brightness", "all four")
    assert row[0] == ("changed, not" if first else "not, not")
    assert row[1] == ("changed, not" if first or name == "contrast" else "not, not")
jitter = A.Compose([A.ColorJitter(0, 0, saturation=(0.5, 1.5), hue=0, p=1)], seed=0)
control = changes(lambda key: jitter(image=image)["image"])
print("saturation in albumentations:", control)
assert control == "changed, changed"

white = np.ones((256, 256, 1), np.float32)
for name, options in (
    ("RandomSizedCrop(224) of 256", {}),
    ("zoom_range=(0.875, 2) added", {"zoom_range": (0.875, 2)}),
):
    crop = augmax.Chain(augmax.RandomSizedCrop(224, prevent_underzoom=True, **options))
    crops = np.asarray(jax.jit(jax.vmap(lambda key: crop(key, white)))(keys[:200]))
    black = (crops < 0.5).mean((1, 2, 3))
    share, most = (black > 0.01).mean(), black.max()
    print(f"{name}: {100 * share:.0f} % of images with a black frame, up to {100 * most:.0f} % of"
          " the image")
    assert share == 0 if options else share > 0.3 and most > 0.6
PROGRAM
