#!/usr/bin/env bash
# Keras: RandomCrop never moves if one side of the image equals the crop's; a smaller side stretches
# the image, and validation images are not cropped at all.
#
# Versions: keras 3.15.1, jax 0.10.2 as backend (the code is common to all), numpy 2.4.6.
# Expected: of a 224 x 400 image (shorter side resized to 224, a frame of a road, a satellite strip)
# RandomCrop(224, 224) picks one of 177 places. Validation gets a crop of the middle, and a smaller
# image is first resized and then cropped to the same aspect ratio: the documentation says so.
# Behavior: places are drawn only if height and width are both larger, not equal. Otherwise every
# epoch trains on the center crop of each image; one row more, and the places are random. A smaller
# side: the other one is cut to the full 224 pixels instead of to the window of the right aspect
# ratio, and this is resized: the image is stretched, its mask interpolated to labels that it does
# not have. With training=False the images come back as they are. No message in any case. (Reported
# upstream, keras issue 21868.)
# Workaround: pad or resize so that both sides are larger by a pixel, CenterCrop for validation.
#
# Output seen (left edges of 100 crops):
#   224 x 400:  1 places, top 0 to 0, left 88 to 88
#   225 x 400: 88 places, top 0 to 1, left 1 to 176
#   400 x 224:  1 places, top 88 to 88, left 0 to 0
#   224 x 225:  1 places, top 0 to 0, left 0 to 0
#   validation: (225, 400)
#   200 x 400: 200 rows, 224 columns become 224 x 224, labels [ 0. 15. 20.]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 numpy==2.4.6
export KERAS_BACKEND=jax KERAS_HOME="$dir" TF_CPP_MIN_LOG_LEVEL=3
"$dir/venv/bin/python" -W ignore - <<'EOF'
import keras
import numpy as np

SIDE = 224
crop = keras.layers.RandomCrop(SIDE, SIDE, seed=0)


def coordinates(height, width):
    """One image whose channels are the row and the column of each pixel."""
    rows, columns = np.mgrid[:height, :width].astype("float32")
    return np.stack([rows, columns, columns], axis=-1)[None]


def corners(height, width, crops=100):
    """Upper and left edges of crops."""
    image = coordinates(height, width)
    return np.array([np.asarray(crop(image, training=True))[0, 0, 0, :2] for _ in range(crops)])


places = {}
for height, width in ((224, 400), (225, 400), (400, 224), (224, 225)):
    top, left = corners(height, width).T
    places[height, width] = len(set(zip(top, left)))
    print(f"{height} x {width}: {places[height, width]:2} places, top {top.min():.0f} to",
          f"{top.max():.0f}, left {left.min():.0f} to {left.max():.0f}")  # fmt: skip
assert places[224, 400] == places[400, 224] == places[224, 225] == 1 and places[225, 400] > 50

validation = crop(coordinates(225, 400), training=False)
print("validation:", validation.shape[1:3])
assert validation.shape[1:3] == (225, 400)

# 200 x 400 pixels: the largest square is 200 x 200.
mask = np.zeros((1, 200, 400, 1), "int32")
mask[:, 60:140, 150:250] = 20
small = crop({"images": coordinates(200, 400), "segmentation_masks": mask}, training=True)
rows, columns = (np.ptp(np.asarray(small["images"])[0, ..., channel]) + 1 for channel in (0, 1))
labels = np.unique(np.asarray(small["segmentation_masks"]).round())
print(f"200 x 400: {rows:.0f} rows, {columns:.0f} columns become {SIDE} x {SIDE}, labels {labels}")
assert round(rows) == 200 and round(columns) == SIDE and set(labels) > {0, 20}, (rows, columns)
EOF
