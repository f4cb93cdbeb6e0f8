#!/usr/bin/env bash
# Keras: MixUp blends each segmentation mask with single pixels of the first mask in the batch
# instead of the mask of the partner; images and labels are right.
#
# Versions: keras 3.15.1, jax 0.10.2, numpy 2.4.6 (and the same with PyTorch 2.14.1 as backend).
# Expected: image, label, and one-hot mask of a sample are blended with those of the same partner by
# the same weight, as CutMix pastes the same part of all of them.
# Behavior: for masks the layer picks the partners by a "take" without an axis. So it gets one
# number for each sample, from the upper left corner of the first mask, and these are broadcast
# along the channels. If masks have as many channels as the batch has samples, the shape is right
# and nothing tells that an image shows two samples and its mask one. Masks of one channel come back
# with a channel for each sample, which squared error and Dice broadcast against the model's one.
# (Cross-entropy raises an error, as MixUp itself does for other numbers of channels.) A single
# sample, as in the map() of a loader, keeps its image, but its mask is multiplied by a random
# weight if the corner is background: half of a foreground of ones is left on average. The reference
# page does not mention masks.
# Workaround: np.eye(batch size) as labels; the matrix they turn into blends the masks, as below.
#
# Output seen (masks equal to their images; largest difference between masks and images):
#   CutMix (4, 32, 32, 1) -> masks (4, 32, 32, 1) difference 0.00
#   CutMix (4, 32, 32, 4) -> masks (4, 32, 32, 4) difference 0.00
#   MixUp  (4, 32, 32, 1) -> masks (4, 32, 32, 4) difference 0.97
#          partners: 0.71 of the images, 0 of the masks
#   MixUp  (4, 32, 32, 4) -> masks (4, 32, 32, 4) difference 0.97
#          partners: 0.71 of the images, 0 of the masks
#   Losses for one channel, of a prediction that equals the mixed image:
#   MeanSquaredError    0.087 instead of 0.000
#   Dice               -0.106 instead of 0.081
#   BinaryCrossentropy an error
#   single samples: images unchanged, foreground of masks 0.01 to 1.00, mean 0.50
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 jax==0.10.2 keras==3.15.1
KERAS_BACKEND=jax "$dir/venv/bin/python" -W ignore - <<'PY'
import keras
import numpy as np

random = np.random.default_rng(0)
BATCH, SIZE = 4, 32


def shapes(channels):
    """A square of random place and size in each channel, nothing else."""
    masks = np.zeros((BATCH, SIZE, SIZE, channels), np.float32)
    for mask in masks.reshape(BATCH, -1, channels):
        for channel in range(channels):
            top, left, side = random.integers(2, 14, 3)
            square = np.zeros((SIZE, SIZE))
            square[top : top + side + 4, left : left + side + 4] = 1
            mask[:, channel] = square.ravel()
    return masks


def run(layer, masks):
    batch = {"images": masks, "segmentation_masks": masks, "labels": np.eye(BATCH, dtype="float32")}
    return {key: np.asarray(value) for key, value in layer(batch, training=True).items()}


for name in ("CutMix", "MixUp"):
    for channels in (1, BATCH):
        layer = getattr(keras.layers, name)(1.0, seed=5)
        masks = shapes(channels)
        mixed = run(layer, masks)
        found = mixed["segmentation_masks"]
        difference = np.abs(found - mixed["images"]).max()
        print(f"{name:6} {masks.shape} -> masks {found.shape} difference {difference:.2f}")
        if name == "CutMix":
            assert found.shape == masks.shape and difference == 0
            continue
        assert found.shape == masks.shape[:3] + (BATCH,) and difference > 0.4
        # Row i of the labels: how much of each sample went into sample i.
        share = mixed["labels"]
        right = np.einsum("ij,jhwc->ihwc", share, masks)
        assert np.allclose(right, mixed["images"], atol=1e-6)
        # The corner is background, so that all that is left is the sample's own part.
        own = np.diag(share)
        part = np.broadcast_to(own[:, None, None, None] * masks, found.shape)
        mixes = own < 0.99
        assert mixes.sum() > 1 and np.allclose(found[mixes], part[mixes], atol=1e-6)
        print(f"       partners: {np.mean(1 - own[mixes]):.2f} of the images, 0 of the masks")

print("\nLosses for one channel, of a prediction that equals the mixed image:")
layer = keras.layers.MixUp(1.0, seed=5)
mixed = run(layer, shapes(1))
for name in ("MeanSquaredError", "Dice", "BinaryCrossentropy"):
    loss = getattr(keras.losses, name)()
    right = float(loss(mixed["images"], mixed["images"]))
    try:
        value = float(loss(mixed["segmentation_masks"], mixed["images"]))
        print(f"{name:18} {value:6.3f} instead of {right:.3f}")
        assert abs(value - right) > 0.02 and name != "BinaryCrossentropy"
    except ValueError:
        print(f"{name:18} an error")
        assert name == "BinaryCrossentropy"

foreground = []
for _ in range(500):
    mask = shapes(1)[0]
    mixed = layer({"images": 255 * mask, "segmentation_masks": mask}, training=True)
    assert np.allclose(np.asarray(mixed["images"]), 255 * mask, atol=1e-3)
    foreground.append(float(np.asarray(mixed["segmentation_masks"]).max()))
print(f"\nsingle samples: images unchanged, foreground of masks {min(foreground):.2f} to "
      f"{max(foreground):.2f}, mean {np.mean(foreground):.2f}")
assert min(foreground) < 0.05 and 0.4 < np.mean(foreground) < 0.6
PY
