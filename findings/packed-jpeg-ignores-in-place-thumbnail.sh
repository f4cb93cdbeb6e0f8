#!/usr/bin/env bash
# litdata, mosaicml-streaming, datasets: a JPEG that was shrunk in place is packed whole.
#
# Versions: litdata 0.2.76, mosaicml-streaming 0.13.0, datasets 5.2.0, Pillow 13.0.0,
# torch 2.14.1, torchvision 0.29.1.
# Expected: the image handed to a packer is the image that comes back, whether it was made
# small by image.resize (a new image) or by image.thumbnail (in place).
# Behavior: Pillow's in-place operations keep the class JpegImageFile and its filename, and
# all three packers then store the bytes of that file instead of encoding the pixels. So a
# data set "resized to 256 px" with thumbnail() holds the full images, without a warning:
# its size on disk and decoding time are those of the originals, and crop boxes or maps
# computed for the small image no longer fit.
# Workaround: image.copy() after in-place operations, or resize(), which return a plain Image.
#
# Output seen:
#   litdata resize: given (256, 192), stored (256, 192)
#   litdata thumbnail: given (256, 192), stored (640, 480)
#   litdata thumbnail, copy: given (256, 192), stored (256, 192)
#   (the same three lines for datasets and for streaming)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/pack.py" <<'EOF'
import contextlib
import functools
import os
import sys
import tempfile

import numpy as np
from PIL import Image


def resize(path):
    return Image.open(path).resize((256, 192))


def thumbnail(path):
    image = Image.open(path)
    image.thumbnail((256, 256))
    return image


def thumbnail_copy(path):
    return thumbnail(path).copy()


def sample(prepare, path):
    return {"image": prepare(path)}


def litdata(prepare, path, folder):
    from litdata import StreamingDataset, optimize

    fn = functools.partial(sample, prepare)
    with contextlib.redirect_stdout(sys.stderr):
        optimize(fn, [path], folder, num_workers=1, chunk_size=1)
    image = StreamingDataset(folder)[0]["image"]  # a tensor, or PIL's
    return image.size if isinstance(image, Image.Image) else image.shape[:0:-1]


def streaming(prepare, path, folder):
    from streaming import LocalDataset, MDSWriter

    with MDSWriter(out=folder, columns={"image": "jpeg"}) as writer:
        writer.write({"image": prepare(path)})
    return LocalDataset(local=folder)[0]["image"].size


def datasets(prepare, path, folder):
    from datasets import Dataset, Features, Image, Value

    features = Features({"path": Value("string"), "image": Image()})
    rows = Dataset.from_dict({"path": [path]})
    rows = rows.map(lambda row: {"image": prepare(row["path"])}, features=features)
    rows.save_to_disk(folder)
    return Dataset.load_from_disk(folder)[0]["image"].size


if __name__ == "__main__":
    root = tempfile.mkdtemp(dir=os.environ["FOLDER"])
    path = os.path.join(root, "photo.jpg")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(path, quality=95)
    kept = {resize: True, thumbnail: False, thumbnail_copy: True}
    for name in sys.argv[1:]:
        for prepare, as_given in kept.items():
            given = prepare(path).size
            folder = os.path.join(root, f"{name}-{prepare.__name__}")
            stored = tuple(globals()[name](prepare, path, folder))
            label = prepare.__name__.replace("_copy", ", copy")
            print(f"{name} {label}: given {given}, stored {stored}")
            assert stored == (given if as_given else (640, 480))
EOF
export FOLDER=$dir
for packages in "litdata==0.2.76 datasets==5.2.0" "mosaicml-streaming==0.13.0"; do
    python3 -m venv --clear "$dir/venv"
    "$dir/venv/bin/pip" install -q $packages torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
    case $packages in mosaic*) names=streaming ;; *) names="litdata datasets" ;; esac
    "$dir/venv/bin/python" "$dir/pack.py" $names
done
