#!/usr/bin/env bash
# torchmetrics, sewar: the visual information fidelity (VIF) of images in [0, 1] hardly counts
# noise, ranks a noisy reconstruction above a blurred one, and can exceed 2.
#
# Versions: torchmetrics 1.9.0, torch 2.14.1, sewar 0.4.10, piq 0.8.0, torchvision 0.29.1,
# scikit-image 0.26.0, scipy 1.17.1, numpy 2.4.6.
# Expected: VIF, like PSNR and SSIM, knows or asks for the range of the values, so that images in
# [0, 1] score as the same images in 8 bits do; so it is in piq, which has a data_range.
# Behavior: VIF assumes that an eye adds noise of a variance of 2 to both images. That is meant for
# values up to 255. In [0, 1] this noise is 65,025 times too strong and drowns that of the image;
# what is left is about the share of contrast that is kept. Noise of a tenth of the range then
# scores 0.96 instead of 0.22, far above a blur of one pixel, and an image of doubled contrast 2.1.
# So the order of reconstructions turns around. Images normalized by mean and standard deviation
# fare nearly as badly. There is no warning, and neither reference mentions the range of the values;
# the argument is the "variance of the visual noise". PSNR and SSIM of torchmetrics have a
# data_range, and those of sewar go by the type of the images; VIF does neither.
# Workaround: times 255, or sigma_n_sq (sewar: sigma_nsq) = 2 / 255 ** 2.
#
# Output seen (scikit-image's photo of a cameraman):
#   VIF, 0 to 255 / 0 to 1      torchmetrics           sewar             piq    sewar's SSIM
#   itself                       1.00 / 1.00     1.00 / 1.00     1.00 / 1.00     1.00 / 1.00
#   noise of 5                   0.59 / 1.00     0.59 / 1.00     0.59 / 0.59     0.87 / 0.87
#   noise of 25                  0.22 / 0.96     0.22 / 0.96     0.22 / 0.22     0.41 / 0.41
#   blur of 1 pixel              0.38 / 0.55     0.38 / 0.55     0.38 / 0.38     0.83 / 0.83
#   blur of 3 pixels             0.16 / 0.21     0.16 / 0.21     0.16 / 0.16     0.64 / 0.64
#   half the contrast            0.70 / 0.25     0.70 / 0.25     0.70 / 0.70     0.78 / 0.78
#   twice the contrast           0.61 / 2.10     0.61 / 2.10     0.61 / 0.61     0.67 / 0.67
#   torchmetrics, noise of 25 in [0, 1] with sigma_n_sq=2 / 255 ** 2: 0.22
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 scikit-image==0.26.0 torch==2.14.1 \
    torchvision==0.29.1 torchmetrics==1.9.0 sewar==0.4.10 piq==0.8.0
"$dir/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import piq
import torch
from scipy.ndimage import gaussian_filter
from sewar import full_ref
from skimage import data
from torchmetrics.functional.image import visual_information_fidelity

random = np.random.default_rng(0)
photo = data.camera()[::2, ::2].astype(float)


def tensor(image):
    return torch.tensor(image, dtype=torch.float32)[None, None]


def torchmetrics_vif(image, reference, **options):
    return float(visual_information_fidelity(tensor(image), tensor(reference), **options))


RECONSTRUCTIONS = {
    "itself": photo,
    "noise of 5": photo + random.normal(0, 5, photo.shape),
    "noise of 25": photo + random.normal(0, 25, photo.shape),
    "blur of 1 pixel": gaussian_filter(photo, 1),
    "blur of 3 pixels": gaussian_filter(photo, 3),
    "half the contrast": 128 + (photo - 128) / 2,
    "twice the contrast": 128 + (photo - 128) * 2,
}
METHODS = {
    "torchmetrics": (torchmetrics_vif, torchmetrics_vif),
    "sewar": (lambda a, b: full_ref.vifp(b.astype(np.uint8), a.astype(np.uint8)),
              lambda a, b: full_ref.vifp(b, a)),
    "piq": (lambda a, b: float(piq.vif_p(tensor(a), tensor(b), data_range=255)),
            lambda a, b: float(piq.vif_p(tensor(a), tensor(b), data_range=1))),
    "sewar's SSIM": (lambda a, b: full_ref.ssim(b.astype(np.uint8), a.astype(np.uint8))[0],
                     lambda a, b: full_ref.ssim(b, a)[0]),
}
print("VIF, 0 to 255 / 0 to 1".ljust(24) + "".join(name.rjust(16) for name in METHODS))
scores = {}
for name, image in RECONSTRUCTIONS.items():
    image = np.round(np.clip(image, 0, 255))
    for method, (of_bytes, of_unit) in METHODS.items():
        pair = of_bytes(image, photo), of_unit(image / 255, photo / 255)
        scores[method, name] = np.array(pair)
    row = (scores[method, name] for method in METHODS)
    print(f"{name:24}" + "".join(f"{a:9.2f} / {b:4.2f}" for a, b in row))

for method in ("torchmetrics", "sewar"):
    vif = {name: scores[method, name] for name in RECONSTRUCTIONS}
    assert np.allclose(vif["itself"], 1, atol=0.01)
    assert vif["noise of 25"][0] < 0.3 and vif["noise of 25"][1] > 0.9
    # The order turns around:
    assert vif["noise of 25"][0] < vif["blur of 1 pixel"][0] < vif["half the contrast"][0]
    assert vif["noise of 25"][1] > vif["blur of 1 pixel"][1] > vif["half the contrast"][1]
    assert vif["twice the contrast"][0] < 0.7 and vif["twice the contrast"][1] > 2
for method in ("piq", "sewar's SSIM"):
    for name in RECONSTRUCTIONS:
        assert np.isclose(*scores[method, name], atol=0.01), (method, name)

noisy = np.round(np.clip(RECONSTRUCTIONS["noise of 25"], 0, 255))
scaled = torchmetrics_vif(noisy / 255, photo / 255, sigma_n_sq=2 / 255**2)
print(f"torchmetrics, noise of 25 in [0, 1] with sigma_n_sq=2 / 255 ** 2: {scaled:.2f}")
assert np.isclose(scaled, scores["torchmetrics", "noise of 25"][0], atol=0.01)
PY
