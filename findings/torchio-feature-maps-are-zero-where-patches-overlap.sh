#!/usr/bin/env bash
# torchio: feature maps put together from overlapping patches are zero along the seams, or
# everywhere; 8-bit maps averaged over the overlap wrap around.
#
# Versions: torchio 1.2.1, torch 2.14.1, numpy 2.4.6.
# Expected: GridAggregator(sampler, downsampling_factor=16) is made for models whose output is
# coarser than their input, as a ViT's patch features are. With any overlap of the sampler it
# returns what the model returns for the whole volume, if the model is local.
# Behavior: in the default mode "crop" half of the overlap is cut off each patch in voxels of
# the input, not in cells of the output. Too much goes, and nobody else fills the gap, which
# stays 0 without an error. With patches of 64, overlap 32 and cells of 16 voxels (4 cells a
# side, 2 of them overlap) nothing is left: the whole map is 0. The modes "average" and "hann"
# raise an error with a factor. Without a factor "average" adds in the type of the patches: a
# saliency map in 8 bits exceeds 255 where patches overlap and starts again at 0.
# Workaround: aggregator.patch_overlap = sampler.patch_overlap // factor; float maps.
#
# Output seen (a volume of 128 x 128 x 128, model: means of cells):
#   patch 64, overlap  0, factor 16: zero   0.0 %, right 100.0 %; cured: right 100.0 %
#   patch 64, overlap 16, factor  2: zero  33.0 %, right  67.0 %; cured: right 100.0 %
#   patch 64, overlap 16, factor  4: zero  87.5 %, right  12.5 %; cured: right 100.0 %
#   patch 64, overlap 32, factor 16: zero 100.0 %, right   0.0 %; cured: right 100.0 %
#   maps of 200 everywhere, average: float 200 to 200, 8 bits 8 to 200
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchio==1.2.1
"$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchio as tio
from torch.nn.functional import avg_pool3d

generator = torch.Generator().manual_seed(0)
volume = 0.1 + torch.rand(1, 128, 128, 128, generator=generator)
subject = tio.Subject(image=tio.ScalarImage(tensor=volume))


def aggregate(model, patch, overlap, factor=1, mode="crop", cured=False):
    """What the model gives for all patches, put together by torchio."""
    sampler = tio.GridSampler(subject, patch, overlap)
    aggregator = tio.GridAggregator(sampler, mode, downsampling_factor=factor)
    if cured:
        aggregator.patch_overlap = sampler.patch_overlap // factor
    for batch in tio.SubjectsLoader(sampler, batch_size=4):
        aggregator.add_batch(model(batch["image"][tio.DATA]), batch[tio.LOCATION])
    return aggregator.get_output_tensor()


for patch, overlap, factor in ((64, 0, 16), (64, 16, 2), (64, 16, 4), (64, 32, 16)):

    def features(image):
        return avg_pool3d(image, factor)

    whole = features(volume)
    plain, cured = (aggregate(features, patch, overlap, factor, cured=c) for c in (False, True))
    assert plain.shape == cured.shape == whole.shape
    zero = (plain == 0).float().mean().item()
    right, cured_right = (m.isclose(whole).float().mean().item() for m in (plain, cured))
    print(f"patch {patch}, overlap {overlap:2}, factor {factor:2}: zero {zero:6.1%}, right"
          f" {right:6.1%}; cured: right {cured_right:.1%}".replace("%", " %"))
    assert cured_right == 1 and abs(zero + right - 1) < 1e-6
    assert zero > 0.3 if overlap else zero == 0
    assert zero == 1 or overlap < 32

ranges = []
for dtype in (torch.float32, torch.uint8):
    saliency = aggregate(lambda image: torch.full_like(image, 200, dtype=dtype), 64, 32,
                         mode="average")
    ranges.append((int(saliency.min()), int(saliency.max())))
print("maps of 200 everywhere, average: float {} to {}, 8 bits {} to {}".format(*sum(ranges, ())))
assert ranges == [(200, 200), (8, 200)], ranges
EOF
