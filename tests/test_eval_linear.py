"""
eval_linear.py against torch's SGD, scikit-learn and timm.
"""

import argparse
import json
import math
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attg.datasets
import attg.features
import attg.toy
import attg_mae
import eval_knn
import eval_linear
from attg.datasets import open_data
from attg.loader import make_loader
from attg.seeding import seed_for
from tests.helpers import SMALL, blobs, close, randn

COMMON = ["--device", "cpu", "--seed", "1"]


def test_heads_equal_torch_sgd():
    """Each of the layers trained together is the one that torch.optim.SGD trains alone,
    over 1,000 steps.
    """
    x, labels = blobs(60, 4)
    x = F.pad(F.normalize(x, dim=0) * 60**0.5, (0, 1), value=1.0)
    got = eval_linear.train_heads(x, labels, (0.003, 0.3), 4, 1, 25, seed=3)
    generator = torch.Generator().manual_seed(seed_for("probe", 3))
    # 25 at most: 3 times 20
    orders = [
        torch.randperm(60, generator=generator).tensor_split(3) for _ in range(334)
    ]
    want = {}
    for lr, momentum in ((0.003, 0.9), (0.3, 0.9), (0.3, 0.0)):
        head = nn.Linear(17, 4, bias=False)
        nn.init.zeros_(head.weight)
        optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: (1 + math.cos(math.pi * s / 1000)) / 2
        )
        for step in range(1000):
            i = orders[step // 3][step % 3]
            optimizer.zero_grad()
            F.cross_entropy(head(x[i]), labels[i]).backward()
            optimizer.step()
            schedule.step()
        want[lr, momentum] = head.weight.detach().T
    assert got.shape == (2, 17, 4)
    assert close(got[0], want[0.003, 0.9], 1e-4)
    assert close(got[1], want[0.3, 0.9], 1e-4)
    assert not close(got[1], want[0.3, 0.0], 1e-2) and not close(got[1], got[0], 1e-2)


@pytest.mark.parametrize(
    ("n", "classes", "spread"),
    [(600, 3, 3.0), (400, 10, 1.5), (11000, 2, 9.0), (700, 20, 0.7)],
)
def test_probe_reaches_scikit_learn(n, classes, spread):
    """Within half a point of logistic regression, whose strength is chosen by held-out
    images as well.
    """
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    (x, y) = blobs(n, classes, spread=spread)
    test = blobs(6000, classes, spread=spread, seed=5)
    epochs = 100 if n < 10_000 else 20
    got = eval_linear.linear_probe(
        x, y, {"a": test, "b": (test[0][:50], test[1][:50])}, epochs=epochs
    )
    a, b = got["results"]["a"], got["results"]["b"]
    scaler = preprocessing.StandardScaler().fit(x)
    fit = linear_model.LogisticRegressionCV(
        Cs=[0.01, 0.1, 1.0, 10.0],
        cv=5,
        max_iter=2000,
        l1_ratios=(0,),
        use_legacy_attributes=False,
        scoring="accuracy",
    ).fit(scaler.transform(x), y)
    truth = test[1].numpy()
    want = 100 * (fit.predict(scaler.transform(test[0])) == truth).mean()
    assert a[0] >= want - 0.5
    hardly_trained = eval_linear.linear_probe(
        x, y, {"a": test}, lrs=[1e-5], epochs=epochs
    )["results"]["a"]
    assert hardly_trained[0] < want - 0.5
    best = np.argsort(-fit.predict_proba(scaler.transform(test[0])), axis=1)[:, :5]
    assert a[1] >= 100 * (best == truth[:, None]).any(1).mean() - 1
    assert len(got["held_out"]) == len(eval_linear.LRS)
    assert got["lr"] == eval_linear.LRS[np.argmax(got["held_out"])]
    assert 0 < b[0] <= b[1] <= 100 and (b[0] / 2) % 1 == 0  # of 50 images


@pytest.fixture
def quick(monkeypatch):
    """Probes of at least 300 steps instead of 1,000."""
    heads = partial(eval_linear.train_heads, least=300)
    monkeypatch.setattr(eval_linear, "train_heads", heads)


def test_test_labels_choose_nothing(quick):
    (x, y), (a, truth) = blobs(100, 5), blobs(500, 5, seed=9)
    shuffled = truth[torch.randperm(500)]
    one, two = (
        eval_linear.linear_probe(x, y, {"t": (a, t)}) for t in (truth, shuffled)
    )
    assert (one["lr"], one["held_out"]) == (two["lr"], two["held_out"])
    assert one["results"]["t"][0] > 50 > two["results"]["t"][0]
    # Training labels do
    worse = eval_linear.linear_probe(x, y[torch.randperm(100)], {"t": (a, truth)})
    assert worse["held_out"] != one["held_out"] and worse["results"]["t"][0] < 45


def test_probe_at_the_limits(quick):
    probe = eval_linear.linear_probe
    (x, y), test = blobs(40, 4), blobs(200, 4, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The second is not finite
        wild = probe(x, y, {"t": test}, lrs=[0.01, 3e38])
    assert wild["lr"] == 0.01 and wild["held_out"][1] < wild["held_out"][0]
    again = probe(x, y, {"t": test}, lrs=[0.01, 3e38])
    assert again == wild  # deterministic
    more, others = blobs(1025, 4), blobs(2000, 4, seed=3)  # one image more than a batch
    tops = [
        probe(*more, {"t": others}, lrs=[1.0], batch_size=b)["results"]["t"][0]
        for b in (1024, 1025)
    ]
    assert tops[0] == pytest.approx(tops[1], abs=1.5)
    # Classes 0 twice, 1, 2 and 3 once
    few = probe(x[:5], y[:5], {"t": test})
    assert 0 <= min(few["held_out"]) <= 40 and few["results"]["t"][1] == 100
    dead = torch.cat([x, torch.full((40, 3), 7.0)], dim=1)  # channels that never change
    ours = probe(dead, y, {"t": (F.pad(test[0], (0, 3), value=7.0), test[1])})[
        "results"
    ]
    assert ours["t"][0] == pytest.approx(
        probe(x, y, {"t": test})["results"]["t"][0], abs=2
    )
    # One class
    assert probe(x, 0 * y, {"t": (test[0], 0 * test[1])})["results"] == {
        "t": [100, 100]
    }
    with pytest.raises(ValueError, match="one image a class: two are needed"):
        probe(x[:4], y[:4], {"t": test})
    with pytest.raises(ValueError, match="some features are not finite"):
        probe(x.index_fill(0, torch.tensor([7]), math.inf), y, {"t": test})


def test_lars_equals_timm():
    optim = pytest.importorskip("timm.optim")

    def matrices():
        return [
            nn.Parameter(p)
            for p in (
                randn(6, 5),
                torch.zeros(3, 4),
                1e-3 * randn(7, 2, seed=1),
                randn(6),
                torch.zeros(3),
            )
        ]

    ours, theirs, wrong = matrices(), matrices(), matrices()
    optimizers = [
        eval_linear.LARS(ours, lr=0.4, weight_decay=0.01),
        optim.Lars(
            [
                {"params": theirs[:3], "weight_decay": 0.01, "always_adapt": True},
                {"params": theirs[3:]},
            ],
            lr=0.4,
            momentum=0.9,
        ),
        optim.Lars(wrong, lr=0.4, momentum=0.9, weight_decay=0.01),
    ]
    for step in range(6):
        for parameters in (ours, theirs, wrong):
            for k, p in enumerate(parameters):
                # A gradient of zero
                p.grad = randn(*p.shape, seed=10 * step + k) * (step != 2 or k != 0)
        optimizers[0].param_groups[0]["lr"] = 0.4 / (1 + step)
        for group in optimizers[1].param_groups + optimizers[2].param_groups:
            group["lr"] = 0.4 / (1 + step)
        for optimizer in optimizers:
            optimizer.step()
    # timm adds the norms of gradient and decay, MAE takes the norm of their sum
    assert all(close(a, b, 2e-2) for a, b in zip(ours[:3], theirs[:3], strict=True))
    assert all(close(a, b, 1e-6) for a, b in zip(ours[3:], theirs[3:], strict=True))
    assert not close(ours[3], wrong[3], 1e-2)


@pytest.mark.parametrize("fault", [None, "momentum", "bias"])
def test_lars_equals_timm_without_decay(fault):
    """As MAE's probe has it: exactly."""
    optim = pytest.importorskip("timm.optim")
    head, peer = nn.Linear(8, 5), nn.Linear(8, 5)
    peer.load_state_dict(head.state_dict())
    groups = [
        {"params": [peer.weight], "always_adapt": True},
        {"params": [peer.bias], "always_adapt": fault == "bias"},
    ]
    ours = eval_linear.LARS(head.parameters(), lr=6.4)
    theirs = optim.Lars(groups, lr=6.4, momentum=0.0 if fault == "momentum" else 0.9)
    for step in range(20):
        x, y = randn(32, 8, seed=step), torch.randint(5, (32,))
        for model, optimizer in ((head, ours), (peer, theirs)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    same_ = close(head.weight, peer.weight, 1e-5) and close(head.bias, peer.bias, 1e-5)
    assert same_ == (fault is None)


def test_mae_probe_is_batchnorm_and_linear_on_the_frozen_encoder():
    encoder = attg_mae.build_model(attg_mae.Config(**SMALL)).eval()
    torch.manual_seed(0)
    probe, imgs = eval_linear.Probe(encoder, 7).train(), randn(6, 3, 32, 32)
    logits = probe(imgs)
    tokens = encoder.forward_features(imgs)
    for got, head, x in zip(
        logits, probe.heads, (tokens[:, 0], tokens[:, 1:].mean(1)), strict=True
    ):
        norm = nn.BatchNorm1d(16, eps=1e-6, affine=False)
        assert close(got, F.linear(norm(x), head.weight, head.bias), 1e-5)
        assert 0.005 < head.weight.std() < 0.015 and not head.bias.any()
    logits.sum().backward()
    trained = {f"heads.{k}.{n}" for k in (0, 1) for n in ("weight", "bias")}
    assert {n for n, p in probe.named_parameters() if p.grad is not None} == trained
    assert all(p.grad is None for p in encoder.parameters())
    statistics = probe.norm.running_mean.clone()
    probe.eval()
    assert probe(imgs).shape == (2, 6, 7) and not close(probe(imgs), logits, 1e-2)
    assert probe.norm.running_mean.equal(statistics)


def filled(depth, images=1281167):
    """MAE's probe for these many images on 8 processes."""
    args = argparse.Namespace(accum=None, batch_size=None, epochs=None)
    return eval_linear.complete(args, images, depth, torch.device("cpu"), 8)


def test_recipe_is_that_of_mae():
    large = filled(24)
    assert (large.epochs, large.batch_size, large.blr) == (50, 16384, 0.1)
    assert (large.warmup_epochs, large.weight_decay) == (10, 0)
    assert large.accum == 4  # 512 images on each of 8
    assert filled(12).epochs == 90
    few = filled(4, images=3000)
    assert (few.batch_size, few.accum) == (296, 1)  # a tenth, divisible by 8


def test_eval_linear_of_a_data_set(encoder, labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        eval_linear, "train_heads", partial(eval_linear.train_heads, least=100)
    )
    shutil.copytree(Path(labelled["data"], "test"), tmp_path / "others" / "val")
    other = str(tmp_path / "others")
    flags = [encoder, "--data", labelled["data"], *COMMON]
    rows = eval_linear.main(
        [
            *flags,
            "--val",
            "test",
            other,
            "--save_features",
            str(tmp_path / "new" / "f.pt"),
        ]
    )
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(printed[-1])
    assert report["results"] == rows
    assert report["settings"]["seconds"] > 0
    assert report["settings"]["epochs"] == 100
    assert (
        json.loads(Path(encoder).with_name("eval_linear.jsonl").read_text()) == report
    )
    assert [(r["feature"], r["test"]) for r in rows] == [
        (f, t) for f in attg.features.FEATURES for t in ("test", other)
    ]
    assert rows[0]["top-1"] == rows[1]["top-1"] and "held-out top-1" in printed[0]
    grid = report["settings"]["held_out"]["class_token, linear, seed 1"]
    assert len(grid) == 10 and rows[0]["lr"] == max(grid, key=grid.get)
    assert len(report["settings"]["sha256"]) == 64
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    model = attg_mae.load_encoder(encoder)
    sets = [open_data(labelled["data"], s, 32) for s in ("train", "test")]
    train, test = (
        [x.double() for x in attg_mae.extract_features(model, make_loader(s))[:2]]
        + [s.labels]
        for s in sets
    )
    scaler = preprocessing.StandardScaler().fit(train[1])
    fit = linear_model.LogisticRegression().fit(scaler.transform(train[1]), train[2])
    want = 100 * (fit.predict(scaler.transform(test[1])) == test[2].numpy()).mean()
    assert rows[2]["top-1"] == pytest.approx(want, abs=14)  # 2 of 15 images
    assert all(r["top-5"] == 100 for r in rows)  # 3 classes
    kept = [*COMMON, "--features", str(tmp_path / "new" / "f.pt")]
    assert eval_linear.main(kept) == rows
    settings = json.loads((tmp_path / "new" / "eval_linear.jsonl").read_text())[
        "settings"
    ]
    # Where they are from
    assert settings["features"]
    assert all(settings[k] == report["settings"][k] for k in attg.features.SOURCE)
    few = eval_linear.main([*kept, "--shots", "2", "4", "--seeds", "2"])
    assert [(r["protocol"], len(r["lr"].split())) for r in few[:4]] == [
        ("2 shots", 2)
    ] * 2 + [("4 shots", 2)] * 2
    assert few == eval_linear.main(
        [*flags, "--val", "test", other, "--shots", "2", "4", "--seeds", "2"]
    )
    assert all(0 <= r["+-"] < 50 for r in few)
    assert [r["images"] for r in few[::2]] == [6, 12] * 2
    capsys.readouterr()
    # 9, 8 and 8 images: all of them, as without --shots but for the draws
    many = eval_linear.main([*kept, "--shots", "50", "--seeds", "1"])
    words = "--shots 50: 3 of 3 classes have fewer images, the smallest 8;"
    assert capsys.readouterr().out.startswith(words)
    assert [r["images"] for r in many] == [25] * 4
    assert eval_knn.main(
        ["--features", str(tmp_path / "new" / "f.pt"), "--device", "cpu", "--k", "3"]
    )
    whole_probe, sizes = eval_linear.linear_probe, []
    monkeypatch.setattr(
        eval_linear,
        "linear_probe",
        lambda x, *args, **kw: sizes.append(len(x)) or whole_probe(x, *args, **kw),
    )
    eval_linear.main([*kept, "--fraction", "0.5"])
    assert sizes == [12, 12]  # of 9, 8 and 8, for both features


def test_toy_variants_are_test_sets(encoder, monkeypatch):
    names = ["test", *attg.toy.TOY_VARIANTS]
    monkeypatch.setattr(
        eval_linear, "train_heads", partial(eval_linear.train_heads, least=100)
    )
    full = attg.toy.toy
    monkeypatch.setattr(
        attg.datasets, "toy", lambda split: tuple(x[:300] for x in full(split))
    )
    rows = eval_linear.main([encoder, "--val", *names, *COMMON])
    assert [r["test"] for r in rows] == names * 2
    assert len({r["top-1"] for r in rows[:5]}) > 2


LINEAR_ERRORS = [
    ("", "checkpoint eval_linear.py"),
    ("encoder.pt --fraction 0", "--fraction 0.0 above 0"),
    ("encoder.pt --fraction 1.5", "--fraction 1.5 to 1"),
    ("encoder.pt --shots 2 --fraction 0.5", "--shots [2] --fraction"),
    (
        "encoder.pt --finetune --epochs 3",
        "python eval_finetune.py encoder.pt --epochs 3 same flags",
    ),
    ("encoder.pt --save w.pt", "--save mae finetune features"),
    ("encoder.pt --protocol mae --drop_path 0.1", "--drop_path finetune mae"),
    ("encoder.pt --shots 5 1", "--shots [5, 1] 2 are needed"),
    ("encoder.pt --shots 0", "--shots 0 at least 1"),
    ("encoder.pt --lrs 0.1 -1", "--lrs -1.0 above 0"),
    ("--protocol mae", "checkpoint"),
    ("--features encoder.pt", "--features encoder.pt --save_features"),
    ("encoder.pt --val train", "--val train test"),
    ("encoder.pt --val nowhere", "'nowhere' train/"),
    ("encoder.pt --val flat", "flat"),
    ("encoder.pt --val other/test", "other/test different another_class --classes"),
    ("encoder.pt --data other", "other different another_class"),
    ("encoder.pt --data flat", "--data flat labelled train/CLASS"),
    ("encoder.pt --data trainonly", "--data trainonly labelled val/CLASS"),
    ("encoder.pt --data toy --val val", "'val' toy only_fg"),
    ("encoder.pt --data empty", "--data empty classes r"),
    ("encoder.pt --img_size 30", "--img_size 16 multiple"),
    ("decoder.pt", "decoder.pt no ViT encoder"),
    ("missing.pt", "missing.pt"),
    ("text.pt", "text.pt damaged"),
    ("encoder.pt --protocol mae --epochs 0", "--epochs 0 at least 1"),
    ("encoder.pt --protocol mae --save text.pt", "text.pt damaged"),
]


@pytest.mark.parametrize(
    ("flags", "words"), LINEAR_ERRORS, ids=[x[0] for x in LINEAR_ERRORS]
)
def test_eval_linear_errors(flags, words, wrong, labelled):
    for name in ("other", "trainonly", "empty"):
        shutil.copytree(labelled["data"], name)
    Path("other/test/r").rename("other/test/another_class")
    shutil.rmtree("trainonly/test")
    for path in Path("empty/test/r").iterdir():
        path.unlink()
    files = {p: p.read_bytes() for p in Path().rglob("*.pt")}
    argv = flags.split()
    argv += [] if "--data" in argv else ["--data", labelled["data"]]
    with pytest.raises((ValueError, OSError)) as error:
        eval_linear.main([*argv, "--device", "cpu"])
    assert [w for w in words.split() if w not in str(error.value)] == []
    assert files == {p: p.read_bytes() for p in Path().rglob("*.pt")}
    assert not list(Path().rglob("*.jsonl"))


def test_a_probe_that_diverges_is_an_error():
    x, labels = blobs(60, 3)
    tests = {"test": (x, labels)}
    with pytest.raises(ValueError, match=r"--lrs 1e\+38: diverged; give lower ones"):
        eval_linear.linear_probe(x, labels, tests, lrs=[1e38], epochs=1)
    eval_linear.linear_probe(x, labels, tests, lrs=[1e38, 0.1], epochs=1)
