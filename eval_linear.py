"""
Linear probes of an encoder (arXiv 2402.15172, Tables 1, 5, 6 and 7).

    python eval_linear.py out/NAME/encoder.pt --data PATH_OR_NAME
    python eval_linear.py out/NAME/encoder.pt --data PATH_OR_NAME --shots 10 25 50
    python eval_linear.py out/NAME/encoder.pt --data in9l --val original only_fg mixed_rand
    torchrun --nproc_per_node=8 eval_linear.py CHECKPOINT --data imagenet --protocol mae

--protocol features (default): features are computed once, and linear layers are trained
on them with ten learning rates for 100 epochs, at least 1,000 steps; held-out training
images select the learning rate.

--protocol mae: the probe of facebookresearch/mae on random crops, by LARS: 90 epochs
(50 from ViT-L on), 16,384 images per batch (with few images a tenth of them), blr 0.1,
10 epochs of warm-up, no weight decay.

Shapes: n training images, B images, D width, C classes, R learning rates, F features
(class token, patch mean).
"""

if __name__ == "__main__":
    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()

import dataclasses
import functools
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from attg.cli import RunFlags, check_unused, flag, parse, run_cli
from attg.datasets import shot_indices
from attg.evaluation import (
    EvalFlags,
    FeatureFlags,
    LabelFlags,
    draw_shots,
    evaluate,
    fill_defaults,
    labeled_features,
    mean_and_std,
    open_encoder,
    save_figures,
    topk_accuracy,
)
from attg.features import FEATURES, pool_tokens
from attg.finetuning import RecipeFlags, fit, open_training, score
from attg.images import seed_for
from attg.log import progress
from attg_mae import load_encoder, lr_at

# 1e-4 to 3, for SGD with momentum 0.9 on standardized features.
LRS = tuple(10 ** (e / 2) for e in range(-8, 2))


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, LabelFlags, RecipeFlags, FeatureFlags, RunFlags):
    protocol: str = flag(
        "features", "probe on features, or MAE's on crops", choices=("features", "mae")
    )


# Flags without an effect, by protocol.
UNUSED = {
    "features": "label_fraction accum blr min_lr warmup_epochs weight_decay save".split(),
    "mae": "shots features save_features".split(),
}


def linear_probe(features, labels, tests, lrs=LRS, seed=0, device="cpu", **training):
    """Train a linear layer on features (n, D) and labels (n,), and score it on tests.

    tests: {name: (features, labels)}; training: epochs and batch_size, see train_heads.
    Features are standardized by the training images' mean and variance (a BatchNorm
    without affine, with exact statistics). Cross-validation selects one of lrs, then a
    layer is trained on all images. Returns {"lr": the selected one, "held_out": {lr: top-1
    in cross-validation}, "results": {name: [top-1, top-5]}}, in percent, and "guesses":
    {name: classes (B,)}.
    """
    if labels.bincount().max() < 2:
        raise ValueError("one image per class: selecting a learning rate takes two")
    if not features.isfinite().all():
        raise ValueError("features are not finite; did the encoder's training finish?")
    var, mean = torch.var_mean(features, dim=0, correction=0)

    def standardize(x):
        x = (x - mean) / (var + 1e-6).sqrt()
        # A last column of ones is the input of the biases.
        return F.pad(x, (0, 1), value=1.0).to(device)

    x, y = standardize(features), labels.to(device)
    training |= {"num_classes": int(labels.max()) + 1, "seed": seed}
    top1 = cross_validate(x, y, lrs, **training)  # (R,)
    lr = lrs[top1.argmax()]
    weights = train_heads(x, y, [lr], **training)
    if not weights.isfinite().all():
        raise ValueError(f"learning rate {lr:g}: diverged")
    results, guesses = {}, {}
    for name, (test_features, truth) in tests.items():
        (classes,) = best_classes(standardize(test_features), weights)
        results[name] = topk_accuracy(classes, truth)
        guesses[name] = classes[:, 0]
    held_out = dict(zip(lrs, top1.tolist(), strict=True))
    return {"lr": lr, "held_out": held_out, "results": results, "guesses": guesses}


def cross_validate(x, labels, lrs, seed, **training):
    """Top-1 (R,) of train_heads on held-out fifths of each class.

    All five are held out in turn if there are up to 10,000 images, otherwise one of them.
    """
    fold = torch.empty(len(labels), dtype=torch.long)
    # All images, class by class in random order, are dealt out to the five folds.
    fold[shot_indices(labels.cpu(), 1.0, seed)] = torch.arange(len(labels)) % 5
    accuracy = []
    for number in fold.unique()[: 5 if len(labels) <= 10_000 else 1]:
        test = (fold == number).to(x.device)
        weights = train_heads(x[~test], labels[~test], lrs, seed=seed, **training)
        classes = best_classes(x[test], weights)
        accuracy.append(topk_accuracy(classes, labels[test].cpu()))
    return torch.tensor(accuracy, dtype=torch.float64).mean(dim=0)[:, 0]


def train_heads(
    x, labels, lrs, num_classes, seed, epochs=100, batch_size=256, min_steps=1000
):
    """Train softmax regressions (R, D + 1, C), one for each learning rate.

    x (n, D + 1), whose last column is 1, labels (n,), both on one device; the last row of
    the result is the biases. SGD with momentum 0.9 and a half-cycle cosine.
    """
    # All R regressions are one matrix (D + 1, R * C), so they share their products.
    rates = torch.tensor(lrs, device=x.device).repeat_interleave(num_classes)
    weights = torch.zeros(x.shape[1], len(lrs) * num_classes, device=x.device)
    momentum = torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed_for("probe", seed))
    # Batches of equal size: in a small last one each image would weigh too much.
    steps_per_epoch = math.ceil(len(x) / batch_size)
    total = max(min_steps, epochs * steps_per_epoch)
    for step in progress(range(total), desc="probe"):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
            batches = order.tensor_split(steps_per_epoch)
        rows = batches[step % steps_per_epoch]
        batch = x[rows]
        logits = (batch @ weights).view(len(rows), -1, num_classes)  # (B, R, C)
        # Gradient of the cross-entropy with respect to the logits: softmax - one-hot.
        error = logits.softmax(dim=2)
        error[torch.arange(len(rows), device=x.device), :, labels[rows]] -= 1
        momentum.mul_(0.9).addmm_(batch.T, error.flatten(1), alpha=1 / len(rows))
        weights -= lr_at(step, total, 0, 1.0) * rates * momentum
    return weights.view(len(weights), -1, num_classes).transpose(0, 1)


def best_classes(x, weights):
    """Top-5 classes (R, n, up to 5), best first, of x (n, D + 1) by R linear layers."""
    k = min(5, weights.shape[2])
    chunks = [(rows @ weights).topk(k).indices.cpu() for rows in x.split(4096)]
    return torch.cat(chunks, dim=1)


def probe_features(settings, data, dist_info):
    """Results of the probe on the features of --features or of a checkpoint."""
    device, rank, _ = dist_info
    fill_defaults(settings, epochs=100, batch_size=256, precision="fp32")
    train, parts = labeled_features(load_encoder, settings, data, dist_info)
    if rank != 0:
        return []  # rank 0 trains alone

    draws = draw_shots(train["labels"], settings, "linear")
    options = {"epochs": settings.epochs, "batch_size": settings.batch_size}
    results = []
    for feature, protocol in itertools.product(FEATURES, draws):
        tests = {name: (part[feature], part["labels"]) for name, part in parts.items()}
        runs = []
        for seed, rows in enumerate(draws[protocol], settings.seed):
            x, y = train[feature][rows], train["labels"][rows]
            run = linear_probe(x, y, tests, seed=seed, device=device, **options)
            runs.append(run)
        held_out = [run["held_out"] for run in runs]
        chosen = {"lr": " ".join(f"{run['lr']:.2g}" for run in runs)}
        for name in tests:
            result = {"feature": feature, "protocol": protocol, "test": name}
            metrics = mean_and_std([run["results"][name] for run in runs])
            metrics |= chosen | {"images": len(x), "test_images": len(tests[name][1])}
            results.append(result | metrics | {"held_out": held_out})
    if settings.show:
        name = settings.val[0]
        save_figures(
            settings, data, parts[name]["labels"], runs[-1]["guesses"][name], feature
        )
    return results


class LARS(torch.optim.Optimizer):
    """SGD that scales the steps of matrices by 0.001 |weights| / |gradient|.

    You et al., arXiv 1708.03888, in the variant of facebookresearch/mae.
    """

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                # Biases are neither decayed nor scaled.
                if p.dim() > 1:
                    update = update + group["weight_decay"] * p
                    scale = 0.001 * p.norm() / update.norm()
                    # If a norm is 0, the step is SGD's.
                    usable = scale.isfinite() & (scale > 0)
                    update = update * torch.where(usable, scale, 1.0)
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.mul_(group["momentum"]).add_(update)
                p -= group["lr"] * average


class Probe(nn.Module):
    """A BatchNorm without affine and a linear layer for each feature of an encoder.

    The encoder is not a submodule: it is not trained and stays in eval mode.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.normalize = encoder.normalize
        self.tokens = encoder.forward_features
        self.pool = functools.partial(pool_tokens, encoder)
        width = encoder.cfg.width
        self.norm = nn.BatchNorm1d(2 * width, eps=1e-6, affine=False)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(2))
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, imgs):
        with torch.no_grad():
            tokens = self.tokens(imgs).float()  # (B, N, D)
        # The probe and its statistics are fp32 in any precision.
        with torch.autocast(imgs.device.type, enabled=False):
            features = torch.cat(self.pool(tokens), dim=1)
            class_token, patch_mean = self.norm(features).chunk(2, dim=1)  # (B, D)
            logits = self.heads[0](class_token), self.heads[1](patch_mean)
            return torch.stack(logits)  # (F, B, C)


# Recipes of facebookresearch/mae, as flags.
VIT_BASE = {"epochs": 90, "batch_size": 16384, "warmup_epochs": 10}
VIT_BASE |= {"blr": 0.1, "min_lr": 0.0, "weight_decay": 0.0}
VIT_LARGE = VIT_BASE | {"epochs": 50}
RECIPES = {24: VIT_LARGE, 32: VIT_LARGE}  # by the encoder's depth


def probe_mae(settings, data, dist_info):
    """Results of MAE's probe."""
    encoder = open_encoder(load_encoder, settings).to(dist_info[0])
    recipe = RECIPES.get(encoder.cfg.depth, VIT_BASE)
    options = (settings, data, recipe, 512, dist_info)
    train_set, tests = open_training(encoder.cfg, *options)
    torch.manual_seed(seed_for("head", settings.seed))
    probe = Probe(encoder, train_set.num_classes).to(dist_info[0])
    optimizer = LARS(probe.heads.parameters(), weight_decay=settings.weight_decay)
    fit(probe, optimizer, train_set, settings, lr_at, dist_info)
    return score(probe, tests, FEATURES, "mae", settings, data, dist_info)


PROTOCOLS = {"features": probe_features, "mae": probe_mae}


def main(argv=None, data=None):
    """Returns the results, a list of dicts; data: see attg.evaluation.evaluate."""
    settings = parse(Settings, __doc__, argv)
    protocol = settings.protocol
    check_unused(settings, UNUSED[protocol], f"has no effect on --protocol {protocol}")
    if 1 in settings.shots:
        raise ValueError("--shots 1: use 2 or more, held-out images select the lr")
    return evaluate("eval_linear", settings, PROTOCOLS[protocol], data)


if __name__ == "__main__":
    run_cli(main, "lower --batch_size, or raise --accum of --protocol mae")
