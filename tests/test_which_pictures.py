"""
Which pictures count in an evaluation: those with labels, and those of which folder.
"""

import pytest
import torch
import torchvision
from PIL import Image

import attg_mae
import eval_knn
from attg.datasets import open_data, open_labelled
from attg.features import FEATURES, extract_features, knn_accuracy
from attg.loader import make_loader
from tests.helpers import SMALL, blobs, save_features, write


def painted(value):
    return Image.new("RGB", (32, 32), (value, 255 - value, value // 2))


def some_pictures():
    """A data set of one's own: class 1 is mostly of red above 127.

    Every third has no label; those are next to the test pictures.
    """
    train, test = [], []
    for value in range(0, 256, 8):
        label = int(value > 127) ^ int(value % 40 == 0)
        train += [(painted(value), label), (painted(value), label)]
        train.append((painted(value + 1), None))
        test.append((painted(value + 1), label))
    return {"train": train, "test": test}


def test_pictures_without_labels_are_not_in_the_bank():
    """Of k-NN during training: their features are those of the queries themselves."""
    own = some_pictures()
    sets = [open_data(own, split, 32) for split in ("train", "test")]
    model = attg_mae.MAE(attg_mae.Config(**SMALL)).eval()
    got = knn_accuracy(model, *sets, {"batch_size": 16}, None, 0, 1)
    *banks, labels = extract_features(model, make_loader(sets[0], 16))
    *queries, truth = extract_features(model, make_loader(sets[1], 16))
    assert (labels < 0).sum() == 32 and len(labels) == 96
    for name, bank, x in zip(FEATURES, banks, queries, strict=True):
        rows = [i for i, label in enumerate(labels.tolist()) if label >= 0]
        guess = attg_mae.knn_classify(bank[rows], labels[rows], x)[:, 0]
        assert got[name] == pytest.approx(100 * (guess == truth).float().mean().item())
        assert 50 < got[name] < 100


def test_features_without_labels_are_not_in_the_bank(tmp_path):
    """Of eval_knn.py --features: equal to a file that never had them."""
    x, labels = blobs(90, 3, spread=0.5)
    queries, truth = blobs(60, 3, spread=0.5, seed=7)
    # Unlabelled ones, of which each is the nearest of a query.
    where = torch.randperm(150)
    mixed = torch.cat([x, 1.001 * queries])[where]
    unknown = torch.cat([labels, torch.full((60,), -1)])[where]
    figures = []
    for bank, known in ((x, labels), (mixed, unknown)):
        file = str(tmp_path / f"{len(bank)}.pt")
        save_features(file, bank, known, queries, truth)
        figures.append(eval_knn.main(["--features", file, "--k", "3", "20"]))
    assert figures[0] == figures[1] and len(figures[0]) == 4
    assert 40 < figures[0][0]["top-1"] < 100


class FakeSTL10:
    """Stands in for torchvision's: of five training pictures two have labels."""

    def __init__(self, root, split):
        self.labels = {"train+unlabeled": [3, -1, -1, 9, -1], "test": [9, 3]}[split]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return painted(50 * i), self.labels[i]


def test_stl10_is_evaluated_by_its_labelled_pictures(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSTL10)
    everything = open_data("stl10", size=32)
    assert everything.labels.tolist() == [3, -1, -1, 9, -1]
    train_set, tests = open_labelled("stl10", ["test"], size=32)
    assert train_set.labels.tolist() == [3, 9] and train_set.num_classes == 10
    assert [int(sample.image[0, 0, 0]) for sample in train_set] == [0, 150]
    assert [sample.label for sample in train_set] == [3, 9]
    assert tests["test"].labels.tolist() == [9, 3]


@pytest.mark.parametrize("classes", [["a", "b"], [""]], ids=["classes", "flat"])
def test_val_comes_before_test(classes, tmp_path):
    """ImageNet's test/ has no labels: where there is a val/, that is the test split."""
    reds = {"train": 10, "test": 60, "val": 110}
    for split, red in reds.items():
        for number, name in enumerate(classes):
            write(tmp_path / split / name / "0.png", painted(red + number))

    def seen(name):
        pictures = open_data(str(tmp_path), name, 32)
        return [int(sample.image[0, 0, 0]) for sample in pictures]

    assert seen("train") == [10 + number for number in range(len(classes))]
    assert seen("test") == [110 + number for number in range(len(classes))]
    (tmp_path / "val").rename(tmp_path / "other")
    assert seen("test") == [60 + number for number in range(len(classes))]
