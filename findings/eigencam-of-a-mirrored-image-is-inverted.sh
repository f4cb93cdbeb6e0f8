#!/usr/bin/env bash
# grad-cam: EigenCAM of a mirrored image is the inverted map in half of the cases.
#
# Versions: grad-cam 1.5.7, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6,
# opencv-python-headless 5.0.0.93.
# Expected: EigenCAM lights what stands out, whatever its place; for a network without
# padding the map of the mirrored image is the mirrored map. SegEigenCAM, which corrects
# the sign, is right where EigenCAM is not.
# Behavior: the map is the first principal component of the activations, with the sign
# that the SVD happens to return. Mirroring an image reorders the rows of the matrix, and
# with them the sign: object and background change places, without a warning. SegEigenCAM
# takes the side of the largest magnitude as the object. The activations are centered, so
# that is the smaller region: of objects that fill more than half of the image it always
# lights the background. Cure for maps of a data set: decide the sign by something that
# knows the object, such as the border of the image or the gradient of a class.
#
# Output seen (50 images of one textured square each, 14 x 14 patches):
#   EigenCAM, object of 16 patches: lit in 20, inverted by mirroring in 25
#   EigenCAM, object of 64 patches: lit in 21, inverted by mirroring in 26
#   EigenCAM, object of 121 patches: lit in 21, inverted by mirroring in 30
#   SegEigenCAM, object of 16 patches: lit in 50, inverted by mirroring in 0
#   SegEigenCAM, object of 64 patches: lit in 50, inverted by mirroring in 0
#   SegEigenCAM, object of 121 patches: lit in 0, inverted by mirroring in 0
# EigenCAM's numbers depend on the LAPACK build and are only checked to be far from 0
# and from 50.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 \
    opencv-python-headless==5.0.0.93 grad-cam==1.5.7
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, SegEigenCAM
from torch import nn

torch.manual_seed(0)
# Patches do not overlap and nothing is padded: patch features move with the patches.
layers = [nn.Conv2d(3, 64, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
model = nn.Sequential(*layers, nn.Linear(64, 10))


def scene(seed, side):
    """An image of dim noise with one textured square, and the patches of the square."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.rand(1, 3, 224, 224, generator=generator)
    texture = torch.rand(3, 16, 16, generator=generator).repeat(1, 14, 14)
    y, x = torch.randint(0, 15 - side, (2,), generator=generator).tolist()
    inside = torch.zeros(14, 14, dtype=torch.bool)
    inside[y : y + side, x : x + side] = True
    pixels = inside.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return torch.where(pixels, texture, noise), inside.numpy()


for method in (EigenCAM, SegEigenCAM):
    with method(model=model, target_layers=[model[1]]) as cam:
        for side in (4, 8, 11):
            lit = inverted = 0
            for seed in range(50):
                image, inside = scene(seed, side)
                batch = torch.cat([image, image.flip(-1)])
                # One value a patch.
                plain, mirrored = cam(batch, targets=None)[:, 8::16, 8::16]
                lit += plain[inside].mean() > plain[~inside].mean()
                pair = plain.ravel(), mirrored[:, ::-1].ravel()
                inverted += np.corrcoef(*pair)[0, 1] < 0
            name = f"{method.__name__}, object of {side * side} patches"
            print(f"{name}: lit in {lit}, inverted by mirroring in {inverted}")
            if method is EigenCAM:
                assert 5 <= lit <= 45 and 10 <= inverted <= 40
            else:
                assert inverted == 0 and lit == (0 if side == 11 else 50)
EOF
