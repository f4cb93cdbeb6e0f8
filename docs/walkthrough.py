"""
One training step with one image, value by value; docs/walkthrough.md explains it.

    python -m docs.walkthrough                                      # untrained weights
    python attg_mae.py                                              # trains, in minutes
    python -m docs.walkthrough out/toy-vit_micro-attg/last.pt

It is the first image of the first step of `python attg_mae.py`: its crop, its noise and
its tau. Prints the numbers and draws the panels.
"""

import math
import sys
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torchvision.transforms.functional import pil_to_tensor

from attg.datasets import open_data
from attg.figures import denormalize, unpatchify
from attg.loader import Batch, BatchIterator
from attg_mae import (
    MAE,
    Config,
    crop_maps,
    load_checkpoint,
    masked_loss,
    model_inputs,
    resolve,
    tau_at,
)


def first_image(dataset, cfg):
    """(index, Batch) of the first image of the first step."""
    run = SimpleNamespace(cfg=cfg, train_set=dataset, maps=dataset.masks, workers=0)
    run.device, run.rank, run.world, run.total_steps = torch.device("cpu"), 0, 1, 1
    loader = BatchIterator(run, 0, math.prod(cfg.grid))
    batch = next(iter(loader))
    one = [None if x is None else x[:1] for x in batch]
    return loader.sampler.indices(0)[0].item(), Batch(*one)


@torch.no_grad()
def main(checkpoint=None, out="docs/walkthrough.png"):
    """Print and draw the step. checkpoint: last.pt of `python attg_mae.py`."""
    cfg = resolve(Config())
    model = MAE(cfg)
    if checkpoint:
        model.load_state_dict(load_checkpoint(checkpoint)["model"])
    dataset = open_data(cfg.data, "train", cfg.size, augment=True, seed=cfg.seed)
    index, batch = first_image(dataset, cfg)
    half, end = tau_at(1, 2, cfg), tau_at(1, 1, cfg)
    print(
        f"tau                {cfg.tau:.3f}, half-way {half:.3f}, at the end {end:.3f}"
    )

    # The step, as in MAE.forward and masked_loss.
    imgs, weight, noise = model_inputs(batch, cfg, cfg.tau)
    m_norm, _ = crop_maps(batch.maps, batch.box, batch.flip, cfg)
    patches = model.patchify(imgs)
    _, mask = model.random_masking(noise, cfg.mask_ratio)
    _, pred, _ = model(imgs, noise=noise)
    loss, mse = masked_loss(pred, patches, mask, weight)

    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    x_norm = (patches - mean) / (var + 1e-6).sqrt()
    error = (pred - x_norm).square().mean(dim=-1)  # l, (1, L)
    plain, product = mask * error, mask * weight * error
    torch.testing.assert_close(product.sum() / mask.sum(), loss)
    torch.testing.assert_close(plain.sum() / mask.sum(), mse)

    for name, x in {"m_norm": m_norm, "weight": weight, "error": error}.items():
        print(f"{name:18} {x.min():.2f} to {x.max():.2f}")
    print(f"sum(mask)          {mask.sum():.0f}")
    print(f"sum(mask * w * l)  {product.sum():.4f}, loss {loss:.6f}")
    print(f"sum(mask * l)      {plain.sum():.4f}, vanilla loss {mse:.6f}")
    # How much more the object counts, which is the point of the method.
    on_object = m_norm > 0.5
    guided, vanilla = (x[on_object].sum() / x.sum() for x in (product, plain))
    print(
        f"M_norm > 0.5       {mask[on_object].sum():.0f} masked patches: "
        f"{guided:.0%} of the loss, {vanilla:.0%} of the vanilla loss"
    )

    image = pil_to_tensor(dataset.read(index)[0]) / 255
    whole_map = batch.maps.float().expand(3, -1, -1)
    shown = unpatchify(patches * (1 - mask[..., None]), cfg)
    total = f"sum {product.sum():.2f} / {mask.sum():.0f} masked = loss {loss:.3f}"
    # Title, note, image (3, h, w) or value of each patch, and what is written into it.
    panels = [
        ("image", "32 x 32 px; red: the random crop", image, ""),
        ("map M", "of the whole image, 0 to 1", whole_map, ""),
        ("patches", "the crop, resized and flipped", denormalize(imgs, cfg)[0], "i"),
        ("noise", "a random number for each patch", noise, ".2f"),
        ("ids_keep", "the 16 of lowest noise", denormalize(shown, cfg)[0], "i"),
        ("mask", "1 = masked = predicted", mask, ".0f"),
        # Normalized values are mostly within 2.5 of 0.
        ("x_norm", "by mean and std", 0.5 + unpatchify(x_norm, cfg)[0] / 5, ""),
        ("pred", "of all patches", 0.5 + unpatchify(pred, cfg)[0] / 5, ""),
        ("l", "mean of (pred - x_norm)^2 over a patch", error, ".2f"),
        ("M_norm", "mean of the map over each patch", m_norm, ".2f"),
        (f"w = exp(M_norm / {cfg.tau:g})", "Eq. 1", weight, ".2f"),
        ("mask * w * l", total, product, ".2f"),
    ]
    draw(panels, cfg.grid, batch.box[0].tolist()).savefig(out, dpi=110)


def draw(panels, grid, box):
    """Figure of the panels. box: the crop, drawn into the first two."""
    (h, w), (x0, y0, x1, y1) = grid, box
    corner, size = (x0 * w, y0 * h), ((x1 - x0) * w, (y1 - y0) * h)
    style = {"ha": "center", "va": "center", "fontsize": 7}
    style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
    figure = Figure((8.5, 12.5), layout="constrained")
    for number, (title, note, x, spec) in enumerate(panels, start=1):
        axes = figure.add_subplot(4, 3, number)
        axes.set_axis_off()
        axes.set_title(f"{number}  {title}\n{note}", fontsize=9, loc="left")
        # Coordinates are patches, whatever the resolution.
        extent = (0, w, h, 0)
        if len(x) == 1:
            values = x.view(grid).numpy()
            axes.imshow(values, "Oranges", vmax=1.5 * values.max(), extent=extent)
        else:
            axes.imshow(x.clamp(0, 1).movedim(0, -1).numpy(), extent=extent)
        for i in range(h * w if spec else 0):
            text = i if spec == "i" else format(x[0, i].item(), spec)
            axes.text(i % w + 0.5, i // w + 0.5, text, **style)
        if number < 3:
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="red"))
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
