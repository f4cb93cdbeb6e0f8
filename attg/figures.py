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

from attg.files import atomic_write
from attg.images import generator_for
from attg.loader import Batch
from attg.log import log_line
from attg.map_job import SquashedImages
from attg.toy import TOY_CLASSES

SIDE = 192  # px, the smallest side of an image in a sheet


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """Normalized imgs (B, C, H, W) -> (masked, completed), both in [0, 1].

    noise (B, L) decides the mask. Predictions of normalized patches get the mean and
    std of the true patch, so they look better than the model is.
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
    mean, std = imgs.new_tensor([cfg.mean, cfg.std])[:, :, None, None]
    return (imgs * std + mean).clamp(0, 1)


def save_examples(model, run, checkpoint, model_inputs, pool_maps):
    """Save reconstructions.png of eight training images, evenly spaced, after a run.

    image | map and weight, if any | masked | reconstruction | error. run:
    attg.trainer.Run; checkpoint: the one it resumed, or None; the functions are
    attg_mae's.
    """
    if run.rank:
        return
    cfg = run.cfg
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    ids = evenly_spaced(run.train_set, 8)
    sample = default_collate([run.train_set[i] for i in ids])
    generator = generator_for("masks", cfg.seed, 0)
    noise = torch.rand(len(ids), math.prod(cfg.grid), generator=generator)
    maps = None
    if run.maps is not None:
        maps = torch.from_numpy(run.maps[sample.index.numpy()])
    batch = Batch(sample.image, maps, sample.box, sample.flip, noise)
    batch = Batch(*(None if x is None else x.to(run.device) for x in batch))
    imgs, weight, noise = model_inputs(batch, cfg, cfg.tau)
    image = denormalize(imgs, cfg)
    columns = [("image", image)]
    if maps is not None:
        m = pool_maps(batch.maps, batch.box, batch.flip, cfg.size)
        columns.append(("map", m.view(-1, 1, *cfg.size)))
    if weight is not None:
        white = weight.max()
        cells = F.interpolate(weight.view(-1, 1, *cfg.grid), cfg.size)
        title = f"weight (tau {cfg.tau:g}: to {white:.2f})"
        columns.append((title, cells / white))
    masked, completed = reconstruct(model, imgs, noise)
    columns.append(("masked", masked))
    columns.append(("reconstruction", completed))
    error = (completed - image).abs().mean(dim=1, keepdim=True)
    columns.append(("error (white 0.5)", (2 * error).clamp(0, 1)))
    path = out / "reconstructions.png"
    # With --epochs 0 the examples are those of the checkpoint.
    step = checkpoint["step"] if checkpoint and not cfg.epochs else run.total_steps
    heading = f"{out.name}, step {step}, training images"
    if cfg.norm_pix:
        heading += "; masked patches: predicted structure, true mean and std"
    save_sheet(path, columns, heading)
    run.log.info(f"examples: {path}")


def evenly_spaced(dataset, count):
    """Up to `count` evenly spaced indices of a data set."""
    number = len(dataset)
    ids = torch.linspace(0, number - 1, min(count, number))
    return ids.long().tolist()


def squashed(dataset, ids):
    """Whole images as floats (n, 3, SIDE, SIDE) in [0, 1]."""
    images = SquashedImages(dataset, (SIDE, SIDE))
    return torch.stack([images[i][0] for i in ids]) / 255


def save_map_sheet(path, dataset, maps, count):
    """Save a sheet of images, evenly spaced: image | map | overlay.

    maps (n, h, w) in [0, 1].
    """
    ids = evenly_spaced(dataset, count)
    imgs = squashed(dataset, ids)
    m = torch.from_numpy(maps[ids]).float()
    cells = F.interpolate(m[:, None], imgs.shape[2:])
    names = [Path(dataset.names[i]).name for i in ids]
    names = [x if len(x) <= 22 else f"...{x[-19:]}" for x in names]
    texts = ["" if one.any() else "flat" for one in m]
    columns = [("image", imgs, names)]
    columns.append(("map", cells, texts))
    columns.append(("overlay", imgs * (0.15 + 0.85 * cells)))
    save_sheet(path, columns)


def save_neighbors(path, train_set, test_set, bank, queries, heading):
    """Save a sheet: eight test images, evenly spaced | their five nearest neighbors.

    bank (n, D), queries (B, D): features of the two sets of images.
    """
    names = class_names(train_set)
    ids = evenly_spaced(test_set, 8)
    bank = F.normalize(bank, dim=1)
    similarity = queries[ids] @ bank.T
    nearest = similarity.topk(min(5, len(bank)), dim=1).indices  # (8, 5)

    def column(title, dataset, rows):
        texts = [names[label] for label in dataset.labels[rows].tolist()]
        return title, squashed(dataset, rows), texts

    columns = [column("test image", test_set, ids)]
    for number, rows in enumerate(nearest.T.tolist(), start=1):
        columns.append(column(f"neighbor {number}", train_set, rows))
    save_sheet(path, columns, heading)


def class_names(dataset):
    """The folder of each class, or its number."""
    if dataset.masks is not None:  # toy
        return TOY_CLASSES
    names = [str(label) for label in range(dataset.num_classes)]
    if dataset.pairs is None:
        for name, label in zip(dataset.names, dataset.labels.tolist(), strict=True):
            names[label] = name.partition("/")[0]
    return names


def save_confusion(path, counts, names, title):
    """Save a confusion matrix: counts (C, C) by class and prediction, names of classes."""
    images = counts.sum(dim=1, keepdim=True)
    percent = 100 * counts / images.clamp(min=1)
    side = 3 + 0.4 * len(names)
    figure = new_figure(path, side, side)
    if figure is None:
        return
    axes = figure.add_subplot(xlabel="predicted, % of a class", ylabel="class")
    axes.set_title(title)
    axes.imshow(percent.numpy(), "Oranges", vmin=0, vmax=150)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    style = {"ha": "center", "va": "center", "fontsize": 8}
    for row, column in (percent >= 0.5).nonzero().tolist():
        axes.text(column, row, f"{percent[row, column]:.0f}", **style)
    save_figure(path, figure)
    log_line(f"confusion matrix: {path}")


# Panel of each curve.
PANELS = {"loss": "loss", "mse": "mse (unweighted loss)"}
PANELS |= {"val_mse": "mse (unweighted loss)", "lr": "learning rate"}
PANELS |= dict.fromkeys(("class_token", "patch_mean"), "k-NN on the test split, %")
PANELS |= {"tau": "temperature"}


def panels_of(records, run=""):
    """{title: {label: [(step, value), ...]}} of the records of a log.jsonl.

    Loss and temperature are left out if the loss is unweighted: it is the mse then. run:
    its name, for the labels.
    """
    weighted = any(x["loss"] != x["mse"] for x in records if "loss" in x)
    panels = {}
    for name, title in PANELS.items():
        points = []
        for record in records:
            values = record | record.get("knn", {})
            if values.get(name) is not None:
                points.append((record["step"], values[name]))
        # A single point makes no curve; it is in the log.
        if len(points) > 1 and (weighted or name not in ("loss", "tau")):
            label = f"{run} {name.replace('_', ' ')}".strip()
            panels.setdefault(title, {})[label] = points
    return panels


def plot_panels(path, panels):
    """Save a figure with a panel for each {title: {label: [(step, value), ...]}}."""
    rows = math.ceil(len(panels) / 2)
    figure = new_figure(path, 12, 4 * rows) if panels else None
    if figure is None:
        return
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, 2, number, title=title, xlabel="step")
        for label, points in curves.items():
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 30 else None
            axes.plot(steps, values, label=label, marker=marker)
        axes.legend()
    save_figure(path, figure)


def append_images(path, others):
    """Paste images below the image in a file, side by side; missing ones are left out."""
    paths = [x for x in (path, *others) if Path(x).exists()]
    if not paths:
        return
    first, *rest = map(Image.open, paths)
    width = max(first.width, sum(x.width for x in rest))
    height = first.height + max((x.height for x in rest), default=0)
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(first, (0, 0))
    x = 0
    for image in rest:
        sheet.paste(image, (x, first.height))
        x += image.width
    with atomic_write(path) as temporary:
        sheet.save(temporary, "png")


def new_figure(path, width, height):
    """A matplotlib figure, in inches; None, and a line that says so, without matplotlib."""
    if find_spec("matplotlib") is None:
        log_line(f"{path} is not drawn: pip install matplotlib")
        return None
    # Not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path, figure):
    """Write a figure to a PNG file."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def save_sheet(path, columns, heading=""):
    """Save a sheet of images, small ones enlarged to at least SIDE px.

    columns: title, floats (n, C, h, w) in [0, 1] and, optionally, n texts to write below
    the images.
    """
    from torchvision.transforms.functional import to_pil_image

    gap, line = 6, 22  # px
    font = ImageFont.load_default(size=16)
    rows, _, h, w = columns[0][1].shape
    # An integer factor, so that each pixel of a small image stays a square.
    zoom = math.ceil(SIDE / min(h, w))
    size = (zoom * w, zoom * h)
    has_texts = any(len(column) > 2 for column in columns)
    top = 2 * line + gap
    x_step = size[0] + gap
    y_step = size[1] + gap + line * has_texts
    shape = (gap + len(columns) * x_step, top + rows * y_step)
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 2), heading, "black", font)
    for column, (title, images, *texts) in enumerate(columns):
        x = gap + column * x_step
        draw.text((x, top - line), title, "black", font)
        for row, image in enumerate(images.cpu()):
            y = top + row * y_step
            tile = to_pil_image(image)
            tile = tile.resize(size, Image.Resampling.NEAREST)
            sheet.paste(tile, (x, y))
            if texts:
                draw.text((x, y + size[1]), texts[0][row], "black", font)
    with atomic_write(path) as temporary:
        sheet.save(temporary, "png")
