#!/usr/bin/env bash
# torchcodec's image decoders, the successors of torchvision.io's: other pixels by default.
#
# Versions: torchcodec 0.17.0, torchvision 0.29.1 (whose decoders warn that they are
# superseded), torch 2.14.1, Pillow 13.0.0, numpy 2.4.6.
# Expected: the same function of the same name gives the same tensor.
# Behavior: (1) torchcodec applies the EXIF orientation of JPEG, PNG and WebP, always:
# there is no argument for it, where torchvision's and Pillow's readers leave the image as
# it is stored. Photographs turn by 90 degrees, and boxes, masks and attention maps made
# of the stored pixels no longer fit; with square crops nothing fails. (2) mode="UNCHANGED"
# of a palette PNG gives the colors in torchcodec and the indices in torchvision: the ids
# of a label mask in VOC's format cannot be read. Workaround: Pillow for masks; for photographs
# remove the orientation tag, or make maps with the reader that training uses.
#
# Output seen:
#   JPEG of 30 x 20 with orientation 6: torchvision (20, 30), Pillow (20, 30), torchcodec (30, 20)
#   PNG of 30 x 20 with orientation 6: torchvision (20, 30), Pillow (20, 30), torchcodec (30, 20)
#   WEBP of 30 x 20 with orientation 6: torchvision (20, 30), Pillow (20, 30), torchcodec (30, 20)
#   palette mask, 21 ids: torchvision (1, 60, 80), the ids; torchcodec (3, 60, 80), the colors
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 \
    pillow==13.0.0 torchcodec==0.17.0
"$dir/venv/bin/python" -W ignore - <<'EOF'
import io

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torchcodec.decoders import decode_image


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


random = np.random.default_rng(0)
image = Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8))
exif = Image.Exif()
exif[0x112] = 6
for kind in ("JPEG", "PNG", "WEBP"):
    file = encode(image, kind, exif=exif)
    stored = np.array(Image.open(io.BytesIO(file.numpy().tobytes()))).shape[:2]
    old, new = torchvision.io.decode_image(file), decode_image(file)
    assert torch.equal(new, old.rot90(-1, (1, 2)))
    shapes = [tuple(x.shape[1:]) for x in (old, new)]
    assert shapes == [stored, stored[::-1]]
    print(
        f"{kind} of 30 x 20 with orientation 6: torchvision {shapes[0]}, Pillow {stored}, "
        f"torchcodec {shapes[1]}"
    )

ids = random.integers(0, 21, (60, 80), dtype=np.uint8)
mask = Image.new("P", (80, 60))
mask.putdata(ids.ravel().tolist())
mask.putpalette(random.integers(0, 255, 3 * 21).tolist())
file = encode(mask, "PNG")
old = torchvision.io.decode_image(file, torchvision.io.ImageReadMode.UNCHANGED)
new = decode_image(file, mode="UNCHANGED")
assert torch.equal(old, torch.from_numpy(ids)[None])
colors = torch.from_numpy(np.array(mask.convert("RGB"))).permute(2, 0, 1)
assert torch.equal(new, colors)
print(
    f"palette mask, 21 ids: torchvision {tuple(old.shape)}, the ids; torchcodec "
    f"{tuple(new.shape)}, the colors"
)
EOF
