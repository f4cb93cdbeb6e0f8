"""
Generators of damaged, odd and hostile input for property tests.

    @given(rng=RANDOM)
    def test_...(tmp_path, rng):
        content = damage(content, rng)      # of any file
        damaged_checkpoint(content, rng)    # of a checkpoint of a run
        damaged_parts(parts, rng)           # of any file of torch.save

hypothesis controls rng: it tries the same examples every time, or with `pytest --fuzz N`
N random ones, and reduces an example that fails to a simple one.
"""

import contextlib
import io
import math
import os
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

# random.Random, drawn by hypothesis.
RANDOM = st.randoms(use_true_random=False)
# What a number in a header, or a value in a text, may be replaced with.
NUMBERS = (0, 1, -1, 2**31 - 1, 2**32 - 1, 2**63, 10**30)
VALUES = (None, True, -1, 1.5, 10**4000, "", "a\x00b", "\ud800", [], [[0]], {}, ["a"])
VALUES += (float("inf"), [-1], [2**70], [True])


@contextlib.contextmanager
def within(seconds):
    """TimeoutError if the block takes longer, even if it waits for a pipe."""

    def end(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def largest_memory(reset=False):
    """Bytes of memory in use at the most, since the start or the last call with anew.

    0 where the system does not tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])


# -- Bytes -----------------------------------------------------------------------------


def damage(content, rng):
    """Bytes of a file, with a fault as disks, transfers and editors make them."""
    b = bytearray(content)
    at = rng.randrange(max(1, len(b)))
    length = rng.choice((1, 4, 64, 512))
    kind = rng.choice(("bit", "byte", "cut", "drop", "zeros", "repeat", "noise", "add"))
    if kind == "bit" and b:
        b[at] ^= 1 << rng.randrange(8)
    elif kind == "byte" and b:
        b[at] = rng.randrange(256)
    elif kind == "cut":
        del b[at:]
    elif kind == "drop":
        del b[at : at + length]
    elif kind == "zeros":
        b[at : at + length] = bytes(len(b[at : at + length]))
    elif kind == "repeat":
        b[at:at] = b[at : at + length]
    elif kind == "noise":
        b[at : at + length] = rng.randbytes(length)
    else:
        b += rng.randbytes(length)
    return bytes(b)


# -- Pictures --------------------------------------------------------------------------

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F")
SUFFIXES = (".png", ".jpg", ".tif", ".bmp", ".webp", ".ppm")
SIDES = (1, 2, 31, 33, 70, 300)


def png(width, height, depth=8, colour=2, row=None, rows=None):
    """A PNG with right checksums, whatever its header says: row repeated rows times."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + crc(checked)

    def crc(checked):
        return struct.pack(">I", zlib.crc32(checked))

    pack = zlib.compressobj(1)
    line = b"\0" + (bytes(3 * width) if row is None else row)
    body = [pack.compress(line) for _ in range(height if rows is None else rows)]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", b"".join(body) + pack.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def odd_image(folder, rng):
    """Writes a picture. Returns its path, (w, h), and whether it is sound."""
    if rng.random() < 0.15:
        # A header that promises more, or less, than there is.
        width, height = rng.choice(SIDES), rng.choice((*SIDES, 10**6, 2**31 - 1))
        content = png(width, height, row=bytes(30), rows=3)
        (folder / "0.png").write_bytes(content)
        return folder / "0.png", (width, height), False
    size = rng.choice(SIDES), rng.choice(SIDES)
    shade = np.random.default_rng(rng.randrange(2**32)).random(size[::-1])
    mode = rng.choice(MODES)
    if mode == "I;16":
        picture = Image.fromarray(np.uint16(65535 * shade))
    elif mode in ("I", "F"):
        picture = Image.fromarray(np.float32(255 * shade)).convert(mode)
    else:
        picture = Image.fromarray(np.uint8(255 * shade)).convert(mode)
    file, suffix = io.BytesIO(), rng.choice(SUFFIXES)
    kind = Image.registered_extensions()[suffix]
    try:
        picture.save(file, kind)
    # This format has no such mode.
    except (OSError, KeyError):
        picture.convert("RGB").save(file, kind)
    sound = rng.random() < 0.3
    content = file.getvalue() if sound else damage(file.getvalue(), rng)
    path = folder / f"0{suffix}"
    path.write_bytes(content)
    return path, size, sound


# -- Folders ---------------------------------------------------------------------------

NAMES = (
    "a",
    "b.jpg",
    "-x",
    "[1]",
    "a b",
    "\udcff",
    "new\nline",
    "ä",
    "x.png",
    ".hidden",
)


def odd_tree(folder, rng, links):
    """Class folders "a", "b" and "c" with pictures, and what does not belong there."""
    folders = [folder]
    for name in "abc":
        folders.append(folder / name)
        folders[-1].mkdir(parents=True)
        if rng.random() < 0.97:
            (folders[-1] / "0.png").write_bytes(PICTURE)
    for number in range(rng.randrange(12)):
        # Pictures beside the class folders are another matter.
        place = rng.choice(folders[1:])
        path = place / (rng.choice(NAMES) + rng.choice(("", str(number))))
        if os.path.lexists(path) or os.path.lexists(f"{path}.png"):
            continue
        kind = rng.choice(("folder", "picture", "text", "pipe", *links))
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "picture":
            Path(f"{path}.png").write_bytes(PICTURE)
        elif kind == "text":
            path.write_text("text")
        elif kind == "pipe":
            os.mkfifo(f"{path}.png")
        elif kind == "device":
            Path(f"{path}.png").symlink_to("/dev/zero")
        elif kind == "up":
            path.symlink_to(rng.choice(("..", ".", "../..", "../../..", str(path))))
        elif kind == "across":
            path.symlink_to(rng.choice(folders))
        elif kind == "file":
            Path(f"{path}.png").symlink_to(folder / "a" / "0.png")


PICTURE = png(1, 1)

# -- Checkpoints -----------------------------------------------------------------------


def damaged_checkpoint(content, rng):
    """(kind, bytes) of a damaged last.pt; content: of a sound one, which has checksums."""
    kind = rng.choice(("bytes", "bytes", "foreign", "swap", "moment", "config", "old"))
    if kind == "bytes":
        return kind, damage(content, rng)
    if kind == "swap":
        return kind, swapped(content, rng)
    parts = torch.load(io.BytesIO(content), weights_only=True)
    # As other people's files, and those of older versions.
    del parts["checksums"]
    if kind == "moment":
        change_moment(parts["optimizer"], rng)
    elif kind == "config":
        key = rng.choice(list(parts["config"]))
        parts["config"][key] = rng.choice((*VALUES, *NUMBERS, torch.zeros(2)))
    file = io.BytesIO()
    torch.save(parts, file, _use_new_zipfile_serialization=kind != "old")
    if kind in ("foreign", "old"):
        return kind, damage(file.getvalue(), rng)
    return kind, file.getvalue()


def damaged_parts(parts, rng):
    """Another value somewhere in a dict of dicts, as torch.load gives it; or one less."""
    place = parts
    key = rng.choice(list(place))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place))
    x = place[key]
    if not isinstance(x, torch.Tensor) or rng.random() < 0.3:
        odd = torch.zeros(2), torch.zeros(()), {1: {}}, {"class_token": torch.ones(3)}
        place[key] = rng.choice((*VALUES, *NUMBERS, *odd))
    else:
        rows = torch.atleast_1d(x)
        changes = (rows[:0], rows[:-1], x[None], x.double(), x.int(), x.bool())
        changes += (0 * x - 2, x * 10**9, x.to(torch.complex64), x.to_sparse())
        place[key] = rng.choice(changes)
    if rng.random() < 0.2:
        del place[key]
    return parts


def swapped(content, rng):
    """An archive in which two tensors of one size have changed places."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    while True:
        a, b = rng.sample([name for name in files if "/data/" in name], 2)
        if len(files[a]) == len(files[b]) and files[a] != files[b]:
            break
    files[a], files[b] = files[b], files[a]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, record in files.items():
            archive.writestr(name, record)
    return file.getvalue()


def change_moment(optimizer, rng):
    """Gives a moment of an optimiser's state dict another size, type or number."""
    states = optimizer["state"]
    number = rng.choice(list(states))
    key = rng.choice(list(states[number]))
    x = states[number][key]
    kinds = ("short", "long", "type", "number", "hollow", "nan", "none", "more")
    kind = rng.choice(kinds)
    if kind == "short":
        states[number][key] = x.flatten()[:1].clone()[:0]
    elif kind == "long":
        states[number][key] = torch.zeros(3, *x.shape)
    elif kind == "type":
        states[number][key] = x.to(rng.choice((torch.float64, torch.int32)))[..., None]
    elif kind == "number":
        states[number][key] = rng.choice(VALUES[:8])
    elif kind == "hollow":
        states[number][key] = torch.zeros(()).expand(2, *x.shape)
    elif kind == "nan":
        x.view(-1)[-1] = math.nan
    elif kind == "none":
        del states[number][key]
    else:
        del states[number]
