"""eval_linear.py against torch's SGD, scikit-learn and timm."""

import json
import math
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import eval_linear
from attg.features import FEATURES
from attg.images import seed_for
from tests.helpers import blobs, close, randn


def test_heads_equal_torch_sgd():
    """Each of the layers trained together is the one that torch.optim.SGD trains alone."""
    x, labels = blobs(60, 4)
    x = F.pad(F.normalize(x, dim=0) * 60**0.5, (0, 1), value=1.0)
    got = eval_linear.train_heads(x, labels, (0.003, 0.3), 4, 3, 1, 25)
    generator = torch.Generator().manual_seed(seed_for("probe", 3))
    # Batches of at most 25: 3 times 20, over 1,000 steps.
    orders = [torch.randperm(60, generator=generator) for _ in range(334)]
    batches = [rows for order in orders for rows in order.tensor_split(3)][:1000]
    assert got.shape == (2, 17, 4) and not close(got[1], got[0], 1e-2)
    for lr, weights in zip((0.003, 0.3), got, strict=True):
        head = nn.Linear(17, 4, bias=False)
        nn.init.zeros_(head.weight)
        optimizer = torch.optim.SGD(head.parameters(), momentum=0.9)
        for step, rows in enumerate(batches):
            rate = lr * (1 + math.cos(math.pi * step / 1000)) / 2
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), labels[rows]).backward()
            optimizer.step()
        assert close(weights, head.weight.T, 1e-4)


@pytest.mark.parametrize(("n", "classes", "spread"), [(400, 10, 1.5), (11000, 2, 9.0)])
def test_probe_reaches_scikit_learn(n, classes, spread):
    """Within half a point of logistic regression with cross-validated strength."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x, y = blobs(n, classes, spread=spread)
    test, truth = blobs(6000, classes, spread=spread, seed=5)
    probe = partial(eval_linear.linear_probe, x, y, {"t": (test, truth)})
    epochs = 100 if n < 10_000 else 20
    got = probe(epochs=epochs)
    scaler = preprocessing.StandardScaler().fit(x)
    options = {"l1_ratios": (0,), "use_legacy_attributes": False, "max_iter": 2000}
    fit = linear_model.LogisticRegressionCV(
        Cs=[0.01, 0.1, 1.0, 10.0], cv=5, scoring="accuracy", **options
    ).fit(scaler.transform(x), y)
    votes = torch.from_numpy(fit.predict_proba(scaler.transform(test)))
    correct = votes.argsort(descending=True)[:, :5] == truth[:, None]
    want = 100 * correct[:, 0].double().mean()
    top1, top5 = got["results"]["t"]
    assert top1 >= want - 0.5 and top5 >= 100 * correct.any(1).double().mean() - 1
    assert probe(lrs=[1e-5], epochs=epochs)["results"]["t"][0] < want - 0.5
    assert got["lr"] == max(got["held_out"], key=got["held_out"].get)


@pytest.fixture
def quick(monkeypatch):
    """Probes of at least 200 steps instead of 1,000."""
    heads = partial(eval_linear.train_heads, min_steps=200)
    monkeypatch.setattr(eval_linear, "train_heads", heads)


def test_features_are_standardized(monkeypatch):
    """By the variance of the training images, not an estimate of a population's."""
    seen, train = [], partial(eval_linear.train_heads, min_steps=1)
    spy = lambda x, *rest, **more: seen.append(x) or train(x, *rest, **more)  # noqa: E731
    monkeypatch.setattr(eval_linear, "train_heads", spy)
    x, y = 3 + 5 * randn(12, 8), torch.arange(12) % 2
    eval_linear.linear_probe(x, y, {"t": (x, y)}, epochs=1)
    assert seen[-1].shape == (12, 9) and seen[-1][:, 8].eq(1).all()
    var, mean = torch.var_mean(seen[-1][:, :8], dim=0, correction=0)
    assert close(var, torch.ones(8), 1e-4) and mean.abs().max() < 1e-5


def test_probe_at_the_limits(quick):
    probe = eval_linear.linear_probe
    (x, y), test = blobs(40, 4), blobs(200, 4, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The second learning rate diverges.
        wild = probe(x, y, {"t": test}, lrs=[0.01, 3e38])
    assert wild["lr"] == 0.01 and wild["held_out"][3e38] < wild["held_out"][0.01]
    # Classes 0 twice, 1, 2 and 3 once.
    few = probe(x[:5], y[:5], {"t": test})
    assert 0 <= min(few["held_out"].values()) <= 40 and few["results"]["t"][1] == 100
    # Channels that never change.
    dead, padded = (F.pad(features, (0, 3), value=7.0) for features in (x, test[0]))
    got = probe(dead, y, {"t": (padded, test[1])})["results"]["t"][0]
    assert got == pytest.approx(probe(x, y, {"t": test})["results"]["t"][0], abs=2)
    infinite = x.index_fill(0, torch.tensor([7]), math.inf)
    for features, labels, lr, message in (
        (x[:4], y[:4], 1.0, "one image per class: .*two"),
        (infinite, y, 1.0, "features are not finite"),
        (x, y, 1e38, r"rate 1e\+38: diverged"),
    ):
        with pytest.raises(ValueError, match=message):
            probe(features, labels, {"t": test}, lrs=[lr])


def test_lars_with_decay_and_from_zero():
    """Decay is added to the gradient of a matrix; of norm zero, it takes SGD's step."""
    start, zero = randn(6, 5), torch.zeros(4, 3)
    weights = [start.clone(), zero.clone()]
    for p in weights:
        p.grad = randn(*p.shape, seed=1)
    eval_linear.LARS(weights, lr=0.4, weight_decay=0.3).step()
    # timm adds the norms of gradient and decay instead.
    update = weights[0].grad + 0.3 * start
    want = start - 0.4 * 0.001 * start.norm() / update.norm() * update
    assert close(weights[0], want, 1e-6)
    assert close(weights[1], -0.4 * weights[1].grad, 1e-6)


def test_results_of_a_data_set(quick, encoder, labelled, tmp_path):
    """Two test sets; the same from --features, with --shots too."""
    shutil.copytree(Path(labelled["data"], "test"), tmp_path / "others" / "val")
    other, kept = str(tmp_path / "others"), str(tmp_path / "f.pt")
    common = ["--device", "cpu", "--seed", "1"]
    flags = [encoder, "--data", labelled["data"], "--val", "test", other, *common]
    results = eval_linear.main([*flags, "--save_features", kept])
    *_, line = Path(encoder).with_name("eval_linear.jsonl").open()
    report = json.loads(line)
    assert report["settings"]["epochs"] == 100
    cases = [(row["feature"], row["test"]) for row in results]
    assert cases == [(f, t) for f in FEATURES for t in ("test", other)]
    assert results[0]["top-1"] == results[1]["top-1"] and "std" not in results[0]
    for row, stored in zip(results, report["results"], strict=True):
        assert row["top-5"] == 100 and row["images"] == 25  # 3 classes
        (grid,) = row["held_out"]
        assert len(grid) == 10 and row["lr"] == f"{max(grid, key=grid.get):.2g}"
        assert list(stored["held_out"][0].values()) == list(grid.values())

    from_file = [*common, "--features", kept]
    assert eval_linear.main(from_file) == results
    few = eval_linear.main([*from_file, "--shots", "2", "50", "--seeds", "2"])
    # Classes of 9, 8 and 8 images.
    cases = [(row["protocol"], row["images"], len(row["lr"].split())) for row in few]
    assert cases[::2] == [("2 shots", 6, 2), ("50 shots", 25, 2)] * 2
