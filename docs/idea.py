"""
The figure of the README: what guidance changes in a masked autoencoder.

    python attg_mae.py                      # the guided model: minutes on a CPU
    python attg_mae.py --guidance none      # a vanilla MAE
    python -m docs.idea --vanilla out/toy-vit_micro-none/last.pt \\
        --guided out/toy-vit_micro-attg/last.pt --out assets/idea.png

A row per image: the image, its map M, the weights w = exp(M / tau) of its patches, the
visible patches, and the reconstruction of each model from the same patches. The images are
evenly spaced in the data set, not selected. Predicted patches get the mean and deviation
of the true ones (attg/figures.py).
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import math

import numpy as np
import torch
from torch.utils.data import default_collate

from attg.cli import flag, parse, run_cli
from attg.datasets import open_data
from attg.figures import denormalize, reconstruct, weight_brightness
from attg.images import generator_for
from attg.maps import open_maps
from attg_mae import mask_noise, normalize, pool_maps
from docs.drawing import draw_panel, load_model, new_figure

TAU = 0.75  # at the first training step, where guidance is strongest


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of the figure."""

    vanilla: str | None = flag(None, "last.pt of a run with --guidance none")
    guided: str | None = flag(None, "last.pt of a guided run")
    out: str = flag("assets/idea.png", "the figure")
    data: str | None = flag(None, "data set [that of the guided run]")
    maps: str | None = flag(None, "maps of its images [toy: its masks]")
    split: str = flag("test", "train or test", choices=("train", "test"))
    count: int = flag(3, "number of images", 1, 100)


def columns_of(sample, maps, vanilla, guided):
    """[(title, note, images (n, 3, h, w) or (n, h, w))] of a batched Sample."""
    cfg = guided.cfg
    imgs = normalize(sample.image, cfg)
    # The same noise, so the same hidden patches, for both models.
    generator = generator_for("masks", cfg.seed, 0)
    noise = mask_noise(len(imgs), cfg.grid, generator)
    m_norm = pool_maps(maps, sample.box, sample.flip, cfg.grid)
    weights = weight_brightness(m_norm, TAU).view(-1, *cfg.grid)
    masked, by_vanilla = reconstruct(vanilla, imgs, noise)
    _, by_guided = reconstruct(guided, imgs, noise)
    # One cell per pixel: the map itself, cropped like the image.
    cropped = pool_maps(maps, sample.box, sample.flip, cfg.size)
    return [
        ("image", "", denormalize(imgs, cfg)),
        ("map M", "0 black, 1 white", cropped.view(-1, *cfg.size)),
        ("w = exp(M / tau)", f"1 to {math.exp(1 / TAU):.2f}", weights),
        ("masked", f"{cfg.mask_ratio:.0%} hidden", masked),
        ("vanilla MAE", "each patch has weight 1", by_vanilla),
        ("guided", "each patch has weight w", by_guided),
    ]


@torch.no_grad()
def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    if not settings.vanilla or not settings.guided:
        raise ValueError("--vanilla and --guided: name the last.pt of two runs")
    vanilla, guided = load_model(settings.vanilla), load_model(settings.guided)
    cfg = guided.cfg
    data = settings.data or cfg.data
    dataset = open_data(data, settings.split, cfg.size, channels=cfg.in_chans)
    if dataset is None:
        raise ValueError(f"--split {settings.split}: --data {data} does not have it")
    all_maps = open_maps(settings.maps, dataset, data)
    ids = torch.linspace(0, len(dataset) - 1, min(settings.count, len(dataset))).long()
    sample = default_collate([dataset[i] for i in ids.tolist()])
    maps = torch.from_numpy(all_maps[sample.index.numpy()]).float()

    columns = columns_of(sample, maps, vanilla, guided)
    figure, axes = new_figure(len(ids), len(columns))
    for row, column in np.ndindex(axes.shape):
        title, note, images = columns[column]
        heading = (title, note) if row == 0 else ("", "")
        draw_panel(axes[row, column], images[row], *heading)
    figure.savefig(settings.out, dpi=110)
    print(f"{settings.out}: images {ids.tolist()} of {data}, {settings.split}")


if __name__ == "__main__":
    run_cli(main)
