"""Sheets of maps and neighbors, and the confusion matrices of the evaluations."""

import numpy as np
import pytest
import torch
from PIL import Image

import eval_finetune
import eval_knn
import eval_linear
from attg import evaluation, figures
from attg.datasets import open_data
from tests.helpers import randn


@pytest.fixture
def sheets(monkeypatch):
    """(columns, heading if any) of the sheets that are drawn."""
    drawn = []
    monkeypatch.setattr(figures, "save_sheet", lambda _, x, *y: drawn.append((x, *y)))
    return drawn


def test_neighbors_are_those_of_highest_cosine(labelled, sheets):
    train_set, test_set = (open_data(labelled["data"], x) for x in ("train", "test"))
    bank, queries = randn(25, 6), randn(15, 6, seed=1)
    figures.save_neighbors("x.png", train_set, test_set, 3 * bank, queries, "mean")
    ((columns, heading),) = sheets
    assert heading == "mean"
    cosine = torch.cosine_similarity(queries[:, None], bank[None], dim=2)
    for row, query in enumerate(np.linspace(0, 14, 8).astype(int)):
        best = cosine[query].argsort(descending=True)[:5].tolist()
        names = [test_set.names[query], *(train_set.names[i] for i in best)]
        texts = [column[2][row] for column in columns]
        assert texts == [name.partition("/")[0] for name in names]
        image = train_set.read(best[4])[0]
        image = image.resize((192, 192), Image.Resampling.BICUBIC)
        shown = 255 * columns[5][1][row].movedim(0, -1).numpy()
        assert np.abs(shown - np.asarray(image)).max() < 1


def test_sheet_of_maps_names_images_and_flat_maps(plain, sheets):
    dataset, maps = open_data(plain), np.random.default_rng(0).random((13, 4, 4))
    maps[3] = 0
    figures.save_map_sheet("x.png", dataset, maps, 13)
    ((((_, _, names), (_, cells, texts), _),),) = sheets
    assert names == [f"{i:03d}.jpg" for i in range(13)]
    assert texts == 3 * [""] + ["flat"] + 9 * [""]
    # Each value of a map covers 48 x 48 pixels.
    assert np.abs(cells[5, 0, 24::48, 24::48].numpy() - maps[5]).max() < 1e-6


def test_confusion_matrices_agree_with_the_accuracy(encoder, labelled, monkeypatch):
    drawn, save, written = [], evaluation.save_confusion, []
    axes = pytest.importorskip("matplotlib.axes").Axes
    monkeypatch.setattr(axes, "text", lambda *args, **_: written.append(int(args[3])))

    def spy(path, counts, names, title):
        save(path, counts, names, title)
        drawn.append((Image.open(path).size, counts, names, title))

    monkeypatch.setattr(evaluation, "save_confusion", spy)
    flags = [encoder, "--data", labelled["data"], "--device", "cpu", "--show"]
    quick = ["--epochs", "1", "--batch_size", "8"]
    for program in (eval_knn, eval_linear, eval_finetune):
        more = [] if program is eval_knn else quick
        result = program.main([*flags, *more])[-1]
        size, counts, names, title = drawn.pop()
        name = result["feature"].replace("_", " ")
        assert title == name + ", k = 20" * (program is eval_knn)
        assert names == ["b", "g", "r"] and min(size) > 300
        # Five test images of each class; rows are the classes.
        assert counts.sum(dim=1).tolist() == [5, 5, 5] and sum(written) == 300
        written.clear()
        assert 100 * counts.trace() / 15 == pytest.approx(result["top-1"])
