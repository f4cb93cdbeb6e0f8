#!/usr/bin/env bash
# datasets: reading tar shards keeps only what the first five samples of the last split have.
#
# Versions: datasets 5.2.0, Pillow 13.0.0, numpy 2.4.6.
# Expected: load_dataset("webdataset") keeps every file of a sample, as the webdataset package
# does, or raises. from_generator, asked for 0.5 in a column of integers, raises.
# Behavior: fields and types are those of the first five samples of the first shard, of the
# last split if there are several. All later samples are fitted to them silently:
# - masks that only some samples have, none of the first five, are lost;
# - where images change from .png to .jpg, the later ones are None, and the .jpg are lost;
# - a weight in .json that is 1 in the first five samples is an integer: 0.5 becomes 0;
# - a test split without masks takes the masks of the training split away.
# Streaming does the same. A mask in only some of the first five raises.
# Workaround: pass features=, or put a complete sample first in every split.
#
# Output seen (of 8 or 10 samples, counted from 0):
#   masks from sample 6 on       stored 4 masks,   read 0
#   .jpg from sample 6 on        stored 10 images, read 6 and 4 None
#   weights 1, 0.5 from 6 on     stored sum 8.0,   read sum 6.0
#   masks in train, not in test  stored 8 masks,   read 0
#   the same with features=      stored 8 masks,   read 8
#   from_generator, 1 then 0.5   DatasetGenerationError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 datasets==5.2.0 pillow==13.0.0
cd "$dir"
HF_HOME="$dir/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 \
    "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
import io
import json
import tarfile

from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as Pillow


def image(gray, kind="PNG"):
    buffer = io.BytesIO()
    Pillow.new("L", (8, 8), gray).save(buffer, kind)
    return buffer.getvalue()


def pack(name, samples):
    with tarfile.open(f"{name}.tar", "w") as tar:
        for i, files in enumerate(samples):
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f"{name}.tar"


def read(streaming, features=None, **files):
    return list(
        load_dataset(
            "webdataset", data_files=files, split="train", streaming=streaming, features=features
        )
    )


def count(rows, field):
    return sum(row.get(field) is not None for row in rows)


def weigh(weight):
    return json.dumps({"weight": weight}).encode()


def masks_from_sample_6():
    for i in range(10):
        yield {"png": image(i), "seg.png": image(1)} if i >= 6 else {"png": image(i)}


late = pack("late", masks_from_sample_6())
mixed = pack(
    "mixed",
    [{"png": image(i)} if i < 6 else {"jpg": image(i, "JPEG")} for i in range(10)],
)
weights = [1 if i < 6 else 0.5 for i in range(10)]
weighted = pack("weighted", [{"png": image(0), "json": weigh(w)} for w in weights])
labeled = pack("labeled", [{"png": image(i), "seg.png": image(1)} for i in range(8)])
plain = pack("plain", [{"png": image(i)} for i in range(8)])

features = Features(
    {"png": Image(), "seg.png": Image(), "__key__": Value("string"), "__url__": Value("string")}
)

for streaming in (False, True):
    rows = read(streaming, train=late)
    found = [count(rows, "seg.png")]
    rows = read(streaming, train=mixed)
    found += [count(rows, "png"), count(rows, "jpg"), len(rows)]
    found.append(sum(row["json"]["weight"] for row in read(streaming, train=weighted)))
    found.append(count(read(streaming, train=labeled, test=plain), "seg.png"))
    assert found == [0, 6, 0, 10, 6, 0], found
    assert count(read(streaming, train=labeled), "seg.png") == 8
    kept = read(streaming, features, train=labeled, test=plain)
    assert count(kept, "seg.png") == 8
    assert count(read(streaming, features, train=late), "seg.png") == 4
masks, images, _, samples, total, train = found
print(f"masks from sample 6 on       stored 4 masks,   read {masks}")
print(f".jpg from sample 6 on        stored 10 images, read {images} and {samples - images} None")
print(f"weights 1, 0.5 from 6 on     stored sum {sum(weights)},   read sum {total:.1f}")
print(f"masks in train, not in test  stored 8 masks,   read {train}")
print(f"the same with features=      stored 8 masks,   read {count(kept, 'seg.png')}")


def rows():
    for i in range(1500):
        yield {"weight": 1 if i < 1200 else 0.5}


try:
    Dataset.from_generator(rows)
except Exception as error:
    print("from_generator, 1 then 0.5  ", type(error).__name__)
    assert "truncated" in str(error.__cause__)
else:
    raise AssertionError("from_generator took 0.5 for an integer")
EOF
