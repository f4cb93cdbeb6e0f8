"""
Panels of the figures of the docs, drawn with matplotlib.
"""

import numpy as np
from matplotlib.figure import Figure
from torch.nn.functional import adaptive_avg_pool2d

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
    figure = Figure((columns * side, rows * (side + 0.4)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    return figure, axes


def draw_panel(axes, image, title="", note="", texts=None, frame=None):
    """Draw floats in [0, 1], (3, h, w) or gray (h, w), with a title and a pale note.

    texts: (rows, columns) of strings, written into the cells of that grid. frame: a box
    x0, y0, x1, y1 in fractions of width and height.
    """
    image = image.clamp(0, 1)
    if image.dim() == 2:
        image = image.expand(3, -1, -1)
    pixels = image.movedim(0, -1).numpy()
    # Coordinates are fractions, whatever the resolution.
    axes.imshow(pixels, extent=(0, 1, 1, 0), interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left", pad=16 if note else None)
    axes.text(0, -0.02, note, fontsize=8, color="dimgray", va="bottom")
    if frame:
        x0, y0, x1, y1 = frame
        x, y = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
        axes.plot(x, y, color="red", linewidth=1)
    if texts is None:
        return
    rows, columns = texts.shape
    shade = adaptive_avg_pool2d(image.mean(0)[None], texts.shape)[0]
    centered = {"ha": "center", "va": "center", "fontsize": 7}
    for (row, column), text in np.ndenumerate(texts):
        x = (column + 0.5) / columns
        y = (row + 0.5) / rows
        color = "black" if shade[row, column] > 0.45 else "white"
        axes.text(x, y, text, color=color, **centered)
