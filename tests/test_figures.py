"""Sheets of maps, neighbors and reconstructions, curves, and confusion matrices."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attg_mae
import eval_finetune
import eval_knn
import eval_linear
from attg import evaluation, figures
from attg.datasets import open_data
from tests.helpers import (
    LUMA,
    content,
    correlation,
    noise,
    randn,
    records,
    refused,
    save_encoder,
    train,
    write,
)

CFG = attg_mae.Config()


@pytest.fixture
def sheets(monkeypatch):
    """(columns, heading if any) of the sheets that are drawn."""
    drawn, save_sheet = [], figures.save_sheet

    def spy(path, *sheet):
        drawn.append(sheet)
        save_sheet(path, *sheet)

    monkeypatch.setattr(figures, "save_sheet", spy)
    return drawn


def images_by_title(columns, *_):
    """{first word of the title: images (n, 3, H, W)} of a sheet."""
    return {x[0].split()[0]: x[1].cpu().expand(-1, 3, -1, -1) for x in columns}


def test_neighbors_are_those_of_highest_cosine(labelled, sheets, tmp_path):
    train_set, test_set = (open_data(labelled["data"], x) for x in ("train", "test"))
    bank, queries = randn(25, 6), randn(15, 6, seed=1)
    path = tmp_path / "x.png"
    figures.save_neighbors(path, train_set, test_set, 3 * bank, queries, "mean")
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


def test_sheet_of_maps_names_images_and_flat_maps(plain, sheets, tmp_path):
    dataset, maps = open_data(plain), np.random.default_rng(0).random((13, 4, 4))
    maps[3] = 0
    figures.save_map_sheet(tmp_path / "x.png", dataset, maps, 13)
    ((((_, _, names), (_, cells, texts), _),),) = sheets
    assert names == [f"{i:03d}.jpg" for i in range(13)]
    assert texts == 3 * [""] + ["flat"] + 9 * [""]
    # Each value of a map covers 48 x 48 pixels.
    assert np.abs(cells[5, 0, 24::48, 24::48].numpy() - maps[5]).max() < 1e-6


def test_features_of_changed_images_and_weights(encoder, labelled, tmp_path, capsys):
    """They are of those at that time: neighbors would be shown as other images."""
    data, file = tmp_path / "data", str(tmp_path / "features.pt")
    shutil.copytree(labelled["data"], data)
    flags = ["--device", "cpu", "--save_features", file]
    eval_knn.main([encoder, "--data", str(data), *flags])
    later = ["--features", file, "--device", "cpu"]
    eval_knn.main(later)
    assert "has changed" not in capsys.readouterr().out
    save_encoder(encoder, depth=2)
    eval_knn.main(later)
    assert f"--features {file}: {encoder} has changed" in capsys.readouterr().out
    noise(20, 20).save(data / "train" / "b" / "0.png")
    with refused("--features --data 26 15 again"):
        eval_knn.main([*later, "--show"])


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
        more = ", k = 20, all labels" * (program is eval_knn)
        assert title == f"{program.__name__}: {name}{more}, test"
        assert Path(encoder).with_name(f"{program.__name__}.confusion.png").exists()
        assert names == ["b", "g", "r"] and min(size) > 300
        # Five test images of each class; rows are the classes.
        assert counts.sum(dim=1).tolist() == [5, 5, 5] and sum(written) == 300
        written.clear()
        assert 100 * counts.trace() / 15 == pytest.approx(result["top-1"])


def test_names_of_classes(tmp_path):
    """A user's class may be called toy."""
    for name in ("cat", "toy"):
        write(tmp_path / "train" / name / "0.png", noise(8, 8))
    assert figures.class_names(open_data(str(tmp_path), "train")) == ["cat", "toy"]
    assert figures.class_names(open_data("toy", "test"))[0] == "ball"


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstructions(norm_pix, whole, labelled, sheets, tmp_path):
    """Visible patches as they are, hidden ones gray, then predicted; maps that fit."""
    weights = whole(norm_pix=norm_pix) / "last.pt"
    settings = labelled | {"norm_pix": norm_pix, "epochs": 0}
    sheets.clear()
    train(tmp_path, **settings, resume=str(weights))
    with Image.open(tmp_path / "reconstructions.png") as sheet:
        assert sheet.width > 6 * 192 and sheet.height > 8 * 192
    assert ("true mean and std" in sheets[0][1]) == norm_pix
    columns = images_by_title(*sheets[0])
    names = ["image", "map", "weight", "masked", "reconstruction", "error"]
    assert list(columns) == names
    dataset = open_data(labelled["data"], size=16)
    ids = np.linspace(0, 24, 8).astype(int).tolist()
    images = torch.stack([dataset[i].image for i in ids]) / 255
    torch.testing.assert_close(columns["image"], images, rtol=0, atol=1e-5)
    original, m, weight, masked, predicted, error = (
        attg_mae.patchify(x, 4).unflatten(2, (16, 3)) for x in columns.values()
    )  # (8, 16 patches, 16 pixels, 3)
    hidden = (masked - torch.tensor(CFG.mean)).abs().amax((2, 3)) < 1e-5
    assert (hidden.sum(1) == 12).all() and len(hidden.unique(dim=0)) > 1
    for x in (masked, predicted):
        torch.testing.assert_close(x[~hidden], original[~hidden], rtol=0, atol=1e-5)
    assert 0.004 < (predicted - original).abs()[hidden].mean() < 0.18
    want = 2 * (predicted - original).abs().mean(3)
    torch.testing.assert_close(error[..., 0], want.clamp(max=1), rtol=0, atol=1e-5)
    luma, m = (original @ torch.tensor(LUMA)).mean(2), m.mean((2, 3))
    w = torch.exp(m / CFG.tau)
    assert (weight.mean((2, 3)) - w / w.max()).abs().max() < 0.02 < w.std()
    assert (correlation(m, luma) > 0.95).all()
    assert (correlation(m, luma.roll(1, 0)) < 0.95).all()


def test_epochs_0_draws_the_images_of_a_checkpoint(
    whole, labelled, plain, sheets, tmp_path, capsys
):
    """In a run's folder of its own weights; --init needs another."""
    # The sheet names its run.
    out = shutil.copytree(whole(), tmp_path / whole().name)
    other = str(whole(seed=1) / "last.pt")
    files = content(out)
    (out / "reconstructions.png").unlink()
    settings = labelled | {"epochs": 0, "batch_size": 8}
    assert train(out, **settings)["step"] == 0
    assert str(out / "last.pt") in capsys.readouterr().out
    for wrong, words in (
        ({"init": other}, "--init None"),
        ({"width": 16}, "--width 32"),
    ):
        with pytest.raises(ValueError, match=f"last.pt.*{words} -> .*--out"):
            train(out, **settings | wrong)
    assert content(out) == files
    sheets[:] = sheets[-1:]
    train(tmp_path / "a", **settings, resume=other)
    # Without maps, too.
    without = {"data": plain, "maps": None, "init": other}
    train(tmp_path / "b", **settings | {"init": other})
    train(tmp_path / "c", **settings | without)
    first, a, b, c = (images_by_title(*x)["reconstruction"] for x in sheets)
    assert a.equal(b) and not a.equal(first) and len(c) == 8 and len(sheets[3][0]) == 4
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["reconstructions.png"]


def test_curves(whole, tmp_path, monkeypatch, capsys):
    """All values of the log, if matplotlib is installed."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []

    def spy(self, path, **_):
        drawn.append(self)
        path.touch()

    monkeypatch.setattr(figure.Figure, "savefig", spy)
    out = whole(eval_every=2)
    rows, tests = records(out), records(out, "knn")
    vanilla = [row | {"loss": row["mse"]} for row in rows]
    for logged in (rows + tests, rows + tests[:1], rows[:1], vanilla):
        figures.plot_panels(tmp_path / "curves.png", figures.panels_of(logged))
    first, one, vanilla = ([a.get_title() for a in x.axes] for x in drawn)
    k_nn = "k-NN on the test split, %"
    assert [x for x in first if x not in one] == [k_nn]  # a point is no curve
    assert [x for x in one if x not in vanilla] == ["loss", "temperature"]
    lines = [line for axes in drawn[0].axes for line in axes.lines]
    want = {k: [(r["step"], r[k]) for r in rows] for k in ("loss", "mse", "lr", "tau")}
    want["val mse"] = [(r["step"], r["val_mse"]) for r in tests]
    want["class token"] = [(r["step"], r["knn"]["class_token"]) for r in tests]
    want["patch mean"] = [(r["step"], r["knn"]["patch_mean"]) for r in tests]
    assert {x.get_label(): [*map(tuple, x.get_xydata())] for x in lines} == want
    assert len(rows) == 24 and len(tests) == 2
    assert len(records(whole(eval_every=None, epochs=7), "knn")) == 4
    # Few points are marked: a line of a single one would be invisible.
    assert {x.get_marker() for x in lines} == {"."}

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures.plot_panels(tmp_path / "curves.png", figures.panels_of(rows))
    assert "not drawn: pip install matplotlib" in capsys.readouterr().out
