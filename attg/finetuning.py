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
from attg.cli import flag, resume_class
from attg.datasets import check_unreadable
from attg.distributed import broadcast_from_rank0
from attg.evaluation import fill_defaults, open_sets, save_figures, topk_correct
from attg.export import timm_arguments
from attg.figures import class_names
from attg.images import seed_for, train_view
from attg.loader import ResumableBatchSampler, make_loader
from attg.log import log_line, progress


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
    epochs: int | None = flag(None, "passes over the data [by the recipe]", 1, 10**6)
    batch_size: int | None = flag(
        None, "images per step over all processes [by the recipe]", 1, 10**7
    )
    precision: str | None = flag(
        None, "of autocast [bf16 on GPUs that have it]", choices=("fp32", "bf16")
    )
    accum: int | None = flag(None, "micro-batches per step", 1, 10**7, resume="free")
    blr: float | None = flag(None, "lr = blr * batch_size / 256", 0, 1e38)
    min_lr: float | None = flag(None, "lowest learning rate", 0, 1e38)
    warmup_epochs: float | None = flag(None, "[up to --epochs / 5]", 0, 1e6)
    weight_decay: float | None = flag(None, "[by the recipe above]", 0, 1e6)


def open_training(cfg, settings, data, recipe, micro_batch, dist_info, after=None):
    """(training set, {name: test set}) for an encoder's Config; resolves the settings.

    after: a further augmentation of the random crops. For the rest see resolve.
    """
    view = functools.partial(train_view, scale=(0.08, 1.0), after=after)
    options = {"augment": view, "seed": settings.seed}
    fraction = settings.label_fraction
    train_set, tests = open_sets(settings, data, cfg, fraction, **options)
    device, _, world = dist_info
    resolve(settings, recipe, len(train_set), micro_batch, device, world)
    size = settings.batch_size
    log_line(
        f"training on {len(train_set):,} images: {settings.epochs} epochs, batch size "
        f"{size}, peak lr {settings.blr * size / 256:.2e}"
    )
    return train_set, tests


def resolve(settings, recipe, images, micro_batch, device, world):
    """Fill in the settings that were not given.

    recipe: {flag: MAE's value}. With few training images a batch is about a tenth of
    them, with few epochs warm-up is a fifth. In batches other than MAE's, the default
    lr is MAE's lr * sqrt(batch_size / MAE's batch_size). micro_batch: images per rank
    that need no accumulation.
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    fill_defaults(
        settings, precision="bf16" if bf16 else "fp32", epochs=recipe["epochs"]
    )
    fill_defaults(
        settings, warmup_epochs=min(recipe["warmup_epochs"], settings.epochs / 5)
    )
    tenth = max(1, min(recipe["batch_size"], images // 10))
    # A power of two is the same for any even number of processes.
    batch_size = settings.batch_size or 2 ** int(math.log2(tenth))
    fill_defaults(settings, accum=max(1, batch_size // (micro_batch * world)))
    # All micro-batches of all ranks have the same size.
    parts = settings.accum * world
    fill_defaults(settings, batch_size=max(1, batch_size // parts) * parts)
    ratio = recipe["batch_size"] / settings.batch_size
    fill_defaults(settings, blr=recipe["blr"] * math.sqrt(ratio))
    fill_defaults(settings, **recipe)


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
    total_steps, start = settings.epochs * epoch_steps, 0
    if settings.save:
        # On rank 0, as others need not share the folder.
        path = settings.save

        def read():
            return read_saved(path, identity(settings, train_set), total_steps)

        saved = broadcast_from_rank0(read)
        if saved:
            start = saved["step"]
            load_state(model, saved["model"], path)
            load_optimizer(optimizer, saved["optimizer"], start, path)
            log_line(f"resuming {path} after {start} of {total_steps} steps")
    order = settings.batch_size, start, total_steps, settings.seed
    sampler = ResumableBatchSampler(len(train_set), *order, settings.accum, rank, world)
    options = {"batch_sampler": sampler, "pin_memory": device.type == "cuda"}
    samples = iter(make_loader(train_set, workers=settings.workers, **options))
    parallel = DistributedDataParallel(model) if world > 1 else model
    model.train()

    losses = []  # of this epoch, on the device
    for step in progress(range(start, total_steps), desc="training"):
        warmup_steps = settings.warmup_epochs * epoch_steps
        # min_lr is added to the whole schedule, warm-up included.
        peak = settings.blr * settings.batch_size / 256 - settings.min_lr
        lr = settings.min_lr + lr_at(step, total_steps, warmup_steps, peak)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        for micro in range(settings.accum):
            sample = next(samples)
            torch.manual_seed(seed_for("fit", settings.seed, step, micro, rank))
            imgs, targets = to_device(sample, model, device)
            if mix:
                imgs, targets = mix(imgs, targets, train_set.num_classes)
            # DDP: exchange gradients once a step, with the last micro-batch.
            skip_sync = micro + 1 < settings.accum and world > 1
            with parallel.no_sync() if skip_sync else contextlib.nullcontext():
                losses.append(backward(parallel, imgs, targets, settings, smoothing))
        optimizer.step()
        optimizer.zero_grad()
        epoch, rest = divmod(step + 1, epoch_steps)
        if rest == 0:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise ValueError(f"loss not finite in epoch {epoch}; try a lower --blr")
            check_unreadable(train_set)
            log_line(f"epoch {epoch}/{settings.epochs} loss {loss:.4f} lr {lr:.2e}")
            if settings.save and rank == 0:
                shared = identity(settings, train_set)
                names = class_names(train_set)
                save(settings.save, model, optimizer, shared, step + 1, names)
    if world > 1:
        # BatchNorm's statistics differ, since each rank has seen other images.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def to_device(sample, model, device):
    """Normalized, flipped images (B, 3, H, W) and labels (B,) on the device."""
    tensors = sample.image, sample.flip, sample.label
    image, flip, labels = (x.to(device, non_blocking=True) for x in tensors)
    image = torch.where(flip[:, None, None, None], image.flip(-1), image)
    return model.normalize(image), labels


def autocast(settings, device):
    bf16 = settings.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def backward(model, imgs, targets, settings, smoothing):
    """Accumulate the gradient of a micro-batch; returns its loss, the features' mean.

    targets: labels (B,) or probabilities (B, C).
    """
    with autocast(settings, imgs.device):
        logits = model(imgs).float()  # (F, B, C)
    # Heads of a probe share no weights: the sum trains each as if it were alone.
    losses = [F.cross_entropy(x, targets, label_smoothing=smoothing) for x in logits]
    total = sum(losses)
    (total / settings.accum).backward()
    return total.detach() / len(logits)


def identity(settings, train_set):
    """Settings, encoder checksum and images that a resumed run must share."""
    free = resume_class(type(settings), "free") | {"classes", "header"}
    shared = dataclasses.asdict(settings)
    # The images themselves, wherever they lie.
    shared |= {"data": train_set.fingerprint}
    return {name: value for name, value in shared.items() if name not in free}


def save(path, model, optimizer, settings, step, names):
    """Write the file of --save. names: of the classes."""
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if hasattr(model, "cfg"):
        # A fine-tuned encoder, for load_encoder; for timm, a classifier.
        states["config"] = dataclasses.asdict(model.cfg)
        head = {"num_classes": model.head.out_features, "global_pool": "avg"}
        states["timm"] = timm_arguments(model.cfg) | head
        states["class_names"] = list(names)
    save_checkpoint(path, **states, settings=settings, step=step)


def read_saved(path, settings, total_steps):
    """The parts of the file of --save, None if it does not exist.

    ValueError names the settings in which it differs from these.
    """
    if not Path(path).exists():
        return None
    parts, reason = load_checkpoint(path), None
    missing = sorted({"model", "optimizer", "settings", "step"} - set(parts))
    old, new = (read_settings(x, path) for x in (parts.get("settings", {}), settings))
    changes = [f"{k} {old.get(k)} -> {x}" for k, x in new.items() if old.get(k) != x]
    step = parts.get("step")
    if missing:
        reason = f"not a file of --save, lacks {missing}"
    elif changes:
        reason = f"from a run with other settings: {', '.join(changes)}"
    elif type(step) is not int or not 0 <= step <= total_steps:
        reason = f"damaged: step {step!r} of a run of {total_steps}"
    if reason:
        raise ValueError(f"--save {path}: {reason}; choose another file")
    return parts


@torch.no_grad()
def score(model, tests, features, protocol, settings, data, dist_info):
    """Results in percent: top-1 and top-5 of each feature on each test set.

    tests: {name: data set}; features: names of the model's rows of logits. Each rank
    scores a shard of the images. data: as in attg.evaluation.evaluate.
    """
    device, rank, world = dist_info
    # The size of a micro-batch in training, which is known to fit in memory.
    batch_size = settings.batch_size // (settings.accum * world)
    model.eval()
    results = []
    for name, dataset in tests.items():
        n = len(dataset)
        # If there are more ranks than images, the last image has several.
        shard = Subset(dataset, range(min(rank, n - 1), n, world))
        classes, truth = [], []
        for sample in make_loader(shard, batch_size, settings.workers):
            imgs, labels = to_device(sample, model, device)
            with autocast(settings, device):
                logits = model(imgs).float()  # (F, B, C)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite; try a lower --blr")
            classes.append(logits.topk(min(5, logits.shape[-1])).indices)
            truth.append(labels)
        classes, truth = torch.cat(classes, dim=1), torch.cat(truth)
        check_unreadable(dataset)
        counts = topk_correct(classes, truth) * (rank < n)  # (F, 2)
        if world > 1:
            dist.all_reduce(counts)
        if settings.show and name == settings.val[0]:
            save_figures(
                settings, data, truth.cpu(), classes[-1, :, 0].cpu(), features[-1]
            )
        percent = 100 * counts.cpu().double() / n
        for feature, (top1, top5) in zip(features, percent.tolist(), strict=True):
            result = {"feature": feature, "protocol": protocol, "test": name}
            result |= {"top-1": top1, "top-5": top5, "test_images": n}
            results.append(result)
    return results
