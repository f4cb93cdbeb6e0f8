"""
Map files: written, read, refused; the quality of maps.
"""

import hashlib
import json
import math
import os
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import attg.datasets
import attg.distributed
import attg.features
import attg.map_quality
import attg.maps
import attg.toy
import object_discovery
from attg.datasets import open_data
from attg.loader import make_loader
from attg.maps import load_maps, save_maps
from tests.fuzz import damaged_maps, png, within
from tests.helpers import noise, write


@pytest.fixture
def flat(tmp_path):
    for i in range(5):
        write(tmp_path / "pictures" / f"{i}.png", noise(40, 40, i))
    return open_data(tmp_path / "pictures")


def some_maps(n=5):
    return np.random.default_rng(1).normal(3, 2, (n, 7, 9))


@pytest.mark.parametrize(
    "layout",
    [np.ascontiguousarray, np.asfortranarray, lambda a: np.broadcast_to(a[1], a.shape)],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_maps_round_trip(flat, tmp_path, dtype, layout, monkeypatch):
    source = layout(some_maps().astype(dtype))
    keep = source.copy()
    monkeypatch.setattr(attg.maps.chunks, "__defaults__", (130,))  # two maps a chunk
    save_maps(
        tmp_path / "new" / "maps.npy",
        source,
        flat,
        "tokencut",
        backbone="dino",
        tau=0.2,
    )
    maps, manifest = load_maps(str(tmp_path / "new" / "maps.npy"), flat)
    assert isinstance(maps, np.memmap)
    assert maps.dtype == np.float16
    assert np.array_equal(source, keep)
    s = source.astype(np.float64)
    low, high = s.min((1, 2), keepdims=True), s.max((1, 2), keepdims=True)
    np.testing.assert_allclose(maps, (s - low) / (high - low), atol=5e-4)
    assert maps.min((1, 2)).tolist() == [0] * 5 and maps.max((1, 2)).tolist() == [1] * 5
    assert manifest["settings"] == {"backbone": "dino", "tau": 0.2}
    assert manifest["method"] == "tokencut"
    assert (
        manifest["number"],
        manifest["shape"],
        manifest["flat"],
        manifest["failed"],
    ) == (5, [5, 7, 9], [], [])
    assert manifest["fingerprint"] == flat.fingerprint
    assert (
        manifest["checksum"]
        == hashlib.sha256((tmp_path / "new" / "maps.npy").read_bytes()).hexdigest()
    )
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "maps.json",
        "maps.npy",
    ]
    batch = next(iter(make_loader(flat, 3)))
    assert np.array_equal(maps[batch.index.numpy()], maps[:3])


def test_flat_and_failed_maps_become_zeros(flat, tmp_path, monkeypatch):
    # One map a chunk: indices must not restart
    monkeypatch.setattr(attg.maps.chunks, "__defaults__", (63,))
    source = some_maps()
    source[0] = 5
    # Noise below the rule
    source[1] = 1 + 1e-7 * np.random.default_rng(0).random((7, 9))
    source[2, 3, 3] = np.nan
    source[3, 0, 0] = np.inf
    source[4] = 1
    # Just above the rule: a map
    source[4, 2, 2] = 1 + 3e-5
    save_maps(tmp_path / "m.npy", source, flat, "x")
    maps, manifest = load_maps(tmp_path / "m.npy", flat)
    assert (manifest["flat"], manifest["failed"]) == ([0, 1], [2, 3])
    assert not maps[:4].any() and maps[4].sum() == 1 == maps[4, 2, 2]


def test_save_maps_errors(flat, tmp_path):
    for path, maps in [
        ("m.npy", some_maps(4)),
        ("m.npy", some_maps()[0]),
        ("m.pt", some_maps()),
    ]:
        with pytest.raises(
            ValueError,
            match=r"map file .*m\.(npy|pt): needs a name .* maps \(5, h, w\)",
        ):
            save_maps(tmp_path / path, maps, flat, "x")
    save_maps(tmp_path / "m.npy", some_maps(), flat, "x")
    # A crash on the way leaves the old files whole
    with pytest.raises(TypeError):
        save_maps(tmp_path / "m.npy", some_maps() ** 2, flat, "x", bad=object())
    load_maps(tmp_path / "m.npy", flat)
    assert not list(tmp_path.glob("*.tmp"))


def break_maps(path, how):
    """Damages the map file; returns what the error must say."""
    maps = np.load(path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    if how == "no npy":
        path.unlink()
        return "no such .npy file; give the NAME.npy"
    if how == "no json":
        path.with_suffix(".json").unlink()
        return "the manifest m.json is missing; keep it beside the .npy"
    if how == "bad json":
        path.with_suffix(".json").write_text("{")
        return "the manifest m.json is damaged .*; make the maps again"
    if how == "empty json":
        path.with_suffix(".json").write_text("{}")
        return "the manifest m.json is damaged .*method is missing"
    if how == "foreign":
        path.with_suffix(".json").write_text(
            json.dumps(manifest | {"fingerprint": "f" * 64})
        )
        return (
            r"made for other data \(5 pictures, fingerprint ffffffffffff, "
            "but --data has 5, .*; use the --data"
        )
    if how == "number":
        path.with_suffix(".json").write_text(json.dumps(manifest | {"number": 4}))
        return r"made for other data \(4 pictures.*--data has 5"
    if how == "length":
        np.save(path, maps[:4])
        return r"holds float16 \(4, 7, 9\), must be float16 \(5, h, w\)"
    if how == "dtype":
        np.save(path, maps.astype(np.float32))
        return r"holds float32 \(5, 7, 9\), must be float16"
    if how == "ndim":
        np.save(path, maps.reshape(5, -1))
        return r"holds float16 \(5, 63\)"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
        return "truncated or not a .npy file"
    if how == "not npy":
        path.write_bytes(b"hello")
        return "truncated or not a .npy file"
    if how == "empty":
        path.write_bytes(b"")
        return "truncated or not a .npy file"
    if how == "longer":
        path.write_bytes(path.read_bytes() + b"xx")
        return "does not match the checksum"
    if how in ("nan", "range", "negative"):
        maps[3, 0, 0], maps[2, 2, 2] = {
            "nan": (np.nan, np.inf),
            "range": (1.5, 2),
            "negative": (-0.1, -1),
        }[how]
        np.save(path, maps)
        return r"NaN, inf or values outside \[0, 1\] in 2 of 5 maps, the first is number 2; make"
    maps[2, 2, 2] = 0.123  # tampered
    np.save(path, maps)
    return "does not match the checksum in its manifest; make the maps again"


@pytest.mark.parametrize(
    "how",
    [
        "no npy",
        "no json",
        "bad json",
        "empty json",
        "foreign",
        "number",
        "length",
        "dtype",
        "ndim",
        "truncated",
        "not npy",
        "empty",
        "longer",
        "nan",
        "range",
        "negative",
        "tampered",
    ],
)
def test_broken_map_files_are_refused(flat, tmp_path, how, monkeypatch):
    monkeypatch.setattr(attg.maps.chunks, "__defaults__", (130,))
    save_maps(tmp_path / "m.npy", some_maps(), flat, "x")
    load_maps(tmp_path / "m.npy", flat)
    what = break_maps(tmp_path / "m.npy", how)
    with pytest.raises(ValueError, match=r"--maps .*m\.npy: " + what):
        load_maps(tmp_path / "m.npy", flat)


def test_maps_of_another_folder_are_refused(flat, tmp_path):
    save_maps(tmp_path / "m.npy", some_maps(), flat, "x")
    write(tmp_path / "pictures" / "9.png", noise(40, 40))
    with pytest.raises(
        ValueError, match="--maps .*made for other data .5 pictures.*--data has 6"
    ):
        load_maps(tmp_path / "m.npy", open_data(tmp_path / "pictures"))


def test_quality_by_hand():
    metrics = pytest.importorskip("sklearn.metrics")
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    exact = mask.reshape(4, 2, 4, 2).mean((1, 3))  # on a grid of 4 x 4
    far = np.zeros((4, 4))
    far[3, 3] = 1
    noise = np.random.default_rng(0).random((8, 8))
    good, bad, same = (
        object_discovery.quality([m], [mask]) for m in (exact, far, noise)
    )
    assert good["AUROC"] == good["CorLoc"] == 100
    assert good["IoU"] > 70
    assert good["images"] == 1
    assert bad["IoU"] < 10 and bad["CorLoc"] == 0 and bad["AUROC"] < 50
    assert object_discovery.quality([mask], [mask]) == {
        "IoU": 100,
        "CorLoc": 100,
        "AUROC": 100,
        "images": 1,
    }
    flat = mask.ravel()
    auc = metrics.roc_auc_score(flat, noise.ravel())
    assert math.isclose(same["AUROC"], 100 * auc, rel_tol=1e-6)
    tied = (noise > 0.4) + (noise > 0.7) * 1.0
    assert math.isclose(
        object_discovery.quality([tied], [mask])["AUROC"],
        100 * metrics.roc_auc_score(flat, tied.ravel()),
    )
    assert math.isclose(
        same["IoU"], 100 * metrics.jaccard_score(flat, (noise > noise.mean()).ravel())
    )
    m = np.float32([[0, 0.9, 0, 0.8], [0.9, 1, 0, 0.8], [0, 0, 0, 0.8]])  # two parts
    assert attg.map_quality.part_of_maximum(m).tolist() == [
        [0, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    assert not attg.map_quality.part_of_maximum(np.ones((2, 3))).any()
    assert attg.map_quality.box(attg.map_quality.part_of_maximum(m)).tolist() == [
        [0, 0],
        [2, 2],
    ]
    both = object_discovery.quality(
        [exact, far, far, far], [mask, mask, None, ~mask & mask]
    )
    assert both["images"] == 2 and both["CorLoc"] == 50
    with pytest.raises(ValueError, match="--masks"):
        object_discovery.quality([far], [None])


def test_masks_of_any_depth(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert (
        abs(
            np.asarray(object_discovery.read_mask(tmp_path, "a.jpg"), float)
            - ramp / 257
        ).max()
        <= 1
    )
    Image.fromarray(np.uint8(ramp > 30000)).save(tmp_path / "b.png")
    assert (
        np.asarray(object_discovery.read_mask(tmp_path, "b.jpg"))
        == 255 * (ramp > 30000)
    ).all()


def test_older_map_files_are_taken_with_a_warning(flat, tmp_path):
    """Their fingerprint knows number and names of the pictures, not the sizes."""
    save_maps(tmp_path / "m.npy", some_maps(), flat, "x")
    manifest = json.loads((tmp_path / "m.json").read_text())
    names = "\0".join([str(len(flat)), *flat.names])
    old = manifest | {"fingerprint": hashlib.sha256(names.encode()).hexdigest()}
    (tmp_path / "m.json").write_text(json.dumps(old))
    with pytest.warns(UserWarning, match=r"m\.npy: an older file.*sizes.*not checked"):
        maps = load_maps(tmp_path / "m.npy", flat)[0]
    assert maps.shape == (5, 7, 9)
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_maps(tmp_path / "m.npy", flat)
        # Data sets without files have no sizes that could be missing.
        toys = open_data("toy", "test")
        save_maps(tmp_path / "t.npy", np.zeros((2000, 2, 2)), toys, "x")
        load_maps(tmp_path / "t.npy", toys)


def test_maps_of_other_pictures_of_the_same_names_are_refused(flat, tmp_path):
    save_maps(tmp_path / "m.npy", some_maps(), flat, "x")
    with open(tmp_path / "pictures" / "3.png", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="--maps .*made for other data .5 .*sizes of"):
        load_maps(tmp_path / "m.npy", open_data(tmp_path / "pictures"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": None}, "method is missing or not a str"),
        ({"number": True}, "number is missing or not a int"),
        ({"flat": [5]}, "flat names a row that is none of 5"),
        ({"failed": [-1]}, "failed names a row"),
        ({"failed": ["1"]}, "failed is not a list of numbers"),
        ({"settings": {"large": 3}}, "large is not a list of numbers"),
        ({"shape": [5, 9, 7]}, r"holds \(5, 7, 9\), its manifest says \[5, 9, 7\]"),
    ],
)
def test_wrong_manifests(flat, tmp_path, change, words):
    save_maps(tmp_path / "m.npy", some_maps(), flat, "x")
    manifest = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=rf"--maps .*m\.npy: .*{words}.*; make the"):
        load_maps(tmp_path / "m.npy", flat)


def test_damaged_map_files(flat, tmp_path, fuzz, capsys):
    """They load as they were or not at all, with an error that names the file."""
    whole = tmp_path / "whole.npy"
    save_maps(whole, some_maps(), flat, "tokencut", large=[1, 3], cut=0.2)
    want = np.load(whole)
    files = {x: whole.with_suffix(x).read_bytes() for x in (".npy", ".json")}
    path, refused = tmp_path / "m.npy", {}
    for seed in range(fuzz):
        for suffix, content in files.items():
            path.with_suffix(suffix).write_bytes(content)
        kind = damaged_maps(path, random.Random(seed))
        refused.setdefault(kind, [])
        try:
            with within(20), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                maps = object_discovery.read_maps(path, "--maps", flat)[0]
        except ValueError as error:
            assert f"--maps {path}: " in str(error), seed
            refused[kind].append(True)
        else:
            assert np.array_equal(maps, want), seed
            refused[kind].append(False)
    assert all(
        refused["npy"] + refused["header"] + refused["archive"] + refused["text"]
    )
    # Not every value of the manifest matters.
    assert np.mean(refused["json"]) > 0.5 and np.mean(refused["key"]) > 0.5


def test_power_cuts_in_a_job(flat, tmp_path, monkeypatch, capsys):
    """Rows of finished blocks that never reached the disk are made again."""

    def maps(imgs):
        if len(called) == stop:
            raise KeyboardInterrupt
        called.append(len(imgs))
        return imgs[:, 0, ::8, ::8].float()

    whole = object_discovery.Whole(flat, (32, 32))
    job = {"method": "x"}, 1, 0, torch.device("cpu"), 0, 1
    stop, called = None, []
    object_discovery.discover(maps, whole, (4, 4), tmp_path / "whole.npy", *job)
    assert len(called) == 5

    stop, called = 4, []
    with pytest.raises(KeyboardInterrupt):
        object_discovery.discover(maps, whole, (4, 4), tmp_path / "m.npy", *job)
    files = object_discovery.JobFiles(tmp_path / "m.npy")
    assert sorted(files.finished()) == [0, 1, 2, 3]
    content = bytearray(files.part.read_bytes())
    # Of the second block nothing was written, of the third a part.
    content[32:64] = bytes(32)
    content[90:96] = bytes(6)
    files.part.write_bytes(content)
    with open(files.log(0), "a") as file:
        # Lines of older versions, of blocks that there are not, and torn ones.
        file.write("\n4;\n17 00000000;\n3 0000")
    with open(files.log(1), "wb") as file:
        file.write(bytes(range(256)))
    stop, called = None, []
    object_discovery.discover(maps, whole, (4, 4), tmp_path / "m.npy", *job)
    assert called == [1, 1, 1]
    assert "going on: 2 of 5 blocks are there" in capsys.readouterr().out
    for suffix in (".npy", ".json"):
        made = (tmp_path / "m").with_suffix(suffix).read_bytes()
        assert made == (tmp_path / "whole").with_suffix(suffix).read_bytes()
    assert sorted(x.name for x in tmp_path.glob("m*")) == ["m.json", "m.npy"]


def test_damaged_settings_of_a_job(flat, tmp_path):
    whole = object_discovery.Whole(flat, (32, 32))
    files = object_discovery.JobFiles(tmp_path / "m.npy")
    files.part.write_bytes(bytes(5 * 2 * 16))
    files.log(0).write_text("0 00000000;\n")
    for text in ("{", "[]", "null", '{"method": "y"}'):
        files.about.write_text(text)
        with pytest.raises(ValueError, match="--out .*unfinished job.*delete m.npy.pa"):
            job = {"method": "x"}, 1, 0, torch.device("cpu"), 0, 1
            object_discovery.discover(None, whole, (4, 4), files.path, *job)


def test_masks_that_are_pipes_or_huge(flat, tmp_path):
    (tmp_path / "masks").mkdir()
    os.mkfifo(tmp_path / "masks" / "0.png")
    (tmp_path / "masks" / "1.png").write_bytes(png(10**5, 10**4, row=b"", rows=1))
    with within(10):
        found = list(attg.map_quality.true_masks(flat, tmp_path / "masks", range(3)))
    assert found == [None] * 3
