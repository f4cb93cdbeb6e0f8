"""
Training against the same written out. Runs that are compared with each other (stopped and
continued, on two processes, with workers, with --save) do not show what is wrong in both:
here is what they must come to.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import attg.finetuning
import attg_mae
import eval_finetune
import eval_linear
from attg.datasets import open_data
from attg.features import FEATURES
from attg.seeding import seed_for
from tests.helpers import TINY, after_step, last, recorded_passes, records, train

STEPS = 24  # of TINY: 4 epochs of 6


def half_cosine(step, steps, warmup):
    """The factor of the learning rate: up in a line, down to 0 by half a cosine."""
    if step < warmup:
        return step / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def loss_of(model, seen, tau):
    """Eq. 1 and 2 for what a recorded pass was given."""
    # Of the mask's zeros and ones the zeros are lowest, so that they stay visible.
    _, pred, mask = model(seen.imgs, noise=seen.mask)
    assert mask.equal(seen.mask)
    patches = model.patchify(seen.imgs)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    x_norm = (patches - patches.mean(-1, keepdim=True)) / deviation
    error = (pred - x_norm).square().mean(-1)
    return (mask * seen.weight * error).sum() / mask.sum()


def adamw(parameter, moments, step, lr, decay):
    """Loshchilov and Hutter, arXiv 1711.05101, with the betas of MAE."""
    first, second = moments
    first.mul_(0.9).add_(0.1 * parameter.grad)
    second.mul_(0.95).add_(0.05 * parameter.grad**2)
    size = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
    change = first / (1 - 0.9 ** (step + 1)) / size + decay * parameter
    parameter.data -= lr * change


def features_of(encoder, imgs):
    """Class token and patch mean (B, D), in float64."""
    with torch.no_grad():
        tokens = encoder.forward_features(imgs).double()
    return tokens[:, 0].numpy(), tokens[:, 1:].mean(1).numpy()


@pytest.fixture(scope="module")
def written_out(labelled, tmp_path_factory):
    """(folder of a run, its passes, what it comes to: figures of each step, the model)."""
    out = tmp_path_factory.mktemp("run")
    with recorded_passes() as passes:
        train(out, **labelled)
    torch.manual_seed(seed_for("weights", 0))
    model = attg_mae.MAE(attg_mae.Config(**TINY))
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
    figures = []  # loss, norm of the gradient
    for step, seen in enumerate(passes):
        tau = 0.75 + 0.25 * (1 - math.cos(math.pi * step / STEPS)) / 2
        loss = loss_of(model, seen, tau)
        model.zero_grad()
        loss.backward()
        squares = sum(p.grad.square().sum() for p in trained)
        figures.append((loss.item(), squares.sqrt().item()))
        lr = 1e-3 * half_cosine(step, STEPS, 6)
        for parameter, own in zip(trained, moments, strict=True):
            decay = 0.05 if parameter.dim() > 1 else 0.0
            adamw(parameter, own, step, lr, decay)
    return out, passes, figures, model


def assert_written_out(out, figures, model):
    """Losses, norms and weights of the run in `out` are these."""
    got = [(row["loss"], row["grad_norm"]) for row in records(out)]
    np.testing.assert_allclose(got, figures, rtol=1e-3)
    np.testing.assert_allclose(got[0], figures[0], rtol=1e-5)
    weights = last(out)["model"]
    torch.manual_seed(seed_for("weights", 0))
    start = attg_mae.MAE(model.cfg).state_dict()
    for name, value in model.state_dict().items():
        moved = (value - start[name]).norm()
        # The key's bias has a gradient of rounding errors, of which Adam makes steps.
        if moved and not name.endswith("qkv.bias"):
            assert (weights[name] - value).norm() < 0.01 * moved, name


def test_a_run(written_out):
    out, _, figures, model = written_out
    assert_written_out(out, figures, model)
    # A step more or less is seen.
    with pytest.raises(AssertionError):
        assert_written_out(out, figures[1:] + figures[:1], model)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped(workers, written_out, labelled, tmp_path):
    _, _, figures, model = written_out
    settings = labelled | {"workers": workers}

    def stop():
        raise KeyboardInterrupt

    with after_step(15, stop), pytest.raises(KeyboardInterrupt):
        train(tmp_path, **settings)
    assert last(tmp_path)["step"] == 12
    train(tmp_path, **settings)
    assert_written_out(tmp_path, figures, model)


def test_a_run_on_two_processes(written_out, distributed):
    _, _, figures, model = written_out
    assert_written_out(distributed, figures, model)


def knn_figure(bank, labels, queries, truth):
    """Top-1 in percent of the k-NN with k = 20, image by image."""
    right = 0
    for x, label in zip(queries, truth, strict=True):
        cosine = bank @ x / np.linalg.norm(bank, axis=1) / np.linalg.norm(x)
        nearest = cosine.argsort()[-20:]
        votes = np.bincount(labels[nearest], np.exp(cosine[nearest] / 0.07), 3)
        right += votes.argmax() == label
    return 100 * right / len(truth)


def test_figures_of_a_run_on_two_processes(distributed, labelled):
    """The k-NN of its weights; each process had half of the pictures."""
    model = attg_mae.load_encoder(distributed / "last.pt")
    sets = []
    for split in ("train", "test"):
        pictures = list(open_data(labelled["data"], split, 16))
        imgs = model.normalize(torch.stack([sample.image for sample in pictures]))
        labels = np.array([sample.label for sample in pictures])
        sets.append((features_of(model, imgs), labels))
    (banks, labels), (queries, truth) = sets
    figures = records(distributed, "knn")[-1]["knn"]
    for name, bank, x in zip(FEATURES, banks, queries, strict=True):
        assert figures[name] == pytest.approx(knn_figure(bank, labels, x, truth))
        # In another order they would be others.
        half = np.argsort(np.arange(25) % 2, kind="stable")
        assert knn_figure(bank, labels[half], x, truth) < figures[name] - 20


def test_each_step_has_masks_and_crops_of_its_own(written_out):
    """The same ones again would be the same in every run."""
    _, passes, _, _ = written_out
    masks = torch.stack([seen.mask for seen in passes])  # (24, 4, 16)
    assert len(passes) == STEPS and len(masks.unique(dim=0)) == STEPS
    assert len(masks.flatten(0, 1).unique(dim=0)) > 80  # of 96; 1,820 are possible
    # Every patch is hidden in 3 of 4, within five deviations.
    often = masks.mean(dim=(0, 1))
    assert ((often - 0.75).abs() < 5 * math.sqrt(0.75 * 0.25 / 96)).all()
    crops = torch.cat([seen.imgs for seen in passes])
    assert len(crops.flatten(1).unique(dim=0)) == 4 * STEPS


@pytest.mark.parametrize("accum", [1, 2])
def test_gradients_are_clipped_before_the_step(accum, labelled, tmp_path):
    """The logged norm is that before; without the flag nothing is clipped."""
    norms = []

    def measure(optimizer, *_):
        squares = 0.0
        for group in optimizer.param_groups:
            squares += sum(p.grad.square().sum().item() for p in group["params"])
        norms.append(math.sqrt(squares))

    hook = register_optimizer_step_pre_hook(measure)
    settings = labelled | {"epochs": 1, "accum": accum}
    train(tmp_path / "free", **settings)
    train(tmp_path / "clipped", **settings, clip_grad=0.5)
    hook.remove()
    free = [row["grad_norm"] for row in records(tmp_path / "free")]
    before = [row["grad_norm"] for row in records(tmp_path / "clipped")]
    assert min(free + before) > 0.6
    assert norms[:6] == pytest.approx(free, rel=1e-4)
    assert norms[6:] == pytest.approx([0.5] * 6, rel=1e-4)


# -- Training on labelled pictures -----------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """What attg.finetuning.fit trains on: .batches, (images, labels) of each call.

    .start: the weights before the first of them.
    """
    seen = SimpleNamespace(batches=[], start=None)
    backward = attg.finetuning.backward

    def spy(model, imgs, targets, *rest):
        if seen.start is None:
            seen.start = copy.deepcopy(model.state_dict())
        seen.batches.append((imgs.clone(), targets.clone()))
        return backward(model, imgs, targets, *rest)

    monkeypatch.setattr(attg.finetuning, "backward", spy)
    return seen


def cut_and_continued(program, flags):
    """The rows of a run that was stopped in its step 8 of 12, two after it was saved."""

    def stop():
        raise KeyboardInterrupt

    with after_step(8, stop), pytest.raises(KeyboardInterrupt):
        program.main(flags)
    return program.main(flags)


def lars(weight, gradient, momentum, lr):
    """You et al., arXiv 1708.03888: the step of a matrix is 0.001 of its norm."""
    if weight.ndim == 2:
        scale = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient)
        gradient = scale * gradient
    momentum *= 0.9
    momentum += gradient
    weight -= lr * momentum


class Head:
    """A BatchNorm without affine and a linear layer, in float64, without autograd."""

    def __init__(self, state, number):
        self.weight = state[f"heads.{number}.weight"].double().numpy()
        self.bias = state[f"heads.{number}.bias"].double().numpy()
        self.momenta = np.zeros_like(self.weight), np.zeros_like(self.bias)
        self.mean, self.variance = np.zeros(16), np.ones(16)

    def train(self, x, labels, lr):
        mean, n = x.mean(0), len(x)
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.variance = 0.9 * self.variance + 0.1 * x.var(0, ddof=1)
        x = (x - mean) / np.sqrt(x.var(0) + 1e-6)
        logits = x @ self.weight.T + self.bias
        error = np.exp(logits - logits.max(1, keepdims=True))
        error /= error.sum(1, keepdims=True)
        error[np.arange(n), labels] -= 1  # softmax - one-hot: nothing is smoothed
        lars(self.weight, error.T @ x / n, self.momenta[0], lr)
        lars(self.bias, error.mean(0), self.momenta[1], lr)

    def logits(self, x):
        x = (x - self.mean) / np.sqrt(self.variance + 1e-6)
        return x @ self.weight.T + self.bias


def test_mae_probe(recorded, encoder, labelled, tmp_path):
    """Its weights, its statistics and its figures, also where --save continued it."""
    flags = [
        encoder,
        "--data",
        labelled["data"],
        "--device",
        "cpu",
        "--protocol",
        "mae",
    ]
    flags += "--epochs 4 --batch_size 8 --blr 10 --seed 1".split()
    rows = cut_and_continued(eval_linear, [*flags, "--save", str(tmp_path / "w.pt")])
    # Steps 7 and 8 were made twice.
    batches = recorded.batches[:6] + recorded.batches[8:]
    assert len(batches) == 12
    for first, second in zip(recorded.batches[6:8], batches[6:8], strict=True):
        assert first[0].equal(second[0])

    vit = attg_mae.load_encoder(encoder)
    weights = torch.load(tmp_path / "w.pt")["model"]
    heads = [Head(recorded.start, number) for number in (0, 1)]
    for step, (imgs, labels) in enumerate(batches):
        lr = 10 * 8 / 256 * half_cosine(step, 12, 0.8 * 3)
        for head, x in zip(heads, features_of(vit, imgs), strict=True):
            head.train(x, labels.numpy(), lr)
    tests = open_data(labelled["data"], "test", 32)
    imgs = vit.normalize(torch.stack([sample.image for sample in tests]))
    truth = np.array([sample.label for sample in tests])
    others = []
    for number, x in enumerate(features_of(vit, imgs)):
        head, own = heads[number], slice(16 * number, 16 * number + 16)
        start = recorded.start[f"heads.{number}.weight"].double().numpy()
        got = weights[f"heads.{number}.weight"].double().numpy()
        moved = np.linalg.norm(head.weight - start)
        assert np.linalg.norm(got - head.weight) < 1e-4 * moved
        bias = weights[f"heads.{number}.bias"]
        np.testing.assert_allclose(bias, head.bias, 1e-3)
        mean, variance = (weights[f"norm.running_{x}"][own] for x in ("mean", "var"))
        np.testing.assert_allclose(mean, head.mean, 1e-3, 1e-5)
        np.testing.assert_allclose(variance, head.variance, 1e-3)
        right = head.logits(x).argmax(1) == truth
        assert rows[number]["feature"] == FEATURES[number]
        assert rows[number]["top-1"] == pytest.approx(100 * right.mean())
        head.mean, head.variance = x.mean(0), x.var(0)
        others.append((head.logits(x).argmax(1) == truth).sum() - right.sum())
    # The statistics of the test pictures themselves give other figures.
    assert any(others)


def test_fine_tuning_draws_anew_at_each_step(encoder, labelled, tmp_path, monkeypatch):
    """Also in each micro-batch; the same again where a run goes on; others by --seed."""
    draws = []

    def draw(imgs, labels, classes):
        draws.append(torch.rand(3).tolist())
        return imgs, labels

    monkeypatch.setattr(eval_finetune, "mix", draw)
    flags = [encoder, "--data", labelled["data"], "--device", "cpu"]
    flags += "--epochs 4 --batch_size 8 --accum 2".split()
    cut_and_continued(eval_finetune, [*flags, "--save", str(tmp_path / "w.pt")])
    # 8 steps, then again from the seventh of 12 on: two draws each.
    assert len(draws) == 16 + 12 and draws[12:16] == draws[16:20]
    first = {tuple(draw) for draw in draws}
    assert len(first) == 24
    draws.clear()
    eval_finetune.main([*flags, "--seed", "1"])
    assert len(first | {tuple(draw) for draw in draws}) == 48


def test_learning_rates_of_fine_tuning(encoder, labelled):
    """Down to min_lr, times the scale of the layer."""
    used = []

    def note(optimizer, *_):
        used.append({group["scale"]: group["lr"] for group in optimizer.param_groups})

    hook = register_optimizer_step_pre_hook(note)
    flags = [encoder, "--data", labelled["data"], "--device", "cpu"]
    flags += "--batch_size 8 --min_lr 1e-4 --epochs 4 --blr 0.05".split()
    eval_finetune.main(flags)
    hook.remove()
    peak = 0.05 * 8 / 256
    assert len(used) == 12
    for step, rates in enumerate(used):
        lr = 1e-4 + (peak - 1e-4) * half_cosine(step, 12, 0.8 * 3)
        # Of an encoder with one block: embeddings, block, head.
        want = {0.65**2: 0.65**2 * lr, 0.65: 0.65 * lr, 1.0: lr}
        assert rates == pytest.approx(want, rel=1e-6)
    # After the last step the rate would be min_lr itself, and no less.
    nothing = torch.optim.SGD([torch.zeros(1)])
    settings = eval_finetune.arguments([*flags, "--warmup_epochs", "0.8"])
    end = attg.finetuning.set_lr(nothing, 12, 3, settings, attg_mae.lr_at)
    assert end == pytest.approx(1e-4)


def test_labels_of_fine_tuning_are_smoothed(recorded, encoder, labelled, monkeypatch):
    """By a tenth, as the first gradient of the head tells: it begins without a guess."""
    gradients = []
    monkeypatch.setattr(eval_finetune, "mix", lambda imgs, labels, _: (imgs, labels))

    def note(optimizer, *_):
        biases = [p for g in optimizer.param_groups for p in g["params"] if len(p) == 3]
        gradients.append([p.grad.clone() for p in biases if p.dim() == 1])

    hook = register_optimizer_step_pre_hook(note)
    flags = [encoder, "--data", labelled["data"], "--device", "cpu"]
    eval_finetune.main([*flags, *"--epochs 1 --batch_size 8".split()])
    hook.remove()
    (gradient,) = gradients[0]
    _, labels = recorded.batches[0]
    share = labels.bincount(minlength=3) / 8
    want = 1 / 3 - (0.9 * share + 0.1 / 3)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-3)
    assert (1 / 3 - share - want).abs().max() > 0.01
