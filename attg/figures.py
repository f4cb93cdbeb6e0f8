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
        pred = pred * (var + 1e-6).sqrt() + mean
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
    mean = torch.tensor(cfg.mean, device=imgs.device).view(-1, 1, 1)
    std = torch.tensor(cfg.std, device=imgs.device).view(-1, 1, 1)
    return (imgs * std + mean).clamp(0, 1)


def save_examples(model, run, draw_noise, pool_maps, count=8):
    """Draw reconstructions.png: image | map, if any | masked | reconstruction.

    The training images are evenly spaced. run: attg.trainer.Setup. draw_noise, pool_maps:
    attg_mae's.
    """
    cfg, path = run.cfg, Path(run.cfg.out, "reconstructions.png")
    if run.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        count = min(count, len(run.train_set))
        ids = torch.linspace(0, len(run.train_set) - 1, count).long()
        sample = default_collate([run.train_set[i] for i in ids.tolist()])
        imgs = model.normalize(sample.image.to(run.device))
        noise = draw_noise(count, cfg.grid, generator_for("masks", cfg.seed, 0))
        masked, completed = reconstruct(model, imgs, noise.to(run.device))
        columns = [("image", denormalize(imgs, cfg))]
        if run.maps is not None:
            maps = torch.from_numpy(run.maps[sample.index.numpy()])
            not_flipped = torch.zeros(count, dtype=torch.bool)
            m_norm = pool_maps(maps, sample.box, not_flipped, cfg.grid)
            cells = F.interpolate(m_norm.view(-1, 1, *cfg.grid), cfg.size)
            columns.append(("map", cells.expand_as(imgs)))
        note = " (true patch mean, std)" if cfg.norm_pix else ""
        columns += [("masked", masked), (f"reconstruction{note}", completed)]
        save_sheet(path, columns)
    run.log.say(f"examples: {path}")


def save_map_sheet(path, dataset, files, number, tau=0.75):
    """Save a sheet: image | map, weights exp(M / tau) and overlay | further maps.

    The images are evenly spaced. files: {name: maps (n, h, w) in [0, 1]}; the weights and
    the overlay are those of the first.
    """
    size, ids = (112, 112), torch.linspace(0, len(dataset) - 1, number).round().int()
    ids = ids.unique().tolist()
    images = SquashedImages(dataset, size)
    imgs = torch.stack([images[i][0] for i in ids]) / 255  # (number, 3, *size)
    columns = [("image", imgs)]
    for name, maps in files.items():
        m = torch.from_numpy(maps[ids]).float()[:, None]  # (number, 1, h, w)
        cells = F.interpolate(m, size).expand_as(imgs)
        columns.append((Path(name).stem[:18], cells))
        if len(columns) == 2:
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
        values = record.get(name, {}) if name == "knn" else {name: record.get(name)}
        for label, value in values.items():
            if value is not None:
                label = label.replace("_", " ") if name == "knn" else label
                points.setdefault(label, []).append((record["step"], value))
    return points


def save_sheet(path, columns, rows=(), cell=96):
    """Save a sheet of images, small ones enlarged to about `cell` px of height.

    columns: [(title, floats (n, 3, h, w) in [0, 1]), ...]; rows: a name per row.
    """
    gap, title_height, name_width = 4, 20, 66 if rows else 4  # px
    images = torch.stack([images.cpu() for _, images in columns], dim=1).flatten(0, 1)
    # A whole factor, so that each pixel of a small image stays a square.
    tiles = F.interpolate(images, scale_factor=max(1, cell // images.shape[2]))
    grid = make_grid(tiles, nrow=len(columns), padding=gap, pad_value=1)
    height, width = tiles.shape[2] + gap, tiles.shape[3] + gap
    titles = {name_width + i * width: title for i, (title, _) in enumerate(columns)}

    # A title may be wider than its images.
    font = ImageFont.load_default()
    right = max(x + max(width, font.getlength(title)) for x, title in titles.items())
    size = (int(right), grid.shape[1] + title_height - gap)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(to_pil_image(grid), (name_width - gap, title_height - gap))
    draw = ImageDraw.Draw(sheet)
    for x, title in titles.items():
        draw.text((x, 4), title, fill="black")
    for row, name in enumerate(rows):
        y = title_height + row * height + tiles.shape[2] // 2 - 6
        draw.text((6, y), name, fill="black")
    sheet.save(path)
