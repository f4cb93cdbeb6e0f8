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

import torch
from hypothesis import strategies as st

# random.Random, drawn by hypothesis.
RANDOM = st.randoms(use_true_random=False)
# Odd values for a setting or an item of a file.
NUMBERS = (0, 1, -1, 2**31 - 1, 2**32 - 1, 2**63, 10**30)
VALUES = (None, True, -1, 1.5, 10**4000, "", "a\x00b", "\ud800", [], [[0]], {}, ["a"])
VALUES += (math.inf, [-1], [2**70], [True])


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
    """Peak memory in bytes, since the start or the last reset; 0 if unknown."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])


# -- Bytes -----------------------------------------------------------------------------


def damage(content, rng):
    """Bytes of a file with a fault that disks, transfers or editors could make."""
    at, length = rng.randrange(max(1, len(content))), rng.choice((1, 4, 64, 512))
    head, part, tail = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes(x ^ 1 << rng.randrange(8) for x in part[:1]) + part[1:]
    middles = flipped, b"", bytes(len(part)), part + part, rng.randbytes(len(part))
    added = content + rng.randbytes(length)
    return bytes(rng.choice((head, added, *[head + x + tail for x in middles])))


def png(width, height, depth=8, color=2, row=None, rows=None):
    """A PNG with valid checksums, whatever its header says: row repeated rows times."""

    def chunk(name, content):
        size, checksum = len(content), zlib.crc32(name + content)
        return struct.pack(">I", size) + name + content + struct.pack(">I", checksum)

    pack = zlib.compressobj(1)
    line = b"\0" + (bytes(3 * width) if row is None else row)
    body = [pack.compress(line) for _ in range(height if rows is None else rows)]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = chunk(b"IDAT", b"".join(body) + pack.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


# -- Folders ---------------------------------------------------------------------------

NAMES = "a", "b.jpg", "-x", "[1]", "a b", "\udcff", "new\nline", "ä", "x.png", ".hidden"


def odd_tree(folder, rng, links):
    """Class folders "a", "b" and "c" with images, and what does not belong there.

    links: kinds of links: "up", "across", "device", "file".
    """
    image = png(1, 1)
    folders = [folder / name for name in "abc"]
    for path in folders:
        path.mkdir(parents=True)
        if rng.random() < 0.97:
            (path / "0.png").write_bytes(image)
    for number in range(rng.randrange(12)):
        path = rng.choice(folders) / (rng.choice(NAMES) + rng.choice(("", str(number))))
        file = Path(f"{path}.png")
        if os.path.lexists(path) or os.path.lexists(file):
            continue
        kind = rng.choice(("folder", "image", "text", "pipe", *links))
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "image":
            file.write_bytes(image)
        elif kind == "text":
            path.write_text("text")
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        elif kind == "up":
            path.symlink_to(rng.choice(("..", ".", "../..", "../../..", str(path))))
        elif kind == "across":
            path.symlink_to(rng.choice(folders))
        else:
            file.symlink_to(folder / "a" / "0.png")


# -- Checkpoints -----------------------------------------------------------------------


def damaged_checkpoint(content, rng):
    """(kind, bytes) of a damaged last.pt; content: of a sound one, which has checksums."""
    kind = rng.choice(("bytes", "bytes", "foreign", "swap", "moment", "config", "old"))
    if kind == "bytes":
        return kind, damage(content, rng)
    if kind == "swap":
        return kind, swapped(content, rng)
    parts = torch.load(io.BytesIO(content), weights_only=True)
    # As in files of other programs and of earlier versions.
    del parts["checksums"]
    if kind == "moment":
        state = parts["optimizer"]["state"]
        damaged_parts(state[rng.choice(list(state))], rng, values=False)
    elif kind == "config":
        key = rng.choice(list(parts["config"]))
        parts["config"][key] = rng.choice((*VALUES, *NUMBERS, torch.zeros(2)))
    file = io.BytesIO()
    torch.save(parts, file, _use_new_zipfile_serialization=kind != "old")
    if kind in ("foreign", "old"):
        return kind, damage(file.getvalue(), rng)
    return kind, file.getvalue()


def damaged_parts(parts, rng, values=True):
    """Change or delete an item of a dict of dicts, as torch.load returns it.

    values: tensors may also keep their type and shape, with other values.
    """
    place, key = parts, rng.choice(list(parts))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place))
    x = place[key]
    changes = torch.zeros(2), torch.zeros(3, 1), {1: {}}, {"class_token": torch.ones(3)}
    changes += (*VALUES, *NUMBERS)
    if isinstance(x, torch.Tensor) and rng.random() < 0.7:
        rows = torch.atleast_1d(x)
        changes = (rows[:0], rows[:-1], rows[:1].expand(2, *rows.shape), x[None])
        changes += (x.double(), x.int(), x.bool(), x.to(torch.complex64), x.to_sparse())
        changes += (0 * x - 2, x * 10**9) if values else (x * math.nan,)
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
