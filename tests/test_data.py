"""
Pictures: decoding, crops, classes, batches, loaders, against torchvision and by hand.
"""

import dataclasses
import hashlib
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import time
import urllib.error
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import default_collate

import attg.datasets
import attg.distributed
import attg.features
import attg.images
import attg.maps
import attg.toy
import attg_mae
from attg.datasets import open_data
from attg.loader import ResumableBatchSampler, make_loader
from attg.seeding import seed_for
from tests.fuzz import largest_memory, odd_picture, odd_tree, png, within
from tests.helpers import ROOT, TINY, equal, losses, noise, ramp, records, train, write


def test_seed_for_separates_lengths_and_values():
    seeds = [
        seed_for(*k)
        for k in [
            (),
            (0,),
            (0, 0),
            (0, 0, 0),
            (1,),
            (1, 0),
            (0, 1),
            (1, 0, 0, 0, 0),
            (2**63,),
        ]
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**64 for s in seeds)
    assert seed_for(3, 4) == seed_for(np.int64(3), 4)


def test_sample_is_a_function_of_seed_epoch_index(folder):
    train = open_data(str(folder), size=(24, 16), augment=True, seed=5)
    once = train[3, 7]
    # Neither global state nor earlier draws matter
    torch.manual_seed(99)
    np.random.seed(99)
    train[0, 1]
    state = torch.get_rng_state()
    assert equal(once, train[3, 7])
    assert equal(
        once, open_data(str(folder), size=(24, 16), augment=True, seed=5)[3, 7]
    )
    # And the global state is left alone
    assert torch.equal(state, torch.get_rng_state())
    others = [
        train[4, 7],
        train[3, 6],
        open_data(str(folder), size=(24, 16), augment=True, seed=6)[3, 7],
    ]
    assert not any(torch.equal(once.box, other.box) for other in others)
    assert once.image.dtype == torch.uint8
    assert once.image.shape == (3, 24, 16)
    assert once.box.dtype == torch.float32
    assert (once.index, once.label) == (7, 1) and isinstance(once.flip, bool)
    assert 0.3 < np.mean([train[e, 0].flip for e in range(200)]) < 0.7
    # Evaluation: by index, by augment=False
    plain = open_data(str(folder), size=(24, 16))
    assert equal(train[7], plain[7])
    assert equal(plain[3, 7], plain[7])
    assert not plain[7].flip


def test_image_is_not_flipped_in_the_worker(tmp_path):
    write(tmp_path / "0.png", ramp(80, 60))
    train = open_data(str(tmp_path), size=20, augment=True)
    flips = set()
    for epoch in range(20):
        sample = train[epoch, 0]
        flips.add(sample.flip)
        assert sample.image[0, 10, 0] < sample.image[0, 10, 19]
    assert flips == {True, False}


@pytest.mark.parametrize("augment", [True, False])
def test_workers_change_nothing(folder, augment):
    dataset = open_data(str(folder), size=16, augment=augment, seed=1)
    runs = []
    for workers in (0, 2):
        sampler = (
            ResumableBatchSampler(len(dataset), 5, 1, 5, seed=3) if augment else None
        )
        runs.append(list(make_loader(dataset, 5, workers, sampler)))
    assert len(runs[0]) == len(runs[1]) == (4 if augment else 3)
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))
    batch = runs[0][-1]
    assert type(batch) is attg.datasets.Sample
    assert batch.flip.dtype == torch.bool
    assert batch.index.dtype == torch.int64
    # Evaluation keeps the short batch
    assert len(batch.image) == (5 if augment else 2)


def test_loader_leaves_the_global_generator_alone(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(iter(make_loader(open_data(str(folder)), 2)))
    assert torch.equal(state, torch.get_rng_state())


def test_workers_ignore_signals_and_leave():
    """Ctrl-C and stop signals reach the whole process group; only the main process may
    act, and it must end in time.
    """
    # Workers start with the usual handlers; the second loader is left in mid-epoch.
    code = """
import os, signal
from attg.datasets import open_data
from attg.loader import ResumableBatchSampler, make_loader

def batches():
    steps = ResumableBatchSampler(len(data), 50, 0, 60)
    return iter(make_loader(data, workers=2, batch_sampler=steps))

data = open_data("toy", "test", augment=True)
first = batches()
next(first)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
    os.killpg(0, number)
print("batches", 1 + sum(1 for _ in first))
next(batches())
raise SystemExit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (3, "batches 60\n"), done.stderr


@pytest.mark.parametrize("name", ["toy", "folder", "flat"])
def test_data_sets_pickle(folder, name):
    (folder / "train" / "b").rename(folder / "flat")
    shutil.rmtree(folder / "flat" / "sub")
    dataset = open_data({"toy": "toy", "folder": folder, "flat": folder / "flat"}[name])
    again = pickle.loads(pickle.dumps(dataset))
    assert equal(dataset[1], again[1]) and again.fingerprint == dataset.fingerprint


def test_epochs_are_permutations():
    batches = ResumableBatchSampler(103, 20, 0, 10, seed=4)
    epochs = [
        torch.cat([batches.indices(5 * e + s) for s in range(5)]) for e in range(2)
    ]
    for epoch in epochs:
        assert epoch.dtype == torch.int64
        assert len(epoch.unique()) == 100
        assert 0 <= epoch.min()
        assert epoch.max() < 103
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], epochs[0].sort()[0])
    assert not torch.equal(
        epochs[0],
        torch.cat(
            [ResumableBatchSampler(103, 20, 0, 5, seed=5).indices(s) for s in range(5)]
        ),
    )
    keys = list(batches)
    assert [k for key in keys for k in key] == [
        (e, i) for e in (0, 1) for i in epochs[e].tolist()
    ]
    assert len(batches) == len(keys) == 10


@pytest.mark.parametrize("world, accum", [(1, 3), (2, 1), (2, 2), (3, 4)])
def test_ranks_and_accumulation_tile_the_global_batch(world, accum):
    single = list(ResumableBatchSampler(100, 24, 2, 9, seed=1))
    ranks = [
        list(
            ResumableBatchSampler(
                100, 24, 2, 9, seed=1, accum=accum, rank=r, world=world
            )
        )
        for r in range(world)
    ]
    assert all(len(rank) == 7 * accum for rank in ranks)
    b = 24 // (world * accum)
    for step in range(7):
        for a in range(accum):
            for r in range(world):
                first = (a * world + r) * b
                assert ranks[r][step * accum + a] == single[step][first : first + b]


def test_start_in_mid_epoch_continues_exactly():
    assert (
        list(ResumableBatchSampler(50, 8, 9, 20, seed=2))
        == list(ResumableBatchSampler(50, 8, 0, 20, seed=2))[9:]
    )


def test_batch_errors():
    with pytest.raises(
        ValueError, match="--batch_size 9: there are 8 pictures; use 1 to 8"
    ):
        ResumableBatchSampler(8, 9, 0, 1)
    with pytest.raises(
        ValueError,
        match="--batch_size 10: .* --accum 2 times 2 processes; use a multiple of 4",
    ):
        ResumableBatchSampler(80, 10, 0, 1, accum=2, world=2)


def modes():
    """(mode, file type, picture, RGB it must become, options of save)"""
    wide = np.array([[0, 257, 32768], [65535, 514, 25700]], dtype=np.uint16)
    grey = np.repeat(
        np.array([[0, 1, 128], [255, 2, 100]], dtype=np.uint8)[..., None], 3, 2
    )
    rgb = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    alpha = np.concatenate(
        [rgb, np.array([[0, 128, 255], [255, 0, 1]], dtype=np.uint8)[..., None]], 2
    )
    palette = Image.new("P", (3, 2))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1, 0, 1, 1, 0])
    colours = np.array([[10, 20, 30], [200, 100, 50]])[np.array([[0, 1, 0], [1, 1, 0]])]
    ink = Image.new("CMYK", (3, 2))
    ink.putdata(
        [
            (0, 0, 0, 0),
            (255, 0, 0, 0),
            (0, 255, 0, 0),
            (0, 0, 255, 0),
            (0, 0, 0, 255),
            (255, 255, 255, 255),
        ]
    )
    inks = np.array(
        [
            [[255, 255, 255], [0, 255, 255], [255, 0, 255]],
            [[255, 255, 0], [0, 0, 0], [0, 0, 0]],
        ]
    )
    bits = np.array([[True, False, True], [False, False, True]])
    yield "RGB", "png", Image.fromarray(rgb), rgb, {}
    yield "L", "png", Image.fromarray(grey[..., 0]), grey, {}
    yield "1", "png", Image.fromarray(bits), np.repeat(bits[..., None] * 255, 3, 2), {}
    yield "RGBA", "png", Image.fromarray(alpha), rgb, {}
    yield "LA", "png", Image.merge("LA", [Image.fromarray(grey[..., 0])] * 2), grey, {}
    yield "P", "png", palette, colours, {"transparency": bytes([0, 128])}
    yield "CMYK", "tif", ink, inks, {}
    yield "I;16", "png", Image.fromarray(wide), grey, {}
    yield "I;16", "tif", Image.fromarray(wide), grey, {}
    yield "I", "tif", Image.fromarray(wide.astype(np.int32)), grey, {}
    yield "F", "tif", Image.fromarray(grey[..., 0].astype(np.float32) / 255), grey, {}
    yield "F", "tiff", Image.fromarray(grey[..., 0].astype(np.float32)), grey, {}


@pytest.mark.parametrize(
    "mode, suffix, picture, expected, options",
    list(modes()),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, picture, expected, options):
    write(tmp_path / f"0.{suffix}", picture, **options)
    with Image.open(tmp_path / f"0.{suffix}") as stored:
        assert stored.mode == mode  # the file really has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Tiny pictures are only resized: here not at all
        sample = open_data(tmp_path, size=(2, 3))[0]
    assert sample.image.dtype == torch.uint8
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), expected)


def test_exif_rotation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "0.png", noise(6, 4), exif=exif)
    image = open_data(tmp_path, size=(4, 6))[0].image
    np.testing.assert_array_equal(
        image.permute(1, 2, 0).numpy(), np.asarray(noise(6, 4))
    )


def test_bad_files_are_replaced(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.jpg", noise(64, 64, i))
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.jpg").write_text("not a picture")
    (tmp_path / "5.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("ignored")
    flat = open_data(tmp_path, size=40, augment=True)
    assert list(flat.names) == [
        f"{i}.jpg" for i in range(6)
    ]  # bad files keep their row
    assert [flat[i].index for i in range(6)] == [0, 3, 3, 3, 4, 0]
    assert equal(flat[1], flat[3]) and equal(flat[5], flat[0])
    assert flat[2, 1].index == 3 and not torch.equal(flat[2, 1].box, flat[2, 3].box)
    batch = next(iter(make_loader(flat, 6)))
    assert batch.index.tolist() == [0, 3, 3, 3, 4, 0]


def test_no_readable_file(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(
        ValueError,
        match=r"--data: none of the 3 pictures can be decoded, not /.*/1\.png \(",
    ):
        open_data(tmp_path)[1]


def test_class_folder(folder):
    train, val = open_data(str(folder)), open_data(str(folder), "test")
    peer = torchvision.datasets.ImageFolder(folder / "train")
    assert list(train.names) == [
        Path(p).relative_to(folder / "train").as_posix() for p, _ in peer.samples
    ]
    assert list(train.names)[:4] == ["a/0.png", "a/1.png", "a/3.png", "a/sub/2.png"]
    assert [train[i].label for i in range(12)] == peer.targets
    assert (train.num_classes, train.labelled, len(val), train.masks) == (
        3,
        True,
        3,
        None,
    )
    (folder / "val").rename(folder / "test")
    assert list(open_data(str(folder), "test").names) == list(val.names)
    (folder / "test").rename(folder / "elsewhere")
    assert open_data(str(folder), "test") is None
    (folder / "linked").symlink_to(folder / "elsewhere" / "a")
    linked = open_data(folder / "linked")
    assert list(linked.names) == ["0.png"]
    assert linked[0].label == -1
    assert (linked.num_classes, linked.labelled) == (0, False)
    assert open_data(folder / "linked", "test") is None


def test_fingerprint_follows_number_and_names(folder):
    before = open_data(folder).fingerprint
    assert before == open_data(folder, size=64, augment=True, seed=3).fingerprint
    assert len(before) == 64
    (folder / "train" / "a" / "0.png").rename(folder / "train" / "a" / "00.png")
    renamed = open_data(folder).fingerprint
    (folder / "train" / "a" / "00.png").unlink()
    assert len({before, renamed, open_data(folder).fingerprint}) == 3


def test_classes_select_folders(folder, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("c\n\na\n")
    train, val = (
        open_data(folder, split, classes=str(listed)) for split in ("train", "test")
    )
    assert [train[i].label for i in range(8)] == [0] * 4 + [1] * 4
    assert train.names[4] == "c/0.png"
    assert train.num_classes == 2
    assert list(val.names) == ["a/0.png", "c/0.png"]
    assert (val[0].label, val[1].label) == (0, 1)
    assert train.fingerprint != open_data(folder).fingerprint
    listed.write_text("a\nzebra\n")
    with pytest.raises(
        ValueError,
        match=r"--classes .*classes.txt: \['zebra'\] listed, but .*train are \['a', 'b'",
    ):
        open_data(folder, classes=str(listed))
    listed.write_text("\n")
    with pytest.raises(ValueError, match="--classes .*: nothing listed.*one a line"):
        open_data(folder, classes=str(listed))
    with pytest.raises(
        ValueError, match=r"--classes .*nowhere\.txt: must be a text file"
    ):
        open_data(folder, classes=str(tmp_path / "nowhere.txt"))
    for name in ("toy", "cifar10", str(folder / "val" / "b")):
        with pytest.raises(
            ValueError,
            match="--classes .*--data a folder with train/CLASS/ or CLASS/, not",
        ):
            open_data(name, classes=str(listed))


def test_test_classes_must_be_the_training_classes(folder):
    write(folder / "val" / "d" / "0.png", noise(40, 40))
    # Training alone does not mind
    open_data(folder)
    with pytest.raises(
        ValueError,
        match=r"--data .*train and .*val hold different classes, \['d'\] are in one",
    ):
        open_data(folder, "test")
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert len(open_data(folder, "test", classes=folder / "classes.txt")) == 3


def test_missing_and_empty_folders(tmp_path):
    layout = r"A folder must hold train/CLASS/\*\.jpg.*flat\s+folder"
    with pytest.raises(
        ValueError,
        match=f"--data .*nowhere: neither a folder, a picture nor one of toy, cifar10.*{layout}",
    ):
        open_data(str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError,
        match=f"--data .*no class folders and no pictures in {tmp_path}. {layout}",
    ):
        open_data(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(
        ValueError,
        match=f"--data .*no class folders and no pictures in {tmp_path}/train.*{layout}",
    ):
        open_data(str(tmp_path))
    write(tmp_path / "train" / "a" / "0.png", noise(40, 40))
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(
        ValueError, match=f"--data .*no pictures of the classes empty in .*{layout}"
    ):
        open_data(str(tmp_path))
    with pytest.raises(
        ValueError, match="split 'only_fg' of --data .*must be one of train, test"
    ):
        open_data(str(tmp_path), "only_fg")


class FakeSet:
    """Stands in for any class of torchvision.datasets: nothing on the disk until
    downloaded.
    """

    calls = []

    def __init__(self, root, download=False, **options):
        self.calls.append((root, download, options))
        if not download and not (Path(root) / "there").exists():
            raise RuntimeError(
                "Dataset not found or corrupted. You can use download=True to download it"
            )
        self.value = 50 * len(options.get("split", "train"))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Image.new("RGB", (8, 8), (self.value % 256, i, 0)), i


@pytest.mark.parametrize("name", attg.datasets.TORCHVISION)
def test_torchvision_names(name, tmp_path, monkeypatch):
    kind, classes, _, parts, test_parts = attg.datasets.TORCHVISION[name]
    assert issubclass(getattr(torchvision.datasets, kind), torch.utils.data.Dataset)
    monkeypatch.setattr(torchvision.datasets, kind, FakeSet)
    monkeypatch.setattr(FakeSet, "calls", [])
    monkeypatch.setenv("ATTG_DATA", str(tmp_path))
    train = open_data(name, size=8, augment=True)
    # Downloads only what is not there
    assert [c[1] for c in FakeSet.calls] == [False, True] * len(parts)
    assert all(c[0] == str(tmp_path) for c in FakeSet.calls)
    assert [c[2] for c in FakeSet.calls[::2]] == parts
    assert len(train) == len(train.names) == len(set(train.names)) == 4 * len(parts)
    assert train.num_classes == classes
    assert train[5 % len(train)].image[1, 0, 0] == 5 % 4
    (tmp_path / "there").touch()
    FakeSet.calls.clear()
    test = open_data(name, "test", size=8, root=tmp_path)
    assert [c[1:] for c in FakeSet.calls] == [(False, *test_parts)]
    assert test.fingerprint != train.fingerprint
    assert pickle.loads(pickle.dumps(test))[2].label == 2


@pytest.mark.parametrize("name", attg.datasets.TORCHVISION)
def test_no_network_names_the_remedy(name, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    put = f"put the files of .*{tmp_path / attg.datasets.TORCHVISION[name][2]}, or set ATTG_DATA"
    with pytest.raises(ValueError, match=f"--data {name}: not found in .*{put}"):
        open_data(name, root=tmp_path)


@pytest.mark.parametrize("name", ["flowers102", "stanford_cars"])
def test_no_scipy_names_the_remedy(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(
        ValueError, match=f"--data {name}: .*scipy is missing; pip install scipy"
    ):
        open_data(name, root=tmp_path)


@pytest.mark.parametrize(
    "picture, size",
    [
        ((97, 61), (32, 32)),
        ((61, 97), (40, 24)),
        ((300, 33), (32, 32)),
        ((120, 40), (16, 48)),
    ],
)
def test_training_box_and_pixels_recomputed(tmp_path, picture, size):
    """Box times size of the picture is a whole-pixel region in the allowed range; the
    image is that region, resized.
    """
    write(tmp_path / "0.png", noise(*picture))
    train = open_data(tmp_path, size=size, augment=True)
    full, boxes = Image.open(tmp_path / "0.png"), []
    for epoch in range(30):
        image, _, _, box, _ = train[epoch, 0]
        pixels = box.double().numpy() * [*picture, *picture]
        assert np.abs(pixels - pixels.round()).max() < 1e-4
        x0, y0, x1, y1 = (int(v) for v in pixels.round())
        assert 0 <= x0 < x1 <= picture[0] and 0 <= y0 < y1 <= picture[1]
        expected = full.crop((x0, y0, x1, y1)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        np.testing.assert_array_equal(
            image.permute(1, 2, 0).numpy(), np.asarray(expected)
        )
        boxes.append((x1 - x0, y1 - y0))
    w, h = np.array(boxes).T
    # There, no crop fits and the centre is taken
    if picture != (300, 33):
        area, ratio = w * h / (picture[0] * picture[1]), w / h / (size[1] / size[0])
        slack = 1 + 2 / min(w.min(), h.min())
        assert 0.2 / slack <= area.min() < 0.5 < area.max() <= 1
        assert 3 / 4 / slack <= ratio.min() and ratio.max() <= 4 / 3 * slack
        assert len(set(boxes)) > 20


def test_training_crop_matches_torchvision(tmp_path):
    write(tmp_path / "0.png", noise(97, 61))
    train = open_data(tmp_path, size=32, augment=True, seed=8)
    v = torchvision.transforms
    peer = v.RandomResizedCrop(32, (0.2, 1), interpolation=v.InterpolationMode.BICUBIC)
    for epoch in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for("crop", 8, epoch, 0))
            expected = peer(Image.open(tmp_path / "0.png"))
            flip = torch.rand(()).item() < 0.5
        sample = train[epoch, 0]
        np.testing.assert_array_equal(
            sample.image.permute(1, 2, 0).numpy(), np.asarray(expected)
        )
        assert sample.flip == flip


@pytest.mark.parametrize("size", [32, 112, 33])
@pytest.mark.parametrize(
    "picture", [(97, 61), (61, 97), (64, 64), (500, 375), (33, 200)]
)
def test_evaluation_is_torchvisions_resize_and_centre_crop(tmp_path, picture, size):
    write(tmp_path / "0.png", noise(*picture))
    v = torchvision.transforms
    peer = v.Compose(
        [
            v.Resize(round(size * 256 / 224), v.InterpolationMode.BICUBIC),
            v.CenterCrop(size),
        ]
    )
    image = open_data(tmp_path, size=size)[0].image
    np.testing.assert_array_equal(
        image.permute(1, 2, 0).numpy(), np.asarray(peer(Image.open(tmp_path / "0.png")))
    )


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("picture", [(400, 260), (260, 400), (300, 300)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 48)])
def test_box_is_the_region_seen(tmp_path, picture, size, augment):
    """Where red is x and green is y the pixels themselves tell the region: a line
    through their centres.
    """
    write(tmp_path / "0.png", ramp(*picture))
    dataset = open_data(tmp_path, size=size, augment=augment)
    for epoch in range(4):
        image, _, _, box, flip = dataset[epoch, 0]
        for channel, (axis, extent, pixels) in enumerate(
            [(1, size[1], picture[0]), (0, size[0], picture[1])]
        ):
            # Value against the centre of each output pixel
            line = image[channel].double().mean(1 - axis).numpy()
            centres, inner = (np.arange(extent) + 0.5) / extent, slice(3, -3)
            slope, offset = np.polyfit(centres[inner], line[inner], 1)
            seen = (
                np.array([offset, offset + slope]) / 255 * (pixels - 1) / pixels
                + 0.5 / pixels
            )
            np.testing.assert_allclose(box[channel::2].numpy(), seen, atol=0.004)


def test_evaluation_box_by_hand(tmp_path):
    write(tmp_path / "0.png", noise(300, 200))
    # Shorter side to 128: 192 x 128, centre 112 x 112
    box = open_data(tmp_path, size=112)[0].box
    np.testing.assert_allclose(
        box, [40 / 192, 8 / 128, 152 / 192, 120 / 128], rtol=1e-6
    )
    # Must cover 128 x 64: 128 x 85, centre 112 x 56
    box = open_data(tmp_path, size=(56, 112))[0].box
    np.testing.assert_allclose(box, [8 / 128, 14 / 85, 120 / 128, 70 / 85], rtol=1e-6)


@pytest.mark.parametrize(
    "picture, whole", [((32, 32), True), ((90, 32), True), ((33, 33), False)]
)
def test_tiny_pictures_are_only_resized(tmp_path, picture, whole):
    write(tmp_path / "0.png", noise(*picture))
    sample = open_data(tmp_path, size=28)[0]
    assert (sample.box.tolist() == [0, 0, 1, 1]) is whole
    if whole:
        expected = Image.open(tmp_path / "0.png").resize(
            (28, 28), Image.Resampling.BICUBIC
        )
        np.testing.assert_array_equal(
            sample.image.permute(1, 2, 0).numpy(), np.asarray(expected)
        )


def test_collate_of_samples():
    batch = default_collate([open_data("toy", "test")[i] for i in range(3)])
    assert type(batch) is attg.datasets.Sample
    assert batch.image.shape == (3, 3, 32, 32)
    assert batch.box.shape == (3, 4)
    assert batch.label.tolist() == [0, 1, 2] and batch.flip.tolist() == [False] * 3


def test_subsets_of_data(labelled, monkeypatch):
    whole_set = open_data(labelled["data"], "train", 32, augment=True, seed=4)
    rows = torch.tensor([24, 3, 11])
    part = whole_set.subset(rows)
    assert list(part.names) == [whole_set.names[i] for i in rows]
    assert part.labels.tolist() == [2, 0, 1]
    assert len(part) == 3
    assert part.fingerprint != whole_set.fingerprint
    assert part.num_classes == 3
    for i, row in enumerate(rows.tolist()):
        assert part[i].image.equal(whole_set[row].image)
        assert (part[i].index, part[i].label) == (i, part.labels[i])
    assert part[5, 1].image.shape == (3, 32, 32)
    assert not part[5, 1].box.equal(part[6, 1].box)
    batch = next(iter(make_loader(part, 3, workers=1)))
    assert batch.image.equal(torch.stack([part[i].image for i in range(3)]))
    toy_part = open_data("toy", "test").subset(torch.tensor([7, 1]))
    assert np.array_equal(toy_part.masks, attg.toy.toy("test")[1][[7, 1]])
    assert toy_part.labels.tolist() == [7, 1]
    monkeypatch.setattr(
        attg.datasets,
        "open_torchvision",
        lambda *_: [(noise(32, 32, i), i % 4) for i in range(9)],
    )
    assert open_data("cifar10", root="nowhere").labels.tolist() == [
        i % 4 for i in range(9)
    ]
    assert open_data(
        str(Path(labelled["data"], "train", "r"))
    ).labels.unique().tolist() == [-1]


def test_other_folders_as_test_sets(folder, tmp_path):
    for layout in ("val", "test", ""):
        shutil.rmtree(tmp_path / "more", ignore_errors=True)
        shutil.copytree(folder / "val", tmp_path / "more" / layout)
        more = open_data(str(folder), str(tmp_path / "more"))
        assert list(more.names) == list(open_data(str(folder), "test").names)
        assert more[2].label == 2
    write(tmp_path / "more" / "d" / "0.png", noise(40, 40))
    with pytest.raises(
        ValueError, match=r"train and .*more hold different classes, \['d'\]"
    ):
        open_data(str(folder), str(tmp_path / "more"))
    for name in ("toy", "cifar10"):
        with pytest.raises(
            ValueError,
            match=f"split '.*more' of --data {name}: must be one of train, test",
        ):
            open_data(name, str(tmp_path / "more"))


def test_few_shots_are_the_same_for_every_model():
    labels = torch.randint(4, (200,))
    one, five = (attg.datasets.shot_indices(labels, shots, 3) for shots in (1, 5))
    assert labels[five].bincount().tolist() == [5] * 4 and len(set(five.tolist())) == 20
    assert set(one.tolist()) < set(five.tolist())
    assert five.equal(attg.datasets.shot_indices(labels, 5, 3))
    assert not five.equal(attg.datasets.shot_indices(labels, 5, 4))
    # unlabelled
    assert (
        five.tolist()
        == attg.datasets.shot_indices(
            torch.cat([labels, torch.tensor([-1, -1])]), 5, 3
        ).tolist()
    )
    tenth, everything = (
        attg.datasets.shot_indices(labels, share, 3) for share in (0.1, 1.0)
    )
    assert labels[tenth].bincount().tolist() == [
        round(n / 10) for n in labels.bincount().tolist()
    ]
    assert set(one.tolist()) < set(tenth.tolist())
    assert sorted(everything.tolist()) == list(range(200))
    # At least one of each
    assert attg.datasets.shot_indices(labels, 1e-9, 3).tolist() == one.tolist()
    # A class that has fewer gives all it has
    assert sorted(attg.datasets.shot_indices(labels, 500, 0).tolist()) == list(
        range(200)
    )
    for bad, shots in ((labels, 0), (labels[labels != 1], 5)):
        with pytest.raises(ValueError, match=f"--shots {shots} of 4 classes: must be"):
            attg.datasets.shot_indices(bad, shots, 0)


def test_augmentation_is_a_function_of_seed_epoch_and_index(labelled):
    after = attg.images.rand_augment((0.5, 0.5, 0.5))
    view = partial(attg.images.train_view, scale=(0.08, 1.0), after=after)
    sets = [
        open_data(labelled["data"], "train", 32, augment=x, seed=3)
        for x in (view, view, True)
    ]
    before = torch.get_rng_state()
    pairs = [[x[e, i] for x in sets] for e in range(4) for i in range(len(sets[0]))]
    assert torch.get_rng_state().equal(before)
    assert all(a.image.equal(b.image) for a, b, _ in pairs)
    areas = torch.stack(
        [(a.box[2] - a.box[0]) * (a.box[3] - a.box[1]) for a, _, _ in pairs]
    )
    assert areas.min() < 0.15 and areas.max() > 0.8
    plain_view = open_data(
        labelled["data"],
        "train",
        32,
        augment=partial(attg.images.train_view, scale=(0.08, 1.0)),
        seed=3,
    )
    same_box = [plain_view[e, i] for e in range(4) for i in range(len(plain_view))]
    assert all(a.box.equal(b.box) for (a, _, _), b in zip(pairs, same_box, strict=True))
    unchanged = sum(
        a.image.equal(b.image) for (a, _, _), b in zip(pairs, same_box, strict=True)
    ) / len(pairs)
    # Neither of two operations, probability 0.25, or some without effect
    assert 0.15 < unchanged < 0.5


# -- Layouts ---------------------------------------------------------------------------


def test_class_folders_without_train(folder, tmp_path, monkeypatch):
    """What torchvision calls an ImageFolder: for training, and with --val to evaluate."""
    peer = torchvision.datasets.ImageFolder(folder / "train")
    train = open_data(folder / "train")
    assert list(train.names) == list(open_data(folder).names)
    assert train.labels.tolist() == peer.targets
    assert (train.num_classes, train.labelled) == (3, True)
    assert open_data(folder / "train", "test") is None
    monkeypatch.chdir(folder / "train")
    assert list(open_data(".").names) == list(train.names)
    assert open_data(".")[3].image.equal(train[3].image)
    parts = attg.datasets.open_labelled(folder / "train", [str(folder / "val")], 32)
    assert len(parts[0]) == 12 and len(parts[1][str(folder / "val")]) == 3
    (tmp_path / "classes.txt").write_text("a\nc\n")
    few = open_data(folder / "train", classes=tmp_path / "classes.txt")
    assert len(few) == 8 and few.num_classes == 2
    with pytest.raises(ValueError, match="--data .*needs labelled images"):
        attg.datasets.open_labelled(folder / "train", ["test"], 32)


def test_flat_train_and_test_folders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            write(tmp_path / split / f"{i}.png", noise(40, 40, i))
    train, test = open_data(tmp_path), open_data(tmp_path, "test")
    assert list(train.names) == ["0.png", "1.png", "2.png"]
    assert list(test.names) == ["0.png", "1.png"]
    assert not (train.labelled or test.labelled) and train[0].label == -1
    (tmp_path / "val").rename(tmp_path / "kept")
    assert open_data(tmp_path, "test") is None
    write(tmp_path / "val" / "a" / "0.png", noise(40, 40))
    with pytest.raises(ValueError, match=r"train holds pictures, but .*val none"):
        open_data(tmp_path, "test")


def test_stray_pictures_are_not_silently_the_set(folder, tmp_path):
    for i in range(2):
        write(folder / "train" / f"stray{i}.png", noise(40, 40))
    for data in (folder, folder / "train"):
        with pytest.raises(
            ValueError, match=r"train holds 2 pictures, as stray0.png, beside 3 folders"
        ):
            open_data(data)
    # What is meant can be said.
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert len(open_data(folder, classes=tmp_path / "classes.txt")) == 12
    # Folders without pictures are in nobody's way.
    for name in "abc":
        shutil.rmtree(folder / "train" / name)
        (folder / "train" / name).mkdir()
    assert list(open_data(folder).names) == ["stray0.png", "stray1.png"]
    write(tmp_path / "half" / "val" / "a" / "0.png", noise(40, 40))
    with pytest.raises(ValueError, match="no class folders and no pictures in .*half"):
        open_data(tmp_path / "half")


def test_one_picture(tmp_path):
    write(tmp_path / "photo.png", noise(50, 40))
    write(tmp_path / "other.png", noise(50, 40, 1))
    one = open_data(tmp_path / "photo.png", augment=True)
    assert list(one.names) == ["photo.png"] and not one.labelled
    assert one[0].image.equal(open_data(tmp_path)[1].image) and one[3, 0].index == 0
    assert open_data(str(tmp_path / "photo.png"), "test") is None
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"notes.txt: a file, but no picture.*\.jpg"):
        open_data(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="--data ~nobody/x: neither a folder, a pict"):
        open_data("~nobody/x")


def test_folders_are_entered_once_and_only_files_are_read(folder):
    train = folder / "train"
    before = list(open_data(folder).names)
    (train / "a" / "up").symlink_to("..")
    (train / "a" / "round").symlink_to(".")
    (train / "a" / "sub" / "self").symlink_to("self")
    (train / "b" / "across").symlink_to(train / "a")
    (train / "root").symlink_to(folder)
    os.mkfifo(train / "a" / "pipe.png")
    (train / "a" / "zero.png").symlink_to("/dev/zero")
    (train / "a" / "lost.png").symlink_to("nowhere.png")
    with within(10):
        assert list(open_data(folder).names) == before
        assert list(open_data(train / "a" / "sub").names) == ["2.png"]
    # Links to other places are followed, the ordinary way first.
    write(folder / "more" / "x" / "9.png", noise(40, 40))
    (folder / "more" / "d").symlink_to(folder / "d")
    (train / "a" / "0link").symlink_to("sub")
    (train / "a" / "link").symlink_to(folder / "more")
    write(folder / "d" / "9.png", noise(40, 40))
    (train / "d").symlink_to(folder / "d")
    names = list(open_data(folder).names)
    assert sorted(set(names) - set(before)) == ["a/link/x/9.png", "d/9.png"]


@pytest.mark.parametrize("links", [(), ("up", "across", "device", "file")])
def test_odd_folders(tmp_path, fuzz, links):
    """Against torchvision where there are no links, and by what must hold elsewhere."""
    opened = 0
    for seed in range(fuzz):
        root = tmp_path / str(seed)
        odd_tree(root, random.Random(seed), links)
        plain, empty = [], False
        for c in "abc":
            here = []
            for place, _, files in os.walk(root / c):
                here += [os.path.relpath(os.path.join(place, x), root) for x in files]
            here = [x for x in here if x.endswith((".png", ".jpg"))]
            here = [x for x in here if os.path.isfile(root / x)]
            plain += here
            empty = empty or not here
        with within(20):
            try:
                data = open_data(root, size=8)
            except ValueError as error:
                assert empty and f"--data {root}: no pictures of the cl" in str(error)
                continue
            data[seed % len(data)]
        opened += 1
        names = list(data.names)
        assert set(plain) <= set(names) and len(set(names)) == len(names), seed
        assert all(os.path.isfile(root / name) for name in names), seed
        # Each folder by one way only, and no class within another one.
        ways = {(x.split("/")[0], os.path.dirname(x)) for x in names}
        real = {(c, os.path.realpath(root / way)) for c, way in ways}
        assert len(real) == len(ways), seed
        assert all(str(root / c) in p for c, p in real if str(root) in p), seed
        if not links:
            for pipe in root.rglob("*"):
                if stat.S_ISFIFO(pipe.stat().st_mode):
                    pipe.unlink()
            shutil.rmtree(root / ".hidden", ignore_errors=True)
            peer = torchvision.datasets.ImageFolder(root)
            assert names == [os.path.relpath(p, root) for p, _ in peer.samples], seed
            assert data.labels.tolist() == peer.targets
    assert opened > 0.8 * fuzz


def test_names_are_one_array(folder):
    words = ["a/0.png", "ä/ö.jpg", "", "x" * 300, "\udcff\udcfe.png", "new\nline"]
    names = attg.datasets.Names(words)
    assert list(names) == words and len(names) == 6
    assert names[-2] == words[4] and names[3] == words[3]
    with pytest.raises(IndexError):
        names[6]
    assert list(pickle.loads(pickle.dumps(names))) == words
    assert list(attg.datasets.Names([])) == []
    data = open_data(folder)
    # Nothing of a data set of files is a Python object for each picture.
    kept = [data.names.text, data.names.bounds, data.labels, data.read.args[2]]
    assert data.read.args[1] is not None and len(pickle.dumps(data)) < 5000 + sum(
        x.nbytes for x in kept
    )


# -- Fingerprints ----------------------------------------------------------------------


def test_fingerprint_follows_the_sizes_of_files(folder):
    file = folder / "train" / "a" / "0.png"
    before = open_data(folder)
    known = before.names_fingerprint, before.fingerprint
    content = file.read_bytes()
    file.write_bytes(content + b"x")
    after = open_data(folder)
    assert after.names_fingerprint == known[0] and after.fingerprint != known[1]
    file.write_bytes(content)
    assert open_data(folder).fingerprint == known[1]
    # By hand, and of what has no files as before there were sizes.
    words = "\0".join([str(len(before)), *before.names])
    assert known[0] == hashlib.sha256(words.encode()).hexdigest()
    sizes = [(folder / "train" / x).stat().st_size for x in before.names]
    words = "\0".join([known[0], *map(str, sizes)])
    assert known[1] == hashlib.sha256(words.encode()).hexdigest()
    toys = open_data("toy", "test")
    assert toys.fingerprint == toys.names_fingerprint
    part = before.subset(torch.tensor([0, 1]))
    assert part.fingerprint != part.names_fingerprint


# -- Large, damaged and odd pictures ---------------------------------------------------


@pytest.mark.parametrize("channels", [3, 1])
def test_odd_pictures(tmp_path, fuzz, capsys, channels):
    """Each is seen, or replaced by the sound one beside it; nothing else may happen."""
    replaced, limit = 0, 50_000
    base = largest_memory(anew=True)
    for seed in range(fuzz):
        folder = tmp_path / str(seed)
        write(folder / "1.bmp", noise(9, 9))
        path, (width, height), sound = odd_picture(folder, random.Random(seed))
        data = open_data(
            folder, size=16, augment=True, channels=channels, max_pixels=limit
        )
        with within(20):
            samples = data[0], data[seed, 0], data[0, 1]
        for sample in samples:
            assert sample.image.shape == (channels, 16, 16), seed
            assert sample.image.dtype == torch.uint8
            assert 0 <= sample.box.min() and sample.box.max() <= 1.00001
        assert samples[0].index == samples[1].index, seed
        if sound:
            assert samples[0].index == int(width * height > limit), seed
        # Once, by its full path.
        said = capsys.readouterr().err.count(f"replaces it: {path} (")
        assert said == samples[0].index, seed
        replaced += said
    assert 0.2 * fuzz < replaced < 0.9 * fuzz
    assert largest_memory() - base < 200e6


def test_pictures_as_bombs(tmp_path):
    """Little files of many pixels: in memory and time they stay within bounds."""
    (tmp_path / "0.png").write_bytes(png(500_000, 33))
    (tmp_path / "1.png").write_bytes(png(33, 500_000))
    row = bytes(2 * 13_000)
    (tmp_path / "2.png").write_bytes(png(13_000, 13_000, 16, 0, row))
    write(tmp_path / "3.png", noise(9, 9))
    data = open_data(tmp_path, size=224, augment=True)
    base = largest_memory(anew=True)
    for i in range(3):
        began = time.process_time()
        with warnings.catch_warnings():
            # Pillow's own word on the third.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            seen = {data[i].index, data[0, i].index}
        assert seen == {3 if i == 2 else i}
        assert time.process_time() - began < 4
    # Whole, the strips would take 4.5 GB.
    assert largest_memory() - base < 400e6


def test_pixels_are_counted_before_decoding(tmp_path, capsys):
    write(tmp_path / "0.png", noise(60, 50))
    write(tmp_path / "1.png", noise(50, 50))
    assert open_data(tmp_path, max_pixels=3000)[0].index == 0
    assert open_data(tmp_path, max_pixels=2999)[0].index == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/0.png (60 x 50 pixels, above --max_pixels 2999)" in said
    with pytest.raises(ValueError, match="none of the 2 .*above --max_pixels 9"):
        open_data(tmp_path, max_pixels=9)[0]


@pytest.mark.parametrize("along", [0, 1])
def test_middle_of_strips(tmp_path, along):
    """What is left out of the resizing changes nothing but the rounding."""
    y, x = np.mgrid[:40, :1200]
    waves = np.uint8(127 + 60 * np.sin(x / 8) + 60 * np.sin(y / 5))
    write(tmp_path / "0.png", Image.fromarray(waves.T if along else waves))
    image, _, _, box, _ = open_data(tmp_path, size=28)[0]
    v = torchvision.transforms
    resize = v.Resize(32, v.InterpolationMode.BICUBIC)
    expected = v.CenterCrop(28)(resize(Image.open(tmp_path / "0.png")))
    got, want = image[0].numpy().astype(int), np.array(expected)
    assert abs(got - want).max() <= 1 and (got != want).mean() < 0.05
    # A region a pixel aside is not taken for it.
    assert abs(got[1:-1, 2:] - want[1:-1, 1:-1]).max() > 5
    assert abs(got[2:, 1:-1] - want[1:-1, 1:-1]).max() > 5
    sides = (box[2:] - box[:2]).tolist()
    assert np.allclose(sides[:: -1 if along else 1], [28 / 960, 28 / 32])


def test_large_jpegs_are_decoded_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(attg.images, "MIN_DRAFT_SIDE", 64)
    write(tmp_path / "0.jpg", ramp(128, 129), quality=95)
    write(tmp_path / "1.jpg", ramp(128, 127), quality=95)
    read = [attg.images.load_image(tmp_path / f"{i}.jpg") for i in range(2)]
    assert read[0].size == (64, 65) and read[1].size == (128, 127)
    images = [x.image.int() for x in open_data(tmp_path, size=40)]
    assert (images[0] - images[1]).abs().max() <= 4


def test_grey_pictures(tmp_path, labelled):
    wide = np.uint16(np.arange(64).reshape(8, 8) * 1024)
    write(tmp_path / "0.png", Image.fromarray(wide))
    write(tmp_path / "1.png", noise(8, 8))
    grey = open_data(tmp_path, size=8, augment=True, channels=1)
    assert grey[0].image.shape == grey[2, 1].image.shape == (1, 8, 8)
    assert (grey[0].image[0].numpy() == (wide / 257 + 0.5).astype(int)).all()
    luma = np.asarray(noise(8, 8), float) @ (0.299, 0.587, 0.114)
    assert abs(grey[1].image[0].numpy() - luma).max() <= 1
    view = partial(attg.images.train_view, after=attg.images.rand_augment((0.5,)))
    data = open_data(labelled["data"], size=32, augment=view, channels=1)
    assert all(data[e, 0].image.shape == (1, 32, 32) for e in range(20))
    assert open_data("toy", "test", channels=1)[0].image.shape == (1, 32, 32)
    assert data.subset(torch.tensor([1]))[0].image.shape == (1, 32, 32)
    with pytest.raises(
        ValueError, match="--in_chans 2: .*RGB, 3 channels, or as grey, 1"
    ):
        open_data("toy", channels=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_unreadable_pictures_are_named(tmp_path, capfd, workers):
    for i in range(60):
        write(tmp_path / f"{i:02d}.png", noise(9, 9, i))
    bad = [f"{tmp_path}/{i:02d}.png" for i in range(0, 60, 2)]
    for file in bad:
        Path(file).write_bytes(b"no picture")
    data = open_data(tmp_path, size=8, augment=True)
    attg.datasets.refuse_unreadable(data)
    for _ in range(2):
        batches = ResumableBatchSampler(60, 6, 0, 20)
        list(make_loader(data, workers=workers, batch_sampler=batches))
    lines = capfd.readouterr().err.splitlines()
    named = [x.split(": ")[1].split(" (")[0] for x in lines if "replaces" in x]
    # Two workers may count at the same moment.
    assert len(set(named)) == len(named) and set(named) < set(bad)
    assert abs(len(named) - 10) <= workers
    assert any("further ones are only counted" in x for x in lines) or workers
    counts = [x for x in lines if "replaces" not in x]
    assert len(counts) <= 2 + workers
    if not workers:
        assert counts == ["unreadable so far: 20 of 60 pictures"]
    assert int(data.unreadable.sum()) == 30
    with pytest.raises(
        ValueError, match=f"30 of 60 pictures are unreadable, over 1 %.*{bad[0]}"
    ):
        attg.datasets.refuse_unreadable(data)


# -- Data sets of one's own ------------------------------------------------------------


class Own:
    """A map-style data set; `reads` counts how often a picture was asked for."""

    def __init__(self, labels, **known):
        self.values, self.reads = labels, 0
        vars(self).update(known)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        self.reads += 1
        return noise(40, 40, i).convert("L" if i % 2 else "RGB"), self.values[i]


def test_own_data_sets(tmp_path):
    own = Own([2, 0, 1, 2, -1])
    train = open_data(own, size=32, augment=True, seed=1)
    assert own.reads == 1 and train.labelled and open_data(own, "test") is None
    assert len(train) == 5 and train[3, 4].image.shape == (3, 32, 32)
    assert train[0].label == 2 and train[4].label == -1
    write(tmp_path / "0.png", noise(40, 40, 0))
    assert train[0].image.equal(open_data(tmp_path, size=32)[0].image)
    assert train.num_classes == 3 and train.labels.tolist() == [2, 0, 1, 2, -1]
    batch = next(iter(make_loader(train, 5, workers=1)))
    assert batch.label.tolist() == [2, 0, 1, 2, -1]
    # What is known ahead is not read.
    own = Own([2, 0], targets=[2, 0], classes=["a", "b", "c", "d"])
    known = open_data({"train": own, "test": Own([None])}, size=32)
    assert (known.num_classes, known.labels.tolist(), own.reads) == (4, [2, 0], 1)
    test = open_data({"train": own, "test": Own([None])}, "test")
    assert not test.labelled and test[0].label == -1
    assert known.fingerprint != open_data(Own([0, 0, 0])).fingerprint
    pair = {"train": Own([0, -1, 1]), "test": Own([1, 0])}
    train, tests = attg.datasets.open_labelled(pair, ["test"], 32)
    assert train.labels.tolist() == [0, 1] and tests["test"].num_classes == 2


def test_wrong_data_sets_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="a generator has no .i. and len"):
        open_data(x for x in [])
    with pytest.raises(ValueError, match="data: the train set is empty"):
        open_data([])
    with pytest.raises(ValueError, match=r"data: has \['a'\].*named 'train'"):
        open_data({"a": Own([1])})
    with pytest.raises(ValueError, match="data: a Tensor instead of a PIL picture"):
        open_data([(torch.zeros(3, 8, 8), 0)])
    with pytest.raises(ValueError, match=r"data: \[0\] is a dict, must be \(PIL pic"):
        open_data([{"image": noise(9, 9), "label": 1}])
    pair = {"train": Own([0]), "test": Own([None])}
    with pytest.raises(ValueError, match="--data of your own: needs labelled"):
        attg.datasets.open_labelled(pair, ["test"], 32)
    big = open_data([(noise(90, 90), 0), (noise(9, 9), 1)], max_pixels=8000)
    assert big[0].index == 1


def test_training_on_a_data_set_of_ones_own(labelled, tmp_path):
    """Pictures from a list give the run that their files give."""
    settings = labelled | {"guidance": "none", "maps": None, "epochs": 1}
    train(tmp_path / "files", **settings)
    pairs = {}
    for split in ("train", "test"):
        files = open_data(labelled["data"], split)
        pairs[split] = [files.read(i) for i in range(len(files))]
    cfg = attg_mae.Config(
        **TINY | settings | {"data": "mine", "out": str(tmp_path / "o")}
    )
    result = attg_mae.train(cfg, pairs)
    assert losses(tmp_path / "o") == losses(tmp_path / "files")
    assert result["knn"] == records(tmp_path / "files", "knn")[-1]["knn"]
    # Other pictures give another.
    pairs["train"] = pairs["train"][::-1]
    attg_mae.train(dataclasses.replace(cfg, resume="none"), pairs)
    assert losses(tmp_path / "o") != losses(tmp_path / "files")
    # A set alone is for training; grey, and too large ones, as in files.
    alone = [(picture, None) for picture, _ in pairs["test"]]
    grey = {"in_chans": 1, "mean": (0.5,), "std": (0.25,), "max_pixels": 48 * 40}
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "grey"), **grey)
    assert attg_mae.train(cfg, alone)["knn"] == {}
    with pytest.raises(ValueError, match="none of the 15 .*above --max_pixels 1919"):
        attg_mae.train(dataclasses.replace(cfg, max_pixels=1919), alone)
    with pytest.raises(ValueError, match="needs a name of its own.*Config.data=NAME."):
        attg_mae.train(dataclasses.replace(cfg, data="toy"), pairs)


def test_one_unreadable_picture_is_never_too_much(tmp_path, capsys):
    for i in range(5):
        write(tmp_path / f"{i}.png", noise(9, 9, i))
    for i in (1, 3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
        data = open_data(tmp_path, size=8)
        assert [sample.index for sample in data][i] == i + 1
        if i == 1:
            attg.datasets.refuse_unreadable(data)
    first = tmp_path / "1.png"
    with pytest.raises(ValueError, match=f"2 of 5 .*unreadable, over 1 %.* {first}"):
        attg.datasets.refuse_unreadable(data)
    assert capsys.readouterr().err.count(f"{first} (") == 2


@pytest.mark.parametrize("bad", [1, 2])
def test_training_goes_on_without_one_picture_of_a_few(bad, tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png", noise(9, 9, i))
    for i in range(bad):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    settings = {"data": str(tmp_path), "guidance": "none", "epochs": 1, "batch_size": 5}
    settings |= {"save_every": 1, "device": "cpu", "out": str(tmp_path / "out")}
    cfg = attg_mae.Config(**TINY | settings)
    if bad == 1:
        assert attg_mae.train(cfg)["step"] == 1
        return
    with pytest.raises(ValueError, match="over 1 % unreadable, 2 so far"):
        attg_mae.train(cfg)


def test_labels_of_pictures_that_cannot_be_read(capsys):
    class Damaged(Own):
        def __getitem__(self, i):
            if i == 1:
                raise OSError("truncated")
            return super().__getitem__(i)

    data = open_data(Damaged([1, 0, 2]))
    assert data.labels.tolist() == [1, -1, 2] and data.num_classes == 3
    assert "data/train/000001 (truncated)" in capsys.readouterr().err


def test_unreadable_pictures_of_all_processes_count(tmp_path, monkeypatch):
    for i in range(300):
        write(tmp_path / f"{i:03d}.png", noise(2, 2))
    data = open_data(tmp_path)
    data.unreadable[[7, 250]] = True
    others = [[7, 9], []]

    def gather(parts, mine):
        parts[:] = [mine, *others]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    attg.datasets.refuse_unreadable(data)
    others[1] = [0]
    with pytest.raises(ValueError, match=f"4 of 300 .* {tmp_path}/000.png"):
        attg.datasets.refuse_unreadable(data)
