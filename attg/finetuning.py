"""
Training and scoring of classifiers on images, for MAE's linear probe and fine-tuning.

A model here maps normalized images to logits (F, B, C), one row for each of F features
that it classifies by; model.normalize prepares uint8 images.

Shapes: n training images, B images, C classes, F features.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from attg.checkpoint import (
    load_checkpoint,
    load_optimizer,
    load_state,
    read_settings,
    save_checkpoint,
)
from attg.cli import flag, log_line, progress, resume_class
from attg.datasets import refuse_unreadable, shot_indices
from attg.evaluation import open_sets
from attg.files import sha256
from attg.images import seed_for, train_view
from attg.loader import ResumableBatchSampler, make_loader

# -- Settings --------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class RecipeFlags:
    """Training a classifier."""

    label_fraction: float = flag(1.0, "fraction of each class to train on", 1e-6, 1.0)
    seed: int = flag(
        0, "for --label_fraction, order, augmentation", -(2**63), 2**63 - 1
    )
    save: str | None = flag(
        None,
        "save the weights to this file after each epoch, or resume from it",
        resume="free",
    )
    epochs: int | None = flag(None, "[by the recipe above]", 1, 10**6)
    batch_size: int | None = flag(None, "[by the recipe above]", 1, 10**7)
    precision: str | None = flag(
        None, "[bf16 on GPUs that support it]", choices=("fp32", "bf16")
    )
    accum: int | None = flag(None, "micro-batches per step", 1, 10**7)
    blr: float | None = flag(None, "lr = blr * batch_size / 256", 0, 1e38)
    min_lr: float | None = flag(None, "lowest learning rate", 0, 1e38)
    warmup_epochs: float | None = flag(None, "[up to --epochs / 5]", 0, 1e6)
    weight_decay: float | None = flag(None, "[by the recipe above]", 0, 1e6)


def open_training(cfg, settings, data, recipes, micro_batch, dist_info, after=None):
    """(training set, {name: test set}, resolved settings) for an encoder's Config.

    recipes: {depth of the encoder: recipe}, with a default under None. after: a further
    augmentation of the random crops. For the rest see resolve.
    """
    device, _, world = dist_info
    seed = settings.seed
    view = functools.partial(train_view, scale=(0.08, 1.0), after=after)
    train_set, tests = open_sets(settings, data, cfg, augment=view, seed=seed)
    if settings.label_fraction < 1:
        rows = shot_indices(train_set.labels, settings.label_fraction, seed)
        train_set = train_set.subset(rows.sort().values)
    recipe = recipes.get(cfg.depth, recipes[None])
    settings = resolve(settings, recipe, len(train_set), micro_batch, device, world)
    return train_set, tests, settings


def resolve(settings, recipe, images, micro_batch, device, world):
    """Settings with defaults for the flags that were not given.

    recipe: {flag: MAE's value}. With few training images a batch is a tenth of them, with
    few epochs warm-up is a fifth. micro_batch: images per rank that need no accumulation.
    """

    def given(name, default):
        value = getattr(settings, name)
        return default if value is None else value

    epochs = given("epochs", recipe["epochs"])
    batch_size = given("batch_size", min(recipe["batch_size"], images // 10))
    accum = given("accum", max(1, batch_size // (micro_batch * world)))
    # All micro-batches of all ranks have the same size.
    parts = accum * world
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    defaults = recipe | {
        "warmup_epochs": min(recipe["warmup_epochs"], epochs / 5),
        "batch_size": max(1, batch_size // parts) * parts,
        "accum": accum,
        "precision": "bf16" if bf16 else "fp32",
    }
    values = {name: given(name, default) for name, default in defaults.items()}
    return dataclasses.replace(settings, **values)


# -- Training --------------------------------------------------------------------------


def fit(
    model, optimizer, train_set, settings, lr_at, dist_info, mix=None, smoothing=0.0
):
    """Train a model by cross-entropy, summed over its features.

    Resumes from the file settings.save if it exists, and writes it after each epoch.
    lr_at(step, total_steps, warmup_steps, lr): the schedule. dist_info: (device, rank,
    world). mix(imgs, labels, C) returns the images and targets to train on.
    """
    device, rank, world = dist_info
    epoch_steps = len(train_set) // settings.batch_size
    total_steps = settings.epochs * epoch_steps
    identity, start = None, 0
    if settings.save:
        identity = run_identity(settings)
        if Path(settings.save).exists():
            start = resume(settings.save, model, optimizer, identity, total_steps)
    if start > 0 and rank == 0:
        epoch = start // epoch_steps
        log_line(f"resuming {settings.save} after epoch {epoch} of {settings.epochs}")
    samples = micro_batches(train_set, settings, start, total_steps, dist_info)
    parallel = DistributedDataParallel(model) if world > 1 else model
    model.train()

    losses = []  # of this epoch, on the device
    steps = range(start, total_steps)
    hidden = {"disable": True} if rank != 0 else {}
    for step in progress(steps, initial=start, total=total_steps, **hidden):
        lr = set_lr(optimizer, step, epoch_steps, settings, lr_at)
        for micro in range(settings.accum):
            sample = next(samples)
            torch.manual_seed(seed_for("fit", settings.seed, step, micro, rank))
            imgs, targets = to_device(sample, model, device)
            if mix is not None:
                imgs, targets = mix(imgs, targets, train_set.num_classes)
            last = micro + 1 == settings.accum
            loss = backward(parallel, imgs, targets, settings, smoothing, last)
            losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
        epoch, rest = divmod(step + 1, epoch_steps)
        if rest == 0:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise ValueError(f"loss not finite in epoch {epoch}; try a lower --blr")
            refuse_unreadable(train_set)
            if rank == 0:
                log_line(f"epoch {epoch}/{settings.epochs} loss {loss:.4f} lr {lr:.2e}")
                if settings.save:
                    save(settings.save, model, optimizer, identity, step + 1)
    if world > 1:
        # BatchNorm's statistics differ, since each rank has seen other images.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def set_lr(optimizer, step, epoch_steps, settings, lr_at):
    """Set and return the learning rate; parameter groups may have a "scale"."""
    total_steps = settings.epochs * epoch_steps
    warmup_steps = settings.warmup_epochs * epoch_steps
    # min_lr is added to the whole schedule, warm-up included.
    peak = settings.blr * settings.batch_size / 256 - settings.min_lr
    lr = settings.min_lr + lr_at(step, total_steps, warmup_steps, peak)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    return lr


def micro_batches(train_set, settings, start, total_steps, dist_info):
    """Iterator over this rank's micro-batches, Samples, from step `start` on."""
    device, rank, world = dist_info
    steps = settings.batch_size, start, total_steps, settings.seed
    shard = settings.accum, rank, world
    sampler = ResumableBatchSampler(len(train_set), *steps, *shard)
    options = {"batch_sampler": sampler, "pin_memory": device.type == "cuda"}
    loader = make_loader(train_set, workers=settings.workers, **options)
    return iter(loader)


def to_device(sample, model, device):
    """Normalized, flipped images (B, 3, H, W) and labels (B,) on the device."""
    image = sample.image.to(device, non_blocking=True)
    flip = sample.flip.to(device, non_blocking=True)
    labels = sample.label.to(device, non_blocking=True)
    image = torch.where(flip[:, None, None, None], image.flip(-1), image)
    return model.normalize(image), labels


def backward(model, imgs, targets, settings, smoothing, last):
    """Accumulate the gradient of a micro-batch; returns its loss, the features' mean.

    targets: labels (B,) or probabilities (B, C). last: whether the step ends with it.
    """
    bf16 = settings.precision == "bf16"
    # Ranks exchange gradients once per step, with the last micro-batch.
    exchange = last or not isinstance(model, DistributedDataParallel)
    with contextlib.nullcontext() if exchange else model.no_sync():
        with torch.autocast(imgs.device.type, torch.bfloat16, enabled=bf16):
            logits = model(imgs)  # (F, B, C)
        # Heads of a probe share no weights: the sum trains each as if it were alone.
        total = sum(
            F.cross_entropy(x.float(), targets, label_smoothing=smoothing)
            for x in logits
        )
        (total / settings.accum).backward()
    return total.detach() / len(logits)


# -- The file of --save ----------------------------------------------------------------


def run_identity(settings):
    """The settings that a resumed run must share, and the checksum of its encoder."""
    free = resume_class(type(settings), "free")
    shared = dataclasses.asdict(settings) | {"sha256": sha256(settings.checkpoint)}
    return {name: value for name, value in shared.items() if name not in free}


def save(path, model, optimizer, identity, step):
    """Write the file of --save; identity: see run_identity."""
    save_checkpoint(
        path,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        settings=identity,
        step=step,
    )


def resume(path, model, optimizer, identity, total_steps):
    """Load the file of --save; returns its step.

    ValueError names the settings in which identity differs from the file.
    """
    parts = load_checkpoint(path)
    old = read_settings(parts.get("settings", {}), f"--save {path}")
    new = read_settings(identity, f"--save {path}")
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        changes = [f"{name} {old.get(name)} -> {new[name]}" for name in names]
        raise ValueError(
            f"--save {path}: from a run with other settings: {', '.join(changes)}; "
            "choose another file"
        )
    missing = sorted({"model", "optimizer", "step"} - set(parts))
    if missing:
        raise ValueError(f"--save {path}: not a file of --save, lacks {missing}")
    step = parts["step"]
    if type(step) is not int or not 0 <= step <= total_steps:
        raise ValueError(
            f"--save {path}: damaged: step {step!r} of a run of {total_steps}"
        )
    load_state(model, parts["model"], path)
    load_optimizer(optimizer, parts["optimizer"], step, path)
    return step


# -- Scoring ---------------------------------------------------------------------------


def topk_correct(logits, truth):
    """Counts (..., 2) of images whose class is among the first one and the first five.

    logits (..., B, C), truth (B,).
    """
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (..., B, 5)
    correct = best == truth[:, None]
    top1 = correct[..., 0].sum(dim=-1)
    top5 = correct.any(dim=-1).sum(dim=-1)
    return torch.stack([top1, top5], dim=-1).float()


@torch.no_grad()
def score(model, tests, features, protocol, settings, dist_info):
    """Results in percent: top-1 and top-5 of each feature on each test set.

    tests: {name: data set}; features: names of the model's rows of logits. Each rank
    scores a shard of the images.
    """
    device, rank, world = dist_info
    bf16 = settings.precision == "bf16"
    # The size of a micro-batch in training, which is known to fit in memory.
    batch_size = max(1, settings.batch_size // (settings.accum * world))
    model.eval()
    results = []
    for name, dataset in tests.items():
        shard = Subset(dataset, range(rank, len(dataset), world))
        counts = torch.zeros(len(features), 2, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        for sample in make_loader(shard, batch_size, settings.workers):
            imgs = model.normalize(sample.image.to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(imgs)  # (F, B, C)
            counts += topk_correct(logits.float(), sample.label.to(device))
            finite &= logits.isfinite().all()
        if not finite:
            raise ValueError("the model's logits are not finite; try a lower --blr")
        refuse_unreadable(dataset)
        if world > 1:
            dist.all_reduce(counts)
        percent = 100 * counts.cpu().double() / len(dataset)
        for feature, (top1, top5) in zip(features, percent.tolist(), strict=True):
            result = {"feature": feature, "protocol": protocol, "test": name}
            results.append(result | {"top-1": top1, "top-5": top5})
    return results
