"""
Figures of a run: reconstructions, sheets of maps, curves.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from attg.images import generator_for
from attg.map_job import SquashedImages


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """Normalized imgs (B, C, H, W) -> (masked, completed), both in [0, 1].

    noise (B, L) decides the mask; the visible patches are pasted in. Predictions of
    normalized patches get the mean and deviation of the true patch, which the model does
    not know, so they look better than the model is.
    """
    cfg = model.cfg
    # forward bypasses torch.compile, which would recompile for this batch size.
    _, pred, mask = model.forward(imgs, noise=noise)
    patches = model.patchify(imgs)
    if cfg.norm_pix:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        std = (var + 1e-6).sqrt()
        pred = pred * std + mean
    hidden = mask[..., None].bool()
    masked = unpatchify(patches.masked_fill(hidden, 0.0), cfg)
    completed = unpatchify(torch.where(hidden, pred, patches), cfg)
    return denormalize(masked, cfg), denormalize(completed, cfg)


def unpatchify(patches, cfg):
    """Patches (B, L, P) -> images (B, C, H, W), the inverse of attg_mae.patchify."""
    (h, w), p = cfg.grid, cfg.patch_size
    x = patches.reshape(-1, h, w, p, p, cfg.in_chans)
    x = torch.einsum("bhwpqc->bchpwq", x)  # (B, C, h, p, w, p)
    return x.reshape(-1, cfg.in_chans, h * p, w * p)


def denormalize(imgs, cfg):
    """Normalized imgs (B, C, H, W) -> [0, 1]."""
    mean, std = imgs.new_tensor([cfg.mean, cfg.std])[..., None, None]
    return (imgs * std + mean).clamp(0, 1)


def save_examples(model, run, draw_noise, pool_maps, count=8):
    """Draw reconstructions.png: image | map, if any | masked | reconstruction.

    The training images are evenly spaced. run: attg.trainer.Setup. draw_noise, pool_maps:
    attg_mae's.
    """
    cfg, path = run.cfg, Path(run.cfg.out, "reconstructions.png")
    if run.rank:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    number = len(run.train_set)
    ids = torch.linspace(0, number - 1, min(count, number)).long()
    sample = default_collate([run.train_set[i] for i in ids.tolist()])
    imgs = model.normalize(sample.image.to(run.device))
    noise = draw_noise(len(ids), cfg.grid, generator_for("masks", cfg.seed, 0))
    masked, completed = reconstruct(model, imgs, noise.to(run.device))
    columns = {"image": denormalize(imgs, cfg)}
    if run.maps is not None:
        maps = torch.from_numpy(run.maps[sample.index.numpy()])
        not_flipped = torch.zeros(len(ids), dtype=torch.bool)
        m_norm = pool_maps(maps, sample.box, not_flipped, cfg.grid)
        cells = F.interpolate(m_norm.view(-1, 1, *cfg.grid), cfg.size)
        columns["map"] = cells.expand_as(imgs)
    columns["masked"] = masked
    note = " (true patch mean, std)" if cfg.norm_pix else ""
    columns[f"reconstruction{note}"] = completed
    save_sheet(path, columns.items())
    run.log.say(f"examples: {path}")


def weight_brightness(m, tau):
    """The weights exp(m / tau) as gray values: 1 is black, exp(1 / tau) white."""
    largest = math.expm1(1 / tau)
    return torch.expm1(m / tau) / largest


def save_map_sheet(path, dataset, files, number, tau=0.75):
    """Save a sheet: image | map, weights exp(M / tau) and overlay | further maps.

    The images are evenly spaced. files: {name: maps (n, h, w) in [0, 1]}; the weights and
    the overlay are those of the first.
    """
    size = (112, 112)
    ids = torch.linspace(0, len(dataset) - 1, number).round().int()
    ids = ids.unique().tolist()
    images = SquashedImages(dataset, size)
    imgs = torch.stack([images[i][0] for i in ids]) / 255  # (number, 3, *size)
    columns = [("image", imgs)]
    for name, maps in files.items():
        m = torch.from_numpy(maps[ids]).float()[:, None]  # (number, 1, h, w)
        cells = F.interpolate(m, size).expand_as(imgs)
        columns.append((Path(name).stem[:18], cells))
        if len(columns) == 2:
            title = f"exp(M / {tau}), 1 to {math.exp(1 / tau):.2f}"
            columns.append((title, weight_brightness(cells, tau)))
            smooth = F.interpolate(m, size, mode="bilinear")
            brightness = 0.15 + 0.85 * smooth
            columns.append(("overlay", imgs * brightness))
    save_sheet(path, columns, cell=size[0])


def can_draw_curves():
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_curves(path, records):
    """Save curves of the records of a log.jsonl over the steps, a panel per unit."""
    # Not pyplot, which would look for a display.
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
                # A line of one point is invisible.
                marker = "." if len(steps) < 30 else None
                axes.plot(steps, values, label=label, marker=marker)
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100)


def curves(records, name):
    """{label: [(step, value), ...]} of a key of the log; knn holds one per feature."""
    points = {}
    for record in records:
        values = record.get(name)
        if isinstance(values, dict):
            values = {key.replace("_", " "): value for key, value in values.items()}
        else:
            values = {name: values}
        for label, value in values.items():
            if value is not None:
                point = record["step"], value
                points.setdefault(label, []).append(point)
    return points


def save_sheet(path, columns, rows=(), cell=96):
    """Save a sheet of images, small ones enlarged to about `cell` px of height.

    columns: pairs (title, floats (n, 3, h, w) in [0, 1]); rows: a name per row.
    """
    gap, top, left = 4, 20, 4  # px
    if rows:
        left = 66
    titles, images = zip(*columns, strict=True)
    images = torch.stack([x.cpu() for x in images], dim=1).flatten(0, 1)
    # A whole factor, so that each pixel of a small image stays a square.
    zoom = max(1, cell // images.shape[2])
    tiles = F.interpolate(images, scale_factor=zoom)
    grid = make_grid(tiles, nrow=len(titles), padding=gap, pad_value=1)
    grid = to_pil_image(grid)

    # The last title may be wider than its images.
    step = tiles.shape[3] + gap
    title_end = ImageFont.load_default().getlength(titles[-1])
    width = left + (len(titles) - 1) * step + max(step, int(title_end))
    sheet = Image.new("RGB", (width, top - gap + grid.height), "white")
    sheet.paste(grid, (left - gap, top - gap))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + column * step, 4), title, fill="black")
    step = tiles.shape[2] + gap
    for row, name in enumerate(rows):
        draw.text((6, top + (row + 0.5) * step - 8), name, fill="black")
    sheet.save(path)
