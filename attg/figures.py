"""
Figures of a run: reconstructions, sheets of maps, curves.
"""

import math
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from attg.cli import log_line
from attg.images import generator_for
from attg.map_job import SquashedImages


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """Normalized imgs (B, C, H, W) -> (masked, completed), both in [0, 1].

    noise (B, L) decides the mask. Predictions of normalized patches get the mean and
    deviation of the true patch, so they look better than the model is.
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
    mean = imgs.new_tensor(cfg.mean)[:, None, None]
    std = imgs.new_tensor(cfg.std)[:, None, None]
    return (imgs * std + mean).clamp(0, 1)


def save_examples(model, run, draw_noise, pool_maps, count=8):
    """Save reconstructions.png: image | map, if any | masked | reconstruction.

    The training images are evenly spaced. run: attg.trainer.Setup. draw_noise, pool_maps:
    attg_mae's.
    """
    cfg, path = run.cfg, Path(run.cfg.out, "reconstructions.png")
    if run.rank:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = evenly_spaced(run.train_set, count)
    sample = default_collate([run.train_set[i] for i in ids])
    imgs = model.normalize(sample.image.to(run.device))
    noise = draw_noise(len(ids), cfg.grid, generator_for("masks", cfg.seed, 0))
    columns = [("image", denormalize(imgs, cfg))]
    if run.maps is not None:
        maps = torch.from_numpy(run.maps[sample.index.numpy()])
        m_norm = pool_maps(maps, sample.box, sample.flip, cfg.grid)
        cells = F.interpolate(m_norm.view(-1, 1, *cfg.grid), cfg.size)
        columns.append(("map", cells.expand_as(imgs)))
    masked, completed = reconstruct(model, imgs, noise.to(run.device))
    columns += [("masked", masked), ("reconstruction", completed)]
    save_sheet(path, columns)
    run.log.say(f"examples: {path}")


def evenly_spaced(dataset, count):
    """Up to `count` evenly spaced indices of a data set."""
    number = len(dataset)
    ids = torch.linspace(0, number - 1, min(count, number))
    return ids.long().tolist()


def save_map_sheet(path, dataset, files, count):
    """Save a sheet: image | the first map and its overlay | further maps.

    The images are evenly spaced. files: {name: maps (n, h, w) in [0, 1]}.
    """
    size = (112, 112)
    ids = evenly_spaced(dataset, count)
    squashed = SquashedImages(dataset, size)
    imgs = torch.stack([squashed[i][0] for i in ids])
    imgs = imgs / 255  # (count, 3, *size)
    columns = [("image", imgs)]
    for name, maps in files.items():
        m = torch.from_numpy(maps[ids]).float()
        cells = F.interpolate(m[:, None], size)  # (count, 1, *size)
        cells = cells.expand_as(imgs)
        columns.append((Path(name).stem, cells))
        if len(columns) == 2:
            columns.append(("overlay", imgs * (0.15 + 0.85 * cells)))
    save_sheet(path, columns, cell=size[0])


# Panel of each curve.
PANELS = dict.fromkeys(("loss", "mse", "val_mse"), "reconstruction")
PANELS |= dict.fromkeys(("class_token", "patch_mean"), "k-NN on the test split, %")
PANELS |= {"lr": "learning rate", "tau": "temperature"}


def save_curves(path, records):
    """Save curves of the records of a log.jsonl over the steps."""
    panels = {title: defaultdict(list) for title in PANELS.values()}
    for record in records:
        values = record | record.get("knn", {})
        for name, title in PANELS.items():
            if values.get(name) is not None:
                point = record["step"], values[name]
                panels[title][name.replace("_", " ")].append(point)
    plot_panels(path, panels)


def plot_panels(path, panels):
    """Save a figure with a panel for each {title: {label: [(step, value), ...]}}.

    It needs matplotlib; without it there is a line that says so.
    """
    if find_spec("matplotlib") is None:
        log_line(f"{path} is not drawn: pip install matplotlib")
        return
    # Not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 4 * rows), layout="constrained")
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, 2, number, title=title, xlabel="step")
        for label, points in curves.items():
            steps, values = zip(*points, strict=True)
            # A line of one point is invisible.
            marker = "." if len(points) < 30 else None
            axes.plot(steps, values, label=label, marker=marker)
        if curves:
            axes.legend()
    figure.savefig(path, dpi=100)


def save_sheet(path, columns, cell=96):
    """Save a sheet of images, small ones enlarged to about `cell` px of height.

    columns: pairs (title, floats (n, 3, h, w) in [0, 1]).
    """
    gap, top = 4, 20  # px
    titles, images = zip(*columns, strict=True)
    images = torch.stack([x.cpu() for x in images], dim=1)
    images = images.flatten(0, 1)  # row by row
    # A whole factor, so that each pixel of a small image stays a square.
    zoom = max(1, cell // images.shape[2])
    tiles = F.interpolate(images, scale_factor=zoom)
    grid = make_grid(tiles, nrow=len(titles), padding=gap, pad_value=1)
    grid = to_pil_image(grid)

    sheet = Image.new("RGB", (grid.width, top + grid.height), "white")
    sheet.paste(grid, (0, top - gap))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = gap + column * (tiles.shape[3] + gap)
        draw.text((x, 4), title, fill="black")
    sheet.save(path)
