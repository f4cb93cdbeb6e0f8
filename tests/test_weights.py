"""Weights of other code bases, what is refused, and checkpoint files."""

import argparse
import re
import sys
from dataclasses import asdict

import pytest
import torch

import attg_mae
from attg.weights import HEADS
from tests.helpers import (
    Evil,
    close,
    encoder_only,
    hf_model,
    randn,
    shake,
    timm_model,
    transformers,
)

# -- Layouts of other code bases -------------------------------------------------------


def layouts():
    """{name: content of a file that holds the weights of timm_model()}."""
    state = timm_model().state_dict()
    args = argparse.Namespace(model="mae_vit_base_patch16", lr=None)
    cfg = attg_mae.Config(
        img_size=32, patch_size=8, width=64, depth=2, heads=4, decoder_depth=1
    )
    full = attg_mae.build_model(cfg).state_dict() | state
    head = {"head.weight": randn(10, 64), "head.bias": randn(10)}
    dino = {f"backbone.{k}": v for k, v in state.items()}
    dino["head.mlp.0.weight"] = randn(9, 64)
    dino["head.last_layer.weight_g"] = randn(9, 1)
    wrapped = {f"module.{k}": v for k, v in dino.items()}
    training = {"optimizer": {"state": {}}, "epoch": 3, "args": args}
    return {
        "mae encoder": {"model": state},
        "mae training": training | {"model": full, "scaler": {}},
        "timm or dino backbone": state,
        "timm with head": state | head,
        "module": {f"module.{k}": v for k, v in state.items()},
        "dino training": training | {"student": wrapped, "teacher": dino},
        "dino module": {"teacher": wrapped},
    }


@pytest.mark.parametrize("layout", layouts())
def test_load_encoder_of_mae_timm_dino(layout, tmp_path):
    content, imgs = layouts()[layout], randn(2, 3, 32, 32)
    want = timm_model().forward_features(imgs)
    torch.save(content, tmp_path / "weights.pth")
    model = attg_mae.load_encoder(str(tmp_path / "weights.pth"), heads=4)
    assert not model.training and close(model.forward_features(imgs), want, 1e-5)
    other_heads = attg_mae.load_encoder(content, heads=2)
    assert not close(other_heads.forward_features(imgs), want, 1e-3)


def test_standard_widths_have_known_heads():
    for width, heads in HEADS.items():
        assert width == 64 * heads or width == 80 * heads == 1280  # ViT-H
        ref, imgs = timm_model(width, 1, heads), randn(1, 3, 32, 32)
        got = attg_mae.load_encoder(ref.state_dict()).forward_features(imgs)
        assert close(got, ref.forward_features(imgs), 1e-5)
    with pytest.raises(ValueError, match="heads="):
        attg_mae.load_encoder(timm_model().state_dict())


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTMAEForPreTraining"])
def test_load_encoder_of_hugging_face(kind, saved, tmp_path):
    """By its names in memory and by those of its files, which differ."""
    safetensors = pytest.importorskip("safetensors.torch")
    mae = "MAE" in kind
    ref = shake(hf_model(kind, **({"mask_ratio": 0.0} if mae else {})))
    imgs = randn(2, 3, 32, 32)
    ref.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.load_file(file) if saved else ref.state_dict()
    unmasked = {"noise": torch.arange(64.0).expand(2, -1)} if mae else {}
    want = ref.vit(imgs, **unmasked).last_hidden_state
    got = attg_mae.load_encoder(state, heads=4).forward_features(imgs)
    assert close(got, want, 1e-5) and not close(got.roll(1, 1), want, 1e-1)


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path, state = tmp_path / "model.safetensors", timm_model().state_dict()
    safetensors.save_file(state, path)
    imgs = randn(2, 3, 32, 32)
    got = attg_mae.load_encoder(path, heads=4).forward_features(imgs)
    assert close(got, timm_model().forward_features(imgs), 1e-5)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        attg_mae.load_encoder(path, heads=4)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="model.safetensors: .*pip install"):
        attg_mae.load_encoder(path, heads=4)


def test_load_encoder_of_this_project(tmp_path):
    """last.pt, its parts without checksums, and encoder.pt; with their mean and std."""
    cfg = attg_mae.Config(img_size=(32, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model, imgs = shake(attg_mae.build_model(cfg)), randn(2, 3, 32, 48)
    state, config = model.state_dict(), asdict(cfg)
    parts = {"model": state, "config": config, "optimizer": {}, "scaler": {}, "step": 7}
    attg_mae.save_checkpoint(tmp_path / "0.pt", **parts)
    torch.save({"model": state, "config": config}, tmp_path / "1.pt")
    torch.save({"model": encoder_only(state), "config": config}, tmp_path / "2.pt")
    for i in range(3):
        got = attg_mae.load_encoder(tmp_path / f"{i}.pt")
        assert got.forward_features(imgs).equal(model.forward_features(imgs))
        assert tuple(got.cfg.mean) == cfg.mean and tuple(got.cfg.std) == cfg.std


# -- Positions of another grid ---------------------------------------------------------


def test_sincos_positions_are_computed_for_the_grid():
    ours = attg_mae.build_model(attg_mae.Config())
    same_size = attg_mae.build_model(attg_mae.Config(img_size=(40, 64)))
    content = {"model": ours.state_dict(), "config": asdict(ours.cfg)}
    big = attg_mae.load_encoder(content, img_size=(40, 64))
    assert big.pos_embed.equal(same_size.pos_embed)


def test_learned_positions_are_resized_as_by_hugging_face():
    hf = transformers()
    sizes = {"hidden_size": 64, "intermediate_size": 256, "patch_size": 8}
    sizes |= {"image_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.ViTConfig(**sizes)
    ref = shake(hf.ViTModel(config)).eval()
    for size in ((48, 48), (32, 80)):
        model = attg_mae.load_encoder(ref.state_dict(), heads=2, img_size=size)
        imgs = randn(2, 3, *size)
        want = ref.embeddings(imgs, interpolate_pos_encoding=True)
        got = model.embed(model.patchify(imgs))
        assert close(got, want, 1e-5) and not close(got - model.pos_embed, want, 1e-2)


def test_learned_positions_of_a_rectangle():
    ref, imgs = timm_model(img_size=(32, 64)), randn(2, 3, 32, 64)
    got = attg_mae.load_encoder(ref.state_dict(), heads=4, img_size=(32, 64))
    assert close(got.forward_features(imgs), ref.forward_features(imgs), 1e-5)
    # Their grid is not known, so they are not resized.
    for size in ({}, {"img_size": (64, 32 * 3)}):
        with pytest.raises(ValueError, match="pos_embed"):
            attg_mae.load_encoder(ref.state_dict(), heads=4, **size)


# -- What is refused -------------------------------------------------------------------


def refused(ran=""):
    """{name: (content of a file, what the error must name beside the file)}."""
    state, hf_state = timm_model().state_dict(), hf_model("ViTModel").state_dict()
    norm, fc2 = "blocks.0.norm1.weight", "blocks.1.mlp.fc2.weight"
    stray = "blocks.0.attn.k.weight"
    # The names of transformers 5 and 4.
    first_key = re.compile(r"0\.attention\.(k_proj|attention\.key)")
    keyless = {k: v for k, v in hf_state.items() if not first_key.search(k)}
    return {
        "resnet": ({"layer1.0.conv1.weight": randn(4, 4, 3, 3)}, "layer1.0.conv1"),
        "sequence": ([1, 2], "list"),
        "evil": ({"model": state, "args": Evil(ran)}, "open"),
        "missing": ({k: v for k, v in state.items() if k != fc2}, fc2),
        "surplus": (state | {"surplus": randn(3)}, "surplus"),
        "stray key": (state | {stray: randn(3, 3)}, stray),
        "shape": (state | {norm: randn(3)}, norm),
        "not a tensor": (state | {norm: 3}, norm),
        "Hugging Face without a key": (keyless, "blocks.0.attn"),
    }


@pytest.mark.parametrize("name", refused())
def test_load_encoder_refuses_other_files(name, tmp_path):
    path, ran = tmp_path / "weights.pth", tmp_path / "ran"
    content, named = refused(ran)[name]
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        attg_mae.load_encoder(path, heads=4)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert named in str(error.value).replace(str(path), "") and not ran.exists()
    if name == "evil":
        torch.load(path, weights_only=False)["args"].close()
        assert ran.exists()  # it would have run
        # PyTorch's advice to load without the check is not repeated.
        assert "weights_only" not in str(error.value)


def test_files_that_are_not_checkpoints(tmp_path):
    (tmp_path / "page").write_bytes(b"<html>not found</html>")
    for name, message in (("page", "damaged"), ("", "folder"), ("no", "no such file")):
        with pytest.raises(ValueError, match=f"{tmp_path / name}: .*{message}"):
            attg_mae.load_checkpoint(tmp_path / name)
