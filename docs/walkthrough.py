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

import torch
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import flag, parse, run_cli
from attg.datasets import open_data
from attg.figures import denormalize, unpatchify
from attg.loader import ResumableBatchSampler
from attg.seeding import generator_for, seed_for
from attg_mae import (
    MAE,
    Config,
    crop_maps,
    mask_noise,
    model_inputs,
    patch_weights,
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
    for name in ("data", "guidance", "grid", "norm_pix"):
        value, default = getattr(model.cfg, name), getattr(cfg, name)
        if value != default:
            raise ValueError(
                f"--checkpoint {checkpoint}: its {name} is {value}, must be {default}"
            )
    return model


def first_image(dataset, total_steps, cfg):
    """(index, inputs of train_step with only the first image of the first step)."""
    batches = ResumableBatchSampler(
        len(dataset), cfg.batch_size, 0, total_steps, cfg.seed
    )
    # A key is (epoch, index): the random crop is a function of both.
    key = next(iter(batches))[0]
    sample = default_collate([dataset[key]])
    # The noise of a step is drawn for the whole batch; each image has a row of it.
    generator = generator_for("masks", cfg.seed, 0)
    noise = mask_noise(cfg.batch_size, cfg.grid, generator)[:1]
    maps = torch.from_numpy(dataset.masks[sample.index.numpy()]).float()
    batch = SimpleNamespace(**sample._asdict(), maps=maps, noise=noise)
    return key[1], batch


@torch.no_grad()
def take_step(model, batch, tau):
    """Intermediate values of MAE.forward and masked_loss by name, for a batch of one.

    The lines of masked_loss are repeated to show what they add up; AssertionError if the
    loss is not that of MAE.forward.
    """
    cfg, step = model.cfg, SimpleNamespace(noise=batch.noise)
    step.imgs, _, _ = model_inputs(batch, cfg, tau)
    step.m_norm, _ = crop_maps(batch.maps, batch.box, batch.flip, cfg)
    step.weight = patch_weights(step.m_norm, tau)
    step.patches = model.patchify(step.imgs)
    step.ids_keep, step.mask = model.random_masking(step.noise, cfg.mask_ratio)
    latent = model.forward_encoder(step.patches, step.ids_keep)
    step.pred = model.forward_decoder(latent, step.ids_keep)

    variance, mean = torch.var_mean(step.patches, dim=-1, keepdim=True)
    step.x_norm = (step.patches - mean) / (variance + 1e-6).sqrt()
    step.error = (step.pred - step.x_norm).square().mean(dim=-1)  # (1, L)
    step.plain = step.mask * step.error
    step.product = step.mask * step.weight * step.error
    step.loss = step.product.sum() / step.mask.sum()
    step.mse = step.plain.sum() / step.mask.sum()
    loss, _, _, mse = model(
        step.imgs, noise=step.noise, weight=step.weight, return_mse=True
    )
    torch.testing.assert_close(step.loss, loss)
    torch.testing.assert_close(step.mse, mse)
    return step


def print_numbers(step, cfg, tau, total_steps):
    """Print the numbers that docs/walkthrough.md quotes."""

    def limits(values):
        return f"{values.min():.2f} to {values.max():.2f}"

    L, P = step.patches.shape[1:]
    K = step.ids_keep.shape[1]
    hidden, total = step.mask.sum().item(), step.product.sum().item()
    halfway, end = (tau_at(total_steps * x, total_steps, cfg) for x in (0.5, 1))
    print(f"patches            L = {L}, of P = {P} values")
    print(f"visible            K = {K}: {step.ids_keep[0].tolist()}")
    print(f"tokens             encoder {1 + K}, decoder {1 + L}")
    print(f"tau                {tau:.3f}, half-way {halfway:.3f}, at the end {end:.3f}")
    print(f"M_norm             {limits(step.m_norm)}")
    print(f"w                  {limits(step.weight)}")
    print(f"l                  {limits(step.error)}")
    print(f"sum(mask)          {hidden:.0f}")
    print(f"sum(mask * w * l)  {total:.4f}")
    print(f"loss               {step.loss:.6f}")
    print(f"sum(mask * l)      {step.plain.sum():.4f}")
    print(f"vanilla loss       {step.mse:.6f}")
    # How much more the object counts, which is the point of the method.
    on_object = step.m_norm > 0.5
    counted = (on_object & step.mask.bool()).sum().item()
    share = step.product[on_object].sum().item() / total
    plain_share = (step.plain[on_object].sum() / step.plain.sum()).item()
    print(
        f"M_norm > 0.5       {counted} of the {hidden:.0f} hidden patches: "
        f"{share:.0%} of the loss, {plain_share:.0%} of the vanilla loss"
    )


def draw(path, step, batch, image, model, tau):
    """Draw twelve panels: inputs, masking, prediction, weighting."""
    cfg, grid = model.cfg, model.cfg.grid
    numbers = [str(i) for i in range(step.mask.shape[1])]
    kept = set(step.ids_keep[0].tolist())
    visible = unpatchify(step.patches * (1 - step.mask[..., None]), cfg)
    box = batch.box[0].tolist()
    total, hidden = step.product.sum().item(), step.mask.sum().item()

    def values(x, title, note, form=".2f", largest=None):
        texts = [format(value, form) for value in x.flatten().tolist()]
        shades = x.view(grid) / (x.max() if largest is None else largest)
        return {"image": shades, "title": title, "note": note, "texts": texts}

    def picture(x, title, note, **more):
        return {"image": x, "title": title, "note": note, **more}

    panels = [
        picture(image, "1  image", "32 x 32 px; red: the random crop", frame=box),
        picture(batch.maps[0], "2  map M", "of the whole image, 0 to 1", frame=box),
        picture(
            denormalize(step.imgs, cfg)[0],
            "3  patches",
            "the crop, resized" + (" and flipped" if batch.flip.item() else ""),
            texts=numbers,
        ),
        values(step.noise, "4  noise", "a random number for each patch", largest=1),
        picture(
            denormalize(visible, cfg)[0],
            "5  ids_keep",
            f"the {len(kept)} with the lowest noise stay visible",
            texts=[x if int(x) in kept else "" for x in numbers],
        ),
        values(step.mask, "6  mask", "1 = hidden = predicted", ".0f"),
        # Normalized values are mostly within 2.5 of 0.
        picture(
            0.5 + unpatchify(step.x_norm, cfg)[0] / 5,
            "7  x_norm",
            "each patch by its mean and deviation",
        ),
        picture(0.5 + unpatchify(step.pred, cfg)[0] / 5, "8  pred", "of all patches"),
        values(step.error, "9  l", "mean of (pred - x_norm)^2 over a patch"),
        values(step.m_norm, "10  M_norm", "mean of the map over each patch", largest=1),
        values(step.weight, f"11  w = exp(M_norm / {tau:g})", "Eq. 1"),
        values(
            step.product,
            "12  mask * w * l",
            f"sum {total:.2f} / {hidden:.0f} hidden = loss {step.loss:.3f}",
        ),
    ]
    figure, axes = new_figure(4, 3)
    for one, panel in zip(axes.flat, panels, strict=True):
        draw_panel(one, grid=grid, **panel)
    figure.savefig(path, dpi=110)


def main(argv=None):
    settings = parse(Settings, __doc__, argv)
    model = open_model(settings.checkpoint)
    cfg = model.cfg
    dataset = open_data(cfg.data, "train", cfg.size, augment=True, seed=cfg.seed)
    total_steps = cfg.epochs * (len(dataset) // cfg.batch_size)
    index, batch = first_image(dataset, total_steps, cfg)
    tau = tau_at(0, total_steps, cfg)
    step = take_step(model, batch, tau)
    box = [round(x, 3) for x in batch.box[0].tolist()]
    print(f"image              {index}, crop {box}, flip {batch.flip.item()}")
    print_numbers(step, cfg, tau, total_steps)
    image, _ = dataset.read(index)
    image = pil_to_tensor(image) / 255
    draw(settings.out, step, batch, image, model, tau)
    print(f"figure             {settings.out}")


if __name__ == "__main__":
    run_cli(main)
