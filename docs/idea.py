"""
The figure of the README: what guidance changes in a masked autoencoder.

    python attg_mae.py                      # the guided model: some minutes on a CPU
    python attg_mae.py --guidance none      # the same without guidance: a vanilla MAE
    python -m docs.idea --vanilla out/toy-vit_micro-none/last.pt \\
        --guided out/toy-vit_micro-attg/last.pt --out assets/idea.png

A row for each picture: the picture, its map M, the weights w = exp(M / tau) of its
patches, what the models see, and what each of them makes of it. Both models see the same
patches. The pictures are evenly spaced in the data set, they are not chosen by looks.
Predicted patches get the mean and deviation of the true ones (attg/figures.py).
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import math

import torch
from torch.utils.data import default_collate

from attg.cli import Parser, end
from attg.datasets import open_data
from attg.figures import denormalize, reconstruct
from attg.files import require
from attg.loader import to_device
from attg.maps import open_maps
from attg.seeding import generator_for
from attg_mae import (
    MAE,
    Config,
    flip_and_normalize,
    load_checkpoint,
    mask_noise,
    pool_maps,
)
from docs.drawing import Panel, enlarge, save_panels

TAU = 0.75  # of the first training step, where guidance is strongest
CELL = 128  # px, height of a picture in the figure


def load_model(path):
    """The MAE of a run's last.pt, in eval mode."""
    parts = load_checkpoint(path)
    # encoder.pt, which has no decoder, has no step either.
    require("step" in parts, f"{path}: give the last.pt of a run of attg_mae.py")
    model = MAE(Config(**parts["config"]))
    model.load_state_dict(parts["model"])
    return model.eval()


def evenly_spaced(number, count):
    """`count` of the indices 0 .. number - 1, from the first to the last."""
    return torch.linspace(0, number - 1, min(count, number)).long().tolist()


def draw_rows(batch, vanilla, guided):
    """A row of Panels for each picture of a Batch; the first row has the titles."""
    cfg = guided.cfg
    imgs, noise = flip_and_normalize(batch, cfg), batch.noise
    m_norm = pool_maps(batch.maps, batch.box, batch.flip, cfg.grid)
    weight = torch.exp(m_norm / TAU).view(-1, *cfg.grid)
    # The grey scale is that of all pictures: w is largest where M is 1.
    largest = math.exp(1 / TAU)
    brightness = (weight - 1) / (largest - 1)
    # One cell a pixel: the map as it is, cut like the picture.
    maps = pool_maps(batch.maps, batch.box, batch.flip, cfg.size).view(-1, *cfg.size)
    masked, by_vanilla = reconstruct(vanilla, imgs, noise)
    _, by_guided = reconstruct(guided, imgs, noise)

    number = math.prod(cfg.grid)
    hidden = number - int(number * (1 - cfg.mask_ratio))
    columns = [
        ("picture", "", denormalize(imgs, cfg)),
        ("map M", "0 black, 1 white", maps),
        ("w = exp(M / tau)", f"tau {TAU}: 1 to {largest:.2f}", brightness),
        ("masked", f"{hidden} of {number} hidden", masked),
        ("vanilla MAE", "each patch counts 1", by_vanilla),
        ("guided", "each patch counts w", by_guided),
    ]
    rows = []
    for i in range(len(imgs)):
        row = []
        for title, note, images in columns:
            picture = enlarge(images[i], CELL)
            if i > 0:
                title, note = "", ""
            row.append(Panel(picture, title, note))
        rows.append(row)
    return rows


@torch.no_grad()
def main(argv=None):
    parser = Parser(prog="python -m docs.idea", description=__doc__)
    add = parser.add_argument
    add("--vanilla", required=True, help="last.pt of a run with --guidance none")
    add("--guided", required=True, help="last.pt of a guided run")
    add("--out", default="assets/idea.png", help="the figure [%(default)s]")
    add("--data", help="as attg_mae.py's [that of the guided run]")
    add("--maps", help="maps of these pictures, .npy beside its .json [toy's own]")
    add("--split", default="test", help="train or test [%(default)s]")
    add("--count", type=int, default=3, help="pictures [%(default)s]")
    args = parser.parse_args(argv)

    vanilla, guided = load_model(args.vanilla), load_model(args.guided)
    cfg = guided.cfg
    same = (vanilla.cfg.size, vanilla.cfg.grid) == (cfg.size, cfg.grid)
    require(same, f"--vanilla {args.vanilla}: other sizes than {args.guided}")

    require(args.count > 0, f"--count {args.count}: must be above 0")
    data = args.data or cfg.data
    dataset = open_data(data, args.split, cfg.size, channels=cfg.in_chans)
    require(dataset is not None, f"--split {args.split}: --data {data} has none")
    maps = open_maps(args.maps, dataset, data)

    indices = evenly_spaced(len(dataset), args.count)
    sample = default_collate([dataset[i] for i in indices])
    # The same noise, so the same hidden patches, for both models.
    generator = generator_for("masks", cfg.seed, 0)
    noise = mask_noise(len(indices), cfg.grid, generator)
    batch = next(to_device([sample], maps, torch.device("cpu")))._replace(noise=noise)
    save_panels(args.out, draw_rows(batch, vanilla, guided))
    print(f"{args.out}: pictures {indices} of {data}, {args.split}")


if __name__ == "__main__":
    end(main)
