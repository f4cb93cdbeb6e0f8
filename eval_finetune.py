"""
What a linear layer, or fine-tuning, makes of an encoder (arXiv 2402.15172, Tables 1, 2, 5, 6, 7 and section 6).

    python eval_linear.py out/NAME/encoder.pt --data PATH_OR_NAME                          # linear probe
    python eval_linear.py out/NAME/encoder.pt --data PATH_OR_NAME --shots 10 25 50         # labelled images a class
    python eval_linear.py out/NAME/encoder.pt --data in9l --val original only_fg mixed_rand     # ImageNet-9
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT --data imagenet --protocol mae
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT --data imagenet --finetune --fraction 0.1

--protocol features (default): linear layers with a grid of learning rates on features that are computed once; held-out
training images choose. mae: the probe of MAE, random crops and LARS. --finetune: all weights, by MAE's recipe.

Shapes: n training images, B images, D width, C classes, R learning rates, F features (class token, patch mean).
"""

import argparse
import contextlib
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

from attg_mae import MAE, load_encoder, lr_at, normalize
from common.features import FEATURES, features_of
from common.files import report, require, sha256
from common.run import load_checkpoint, processes, save_checkpoint
from common.weights import DECODER
from common.data import (
    rand_augment,
    Feed,
    TrainBatches,
    make_loader,
    open_labelled,
    seed_for,
    shot_indices,
    train_view,
)

LRS = tuple(
    10 ** (e / 2) for e in range(-8, 2)
)  # 1e-4 to 3, SGD with momentum 0.9 on standardised features
RECIPES = {  # of facebookresearch/mae
    "mae": {"epochs": 90, "batch_size": 16384, "blr": 0.1, "warmup_epochs": 10, "weight_decay": 0.0, "min_lr": 0.0},
    "finetune": {"epochs": 100, "batch_size": 1024, "blr": 5e-4, "warmup_epochs": 5, "weight_decay": 0.05,
                 "min_lr": 1e-6, "layer_decay": 0.65, "drop_path": 0.1},
}  # fmt: skip
LARGE = {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2}
DEEPER = {
    ("mae", 24): {"epochs": 50},
    ("mae", 32): {"epochs": 50},
    ("finetune", 24): LARGE,
}
DEEPER["finetune", 32] = LARGE | {"drop_path": 0.3}


# ---------------------------------------------------------------------------------------------------------------------
# The probe on kept features


def train_heads(x, labels, lrs, num_classes, epochs, batch_size, seed, least=1000):
    """Softmax regressions (R, D + 1, C), one for each learning rate, the last row the biases; x (n, D + 1), labels (n,)
    on one device. SGD with momentum 0.9, half-cycle cosine; at least `least` steps."""
    rates = torch.tensor(lrs, device=x.device).repeat_interleave(
        num_classes
    )  # (R * C,): one product for all
    weights = torch.zeros(x.shape[1], len(lrs) * num_classes, device=x.device)
    momentum, generator = (
        torch.zeros_like(weights),
        torch.Generator().manual_seed(seed_for("probe", seed)),
    )
    steps_per_epoch = math.ceil(
        len(x) / batch_size
    )  # of equal batches: a small last one would count too much
    total = max(least, epochs * steps_per_epoch)
    for step in tqdm(range(total), desc="probe", leave=False, disable=None):
        if step % steps_per_epoch == 0:
            order = (
                torch.randperm(len(x), generator=generator)
                .to(x.device)
                .tensor_split(steps_per_epoch)
            )
        i = order[step % steps_per_epoch]
        error = (
            (x[i] @ weights).view(len(i), -1, num_classes).softmax(dim=2)
        )  # (B, R, C)
        error[torch.arange(len(i), device=x.device), :, labels[i]] -= 1
        momentum.mul_(0.9).addmm_(
            x[i].T, error.flatten(1), alpha=1 / len(i)
        )  # the gradient of the cross-entropy
        weights -= lr_at(step, total, 0, 1.0) * rates * momentum
    return weights.view(len(weights), -1, num_classes).transpose(0, 1)


def hits(logits, truth):
    """Number of right answers (..., 2) in the first and the first five classes: logits (..., B, C), truth (B,)."""
    right = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == truth[:, None]
    return torch.stack(
        [right[..., 0].sum(dim=-1), right.any(dim=-1).sum(dim=-1)], dim=-1
    ).float()


def linear_probe(
    features,
    labels,
    tests,
    lrs=LRS,
    epochs=100,
    batch_size=256,
    seed=0,
    num_classes=None,
    device="cpu",
):
    """Trains a linear layer on features (n, D) and labels (n,), and scores it on tests {name: (features, labels)}.

    Features are standardised by the training images' mean and variance (a BatchNorm without affine whose statistics are
    exact). A fifth of the training images, spread over the classes, is held out to choose among lrs, each fifth in turn
    if there are up to 10,000. Then all images are trained on.
    Returns {"lr": the choice, "held_out": [top-1 for each of lrs], "results": {name: [top-1, top-5]}}, in percent.
    """
    num_classes = num_classes or int(labels.max()) + 1
    require(
        labels.bincount().max() > 1,
        "one image a class: two are needed, for one helps to choose the learning rate",
    )
    require(
        features.isfinite().all(),
        "some features are not finite; was the encoder trained to the end?",
    )
    var, mean = torch.var_mean(features, dim=0, correction=0)
    train = functools.partial(
        train_heads,
        num_classes=num_classes,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
    )

    def standardise(x):
        return F.pad((x - mean) / (var + 1e-6).sqrt(), (0, 1), value=1.0).to(
            device
        )  # (n, D + 1)

    def score(x, truth, weights):
        parts = zip(x.split(4096), truth.split(4096), strict=True)
        return (
            100
            * sum(hits(a @ weights, b).cpu().double() for a, b in parts)
            / len(truth)
        )  # (R, 2)

    x, y, fold = (
        standardise(features),
        labels.to(device),
        torch.empty(len(labels), dtype=torch.long),
    )
    fold[shot_indices(labels, 1.0, seed)] = (
        torch.arange(len(labels)) % 5
    )  # class by class, in random order
    folds = [
        (fold == k).to(device)
        for k in fold.unique()[: 5 if len(labels) <= 10_000 else 1]
    ]
    each = [
        score(x[held], y[held], train(x[~held], y[~held], lrs))[:, 0] for held in folds
    ]
    held_out = torch.stack(each).mean(dim=0)
    best = lrs[held_out.argmax()]
    weights, results = train(x, y, [best]), {}
    for name, (a, b) in tests.items():
        results[name] = score(standardise(a), b.to(device), weights)[0].tolist()
    return {"lr": best, "held_out": held_out.tolist(), "results": results}


# ---------------------------------------------------------------------------------------------------------------------
# MAE's probe and MAE's fine-tuning


class LARS(torch.optim.Optimizer):
    """SGD whose steps for matrices are scaled by 0.001 |weights| / |gradient| (You et al., arXiv 1708.03888; MAE)."""

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust": trust,
            },
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if p.dim() > 1:  # biases: neither decayed nor scaled
                    update = update + group["weight_decay"] * p
                    scale = group["trust"] * p.norm() / update.norm()
                    update = update * torch.where(
                        scale.isfinite() & (scale > 0), scale, 1.0
                    )  # 1 if a norm is 0
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p -= group["lr"] * average.mul_(group["momentum"]).add_(update)


class Probe(nn.Module):
    """A BatchNorm without affine and a linear layer for each feature of the encoder, which is no part of the module."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.tokens, width = encoder.forward_features, encoder.cfg.width
        self.norm = nn.BatchNorm1d(len(FEATURES) * width, eps=1e-6, affine=False)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in FEATURES)
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, imgs):
        with torch.no_grad():
            tokens = self.tokens(imgs).float()  # (B, N, D)
        with torch.autocast(imgs.device.type, enabled=False):
            features = self.norm(
                torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
            ).chunk(2, dim=1)
            return torch.stack(
                [head(x) for head, x in zip(self.heads, features, strict=True)]
            )  # (F, B, C)


class Classifier(MAE):
    """The encoder with stochastic depth, then fc_norm and head on the mean of the patch tokens, as timm names them."""

    def __init__(self, encoder, num_classes, drop_path):
        super().__init__(encoder.cfg)
        self.load_state_dict(encoder.state_dict())
        for name in [
            k
            for k in (*self._modules, *self._parameters)
            if DECODER.match(k) or k == "norm"
        ]:
            delattr(self, name)
        self.pos_embed.requires_grad_()
        self.fc_norm, self.head = (
            nn.LayerNorm(self.cfg.width, eps=1e-6),
            nn.Linear(self.cfg.width, num_classes),
        )
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        for i, block in enumerate(self.blocks):
            p = drop_path * i / max(1, len(self.blocks) - 1)
            for branch in (block.attn, block.mlp):
                branch.register_forward_hook(
                    lambda m, _, x, p=p: stochastic_depth(x, p, "row", m.training)
                )

    def forward(self, imgs):
        x = self.blocks(self.embed(self.patchify(imgs)))  # (B, N, D)
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))[None]  # (1, B, C)


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups: lr scaled by layer_decay^(layers above); no decay of biases, norms, positions, class token."""
    groups, depth = {}, len(model.blocks)
    for name, p in model.named_parameters():
        part, *rest = name.split(".")
        layer = (
            int(rest[0]) + 1
            if part == "blocks"
            else depth + 1
            if part in ("fc_norm", "head")
            else 0
        )
        decay = (
            weight_decay
            if p.dim() > 1 and part not in ("cls_token", "pos_embed")
            else 0.0
        )
        group = {
            "params": [],
            "weight_decay": decay,
            "scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, decay), group)["params"].append(p)
    return [*groups.values()]


def mix(imgs, labels, num_classes):
    """Random erasing by noise, then mixup or cutmix of the batch: images (B, 3, H, W), targets (B, C)."""
    erase = v2.RandomErasing(
        0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"
    )
    mixes = [
        v2.MixUp(alpha=0.8, num_classes=num_classes),
        v2.CutMix(alpha=1.0, num_classes=num_classes),
    ]
    return v2.RandomChoice(mixes)(torch.stack([erase(x) for x in imgs]), labels)


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
                save_checkpoint(args.save, **parts, step=step + 1)
    for statistic in (
        model.buffers() if world > 1 else ()
    ):  # each process has seen other images
        torch.distributed.broadcast(statistic, 0)


SOURCE = (
    "checkpoint",
    "sha256",
    "data",
    "classes",
    "val",
    "img_size",
    "precision",
)  # of features
OPTIONS = {("features",): "shots lrs features save_features", ("finetune",): "layer_decay drop_path",
           ("mae", "finetune"): "accum blr warmup_epochs weight_decay save"}  # fmt: skip


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "checkpoint", nargs="?", help="file with an encoder; not needed with --features"
    )
    add("--data", default="toy", help="as for attg_mae.py, with labels [%(default)s]")
    add(
        "--classes",
        help="file with the class folders to keep, one a line (ImageNet-100)",
    )
    add(
        "--val",
        nargs="+",
        default=["test"],
        help="test sets: test, folders of the same classes, or toy's variants",
    )
    add(
        "--protocol",
        choices=("features", "mae"),
        default="features",
        help="of the linear probe [%(default)s]",
    )
    add("--finetune", action="store_true", help="train all weights instead")
    add(
        "--fraction",
        type=float,
        default=1.0,
        help="share of each class's training images to use [%(default)s]",
    )
    add(
        "--shots",
        type=int,
        nargs="+",
        default=[],
        help="labelled images a class, --protocol features",
    )
    add(
        "--seeds",
        type=int,
        default=5,
        help="random choices of the --shots [%(default)s]",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of --fraction, order, augmentation [%(default)s]",
    )
    add(
        "--lrs",
        type=float,
        nargs="+",
        default=LRS,
        help="learning rates of --protocol features [1e-4 to 3]",
    )
    add(
        "--epochs",
        type=int,
        help="[features 100, at least 1,000 steps; mae 90, --finetune 100, from ViT-L on 50]",
    )
    add(
        "--batch_size",
        type=int,
        help="of all processes [features 256; mae 16384, --finetune 1024, a tenth of few]",
    )
    add(
        "--accum",
        type=int,
        help="micro-batches of a step [for mae of 512 images, --finetune 128]",
    )
    add(
        "--blr",
        type=float,
        help="lr = blr * batch_size / 256 [mae 0.1; --finetune 5e-4, from ViT-L on 1e-3]",
    )
    add(
        "--warmup_epochs",
        type=float,
        help="[mae 10, --finetune 5; a fifth of few epochs]",
    )
    add("--weight_decay", type=float, help="[mae 0, --finetune 0.05]")
    add(
        "--layer_decay",
        type=float,
        help="of the learning rate, --finetune [0.65, from ViT-L on 0.75]",
    )
    add(
        "--drop_path",
        type=float,
        help="stochastic depth, --finetune [0.1, ViT-L 0.2, ViT-H 0.3]",
    )
    add(
        "--precision",
        choices=("fp32", "bf16"),
        help="[features fp32, others bf16 on a GPU that has it]",
    )
    add(
        "--features",
        help="file of --save_features, of this program or eval_knn.py; its images and test sets",
    )
    add("--save_features", help="file to write the features to")
    add(
        "--save",
        help="file for the trained weights, written after each epoch; the same command continues from it",
    )
    add("--img_size", type=int, help="input size in pixels [the checkpoint's]")
    add("--workers", type=int, help="loader processes of each process [CPU 0, GPU 8]")
    add("--device", help="cuda, mps or cpu [the first there is]")
    add(
        "--out",
        help="file that the results are added to [eval_linear.jsonl beside the checkpoint or the features]",
    )
    args = parser.parse_args(argv)
    require(
        not args.finetune or args.protocol == "features",
        "--finetune and --protocol mae: use one of them",
    )
    args.protocol = "finetune" if args.finetune else args.protocol
    for protocols, names in OPTIONS.items():
        for name in names.split() if args.protocol not in protocols else ():
            unused = getattr(args, name) == parser.get_default(name)
            require(
                unused,
                f"--{name}: of {' and '.join(protocols)}, does nothing in {args.protocol}; leave it out",
            )
    require(
        args.checkpoint or args.features,
        "a checkpoint is needed: eval_linear.py CHECKPOINT, or --features FILE",
    )
    require(
        0 < args.fraction <= 1,
        f"--fraction {args.fraction}: must be above 0, at most 1",
    )
    fits = min(args.shots, default=2) > 1 and (not args.shots or args.fraction == 1)
    require(
        fits,
        f"--shots {args.shots}: 2 are needed, one to choose the learning rate; and no --fraction beside it",
    )
    require(
        "train" not in args.val,
        "--val train: that is what is trained on; name test sets",
    )
    for name in "seeds accum epochs batch_size lrs blr warmup_epochs weight_decay layer_decay drop_path".split():
        value, least = (
            getattr(args, name),
            0 if name in ("warmup_epochs", "weight_decay", "drop_path") else 1e-12,
        )
        require(
            value is None or torch.tensor(value).min() >= least,
            f"--{name} {value}: must be above 0",
        )
    return args


def complete(args, n, depth, device, world):
    """Fills in MAE's values for what was not given; with few images a batch is a tenth of them."""
    values = RECIPES[args.protocol] | DEEPER.get((args.protocol, depth), {})
    values["warmup_epochs"] = min(
        values["warmup_epochs"], (args.epochs or values["epochs"]) / 5
    )
    batch, most = (
        args.batch_size or min(values["batch_size"], n // 10),
        512 if args.protocol == "mae" else 128,
    )
    accum = args.accum or max(1, batch // (most * world))
    values |= {
        "accum": accum,
        "batch_size": max(1, batch // (accum * world)) * accum * world,
    }
    values["precision"] = (
        "bf16"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        else "fp32"
    )
    for name, value in values.items():
        setattr(
            args,
            name,
            value if getattr(args, name, None) is None else getattr(args, name),
        )


def probe(args, device, rank, world):
    """The rows of the linear probe on kept features. One process trains."""
    if args.features:
        parts = load_checkpoint(args.features)
        whole = {"train", "settings"} < set(parts) and (
            parts["train"]["labels"] >= 0
        ).any()
        require(
            whole,
            f"--features {args.features}: holds {sorted(parts)[:5]}; name a file of --save_features",
        )
    else:
        encoder = load_encoder(args.checkpoint, img_size=args.img_size).to(device)
        train_set, tests = open_labelled(
            args.data, args.val, encoder.cfg.size, classes=args.classes
        )
        for n in args.shots:  # are there enough?
            shot_indices(train_set.labels, n, 0)
        setup = (
            {"workers": args.workers},
            torch.bfloat16 if args.precision == "bf16" else None,
            rank,
            world,
        )
        parts = {"settings": {k: getattr(args, k) for k in SOURCE}}
        for name, dataset in {"train": train_set, **tests}.items():
            parts[name] = dict(
                zip(
                    (*FEATURES, "labels"),
                    features_of(encoder, dataset, *setup),
                    strict=True,
                )
            )
        if args.save_features and rank == 0:
            save_checkpoint(args.save_features, **parts)
    vars(args).update(parts.pop("settings"))
    train, rows = parts.pop("train"), []
    cases = [(f"{n} shots", n, range(args.seeds)) for n in args.shots] or [
        ("linear", args.fraction, [args.seed])
    ]
    args.epochs, args.batch_size, args.held_out = (
        args.epochs or 100,
        args.batch_size or 256,
        {},
    )
    setup = args.lrs, args.epochs, args.batch_size
    for feature, (protocol, share, seeds) in itertools.product(
        FEATURES if rank == 0 else (), cases
    ):
        runs, x, labels = [], train[feature], train["labels"]
        for seed in seeds:
            i = shot_indices(labels, share, seed)
            tests = {
                name: (part[feature], part["labels"]) for name, part in parts.items()
            }
            runs.append(
                linear_probe(x[i], labels[i], tests, *setup, seed, device=device)
            )
            grid = {
                f"{lr:.2g}": round(top, 2)
                for lr, top in zip(args.lrs, runs[-1]["held_out"], strict=True)
            }
            args.held_out[f"{feature}, {protocol}, seed {seed}"] = grid
            tqdm.write(
                f"{feature}, {protocol}, seed {seed}, held-out top-1 by learning rate: {grid}"
            )
        for name in tests:
            top = torch.tensor(
                [run["results"][name] for run in runs], dtype=torch.float64
            )  # (seeds, 2)
            row = {
                "feature": feature,
                "protocol": protocol,
                "test": name,
                "top-1": top[:, 0].mean().item(),
            }
            row |= (
                {"+-": top[:, 0].std(correction=min(1, len(runs) - 1)).item()}
                if args.shots
                else {}
            )
            rows.append(
                row
                | {
                    "top-5": top[:, 1].mean().item(),
                    "lr": " ".join(f"{run['lr']:.2g}" for run in runs),
                }
            )
    return rows


def online(args, device, rank, world):
    """The rows of MAE's probe or of fine-tuning."""
    encoder = load_encoder(args.checkpoint, img_size=args.img_size).to(device)
    cfg, after = encoder.cfg, rand_augment(encoder.cfg.mean) if args.finetune else None
    view = functools.partial(train_view, scale=(0.08, 1.0), after=after)
    train_set, tests = open_labelled(
        args.data, args.val, cfg.size, view, args.seed, args.classes
    )
    if args.fraction < 1:
        train_set = train_set.subset(
            shot_indices(train_set.labels, args.fraction, args.seed).sort().values
        )
    complete(args, len(train_set), cfg.depth, device, world)
    torch.manual_seed(seed_for("head", args.seed))
    if args.finetune:
        model = Classifier(encoder, train_set.num_classes, args.drop_path).to(device)
        optimizer = torch.optim.AdamW(
            layer_groups(model, args.weight_decay, args.layer_decay), fused=True
        )
    else:
        model = Probe(encoder, train_set.num_classes).to(device)
        optimizer = LARS(model.heads.parameters(), weight_decay=args.weight_decay)
    fit(model, optimizer, train_set, cfg, args, device, rank, world)
    model.eval()
    rows, heads = [], FEATURES[args.finetune :]
    for name, dataset in tests.items():
        counts = torch.zeros(len(heads), 2, device=device)
        for sample in make_loader(
            Subset(dataset, range(rank, len(dataset), world)), workers=args.workers
        ):
            with (
                torch.no_grad(),
                torch.autocast(
                    device.type, torch.bfloat16, enabled=args.precision == "bf16"
                ),
            ):
                logits = model(normalize(sample.image.to(device), cfg))  # (F, B, C)
            counts += hits(logits.float(), sample.label.to(device))
        if world > 1:
            torch.distributed.all_reduce(counts)
        for feature, (one, five) in zip(
            heads, (100 * counts.cpu().double() / len(dataset)).tolist(), strict=True
        ):
            rows.append(
                {
                    "feature": feature,
                    "protocol": args.protocol,
                    "test": name,
                    "top-1": one,
                    "top-5": five,
                }
            )
    return rows


def main(argv=None):
    """Returns the rows of figures; the first process prints them as a table and, with all settings, as JSON."""
    args, began = arguments(argv), time.perf_counter()
    with processes(args.device) as (device, rank, world):
        args.sha256 = sha256(args.checkpoint) if args.checkpoint else None
        args.workers = (
            (0 if device.type == "cpu" else 8) if args.workers is None else args.workers
        )
        out = args.out or Path(args.features or args.checkpoint).with_name(
            "eval_linear.jsonl"
        )
        rows = (probe if args.protocol == "features" else online)(
            args, device, rank, world
        )
        if rank == 0:
            report(
                rows,
                vars(args) | {"seconds": round(time.perf_counter() - began, 1)},
                out,
            )
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval_linear.py: error: {error}")
