"""
Training and scoring of classifiers on pictures: shared by MAE's linear probe and fine-tuning.
"""

import contextlib
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


def hits(logits, truth):
    """Number of right answers (..., 2) in the first and the first five classes: logits (..., B, C), truth (B,)."""
    right = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == truth[:, None]
    return torch.stack(
        [right[..., 0].sum(dim=-1), right.any(dim=-1).sum(dim=-1)], dim=-1
    ).float()


def fit(model, optimizer, train_set, cfg, args, device, rank, world):
    """Trains the model for args.epochs. Goes on from args.save if it is there, and writes it after each epoch."""
    epoch_steps = len(train_set) // args.batch_size
    total, start, peak = args.epochs * epoch_steps, 0, args.blr * args.batch_size / 256
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in "checkpoint device workers out save val".split()
    }
    if args.save and Path(args.save).exists():
        parts = load_checkpoint(args.save)
        differ = [
            f"{k} {v}"
            for k, v in settings.items()
            if parts.get("settings", {}).get(k, "none") != v
        ]
        require(
            not differ,
            f"--save {args.save}: of a run without {', '.join(differ)}; name another file",
        )
        model.load_state_dict(parts["model"])
        optimizer.load_state_dict(parts["optimizer"])
        start = parts["step"]
        if rank == 0:
            tqdm.write(
                f"continuing {args.save} after epoch {start // epoch_steps} of {args.epochs}"
            )
    batches = TrainBatches(
        len(train_set),
        args.batch_size,
        start,
        total,
        args.seed,
        args.accum,
        rank,
        world,
    )
    feed = Feed(
        train_set, batches, workers=args.workers, pin_memory=device.type == "cuda"
    )
    ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    model.train()
    losses = torch.zeros(2, device=device)  # their sum and number in this epoch
    for step in tqdm(
        range(start, total),
        initial=start,
        total=total,
        disable=None if rank == 0 else True,
        leave=False,
    ):
        rate = args.min_lr + lr_at(
            step, total, args.warmup_epochs * epoch_steps, peak - args.min_lr
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        for micro in range(args.accum):
            sample = next(feed)
            torch.manual_seed(seed_for("fit", args.seed, step, micro, rank))
            image, flip, targets = (
                x.to(device, non_blocking=True)
                for x in (sample.image, sample.flip, sample.label)
            )
            imgs = normalize(
                torch.where(flip[:, None, None, None], image.flip(-1), image), cfg
            )
            if args.finetune:
                imgs, targets = mix(imgs, targets, train_set.num_classes)
            with (
                ddp.no_sync()
                if world > 1 and micro + 1 < args.accum
                else contextlib.nullcontext()
            ):
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=args.precision == "bf16"
                ):
                    logits = ddp(imgs)
                each = [
                    F.cross_entropy(
                        x.float(), targets, label_smoothing=0.1 * args.finetune
                    )
                    for x in logits
                ]
                (sum(each) / args.accum).backward()
            losses += torch.stack(
                [sum(each).detach() / len(each), torch.ones((), device=device)]
            )
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % epoch_steps == 0:
            loss, epoch = (losses[0] / losses[1]).item(), (step + 1) // epoch_steps
            require(
                math.isfinite(loss),
                f"loss not finite in epoch {epoch}; try a lower --blr or --precision fp32",
            )
            losses.zero_()
            require(
                len(feed.unreadable) <= len(train_set) / 100,
                f"--data {args.data}: over 1 % of it is unreadable",
            )
            if rank == 0:
                tqdm.write(f"epoch {epoch}/{args.epochs} loss {loss:.4f} lr {rate:.2e}")
            if args.save and rank == 0:
                parts = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "settings": settings,
                }
                attg_mae.save_checkpoint(args.save, **parts, step=step + 1)
    for statistic in (
        model.buffers() if world > 1 else ()
    ):  # each process has seen other images
        torch.distributed.broadcast(statistic, 0)
