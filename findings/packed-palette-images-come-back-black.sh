#!/usr/bin/env bash
# litdata, mosaicml-streaming: a palette PNG or a GIF comes back without its palette, black.
#
# Versions: litdata 0.2.76, mosaicml-streaming 0.13.0 (column type "pil"), datasets 5.2.0,
# Pillow 13.0.0, torch 2.14.1, torchvision 0.29.1.
# Expected: the Pillow image handed to a packer comes back with its colors; all three keep
# images of mode RGB exactly.
# Behavior: litdata, and streaming's "pil", store mode, size and the raw bytes of an image. In
# mode P those are indices, and the palette is not stored. What comes back is again of mode P,
# with an empty palette, and convert("RGB"), as in every loader, makes all of it black
# without an error. Collections from the web hold such files among the JPEG; a masked
# autoencoder then learns from black squares. datasets and streaming's "png" keep colors.
# The indices are kept by all, so label masks in mode P still have their ids.
# Workaround: convert("RGB") before packing.
#
# Output seen (mean of the pixels after convert("RGB"); mean difference of the raw values):
#   litdata rgb.png:             mean 130.0, packed 130.0; raw 0
#   litdata palette.png:         mean 130.0, packed 0.0; raw 0
#   litdata photo.gif:           mean 130.1, packed 0.0; raw 0
#   (the same three lines for streaming, type "pil")
#   streaming png palette.png:   mean 130.0, packed 130.0; raw 0
#   datasets palette.png:        mean 130.0, packed 130.0; raw 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/pack.py" <<'EOF'
import contextlib
import os
import sys

import numpy as np
from PIL import Image

FOLDER = os.environ["FOLDER"]
FILES = ["rgb.png", "palette.png", "photo.gif"]


def sample(name):
    return {"image": Image.open(os.path.join(FOLDER, name))}


def litdata(folder):
    from litdata import StreamingDataset, optimize

    with contextlib.redirect_stdout(sys.stderr):
        optimize(sample, FILES, folder, num_workers=1, chunk_size=len(FILES))
    return [row["image"] for row in StreamingDataset(folder)]


def streaming(folder, kind="pil"):
    from streaming import LocalDataset, MDSWriter

    with MDSWriter(out=folder, columns={"image": kind}) as writer:
        for name in FILES:
            writer.write(sample(name))
    return [row["image"] for row in LocalDataset(local=folder)]


def streaming_png(folder):
    return streaming(folder, "png")


def datasets(folder):
    from datasets import Dataset, Features, Image

    images = [sample(name)["image"] for name in FILES]
    Dataset.from_dict({"image": images}, Features({"image": Image()})).save_to_disk(folder)
    return [row["image"] for row in Dataset.load_from_disk(folder)]


def mean(image):
    return np.asarray(image.convert("RGB")).mean()


if __name__ == "__main__":
    y, x = np.mgrid[:96, :128]
    photo = Image.fromarray(np.dstack([2 * x, 2 * y, 255 - x - y // 2]).astype(np.uint8))
    photo.save(f"{FOLDER}/rgb.png")
    photo.quantize(64).save(f"{FOLDER}/palette.png")
    photo.quantize(200).save(f"{FOLDER}/photo.gif")
    for packer in sys.argv[1:]:
        for name, packed in zip(FILES, globals()[packer](f"{FOLDER}/{packer}")):
            given = sample(name)["image"]
            label = f"{packer.replace('_', ' ')} {name}:"
            raw = np.abs(np.asarray(given, float) - np.asarray(packed)).mean()
            print(f"{label:28} mean {mean(given):.1f}, packed {mean(packed):.1f}; raw {raw:.0f}")
            lost = packer in ("litdata", "streaming") and name != "rgb.png"
            assert raw == 0 and packed.mode == given.mode
            assert mean(given) > 100
            assert mean(packed) == (0 if lost else mean(given))
EOF
for packages in "litdata==0.2.76 datasets==5.2.0" "mosaicml-streaming==0.13.0"; do
    python3 -m venv --clear "$dir/venv"
    "$dir/venv/bin/pip" install -q $packages torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
    case $packages in
    mosaic*) packers="streaming streaming_png" ;;
    *) packers="litdata datasets" ;;
    esac
    FOLDER=$(mktemp -d -p "$dir") "$dir/venv/bin/python" -W ignore "$dir/pack.py" $packers
done
