"""
Files written whole or not at all, and by one run at a time; checksums, sheets of
pictures, tables of results.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A sheet of pictures, in px.
SHEET_GAP = 4  # between pictures, and around the sheet
SHEET_TITLES = 20  # height of the line of titles
SHEET_NAMES = 66  # width of the column of row names


def require(condition, message):
    """ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def sha256(path):
    """The checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path):
    """
    A temporary path that takes the place of `path` when the block ends well: all or
    nothing, even if killed.
    """
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        # Without fsync a power cut can leave the new name with none of the content.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, what, patience=0):
    """Keeps others from what a lock file stands for while the block runs.

    ValueError if another process holds it and does not let go within `patience` seconds;
    `what` and the holder are named. The lock is a process's own: it ends with it, however
    that ends, and forked workers do not inherit it. Where a file system knows no locks,
    as some that machines share do not, and on Windows, a warning says that nothing keeps
    two runs apart.
    """
    path = Path(path)
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = take_lock(path, what, time.monotonic() + patience)
    except OSError as error:
        raise OSError(
            f"{what}: cannot be written ({error}); name another place"
        ) from error
    try:
        yield
    finally:
        # While it is held: whoever waits sees that the file is gone, and makes another.
        # Windows removes no file that is open, and there none is held.
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        if made:
            # Nothing was written.
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def take_lock(path, what, until):
    """The lock file, open, once this process holds it; see locked."""
    while True:
        file = open(path, "a+")
        try:
            if fcntl is None:
                raise OSError("no locks on this system")
            # Not flock, whose locks forked workers keep.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            require(
                time.monotonic() < until,
                f"{what}: {holder} is writing there; wait until it has ended, or name "
                "another place",
            )
            time.sleep(0.1)
            continue
        except OSError as error:
            words = f"{what}: nothing keeps a second run from writing there ({error})"
            print(words, file=sys.stderr)
            return file
        # The one that held it may have removed the file in between.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        file.close()


def save_sheet(path, columns, rows=(), cell=96):
    """
    Writes a sheet of pictures, small ones enlarged to about `cell` px of height.

    columns: [(title, floats (n, 3, h, w) in [0, 1]), ...], rows: a name for each row.
    """
    number, _, height, width = columns[0][1].shape
    # Whole multiples, so that each pixel of a small picture stays a square.
    zoom = max(1, cell // height)
    height *= zoom
    width *= zoom
    left = SHEET_NAMES if rows else SHEET_GAP
    step_x = width + SHEET_GAP
    step_y = height + SHEET_GAP

    # A title may be wider than its pictures; only a canvas can measure it.
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    right = 0
    for column, (title, _) in enumerate(columns):
        needed = max(step_x, draw.textlength(title))
        right = max(right, column * step_x + needed)

    size = (int(left + right), SHEET_TITLES + number * step_y)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        draw.text((6, 14 + row * step_y + height // 2), name, fill="black")
    for column, (title, images) in enumerate(columns):
        x = left + column * step_x
        draw.text((x, 4), title, fill="black")
        for row, image in enumerate(images):
            tile = to_pil_image(image.cpu())
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, SHEET_TITLES + row * step_y))
    sheet.save(path)


def print_table(rows):
    """Prints rows, dicts, with a column for every key that any of them has."""
    keys = []
    for row in rows:
        for key in row:
            if key not in keys:
                keys.append(key)

    lines = [keys]
    for row in rows:
        line = []
        for key in keys:
            value = row.get(key, "")
            line.append(f"{value:.2f}" if isinstance(value, float) else str(value))
        lines.append(line)

    widths = []
    for column in zip(*lines, strict=True):
        widths.append(max(len(text) for text in column))
    for line in lines:
        padded = []
        for text, width in zip(line, widths, strict=True):
            padded.append(text.ljust(width))
        print("  ".join(padded).rstrip())


def without_nan(row):
    """A dict for JSON, which has no NaN, the one value that differs from itself."""
    return {key: value if value == value else None for key, value in row.items()}


def report(rows, settings, path):
    """
    Prints rows, dicts of figures, as a table, then all of it as a line of JSON, which
    is also added to the file.
    """
    results = [without_nan(row) for row in rows]
    record = {"settings": settings, "torch": torch.__version__, "results": results}
    line = json.dumps(record, allow_nan=False)
    # First the file: a closed pipe ends the program when it prints.
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(line + "\n")
    print_table(rows)
    print(line)
