"""
Pictures of what a model predicts, and of how a run went.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from common.files import save_sheet


@torch.no_grad()
def reconstruct(model, imgs, noise):
    """Normalised imgs (B, C, H, W) -> two of them in [0, 1]: masked, and completed.

    noise (B, L) decides the mask; the visible patches are pasted in. Normalised
    predictions get the mean and deviation of the true patch, which the model does not
    know: the pictures look better than it is.
    """
    cfg = model.cfg
    # forward, past torch.compile, which would compile anew for this batch.
    _, pred, mask = model.forward(imgs, mask_ratio=cfg.mask_ratio, noise=noise)
    patches = model.patchify(imgs)
    if cfg.norm_pix:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask[..., None].bool()
    masked = model.unpatchify(patches.masked_fill(hidden, 0.0))
    completed = model.unpatchify(torch.where(hidden, pred, patches))
    return denormalize(masked, cfg), denormalize(completed, cfg)


def denormalize(imgs, cfg):
    """Normalised imgs (B, C, H, W) -> [0, 1]."""
    mean = torch.tensor(cfg.mean, device=imgs.device).view(-1, 1, 1)
    std = torch.tensor(cfg.std, device=imgs.device).view(-1, 1, 1)
    return (imgs * std + mean).clamp(0, 1)


def save_reconstructions(path, model, imgs, m_norm, noise):
    """A sheet: original | map | masked | reconstruction. m_norm (B, L) or None."""
    cfg = model.cfg
    masked, completed = reconstruct(model, imgs, noise)
    columns = [("original", denormalize(imgs, cfg))]
    if m_norm is not None:
        shown = F.interpolate(m_norm.view(-1, 1, *cfg.grid), cfg.size)
        columns.append(("map", shown.expand(-1, 3, -1, -1)))
    title = "reconstruction"
    if cfg.norm_pix:
        title += " (true patch mean, std)"
    columns += [("masked", masked), (title, completed)]
    save_sheet(path, columns)


def can_draw_curves():
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_curves(path, records):
    """Draws the lines of a log.jsonl, dicts, over the steps: a panel for each unit."""
    # Not pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    panels = {
        "reconstruction": ("loss", "mse", "mse_test"),
        "k-NN on the test split, %": ("knn",),
        "learning rate": ("lr",),
        "temperature": ("tau",),
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    all_axes = figure.subplots(2, 2).flat
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        for name in names:
            for label, points in curves(records, name).items():
                steps, values = zip(*points, strict=True)
                # Single points would not be seen.
                marker = "." if len(steps) < 30 else None
                axes.plot(steps, values, label=label, marker=marker)
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100)


def curves(records, name):
    """{label: [(step, value), ...]} of what the log tells by this name."""
    points = {}
    for record in records:
        values = {name: record.get(name)}
        if name == "knn":
            values = record.get(name, {})
        for label, value in values.items():
            if value is not None:
                label = label.replace("_", " ") if name == "knn" else label
                points.setdefault(label, []).append((record["step"], value))
    return points
