"""
attg/export.py against Hugging Face's own models: the same features, loss and
predictions, in memory and read again from the folder that it writes; and against timm.
"""

from dataclasses import asdict

import pytest
import torch
from PIL import Image

import attg_mae
from attg.export import timm_arguments, to_hugging_face
from attg.images import eval_view
from attg.weights import encoder_config, load_weights, read_weights
from tests.helpers import close, encoder_only, noise, rand, randn, shake, transformers


def saved(path, keep=dict, **settings):
    """(model, its file) of random weights; keep(state dict): what is in the file."""
    cfg = attg_mae.Config(depth=3, **settings)
    model = shake(attg_mae.build_model(cfg), 0.1)
    weights = keep(model.state_dict())
    attg_mae.save_checkpoint(path, model=weights, config=asdict(cfg))
    return model, path


@pytest.mark.parametrize("size", [32, (16, 40)])
def test_encoder_is_a_vit_model(size, tmp_path):
    hf = transformers()
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    path = tmp_path / "encoder.pt"
    model, path = saved(path, encoder_only, img_size=size, **statistics)
    imgs = randn(3, 3, *model.cfg.size)
    want = model.forward_features(imgs)
    ours = to_hugging_face(path, tmp_path / "folder")
    assert isinstance(ours, hf.ViTModel) and not ours.training
    read = hf.ViTModel.from_pretrained(tmp_path / "folder", add_pooling_layer=False)
    # What it wrote is what load_encoder reads.
    again = attg_mae.load_encoder(tmp_path / "folder" / "model.safetensors")
    assert again.cfg.size == model.cfg.size and again.cfg.std == (0.4, 0.5, 0.6)
    outputs = [theirs(imgs).last_hidden_state for theirs in (ours, read.eval())]
    for got in (*outputs, again.forward_features(imgs)):
        assert close(got, want, 1e-5) and not close(got, want.roll(1, 1), 1e-1)

    pixels = torch.randint(256, (*model.cfg.size, 3), dtype=torch.uint8)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    got = processor(Image.fromarray(pixels.numpy()), return_tensors="pt").pixel_values
    assert close(got, model.normalize(pixels.permute(2, 0, 1)[None]), 1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_whole_model_is_a_vit_mae(norm_pix, tmp_path):
    hf = transformers()
    settings = {"img_size": 16, "mask_ratio": 0.6, "norm_pix": norm_pix}
    model, path = saved(tmp_path / "last.pt", **settings)
    imgs, order = randn(4, 3, 16, 16), rand(4, 16)
    loss, pred, mask = model(imgs, noise=order)
    ours = to_hugging_face(path, tmp_path / "folder")
    read = hf.ViTMAEForPreTraining.from_pretrained(tmp_path / "folder")
    for theirs in (ours, read.eval()):
        got = theirs(imgs, noise=order)
        assert got.mask.equal(mask) and close(got.logits, pred, 1e-5)
        assert close(got.loss, loss, 1e-5)
    assert not close(got.loss, model(imgs)[0], 1e-3)
    # And back from the folder, with the decoder
    again = attg_mae.MAE(model.cfg)
    weights = read_weights(tmp_path / "folder" / "model.safetensors")
    encoder_config(attg_mae.Config, weights)
    assert load_weights(again, weights) == "all weights loaded"
    assert close(again(imgs, noise=order)[1], pred, 1e-5)


def test_export_refuses_other_files(tmp_path):
    torch.save(attg_mae.MAE(attg_mae.Config()).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not written by this project"):
        to_hugging_face(tmp_path / "other.pth")
    _, path = saved(tmp_path / "wide.pt", img_size=(16, 32))
    with pytest.raises(ValueError, match=r"wide.pt: .*squares, not \(16, 32\)"):
        to_hugging_face(path)


def test_timm_takes_the_arguments_of_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": (56, 112), "in_chans": 1, "mean": (0.4,), "std": (0.2,)}
    model, path = saved(tmp_path / "encoder.pt", encoder_only, **sizes)
    peer = timm.create_model(**timm_arguments(model.cfg), checkpoint_path=path).eval()
    imgs = randn(2, 1, 56, 112)
    assert close(peer.forward_features(imgs), model.forward_features(imgs), 1e-5)
    images = timm.data.resolve_data_config({}, model=peer)
    want = {"mean": (0.4,), "std": (0.2,), "input_size": (1, 56, 112)}
    want |= {"interpolation": "bicubic", "crop_mode": "center"}
    assert images.pop("crop_pct") == pytest.approx(0.875, rel=0.01) and images == want
    assert not {"license", "hf_hub_id", "tag"} & {*peer.pretrained_cfg}
    # timm's transform is the evaluation view of this project. (Up to timm 1.0.12, of square
    # sizes only.)
    image = noise(200, 160).convert("L")
    for side in (56, 96):  # 7/8 of 109.7 pixels, which is 110 here
        cfg = attg_mae.Config(**sizes | {"img_size": side, "patch_size": 8})
        view = model.normalize(eval_view(image, cfg.size)[0][None])[0]
        images["input_size"] = (1, side, side)
        crop_pct = timm_arguments(cfg)["pretrained_cfg_overlay"]["crop_pct"]
        for value, same in ((crop_pct, True), (0.9, False)):
            got = timm.data.create_transform(**images, crop_pct=value)(image)
            assert close(got, view, 1e-5) == same
