"""
The figure of the README: what guidance changes in a masked autoencoder.

    python attg_mae.py                      # the guided model: minutes on a CPU
    python attg_mae.py --guidance none      # a vanilla MAE
    python -m docs.idea out/toy-vit_micro-none/last.pt out/toy-vit_micro-attg/last.pt

A row per image: the image, its map M, the weights w = exp(M / tau) of its patches, the
visible patches, and the reconstruction of each model from the same patches. The images are
the first three of a permutation of the test set (SEED) whose map covers 10 to 40 % of the
image. Predicted patches get the mean and std of the true ones. Below: the paired
differences of the runs designed in docs/study.md.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from attg.datasets import open_data
from attg.features import FEATURES
from attg.figures import (
    append_images,
    denormalize,
    new_figure,
    reconstruct,
    save_figure,
    save_sheet,
)
from attg.images import generator_for
from attg_mae import MAE, Config, load_checkpoint, normalize, pool_maps
from study import read_study, table_rows

SEED = 0
GREY = "tinymid30/grey: "
# Rows of the plot: study of the design in docs/study.md, variant, test set, and their name.
ROWS = {
    ("toy-new-seeds", "masks", ""): "toy: exact masks",
    ("toy-new-seeds", "self", ""): "toy: maps found without labels",
    ("toy-new-seeds", "gaussian", ""): "toy: centered Gaussian",
    ("toy-new-seeds", "self-shuffled", ""): "toy: maps of other images",
    ("imagenette64-new-seeds", "cnn-tokencut", ""): "Imagenette: maps of a classifier",
    ("imagenette64-new-seeds", "gaussian", ""): "Imagenette: centered Gaussian",
    ("tinymid30", "box", ""): "whole photographs: boxes",
    ("tinymid30", "gaussian", ""): "whole photographs: centered Gaussian",
    ("tinymid30", "shuffled", ""): "whole photographs: boxes of other images",
    ("tinymid30", "box+tau0.3", ""): "whole photographs: boxes, tau from 0.3",
    ("tinymid30", "box", GREY): "objects on grey: boxes",
    ("tinymid30", "gaussian", GREY): "objects on grey: centered Gaussian",
    ("tinymid30", "shuffled", GREY): "objects on grey: boxes of other images",
    ("tinymid30", "box+tau0.3", GREY): "objects on grey: boxes, tau from 0.3",
    ("tinybox20", "box", ""): "second set, whole: boxes",
    ("tinybox20", "box", "tinybox20/grey: "): "second set, objects on grey: boxes",
}


def load_model(path):
    """MAE of a run's last.pt."""
    parts = load_checkpoint(path)
    model = MAE(Config(**parts["config"]))
    model.load_state_dict(parts["model"])
    return model


def errors(model, imgs, noise, m_norm):
    """Mean squared error of the masked patches, on the object and off it, as a text."""
    values = []
    for weight in (m_norm, 1 - m_norm):
        loss, _, mask = model(imgs, noise=noise, weight=weight)
        values.append(loss * mask.sum() / (mask * weight).sum())
    return "object {:.3f}, rest {:.3f}".format(*values)


@torch.no_grad()
def main(vanilla, guided, out="assets/idea.png"):
    """Draw the figure of two last.pt of a data set that brings its maps."""
    vanilla, guided = load_model(vanilla), load_model(guided)
    cfg = guided.cfg
    dataset = open_data(cfg.data, "test", cfg.size)
    sample = default_collate(list(dataset))
    masks = torch.from_numpy(dataset.masks)
    imgs = normalize(sample.image, cfg)
    # The same noise, so the same masked patches, for both models.
    generator = generator_for("masks", cfg.seed, 0)
    noise = torch.rand(len(imgs), math.prod(cfg.grid), generator=generator)
    m_norm = pool_maps(masks, sample.box, sample.flip, cfg.grid)
    heading = "Error on the test set: vanilla " + errors(vanilla, imgs, noise, m_norm)
    heading += "; guided " + errors(guided, imgs, noise, m_norm)

    order = torch.randperm(len(imgs), generator=torch.Generator().manual_seed(SEED))
    share = m_norm[order].mean(dim=1)
    ids = order[(share >= 0.1) & (share <= 0.4)][:3]
    imgs, noise, m_norm = imgs[ids], noise[ids], m_norm[ids]
    rows = list(zip(imgs.split(1), noise.split(1), m_norm.split(1), strict=True))
    texts = [[errors(model, *row) for row in rows] for model in (vanilla, guided)]
    weight = torch.exp((m_norm - 1) / cfg.tau)  # the largest is white
    cells = F.interpolate(weight.view(-1, 1, *cfg.grid), cfg.size)
    masked, by_vanilla = reconstruct(vanilla, imgs, noise)
    _, by_guided = reconstruct(guided, imgs, noise)
    columns = [
        ("image", denormalize(imgs, cfg)),
        ("map M", masks[ids, None].float()),
        (f"weight, 1 to {math.exp(1 / cfg.tau):.2f}", cells),
        (f"masked, {cfg.mask_ratio:.0%}", masked),
        ("vanilla MAE", by_vanilla, texts[0]),
        ("guided", by_guided, texts[1]),
    ]
    save_sheet(out, columns, heading)
    plot = Path(out).with_suffix(".plot.png")
    draw_differences(plot)
    append_images(out, [plot])
    plot.unlink()


def draw_differences(path):
    """Draw the paired differences of k-NN accuracy from vanilla runs."""
    figure, ticks = new_figure(path, 11.9, 5.5), {}
    axes = figure.add_subplot()
    axes.set_title(
        "k-NN (k = 20), variant - vanilla, in points: mean and 95 % interval"
    )
    axes.axvline(0, color="gray")
    for (name, variant, test_set), text in ROWS.items():
        for row in table_rows(read_study(Path("results/study", name))):
            metric = f"{test_set}k-NN, k = 20"
            if (row["metric"], row["variant"]) == (metric, variant):
                tick = ticks.setdefault(f"{text}, n = {row['pairs']}", -len(ticks))
                feature = FEATURES.index(row["feature"])
                y, color = tick - 0.3 * feature, f"C{feature}"
                axes.plot([row["low"], row["high"]], [y, y], color)
                axes.plot(row["difference"], y, f"{color}o")
    axes.set_yticks(list(ticks.values()), list(ticks))
    names = [name.replace("_", " ") for name in FEATURES]
    axes.legend(axes.lines[2:5:2], names, loc="lower right")
    save_figure(path, figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
