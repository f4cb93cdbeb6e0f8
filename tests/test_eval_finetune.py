"""
eval_finetune.py against timm.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attg_mae
import eval_finetune
from tests.helpers import SMALL, close, rand, randn


def classifier_and_timm(drop_path=0.0):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    encoder = attg_mae.build_model(attg_mae.Config(**SMALL | {"depth": 3})).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.05 * randn(*p.shape))
    ours = eval_finetune.Classifier(encoder, 5, drop_path)
    peer = timm_vit.VisionTransformer(
        img_size=32,
        patch_size=16,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=5,
        global_pool="avg",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        drop_path_rate=drop_path,
    )
    nn.init.normal_(ours.head.weight)
    assert not peer.load_state_dict(ours.state_dict(), strict=True).missing_keys
    return ours, peer


def test_classifier_equals_timm():
    """Logits and every gradient, with stochastic depth as well, which draws the same
    random numbers.
    """
    ours, peer = classifier_and_timm(0.5)
    imgs, labels = randn(16, 3, 32, 32), torch.randint(5, (16,))
    assert close(ours.eval()(imgs)[0], peer.eval()(imgs), 1e-5)
    logits = []
    for model in (ours.train(), peer.train()):
        torch.manual_seed(7)
        logits.append(model(imgs).view(16, 5))
        F.cross_entropy(logits[-1], labels).backward()
    assert close(*logits, 1e-5) and not close(logits[0], ours.eval()(imgs)[0], 1e-2)
    gradients = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, gradients[name].grad, 1e-4) or "attn.qkv.bias" in name, (
            name
        )
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(gradients)


def test_layer_groups_equal_timm():
    ours, peer = classifier_and_timm()
    got = {
        id(p): (g["scale"], g["weight_decay"])
        for g in eval_finetune.layer_groups(ours, 0.05, 0.65)
        for p in g["params"]
    }
    groups = pytest.importorskip("timm.optim").param_groups_layer_decay(
        peer, 0.05, peer.no_weight_decay(), layer_decay=0.65
    )
    want = {
        id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]
    }
    theirs = dict(peer.named_parameters())
    assert len(got) == len(want) == len(theirs)
    for name, p in ours.named_parameters():
        assert got[id(p)] == pytest.approx(want[id(theirs[name])]), name


def filled(depth, images=1281167, **given):
    """The recipe for these flags on 8 processes."""
    args = argparse.Namespace(accum=None, batch_size=None, epochs=None)
    vars(args).update(given)
    recipe = eval_finetune.complete(args, images, depth, torch.device("cpu"), 8)
    return asdict(recipe)


@pytest.mark.parametrize(
    ("depth", "epochs", "blr", "layer_decay", "drop_path"),
    [
        (12, 100, 5e-4, 0.65, 0.1),
        (24, 50, 1e-3, 0.75, 0.2),
        (32, 50, 1e-3, 0.75, 0.3),
    ],
)
def test_recipe_is_that_of_mae(depth, epochs, blr, layer_decay, drop_path):
    recipe = filled(depth)
    assert (recipe["epochs"], recipe["blr"]) == (epochs, blr)
    assert (recipe["layer_decay"], recipe["drop_path"]) == (layer_decay, drop_path)
    assert (recipe["batch_size"], recipe["accum"]) == (1024, 1)
    assert (recipe["weight_decay"], recipe["warmup_epochs"]) == (0.05, 5)
    assert recipe["min_lr"] == 1e-6


def test_recipe_takes_what_was_given():
    given = filled(12, epochs=10, blr=0.5, batch_size=64, warmup_epochs=None)
    assert (given["epochs"], given["blr"], given["batch_size"]) == (10, 0.5, 64)
    assert given["warmup_epochs"] == 2  # a fifth of few epochs
    given = filled(12, epochs=3, warmup_epochs=3.0, accum=2)
    assert (given["warmup_epochs"], given["accum"]) == (3, 2)


def test_fine_tuning_mixes_and_erases():
    imgs, labels, kinds = rand(64, 3, 16, 16), torch.arange(64) % 4, set()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, targets = eval_finetune.mix(imgs.clone(), labels, 4)
        torch.manual_seed(seed)
        again = eval_finetune.mix(imgs.clone(), labels, 4)
        assert mixed.equal(again[0]) and targets.equal(again[1])
        assert mixed.shape == imgs.shape
        assert torch.allclose(targets.sum(1), torch.ones(64))
        assert targets.count_nonzero(1).max() <= 2
        other = (
            (mixed == imgs).all(1).float().mean().item(),
            (mixed == imgs.roll(1, 0)).all(1).float().mean().item(),
        )
        # Of pixels that are those of one image
        kinds.add("cutmix" if sum(other) > 0.7 else "mixup")
    assert kinds == {"cutmix", "mixup"}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            eval_finetune.v2,
            "RandomChoice",
            lambda _: lambda imgs, labels: (imgs, labels),
        )
        changed = [
            (eval_finetune.mix(imgs, labels, 4)[0] != imgs)
            .any(1)
            .flatten(1)
            .float()
            .mean(1)
            for _ in range(10)
        ]
    share = torch.stack(changed)
    assert 0.2 < (share > 0).float().mean() < 0.3
    assert 0.01 < share[share > 0].min()
    assert share.max() < 0.4


FINETUNE_ERRORS = [
    ("", "checkpoint"),
    ("encoder.pt --fraction 0", "--fraction 0.0 above 0"),
    ("encoder.pt --drop_path -1", "--drop_path -1.0 not be negative"),
    ("encoder.pt --epochs 0", "--epochs 0 at least 1"),
    ("encoder.pt --batch_size 999", "--batch_size 999 25"),
    ("encoder.pt --batch_size 7 --accum 2", "--batch_size 7 --accum 2 multiple"),
    ("encoder.pt --val train", "--val train test"),
    ("encoder.pt --save text.pt", "text.pt damaged"),
    ("encoder.pt --save encoder.pt", "--save encoder.pt another file"),
]


@pytest.mark.parametrize(
    ("flags", "words"), FINETUNE_ERRORS, ids=[x[0] for x in FINETUNE_ERRORS]
)
def test_eval_finetune_errors(flags, words, wrong, labelled):
    files = {p: p.read_bytes() for p in Path().rglob("*.pt")}
    argv = [*flags.split(), "--data", labelled["data"], "--device", "cpu"]
    with pytest.raises((ValueError, OSError)) as error:
        eval_finetune.main(argv)
    assert [word for word in words.split() if word not in str(error.value)] == []
    assert {p: p.read_bytes() for p in Path().rglob("*.pt")} == files
