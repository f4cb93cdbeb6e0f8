"""
One training step with one picture, value by value; docs/walkthrough.md tells it.

    python -m docs.walkthrough                                      # untrained weights
    python attg_mae.py                                              # trains, some minutes
    python -m docs.walkthrough --checkpoint out/toy-vit_micro-attg/last.pt

It is the first picture of the first step of `python attg_mae.py`: its crop, its noise and
its tau. Prints the numbers and draws the panels. The values come from the functions that
train; only the lines of masked_loss are repeated here, to show what they add up.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

from types import SimpleNamespace

import torch
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import Parser, end
from attg.datasets import open_data
from attg.figures import denormalize
from attg.files import require
from attg.loader import ResumableBatchSampler, to_device
from attg.seeding import generator_for, seed_for
from attg_mae import (
    MAE,
    Config,
    crop_maps,
    flip_and_normalize,
    mask_noise,
    resolve,
    tau_at,
)
from docs.drawing import (
    Panel,
    draw_frame,
    draw_grid,
    enlarge,
    save_panels,
    write_in_cells,
)
from docs.idea import load_model

SIDE = 256  # px of a panel: 32 px a patch


def build(checkpoint):
    """The model of a last.pt, or the one that `python attg_mae.py` starts from."""
    if checkpoint is None:
        cfg = resolve(Config())
        torch.manual_seed(seed_for("weights", cfg.seed))
        return MAE(cfg)
    model = load_model(checkpoint)
    # The panels and the lines of take_step are made for the default run.
    usual = Config()
    for name in ("data", "guidance", "grid", "norm_pix"):
        value, expected = getattr(model.cfg, name), getattr(usual, name)
        words = f"--checkpoint {checkpoint}: its {name} is {value}, must be {expected}"
        require(value == expected, words)
    return model


def first_batch(dataset, total_steps, cfg):
    """The Batch of a run's first step, of which the first picture alone is kept."""
    batches = ResumableBatchSampler(
        len(dataset), cfg.batch_size, 0, total_steps, cfg.seed
    )
    # A key is (epoch, index): the random crop is a function of both.
    key = next(iter(batches))[0]
    sample = default_collate([dataset[key]])
    # The noise of a step is drawn for its whole batch; a picture has a row of it.
    generator = generator_for("masks", cfg.seed, 0)
    noise = mask_noise(cfg.batch_size, cfg.grid, generator)[:1]
    batch = next(to_device([sample], dataset.masks, torch.device("cpu")))
    return key[1], batch._replace(noise=noise)


@torch.no_grad()
def take_step(model, batch, tau):
    """What MAE.forward and masked_loss compute, each value by its name.

    All are of a batch of one, in the shapes of attg_mae.py. There is no backward pass.
    """
    cfg, step = model.cfg, SimpleNamespace()
    step.imgs, step.noise = flip_and_normalize(batch, cfg), batch.noise
    step.m_norm, _ = crop_maps(batch.maps, batch.box, batch.flip, cfg)
    step.patches = model.patchify(step.imgs)
    step.ids_keep, step.mask = model.random_masking(step.noise, cfg.mask_ratio)
    latent = model.forward_encoder(step.patches, step.ids_keep)
    step.pred = model.forward_decoder(latent, step.ids_keep)

    # The lines of masked_loss. With norm_pix the target is not the pixels but each patch
    # with mean 0 and deviation 1: its structure, whatever its brightness.
    variance, mean = torch.var_mean(step.patches, dim=-1, keepdim=True)
    step.x_norm = (step.patches - mean) / (variance + 1e-6).sqrt()
    step.error = (step.pred - step.x_norm).square().mean(dim=-1)  # (1, L)
    step.weight = torch.exp(step.m_norm / tau)
    step.plain = step.mask * step.error
    step.product = step.mask * step.weight * step.error
    step.loss = step.product.sum() / step.mask.sum()
    step.vanilla_loss = step.plain.sum() / step.mask.sum()

    # The model's own forward: the loss of Eq. 2, and MAE's where there is no map.
    options = {"tau": tau, "mask_ratio": cfg.mask_ratio, "noise": step.noise}
    step.forward_loss, _, _ = model(step.imgs, weight=step.weight, **options)
    step.forward_vanilla, _, _ = model(step.imgs, None, **options)
    torch.testing.assert_close(step.loss, step.forward_loss)
    torch.testing.assert_close(step.vanilla_loss, step.forward_vanilla)
    return step


def print_numbers(step, cfg, tau, total_steps):
    """The numbers that docs/walkthrough.md quotes."""
    L, P = step.patches.shape[1:]
    K = step.ids_keep.shape[1]
    hidden = step.mask.sum().item()
    total, plain = step.product.sum().item(), step.plain.sum().item()
    halfway = tau_at(total_steps / 2, total_steps, cfg)
    end = tau_at(total_steps, total_steps, cfg)
    print(f"patches            L = {L}, of P = {P} values")
    print(f"visible            K = {K}: {step.ids_keep[0].tolist()}")
    print(f"tokens             encoder {1 + K}, decoder {1 + L}")
    print(f"tau                {tau:.3f}, half-way {halfway:.3f}, at the end {end:.3f}")
    print(f"M_norm             {spread(step.m_norm)}")
    print(f"w                  {spread(step.weight)}")
    print(f"l                  {spread(step.error)}")
    print(f"sum(mask)          {hidden:.0f}")
    print(f"sum(mask * w * l)  {total:.4f}")
    print(f"loss               {step.loss:.6f}, MAE.forward's {step.forward_loss:.6f}")
    print(f"sum(mask * l)      {plain:.4f}")
    print(
        f"vanilla loss       {step.vanilla_loss:.6f}, "
        f"MAE.forward's {step.forward_vanilla:.6f}"
    )

    # How much more the object counts, which is what the method is about.
    on_object = step.m_norm > 0.5
    counted = (on_object & step.mask.bool()).sum().item()
    share = step.product[on_object].sum().item() / total
    plain_share = step.plain[on_object].sum().item() / plain
    print(
        f"M_norm > 0.5       {counted} of the {hidden:.0f} hidden patches: "
        f"{share:.0%} of the loss, {plain_share:.0%} of the vanilla loss"
    )


def spread(values):
    return f"{values.min():.2f} to {values.max():.2f}"


def shade(values, grid, largest, form=None):
    """A panel of patch values (1, L): black is 0, white is `largest`.

    form, such as ".2f", writes each value in its cell.
    """
    picture = enlarge(values.view(grid) / largest, SIDE)
    if form:
        texts = [format(value, form) for value in values.flatten().tolist()]
        write_in_cells(picture, grid, texts)
    return picture


def in_patches(imgs, grid, texts):
    """A panel of imgs (1, 3, H, W) in [0, 1], cut in patches with a text in each."""
    picture = enlarge(imgs[0], SIDE)
    draw_grid(picture, grid)
    write_in_cells(picture, grid, texts)
    return picture


def inputs(step, batch, picture, cfg):
    """First row: the picture, its map, the crop that the model gets."""
    # Fractions of width and height, so the same box cuts a map of any resolution.
    box = batch.box[0].tolist()
    whole = enlarge(pil_to_tensor(picture) / 255, SIDE)
    draw_frame(whole, box)
    whole_map = enlarge(batch.maps[0], SIDE)
    draw_frame(whole_map, box)
    numbers = [str(i) for i in range(step.mask.shape[1])]
    crop = in_patches(denormalize(step.imgs, cfg), cfg.grid, numbers)
    then = "the crop, enlarged"
    if batch.flip.item():
        then += " and flipped"
    return [
        Panel(whole, "1  picture", "32 x 32 px; red: the random crop"),
        Panel(whole_map, "2  map M", "of the whole picture, 0 to 1"),
        Panel(crop, "3  patches", f"{then}; 64 patches"),
    ]


def masking(step, model):
    """Second row: who is hidden."""
    cfg, hidden = model.cfg, step.mask[..., None].bool()
    noise = shade(step.noise, cfg.grid, 1, ".2f")
    seen = model.unpatchify(step.patches.masked_fill(hidden, 0.0))
    kept = set(step.ids_keep[0].tolist())
    numbers = [str(i) if i in kept else "" for i in range(step.mask.shape[1])]
    visible = in_patches(denormalize(seen, cfg), cfg.grid, numbers)
    mask = shade(step.mask, cfg.grid, 1, ".0f")
    return [
        Panel(noise, "4  noise", "a random number for each patch"),
        Panel(visible, "5  ids_keep", f"the {len(kept)} of lowest noise stay visible"),
        Panel(mask, "6  mask", "1 = hidden = predicted"),
    ]


def predicting(step, model):
    """Third row: the target, the prediction, the error."""
    # Normalized values are mostly within 2.5 of 0.
    x_norm = 0.5 + model.unpatchify(step.x_norm) / 5
    pred = 0.5 + model.unpatchify(step.pred) / 5
    error = shade(step.error, model.cfg.grid, step.error.max(), ".2f")
    return [
        Panel(
            enlarge(x_norm[0], SIDE),
            "7  x_norm",
            "each patch by its mean, deviation",
        ),
        Panel(enlarge(pred[0], SIDE), "8  pred", "what the model says, all patches"),
        Panel(error, "9  l", "mean of (pred - x_norm)^2 in a patch"),
    ]


def weighting(step, tau, grid):
    """Last row: from the map to the loss."""
    m_norm = shade(step.m_norm, grid, 1, ".2f")
    weight = shade(step.weight, grid, step.weight.max(), ".2f")
    product = shade(step.product, grid, step.product.max(), ".2f")
    total, hidden = step.product.sum().item(), step.mask.sum().item()
    sums = f"sum {total:.2f} / {hidden:.0f} hidden = loss {step.loss:.3f}"
    return [
        Panel(m_norm, "10  M_norm", "mean of the map under each patch"),
        Panel(weight, f"11  w = exp(M_norm / {tau:g})", "Eq. 1"),
        Panel(product, "12  mask * w * l", sums),
    ]


def main(argv=None):
    parser = Parser(prog="python -m docs.walkthrough", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", help="last.pt of `python attg_mae.py` [untrained weights]")
    add("--out", default="docs/walkthrough.png", help="the figure [%(default)s]")
    args = parser.parse_args(argv)

    model = build(args.checkpoint)
    cfg = model.cfg
    dataset = open_data(cfg.data, "train", cfg.size, augment=True, seed=cfg.seed)
    total_steps = cfg.epochs * (len(dataset) // cfg.batch_size)
    index, batch = first_batch(dataset, total_steps, cfg)
    tau = tau_at(0, total_steps, cfg)
    step = take_step(model, batch, tau)

    box = [round(x, 3) for x in batch.box[0].tolist()]
    print(f"picture            {index}, crop {box}, flip {batch.flip.item()}")
    print_numbers(step, cfg, tau, total_steps)
    picture, _ = dataset.read(index)
    rows = [
        inputs(step, batch, picture, cfg),
        masking(step, model),
        predicting(step, model),
        weighting(step, tau, cfg.grid),
    ]
    save_panels(args.out, rows)
    print(f"figure             {args.out}")


if __name__ == "__main__":
    end(main)
