"""
One training step with one image, value by value; docs/walkthrough.md explains it.

    python -m docs.walkthrough                                      # untrained weights
    python attg_mae.py                                              # trains, in minutes
    python -m docs.walkthrough --checkpoint out/toy-vit_micro-attg/last.pt

It is the first image of the first step of `python attg_mae.py`: its crop, its noise and
its tau. Prints the numbers and draws the panels.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import flag, parse, run_cli
from attg.datasets import open_data
from attg.figures import denormalize, unpatchify
from attg.images import generator_for, seed_for
from attg.loader import ResumableBatchSampler
from attg_mae import (
    MAE,
    Config,
    crop_maps,
    mask_noise,
    model_inputs,
    resolve,
    tau_at,
)
from docs.drawing import draw_panel, load_model, new_figure


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of the figure."""

    checkpoint: str | None = flag(None, "last.pt of `python attg_mae.py` [untrained]")
    out: str = flag("docs/walkthrough.png", "the figure")


def open_model(checkpoint):
    """The model of a last.pt, or the one that `python attg_mae.py` starts from."""
    cfg = resolve(Config())
    if checkpoint is None:
        torch.manual_seed(seed_for("weights", cfg.seed))
        return MAE(cfg)
    model = load_model(checkpoint)
    # The texts of the panels describe this run; the toy set brings its maps.
    if (model.cfg.data, model.cfg.guidance) != (cfg.data, cfg.guidance):
        raise ValueError(f"--checkpoint {checkpoint}: not of `python attg_mae.py`")
    return model


def first_image(dataset, cfg):
    """(index, inputs of train_step with only the first image of the first step)."""
    batches = ResumableBatchSampler(len(dataset), cfg.batch_size, 0, 1, cfg.seed)
    # A key is (epoch, index): the random crop is a function of both.
    key = next(iter(batches))[0]
    sample = default_collate([dataset[key]])
    # The noise of a step is drawn for the whole batch; each image has a row of it.
    generator = generator_for("masks", cfg.seed, 0)
    noise = mask_noise(cfg.batch_size, cfg.grid, generator)[:1]
    maps = torch.from_numpy(dataset.masks[sample.index.numpy()]).float()
    batch = SimpleNamespace(**sample._asdict(), maps=maps, noise=noise, ties=None)
    return key[1], batch


@torch.no_grad()
def take_step(model, batch, tau):
    """Intermediate values of MAE.forward and masked_loss by name, for a batch of one.

    AssertionError if they do not add up to the loss of MAE.forward.
    """
    cfg, step = model.cfg, SimpleNamespace(noise=batch.noise)
    step.imgs, step.weight, _ = model_inputs(batch, cfg, tau)
    step.m_norm, _ = crop_maps(batch.maps, batch.box, batch.flip, cfg)
    step.patches = model.patchify(step.imgs)
    step.ids_keep, step.mask = model.random_masking(step.noise, cfg.mask_ratio)
    options = {"noise": step.noise, "weight": step.weight, "return_mse": True}
    loss, step.pred, _, mse = model(step.imgs, **options)

    variance, mean = torch.var_mean(step.patches, dim=-1, keepdim=True)
    step.x_norm = (step.patches - mean) / (variance + 1e-6).sqrt()
    step.error = (step.pred - step.x_norm).square().mean(dim=-1)  # (1, L)
    step.plain = step.mask * step.error
    step.product = step.mask * step.weight * step.error
    hidden = step.mask.sum()
    torch.testing.assert_close(step.product.sum() / hidden, loss)
    torch.testing.assert_close(step.plain.sum() / hidden, mse)
    return step


def print_numbers(step, cfg, tau, total_steps):
    """Print the numbers that docs/walkthrough.md quotes."""
    L, P = step.patches.shape[1:]
    visible = step.ids_keep[0].tolist()
    hidden, total, plain = step.mask.sum(), step.product.sum(), step.plain.sum()
    halfway, end = (tau_at(total_steps * x, total_steps, cfg) for x in (0.5, 1))
    print(f"patches            L = {L}, of P = {P} values")
    print(f"visible            K = {len(visible)}: {visible}")
    print(f"tau                {tau:.3f}, half-way {halfway:.3f}, at the end {end:.3f}")
    for name in ("m_norm", "weight", "error"):
        values = getattr(step, name)
        print(f"{name:18} {values.min():.2f} to {values.max():.2f}")
    print(f"sum(mask)          {hidden:.0f}")
    print(f"sum(mask * w * l)  {total:.4f}, loss {total / hidden:.6f}")
    print(f"sum(mask * l)      {plain:.4f}, vanilla loss {plain / hidden:.6f}")
    # How much more the object counts, which is the point of the method.
    on_object = step.m_norm > 0.5
    counted = (on_object & step.mask.bool()).sum()
    guided, vanilla = (x[on_object].sum() / x.sum() for x in (step.product, step.plain))
    print(
        f"M_norm > 0.5       {counted} of the {hidden:.0f} hidden patches: "
        f"{guided:.0%} of the loss, {vanilla:.0%} of the vanilla loss"
    )


def draw(path, step, batch, image, model, tau):
    """Draw twelve panels: inputs, masking, prediction, weighting."""
    cfg, box = model.cfg, batch.box[0].tolist()
    shown = unpatchify(step.patches * (1 - step.mask[..., None]), cfg)
    crop, visible = denormalize(step.imgs, cfg)[0], denormalize(shown, cfg)[0]
    # Normalized values are mostly within 2.5 of 0.
    x_norm, pred = (0.5 + unpatchify(x, cfg)[0] / 5 for x in (step.x_norm, step.pred))
    flipped = " and flipped" if batch.flip.item() else ""
    total, hidden = step.product.sum(), step.mask.sum()
    total = f"sum {total:.2f} / {hidden:.0f} hidden = loss {total / hidden:.3f}"
    numbers = np.arange(step.mask.shape[1]).astype(str)
    kept = np.where(step.mask[0] > 0, "", numbers)
    # Title, note, an image or a value for each patch, what is written into the patches.
    panels = [
        ("image", "32 x 32 px; red: the random crop", image, None),
        ("map M", "of the whole image, 0 to 1", batch.maps[0], None),
        ("patches", f"the crop, resized{flipped}", crop, numbers),
        ("noise", "a random number for each patch", step.noise, ".2f"),
        ("ids_keep", f"the {step.ids_keep.shape[1]} of lowest noise", visible, kept),
        ("mask", "1 = hidden = predicted", step.mask, ".0f"),
        ("x_norm", "by mean and deviation", x_norm, None),
        ("pred", "of all patches", pred, None),
        ("l", "mean of (pred - x_norm)^2 over a patch", step.error, ".2f"),
        ("M_norm", "mean of the map over each patch", step.m_norm, ".2f"),
        (f"w = exp(M_norm / {tau:g})", "Eq. 1", step.weight, ".2f"),
        ("mask * w * l", total, step.product, ".2f"),
    ]
    figure, axes = new_figure(4, 3)
    for number, (title, note, x, texts) in enumerate(panels, start=1):
        if isinstance(texts, str):
            texts = np.array([format(value, texts) for value in x.flatten().tolist()])
            x = x.view(cfg.grid) / x.max()
        if texts is not None:
            texts = texts.reshape(cfg.grid)
        frame = box if number < 3 else None
        panel = axes.flat[number - 1]
        draw_panel(panel, x, f"{number}  {title}", note, texts, frame)
    figure.savefig(path, dpi=110)


def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    model = open_model(settings.checkpoint)
    cfg = model.cfg
    dataset = open_data(cfg.data, "train", cfg.size, augment=True, seed=cfg.seed)
    total_steps = cfg.epochs * (len(dataset) // cfg.batch_size)
    index, batch = first_image(dataset, cfg)
    tau = tau_at(0, total_steps, cfg)
    step = take_step(model, batch, tau)
    box = [round(x, 3) for x in batch.box[0].tolist()]
    print(f"image              {index}, crop {box}, flip {batch.flip.item()}")
    print_numbers(step, cfg, tau, total_steps)
    image = pil_to_tensor(dataset.read(index)[0]) / 255
    draw(settings.out, step, batch, image, model, tau)
    print(f"figure             {settings.out}")


if __name__ == "__main__":
    run_cli(main)
