"""
Object discovery against scipy, Hugging Face and grad-cam; the job over a data set.
"""

import hashlib
import math
import os
import subprocess
import sys
import urllib.error
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import attg_mae
import object_discovery
from attg.datasets import open_data
from attg.maps import load_maps
from attg_mae import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers import (
    ROOT,
    SMALL,
    close,
    colourful,
    graphs,
    kernel,
    losses,
    rand,
    randn,
    shake,
    train,
    transformers,
    write,
)


@pytest.mark.parametrize("family", list(graphs()))
def test_tokencut_equals_scipy(family):
    linalg = pytest.importorskip("scipy.linalg")
    features = graphs()[family].contiguous()
    got = object_discovery.tokencut(features)
    assert got.dtype == torch.float32 and got.shape == features.shape[:2]
    simple = 0
    for x, y in zip(F.normalize(features, dim=-1), got.double().numpy(), strict=True):
        A_ = np.where((x @ x.T).numpy() > 0.2, 1.0, 1e-5)
        A_ = np.maximum(A_, A_.T)
        d = A_.sum(1)
        values, vectors = linalg.eigh(np.diag(d) - A_, np.diag(d))
        want = vectors[:, 1] * np.sign(vectors[np.abs(vectors[:, 1]).argmax(), 1])
        value = y @ (d * y - A_ @ y) / (y @ (d * y))
        assert abs(value - values[1]) <= 1e-6
        assert math.isclose(y @ (d * y), 1, rel_tol=1e-5)
        assert np.linalg.norm(d * y - A_ @ y - value * d * y) <= 1e-5 * np.linalg.norm(
            d * y
        )
        if values[2] - values[1] > 1e-9 * values[2]:
            simple += 1
            cosine = y @ want / np.linalg.norm(y) / np.linalg.norm(want)
            peaks = np.sort(np.abs(want))
            tied = peaks[-2] > (1 - 1e-5) * peaks[-1]  # the sign is then either's
            assert (abs(cosine) if tied else cosine) >= 0.9999
            if not tied:
                clear = np.abs(want - want.mean()) > 1e-4 * peaks[-1]
                assert ((y > y.mean()) == (want > want.mean()))[clear].all()
            assert (
                abs(np.roll(y, 1) @ want) / np.linalg.norm(y) / np.linalg.norm(want)
                < 0.9999
            )
    assert simple == len(features) or family in (
        "three of a kind",
        "ring",
        "no edge",
        "all edges",
        "zeros",
    )


def test_tokencut_stands_alone_in_its_batch_and_refuses_nan():
    features = graphs()["smooth"]
    alone = torch.cat([object_discovery.tokencut(x[None]) for x in features])
    assert torch.allclose(object_discovery.tokencut(features), alone, atol=1e-7)
    assert len(alone.unique(dim=0)) == len(alone)
    assert object_discovery.tokencut(features.double()).dtype == torch.float64
    assert torch.allclose(object_discovery.tokencut(features.half()), alone, atol=1e-2)
    assert object_discovery.tokencut(features[:, :1]).equal(
        torch.zeros(len(features), 1)
    )
    two = object_discovery.tokencut(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))[0]
    assert two.sum().abs() < 1e-6 and two[0] > 0
    features[7, 3, 1], features[9, 0, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="7, 9"):
        object_discovery.tokencut(features)


def test_border_sign_turns_maps_whose_border_is_above_their_inside():
    maps = rand(40, 5, 7)
    got = object_discovery.border_sign(maps)
    turned = 0
    for m, mine in zip(maps.numpy(), got.numpy(), strict=True):
        border = [*m[0], *m[-1], *m[1:-1, 0], *m[1:-1, -1]]
        inside = [m[i, j] for i in range(1, 4) for j in range(1, 6)]
        if np.mean(border) > np.mean(inside):
            turned += 1
            assert np.array_equal(mine, 1 - m)
        else:
            assert np.array_equal(mine, m)
    assert 10 < turned < 30
    # Twice is once: the border of what was turned is below its inside.
    assert object_discovery.border_sign(got).equal(got)
    # No cell inside, or all cells alike: as they are. NaN does not count.
    assert object_discovery.border_sign(maps[:, :2]).equal(maps[:, :2])
    assert object_discovery.border_sign(torch.ones(1, 4, 4)).equal(torch.ones(1, 4, 4))
    m = torch.zeros(1, 4, 4)
    m[0, 0] = m[0, 1, 1] = m[0, 2, 2] = 1
    assert object_discovery.border_sign(m).equal(m)
    m[0, 1, 1] = m[0, 2, 2] = math.nan
    assert object_discovery.border_sign(m).nan_to_num(7)[0, :2].tolist() == [
        [0, 0, 0, 0],
        [1, 7, 1, 1],
    ]


def cut_args(**changed):
    """What `cut` reads of the command line, at its defaults but for `changed`."""
    usual = {"cut": 0.2, "binary": False, "sign": "max", "objects": 1}
    return SimpleNamespace(**usual | changed)


@pytest.mark.parametrize("size", [32, 48])
def test_dino_maps_equal_hugging_face(size, tmp_path):
    hf = transformers()
    kw = dict(
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=32,
    )
    ref = shake(
        hf.ViTModel(
            hf.ViTConfig(
                **kw, patch_size=8, layer_norm_eps=1e-6, attn_implementation="eager"
            )
        )
    ).eval()
    torch.save(ref.state_dict(), tmp_path / "vit.pt")
    args = SimpleNamespace(
        backbone=str(tmp_path / "vit.pt"),
        method="dino",
        img_size=size,
        mean=None,
        std=None,
    )
    maps, shape, grid, about = object_discovery.vit(args, "cpu")
    imgs = (rand(2, 3, size, size) * 255).byte()
    cfg = SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    out = ref(
        attg_mae.normalize(imgs, cfg),
        output_attentions=True,
        interpolate_pos_encoding=True,
    )
    want = out.attentions[-1][:, :, 0, 1:].mean(1)
    assert shape == (size, size) and grid == (size // 8,) * 2
    assert close(maps(imgs).flatten(1), want, 1e-5)
    assert not close(maps(imgs).flatten(1).roll(1, 1), want, 1e-3)
    assert (
        about["sha256"]
        == hashlib.sha256((tmp_path / "vit.pt").read_bytes()).hexdigest()
    )


def cnn_args(method, name, weights, size, grid=None, **more):
    """What `cnn` reads of the command line."""
    settings = {"method": method, "backbone": name, "weights": str(weights)}
    settings |= {"img_size": size, "grid": grid, "mean": None, "std": None}
    return SimpleNamespace(**settings, **more)


@pytest.mark.parametrize(("name", "size"), [("resnet50", 96), ("mobilenet_v2", 160)])
def test_grad_cam_equals_the_package(name, size, tmp_path):
    from pytorch_grad_cam import GradCAM

    torch.manual_seed(0)
    ref = torchvision.models.get_model(name).eval()
    for module in ref.modules():  # untrained deep networks hardly see their input
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.2, 0.6)
    torch.save(ref.state_dict(), tmp_path / "cnn.pt")
    args = cnn_args("gradcam", name, tmp_path / "cnn.pt", size, grid=5)
    maps, shape, grid, about = object_discovery.cnn(args, "cpu")
    imgs = (
        (rand(3, 3, 12, 12) * 255)
        .byte()
        .repeat_interleave(size // 12 + 1, 2)
        .repeat_interleave(size // 12 + 1, 3)
    )
    imgs = imgs[:, :, :size, :size].contiguous()
    got = maps(imgs)
    with GradCAM(ref, [ref.layer4 if name == "resnet50" else ref.features[-1]]) as cam:
        want = cam(
            attg_mae.normalize(
                imgs, SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD)
            ),
            targets=None,
        )
    want = kernel.normalize_map(
        F.adaptive_avg_pool2d(torch.from_numpy(want)[:, None], 5).flatten(1)
    )
    assert got.shape == (3, 5, 5) and want.std(1).min() > 0.1
    assert torch.allclose(kernel.normalize_map(got.flatten(1)), want, atol=1e-4)
    assert not torch.allclose(
        kernel.normalize_map(got.flatten(1)).roll(1, 1), want, atol=1e-2
    )


@pytest.mark.parametrize(("name", "size"), [("resnet50", 96), ("mobilenet_v2", 104)])
def test_cut_of_a_classifier_equals_scipy(name, size, tmp_path):
    torch.manual_seed(0)
    ref = torchvision.models.get_model(name).eval()
    torch.save(ref.state_dict(), tmp_path / "cnn.pt")
    args = cnn_args("tokencut", name, tmp_path / "cnn.pt", size, **vars(cut_args()))
    maps, shape, grid, _ = object_discovery.cnn(args, "cpu")
    assert shape == (size, size) and grid == (math.ceil(size / 16),) * 2
    imgs = F.interpolate(rand(2, 3, 6, 6), (size, size)).mul(255).byte()
    got = maps(imgs)

    seen = []
    layer = ref.layer3 if name == "resnet50" else ref.features[13]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    cfg = SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with torch.no_grad():
        ref(attg_mae.normalize(imgs, cfg))
    assert seen[0].shape[2:] == grid
    for m, x in zip(got, seen[0], strict=True):
        x = x.flatten(1).T.double().numpy()
        want = cut_by_the_book(x - x.mean(0), grid)
        assert np.abs(m.numpy() - want).max() < 1e-3
        # Another layout of the grid, or features that are not centred, would not do.
        assert np.abs(m.numpy() - want.T).max() > 0.1
        assert np.abs(m.numpy() - cut_by_the_book(x, grid)).max() > 0.1


def cut_by_the_book(x, grid, objects=1, sign="max", binary=False, parts=None):
    """MaskCut of features (L, d), (h, w) in [0, 1], with dense solvers, patch by patch.

    parts: a list that receives what each cut has found, (h, w).
    """
    linalg = pytest.importorskip("scipy.linalg")
    ndimage = pytest.importorskip("scipy.ndimage")
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    left = np.full(len(x), True)
    joined = np.zeros(grid)
    for _ in range(objects):
        kept = np.where(left[:, None], x, 0)
        A = np.where(kept @ kept.T > 0.2, 1.0, 1e-5)
        D = np.diag(A.sum(1))
        y = linalg.eigh(D - A, D)[1][:, 1]
        y = y * np.sign(y[left][np.abs(y[left]).argmax()])
        if binary:
            y = np.where(y > y[left].mean(), 1.0, 0.0)
        low, high = y[left].min(), y[left].max()
        m = np.where(left, (y - low) / (high - low), 0).reshape(grid)
        if sign == "border":
            inside = np.zeros(grid, bool)
            inside[1:-1, 1:-1] = True
            there = left.reshape(grid)
            if m[there & ~inside].mean() > m[there & inside].mean():
                m = np.where(there, 1 - m, 0)
        joined = np.maximum(joined, m)
        regions, _ = ndimage.label(m > m[left.reshape(grid)].mean())
        found = regions == regions.flat[m.argmax()]
        if parts is not None:
            parts.append(found)
        left = left & ~found.ravel()
    return joined


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("sign", ["max", "border"])
def test_several_objects_equal_a_dense_maskcut(sign, binary):
    # Two blobs before a background; the smaller one is a little like it, so that the
    # first cut leaves it out.
    grid, features, blobs = (12, 14), [], []
    y, x = np.mgrid[0:12, 0:14]
    for i in range(6):
        noise = randn(12, 14, 8, seed=i).numpy() * 0.1
        picture = noise + np.eye(8)[0]
        first = np.hypot(y - 3 - i % 2, x - 3) < 2.6
        second = np.hypot(y - 8, x - 9 - i % 3) < 1.9
        picture[first] = noise[first] + np.eye(8)[1]
        picture[second] = noise[second] + np.eye(8)[2] + 0.25 * np.eye(8)[0]
        features.append(torch.from_numpy(picture.reshape(-1, 8)).float())
        blobs.append((first, second))
    features = torch.stack(features)
    maps = {}
    for objects in (1, 2):
        args = cut_args(objects=objects, sign=sign, binary=binary)
        maps[objects] = object_discovery.cut(features, grid, args).numpy()
        for x, m in zip(features.double().numpy(), maps[objects], strict=True):
            want = cut_by_the_book(x, grid, objects, sign, binary)
            assert np.abs(m - want).max() < 1e-3
    for one, two, (first, second) in zip(maps[1], maps[2], blobs, strict=True):
        assert one[first].mean() > 0.6 and one[second].mean() < 0.2
        assert two[first].mean() > 0.6 and two[second].mean() > 0.35


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_cuts_of_any_features_equal_a_dense_maskcut(objects):
    features = graphs()["smooth"][:12]
    maps = {}
    for sign in ("max", "border"):
        args = cut_args(objects=objects, sign=sign)
        maps[sign] = object_discovery.cut(features, (14, 14), args).numpy()
        for x, m in zip(features.double().numpy(), maps[sign], strict=True):
            want = cut_by_the_book(x, (14, 14), objects, sign)
            assert np.abs(m - want).max() < 1e-3
    turned = np.abs(maps["max"] - maps["border"]).max((1, 2)) > 0.1
    assert turned.any()


def test_a_picture_of_one_thing_ends_the_search_for_more():
    features = torch.eye(2)[torch.tensor([0] * 8 + [1] * 8)][None]
    one = object_discovery.cut(features, (4, 4), cut_args())
    # Each half is all alike: nothing is left to be cut.
    more = object_discovery.cut(features, (4, 4), cut_args(objects=5))
    assert more.equal(one) and one.unique().tolist() == [0, 1]


def test_grad_cam_leaves_nothing_behind():
    model = torchvision.models.get_model("mobilenet_v2").eval()
    parts = object_discovery.CNNS["mobilenet_v2"](model)
    x = parts.to_stride_32(parts.to_stride_16(randn(1, 3, 64, 64))).detach()
    object_discovery.grad_cam(x, parts.classify, (2, 2), (64, 64))
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def discover(folder, out, *more, method="tokencut", backbone="pixels", data="data"):
    flags = [
        "--method",
        method,
        "--data",
        folder / data,
        "--out",
        out,
        *"--device cpu".split(),
        "--batch_size",
        4,
    ]
    flags += (
        ["--backbone", backbone, "--img_size", "96"] if method == "tokencut" else []
    )
    return object_discovery.main([str(x) for x in (*flags, *more)])


def test_maps_of_a_folder(tmp_path, capsys):
    out = tmp_path / "maps" / "m.npy"
    result = discover(
        colourful(tmp_path, 10, bad=[3]),
        out,
        "--masks",
        tmp_path / "masks",
        "--show",
        4,
    )
    pictures = open_data(str(tmp_path / "data"))
    maps, manifest = load_maps(out, pictures)
    assert maps.shape == (10, 6, 6) and manifest == result["manifest"]
    assert manifest["failed"] == [3] and not maps[3].any() and manifest["flat"] == []
    assert (maps.max((1, 2)) == 1).sum() == 9
    assert {
        k: manifest["settings"][k] for k in ("backbone", "input", "grid", "cut")
    } == {"backbone": "pixels", "input": [96, 96], "grid": [6, 6], "cut": 0.2}
    whole = np.array(pictures.read(5)[0].resize((96, 96), Image.Resampling.BICUBIC))
    features = object_discovery.patch_statistics(
        torch.from_numpy(whole).permute(2, 0, 1)[None] / 255, 16
    )
    want = (
        kernel.normalize_map(object_discovery.tokencut(features))
        .reshape(6, 6)
        .half()
        .numpy()
    )
    assert (maps[5] == want).all()
    q = result["quality"][str(out)]
    assert q["images"] == 10 and q["AUROC"] > 80 and q["IoU"] > 30 and q["CorLoc"] > 40
    printed = capsys.readouterr().out
    assert "0 flat, 1 failed, 0 larger" in printed
    assert "03.png" in printed
    assert f"IoU {q['IoU']:.1f}" in printed
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.json", "m.npy", "m.png"]
    stamp = out.stat().st_mtime_ns
    # Nothing is done twice
    assert discover(tmp_path, out)["manifest"] == manifest
    assert out.stat().st_mtime_ns == stamp
    other = tmp_path / "maps" / "binary.npy"
    both = discover(
        tmp_path,
        other,
        "--binary",
        "--with",
        out,
        "--show",
        2,
        "--masks",
        tmp_path / "masks",
    )
    assert set(both["quality"]) == {str(other), str(out)}
    assert both["quality"][str(out)] == q
    assert set(np.unique(np.load(other))) == {0, 1}
    sheets = [Image.open(p.with_suffix(".png")).size for p in (out, other)]
    # A column more, fewer rows
    assert sheets[1][0] > sheets[0][0] and sheets[1][1] < sheets[0][1]


def test_maps_from_masks_and_their_quality(tmp_path):
    colourful(tmp_path, 6)
    (tmp_path / "masks" / "04.png").unlink()
    result = discover(
        tmp_path,
        tmp_path / "m.npy",
        "--masks",
        tmp_path / "masks",
        "--grid",
        16,
        method="masks",
    )
    maps, manifest = load_maps(tmp_path / "m.npy", open_data(str(tmp_path / "data")))
    assert manifest["failed"] == [4]
    assert maps.shape == (6, 16, 16)
    assert result["quality"] == {}
    want = (
        np.asarray(
            Image.open(tmp_path / "masks" / "02.png").resize(
                (16, 16), Image.Resampling.BOX
            )
        )
        / 255
    )
    assert abs(maps[2] - want).max() < 1e-3 and want.any()
    palette = Image.fromarray(np.uint8([[0, 0, 3], [0, 2, 1]]), "P")
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "p.png")
    assert np.asarray(object_discovery.read_mask(tmp_path, "p.jpg")).tolist() == [
        [0, 0, 255],
        [0, 255, 255],
    ]


def test_large_and_flat_maps_are_counted(tmp_path, capsys):
    for i, shade in enumerate((0, 90)):
        write(tmp_path / "data" / f"{i}.png", Image.new("RGB", (32, 32), (shade,) * 3))
    corner = Image.new("RGB", (96, 96), (200, 0, 0))
    corner.paste((0, 0, 200), (0, 0, 16, 16))
    write(tmp_path / "data" / "2.png", corner)
    args = {"method": "red"}, 2, 0, torch.device("cpu"), 0, 1
    pictures = open_data(str(tmp_path / "data"))
    whole = object_discovery.Whole(pictures, (96, 96))
    object_discovery.discover(
        lambda x: F.avg_pool2d(x[:, 0].float(), 16),
        whole,
        (6, 6),
        tmp_path / "m.npy",
        *args,
    )
    maps, manifest = load_maps(tmp_path / "m.npy", pictures)
    assert manifest["flat"] == [0, 1]
    assert manifest["settings"]["large"] == [2]
    assert maps[2].mean() > 0.9


def test_interrupted_jobs_give_the_same_file(tmp_path, monkeypatch, capsys):
    colourful(tmp_path, 14, bad=[6])
    discover(tmp_path, tmp_path / "whole.npy")
    calls, cut, out = [], object_discovery.tokencut, tmp_path / "m.npy"

    def stopping(features, *args):
        calls.append(len(features))
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return cut(features, *args)

    monkeypatch.setattr(object_discovery, "tokencut", stopping)
    for torn in ("3", "\n2"):
        with pytest.raises(KeyboardInterrupt):
            discover(tmp_path, out)
        with open(tmp_path / "m.done.0", "a") as file:
            file.write(torn)  # half a line of a killed process is no finished block
    assert not out.exists()
    with pytest.raises(
        ValueError, match="unfinished job.*cut 0.2, not 0.3.*delete m.npy.part,"
    ):
        discover(tmp_path, out, "--cut", 0.3)
    discover(tmp_path, out)
    assert calls == [4, 4, 4, 4, 4, 2]
    assert "going on: 2 of 4 blocks" in capsys.readouterr().out
    for suffix in (".npy", ".json"):
        assert (
            out.with_suffix(suffix).read_bytes()
            == (tmp_path / "whole").with_suffix(suffix).read_bytes()
        )
    assert sorted(p.name for p in tmp_path.glob("m*")) == ["m.json", "m.npy", "masks"]


def test_job_memory_does_not_grow(tmp_path):
    code = """
import pathlib, resource, torch, object_discovery as O

class Many(torch.utils.data.Dataset):
    folder, fingerprint, names = None, "", [""]

    def __init__(self, count):
        self.dataset, self.count = self, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return torch.full((3, 128, 128), i % 251, dtype=torch.uint8), True

for count in (200, 4000):  # 10 and 200 MB
    args = {"method": "x"}, 50, 0, torch.device("cpu"), 0, 1
    out = pathlib.Path(f"{count}.npy")
    O.discover(lambda x: torch.rand(len(x), 4, 4), Many(count), (4, 4), out, *args)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KB
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert second - first < 40_000


def test_discovered_maps_guide_a_run(labelled, tmp_path):
    model = attg_mae.build_model(attg_mae.Config(**SMALL))
    attg_mae.save_checkpoint(
        tmp_path / "encoder.pt", model=model.state_dict(), config=asdict(model.cfg)
    )
    for method in ("tokencut", "dino"):
        out = tmp_path / f"{method}.npy"
        flags = [
            "--method",
            method,
            "--backbone",
            str(tmp_path / "encoder.pt"),
            "--data",
            labelled["data"],
        ]
        manifest = object_discovery.main(
            [*flags, "--out", str(out), "--device", "cpu"]
        )["manifest"]
        assert manifest["shape"] == [25, 2, 2]
        assert manifest["settings"]["mean"] == list(IMAGENET_MEAN)
        a, b = (
            train(tmp_path / f"{method}{i}", **labelled | {"maps": str(x)}, epochs=1)
            for i, x in enumerate((out, labelled["maps"]))
        )
        assert a["step"] == b["step"] == 6 and losses(a["out"]) != losses(b["out"])
    other = object_discovery.main(
        [
            *flags,
            "--out",
            str(tmp_path / "o.npy"),
            *"--device cpu".split(),
            "--mean",
            *"000",
            "--std",
            *"111",
        ]
    )
    assert other["manifest"]["settings"]["mean"] == [0, 0, 0]
    assert not np.array_equal(
        np.load(tmp_path / "o.npy"), np.load(tmp_path / "dino.npy")
    )


def test_grad_cam_of_a_data_set(tmp_path):
    colourful(tmp_path, 5, bad=[1])
    model = torchvision.models.get_model("mobilenet_v2")
    torch.save(
        {
            k: v.half() if v.is_floating_point() else v
            for k, v in model.state_dict().items()
        },
        tmp_path / "m.pt",
    )
    flags = (
        "--backbone",
        "mobilenet_v2",
        "--weights",
        tmp_path / "m.pt",
        "--img_size",
        64,
        "--grid",
        4,
    )
    manifest = discover(tmp_path, tmp_path / "m.npy", *flags, method="gradcam")[
        "manifest"
    ]
    assert manifest["shape"] == [5, 4, 4]
    assert manifest["failed"] == [1]
    assert manifest["settings"]["input"] == [64, 64]
    assert (
        manifest["settings"]["sha256"]
        == hashlib.sha256((tmp_path / "m.pt").read_bytes()).hexdigest()
    )


def test_map_files_beside_each_other_are_safe(tmp_path):
    """Names that look like those of unfinished jobs, and names with glob characters."""
    colourful(tmp_path, 5)
    names = ["q.done.npy", "q.part.npy", "q.npy", "m[1].npy", "q.done.7x.npy"]
    for name in names:
        discover(tmp_path, tmp_path / "maps" / name)
    files = {p.name: p.read_bytes() for p in (tmp_path / "maps").iterdir()}
    assert sorted(files) == sorted(
        x for name in names for x in (name, name[:-3] + "json")
    )
    assert len({files[name] for name in names}) == 1


def test_maps_job_ended_while_it_finished(tmp_path, monkeypatch):
    """Killed between the two files, or after both: the same command ends it."""
    colourful(tmp_path, 5)
    discover(tmp_path, tmp_path / "whole.npy")
    want = [(tmp_path / f"whole.{x}").read_bytes() for x in ("npy", "json")]
    out = tmp_path / "m.npy"
    save = object_discovery.save_maps

    def half(*args, **kw):
        save(*args, **kw)
        out.with_suffix(".json").unlink()
        raise KeyboardInterrupt

    def whole(*args, **kw):
        save(*args, **kw)
        raise KeyboardInterrupt

    for ending in (half, whole):
        monkeypatch.setattr(object_discovery, "save_maps", ending)
        with pytest.raises(KeyboardInterrupt):
            discover(tmp_path, out)
    monkeypatch.setattr(object_discovery, "save_maps", save)
    discover(tmp_path, out)
    assert [(tmp_path / f"m.{x}").read_bytes() for x in ("npy", "json")] == want
    assert not list(tmp_path.glob("m.npy.*"))


def test_maps_that_are_not_finite_are_failed(tmp_path, capsys):
    colourful(tmp_path, 3)
    model = attg_mae.build_model(attg_mae.Config(**SMALL))
    attg_mae.save_checkpoint(
        tmp_path / "encoder.pt", model=model.state_dict(), config=asdict(model.cfg)
    )
    model.patch_embed.proj.bias.data.fill_(math.nan)
    attg_mae.save_checkpoint(
        tmp_path / "nan.pt", model=model.state_dict(), config=asdict(model.cfg)
    )
    flags = (
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "m.npy"),
        "--device",
        "cpu",
        "--backbone",
    )
    for method in ("dino", "tokencut"):
        with pytest.raises(ValueError, match="not one of 3 maps is finite.*--backbone"):
            object_discovery.main(
                ["--method", method, *flags, str(tmp_path / "nan.pt")]
            )
        assert not list(tmp_path.glob("m.*"))
    features = graphs()["smooth"][:3].clone()
    features[1, 2, 0] = math.nan
    y = object_discovery.cut(features, (14, 14), cut_args())
    assert y[1].isnan().all()
    want = kernel.normalize_map(object_discovery.tokencut(features[[0, 2]]))
    assert y[[0, 2]].flatten(1).equal(want)
    for alike in (torch.ones(1, 9, 4), torch.eye(9)[None]):
        assert not object_discovery.cut(alike, (3, 3), cut_args()).any()


def test_dino_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    model, urls = attg_mae.build_model(attg_mae.Config("vit_small", depth=1)), []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    def network(url, path, **_):
        urls.append(url)
        torch.save(
            {
                k: v
                for k, v in model.state_dict().items()
                if not attg_mae.DECODER.match(k)
            },
            path,
        )

    usual = dict(img_size=32, mean=None, std=None)
    args = SimpleNamespace(
        backbone="dino_vits16", method="tokencut", **vars(cut_args()), **usual
    )
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    where = tmp_path / "hub" / "checkpoints" / "dino_deitsmall16_pretrain.pth"
    with pytest.raises(
        ValueError, match=f"https://dl.fbaipublicfiles.com/dino/.*{where}.*--backbone"
    ):
        object_discovery.vit(args, "cpu")
    monkeypatch.setattr(torch.hub, "download_url_to_file", network)
    for _ in range(2):
        maps, size, grid, _ = object_discovery.vit(args, "cpu")
    assert len(urls) == 1
    assert grid == (2, 2)
    assert maps((rand(1, 3, 32, 32) * 255).byte()).shape == (1, 2, 2)
    where.write_bytes(where.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged.*delete"):
        object_discovery.vit(args, "cpu")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    cnn = {"method": "gradcam", "backbone": "resnet50", "weights": None, "grid": None}
    args = SimpleNamespace(**cnn, **usual)
    with pytest.raises(
        ValueError,
        match="resnet50-.*pth could not be downloaded.*hub/checkpoints.*--weights",
    ):
        object_discovery.cnn(args, "cpu")


@pytest.fixture
def few(tmp_path):
    """Three pictures; files that are no weights."""
    colourful(tmp_path, 3)
    (tmp_path / "empty").mkdir()
    torch.save(
        torchvision.models.get_model("mobilenet_v2").state_dict(),
        tmp_path / "mobilenet.pt",
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "mobilenet.pt").read_bytes()[:5000])
    discover(tmp_path, tmp_path / "old.npy")
    colourful(tmp_path / "more", 4)
    return tmp_path


DISCOVERY_ERRORS = [  # flags, what the text names
    ("--data empty", "--data empty no pictures"),
    ("--backbone none.pt", "--backbone none.pt no such file dino_vits16"),
    ("--backbone cut.pt", "cut.pt damaged"),
    ("--backbone mobilenet.pt", "mobilenet.pt no ViT encoder"),
    (
        "--method gradcam --weights mobilenet.pt",
        "--weights mobilenet.pt not torchvision's resnet50",
    ),
    ("--method gradcam --weights cut.pt", "cut.pt damaged"),
    ("--method dino --backbone resnet50", "--backbone resnet50 gradcam tokencut"),
    (
        "--backbone mobilenet_v2 --weights mobilenet.pt --grid 7",
        "--grid mobilenet_v2 does not use",
    ),
    ("--sign border --method dino", "--sign dino does not use"),
    ("--objects 2 --method gradcam", "--objects gradcam does not use"),
    ("--objects 0", "--objects 0 1"),
    ("--objects 2 --cut -0.1", "--objects 2 --cut 0"),
    ("--method gradcam --backbone pixels", "--backbone pixels resnet50 mobilenet_v2"),
    (
        "--method gradcam --backbone mobilenet_v2 --weights mobilenet.pt --img_size 16",
        "--img_size 16 32",
    ),
    ("--method dino --backbone pixels", "pixels tokencut"),
    ("--method masks", "--masks DIR"),
    ("--method masks --masks nowhere", "--masks nowhere no such folder"),
    ("--method masks --masks empty", "--masks empty 00.png .png"),
    ("--img_size 40", "--img_size 40 16"),
    ("--masks empty", "--masks no picture has a mask"),
    ("--cut 1.5", "--cut 1.5 from -1 to 1"),
    ("--cut nan", "--cut nan from -1 to 1"),
    ("--show -1", "--show -1 negative"),
    ("--workers -1", "--workers -1 negative"),
    ("--max_pixels 0", "--max_pixels 0 least"),
    ("--img_size 1000000000", "--img_size 1000000000 8192"),
    ("--std 1 1 inf", "--std inf"),
    ("--grid 7", "--grid pixels does not use"),
    ("--method dino --grid 7", "--grid dino does not use"),
    ("--mean 0 0 0", "--mean pixels"),
    ("--img_size 0", "--img_size 0 1"),
    ("--out data/m.npy", "--out data/m.npy among"),
    ("--out m.pt", "--out m.pt .npy"),
    ("--out cut.pt/m.npy", "--out cut.pt/m.npy cannot be written another"),
    ("--binary --method dino", "--binary dino"),
    ("--data more/data --out old.npy", "--out old.npy other data delete another"),
    ("--batch_size 0", "--batch_size 0"),
    ("--cut 0.4 --out old.npy", "--out old.npy cut 0.2, not 0.4 delete another"),
    ("--device gpu", "--device gpu"),
    ("--weights cut.pt", "--weights resnet50 mobilenet_v2 --backbone"),
    ("--with none.npy", "--with none.npy no such .npy file"),
    ("--with cut.pt", "--with cut.pt no such .npy file"),
    ("--max_pixels 9 --out n.npy", "no picture --max_pixels data/00.png"),
]


@pytest.mark.parametrize(
    ("flags", "words"), DISCOVERY_ERRORS, ids=[x[0] for x in DISCOVERY_ERRORS]
)
def test_discovery_errors(flags, words, few, monkeypatch):
    monkeypatch.chdir(few)
    before = (few / "old.npy").read_bytes()
    usual = {
        "--data": "data",
        "--backbone": "pixels",
        "--out": "m.npy",
        "--device": "cpu",
        "--img_size": "96",
    }
    given = flags.split()
    for method, unused in (
        ("gradcam", "--backbone"),
        ("dino", "--backbone"),
        ("masks", "--backbone --img_size"),
    ):
        usual = {
            k: v
            for k, v in usual.items()
            if method not in given or k not in unused.split()
        }
    argv = [x for pair in usual.items() if pair[0] not in given for x in pair]
    with pytest.raises((ValueError, OSError)) as error:
        object_discovery.main(argv + given)
    assert [w for w in words.split() if w not in str(error.value)] == []
    assert len(str(error.value).split()) >= 5
    assert (few / "old.npy").read_bytes() == before


def test_one_pixel_picture_has_a_flat_map(tmp_path):
    colourful(tmp_path, 2)
    Image.new("RGB", (1, 1)).save(tmp_path / "data" / "99.png")
    assert discover(tmp_path, tmp_path / "m.npy")["manifest"]["flat"] == [2]


def test_maps_of_a_data_set_of_ones_own(tmp_path, monkeypatch, capsys):
    """Those of the files; lines tell how far it is where there is no bar."""
    colourful(tmp_path, 6)
    monkeypatch.setattr(object_discovery, "LINE_EVERY", 0)
    discover(tmp_path, tmp_path / "files.npy")
    lines = [x for x in capsys.readouterr().out.splitlines() if "a second" in x]
    assert [line.split(" maps")[0] for line in lines] == ["4 of 6", "6 of 6"]
    files = open_data(str(tmp_path / "data"))
    own = [files.read(i) for i in range(6)]
    flags = ["--backbone", "pixels", "--img-size", "96", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "own.npy"), "--data"]
    made = object_discovery.main([*flags, "mine"], own)["maps"]
    assert (np.load(made) == np.load(tmp_path / "files.npy")).all()
    with pytest.raises(ValueError, match="data: needs a name of its own"):
        object_discovery.main([*flags, "toy"], own)


def test_failed_pictures_are_named_in_ten_lines(tmp_path, capsys):
    colourful(tmp_path, 14, bad=range(1, 13))
    discover(tmp_path, tmp_path / "m.npy")
    said = capsys.readouterr().out
    for i in range(14):
        line = f"failed, unreadable or not finite: {tmp_path}/data/{i:02d}.png\n"
        assert (line in said) == (1 <= i <= 10)
    assert f"all 12 are in {tmp_path}/m.json; delete it" in said


def test_a_grey_backbone_sees_grey_pictures(tmp_path):
    colourful(tmp_path, 3)
    grey = {"in_chans": 1, "mean": (0.5,), "std": (0.25,)}
    model = attg_mae.build_model(attg_mae.Config(**SMALL | grey))
    config = asdict(model.cfg)
    file = tmp_path / "grey.pt"
    attg_mae.save_checkpoint(file, model=model.state_dict(), config=config)
    flags = ["--backbone", file, "--data", tmp_path / "data", "--device", "cpu"]
    flags += ["--method", "dino", "--out", tmp_path / "m.npy"]
    with pytest.raises(ValueError, match="--mean: 3 values, but .* of 1 channels"):
        object_discovery.main([*map(str, flags), "--mean", "0", "0", "0"])
    object_discovery.main([*map(str, flags)])
    picture = Image.open(tmp_path / "data" / "01.png").convert("L")
    picture = np.array(picture.resize((32, 32), Image.Resampling.BICUBIC))
    imgs = (torch.from_numpy(picture)[None, None] / 255 - 0.5) / 0.25
    q, k, _ = model.last_qkv(imgs)
    want = kernel.normalize_map(object_discovery.class_attention(q, k))
    got = torch.from_numpy(np.load(tmp_path / "m.npy")[1].astype(np.float32))
    torch.testing.assert_close(got.flatten(), want[0], atol=2e-3, rtol=0)
    assert got.std() > 0.1
