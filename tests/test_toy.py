"""
The embedded data set.
"""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import attg.datasets
import attg.toy
from attg.datasets import open_data
from attg_mae import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers import ROOT


def test_toy_is_the_same_in_another_process():
    code = (
        "import hashlib, attg.toy\n"
        "i, m, _ = attg.toy.toy('test'); v = attg.toy.toy('mixed_rand')[0]\n"
        "print(*(hashlib.sha256(a[:300].tobytes()).hexdigest() for a in (i, m, v)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    here = [
        hashlib.sha256(a[:300].tobytes()).hexdigest()
        for a in (*attg.toy.toy("test")[:2], attg.toy.toy("mixed_rand")[0])
    ]
    assert done.stdout == " ".join(here) + "\n"
    assert (
        attg.datasets.open_data("toy", seed=1).fingerprint
        == attg.datasets.open_data("toy", seed=2).fingerprint
    )


def test_toy_interface_and_balance():
    for split, n in {
        "train": 10_000,
        "test": 2_000,
        "only_fg": 2_000,
        "mixed_same": 2_000,
        "mixed_rand": 2_000,
        "mixed_next": 2_000,
    }.items():
        dataset = open_data("toy", split)
        assert len(dataset) == n
        assert dataset.num_classes == 10
        assert dataset.masks.shape == (n, 32, 32)
        assert dataset.masks.dtype == np.uint8
        assert set(np.unique(dataset.masks)) == {0, 1}
        assert np.bincount([dataset[i].label for i in range(200)]).tolist() == [20] * 10
        assert np.bincount(attg.toy.toy(split)[2]).tolist() == [n // 10] * 10
        np.testing.assert_array_equal(
            dataset[3].image.permute(1, 2, 0), attg.toy.toy(split)[0][3]
        )
        assert dataset[3].box.tolist() == [0, 0, 1, 1] and len(set(dataset.names)) == n
    with pytest.raises(
        ValueError,
        match="split 'val' of --data toy: must be one of train, test, only_fg",
    ):
        open_data("toy", "val")


def test_toy_masks_and_variants_agree():
    images, masks, labels = attg.toy.toy("test")
    inside = masks.astype(bool)
    share = inside.mean((1, 2))
    assert 0.05 < share.min() and share.max() < 0.4 and not inside[:, 0, 0].all()
    for variant in attg.toy.TOY_VARIANTS:
        other, other_masks, other_labels = attg.toy.toy(variant)
        assert np.array_equal(masks, other_masks)
        assert np.array_equal(labels, other_labels)
        # Same object, same pose
        assert np.array_equal(images[inside], other[inside])
        changed = (images != other).any(-1)
        assert changed[~inside].mean() > 0.9 and not changed[inside].any()
    assert not attg.toy.toy("only_fg")[0][~inside].any()
    # No black inside: the mask is the object
    assert attg.toy.toy("only_fg")[0][inside].any(-1).all()
    # a mask is one piece inside the picture, and splits share no object
    train = {m.tobytes() for m in attg.toy.toy("train")[1]}
    assert sum(m.tobytes() in train for m in masks) < 20


def test_toy_backgrounds_follow_their_families(monkeypatch):
    seen = {}

    def record(labels, family, p, q):
        seen.setdefault(split, []).append(family)
        return p, p

    monkeypatch.setattr(attg.toy, "toy_render", record)
    for split in ("train", "test", *attg.toy.TOY_VARIANTS):
        attg.toy.toy.__wrapped__(split)
    labels = np.arange(2_000) % 10
    family = {split: np.concatenate(parts) for split, parts in seen.items()}
    # 0.7, and a tenth of the others
    assert abs((family["train"] == np.arange(10_000) % 10).mean() - 0.73) < 0.02
    assert abs((family["test"] == labels).mean() - 0.73) < 0.04
    assert (family["only_fg"] == -1).all() and (family["mixed_same"] == labels).all()
    assert (family["mixed_next"] == (labels + 1) % 10).all()
    assert abs((family["mixed_rand"] == labels).mean() - 0.1) < 0.03


def toy_features(split):
    f = (attg.toy.toy(split)[0] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return f.reshape(len(f), -1).astype(np.float32), attg.toy.toy(split)[2]


def test_toy_raw_pixels_are_hard():
    neighbors = pytest.importorskip("sklearn.neighbors")
    knn = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    accuracy = knn.fit(*toy_features("train")).score(*toy_features("test"))
    print(f"toy, k-NN on raw pixels: {accuracy:.1%}")
    # The limit is 45 %; above chance, or the set is broken
    assert 0.2 < accuracy < 0.42


def test_sheet_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attg.toy.main([])
    out = capsys.readouterr().out
    assert f"sheet written to {tmp_path / 'toy.png'}" in out
    assert "train      10000 images: ball 1000 box 1000" in out
    sheet = np.asarray(Image.open(tmp_path / "toy.png"))
    assert sheet.shape[0] > 900 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000


def test_pairs_have_two_objects_and_a_mask_of_each(tmp_path, capsys):
    images, masks = attg.toy.toy_pairs(40)
    assert images.shape == (40, 64, 64, 3) and masks.shape == (40, 2, 64, 64)
    assert images.dtype == masks.dtype == np.uint8 and masks.max() == 1
    # As large as the objects of the set, one on the left and one on the right.
    single = attg.toy.toy("train")[1].sum((1, 2))
    areas = masks.sum((2, 3))
    assert areas.min() >= single.min() and areas.max() <= single.max()
    assert not masks[:, 0, :, 32:].any() and not masks[:, 1, :, :32].any()
    lower = masks[:, :, 32:].any((2, 3))
    assert (lower[:, 0] == lower[:, 1]).all() and 10 < lower[:, 0].sum() < 30
    # What no mask covers is the background, which repeats every 32 pixels.
    bare = ~masks.any(1)
    for dy, dx in ((0, 32), (32, 0)):
        shifted = np.roll(images, (dy, dx), (1, 2))
        both = bare & np.roll(bare, (dy, dx), (1, 2))
        assert (images == shifted)[both].all()
    # The objects are none of the background: most of their pixels differ from it.
    background = np.where(bare[..., None], images, np.roll(images, 32, 1))
    assert (images != background).any(3)[~bare].mean() > 0.9

    attg.toy.main(["--pairs", str(tmp_path)])
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert len(names) == 200 and "200 pictures" in capsys.readouterr().out
    assert names == sorted(path.name for path in (tmp_path / "masks").iterdir())
    mask = np.asarray(Image.open(tmp_path / "masks" / names[7]))
    assert (mask == 255 * attg.toy.toy_pairs(200)[1][7].max(0)).all()
