"""
The figure of the README: what guidance changes in a masked autoencoder.

    python attg_mae.py                      # the guided model: minutes on a CPU
    python attg_mae.py --guidance none      # a vanilla MAE
    python -m docs.idea out/toy-vit_micro-none/last.pt out/toy-vit_micro-attg/last.pt

A row per image: the image, its map M, the weights w = exp(M / tau) of its patches, the
visible patches, and the reconstruction of each model from the same patches. The images are
evenly spaced in the data set, not selected. Predicted patches get the mean and deviation
of the true ones (attg/figures.py).
"""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from attg.datasets import open_data
from attg.figures import denormalize, evenly_spaced, reconstruct, save_sheet
from attg.images import generator_for
from attg.maps import open_maps
from attg_mae import MAE, Config, load_checkpoint, mask_noise, normalize, pool_maps


def load_model(path):
    """MAE of a run's last.pt."""
    parts = load_checkpoint(path)
    model = MAE(Config(**parts["config"]))
    model.load_state_dict(parts["model"])
    return model


@torch.no_grad()
def main(vanilla, guided, maps=None, out="assets/idea.png"):
    """Draw the figure of two last.pt. maps: of the training images [toy: its masks]."""
    vanilla, guided = load_model(vanilla), load_model(guided)
    cfg = guided.cfg
    dataset = open_data(cfg.data, "train", cfg.size)
    ids = evenly_spaced(dataset, 3)
    sample = default_collate([dataset[i] for i in ids])
    maps = torch.from_numpy(open_maps(maps, dataset, cfg.data)[ids])

    imgs = normalize(sample.image, cfg)
    # The same noise, so the same hidden patches, for both models.
    noise = mask_noise(len(imgs), cfg.grid, generator_for("masks", cfg.seed, 0))
    masked, by_vanilla = reconstruct(vanilla, imgs, noise)
    _, by_guided = reconstruct(guided, imgs, noise)
    # One cell per pixel: the map itself, cropped like the image.
    m = pool_maps(maps, sample.box, sample.flip, cfg.size).view(-1, 1, *cfg.size)
    m_norm = pool_maps(maps, sample.box, sample.flip, cfg.grid).view(-1, 1, *cfg.grid)
    weight = torch.exp((m_norm - 1) / cfg.tau)  # the largest is white
    weight = F.interpolate(weight, cfg.size)
    columns = [
        ("image", denormalize(imgs, cfg)),
        ("map M", m.expand(-1, 3, -1, -1)),
        (f"w = exp(M / {cfg.tau})", weight.expand(-1, 3, -1, -1)),
        ("masked", masked),
        ("vanilla MAE", by_vanilla),
        ("guided", by_guided),
    ]
    save_sheet(out, columns, cell=128)


if __name__ == "__main__":
    main(*sys.argv[1:])
