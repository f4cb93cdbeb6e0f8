"""
attg/export.py against Hugging Face's own models: the same features, loss and
predictions, in memory and read again from the folder that they write.
"""

import re
from dataclasses import asdict

import pytest
import torch

import attg_mae
from attg.export import to_hugging_face
from tests.helpers import close, encoder_only, rand, randn, shake, transformers


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
    model, path = saved(tmp_path / "encoder.pt", encoder_only, img_size=size)
    imgs = randn(3, 3, *model.cfg.size)
    want = model.forward_features(imgs)
    ours = to_hugging_face(path)
    assert isinstance(ours, hf.ViTModel) and not ours.training
    ours.save_pretrained(tmp_path / "folder")
    read = hf.ViTModel.from_pretrained(tmp_path / "folder", add_pooling_layer=False)
    for theirs in (ours, read.eval()):
        got = theirs(imgs).last_hidden_state
        assert close(got, want, 1e-5) and not close(got, want.roll(1, 1), 1e-1)
    for name, weights in theirs.named_parameters():
        # Their names before and since transformers 5.
        if re.search(r"2\.attention\.(v_proj|attention\.value)\.weight", name):
            weights.data *= 1.01
    assert not close(theirs(imgs).last_hidden_state, want, 1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_whole_model_is_a_vit_mae(norm_pix, tmp_path):
    hf = transformers()
    settings = {"img_size": 16, "mask_ratio": 0.6, "norm_pix": norm_pix}
    model, path = saved(tmp_path / "last.pt", **settings)
    imgs, order = randn(4, 3, 16, 16), rand(4, 16)
    loss, pred, mask = model(imgs, mask_ratio=0.6, noise=order)
    ours = to_hugging_face(path)
    ours.save_pretrained(tmp_path / "folder")
    read = hf.ViTMAEForPreTraining.from_pretrained(tmp_path / "folder")
    for theirs in (ours, read.eval()):
        got = theirs(imgs, noise=order)
        assert got.mask.equal(mask) and close(got.logits, pred, 1e-5)
        assert close(got.loss, loss, 1e-5)
    assert not close(got.loss, model(imgs, mask_ratio=0.6)[0], 1e-3)
    # And back
    again = attg_mae.load_encoder(read.state_dict(), heads=model.cfg.heads)
    assert close(again.forward_features(imgs), model.forward_features(imgs), 1e-5)


def test_export_refuses_files_of_others(tmp_path):
    torch.save(attg_mae.MAE(attg_mae.Config()).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not written by this project"):
        to_hugging_face(tmp_path / "other.pth")
