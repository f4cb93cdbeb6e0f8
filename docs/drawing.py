"""
Sheets of panels with titles and numbers, drawn by PIL alone, for the figures of the docs.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

INK, PALE = (20, 20, 20), (100, 100, 100)
GAP = 10  # px between panels
TITLE, NOTE = 15, 12  # px, height of the letters
HEADING = 44  # px above a panel that has a title


class Panel(NamedTuple):
    picture: Image.Image
    title: str = ""
    note: str = ""  # a second, paler line


def enlarge(image, height):
    """Floats in [0, 1], (3, h, w) or (h, w) -> a PIL picture of this height in px."""
    if image.dim() == 2:
        image = image.expand(3, -1, -1)
    h, w = image.shape[1:]
    # Pixels of a small picture stay sharp squares, a large picture is averaged.
    resample = Image.Resampling.NEAREST
    if h > height:
        resample = Image.Resampling.LANCZOS
    picture = to_pil_image(image.float().clamp(0, 1).cpu())
    return picture.resize((round(height * w / h), height), resample)


def draw_grid(picture, grid, colour=(255, 255, 255)):
    """Lines between the cells of a grid (rows, columns)."""
    draw = ImageDraw.Draw(picture)
    rows, columns = grid
    for row in range(1, rows):
        y = row * picture.height // rows
        draw.line([(0, y), (picture.width, y)], fill=colour)
    for column in range(1, columns):
        x = column * picture.width // columns
        draw.line([(x, 0), (x, picture.height)], fill=colour)


def draw_frame(picture, box, colour=(255, 0, 0)):
    """A frame around the box x0, y0, x1, y1, fractions of width and height."""
    x0, y0, x1, y1 = box
    w, h = picture.width - 1, picture.height - 1
    corners = (x0 * w, y0 * h, x1 * w, y1 * h)
    ImageDraw.Draw(picture).rectangle(corners, outline=colour, width=3)


def write_in_cells(picture, grid, texts, size=13):
    """One text for each cell of a grid, row by row; "" leaves a cell as it is."""
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size)
    rows, columns = grid
    # The mean of a cell decides between black and white letters.
    shades = picture.convert("L").resize((columns, rows), Image.Resampling.BOX)
    for i, text in enumerate(texts):
        row, column = divmod(i, columns)
        x = (column + 0.5) * picture.width / columns
        y = (row + 0.5) * picture.height / rows
        fill = "white"
        if shades.getpixel((column, row)) > 115:
            fill = "black"
        draw.text((x, y), text, fill=fill, font=font, anchor="mm")


def save_panels(path, rows):
    """Writes a picture of rows of Panels; panels of a column have the same width."""
    widths = [panel.picture.width for panel in rows[0]]
    width = GAP + sum(widths) + GAP * len(widths)
    height = GAP
    for row in rows:
        height += heading(row) + row[0].picture.height + GAP

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    title_font = ImageFont.load_default(TITLE)
    note_font = ImageFont.load_default(NOTE)
    y = GAP
    for row in rows:
        x = GAP
        for panel in row:
            draw.text((x, y), panel.title, fill=INK, font=title_font)
            draw.text((x, y + 21), panel.note, fill=PALE, font=note_font)
            sheet.paste(panel.picture, (x, y + heading(row)))
            x += panel.picture.width + GAP
        y += heading(row) + row[0].picture.height + GAP
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # PIL's own strategy of compression suits photographs: a tenth larger here.
    strategy = zlib.Z_DEFAULT_STRATEGY
    sheet.save(path, compress_level=9, compress_type=strategy)


def heading(row):
    """The height in px above the pictures of a row of Panels."""
    if any(panel.title for panel in row):
        return HEADING
    return 0
