"""
Data sets: layouts of folders, samples, unreadable images, fingerprints, labels.
"""

import hashlib
import itertools
import math
import os
import pickle
import shutil
import threading
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset, default_collate, random_split
from torchvision.transforms import v2

import attg.images
import attg.toy
import attg_mae
import eval_knn
from attg.datasets import (
    JUNK,
    TORCHVISION,
    check_unreadable,
    open_data,
    open_labeled,
    shot_indices,
)
from attg.features import knn_accuracy
from attg.files import in_threads
from attg.images import Sample, eval_view, seed_for, train_view
from attg.loader import make_loader
from attg.log import describe_files
from attg.maps import save_maps
from attg.pretraining import fit_size
from tests.fuzz import RANDOM, png, within
from tests.helpers import (
    ROOT,
    SMALL,
    TINY,
    blobs,
    losses,
    noise,
    python,
    records,
    same,
    save_features,
    train,
    write,
)

# -- Layouts ---------------------------------------------------------------------------

AB = "train/a/0 train/b/sub/1 train/b/2"
NAMES = ["a/0", "b/2", "b/sub/1"]
TRAINS = ["bus/0", "new_train/1", "train/2"]
# Images below root/, split, lines of --classes, --data; then the names of the images, None
# if there is no such split, or parts of the error message, separated by |.
LAYOUTS = [
    (AB, "train", None, "root", NAMES),
    (AB, "test", None, "root", None),
    # ImageNet's test/ has no labels.
    (f"{AB} test/a/3 test/b/4 val/a/5 val/b/6", "test", None, "root", ["a/5", "b/6"]),
    (
        f"{AB} test/a/3 test/b/4 valid/a/5 valid/b/6",
        "test",
        None,
        "root",
        ["a/5", "b/6"],
    ),
    (f"{AB} more/a/7 more/b/8", "more", None, "root", ["a/7", "b/8"]),
    (f"{AB} more/val/a/7 more/val/b/8 more/x/9", "more", None, "root", ["a/7", "b/8"]),
    (f"{AB} more/test/a/7 more/test/b/8", "more", None, "root/train", ["a/7", "b/8"]),
    (f"{AB} train/9 train/c/3", "train", "c\n\n a ", "root", ["a/0", "c/3"]),
    (f"{AB} val/b/3 val/d/4", "test", "b", "root", ["b/3"]),
    ("0 1 maps/", "train", None, "root", ["0", "1"]),
    ("0 1", "test", None, "root", None),
    ("train/0 train/1 val/2", "test", None, "root", ["2"]),
    ("train/0 test/1 more/x/2", "train", None, "root", ["0"]),
    ("train/0 bus/1 val/2", "train", None, "root", ["0"]),
    ("train/0 bus/1", "train", None, "root", "--data|is train/ a class|bus/"),
    ("train/x/0 bus/x/1", "train", None, "root", "--data|is train/ a class|bus/"),
    (f"{AB} c/a/7 c/b/8 c/d/9 masks/a/0 masks/b/1", "train", None, "root", NAMES),
    (f"{AB} more/a/7 more/b/8 valid/a/0", "train", None, "root", NAMES),
    ("Training/a/0 Testing/a/1", "train", None, "root", "--data root/Training (|--val"),
    ("extra/0 seg_test2/1 seg_train2/2", "train", None, "root", "root/seg_train2 ("),
    ("a/train/0 a/test_set/1", "train", None, "root", "--data root/a/train (|rename"),
    ("train/bus/0 train/new_train/1 train/train/2", "train", None, "root", TRAINS),
    ("img/0 gtMasks/1", "train", None, "root", "--data root/img (|--masks|move"),
    ("train/images/0 train/labels/x/0", "train", None, "root", "root/train/images ("),
    ("bottles/0 labels/1", "train", None, "root", ["bottles/0", "labels/1"]),
    ("img/0 unlabeled/1", "train", None, "root", ["img/0", "unlabeled/1"]),
    ("0 0_mask 1 1_seg_2", "train", None, "root", "--data|twice|0_mask.png|--masks"),
    ("0 0_mask 1", "train", None, "root", ["0", "0_mask", "1"]),
    # DeepGlobe, LoveDA, CVC-ClinicDB, LEVIR-CD
    ("0_mask 0_sat 1_mask 1_sat", "train", None, "root", "--data|twice|0_mask.png"),
    ("images_png/0 masks_png/0", "train", None, "root", "--data root/images_png ("),
    ("Original/0 Ground-Truth/0", "train", None, "root", "--data root/Original ("),
    ("train/A/0 train/B/0 train/label/0", "train", None, "root", "root/train/A ("),
    (
        "gas_mask/0 gas_station/1_a",
        "train",
        None,
        "root",
        ["gas_mask/0", "gas_station/1_a"],
    ),
    ("a/0 b/1 x/a/0 x/b/1", "train", None, "root", "--data root/x (|move"),
    ("0 1", "train", None, "root/0.png", ["0"]),
    ("0 1", "test", None, "root/0.png", None),
    ("val/a/0", "train", None, "root", "--data root/val ("),
    ("train/ a/0", "train", None, "root", "--data|/train;|must hold"),
    ("0", "train", None, "nowhere", "--data|nowhere|cifar10|.jpg|must hold"),
    (f"{AB} train/c/", "train", None, "root", "--data|['c'] are in one|--classes"),
    (f"{AB} train/9", "train", None, "root", "--data|9.png|a/|--classes"),
    (f"{AB} val/a/3 val/b/4 val/d/5", "test", None, "root", "--data|['d']|--classes"),
    (f"{AB} more/a/3", "more", None, "root", "--data|root/train|['b']|--classes"),
    ("train/0 val/a/1", "test", None, "root", "--data|['a']|/val|must hold"),
    (AB, "only_fg", None, "root", "split 'only_fg' of --data|no such folder"),
    (AB, "train", "a\nzebra", "root", "--classes|['a', 'zebra']; ['zebra']"),
    ("0", "train", "\n", "root", "no images|--classes"),
    ("0", "train", "a", "root/0.png", "--classes|only for a folder"),
    ("", "more", None, "cifar10", "split|--data cifar10: must be train or test"),
]


@pytest.mark.parametrize("files, split, classes, data, expected", LAYOUTS)
def test_layouts(files, split, classes, data, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path("root")
    root.mkdir()
    for name in files.split():
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            write(root / f"{name}.png", noise(4, 4))
    if classes:
        (root / "classes.txt").write_text(classes)
        classes = "root/classes.txt"
    split = "root/more" if split == "more" else split
    if isinstance(expected, str):
        with pytest.raises(ValueError) as error:
            open_data(data, split, 4, classes=classes)
        message = str(error.value)
        assert [part for part in expected.split("|") if part not in message] == []
        return
    opened = open_data(data, split, 4, classes=classes)
    if expected is None:
        assert opened is None
        return
    assert list(opened.names) == [f"{name}.png" for name in expected]
    folders = sorted({name.partition("/")[0] for name in expected if "/" in name})
    labels = [folders.index(x.partition("/")[0]) if folders else -1 for x in expected]
    assert opened.labels.tolist() == [sample.label for sample in opened] == labels
    assert opened.num_classes == len(folders) and opened.labeled == bool(folders)
    classes = f"{len(folders)} classes in " if folders else ""
    assert describe_files(opened).startswith(f"{classes}root")


def test_classes_with_the_same_folders_are_logged(tmp_path, capsys):
    """Office-Home's domains, PlantVillage's variants."""
    for name in ("Art/Bed/0", "Art/Mug/1", "Clipart/Bed/2", "Clipart/Mug/3"):
        write(tmp_path / f"{name}.png", noise(4, 4))
    assert open_data(tmp_path).num_classes == 2
    told = "all of ['Art', 'Clipart'] have the folders ['Bed', 'Mug']; are those"
    assert told in capsys.readouterr().out
    write(tmp_path / "Clipart/Sink/4.png", noise(4, 4))
    for folder in (tmp_path, tmp_path / "Art"):
        open_data(folder)
    assert capsys.readouterr().out == ""


def test_links_are_followed(folder):
    """After the folders of the data set, which keep their own paths."""
    train, before = folder / "train", set(open_data(folder).names)
    write(folder / "more" / "x" / "9.png", noise(40, 40))
    links = {"a/up": "..", "b/root": folder, "a/0link": "sub", "d": folder / "more"}
    links |= {"a/link": folder / "more/x", "b/self": train / "b/self"}
    for path, target in links.items():
        (train / path).symlink_to(target)
    with within(20):
        assert set(open_data(folder).names) - before == {"d/x/9.png"}
    (train / "d").unlink()
    assert set(open_data(folder).names) - before == {"a/link/9.png"}


def test_one_percent_may_be_links_without_a_target(folder):
    (folder / "train" / "b" / "x.jpg").symlink_to("no")
    with pytest.raises(ValueError, match="--data: 1 links .*/b, as x.jpg; fetch"):
        open_data(folder)
    for i in range(4, 100):
        write(folder / "train" / "b" / f"{i}.png", noise(2, 2))
    assert len(open_data(folder)) == 12 + 96


def test_masks_beside_their_images(folder):
    for path in folder.glob("train/*/[013].png"):
        noise(4, 4).save(path.with_suffix(".jpg"))
    with pytest.raises(ValueError, match="--data .*twice, .'a/0.jpg', 'a/0.png'"):
        open_data(folder)


ODD = "a", "b.jpg", "-x", "[1]", "a b", "\udcff", "new\nline", "ä", "x.png", ".hidden"


def test_odd_names_in_the_order_of_image_folder(tmp_path):
    """Hidden names, pipes and devices are no images, nor are folders named as images."""
    for i, (c, *path) in enumerate(itertools.product("ab", ODD, ["", *ODD[:9:2]])):
        folder = tmp_path / c / ODD[i % 9] / "/".join(path)
        folder.mkdir(parents=True, exist_ok=True)
        for j in (i, i + 3, i + 5):
            (folder / f"{ODD[j % 10]}.png").write_bytes(png(1, 1))
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "b" / "device.png").symlink_to("/dev/zero")
    valid = lambda path: os.path.isfile(path) and "/." not in path  # noqa: E731
    peer = torchvision.datasets.ImageFolder(tmp_path, is_valid_file=valid)
    want = [(os.path.relpath(path, tmp_path), c) for path, c in peer.samples]
    with within(20):
        data = open_data(tmp_path, size=8)
    assert list(zip(data.names, data.labels.tolist(), strict=True)) == want
    assert len(want) > 80 and data[9].index == 9


class FakeSet:
    """Any class of torchvision.datasets; its files are missing until downloaded."""

    calls = []

    def __init__(self, root, part, download=False):
        self.calls.append((root, part, download))
        if not download and not (Path(root) / "there").exists():
            raise RuntimeError("Dataset not found. You can use download=True")
        self.labels = [3, -1, -1, 9] if part == "train+unlabeled" else [0, 1, 2, 3]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Image.new("RGB", (8, 8), (0, i, 0)), self.labels[i]


CLASSES = 10, 100, 102, 47, 37, 10, 10, 196


@pytest.mark.parametrize(("name", "classes"), [*zip(TORCHVISION, CLASSES, strict=True)])
def test_torchvision_names(name, classes, tmp_path, monkeypatch):
    kind, _, parts, test_part = TORCHVISION[name]
    monkeypatch.setenv("ATTG_DATA", str(tmp_path))
    offline = Mock(side_effect=urllib.error.URLError("no network"))
    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlopen", offline)
        remedy = f"put .*{kind} .*{tmp_path}, or set ATTG_DATA"
        with pytest.raises(ValueError, match=f"--data {name}: .*{remedy}"):
            open_data(name)

    monkeypatch.setattr(torchvision.datasets, kind, FakeSet)
    monkeypatch.setattr(FakeSet, "calls", [])
    train = open_data(name, size=8, augment=True)
    root = str(tmp_path)
    assert FakeSet.calls == [(root, part, x) for part in parts for x in (False, True)]
    assert len(train) == len(set(train.names)) == 4 * len(parts)
    assert train.num_classes == classes and train[3].image[1, 0, 0] == 3
    (tmp_path / "there").touch()
    train_set, tests = open_labeled(name, ["test"], size=8)
    test = tests["test"]
    assert FakeSet.calls[-1] == (root, test_part, False)
    assert test.fingerprint != train.fingerprint
    assert pickle.loads(pickle.dumps(test))[2].label == 2
    # Most training images of stl10 have no labels.
    labels = [3, 9] if name == "stl10" else [0, 1, 2, 3] * len(parts)
    assert [sample.label for sample in train_set] == labels
    assert train_set.num_classes == classes


# -- Samples ---------------------------------------------------------------------------


def test_sample_is_a_function_of_seed_epoch_and_index(folder):
    def opened(seed=5, augment=True):
        return open_data(folder, size=(24, 16), augment=augment, seed=seed)

    data, plain = opened(), opened(augment=False)
    sample = data[3, 7]
    # Neither global random state nor earlier draws matter.
    torch.manual_seed(99)
    data[0, 1]
    assert same(sample, data[3, 7]) and same(sample, opened()[3, 7])
    for other in (data[4, 7], data[3, 6], opened(seed=6)[3, 7]):
        assert not other.box.equal(sample.box)
    assert (sample.index, sample.label) == (7, 1)
    # Not flipped yet.
    view, box, flip = train_view(data.read(7)[0], (24, 16), seed_for("crop", 5, 3, 7))
    assert sample.image.equal(view) and sample.flip == flip
    assert sample.box.tolist() == pytest.approx(box)
    # For evaluation.
    assert same(data[7], plain[7]) and same(plain[3, 7], plain[7]) and not plain[7].flip
    view = eval_view(data.read(7)[0], (24, 16))[0]
    assert plain[7].image.equal(view)
    batch = default_collate([data[3, i] for i in range(3)])
    assert type(batch) is Sample and batch.flip.dtype == torch.bool
    assert batch.image.shape == (3, 3, 24, 16) and batch.image.dtype == torch.uint8
    assert batch.box.shape == (3, 4) and batch.box.dtype == torch.float32
    with pytest.raises(IndexError):
        data[len(data)]
    with pytest.raises(ValueError, match="--in_chans 2: must be 3 .RGB. or 1 .gray"):
        open_data(folder, channels=2)


def test_subsets(folder):
    data = open_data(folder, size=32, augment=True, seed=4)
    rows = torch.tensor([11, 3, 6])
    part = data.subset(rows).subset(torch.tensor([0, 1, 2]))
    assert list(part.names) == [data.names[i] for i in rows]
    assert part.labels.tolist() == [2, 0, 1] and part.num_classes == 3
    batch = next(iter(make_loader(part, 3, workers=1)))
    assert batch.index.tolist() == [0, 1, 2] and batch.label.equal(part.labels)
    assert batch.image.equal(torch.stack([data[i].image for i in rows.tolist()]))
    assert part.path(0) == data.path(11) and part.fingerprint != data.fingerprint
    assert not part[5, 1].box.equal(part[6, 1].box)
    toys = open_data("toy", "test").subset(torch.tensor([7, 1]))
    assert np.array_equal(toys.masks, attg.toy.toy("test")[1][[7, 1]])
    assert toys.labels.tolist() == [7, 1]


def test_data_sets_of_files_hold_arrays_only(folder):
    """Python objects, one for each image, would be copied into every worker."""
    small = open_data(folder)
    assert same(pickle.loads(pickle.dumps(small))[1], small[1])
    for i in range(400):
        write(folder / "train" / "a" / f"{i}.png", noise(2, 2))
    growth = len(pickle.dumps(open_data(folder))) - len(pickle.dumps(small))
    # Name, label and mark of each of 398 images.
    assert growth < 398 * (4 * len("a/sub/2.png") + 8 + 1) + 500


# -- Unreadable images -----------------------------------------------------------------


def images_and_bad(folder, count, bad):
    for i in range(count):
        write(folder / f"{i:02d}.png", noise(9, 9, i))
    for i in bad:
        (folder / f"{i:02d}.png").write_bytes(b"not an image")


def test_unreadable_images_are_replaced(tmp_path):
    images_and_bad(tmp_path, 6, (1, 2))
    whole = (tmp_path / "05.png").read_bytes()
    (tmp_path / "05.png").write_bytes(whole[: len(whole) // 2])
    data = open_data(tmp_path, size=40, augment=True)
    # They keep their rows.
    assert len(data) == 6 and [data[i].index for i in range(6)] == [0, 3, 3, 3, 4, 0]
    assert same(data[1], data[3]) and same(data[5], data[0])
    assert data[2, 1].index == 3 and not data[2, 1].box.equal(data[2, 3].box)
    images_and_bad(tmp_path, 6, range(6))
    with pytest.raises(ValueError, match=r"--data: none of the 6 .* is /.*/01\.png \("):
        data[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_unreadable_images_are_reported(tmp_path, capfd, workers):
    images_and_bad(tmp_path, 60, range(0, 60, 2))
    data = open_data(tmp_path, size=8, augment=True)
    check_unreadable(data)
    for _ in range(2):
        list(make_loader(data, 6, workers))
    lines = capfd.readouterr().err.splitlines()
    paths = {line.split(": ")[1].split(" (")[0] for line in lines}
    assert paths < {f"{tmp_path}/{i:02d}.png" for i in range(0, 60, 2)}
    # Two workers may count at the same moment.
    assert abs(len(paths) - 10) <= workers and len(paths) == len(lines)
    assert int(data.unreadable.sum()) == 30
    with pytest.raises(ValueError, match="30 of 60 .* over 1 %.*/00.png"):
        check_unreadable(data)


def test_images_of_a_phone_are_not_left_out(tmp_path):
    images_and_bad(tmp_path, 6, ())
    (tmp_path / "02.png").rename(tmp_path / "02.HEIC")
    (tmp_path / "02.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(range(99)))
    data = open_data(tmp_path)
    assert len(data) == 6 and data[2].index == 3 and data.unreadable[2]


@given(RANDOM, st.sampled_from([5, 99, 300]), st.integers(1, 3))
def test_one_percent_may_be_unreadable(rng, number, world):
    """Of all ranks together; a single image always."""
    data = open_data([(noise(2, 2), None)] * number)
    ranks = [rng.sample(range(number), rng.randrange(4)) for _ in range(world)]
    data.unreadable[ranks[0]] = True

    def gather(parts, rows):
        assert rows == sorted(ranks[0])
        parts[:] = ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
        patch.setattr(torch.distributed, "get_world_size", lambda: world)
        patch.setattr(torch.distributed, "all_gather_object", gather)
        bad = sorted(set().union(*ranks))
        if len(bad) <= max(1, number / 100):
            check_unreadable(data)
            return
        message = f"{len(bad)} of {number} .*1 %.*data/train/{bad[0]:06d}"
        with pytest.raises(ValueError, match=message):
            check_unreadable(data)


# -- Fingerprints ----------------------------------------------------------------------


def test_many_files_are_asked_for_at_once():
    """In their order; one by one, the first would wait for the others in vain."""
    together = threading.Barrier(8)

    def answer(i):
        together.wait(10)
        return -i

    assert in_threads(answer, range(160)) == [-i for i in range(160)]
    for rows in (range(0), range(1), range(5, 1500, 2)):
        assert in_threads(str, rows) == list(map(str, rows))


def sha256_of(*strings):
    return hashlib.sha256("\0".join(map(str, strings)).encode()).hexdigest()


def test_older_fingerprints_are_accepted(folder):
    """They are of number, names and sizes."""
    data, toys = open_data(folder), open_data("toy", "test")
    names = list(data.names)
    sizes = [(folder / "train" / name).stat().st_size for name in names]
    v2 = sha256_of("v2", 12, *names, *sizes)
    names_only = sha256_of(12, *names)
    v1 = sha256_of(names_only, *sizes)
    stored = "v2:" + v2, v1, v2, names_only, "v2:" + v1, "v3:" + v2, "v3:", ""
    assert [data.matches(x) for x in stored] == [True] * 2 + [False] * 6
    toy_names = sha256_of(2000, *toys.names)
    assert toys.matches(toy_names) and toys.matches(toys.fingerprint)
    file = folder / "train" / "a" / "0.png"
    file.write_bytes(file.read_bytes() + b"x")
    assert not any(open_data(folder).matches(x) for x in stored)


def test_fingerprint_is_of_names_sizes_and_contents(folder, tmp_path, monkeypatch):
    file = folder / "train" / "a" / "0.png"
    content, stored = file.read_bytes(), open_data(folder).fingerprint
    assert open_data(folder, size=64, augment=True).matches(stored)
    monkeypatch.chdir(folder.parent)
    shutil.copytree(folder.name, "moved")
    assert open_data("moved").matches(stored)
    for change in (content + b"x", content[:-9] + bytes(9), None):
        if change is None:
            file.rename(file.with_name("00.png"))
        else:
            file.write_bytes(change)
        assert not open_data(folder).matches(stored)
        file.write_bytes(content)
        file.with_name("00.png").unlink(missing_ok=True)
        assert open_data(folder).matches(stored)


def test_large_data_sets_are_sampled(folder, monkeypatch):
    """One of n // 1000 files is read; --verify full reads all."""
    monkeypatch.setattr(attg.images, "MAX_VERIFIED", 11)
    monkeypatch.setattr(attg.images, "SAMPLE", 4)
    file = folder / "train" / "a" / "1.png"
    content = file.read_bytes()
    stored = [open_data(folder, verify=full).fingerprint for full in (False, True)]
    file.write_bytes(content[:-9] + bytes(9))
    for full in (False, True):
        data = open_data(folder, verify=full)
        assert [data.matches(x) for x in stored] == [True, not full]
    file.write_bytes(content)
    first = folder / "train" / "a" / "0.png"
    first.write_bytes(first.read_bytes()[:-9] + bytes(9))
    assert not open_data(folder).matches(stored[0])


# -- Labels ----------------------------------------------------------------------------


def test_few_shots():
    labels = torch.randint(4, (200,))
    counts = labels.bincount().tolist()
    wanted = {1: [1] * 4, 5: [5] * 4, 0.1: [round(n / 10) for n in counts]}
    # At least one; and all, if there are fewer.
    wanted |= {1e-9: [1] * 4, 500: counts, 0.9999: counts}
    one = set(shot_indices(labels, 1, 3).tolist())
    for shots, want in wanted.items():
        chosen = shot_indices(labels, shots, 3)
        assert labels[chosen].bincount().tolist() == want
        assert one <= set(chosen.tolist()) and len(chosen.unique()) == sum(want)
    assert not chosen.equal(shot_indices(labels, 0.9999, 4))
    unlabeled = torch.cat([labels, torch.tensor([-1, -1])])
    assert chosen.equal(shot_indices(unlabeled, 0.9999, 3))
    with pytest.raises(ValueError, match="--shots 5: class 1 has no images"):
        shot_indices(labels[labels != 1], 5, 0)


class Own:
    """A map-style data set; `reads` counts how often an image was asked for."""

    def __init__(self, labels, **attributes):
        self.values, self.reads = labels, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        self.reads += 1
        if self.values[i] == "bad":
            raise OSError("truncated")
        return noise(40, 40, i).convert("L" if i % 2 else "RGB"), self.values[i]


def test_reading_in_a_fork_does_not_wait_for_threads():
    """As it would for OpenMP's, after a parallel loop of this process."""
    code = """
import torch
from attg.files import in_fork
torch.set_num_threads(2)
x = torch.randn(8, 3, 512, 512)
mean = lambda: torch.nn.functional.interpolate(x, 300, mode="bicubic").mean().item()
print(abs(mean() - in_fork(mean)) < 1e-5)
"""
    done = python("-c", code, cwd=ROOT, timeout=100)
    assert done.stdout == "True\n", done.stderr


def test_data_sets_from_python(tmp_path, capfd):
    own = Own([2, 0, 1, "bad", -1])
    data = open_data(own, size=32, augment=True, seed=1)
    # This process opens no files that loader workers would come to share.
    assert data.labeled and fit_size(data) == (32, 4) and data.labels.max() == 2
    assert own.reads == 0 and open_data(own, "test") is None
    assert len(data) == 5 and data[3, 4].image.shape == (3, 32, 32)
    write(tmp_path / "0.png", noise(40, 40, 0))
    assert data[0].image.equal(open_data(tmp_path, size=32)[0].image)
    assert data.num_classes == 3 and data.labels.tolist() == [2, 0, 1, -1, -1]
    assert "data/train/000003 (truncated)" in capfd.readouterr().err
    batch = next(iter(make_loader(data, 5, workers=1)))
    assert batch.label.tolist() == [2, 0, 1, -1, -1] and batch.index[3] == 4
    # Attributes spare reading.
    own = Own([2, 0], targets=[2, None], classes=["a", "b", "c", "d"])
    pair = {"train": own, "test": Own([None])}
    known, test = (open_data(pair, split, size=32) for split in pair)
    assert (known.num_classes, known.labels.tolist()) == (4, [2, -1]) and known.labeled
    assert own.reads == 0 and not test.labeled and test[0].label == -1
    assert known.fingerprint != open_data(Own([0, 0, 0])).fingerprint
    assert open_data(Own(["bad", 3])).num_classes == 4
    # Another random split, another order; earlier fingerprints are of the number alone.
    for one, alike, other in (
        (
            open_data(random_split(Own([0] * 9), [6, 3], torch.manual_seed(seed))[0])
            for seed in (0, 0, 1)
        ),
        (open_data(Own(x, targets=x)) for x in ([0, 1, 1], [0, 1, 1], [1, 1, 0])),
    ):
        assert one.matches(alike.fingerprint) and not one.matches(other.fingerprint)
        assert one.matches(other.fingerprint.rpartition(":")[0])
    image = noise(8, 8)
    for item, message in (
        ((torch.zeros(3, 8, 8), 0), "Tensor, items must be .PIL image, label"),
        (("a", 0), "str, items must be .PIL image, label"),
        ((image, 0.7), "label 0.7 is not a whole number"),
        ((image, "7"), "label '7' is not a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data([item])[0]
    with pytest.raises(ValueError, match="label .*0.5.* is not a whole"):
        open_data(Own([0, 1], targets=np.float32([0, 0.5])))
    for seven in (np.float64(7), np.array([7]), torch.tensor(7)):
        assert open_data([(image, seven)])[0].label == 7


def test_training_on_a_data_set_from_python(labelled, tmp_path):
    """Images from a list give the run that their files give."""
    settings = labelled | {"guidance": "none", "maps": None, "epochs": 1}
    train(tmp_path / "files", **settings)
    pairs = {}
    for split in ("train", "test"):
        files = open_data(labelled["data"], split)
        pairs[split] = [files.read(i) for i in range(len(files))]
    settings |= TINY | {"epochs": 1, "data": "mine", "out": str(tmp_path / "list")}
    result = attg_mae.train(attg_mae.Config(**settings), pairs)
    assert losses(tmp_path / "list") == losses(tmp_path / "files")
    assert result["knn"] == records(tmp_path / "files", "knn")[-1]["knn"]
    # Evaluations would take the checkpoint's data for these.
    for name in ("toy", "cifar10", labelled["data"]):
        with pytest.raises(ValueError, match=f"other than {name}: --data NAME"):
            attg_mae.train(attg_mae.Config(**settings | {"data": name}), pairs)
    # A training set alone, without labels, in gray.
    settings |= {"in_chans": 1, "mean": (0.5,), "std": (0.25,), "resume": "none"}
    alone = [(image, None) for image, _ in pairs["test"]]
    assert attg_mae.train(attg_mae.Config(**settings), alone)["knn"] == {}
    # Maps of whole images do not fit random crops of them.
    maps = np.random.default_rng(0).random((15, 2, 2))
    save_maps(tmp_path / "m.npy", maps, open_data(alone), "random")
    settings |= {"maps": str(tmp_path / "m.npy"), "guidance": "attg"}

    class Flipped(list):
        read_here = []

        def __getitem__(self, i):
            self.read_here.append(i)
            return v2.RandomHorizontalFlip()(alone[i][0]), None

    with pytest.raises(ValueError, match="data: images change .* transforms"):
        attg_mae.train(attg_mae.Config(**settings | {"workers": 1}), Flipped(alone))
    # Files that are opened in the main process would be shared by all workers.
    assert Flipped.read_here == []
    assert attg_mae.train(attg_mae.Config(**settings), alone)["step"] > 0


def test_evaluations_need_labels(folder):
    val = str(folder / "val")
    train_set, tests = open_labeled(folder / "train", [val], 32)
    assert len(train_set) == 12 and len(tests[val]) == 3
    # Rows without a label count neither for nor against, in any order.
    pair = {"train": Own([-1, 0, 1], targets=[-1, 0, 1]), "test": Own([1, None, 0])}
    train_set, tests = open_labeled(pair, ["test"], 32)
    assert train_set.labels.tolist() == [0, 1] == tests["test"].labels.tolist()[::-1]
    for odd in ("bad", "1", math.nan):  # not left out as if they had no label
        with pytest.raises(ValueError, match="--data: 2 of 4 images are unreadable"):
            open_labeled(pair | {"test": Own([1, odd, 0, odd])}, ["test"], 32)
    pair["test"] = Own([1, 2])
    with pytest.raises(ValueError, match="data: label 2 in test .* count both from 0"):
        open_labeled(pair, ["test"], 32)
    copy = shutil.copytree(folder / "train", folder / "copy")
    files = sorted(copy.rglob("*.png"))
    for again, changed in ((folder / "train", 0), (copy, 0), (copy, 5), (copy, 11)):
        for path in files[:changed]:  # of the same name and size
            path.write_bytes(path.read_bytes()[:-9] + bytes(9))
        message = f"--val {again}: {12 - changed} of 12 are training .*; remove"
        with pytest.raises(ValueError, match=message):
            open_labeled(folder, [str(again)], 32)
    write(files[11], noise(50, 40, 9))
    assert len(open_labeled(folder, [str(copy)], 32)[1][str(copy)]) == 12
    unlabeled = {"train": Own([0]), "test": Own([None, -1], targets=[None, -1])}
    # ImageNet's val/ as it is unpacked.
    for c in "abc":
        (folder / "val" / c / "0.png").rename(folder / "val" / f"{c}.png")
        (folder / "val" / c).rmdir()
    assert list(open_data(folder, "test").names) == ["a.png", "b.png", "c.png"]
    for data in (folder, folder / "train", unlabeled, {"train": Own([0])}):
        with pytest.raises(
            ValueError, match="--data .*needs labels in test; sort.*--val"
        ):
            open_labeled(data, ["test"], 32)


def test_classes_are_compared_by_name():
    train, test = (Own([0, 1], classes=list(names)) for names in ("abc", "ac"))
    few = Subset(Subset(train, [0, 1]), [0, 1])
    for one, two in ((train, test), (few, test), (train, Subset(test, [0]))):
        with pytest.raises(ValueError, match="classes of test and training.*'b'.*same"):
            open_labeled({"train": one, "test": two}, ["test"], 32)
    test.classes = ("a", "b", "c")
    train_set, _ = open_labeled({"train": train, "test": test}, ["test"], 32)
    assert train_set.num_classes == 3


@pytest.mark.parametrize("junk", [*sorted(JUNK), ".hidden"])
def test_what_systems_leave_behind_is_no_image(folder, junk):
    before = list(open_data(folder).names)
    for place in ("", "train", "train/a", "train/a/sub"):
        write(folder / place / junk / "9.png", noise(4, 4))
        (folder / place / "._0.jpg").write_bytes(b"Finder's")
    assert list(open_data(folder).names) == before
    for suffix in (".jfif", ".GIF"):
        noise(4, 4).save(folder / "train" / "a" / f"9{suffix}", format="png")
    assert set(open_data(folder).names) - {"a/9.jfif", "a/9.GIF"} == set(before)


def test_images_without_labels_are_not_in_the_bank():
    """k-NN during training: unlabeled images are the queries themselves."""
    images = [Image.new("RGB", (32, 32), (x, 255 - x, 9)) for x in range(128)]
    labels = [int(x > 63) ^ int(x % 5 == 0) for x in range(128)]
    known = list(zip(images, labels, strict=True))
    pairs = {"train": known[::2] * 2 + [(x, None) for x in images[1::2]]}
    pairs["test"] = [(x, y) for x, (_, y) in zip(images[1::2], known[::2], strict=True)]
    mixed, test = (open_data(pairs, split, 32) for split in ("train", "test"))
    model = attg_mae.MAE(attg_mae.Config(**SMALL)).eval()
    got, want = (
        knn_accuracy(model, bank, test, None, 0, 1, batch_size=16)
        for bank in (mixed, open_data(known[::2] * 2, "train", 32))
    )
    assert got == want and all(50 < top1 < 100 for top1 in got.values())
    # Labels of -1 and 1 leave one class.
    one = [(image, label or -1) for image, label in known]
    bank, test = (open_data({"train": one, "test": one}, x, 32) for x in pairs)
    assert knn_accuracy(model, bank, test, None, 0, 1, batch_size=16) == {}


def test_features_without_labels_are_not_in_the_bank(tmp_path):
    """eval_knn.py --features gives the results of a file that never had them."""
    x, labels = blobs(90, 3, spread=0.5)
    queries, truth = blobs(60, 3, spread=0.5, seed=7)
    # Each unlabeled one is the nearest neighbor of a query.
    mixed = torch.cat([1.001 * queries, x])
    unknown = torch.cat([torch.full((60,), -1), labels])
    results = []
    for bank, known in ((x, labels), (mixed, unknown)):
        file = str(tmp_path / f"{len(bank)}.pt")
        save_features(file, bank, known, queries, truth)
        results.append(eval_knn.main(["--features", file, "--k", "3", "20"]))
    assert results[0] == results[1] and 40 < results[0][0]["top-1"] < 100
