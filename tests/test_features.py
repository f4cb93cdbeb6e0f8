"""attg/features.py: k-NN against scikit-learn, files of features."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attg_mae
import eval_knn
from attg import features
from attg.datasets import open_data
from attg.evaluation import topk_accuracy
from tests.helpers import blobs, close, rand, randn, save_features


def is_right(ranking, train, labels, test, k):
    """Whether scikit-learn gives as many votes; classes with equal votes may swap."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    knn = neighbors.KNeighborsClassifier(
        min(k, len(train)),
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d) / 0.07),
    )
    knn.fit(train.double().numpy(), labels.numpy())
    votes = torch.from_numpy(knn.predict_proba(test.double().numpy()))  # (B, C)
    best = votes.sort(descending=True).values[:, :5]
    # Without a vote there is no class, but -1.
    votes = torch.cat([votes, torch.zeros(len(votes), 1)], dim=1)
    same = torch.allclose(votes.gather(1, ranking % votes.shape[1]), best, atol=1e-5)
    return same and (ranking < 0).equal(best == 0)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 60)),
    ks=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    values=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_ties_go_to_the_lower_row(shape, ks, values, seed):
    """Whatever other k are asked for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values, shape, generator=generator).float()
    for row, near in zip(x, features.nearest(x, min(ks[0], shape[1]))[1], strict=True):
        assert near.tolist() == sorted(range(shape[1]), key=lambda i: -row[i])[: ks[0]]
    bank = 2.0 * torch.eye(5).repeat(shape[1], 1)  # cosines are exact
    labels = torch.randint(7, (len(bank),), generator=generator)
    one = features.knn_classify(bank, labels, torch.eye(5), [ks[0]])
    assert one[0].equal(features.knn_classify(bank, labels, torch.eye(5), ks)[0])


@pytest.mark.filterwarnings("ignore:The number of unique classes")
@given(
    classes=st.integers(1, 100),
    more=st.integers(0, 900),
    ks=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    tests=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_knn_equals_scikit_learn(classes, more, ks, tests, seed):
    """Rankings of all k in one pass, and their top-1 and top-5."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (classes + more,), generator=generator)
    labels[:classes] = torch.arange(classes)
    truth = torch.randint(classes, (tests,), generator=generator)
    centres = randn(classes, 16, seed=seed)
    # The lengths of features must not matter.
    lengths = 0.5 + rand(len(labels), 1)
    train = (centres[labels] + 1.5 * randn(len(labels), 16, seed=seed + 1)) * lengths
    test = centres[truth] + 1.5 * randn(tests, 16, seed=seed + 2)

    rankings = features.knn_classify(train, labels, test, ks)
    assert rankings.shape == (len(ks), tests, min(5, classes))
    got = topk_accuracy(rankings, truth)
    for k, ranking, (top1, top5) in zip(ks, rankings, got, strict=True):
        assert ranking.equal(attg_mae.knn_classify(train, labels, test, k=k))
        assert all((row[row >= 0].bincount() < 2).all() for row in ranking)
        assert is_right(ranking, train, labels, test, k)
        correct = ranking == truth[:, None]
        assert top1 == pytest.approx(100 * correct[:, 0].double().mean().item())
        assert top5 == pytest.approx(100 * correct.any(1).double().mean().item())


def test_faults_of_knn_are_seen():
    """Another temperature or another k are not scikit-learn's."""
    labels, test = torch.randint(7, (200,)), randn(30, 8, seed=1)
    bank = randn(200, 8)
    right = attg_mae.knn_classify(bank, labels, test)
    assert is_right(right, bank, labels, test, 20)
    for options in ({"temperature": 10.0}, {"k": 10}):
        other = attg_mae.knn_classify(bank, labels, test, **options)
        assert not is_right(other, bank, labels, test, 20)
    assert attg_mae.knn_classify(bank, labels, test, num_classes=9).equal(right)
    # exp(1 / temperature) would overflow.
    nearest = attg_mae.knn_classify(bank, labels, bank, temperature=0.004)[:, 0]
    assert nearest.equal(labels)
    # Votes that would be 0 in float32 are votes.
    classes = attg_mae.knn_classify(bank, labels, test, temperature=1e-4)
    assert (classes[:, 0] >= 0).all()
    # A row of NaN would be the nearest to all.
    truth = [{"easy": [0], "hard": [1], "junk": []}] * 30
    for spoilt in (bank, test):
        spoilt[3, 2] = np.nan
        with pytest.raises(ValueError, match="features are not finite"):
            attg_mae.knn_classify(bank, labels, test)
        with pytest.raises(ValueError, match="features are not finite"):
            eval_knn.retrieval_map(bank, test, truth)
        spoilt[3, 2] = 0


def test_knn_in_several_chunks():
    """64 queries at a time against a bank of this size."""
    labels, bank = torch.randint(7, (2**17,)), randn(2**17, 4)
    test = randn(70, 4, seed=1)
    got = attg_mae.knn_classify(bank, labels, test)
    some = test[[0, 63, 64, 69]]
    assert is_right(got[[0, 63, 64, 69]], bank, labels, some, 20)


def test_features_of_several_processes_are_in_order(labelled, monkeypatch):
    """On rank 0; the others, which run first here, keep none."""
    model, dataset = attg_mae.ViT(attg_mae.Config()), open_data(labelled["data"])
    single = open_data(next(dataset.root.glob("*/*.png")))
    monkeypatch.setattr(features.dist, "get_backend", lambda: "gloo")
    for images, world in ((dataset, 2), (dataset, 3), (single, 2)):
        sent = []

        def gather(x, shards, sent=sent):
            sent.append(x)
            ranks = sent[(len(sent) - 1) % 3 :: 3]  # of one of three tensors
            for shard, content in zip(shards, reversed(ranks), strict=False):
                shard.copy_(content)

        monkeypatch.setattr(features.dist, "gather", gather)
        *others, got = (
            features.extract_sharded(model, images, None, rank, world)
            for rank in reversed(range(world))
        )
        assert all(len(x) == 0 for part in others for x in part.values())
        want = features.extract_sharded(model, images, None, 0, 1)
        assert got["labels"].equal(want["labels"])
        assert close(got["patch_mean"], want["patch_mean"], 1e-5)


BROKEN = {
    "no train": lambda parts: parts.pop("train"),
    "no test set": lambda parts: parts.pop("test"),
    "short": lambda parts: parts["test"].update(patch_mean=randn(3, 16)),
    "labels": lambda parts: parts["train"]["labels"].add_(10**6),
    "another label": lambda parts: parts["test"]["labels"][:1].fill_(3),
    "no labels": lambda parts: parts["train"]["labels"].fill_(-1),
    "another width": lambda parts: parts["test"].update(class_token=randn(20, 9)),
    "halves": lambda parts: parts["test"].update(class_token=randn(20, 16).half()),
    "real labels": lambda parts: parts["test"].update(labels=rand(20)),
    "a list": lambda parts: parts.update(test=[]),
    "no settings": lambda parts: parts.update(settings=7),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_of_other_features_are_refused(kind, tmp_path):
    (x, labels), (queries, truth) = blobs(30, 3), blobs(20, 3, seed=7)
    path = tmp_path / "f.pt"
    save_features(path, x, labels, queries, truth)
    parts = attg_mae.load_checkpoint(path)
    BROKEN[kind](parts)
    attg_mae.save_checkpoint(path, **parts)
    with pytest.raises(ValueError, match=f"--features {path}: "):
        eval_knn.main(["--features", str(path), "--device", "cpu"])
