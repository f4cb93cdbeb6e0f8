"""
k-NN against scikit-learn, features of several processes.
"""

import numpy as np
import pytest
import torch

import attg.features
import attg_mae
from attg.datasets import open_data
from attg.loader import make_loader
from tests.helpers import SMALL, rand, randn

KNN = [
    (1, 20, 5, 20),
    (2, 30, 64, 1),
    (3, 12, 40, 20),
    (4, 60, 9, 40),
    (10, 500, 700, 20),
    (100, 2000, 30, 200),
]


@pytest.mark.parametrize(("classes", "n", "tests", "k"), [*KNN, (7, 2**17, 600, 20)])
def test_knn_equals_scikit_learn(classes, n, tests, k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    centres, labels = randn(classes, 16), torch.randint(classes, (n,))
    labels[:classes] = torch.arange(classes)
    # Lengths must not matter
    train = (centres[labels] + 1.5 * randn(n, 16, seed=2)) * (0.5 + rand(n, 1))
    test = centres[torch.arange(tests) % classes] + 1.5 * randn(tests, 16, seed=3)
    got = attg_mae.knn_classify(train, labels, test, k=k)
    assert got.shape == (tests, min(5, classes))
    assert all(len(set(row)) == len(row) for row in got.tolist())
    # So large that it takes several chunks
    part = slice(500, 540) if n > 10**5 else slice(None)
    knn = neighbors.KNeighborsClassifier(
        min(k, n),
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d) / 0.07),
    )
    votes = torch.from_numpy(
        knn.fit(train.double().numpy(), labels.numpy()).predict_proba(
            test[part].double().numpy()
        )
    )
    best = votes.sort(descending=True).values[:, :5]
    # Equal votes may stand in any order
    assert torch.allclose(votes.gather(1, got[part]), best, atol=1e-5)
    more = attg_mae.knn_classify(
        train, labels, test[part], k=k, num_classes=classes + 3
    )
    assert more.shape[1] == min(5, classes + 3) and more[:, 0].equal(got[part][:, 0])
    if classes > 2:
        for other in (
            got[part].flip(1),
            attg_mae.knn_classify(train, labels, test[part], k=k, temperature=10.0),
        ):
            assert not torch.allclose(votes.gather(1, other), best, atol=1e-5)


def test_knn_of_several_k_in_one_pass():
    bank, labels, test = randn(200, 8), torch.randint(7, (200,)), randn(30, 8, seed=1)
    all_ = attg.features.knn_rankings(bank, labels, test, [1, 20, 500])
    assert all_.shape == (3, 30, 5)
    for one, k in zip(all_, (1, 20, 500), strict=True):
        assert one.equal(attg_mae.knn_classify(bank, labels, test, k=k))
    assert not all_[0].equal(all_[1]) and not all_[1].equal(all_[2])


def test_features_of_several_processes_are_in_order(labelled, monkeypatch):
    model = attg_mae.build_model(attg_mae.Config(**SMALL)).eval()
    dataset = open_data(labelled["data"], "train", (32, 32))
    want = attg.features.features_of(model, dataset, {"batch_size": 4}, None, 0, 1)
    shares = [
        attg_mae.extract_features(
            model,
            make_loader(torch.utils.data.Subset(dataset, range(r, len(dataset), 3))),
        )
        for r in range(3)
    ]

    def gather(parts, mine):
        assert len(parts) == 3
        assert all(a.equal(b) for a, b in zip(mine, shares[1], strict=True))
        parts[:] = shares

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    got = attg.features.features_of(model, dataset, {}, None, 1, 3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
    assert (
        got[2].tolist()
        == [dataset[i].label for i in range(len(dataset))]
        == dataset.labels.tolist()
    )
