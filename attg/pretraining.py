"""
Settings of a pre-training run that the method does not depend on: schedule, files,
evaluation. Defaults that follow other settings are resolved here, once, before a run.
"""

import contextlib
import copy
import dataclasses
import math
import statistics
from importlib.util import find_spec
from pathlib import Path

import torch

from attg.cli import DataFlags, RunFlags, WeightFlags, flag
from attg.files import in_fork

# Whether a resumed run may change a flag; see attg.cli.flag.
FIXED, FREE = {"resume": "fixed"}, {"resume": "free"}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclasses.dataclass(kw_only=True)
class TrainFlags(DataFlags, RunFlags, WeightFlags):
    """Training; epochs, batch size and lr by default follow the number of images."""

    # None stays None until `resolve`.
    epochs: int | None = flag(None, "passes over the data [8 to 800]", 0, 10**6)
    batch_size: int | None = flag(
        None, "images per step over all processes [64 to 4096]", 1, 10**7, **FIXED
    )
    blr: float | None = flag(None, "lr = blr * batch_size / 256 [by width]", 0, 1e38)
    lr: float | None = flag(None, "peak learning rate, instead of blr", 0, 1e38)
    warmup_epochs: float | None = flag(
        None, "warm-up epochs [40 for >= 400 epochs, else 5 %% of them]", 0, 1e6
    )
    precision: str = flag(
        "auto", "auto = CUDA: bf16 or else fp16", choices=PRECISIONS, **FREE
    )
    compile: bool = flag(False, "torch.compile the model", **FREE)
    seed: int = flag(
        0, "seed: weights, order, augmentation, masks", -(2**63), 2**63 - 1, **FIXED
    )
    out: str | None = flag(None, "run folder [out/DATA-MODEL-GUIDANCE]", **FREE)
    init: str | None = flag(None, "checkpoint to start from, ours or another project's")
    resume: str = flag(
        "auto", "auto = from OUT/last.pt, none = start over, or a checkpoint", **FREE
    )
    eval_every: int | None = flag(
        None,
        "epochs between evaluations [a quarter of all]; 0 = only at the end",
        0,
        10**6,
        **FREE,
    )
    save_every: int = flag(1, "epochs between checkpoints", 1, 10**6, **FREE)
    keep_ckpt_every: int = flag(
        0, "keep epochNNNN.pt every N epochs, 0 = only last.pt", 0, 10**6, **FREE
    )
    log_every: int = flag(20, "steps between log lines", 1, 10**9, **FREE)
    max_steps: int | None = flag(None, "stop after this many steps", 1, 10**9)
    tensorboard: bool = flag(False, "log for TensorBoard, too", **FREE)


def check_config(cfg):
    """ValueError if settings of a Config do not fit each other."""
    if len(cfg.size) != 2:
        raise ValueError(f"--img_size {cfg.size}: pass a side, or height and width")
    (h, w), p = cfg.size, cfg.patch_size
    if h % p or w % p:
        raise ValueError(
            f"--img_size {h}x{w} is not divisible by --patch_size {p}; use a multiple"
        )
    for part in ("", "decoder_"):
        width, heads = getattr(cfg, f"{part}width"), getattr(cfg, f"{part}heads")
        if width % heads or width % 4:
            raise ValueError(
                f"--{part}width {width}: must be divisible by 4 and by --{part}heads {heads}"
            )
    L = math.prod(cfg.grid)
    if not 0 < int(L * (1 - cfg.mask_ratio)) < L:
        raise ValueError(
            f"--mask_ratio {cfg.mask_ratio}: must keep and hide at least one of {L} patches"
        )


# Defaults of batch size, epochs and lr: MAE's from this many images on, else RULE. RULE
# was set on toy (10,000 images, vit_micro) and keeps the number of images seen; wider
# models need a lower lr. MAE's lr at width 1024 is 2.4e-3 for 4096 images per step.
MAE_IMAGES = 100_000
RULE = (
    "batch size 64 (less if an epoch had under 4 steps), 80,000 / images epochs (8 to "
    "800), lr 1.5e-3 * 128 / width at batch size 64"
)


def fit_size(dataset):
    """(image size, patch size) for vit_micro by the images; always 8 x 8 patches."""
    ids = torch.linspace(0, len(dataset) - 1, 9).long().tolist()

    def read_sides():
        sides = []
        for i in ids:
            with contextlib.suppress(Exception):  # unreadable, which training reports
                sides.append(min(dataset.read(i, 3)[0].size))
        return sides

    sides = in_fork(read_sides)
    return (64, 8) if sides and statistics.median(sides) >= 64 else (32, 4)


def resolve(cfg, dataset=None):
    """A copy of a Config in which the defaults of the run are filled in.

    dataset: the training set, ImageData; without it the defaults are those of toy.
    ValueError for flags that contradict each other.
    """
    for name in ("mean", "std"):
        values = getattr(cfg, name)
        if len(values) != cfg.in_chans:
            raise ValueError(
                f"--{name} {' '.join(map(str, values))}: needs a value for each of "
                f"--in_chans {cfg.in_chans}, such as --mean 0.449 --std 0.226 for gray"
            )
    if cfg.guidance == "none" and cfg.maps:
        raise ValueError(
            f"--maps {cfg.maps}: --guidance none uses no maps; leave out one of the two"
        )
    if cfg.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: needs pip install tensorboard")
    num_images = 10_000 if dataset is None else dataset.num_images
    epochs, batch_size, blr = 800, 4096, 1.5e-4
    if num_images < MAE_IMAGES:  # see RULE
        epochs = min(max(8, 80_000 // num_images), 800)
        quarter = max(1, num_images // 4)
        batch_size = min(64, 2 ** (quarter.bit_length() - 1))
        blr = 6e-3 * 128 / cfg.width
    if cfg.data == "toy" and cfg.model != "vit_micro":
        # Enlarged to 224 pixels, it only shows that everything runs.
        epochs = 1
    data = Path(cfg.data).resolve().name
    defaults = {
        "epochs": epochs,
        "batch_size": batch_size,
        "blr": blr if cfg.lr is None else None,
        "out": f"out/{data}-{cfg.model}-{cfg.guidance}",
    }
    cfg = copy.copy(cfg)
    small = cfg.model == "vit_micro" and cfg.data != "toy"
    unset = cfg.default_size and (cfg.img_size, cfg.patch_size) == (32, 4)
    if small and unset and dataset is not None:
        cfg.img_size, cfg.patch_size = fit_size(dataset)
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.precision == "auto":
        cfg.precision = "fp32"
        if torch.cuda.is_available() and "cuda" in (cfg.device or "cuda"):
            cfg.precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if cfg.warmup_epochs is None:
        epochs = cfg.epochs
        if cfg.max_steps:
            steps_per_epoch = max(1, num_images // cfg.batch_size)
            epochs = min(epochs, cfg.max_steps / steps_per_epoch)
        # MAE's 40 epochs do not depend on the length; a short run would be all warm-up.
        cfg.warmup_epochs = 40 if epochs >= 400 else 0.05 * epochs

    scale = cfg.batch_size / 256
    if cfg.lr is None:
        cfg.lr = cfg.blr * scale
    elif cfg.blr is not None and not math.isclose(cfg.lr, cfg.blr * scale):
        raise ValueError(f"--lr {cfg.lr}, --blr {cfg.blr}: do not agree; give one")
    cfg.blr = cfg.lr / scale
    return cfg
