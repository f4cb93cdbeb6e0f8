"""
What a linear layer makes of an encoder (arXiv 2402.15172, Tables 1, 5, 6 and 7).

    python eval_linear.py out/NAME/encoder.pt --data PATH_OR_NAME
    python eval_linear.py out/NAME/encoder.pt --data PATH_OR_NAME --shots 10 25 50
    python eval_linear.py out/NAME/encoder.pt --data in9l --val original only_fg mixed_rand
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT --data imagenet --protocol mae

--protocol features (default): linear layers with a grid of learning rates on features
that are computed once; held-out training images choose. --shots: labelled images a class.
--protocol mae: the probe of MAE, by random crops and LARS. All weights are trained by
eval_finetune.py.

Shapes: n training images, B images, D width, C classes, R learning rates, F features
(class token, patch mean).
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import functools
import math
import shlex
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from attg.cli import Parser, end, progress, say
from attg.datasets import open_labelled, shot_indices
from attg.evaluation import (
    MAKING,
    add_data,
    add_running,
    add_shots,
    add_training_data,
    check_flags,
    check_shots,
    evaluate,
    refuse_idle,
    view_of,
)
from attg.features import FEATURES, make_features, read_features
from attg.files import require, sha256
from attg.finetuning import Recipe, fill_in, fit, hits, score, take_fraction
from attg.images import train_view
from attg.seeding import seed_for
from attg_mae import load_encoder, lr_at

# 1e-4 to 3, for SGD with momentum 0.9 on standardised features.
LRS = tuple(10 ** (e / 2) for e in range(-8, 2))

# -- The probe on kept features --------------------------------------------------------


def train_heads(x, labels, lrs, num_classes, epochs, batch_size, seed, least=1000):
    """Softmax regressions (R, D + 1, C), one for each learning rate.

    x (n, D + 1), whose last column is 1, labels (n,), both on one device; the last row of
    the result is the biases. SGD with momentum 0.9, half-cycle cosine; at least `least`
    steps.
    """
    # All R regressions are one matrix (D + 1, R * C): one product for all.
    rates = torch.tensor(lrs, device=x.device).repeat_interleave(num_classes)
    weights = torch.zeros(x.shape[1], len(lrs) * num_classes, device=x.device)
    momentum = torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed_for("probe", seed))
    # Batches of equal size: in a small last one an image would count too much.
    steps_per_epoch = math.ceil(len(x) / batch_size)
    total = max(least, epochs * steps_per_epoch)
    for step in progress(range(total), desc="probe"):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
            batches = order.tensor_split(steps_per_epoch)
        rows = batches[step % steps_per_epoch]
        batch = x[rows]
        logits = (batch @ weights).view(len(rows), -1, num_classes)  # (B, R, C)
        # The gradient of the cross-entropy for the logits: softmax - one-hot.
        error = logits.softmax(dim=2)
        error[torch.arange(len(rows), device=x.device), :, labels[rows]] -= 1
        momentum.mul_(0.9).addmm_(batch.T, error.flatten(1), alpha=1 / len(rows))
        weights -= lr_at(step, total, 0, 1.0) * rates * momentum
    return weights.view(len(weights), -1, num_classes).transpose(0, 1)


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
    """Trains a linear layer on features (n, D) and labels (n,), and scores it on tests.

    tests: {name: (features, labels)}. Features are standardised by the training images'
    mean and variance (a BatchNorm without affine whose statistics are exact). A fifth of
    the training images, spread over the classes, is held out to choose among lrs, each
    fifth in turn if there are up to 10,000. Then all images are trained on.
    Returns {"lr": the choice, "held_out": [top-1 for each of lrs], "results": {name:
    [top-1, top-5]}}, in percent.
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

    x = standardise(features, mean, var).to(device)
    y = labels.to(device)
    tops = []
    for held in held_out_folds(labels, seed):
        held = held.to(device)
        weights = train(x[~held], y[~held], lrs)
        tops.append(percent_right(x[held], y[held], weights)[:, 0])
    held_out = torch.stack(tops).mean(dim=0)  # (R,)
    best = lrs[held_out.argmax()]

    weights = train(x, y, [best])
    require(weights.isfinite().all(), f"--lrs {best:g}: diverged; give lower ones")
    results = {}
    for name, (test_features, truth) in tests.items():
        test = standardise(test_features, mean, var).to(device)
        results[name] = percent_right(test, truth.to(device), weights)[0].tolist()
    return {"lr": best, "held_out": held_out.tolist(), "results": results}


def standardise(features, mean, var):
    """(n, D) -> (n, D + 1): a last column of ones is the input of the biases."""
    x = (features - mean) / (var + 1e-6).sqrt()
    return F.pad(x, (0, 1), value=1.0)


def held_out_folds(labels, seed):
    """Masks (n,) of the images that are held out, a fifth of each class: one or five."""
    fold = torch.empty(len(labels), dtype=torch.long)
    # All images class by class, in random order, are dealt out to the five folds.
    fold[shot_indices(labels, 1.0, seed)] = torch.arange(len(labels)) % 5
    used = 5 if len(labels) <= 10_000 else 1
    return [fold == k for k in fold.unique()[:used]]


def percent_right(x, truth, weights):
    """Top-1 and top-5 (R, 2) of regressions (R, D + 1, C) on x (n, D + 1)."""
    right = 0
    for rows, classes in zip(x.split(4096), truth.split(4096), strict=True):
        right = right + hits(rows @ weights, classes).cpu().double()
    return 100 * right / len(truth)


def probe_features(args, settings, place):
    """The rows of the linear probe on kept features, and all settings."""
    device, rank, _ = place
    if args.features:
        parts = read_features(args.features)
        labels = parts["train"]["labels"]
        require(
            (labels >= 0).all(), f"--features {args.features}: of images without labels"
        )
        check_shots(labels, args.shots, rank)
    else:
        parts = labelled_features(args, settings, place)
    settings = settings | parts.pop("settings")
    settings["epochs"] = args.epochs or 100
    settings["batch_size"] = args.batch_size or 256
    settings["held_out"] = {}
    if rank != 0:
        return [], settings  # one process trains

    train = parts.pop("train")
    cases = [("linear", args.fraction, [args.seed])]
    if args.shots:
        cases = [(f"{n} shots", n, range(args.seeds)) for n in args.shots]
    rows = []
    for feature in FEATURES:
        tests = {}
        for name, part in parts.items():
            tests[name] = part[feature], part["labels"]
        for protocol, share, seeds in cases:
            runs = []
            for seed in seeds:
                chosen = shot_indices(train["labels"], share, seed)
                run = linear_probe(
                    train[feature][chosen],
                    train["labels"][chosen],
                    tests,
                    lrs=args.lrs,
                    epochs=settings["epochs"],
                    batch_size=settings["batch_size"],
                    seed=seed,
                    device=device,
                )
                runs.append(run)
                grid = {}
                for lr, top1 in zip(args.lrs, run["held_out"], strict=True):
                    grid[f"{lr:.2g}"] = round(top1, 2)
                case = f"{feature}, {protocol}, seed {seed}"
                settings["held_out"][case] = grid
                say(f"{case}, held-out top-1 by learning rate: {grid}")
            for name in tests:
                row = {"feature": feature, "protocol": protocol, "test": name}
                figures = summary(runs, name, bool(args.shots))
                rows.append(row | figures | {"images": len(chosen)})
    return rows, settings


def summary(runs, name, spread):
    """Figures of a test set: means over runs; spread: with the standard deviation."""
    tops = [run["results"][name] for run in runs]
    top1, top5 = torch.tensor(tops, dtype=torch.float64).unbind(dim=1)  # (seeds,)
    figures = {"top-1": top1.mean().item()}
    if spread:
        # Of a single run it is 0.
        figures["+-"] = top1.std(correction=min(1, len(runs) - 1)).item()
    figures["top-5"] = top5.mean().item()
    figures["lr"] = " ".join(f"{run['lr']:.2g}" for run in runs)
    return figures


def labelled_features(args, settings, place):
    """The features of the training images and of each test set; see make_features."""
    encoder = load_encoder(args.checkpoint, img_size=args.img_size).to(place[0])
    view = view_of(args, encoder.cfg)
    train_set, tests = open_labelled(args.data, args.val, **view)
    if args.shots:
        # What cannot be drawn is an error that should come before the long part.
        check_shots(train_set.labels, args.shots, place[1])
    sets = {"train": train_set, **tests}
    return make_features(encoder, sets, args.batch_size or 256, settings, place)


# -- MAE's probe -----------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """SGD whose steps for matrices are scaled by 0.001 |weights| / |gradient|.

    You et al., arXiv 1708.03888, as facebookresearch/mae has it.
    """

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, trust=0.001):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                # Biases are neither decayed nor scaled.
                if p.dim() > 1:
                    update = update + group["weight_decay"] * p
                    scale = group["trust"] * p.norm() / update.norm()
                    # Where a norm is 0 the step is that of SGD.
                    usable = scale.isfinite() & (scale > 0)
                    update = update * torch.where(usable, scale, 1.0)
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].mul_(group["momentum"]).add_(update)
                p -= group["lr"] * average


class Probe(nn.Module):
    """A BatchNorm without affine and a linear layer for each feature of an encoder.

    The encoder is no part of the module: it is not trained, and stays in eval mode.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.normalize = encoder.normalize
        self.tokens = encoder.forward_features
        width = encoder.cfg.width
        self.norm = nn.BatchNorm1d(len(FEATURES) * width, eps=1e-6, affine=False)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in FEATURES)
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, imgs):
        with torch.no_grad():
            tokens = self.tokens(imgs).float()  # (B, N, D)
        # The probe itself is fp32 in every precision, as are its statistics.
        with torch.autocast(imgs.device.type, enabled=False):
            features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
            features = self.norm(features).chunk(len(FEATURES), dim=1)  # F times (B, D)
            pairs = zip(self.heads, features, strict=True)
            return torch.stack([head(x) for head, x in pairs])  # (F, B, C)


# Of facebookresearch/mae; from ViT-L on half the epochs and more.
VIT_BASE = Recipe(
    epochs=90,
    batch_size=16384,
    blr=0.1,
    warmup_epochs=10,
    weight_decay=0.0,
    min_lr=0.0,
)
VIT_LARGE = dataclasses.replace(VIT_BASE, epochs=50)
RECIPES = {24: VIT_LARGE, 32: VIT_LARGE}  # by the depth of the encoder


def complete(args, images, depth, device, world):
    """The recipe for `images` training images: MAE's, but for what was given."""
    recipe = RECIPES.get(depth, VIT_BASE)
    return fill_in(recipe, args, images, 512, device, world)


def probe_mae(args, settings, place):
    """The rows of MAE's probe, and all settings."""
    device, _, world = place
    encoder = load_encoder(args.checkpoint, img_size=args.img_size).to(device)
    settings["sha256"] = sha256(args.checkpoint)
    cfg = encoder.cfg
    view = functools.partial(train_view, scale=(0.08, 1.0))
    train_set, tests = open_labelled(
        args.data, args.val, augment=view, seed=args.seed, **view_of(args, cfg)
    )
    train_set = take_fraction(train_set, args.fraction, args.seed)
    recipe = complete(args, len(train_set), cfg.depth, device, world)
    settings = settings | dataclasses.asdict(recipe)

    torch.manual_seed(seed_for("head", args.seed))
    probe = Probe(encoder, train_set.num_classes).to(device)
    optimizer = LARS(probe.heads.parameters(), weight_decay=recipe.weight_decay)
    fit(probe, optimizer, train_set, recipe, settings, lr_at, place)
    rows = score(probe, tests, FEATURES, "mae", settings, place)
    return rows, settings


# -- The command line ------------------------------------------------------------------


def arguments(argv):
    parser = Parser(description=__doc__)
    add_data(
        parser.add_argument,
        checkpoint="file with an encoder; not needed with --features",
    )
    add_training_data(parser.add_argument)
    add_probe(parser.add_argument)
    add_training(parser.add_argument)
    add_running(parser.add_argument, "the checkpoint or the features")
    args = parser.parse_args(argv)
    check_protocol(parser, args, argv)
    if args.features:
        refuse_idle(parser, args, MAKING, "does nothing beside --features")
    require(
        args.checkpoint or args.features,
        "a checkpoint is needed: eval_linear.py CHECKPOINT, or --features FILE",
    )
    check_flags(args)
    enough = not args.shots or min(args.shots) > 1
    alone = not args.shots or args.fraction == 1
    require(
        enough and alone,
        f"--shots {args.shots}: 2 are needed, one to choose the learning rate; and no "
        "--fraction beside it",
    )
    return args


# Flags that mean something to some of the protocols only.
OPTIONS = {
    "features": ("shots", "lrs", "features", "save_features"),
    "finetune": ("layer_decay", "drop_path"),
    "mae and finetune": ("accum", "blr", "warmup_epochs", "weight_decay", "save"),
}


def check_protocol(parser, args, argv):
    """ValueError for --finetune, and for flags that the protocol has no use for."""
    require(
        not args.finetune or args.protocol == "features",
        "--finetune and --protocol mae: use one of them",
    )
    if args.finetune:
        words = sys.argv[1:] if argv is None else argv
        others = shlex.join(word for word in words if word != "--finetune")
        raise ValueError(
            "--finetune: has a program of its own with the same flags; run "
            f"python eval_finetune.py {others}"
        )
    for protocols, names in OPTIONS.items():
        if args.protocol in protocols.split():
            continue
        why = f"of {protocols}, does nothing in {args.protocol}"
        refuse_idle(parser, args, names, why)


def add_probe(flag):
    flag(
        "--protocol",
        choices=("features", "mae"),
        default="features",
        help="of the linear probe [%(default)s]",
    )
    flag("--finetune", action="store_true", help="is eval_finetune.py now")
    add_shots(flag, use="; --protocol features")
    flag(
        "--lrs",
        type=float,
        nargs="+",
        default=LRS,
        help="learning rates of --protocol features [1e-4 to 3]",
    )
    flag(
        "--features",
        help="file of --save_features, of this program or eval_knn.py; its images and "
        "test sets",
    )
    flag("--save_features", help="file to write the features to")


def add_training(flag):
    flag(
        "--epochs",
        type=int,
        help="[features 100, at least 1,000 steps; mae 90, from ViT-L on 50]",
    )
    flag(
        "--batch_size",
        type=int,
        help="[features 256, of the encoder too; mae 16384 of all processes, a tenth of "
        "few]",
    )
    flag("--accum", type=int, help="micro-batches of a step [for mae of 512 images]")
    flag("--blr", type=float, help="lr = blr * batch_size / 256 [mae 0.1]")
    flag("--warmup_epochs", type=float, help="[mae 10; a fifth of few epochs]")
    flag("--weight_decay", type=float, help="[mae 0]")
    flag("--layer_decay", type=float, help="of eval_finetune.py")
    flag("--drop_path", type=float, help="of eval_finetune.py")
    flag(
        "--precision",
        choices=("fp32", "bf16"),
        help="[features fp32, mae bf16 on a GPU that has it]",
    )


PROTOCOLS = {"features": probe_features, "mae": probe_mae}


def main(argv=None, data=None):
    """Returns the rows of figures; data: of one's own, see attg.evaluation.evaluate."""
    args = arguments(argv)
    return evaluate("eval_linear", args, PROTOCOLS[args.protocol], data)


if __name__ == "__main__":
    end(main, memory="lower --batch_size, or raise --accum of --protocol mae")
