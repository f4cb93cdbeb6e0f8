"""
Training and scoring of classifiers on pictures: shared by MAE's linear probe and by
fine-tuning.

A model here takes normalized images and gives logits (F, B, C), one row for each of the F
features that it classifies by; model.normalize makes its input from uint8 images.

Shapes: n training images, B images, C classes, F features.
"""

import contextlib
import dataclasses
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
from attg.cli import progress, say
from attg.datasets import refuse_unreadable, shot_indices
from attg.files import require
from attg.loader import ResumableBatchSampler, make_loader
from attg.seeding import seed_for

# -- Settings --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained; lr = blr * batch_size / 256."""

    epochs: int
    batch_size: int  # images of a step, over all processes and micro-batches
    blr: float
    warmup_epochs: float
    weight_decay: float
    min_lr: float
    accum: int = 1  # micro-batches of a step
    layer_decay: float | None = None  # None: not of this protocol
    drop_path: float | None = None
    precision: str = "fp32"


def fill_in(recipe, args, images, most, device, world):
    """The recipe for so many training images, with the values that args has in its place.

    With few images a batch is a tenth of them and warm-up a fifth of the epochs. `most`:
    images that a process takes at a time, unless args.accum says otherwise.
    """
    given = {}
    for field in dataclasses.fields(Recipe):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value

    epochs = given.get("epochs", recipe.epochs)
    batch = given.get("batch_size", min(recipe.batch_size, images // 10))
    accum = given.get("accum", max(1, batch // (most * world)))
    # Every micro-batch of every process has the same size.
    parts = accum * world
    precision = "fp32"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(False):
        precision = "bf16"
    fitted = {
        "warmup_epochs": min(recipe.warmup_epochs, epochs / 5),
        "batch_size": max(1, batch // parts) * parts,
        "accum": accum,
        "precision": precision,
    }
    return dataclasses.replace(recipe, **(fitted | given))


def take_fraction(train_set, fraction, seed):
    """That share of each class's images, in the order of the data set."""
    if fraction == 1:
        return train_set
    rows = shot_indices(train_set.labels, fraction, seed)
    return train_set.subset(rows.sort().values)


# -- Training --------------------------------------------------------------------------

# Settings in which a continued run may differ from the one that wrote the file.
FREE = ("checkpoint", "device", "workers", "out", "save", "val", "timeout")


def fit(
    model,
    optimizer,
    train_set,
    recipe,
    settings,
    lr_at,
    place,
    mix=None,
    label_smoothing=0.0,
):
    """Trains the model for recipe.epochs, by cross-entropy summed over its features.

    settings: all of the run, as they are reported: of them data, seed, workers and save
    are used here. Goes on from the file settings["save"] if it is there, and writes it
    after each epoch. lr_at(step, total_steps, warmup_steps, lr): the schedule. place:
    (device, rank, world). mix(imgs, labels, C) gives the images and targets to train on.
    """
    device, rank, world = place
    epoch_steps = len(train_set) // recipe.batch_size
    total_steps = recipe.epochs * epoch_steps
    start = continue_run(model, optimizer, settings, total_steps)
    if start > 0 and rank == 0:
        epoch = start // epoch_steps
        say(f"continuing {settings['save']} after epoch {epoch} of {recipe.epochs}")
    feed = open_feed(train_set, recipe, settings, start, total_steps, place)
    parallel = DistributedDataParallel(model) if world > 1 else model
    model.train()

    losses = torch.zeros(2, device=device)  # their sum and number in this epoch
    bar = {"initial": start, "total": total_steps}
    if rank != 0:
        bar["disable"] = True
    for step in progress(range(start, total_steps), **bar):
        lr = set_lr(optimizer, step, epoch_steps, recipe, lr_at)
        for micro in range(recipe.accum):
            sample = next(feed)
            torch.manual_seed(seed_for("fit", settings["seed"], step, micro, rank))
            imgs, targets = training_batch(sample, model, device)
            if mix is not None:
                imgs, targets = mix(imgs, targets, train_set.num_classes)
            last = micro + 1 == recipe.accum
            loss = backward(parallel, imgs, targets, recipe, label_smoothing, last)
            losses += torch.stack([loss, torch.ones((), device=device)])
        optimizer.step()
        optimizer.zero_grad()
        epoch, rest = divmod(step + 1, epoch_steps)
        if rest == 0:
            loss = check_epoch(epoch, losses, train_set)
            losses.zero_()
            if rank == 0:
                say(f"epoch {epoch}/{recipe.epochs} loss {loss:.4f} lr {lr:.2e}")
                save_run(model, optimizer, step + 1, settings)
    if world > 1:
        # Statistics of a BatchNorm: each process has seen other images.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def set_lr(optimizer, step, epoch_steps, recipe, lr_at):
    """Sets and returns the learning rate; groups of parameters may have a "scale"."""
    total_steps = recipe.epochs * epoch_steps
    warmup_steps = recipe.warmup_epochs * epoch_steps
    # min_lr lies under the whole schedule, warm-up included.
    peak = recipe.blr * recipe.batch_size / 256 - recipe.min_lr
    lr = recipe.min_lr + lr_at(step, total_steps, warmup_steps, peak)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    return lr


def open_feed(train_set, recipe, settings, start, total_steps, place):
    """The micro-batches of this process from step `start` on."""
    device, rank, world = place
    batches = ResumableBatchSampler(
        len(train_set),
        recipe.batch_size,
        start,
        total_steps,
        settings["seed"],
        recipe.accum,
        rank,
        world,
    )
    loader = make_loader(
        train_set,
        workers=settings["workers"],
        batch_sampler=batches,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)


def training_batch(sample, model, device):
    """Normalized images (B, 3, H, W), flipped where the sample says so; labels (B,)."""
    image = sample.image.to(device, non_blocking=True)
    flip = sample.flip.to(device, non_blocking=True)
    labels = sample.label.to(device, non_blocking=True)
    image = torch.where(flip[:, None, None, None], image.flip(-1), image)
    return model.normalize(image), labels


def backward(model, imgs, targets, recipe, label_smoothing, last):
    """Adds the gradient of a micro-batch; returns its loss, the features' mean.

    targets: labels (B,) or probabilities (B, C). last: of the step.
    """
    bf16 = recipe.precision == "bf16"
    # Processes exchange gradients once a step, with the last micro-batch.
    exchange = last or not isinstance(model, DistributedDataParallel)
    with contextlib.nullcontext() if exchange else model.no_sync():
        with torch.autocast(imgs.device.type, torch.bfloat16, enabled=bf16):
            logits = model(imgs)  # (F, B, C)
        # The sum: the heads of a probe share no weights, each is trained as if alone.
        total = sum(
            F.cross_entropy(x.float(), targets, label_smoothing=label_smoothing)
            for x in logits
        )
        (total / recipe.accum).backward()
    return total.detach() / len(logits)


def check_epoch(epoch, losses, train_set):
    """The mean loss of an epoch; ValueError if it, or the data, is no good."""
    loss = (losses[0] / losses[1]).item()
    require(
        math.isfinite(loss),
        f"loss not finite in epoch {epoch}; try a lower --blr or --precision fp32",
    )
    refuse_unreadable(train_set)
    return loss


# -- The file of --save ----------------------------------------------------------------


def fixed_settings(settings):
    return {name: value for name, value in settings.items() if name not in FREE}


def save_run(model, optimizer, step, settings):
    """Writes the file settings["save"], if one is wanted."""
    if not settings["save"]:
        return
    save_checkpoint(
        settings["save"],
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        settings=fixed_settings(settings),
        step=step,
    )


def continue_run(model, optimizer, settings, total_steps):
    """Loads the file settings["save"]; returns its step, or 0 if there is no file.

    ValueError if it is of a run with other settings, which are named.
    """
    path = settings["save"]
    if not path or not Path(path).exists():
        return 0
    parts = load_checkpoint(path)
    old = read_settings(parts.get("settings", {}), f"--save {path}")
    new = read_settings(fixed_settings(settings), f"--save {path}")
    differ = []
    for name, value in new.items():
        # "none", for None is a value.
        if old.get(name, "none") != value:
            differ.append(f"{name} {value}")
    words = ", ".join(differ)
    require(not differ, f"--save {path}: of a run without {words}; name another file")
    lacks = sorted({"model", "optimizer", "step"} - set(parts))
    require(not lacks, f"--save {path}: not a file of --save, lacks {lacks}")
    step = parts["step"]
    require(
        type(step) is int and 0 <= step <= total_steps,
        f"--save {path}: its step is {step!r}, of a run of {total_steps}",
    )
    load_state(model, parts["model"], path)
    load_optimizer(optimizer, parts["optimizer"], step, path)
    return step


# -- Scoring ---------------------------------------------------------------------------


def hits(logits, truth):
    """Number of right answers (..., 2) in the first and in the first five classes.

    logits (..., B, C), truth (B,).
    """
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (..., B, 5)
    right = best == truth[:, None]
    first = right[..., 0].sum(dim=-1)
    any_of_five = right.any(dim=-1).sum(dim=-1)
    return torch.stack([first, any_of_five], dim=-1).float()


@torch.no_grad()
def score(model, tests, features, protocol, settings, place):
    """The rows of figures, in percent: top-1 and top-5 of each feature on each test set.

    tests: {name: data set}; features: the names of the model's rows of logits. Each
    process scores its share of the images, none twice.
    """
    device, rank, world = place
    bf16 = settings["precision"] == "bf16"
    # As many images at a time as in training, so that what fits there fits here.
    batch_size = max(1, settings["batch_size"] // (settings["accum"] * world))
    model.eval()
    rows = []
    for name, dataset in tests.items():
        share = Subset(dataset, range(rank, len(dataset), world))
        counts = torch.zeros(len(features), 2, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        for sample in make_loader(share, batch_size, settings["workers"]):
            imgs = model.normalize(sample.image.to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(imgs)  # (F, B, C)
            counts += hits(logits.float(), sample.label.to(device))
            finite &= logits.isfinite().all()
        require(finite, "what the model says is not finite; try a lower --blr")
        refuse_unreadable(dataset)
        if world > 1:
            dist.all_reduce(counts)
        percent = 100 * counts.cpu().double() / len(dataset)
        for feature, (top1, top5) in zip(features, percent.tolist(), strict=True):
            row = {"feature": feature, "protocol": protocol, "test": name}
            rows.append(row | {"top-1": top1, "top-5": top5})
    return rows
