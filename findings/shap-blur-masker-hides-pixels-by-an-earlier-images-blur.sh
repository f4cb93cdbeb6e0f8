#!/usr/bin/env bash
# shap: the blur masker fills hidden pixels with an earlier image's blur; which images of a data set
# that happens to depends on where Python puts its objects.
#
# Versions: shap 0.51.0, opencv-python-headless 5.0.0.93, numpy 2.4.6, CPython.
# Expected: maskers.Image("blur(...)") hides pixels by a blurred copy of the image that they
# belong to.
# Behavior: the blurred copy is kept together with the id() of the flattened image. That array lives
# for one call, and Python gives its address, and so the id, to the next one. If the next image
# has it, the blur of the earlier image counts as its own: the hidden part of a black image is
# white. Calls one after the other, one an image, as for a batch of occluded images, give all images
# the blur of one of them; with another operation between the calls none get it. An Explainer calls
# the masker several times an image and mixes up single images (one in each of two sets of 30, none
# in a set of 40): their expected value is another image's, their map belongs to neither. No
# message.
# Workaround: a new masker, and a new Explainer, for each image.
#
# Output seen (40 images of one gray level each, 0 to 0.975; their hidden middle):
#   one masker             [0.    0.025 0.05  0.075 0.1  ] ...; of another image: 0%
#   one masker, collected  [0.975 0.975 0.975 0.975 0.975] ...; of another image: 98%
#   a masker per image     [0.    0.025 0.05  0.075 0.1  ] ...; of another image: 0%
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q shap==0.51.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import shap

SHAPE = (16, 16, 3)
levels = np.arange(40, dtype="float32") / 40
images = [np.full(SHAPE, level, "float32") for level in levels]
visible = np.ones(SHAPE, bool)
visible[4:12, 4:12] = False


def hidden(masker, image):
    """The gray level that the masker puts in the hidden middle."""
    return masker(visible.ravel(), image)[0][0, 8, 8, 0]


def report(name, found):
    wrong = np.abs(found - levels) > 0.01
    print(f"{name:22} {found[:5].round(3)} ...; of another image: {wrong.mean():.0%}")
    return wrong.mean()


masker = shap.maskers.Image("blur(8,8)", SHAPE)
shared = report("one masker", np.array([hidden(masker, image) for image in images]))
batch = np.concatenate([masker(visible.ravel(), image)[0] for image in images])
collected = report("one masker, collected", batch[:, 8, 8, 0])
fresh = [hidden(shap.maskers.Image("blur(8,8)", SHAPE), image) for image in images]
alone = report("a masker per image", np.array(fresh))
assert max(shared, collected) > 0.5 and alone == 0, (shared, collected, alone)
EOF
