#!/usr/bin/env bash
# pyvips: new_from_file gives the pixels that a file had when it was first opened, whatever was
# written to it since.
#
# Versions: pyvips 3.2.0 (with libvips 8.18.7), Pillow 13.0.0, numpy 2.4.6.
# Expected: a file is read anew by each new_from_file. If something is cached, its key has the time
# or the size of the file, and what pyvips itself writes there makes it void.
# Behavior: libvips remembers its last 100 operations by their arguments, and a load is an
# operation whose argument is a name. Maps that are computed again under their old names, or a
# loop that hands over each image in the same temporary file, give the first pixels again, also
# if the file was replaced, has another time or was written by pyvips. They do so until enough
# other operations came between: a notebook or a test gets the old map, a pass over a large data
# set the new one. Loads in sequential mode, thumbnail and new_from_buffer are not remembered.
# The other way round, an image that is opened and not yet used has the pixels of the file that
# is there when it is used. No warning. Known (pyvips issue 54, 2018).
# Workaround: revalidate=True in each new_from_file, or pyvips.cache_set_max(0).
#
# Output seen (a gray image is written with 10, read, written again with 100, read; the mean):
#   new_from_file             10  10
#   replaced by another file  10  10
#   written by pyvips         10  10
#   after 20 other files      10  10
#   after 200 other files     10 100
#   new_from_buffer           10 100
#   revalidate=True           10 100
#   opened with 10, used with 100: 100
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 pyvips==3.2.0 pyvips-binary==8.18.7
"$dir/venv/bin/python" - "$dir" <<'EOF'
import os
import sys
from pathlib import Path

import pyvips
from PIL import Image

os.chdir(sys.argv[1])


def write(path, gray):
    Image.new("L", (64, 64), gray).save(path)


def replace(path, gray):
    write("new.png", gray)
    os.utime("new.png", (gray, gray))
    os.replace("new.png", path)


def write_by_pyvips(path, gray):
    (pyvips.Image.black(64, 64) + gray).cast("uchar").write_to_file(path)


def read(path, **options):
    return pyvips.Image.new_from_file(path, **options).numpy().mean()


def read_buffer(path):
    return pyvips.Image.new_from_buffer(Path(path).read_bytes(), "").numpy().mean()


def compare(name, second, write=write, read=read, others=0):
    path = f"{name}.png"
    write(path, 10)
    seen = [read(path)]
    for i in range(others):
        write(f"{name} {i}.png", 0)
        read(f"{name} {i}.png")
    write(path, 100)
    seen.append(read(path))
    print(f"{name:24}", *(f"{value:3.0f}" for value in seen))
    assert seen == [10, second], name


compare("new_from_file", 10)
compare("replaced by another file", 10, replace)
compare("written by pyvips", 10, write_by_pyvips)
compare("after 20 other files", 10, others=20)
compare("after 200 other files", 100, others=200)
compare("new_from_buffer", 100, read=read_buffer)
compare("revalidate=True", 100, read=lambda path: read(path, revalidate=True))

write("late.png", 10)
image = pyvips.Image.new_from_file("late.png")
write("late.png", 100)
late = image.numpy().mean()
print(f"opened with 10, used with 100: {late:.0f}")
assert late == 100
EOF
