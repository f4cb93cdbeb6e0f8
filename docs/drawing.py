"""
Panels of the figures of the docs, drawn with matplotlib.
"""

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attg_mae import MAE, Config, load_checkpoint


def load_model(path):
    """MAE of a run's last.pt, in eval mode. ValueError for a file without a decoder."""
    parts = load_checkpoint(path)
    if "optimizer" not in parts:
        raise ValueError(f"{path}: not the last.pt of a run of attg_mae.py")
    model = MAE(Config(**parts["config"]))
    model.load_state_dict(parts["model"])
    return model.eval()


def new_figure(rows, columns, side=2.7):
    """A figure and its axes (rows, columns), without ticks."""
    gap, heading = 0.1, 0.45  # inches
    width, height = columns * (side + gap) + gap, rows * (side + heading) + gap
    figure = Figure((width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    figure.subplots_adjust(
        left=gap / width,
        right=1 - gap / width,
        bottom=gap / height,
        top=1 - heading / height,
        wspace=gap / side,
        hspace=heading / side,
    )
    return figure, axes


def draw_panel(axes, image, title="", note="", grid=None, texts=(), frame=None):
    """Draw floats in [0, 1], (3, h, w) or gray (h, w), with a title and a pale note.

    grid (rows, columns): texts are written into its cells, row by row. frame: a box x0, y0,
    x1, y1 in fractions of width and height.
    """
    image = image.clamp(0, 1)
    if image.dim() == 2:
        image = image.expand(3, -1, -1)
    pixels = image.movedim(0, -1)
    # Coordinates are fractions, whatever the resolution.
    axes.imshow(pixels.numpy(), extent=(0, 1, 1, 0), interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left", pad=16 if note else None)
    axes.text(0, -0.02, note, fontsize=8, color="dimgray", va="bottom")
    if frame:
        x0, y0, x1, y1 = frame
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="red"))
    if texts:
        rows, columns = grid
        shade = torch.nn.functional.adaptive_avg_pool2d(image.mean(0)[None], grid)[0]
        for i, text in enumerate(texts):
            row, column = divmod(i, columns)
            x, y = (column + 0.5) / columns, (row + 0.5) / rows
            color = "black" if shade[row, column] > 0.45 else "white"
            axes.text(x, y, text, color=color, fontsize=7, ha="center", va="center")
