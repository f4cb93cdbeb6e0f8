"""
The program object_discovery.py: maps of a folder, backbones, downloads, errors.
"""

import hashlib
import json
import math
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import attg_mae
import object_discovery
from attg.datasets import open_data
from attg.kernels import normalize_map
from attg.maps import load_maps
from attg_mae import IMAGENET_MEAN
from tests.helpers import Evil, disc_images, encoder_only, rand, refused, save_encoder


def discover(folder, out, *flags, method="tokencut"):
    """The result of the program; tokencut is that of pixels."""
    usual = ["--method", method, "--data", folder / "data", "--out", out]
    usual += ["--device", "cpu", "--batch_size", 4]
    if method == "tokencut":
        usual += ["--backbone", "pixels", "--img_size", 96]
    return object_discovery.main([str(x) for x in (*usual, *flags)])


def test_maps_of_a_folder(tmp_path, capsys):
    out, masks = tmp_path / "maps" / "m.npy", ("--masks", tmp_path / "masks")
    q = discover(disc_images(tmp_path, 10, bad=[3]), out, *masks, "--show", 4)
    dataset = open_data(tmp_path / "data")
    maps, manifest = load_maps(out, dataset)
    assert maps.shape == (10, 6, 6)
    assert manifest["failed"] == [3] and not maps[3].any() and manifest["flat"] == []
    want = {"input": [96, 96], "affinity_threshold": 0.2, "sign": "border"}
    assert manifest["settings"].items() >= want.items()
    whole = dataset.read(5)[0].resize((96, 96), Image.Resampling.BICUBIC)
    imgs = torch.from_numpy(np.array(whole)).permute(2, 0, 1)[None].float()
    y = object_discovery.tokencut(object_discovery.patch_statistics(imgs, 16))
    y = object_discovery.border_sign(normalize_map(y).view(1, 6, 6))
    assert np.array_equal(maps[5], y[0].half())
    assert q["images"] == 9 and q["AUROC"] > 80 and q["IoU"] > 30 and q["CorLoc"] > 40
    printed = capsys.readouterr().out
    failed = f"failed, delete {out} to try again: {tmp_path}/data/03.png\n"
    for words in (
        "0 flat (no effect), 1 failed\n",
        failed,
        f"{q['IoU']:.2f}  {q['CorLoc']:.2f}",
    ):
        assert words in printed
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.json", "m.npy", "m.png"]
    # Nothing is done twice.
    stamp = out.stat().st_mtime_ns
    discover(tmp_path, out)
    assert out.stat().st_mtime_ns == stamp


def test_maps_from_masks(tmp_path, capsys):
    """One is missing, two are flat: of one pixel, of one color."""
    disc_images(tmp_path, 6)
    (tmp_path / "masks" / "04.png").unlink()
    for name, side in (("00.png", 1), ("01.png", 9)):
        Image.new("L", (side, side)).save(tmp_path / "masks" / name)
        color = (21 * side, 201, 7)
        Image.new("RGB", (side, side), color).save(tmp_path / "data" / name)
    flags = ("--masks", tmp_path / "masks")
    assert discover(tmp_path, tmp_path / "m.npy", *flags, method="masks") == {}
    dataset = open_data(tmp_path / "data")
    maps, manifest = load_maps(tmp_path / "m.npy", dataset)
    assert manifest["failed"] == [4] and manifest["flat"] == [0, 1]
    assert "2 flat (no effect), 1 failed" in capsys.readouterr().out
    mask = Image.open(tmp_path / "masks" / "02.png")
    want = np.asarray(mask.resize((56, 56), Image.Resampling.BOX)) / 255
    assert abs(maps[2] - want).max() < 1e-3 and want.any()
    # Corrected masks are not passed over.
    shutil.copy(tmp_path / "masks" / "03.png", tmp_path / "masks" / "02.png")
    with pytest.raises(ValueError, match="--out .*made with masks_sha256"):
        discover(tmp_path, tmp_path / "m.npy", *flags, method="masks")
    discover(tmp_path, tmp_path / "p.npy")
    assert load_maps(tmp_path / "p.npy", dataset)[1]["flat"] == [0, 1]


def test_maps_of_an_encoder(tmp_path):
    """The weights count, not the name of their file."""
    disc_images(tmp_path, 3)
    file, out = tmp_path / "encoder.pt", tmp_path / "m.npy"
    save_encoder(file)
    discover(tmp_path, out, "--backbone", file, method="dino")
    manifest = json.loads(out.with_suffix(".json").read_text())
    assert manifest["shape"] == [3, 2, 2]
    assert manifest["settings"]["mean"] == list(IMAGENET_MEAN)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["settings"]["sha256"] == sha256
    other, before = shutil.copy(file, tmp_path / "other.pt"), out.stat()
    discover(tmp_path, out, "--backbone", other, method="dino")
    assert out.stat() == before
    # A flag that is left out has another value, too.
    given = tmp_path / "heads.npy"
    discover(tmp_path, given, "--backbone", file, "--heads", 1, method="dino")
    with pytest.raises(ValueError, match="--out .*heads 1, not None"):
        discover(tmp_path, given, "--backbone", file, method="dino")
    save_encoder(other, depth=2)
    with pytest.raises(ValueError, match="--out .*sha256"):
        discover(tmp_path, out, "--backbone", other, method="dino")


def test_a_grayscale_backbone_sees_grayscale_images(tmp_path):
    """Of 16 bits, with the white that it was trained with."""
    disc_images(tmp_path, 3)
    file, photo = tmp_path / "gray.pt", tmp_path / "data" / "01.png"
    model = save_encoder(file, in_chans=1, mean=(0.5,), std=(0.25,), white=16 * 255.0)
    image = Image.open(photo).convert("L")
    Image.fromarray(np.uint16(image) * 16).save(photo)
    discover(tmp_path, tmp_path / "m.npy", "--backbone", file, method="dino")
    image = np.array(image.resize((32, 32), Image.Resampling.BICUBIC))
    image = (torch.from_numpy(image)[None, None] / 255 - 0.5) / 0.25
    want = normalize_map(object_discovery.class_attention(model, image))[0].detach()
    got = torch.from_numpy(np.load(tmp_path / "m.npy")[1]).float().flatten()
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    assert got.std() > 0.1


def test_weights_are_downloaded_once(tmp_path, monkeypatch):
    model, urls = attg_mae.build_model(attg_mae.Config("vit_small", depth=1)), []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def network(url, path, digits, **options):
        urls.append(url)
        if len(urls) == 1:
            raise urllib.error.URLError("no network")
        if "dino" not in url:
            # torchvision's names hold the first digits of the checksum.
            assert url.endswith(f"resnet50-{digits}.pth") and len(digits) == 8
            torch.save(Evil(tmp_path / "ran"), path)
        else:
            torch.save(encoder_only(model.state_dict()), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", network)
    settings = object_discovery.Settings(backbone="dino_vits16", img_size=32)
    assert object_discovery.resolve(settings).sign == "max"
    file = tmp_path / "hub" / "checkpoints" / "dino_deitsmall16_pretrain.pth"
    url = "https://dl.fbaipublicfiles.com/dino/"
    with pytest.raises(ValueError, match=f"{url}.*no network.*{file}.*--backbone"):
        object_discovery.vit(settings, "cpu")
    for _ in range(2):
        backbone = object_discovery.vit(settings, "cpu")
    assert len(urls) == 2 and backbone.grid == (2, 2)
    assert backbone.maps((rand(1, 3, 32, 32) * 255).byte()).shape == (1, 2, 2)
    settings = object_discovery.Settings(method="gradcam", backbone="resnet50")
    message = "cannot download .*Weights only load failed(.|\n)*--weights"
    with pytest.raises(ValueError, match=message):
        object_discovery.cnn(settings, "cpu")
    assert not (tmp_path / "ran").exists()  # no code of a download is executed


def test_the_default_is_the_data_set_of_the_checkpoint(tmp_path):
    data = str(disc_images(tmp_path, 3) / "data")
    save_encoder(tmp_path / "encoder.pt", data=data)
    flags = ["--out", str(tmp_path / "m.npy"), "--device", "cpu", "--backbone"]
    object_discovery.main([*flags, str(tmp_path / "encoder.pt")])
    assert len(load_maps(tmp_path / "m.npy", open_data(data))[0]) == 3
    with pytest.raises(ValueError, match="--data: missing, .*name a data set"):
        object_discovery.main([*flags, "pixels"])


PIXELS = "--backbone pixels --img_size 96"
ERRORS = {  # flags: what the message names
    "--backbone none.pt": "--backbone none.pt dino_vits16",
    "--backbone nan.pt": "nan.pt pos_embed finite",
    "--method gradcam --weights mobilenet.pt": "--weights mobilenet.pt resnet50",
    "--backbone timm:no_model": "timm:no_model",
    "--backbone timm:a --heads 3": "--heads timm:",
    "--method dino --backbone resnet50": "--backbone resnet50 checkpoint",
    "--method gradcam --backbone pixels": "--backbone pixels resnet50 mobilenet_v2",
    "--method gradcam --objects 2": "--objects gradcam",
    "--method masks --masks data --img_size 64": "--img_size masks",
    "--backbone pixels --img_size 40": "--img_size 40 32",
    "--method masks": "--masks folder",
    f"{PIXELS} --out unlike.npy --masks empty": "--masks mask",
    f"{PIXELS} --out m.pt": "--out m.pt .npy",
    f"{PIXELS} --out old.npy --data more/data": "--out old.npy other delete",
    f"{PIXELS} --out old.npy --affinity_threshold 0.4": "--out old.npy 0.2 0.4 delete",
    f"{PIXELS} --out old.npy --white 4095": "--out old.npy white None 4095 delete",
    "--backbone own.pt --out old.npy": "--out old.npy backbone pixels own.pt delete",
    f"{PIXELS} --max_pixels 9": "finite --max_pixels 00.png",
}


def test_errors(tmp_path, monkeypatch):
    """Of files that are no weights, an old map file, flags that do not fit."""
    monkeypatch.chdir(tmp_path)
    disc_images(tmp_path, 3)
    disc_images(tmp_path / "more", 4)
    (tmp_path / "empty").mkdir()
    weights = torchvision.models.get_model("mobilenet_v2").state_dict()
    torch.save(weights, "mobilenet.pt")
    save_encoder("own.pt")
    save_encoder("nan.pt", lambda model: model.pos_embed.data.fill_(math.nan))
    discover(tmp_path, "old.npy")
    before = Path("old.npy").read_bytes()
    for flags, words in ERRORS.items():
        usual = ["--device", "cpu", "--data", "data", "--out", "m.npy"]
        with refused(words):
            object_discovery.main(usual + flags.split())
        assert not list(tmp_path.glob("m.*")), flags
    assert Path("old.npy").read_bytes() == before
