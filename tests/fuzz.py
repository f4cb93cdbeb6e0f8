"""
Damaged, odd and hostile input for property tests, made with a random.Random.

hypothesis draws it (RANDOM): it tries the same examples every time, or with
`pytest --fuzz N` N random ones, and reduces an example that fails to a simple one.
"""

import contextlib
import io
import math
import re
import signal
import struct
import zlib
from pathlib import Path

import torch
from hypothesis import strategies as st

RANDOM = st.randoms(use_true_random=False)
# Odd values for a setting or an item of a file.
VALUES = (None, True, 0, -1, 1.5, math.inf, 2**31, 2**63, 10**4000, "", "a\x00b")
VALUES += ("\ud800", [], [[0]], {}, ["a"], [-1], [2**70], [True], {1: {}})


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
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def damage(content, rng):
    """Bytes of a file with a fault that disks, transfers or editors could make."""
    at, length = rng.randrange(max(1, len(content))), rng.choice((1, 4, 64, 512))
    head, part, tail = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes(x ^ 1 << rng.randrange(8) for x in part[:1]) + part[1:]
    middle = rng.choice((flipped, b"", bytes(len(part)), rng.randbytes(len(part))))
    return rng.choice((head, head + middle + tail, content + rng.randbytes(length)))


def png(width, height, depth=8, color=2, row=None, rows=None):
    """A PNG with valid checksums, whatever its header says: row repeated rows times."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    pack = zlib.compressobj(1)
    line = b"\0" + (bytes(3 * width) if row is None else row)
    body = [pack.compress(line) for _ in range(height if rows is None else rows)]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = chunk(b"IDAT", b"".join(body) + pack.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def damaged_checkpoint(content, rng):
    """(kind, bytes) of a damaged last.pt; content: of a sound one, which has checksums."""
    kind = rng.choice(("bytes", "bytes", "foreign", "swap", "moment", "config", "old"))
    if kind == "bytes":
        return kind, damage(content, rng)
    parts = torch.load(io.BytesIO(content), weights_only=True)
    moments = rng.choice(list(parts["optimizer"]["state"].values()))
    if kind == "swap":
        first, second = moments["exp_avg"], moments["exp_avg_sq"]
        moments |= {"exp_avg": second, "exp_avg_sq": first}
    else:
        del parts["checksums"]  # as in files of other programs
    if kind == "moment":
        damage_moments(moments, rng)
    if kind == "config":
        key = rng.choice(list(parts["config"]))
        parts["config"][key] = rng.choice((*VALUES, torch.zeros(2)))
    file = io.BytesIO()
    torch.save(parts, file, _use_new_zipfile_serialization=kind != "old")
    content = file.getvalue()
    return kind, damage(content, rng) if kind in ("foreign", "old") else content


def damage_moments(moments, rng):
    """Change or delete one of the tensors in a dict."""
    key = rng.choice(list(moments))
    x, rows = moments[key], torch.atleast_1d(moments[key])
    changes = torch.zeros(2), torch.zeros(3, 1), {"step": torch.ones(3)}, *VALUES
    if rng.random() < 0.7:
        changes = (rows[:0], rows[:-1], rows[:1].expand(2, *rows.shape), x[None])
        changes += (x.double(), x.int(), x.bool(), x.to(torch.complex64), x.to_sparse())
        changes += (x * math.nan,)
    moments[key] = rng.choice(changes)
    if rng.random() < 0.2:
        del moments[key]
