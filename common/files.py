"""
Files written whole or not at all, checksums, sheets of pictures, tables of results.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image


def require(condition, message):
    if not condition:
        raise ValueError(message)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path):
    """A temporary path that takes the place of `path` when the block ends well: all or nothing, even if killed."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_sheet(path, columns, rows=(), cell=96):
    """Writes a sheet of pictures: columns [(title, floats (n, 3, h, w) in [0, 1]), ...], rows: a name for each row."""
    (n, _, h, w), left = columns[0][1].shape, 66 if rows else 4
    w, h = (side * max(1, cell // h) for side in (w, h))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = left + max(
        i * (w + 4) + max(w + 4, draw.textlength(title))
        for i, (title, _) in enumerate(columns)
    )
    sheet = Image.new("RGB", (int(width), 20 + n * (h + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        draw.text((6, 14 + row * (h + 4) + h // 2), name, fill="black")
    for column, (title, images) in enumerate(columns):
        draw.text((left + column * (w + 4), 4), title, fill="black")
        for row, image in enumerate(images):
            tile = to_pil_image(image.cpu()).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (w + 4), 20 + row * (h + 4)))
    sheet.save(path)


def report(rows, settings, path):
    """Prints rows, dicts of figures, as a table, then all of it as a line of JSON, which is also added to the file."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        keys,
        *(
            [
                f"{row[k]:.2f}"
                if isinstance(row.get(k), float)
                else str(row.get(k, ""))
                for k in keys
            ]
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    rows = [
        {k: v if v == v else None for k, v in row.items()} for row in rows
    ]  # JSON has no NaN
    line = json.dumps(
        {"settings": settings, "torch": torch.__version__, "results": rows},
        allow_nan=False,
    )
    print(line)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(line + "\n")
