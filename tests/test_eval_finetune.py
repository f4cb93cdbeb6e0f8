"""eval_finetune.py against timm; the recipes of both programs that train on images."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import attg_mae
import eval_finetune
import eval_linear
from attg.features import pool_tokens
from attg.finetuning import resolve, save
from tests.helpers import SMALL, close, noise, rand, randn, shake, timm_model


def classifier_and_timm(drop_path=0.0):
    encoder = shake(attg_mae.ViT(attg_mae.Config(**SMALL | {"depth": 3})), 0.05)
    ours = eval_finetune.Classifier(encoder, 5, drop_path)
    options = {"num_classes": 5, "global_pool": "avg", "drop_path_rate": drop_path}
    peer = timm_model(16, 3, 2, 32, 16, **options)
    nn.init.normal_(ours.head.weight)
    assert not peer.load_state_dict(ours.state_dict(), strict=True).missing_keys
    return ours, peer


def test_classifier_equals_timm(tmp_path):
    """Logits and gradients, also with stochastic depth, which draws the same numbers.

    A file of --save is an encoder, whose patch mean is what the head has seen.
    """
    ours, peer = classifier_and_timm(0.5)
    imgs, labels = randn(16, 3, 32, 32), torch.randint(5, (16,))
    assert close(ours.eval()(imgs)[0], peer.eval()(imgs), 1e-5)
    save(tmp_path / "w.pt", ours, torch.optim.AdamW(ours.parameters()), {}, 0, "abcde")
    encoder = attg_mae.load_encoder(tmp_path / "w.pt", heads=2)
    patch_mean = pool_tokens(encoder, encoder.forward_features(imgs))[1]
    assert close(ours.head(patch_mean), peer(imgs), 1e-5)
    logits = []
    for model in (ours.train(), peer.train()):
        torch.manual_seed(7)
        logits.append(model(imgs).view(16, 5))
        F.cross_entropy(logits[-1], labels).backward()
    assert close(*logits, 1e-5) and not close(logits[0], ours.eval()(imgs)[0], 1e-2)
    theirs = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        # The gradient of the key bias is zero but for rounding.
        equal = close(p.grad, theirs[name].grad, 1e-4)
        assert equal or "attn.qkv.bias" in name, name
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(theirs)


def test_layer_groups_equal_timm():
    optim = pytest.importorskip("timm.optim")
    ours, peer = classifier_and_timm()
    got, want = {}, {}
    for group in eval_finetune.layer_groups(ours, 0.05, 0.65):
        values = group["scale"], group["weight_decay"]
        got |= {id(p): values for p in group["params"]}
    skip = peer.no_weight_decay()
    for group in optim.param_groups_layer_decay(peer, 0.05, skip, layer_decay=0.65):
        values = group["lr_scale"], group["weight_decay"]
        want |= {id(p): values for p in group["params"]}
    theirs = dict(peer.named_parameters())
    assert len(got) == len(want) == len(theirs)
    for name, p in ours.named_parameters():
        assert got[id(p)] == pytest.approx(want[id(theirs[name])]), name


def resolved(program, depth, images=1281167, micro_batch=128, **given):
    """Settings of a program for these flags on 8 CPU ranks."""
    settings = program.Settings(checkpoint="x", **given)
    recipe = program.RECIPES.get(depth, program.VIT_BASE)
    resolve(settings, recipe, images, micro_batch, torch.device("cpu"), 8)
    return settings


# Epochs, batch, accum, blr, warm-up, weight decay, lowest rate, then layer decay and
# stochastic depth, as in the commands of facebookresearch/mae.
RECIPES = [
    (eval_finetune, 12, 128, (100, 1024, 1, 5e-4, 5, 0.05, 1e-6, 0.65, 0.1)),
    (eval_finetune, 24, 128, (50, 1024, 1, 1e-3, 5, 0.05, 1e-6, 0.75, 0.2)),
    (eval_finetune, 32, 128, (50, 1024, 1, 1e-3, 5, 0.05, 1e-6, 0.75, 0.3)),
    (eval_linear, 12, 512, (90, 16384, 4, 0.1, 10, 0, 0)),
    (eval_linear, 24, 512, (50, 16384, 4, 0.1, 10, 0, 0)),
]
FLAGS = "epochs batch_size accum blr warmup_epochs weight_decay min_lr".split()
FLAGS += ["layer_decay", "drop_path"]


def test_recipes_are_those_of_mae(monkeypatch):
    """They follow the flags and the number of images; a GPU beside the CPU is not used."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    for program, depth, micro_batch, want in RECIPES:
        settings = resolved(program, depth, micro_batch=micro_batch)
        got = [getattr(settings, name) for name in FLAGS if hasattr(settings, name)]
        assert tuple(got) == want and settings.precision == "fp32"
    given = {"epochs": 10, "blr": 0.5, "batch_size": 64, "drop_path": 0.0}
    settings = resolved(eval_finetune, 12, **given)
    assert given.items() <= vars(settings).items()
    assert settings.warmup_epochs == 2  # a fifth of few epochs
    # A tenth of few images, as a power of two, and the square root of its ratio to 1,024.
    few = resolved(eval_finetune, 12, images=3000)
    assert (few.batch_size, few.accum) == (256, 1)
    assert few.blr * few.batch_size / 256 == pytest.approx(2e-3 * 0.25**0.5)


def test_mixup_cutmix_and_erasing(monkeypatch):
    imgs, labels, kinds = rand(64, 3, 16, 16), torch.arange(64) % 4, set()
    for _ in range(30):
        mixed, targets = eval_finetune.mix(imgs.clone(), labels, 4)
        assert torch.allclose(targets.sum(1), torch.ones(64))
        # Fraction of pixels that are those of a single image.
        own, other = (mixed == imgs).all(1), (mixed == imgs.roll(1, 0)).all(1)
        pure = own.float().mean() + other.float().mean()
        kinds.add("cutmix" if pure > 0.7 else "mixup")
    assert kinds == {"cutmix", "mixup"}
    # Erasing alone.
    keep = staticmethod(lambda _: lambda imgs, labels: (imgs, labels))
    monkeypatch.setattr(eval_finetune.v2, "RandomChoice", keep)
    erased = [eval_finetune.mix(imgs, labels, 4)[0] != imgs for _ in range(10)]
    erased = torch.stack(erased).any(2)  # (10, 64, 16, 16)
    height, width = (erased.any(dim).sum(2) for dim in (3, 2))
    assert (height > 2 * width).any() and (width > 2 * height).any()
    area = erased.flatten(2).float().mean(2)  # (10, 64)
    assert 0.2 < (area > 0).float().mean() < 0.3
    assert 0.01 < area[area > 0].min() and area.max() < 0.4


def test_rand_augment_has_magnitude_9_of_10(monkeypatch):
    """Of a rotation by up to 30 degrees, 27; the corners are filled."""
    space = v2.RandAugment._AUGMENTATION_SPACE
    only = {"Rotate": space["Rotate"]}
    monkeypatch.setattr(v2.RandAugment, "_AUGMENTATION_SPACE", only)
    first, second = eval_finetune.rand_augment((0.5, 0.4, 0.3)).transforms
    assert first.p == second.p == 0.5
    image, seen = noise(32, 32), set()
    options = v2.InterpolationMode.BICUBIC, False, None, [128, 102, 76]
    want = {v2.functional.rotate(image, x, *options).tobytes() for x in (27, -27)}
    for one in (*first.transforms, *second.transforms):
        seen |= {one(image).tobytes() for _ in range(10)}
    assert seen == want
