"""
Whole runs against the same written out. Runs that are compared with each other (resumed,
on two processes, with workers) do not show a fault that both have.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import attg.finetuning
import attg_mae
import eval_finetune
import eval_linear
from attg.datasets import open_data
from attg.features import FEATURES
from attg.images import seed_for
from tests.helpers import TINY, last, records, train

STEPS = 24  # of TINY: 4 epochs of 6


def half_cosine(step, steps, warmup):
    """Factor of the learning rate: linear up, then half a cosine down to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def loss_of(model, seen, m_norm, tau):
    """Eq. 1 and 2 for the inputs of a recorded pass."""
    # As noise, the mask itself keeps its zeros visible.
    _, pred, mask = model(seen.imgs, noise=seen.mask)
    assert mask.equal(seen.mask)
    patches = model.patchify(seen.imgs)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    x_norm = (patches - patches.mean(-1, keepdim=True)) / deviation
    error = (pred - x_norm).square().mean(-1)
    return (mask * (m_norm / tau).exp() * error).sum() / mask.sum()


def features_of(encoder, imgs):
    """Class token and patch mean (B, 2 D), in float64."""
    with torch.no_grad():
        tokens = encoder.forward_features(imgs).double()
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def reference_run(passes, maps):
    """(loss, norm of the gradient) of the steps of a run and its model, written out.

    maps: M_norm of the steps; tau, weights and all else are computed here.
    """
    torch.manual_seed(seed_for("weights", 0))
    model = attg_mae.MAE(attg_mae.Config(**TINY))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": p, "weight_decay": 0.05 * (p.dim() > 1)} for p in trained]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    steps = []
    for step, (seen, m_norm) in enumerate(zip(passes, maps, strict=True)):
        tau = 0.75 + 0.25 * (1 - math.cos(math.pi * step / STEPS)) / 2
        loss = loss_of(model, seen, m_norm, tau)
        optimizer.zero_grad()
        loss.backward()
        squares = sum(p.grad.square().sum() for p in trained)
        steps.append((loss.item(), squares.sqrt().item()))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * half_cosine(step, STEPS, 6)
        optimizer.step()
    assert len(steps) == STEPS
    return steps, model


def assert_like_reference(out, steps, model):
    """Losses, norms and weights of the run in `out` are these."""
    got = [(row["loss"], row["grad_norm"]) for row in records(out)]
    np.testing.assert_allclose(got, steps, rtol=1e-3)
    np.testing.assert_allclose(got[0], steps[0], rtol=1e-5)
    weights = last(out)["model"]
    torch.manual_seed(seed_for("weights", 0))
    start = attg_mae.MAE(model.cfg).state_dict()
    for name, value in model.state_dict().items():
        moved = (value - start[name]).norm()
        # The gradient of the key's bias is rounding, of which Adam makes steps.
        if moved and not name.endswith("qkv.bias"):
            assert (weights[name] - value).norm() < 0.01 * moved, name


def test_a_run(passes, distributed, labelled, tmp_path, monkeypatch):
    """In one process and in two."""
    maps, patch_weights = [], attg_mae.patch_weights

    def record(m_norm, *args):
        maps.append(m_norm.clone())
        return patch_weights(m_norm, *args)

    monkeypatch.setattr(attg_mae, "patch_weights", record)
    train(tmp_path, **labelled)
    # The last is that of the images at the end of the run.
    steps, model = reference_run(list(passes), maps[:-1])
    assert_like_reference(tmp_path, steps, model)
    assert_like_reference(distributed, steps, model)
    with pytest.raises(AssertionError):
        assert_like_reference(distributed, steps[1:] + steps[:1], model)


@pytest.fixture
def recorded(monkeypatch):
    """.batches: (images, labels) of each backward pass; .start: weights before the first."""
    seen = SimpleNamespace(batches=[], start=None)
    backward = attg.finetuning.backward

    def spy(model, imgs, targets, *rest):
        if seen.start is None:
            seen.start = copy.deepcopy(model.state_dict())
        seen.batches.append((imgs.clone(), targets.clone()))
        return backward(model, imgs, targets, *rest)

    monkeypatch.setattr(attg.finetuning, "backward", spy)
    return seen


@pytest.fixture
def flags(encoder, labelled):
    """Flags of a run of 12 steps, 3 an epoch."""
    data = [encoder, "--data", labelled["data"], "--device", "cpu"]
    return data + "--epochs 4 --batch_size 8".split()


def test_mae_probe(recorded, encoder, flags, labelled, tmp_path):
    """Weights, statistics and accuracy."""
    flags = [*flags, "--save", str(tmp_path / "w.pt"), "--seed", "1"]
    rows = eval_linear.main([*flags, "--protocol", "mae", "--blr", "10"])
    assert len(recorded.batches) == 12
    vit = attg_mae.load_encoder(encoder)
    norm = nn.BatchNorm1d(32, eps=1e-6, affine=False)
    heads = nn.ModuleList(nn.Linear(16, 3) for _ in FEATURES)
    probe = nn.ModuleDict({"norm": norm, "heads": heads}).double()
    probe.load_state_dict(recorded.start)
    for head in heads:
        assert 0.007 < head.weight.std() < 0.013 and not head.bias.any()

    def logits_of(imgs):
        parts = norm(features_of(vit, imgs)).chunk(2, 1)
        return torch.stack([head(x) for head, x in zip(heads, parts, strict=True)])

    sgd = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    for step, (batch, labels) in enumerate(recorded.batches):
        sgd.zero_grad()
        sum(F.cross_entropy(logits, labels) for logits in logits_of(batch)).backward()
        for head in heads:  # LARS: the step of a matrix is 0.001 of its norm
            head.weight.grad *= 0.001 * head.weight.norm() / head.weight.grad.norm()
        sgd.param_groups[0]["lr"] = 10 * 8 / 256 * half_cosine(step, 12, 0.8 * 3)
        sgd.step()
    weights = torch.load(tmp_path / "w.pt")["model"]
    for name, want in probe.state_dict().items():
        moved = (want - recorded.start[name]).double().norm()
        assert (weights[name] - want).double().norm() < 1e-3 * moved, name

    tests = open_data(labelled["data"], "test", 32)
    imgs = vit.normalize(torch.stack([sample.image for sample in tests]))
    truth = torch.tensor([sample.label for sample in tests])
    # The statistics of the test images themselves would give another accuracy.
    by_batch = (logits_of(imgs).argmax(2) == truth).double().mean(1) * 100
    probe.load_state_dict(weights)
    probe.eval()
    right = (logits_of(imgs).argmax(2) == truth).double().mean(1) * 100
    assert [row["top-1"] for row in rows] == pytest.approx(right.tolist())
    assert [row["feature"] for row in rows] == list(FEATURES)
    assert not right.equal(by_batch)


def test_fine_tuning(recorded, flags, monkeypatch):
    """Random numbers, learning rates and smoothed labels."""
    draws, rates, gradients = [], [], []

    def draw(imgs, labels, classes):
        draws.append(tuple(torch.rand(3).tolist()))
        return imgs, labels

    def note(optimizer, *_):
        groups = optimizer.param_groups
        rates.append({group["scale"]: group["lr"] for group in groups})
        biases = [p for g in groups for p in g["params"] if p.shape == (3,)]
        gradients.extend(p.grad.clone() for p in biases)

    monkeypatch.setattr(eval_finetune, "mix", draw)
    hook = register_optimizer_step_pre_hook(note)
    flags = flags + "--accum 2 --min_lr 1e-4 --blr 0.05".split()
    eval_finetune.main(flags)
    hook.remove()
    eval_finetune.main([*flags, "--seed", "1"])
    assert len(set(draws)) == 2 * 12 * 2  # of each seed, step and micro-batch

    # Half a cosine down to min_lr, times the scale of embeddings, block and head.
    assert len(rates) == 12
    for step, got in enumerate(rates):
        lr = 1e-4 + (0.05 * 8 / 256 - 1e-4) * half_cosine(step, 12, 0.8 * 3)
        want = {0.65**2: 0.65**2 * lr, 0.65: 0.65 * lr, 1.0: lr}
        assert got == pytest.approx(want, rel=1e-6)

    # The head starts near zero, so its first gradient shows labels smoothed by a tenth.
    labels = torch.cat([labels for _, labels in recorded.batches[:2]])
    share = labels.bincount(minlength=3) / 8
    want = 1 / 3 - (0.9 * share + 0.1 / 3)
    torch.testing.assert_close(gradients[0], want, rtol=0, atol=1e-3)
    assert (1 / 3 - share - want).abs().max() > 0.01
