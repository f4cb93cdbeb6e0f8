"""
Map files: written, read, refused. The quality of maps. The job that makes them.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

import attg.maps
import object_discovery
from attg.datasets import open_data
from attg.map_job import SquashedImages, run_job
from attg.map_quality import ground_truth_masks, peak_component, quality
from attg.maps import load_maps, open_maps, save_maps
from attg.masks import MaskFolder
from tests.fuzz import RANDOM, damage, png, within
from tests.helpers import make_images, noise, write
from tests.processes import Process, command, ranks

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A flat data set of 5 images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        write(folder / f"{i}.png", noise(40, 40, i))
    return open_data(folder)


def some_maps(n=5):
    return np.random.default_rng(1).normal(3, 2, (n, 7, 9))


# -- Files -----------------------------------------------------------------------------


class Lazy:
    """An array without len(), such as zarr's."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __getitem__(self, rows):
        return self.array[rows]


@given(
    st.sampled_from([np.float16, np.float32, np.float64, np.int32]),
    st.permutations(["", "flat", "nan", "inf", "masked"]),
    st.tuples(st.integers(1, 9), st.integers(2, 9)),
    st.integers(1, 200),
)
def test_maps_round_trip(images, tmp_path, dtype, kinds, shape, values):
    maps = np.random.default_rng(0).normal(300, 200, (5, *shape))
    masked = np.zeros(maps.shape, bool)
    for m, mask, kind in zip(maps, masked, kinds, strict=True):
        if kind == "flat":
            m[:] = 5
        elif kind == "masked":
            mask[0, 1] = True
        elif kind and dtype is not np.int32:
            m[0, 1] = float(kind)
    maps = maps.astype(dtype)[:, ::-1]
    before, file = maps.copy(), tmp_path / "new" / "maps.npy"
    array = Lazy(np.ma.array(maps, mask=masked[:, ::-1]))
    with pytest.MonkeyPatch.context() as patch:
        # So many values a chunk: the rows must not restart in each.
        patch.setattr(attg.maps, "CHUNK", values)
        save_maps(file, array, images, "tokencut", backbone="dino", tau=0.2)
    loaded, manifest = load_maps(str(file), images)
    assert np.array_equal(maps, before, equal_nan=dtype is not np.int32)
    assert isinstance(loaded, np.memmap) and loaded.dtype == np.float16
    flat, failed = [], []
    for i, (m, got) in enumerate(zip(maps.astype(float), loaded, strict=True)):
        if not np.isfinite(m).all() or masked[i].any():
            failed.append(i)
        elif m.max() - m.min() <= 1e-5 * abs(m).max():
            flat.append(i)
        else:
            want = (m - m.min()) / (m.max() - m.min())
            assert np.abs(got - want).max() < 5e-4 and (got.min(), got.max()) == (0, 1)
            continue
        assert not got.any()
    assert (manifest["flat"], manifest["failed"]) == (flat, failed)
    assert manifest["settings"] == {"backbone": "dino", "tau": 0.2}
    assert manifest["method"] == "tokencut" and manifest["version"] == 2
    assert sorted(p.name for p in file.parent.iterdir()) == ["maps.json", "maps.npy"]


def test_save_maps_errors(images, tmp_path):
    path = tmp_path / "m.npy"
    for file, maps in (
        (path, some_maps(4)),
        (path, some_maps()[0]),
        (tmp_path, some_maps()),
    ):
        with pytest.raises(ValueError, match=rf"{file}: .* \.npy .*\(5, h, w\)"):
            save_maps(file, maps, images, "x")
    save_maps(path, some_maps(), images, "x")
    before = path.read_bytes()
    # Both leave the old files as they were; JSON cannot hold the second's settings.
    with pytest.raises(ValueError, match="none of 5 maps is finite"):
        save_maps(path, some_maps() * np.nan, images, "x")
    with pytest.raises(TypeError):
        save_maps(path, some_maps() ** 2, images, "x", bad=object())
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_training_counts_maps_without_effect(images, tmp_path, capsys):
    maps, path = some_maps(), tmp_path / "m.npy"
    maps[0], maps[1:3, 0, 0] = 5, np.nan
    save_maps(path, maps, images, "x")
    checksum = open_maps(path, images, "x")[1]
    assert checksum == attg.maps.sha256(path)
    assert f"--maps {path}: 1 flat and 2 failed of 5" in capsys.readouterr().out


@given(st.integers(1, 7), st.integers(1, 7), st.floats(0.0, 0.5), seeds)
def test_inverted_maps_are_logged(images, tmp_path, top, left, background, seed):
    """Objects touch no edge."""
    maps, lines = background * np.random.default_rng(seed).random((5, 12, 12)), []
    maps[:, top : top + 4, left : left + 4] = 1
    for number, x in enumerate((maps, 1 - maps)):
        save_maps(tmp_path / "m.npy", x, images, "x")
        open_maps(tmp_path / "m.npy", images, "x", lines.append)
        assert len(lines) == number
    assert "higher at the edges" in lines[0]


@given(st.booleans(), RANDOM)
def test_damaged_map_files_are_refused(images, tmp_path, of_the_maps, rng):
    path = tmp_path / "m.npy"
    save_maps(path, some_maps(), images, "tokencut")
    want, damaged = np.load(path), path if of_the_maps else path.with_suffix(".json")
    before = damaged.read_bytes()
    damaged.write_bytes(damage(before, rng))
    with within(20):
        try:
            maps = load_maps(path, images)[0]
        except ValueError as error:
            assert f"--maps {path}: " in str(error)
        else:
            assert np.array_equal(maps, want)
            assert not of_the_maps or damaged.read_bytes() == before


def test_other_files_are_refused(images, tmp_path):
    """Even with the right checksum."""
    path, file = tmp_path / "m.npy", tmp_path / "m.json"
    save_maps(path, some_maps(), images, "x")
    manifest, maps = json.loads(file.read_text()), np.load(path)

    def refused(words, **changes):
        file.write_text(json.dumps(manifest | changes))
        with pytest.raises(ValueError, match=rf"--maps {path}: .*{re.escape(words)}"):
            load_maps(path, images)

    refused("5 images", shape=[4, 7, 9])
    refused("flat", flat=5)
    refused("(5, 9, 7)", shape=[5, 9, 7])
    refused("version 3", version=3)
    refused("other data", fingerprint="f" * 64)
    for words, array in {"float32": maps.astype("f4"), "(4, 7, 9)": maps[:4]}.items():
        np.save(path, array)
        refused("checksum")
        refused(words, checksum=attg.maps.sha256(path))
    with open(path, "wb") as archive:
        np.savez(archive, maps=maps)
    refused("not a .npy file", checksum=attg.maps.sha256(path))
    file.unlink()
    with pytest.raises(ValueError, match="--maps .*m.json"):
        load_maps(path, images)
    with pytest.raises(ValueError, match="--maps .*no such .npy file"):
        load_maps(file, images)


def test_map_files_without_a_version_load(images, tmp_path):
    """As commit cf99790 wrote them; its fingerprints: tests/test_datasets.py."""
    path, file = tmp_path / "m.npy", tmp_path / "m.json"
    save_maps(path, some_maps(), images, "tokencut", sign="max", cut=0.3)
    manifest = json.loads(file.read_text()) | {"number": 5}
    del manifest["version"]
    file.write_text(json.dumps(manifest))
    maps, manifest = load_maps(path, images)
    assert maps.shape == (5, 7, 9)
    settings = {"sign": "max", "affinity_threshold": 0.3}
    assert manifest["settings"] == settings
    # A job with these settings has nothing to do, one with others is refused.
    job(path, images, None, method="tokencut", threshold=None, **settings)
    with pytest.raises(
        ValueError, match=f"--out {path}: .*affinity_threshold 0.3, not"
    ):
        job(path, images, None, method="tokencut", affinity_threshold=0.4)


# -- Quality ---------------------------------------------------------------------------


@given(seeds, st.integers(2, 9), st.integers(2, 9), st.integers(1, 4))
def test_quality_equals_scipy_and_sklearn(seed, h, w, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(seed)
    m = np.float32(rng.integers(0, levels + 1, (h, w)) / levels)  # with ties
    mask, valid = rng.random((2, h, w)) < [[[0.5]], [[0.8]]]
    mask[0, :2], valid[0, :2] = (True, False), True
    truth = np.ma.array(mask, mask=~valid)
    q = quality([m] * 4, [truth, None, ~mask & mask, mask | True])
    assert q["images"] == 1
    region = m > m.mean()
    area = metrics.roc_auc_score(mask[valid], m[valid])
    overlap = metrics.jaccard_score(mask[valid], region[valid])
    assert abs(q["AUROC"] - 100 * area) < 1e-9 and abs(q["IoU"] - 100 * overlap) < 1e-9

    labels, _ = ndimage.label(region)
    part = region & (labels == labels.flat[m.argmax()])
    assert np.array_equal(peak_component(m, m.mean()), part)
    boxes = np.zeros((2, h, w), bool)
    for box, cells in zip(boxes, (part, mask & valid), strict=True):
        for sides in ndimage.find_objects(cells.astype(int)):
            box[sides] = True
    iou = boxes.all(0).sum() / boxes.any(0).sum()
    assert q["CorLoc"] == 100 * (iou > 0.5)


def test_quality_of_maps_smaller_than_their_masks():
    mask = np.zeros((8, 12), bool)
    mask[2:6, 3:9] = True
    q = quality([mask.reshape(4, 2, 4, 3).mean((1, 3))], [mask])
    assert q["AUROC"] == q["CorLoc"] == 100 and q["IoU"] > 70
    with pytest.raises(ValueError, match="--masks"):
        quality([mask], [None])


OBJECT = np.zeros((8, 8), int)
OBJECT[2:6, 3:7] = 1
IDS = OBJECT * (1 + np.arange(8) % 2)  # of two objects
BORDER = np.where(np.roll(OBJECT, 1, 0) > OBJECT, 255, np.where(IDS == 2, 127, IDS))
SOFT = np.arange(64).reshape(8, 8) * 7 % 251  # includes 127


def colored(x, *colors):
    return Image.fromarray(np.uint8(colors)[x])


def indexed(x, *colors):
    image = Image.fromarray(np.uint8(x))
    image.putpalette(np.ravel(colors).tolist() or range(255, -1, -1))
    return image


def gray(x, dtype=np.uint8):
    return Image.fromarray(x.astype(dtype))


TWO = colored(OBJECT, (192, 128, 128), (128, 0, 0))
COLORS = colored(IDS, (0, 0, 0), (128, 0, 0), (0, 128, 0))
SORTED = indexed((IDS + 1) % 3, (255, 0, 0), (0, 0, 0), (0, 0, 255))
WHITE_FIRST = indexed(OBJECT, (255, 255, 255), (0, 0, 0))
DEEP = gray(SOFT * 257, np.uint16)
DIM, TOP = gray(SOFT * 9, np.uint16), SOFT.max()
ENCODINGS = {  # image, the map as parts of 1, words of the rule
    "0 and 1": (gray(OBJECT), OBJECT, "object is 1"),
    "0 and 255": (gray(255 * OBJECT), OBJECT, "object is 255"),
    "1 bit": (gray(OBJECT, bool), OBJECT, "object is 1"),
    "1 and 2": (gray(1 + OBJECT), OBJECT, "object is 2"),
    "palette": (indexed(OBJECT), OBJECT, "any but 0"),
    "palette, white first": (indexed(1 - OBJECT), OBJECT, "any but 1"),
    "palette, sorted colors": (SORTED, OBJECT, "any but 0x000000"),
    "palette, white and black": (WHITE_FIRST, OBJECT, "any but 255, which prevails"),
    "palette with ids": (indexed(BORDER), OBJECT, "any but 0, 255 is ignored"),
    "palette, black first": (gray(1 - OBJECT).convert("P"), 1 - OBJECT, "object is 1"),
    "gray ids": (gray(BORDER), OBJECT, "any but 0, 255 is ignored"),
    "two colors": (TWO, OBJECT, "any but 0xC08080"),
    "colors": (COLORS, OBJECT, "0xE0E0C0 is ignored"),
    "soft": (gray(SOFT), SOFT / 255, "parts of 255"),
    "soft, RGB": (gray(SOFT).convert("RGB"), SOFT / 255, "parts of 255"),
    "16 bits": (DEEP, SOFT / 255, "parts of 65535"),
    "16 bits, small": (DIM, SOFT / TOP, f"parts of {9 * TOP}"),
}
for mode in ("RGBA", "LA"):
    ENCODINGS[mode] = Image.new(mode, (8, 8), "white"), OBJECT, "alpha"
    ENCODINGS[mode][0].putalpha(gray(255 * OBJECT))
    ENCODINGS[f"faint {mode}"] = gray(OBJECT).convert(mode), OBJECT, "object is 1"
    ENCODINGS[f"faint {mode}"][0].putalpha(128)


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_of_masks(name, images, tmp_path):
    image, want, rule = ENCODINGS[name]
    for i in range(5):
        write(tmp_path / f"{i}.png", image)
    masks = MaskFolder(tmp_path, images)
    assert rule in masks.rule and str(tmp_path) in masks.rule
    assert np.abs(masks[3].filled(0) / 255 - want).max() < 0.01
    assert np.array_equal(masks[3].mask, (BORDER == 255) & ("ids" in name))
    # A data set from Python has names, but no files.
    pairs = open_data([(noise(40, 40), None)] * 5)
    pairs.names = images.names
    assert np.array_equal(MaskFolder(tmp_path, pairs)[3], masks[3])


def test_ids_are_told_from_soft_masks(images, tmp_path):
    """Touching cells, soft borders, a coarse map; few levels and tiny cells are refused."""
    ndimage = pytest.importorskip("scipy.ndimage")

    def read(x, values=()):
        write(tmp_path / "0.png", gray(x, np.uint8 if x.max() < 256 else np.uint16))
        return MaskFolder(tmp_path, images, values)[0].filled(0)

    rng = np.random.default_rng(5)
    seeds = rng.permutation(9216).reshape(96, 96) < 255
    distance, nearest = ndimage.distance_transform_edt(~seeds, return_indices=True)
    cells = seeds.cumsum().reshape(96, 96)[tuple(nearest)] * (distance < 4)
    for scale in (1, 255):
        assert np.array_equal(read(cells * scale), 255 * (cells > 0))
    blurred = ndimage.gaussian_filter(255.0 * (cells > 0), 1)
    for k in (1, 4, 16):
        saturated = (k * (blurred - 127) + 127).clip(0, 255)
        assert np.array_equal(read(saturated), np.uint8(saturated))
    coarse = np.kron(rng.integers(0, 256, (8, 8)), np.ones((8, 8)))
    assert np.array_equal(read(coarse), coarse)
    levels = blurred.round() // 51 * 51
    for x in (levels, cells[::2, ::2]):
        with pytest.raises(ValueError, match="--masks .*--mask_values .*ids or soft"):
            read(x)
    assert np.array_equal(read(levels, ["soft"]), levels)
    assert np.array_equal(read(levels, ["ids"]) > 0, (levels > 0) & (levels < 255))


def test_masks_without_background(images, tmp_path, capsys):
    """Heat maps in colors and labels of all pixels are refused, inverted masks told."""
    cm = pytest.importorskip("matplotlib").colormaps
    heat = [cm[x](np.uint8(SOFT), bytes=True) for x in ("jet", "viridis", "hot")]
    for image in (*map(Image.fromarray, heat), gray(1 + SOFT % 5)):
        write(tmp_path / "0.png", image)
        with pytest.raises(ValueError, match="--masks .*no mask has background.*gray"):
            MaskFolder(tmp_path, images)
    with pytest.raises(ValueError, match="--masks .*is 12: no mask has object"):
        MaskFolder(tmp_path, images, ["12"])
    assert "inverted" not in capsys.readouterr().out
    for x in (255 * (1 - OBJECT), 255 - SOFT * (1 - OBJECT) // 3):
        write(tmp_path / "0.png", gray(x))
        assert np.abs(MaskFolder(tmp_path, images)[0] - x).max() < 2
        assert "is object; inverted?" in capsys.readouterr().out


def test_masks_of_imagenet_s(images, tmp_path):
    """Its ids are red + 256 * green, 1000 is ignored (ImageNet-S's README)."""
    x = np.where(BORDER == 255, 1000, 300 * OBJECT)
    image = Image.fromarray(np.uint8(np.stack([x % 256, x // 256, 0 * x], axis=2)))
    for i in range(5):
        write(tmp_path / f"{i}.png", image)
    masks = MaskFolder(tmp_path, images)
    assert np.array_equal(masks[0].filled(0) > 0, x == 300)
    assert np.array_equal(masks[0].mask, x == 1000)


def test_values_that_no_sampled_mask_has(tmp_path):
    """A second id in one of 400 masks is refused, not taken for background."""
    images = open_data([(noise(8, 8), None)] * 400)
    for i in range(400):
        write(tmp_path / f"{images.names[i]}.png", gray(OBJECT * (1 + (i == 3))))
    masks = MaskFolder(tmp_path, images)
    with pytest.raises(ValueError, match="000003.png: has .2., others .0, 1.; .*ids"):
        masks[3]
    assert masks[2].any() and MaskFolder(tmp_path, images, ["ids"])[3].any()


def test_masks_of_jpegs(images, tmp_path):
    """Their noise is no object, neither beside one nor alone."""
    for i, x in enumerate((OBJECT, OBJECT.T, 0 * OBJECT)):
        write(tmp_path / f"{i}.jpg", gray(255 * x).resize((40, 40), 0), quality=75)
        jpeg = np.array(Image.open(tmp_path / f"{i}.jpg"))
        jpeg[:2, :2] = 3
        write(tmp_path / f"{i}.png", gray(jpeg))
    masks = MaskFolder(tmp_path, images)
    want = np.kron(OBJECT, np.ones((5, 5)))
    assert np.array_equal(masks[0] > 127, want > 0) and "soft" in masks.rule
    assert not masks[2].any() and masks[0].min() == 0 < masks[0][0, 0]


def test_masks_of_turned_images(tmp_path):
    """A mask is refused if it fits both the stored image and the one that EXIF turns."""
    cases = [(20, 1), (20, 6), (40, 0), (20, 3), (20, 4), (40, 8)]
    for i, (height, orientation) in enumerate(cases):
        exif = Image.Exif()
        exif[0x0112] = orientation
        write(tmp_path / f"data/{i}.png", noise(40, height), exif=exif)
        write(tmp_path / f"masks/{i}.png", gray(np.eye(height, 40)))
    masks = MaskFolder(tmp_path / "masks", open_data(tmp_path / "data"))
    refused = [mask is None for mask in ground_truth_masks(masks, range(6))]
    assert refused == [False] * 3 + [True] * 3


def test_masks_that_need_a_flag_or_are_refused(images, tmp_path, capsys):
    trimap = 2 - OBJECT
    trimap[2] = 3
    for i in range(3):
        write(tmp_path / f"{i}.png", gray(trimap))
    with pytest.raises(ValueError, match="--masks .*trimaps.*--mask_values 1"):
        MaskFolder(tmp_path, images)
    with pytest.raises(ValueError, match="--mask_values x: "):
        MaskFolder(tmp_path, images, ("x",))
    masks = MaskFolder(tmp_path, images, ("1",))
    assert np.array_equal(masks[2] > 0, trimap == 1)
    # Of another shape than the image, a pipe, a huge one
    write(tmp_path / "2.png", gray(trimap[:7]))
    os.mkfifo(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(png(10**5, 10**4, row=b"", rows=1))
    with within(10):
        read = list(ground_truth_masks(masks, range(5)))
    assert [mask is None for mask in read] == [False, False, True, True, True]
    printed = capsys.readouterr().out
    assert "3 masks are missing or refused" in printed
    assert "2.png: 8 x 7, but the image is 40 x 40" in printed


def test_masks_of_several_kinds(images, tmp_path):
    """An opaque alpha says nothing; among colors, white is a color; others are refused."""
    image = colored(OBJECT, (255, 255, 255), (128, 0, 0)).convert("RGBA")
    for i in range(4):
        write(tmp_path / f"{i}.png", image)
    write(tmp_path / "4.png", Image.new("RGB", (8, 8), "white"))
    masks = MaskFolder(tmp_path, images)
    assert "object is any but 0xFFFFFF" in masks.rule
    assert np.array_equal(masks[0] > 0, OBJECT > 0) and not masks[4].any()
    for i in range(5):
        write(tmp_path / f"{i}.png", gray(SOFT if i == 1 else 255 * OBJECT))
    masks = MaskFolder(tmp_path, images)
    write(tmp_path / "2.png", indexed(OBJECT))
    first, second = ground_truth_masks(masks, [1, 2])
    assert np.array_equal(first, SOFT > 127) and second is None
    # Palettes of sorted colors; one of black alone is in no other order
    for i in range(5):
        write(tmp_path / f"{i}.png", SORTED)
    write(tmp_path / "1.png", indexed(OBJECT * 0, (0, 0, 0)))
    masks = MaskFolder(tmp_path, images)
    assert not masks[1].any() and np.array_equal(masks[2] > 0, OBJECT > 0)
    # 255 is the object, or may be
    halves = OBJECT * np.where(np.arange(8) < 5, 100, 255)
    for pair in ([OBJECT, 255 * OBJECT], [halves, halves]):
        for i in range(5):
            write(tmp_path / f"{i}.png", gray(pair[i % 2]))
        with pytest.raises(ValueError, match="--masks .*several kinds.*--mask_values"):
            MaskFolder(tmp_path, images)
    images = open_data([(noise(40, 40), None)] * 2)
    images.names = np.array(["1.jpg", "1.png"])
    with pytest.raises(ValueError, match="--masks .*2 images.* 1.png.*rename"):
        MaskFolder(tmp_path, images)


# -- The job ---------------------------------------------------------------------------


def job(out, dataset, compute, **changes):
    """run_job in this process, one image a block, maps of 4 x 4 cells."""
    options = SimpleNamespace(out=out, batch_size=1, workers=0, timeout=1)
    settings = {"method": "x", "threshold": 0.2} | changes
    images = SquashedImages(dataset, (32, 32))
    run_job(compute, images, (4, 4), settings, options, (torch.device("cpu"), 0, 1))


def red(imgs, channel=0):
    return imgs[:, channel, ::8, ::8].float()


def files_of(out):
    return [out.with_suffix(suffix).read_bytes() for suffix in (".npy", ".json")]


def test_interrupted_jobs_resume(images, tmp_path, capsys):
    """Finished blocks are not made again; other settings and other data are refused."""
    calls = []

    def stopping(imgs):
        calls.append(len(imgs))
        if len(calls) in (3, 5):
            raise KeyboardInterrupt
        return red(imgs)

    job(tmp_path / "whole.npy", images, red)
    out = tmp_path / "maps.npy"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job(out, images, stopping)
    remedy = "maps.npy.job"
    with pytest.raises(ValueError, match=f"--out .*threshold 0.2, not 0.3.*{remedy}"):
        job(out, images, stopping, threshold=0.3)
    other = images.subset(torch.tensor([0, 1, 2, 4, 3]))
    with pytest.raises(ValueError, match=f"--out .*fingerprint .*{remedy}"):
        job(out, other, stopping)
    job(out, images, stopping)
    # The map file of other images, as after one was added
    with pytest.raises(
        ValueError, match="--out .*maps.npy: made for other .* delete it"
    ):
        job(out, other, stopping)
    assert len(calls) == 5 + 2 and files_of(out) == files_of(tmp_path / "whole.npy")
    assert "3 of 5 blocks" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 4


def test_random_transforms_are_refused(images, tmp_path):
    """Training would pool the map of one crop over another."""
    torch.manual_seed(0)
    for transform in (v2.RandomHorizontalFlip(), v2.RandomResizedCrop(40)):

        class Augmented(list):
            def __getitem__(self, i, transform=transform):
                return transform(super().__getitem__(i)[0]), None

        data = open_data(Augmented(images.read(i) for i in range(5)))
        with pytest.raises(ValueError, match="data: images change .* transforms"):
            job(tmp_path / "m.npy", data, red)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_job_interrupted_at_its_end(moved, images, tmp_path, monkeypatch):
    """Before a file is moved into place, between the two, while the folder is removed.

    Blocks without settings may be of another job: they are made again.
    """
    out, compute, calls = tmp_path / "m.npy", partial(red, channel=moved // 2), []
    job(tmp_path / "whole.npy", images, compute)

    def move(*paths):
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(os.replace(*paths))

    def remove(folder, **_):
        if calls:
            (folder / "settings.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "move", move)
        patch.setattr(shutil, "rmtree", remove)
        job(out, images, red)
    # Whatever a killed job leaves is in its folder, until that is removed.
    assert len(list(tmp_path.iterdir())) == 3 + moved
    job(out, images, compute)
    assert files_of(out) == files_of(tmp_path / "whole.npy")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture(scope="module")
def maps_job(tmp_path_factory):
    """Settings of a job of 40 blocks, and the files of an uninterrupted run of it."""
    folder = tmp_path_factory.mktemp("job")
    make_images(folder / "data", 120)
    settings = {"data": str(folder / "data"), "backbone": "pixels", "img_size": 224}
    settings |= {"batch_size": 3, "device": "cpu"}
    object_discovery.main(command(settings | {"out": folder / "maps.npy"}))
    return settings, files_of(folder / "maps.npy")


DISCOVERY = (object_discovery.__file__,)


# object_discovery.py, but it sleeps after each block.
SLOW = """
import time
import attg.map_job, object_discovery
from attg.cli import run_cli
plain = attg.map_job.normalize_map
attg.map_job.normalize_map = lambda m: time.sleep(0.05) or plain(m)
run_cli(object_discovery.main)
"""


def blocks(out):
    return len([p for p in out.parent.glob(f"{out.name}.job/*") if p.name.isdigit()])


def test_job_that_is_killed_and_fills_the_disk(ask, maps_job, tmp_path):
    """Two processes are killed; one goes on until the disk is full; two end the job."""
    settings, want = maps_job
    out, slow = tmp_path / "maps.npy", tmp_path / "object_discovery.py"
    slow.write_text(SLOW)
    runs = ranks(ask, out, settings, (str(slow),))
    assert runs[0].until(lambda: blocks(out) > 3)
    time.sleep(random.uniform(0, 0.05))
    for run in runs:
        os.kill(run.pid, signal.SIGKILL)
    assert {run.wait()[0] for run in runs} == {-9}
    killed = blocks(out)
    run = Process(ask, out, settings, script=(str(slow),))
    assert run.until(lambda: blocks(out) > killed + 3)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    code, _, errors = run.wait()
    assert code == 1 and "Traceback" not in errors and not out.exists()
    assert "File too large" in errors and f"{out}.job/" in errors
    seen = blocks(out)
    assert killed < seen < 40
    ended = [run.wait() for run in ranks(ask, out, settings, DISCOVERY)]
    assert [code for code, *_ in ended] == [0, 0]
    assert f"{seen} of 40 blocks" in ended[0][1] and files_of(out) == want
    assert not (tmp_path / "maps.npy.job").exists()


def test_ranks_with_other_images_make_no_maps(ask, maps_job, tmp_path):
    """Blocks of another rank would be of other images than their rows."""
    settings, _ = maps_job
    copy = shutil.copytree(settings["data"], tmp_path / "data")
    next(copy.rglob("*.*g")).unlink()
    settings |= {"timeout": 0.2}
    out, other = tmp_path / "maps.npy", {"data": copy}
    runs = [run.wait() for run in ranks(ask, out, settings, DISCOVERY, other)]
    assert [code for code, *_ in runs] == [1, 1] and not out.exists()
    assert f"--out {out}: made with fingerprint v3:" in runs[1][2]
