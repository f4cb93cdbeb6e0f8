"""
Pictures of what a model predicts, and of how a run went.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """Normalized imgs (B, C, H, W) -> two of them in [0, 1]: masked, and completed.

    noise (B, L) decides the mask; the visible patches are pasted in. Normalized
    predictions get the mean and deviation of the true patch, which the model does not
    know: the pictures look better than it is.
    """
    cfg = model.cfg
    # forward, past torch.compile, which would compile anew for this batch.
    _, pred, mask = model.forward(imgs, mask_ratio=cfg.mask_ratio, noise=noise)
    patches = model.patchify(imgs)
    if cfg.norm_pix:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask[..., None].bool()
    masked = model.unpatchify(patches.masked_fill(hidden, 0.0))
    completed = model.unpatchify(torch.where(hidden, pred, patches))
    return denormalize(masked, cfg), denormalize(completed, cfg)


def denormalize(imgs, cfg):
    """Normalized imgs (B, C, H, W) -> [0, 1]."""
    mean = torch.tensor(cfg.mean, device=imgs.device).view(-1, 1, 1)
    std = torch.tensor(cfg.std, device=imgs.device).view(-1, 1, 1)
    return (imgs * std + mean).clamp(0, 1)


def save_reconstructions(path, model, imgs, m_norm, noise):
    """A sheet: original | map | masked | reconstruction. m_norm (B, L) or None."""
    cfg = model.cfg
    masked, completed = reconstruct(model, imgs, noise)
    columns = [("original", denormalize(imgs, cfg))]
    if m_norm is not None:
        shown = F.interpolate(m_norm.view(-1, 1, *cfg.grid), cfg.size)
        columns.append(("map", shown.expand(-1, 3, -1, -1)))
    title = "reconstruction"
    if cfg.norm_pix:
        title += " (true patch mean, std)"
    columns += [("masked", masked), (title, completed)]
    save_sheet(path, columns)


def save_map_sheet(path, imgs, maps, tau=0.75):
    """Save a sheet: image | map, weights exp(M / tau) and overlay | further maps.

    imgs: floats (n, 3, H, W) in [0, 1]. maps: {file: (n, h, w) in [0, 1]}; the weights
    and the overlay are those of the first.
    """
    size = imgs.shape[2:]
    columns = [("image", imgs)]
    for number, (name, m) in enumerate(maps.items()):
        m = torch.from_numpy(m).float()[:, None]  # (n, 1, h, w)
        cells = F.interpolate(m, size).expand_as(imgs)
        columns.append((Path(name).stem[:18], cells))
        if number == 0:
            largest = math.exp(1 / tau)
            weights = (torch.exp(cells / tau) - 1) / (largest - 1)
            columns.append((f"exp(M / {tau}), 1 to {largest:.2f}", weights))
            smooth = F.interpolate(m, size, mode="bilinear")
            columns.append(("overlay", imgs * (0.15 + 0.85 * smooth)))
    save_sheet(path, columns, cell=size[0])


def can_draw_curves():
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_curves(path, records):
    """Draws the lines of a log.jsonl, dicts, over the steps: a panel for each unit."""
    # Not pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    panels = {
        "reconstruction": ("loss", "mse", "val_mse"),
        "k-NN on the test split, %": ("knn",),
        "learning rate": ("lr",),
        "temperature": ("tau",),
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    all_axes = figure.subplots(2, 2).flat
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        for name in names:
            for label, points in curves(records, name).items():
                steps, values = zip(*points, strict=True)
                # Single points would not be seen.
                marker = "." if len(steps) < 30 else None
                axes.plot(steps, values, label=label, marker=marker)
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100)


def curves(records, name):
    """{label: [(step, value), ...]} of what the log tells by this name."""
    points = {}
    for record in records:
        values = {name: record.get(name)}
        if name == "knn":
            values = record.get(name, {})
        for label, value in values.items():
            if value is not None:
                label = label.replace("_", " ") if name == "knn" else label
                points.setdefault(label, []).append((record["step"], value))
    return points


# A sheet of pictures, in px.
SHEET_GAP = 4  # between pictures, and around the sheet
SHEET_TITLES = 20  # height of the line of titles
SHEET_NAMES = 66  # width of the column of row names


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
