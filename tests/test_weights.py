"""
Files of weights, from here and elsewhere, and what is refused; checkpoints.
"""

import argparse
import copy
import os
import re
import sys
from dataclasses import asdict

import pytest
import torch

import attg_mae
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


def layouts():
    """What others' files hold -> each of them the weights of timm_model()."""
    state = timm_model().state_dict()
    args = argparse.Namespace(model="mae_vit_base_patch16", lr=None)
    cfg = attg_mae.Config(
        img_size=32, patch_size=8, width=64, depth=2, heads=4, decoder_depth=1
    )
    full = attg_mae.build_model(cfg).state_dict() | state
    head = {"head.weight": randn(10, 64), "head.bias": randn(10)}
    dino = {f"backbone.{k}": v for k, v in state.items()} | {
        "head.mlp.0.weight": randn(9, 64)
    }
    dino |= {"head.last_layer.weight_g": randn(9, 1)}
    wrapped = {f"module.{k}": v for k, v in dino.items()}
    return {
        "mae encoder": {"model": state},
        "mae full": {"model": full},
        "mae training": {
            "model": full,
            "optimizer": {"state": {}},
            "epoch": 3,
            "scaler": {},
            "args": args,
        },
        "timm or dino backbone": state,
        "timm with head": state | head,
        "module": {f"module.{k}": v for k, v in state.items()},
        "dino training": {
            "student": wrapped,
            "teacher": dino,
            "optimizer": {"state": {}},
            "epoch": 9,
            "args": args,
        },
        "dino module": {"teacher": wrapped},
    }


@pytest.mark.parametrize("layout", layouts())
def test_load_encoder_of_mae_timm_dino(layout, tmp_path):
    content, imgs = layouts()[layout], randn(2, 3, 32, 32)
    want = timm_model().forward_features(imgs)
    torch.save(content, tmp_path / "weights.pth")
    for source in (
        tmp_path / "weights.pth",
        str(tmp_path / "weights.pth"),
        content,
        copy.deepcopy(content),
    ):
        model = attg_mae.load_encoder(source, heads=4)
        assert not model.training and close(model.forward_features(imgs), want, 1e-5)
    assert not close(
        attg_mae.load_encoder(content, heads=2).forward_features(imgs), want, 1e-3
    )
    assert not close(model.forward_features(imgs.flip(1)), want, 1e-3)


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)]
)
def test_load_encoder_knows_the_heads_of_standard_widths(width, heads):
    ref, imgs = timm_model(width, 1, heads), randn(1, 3, 32, 32)
    assert close(
        attg_mae.load_encoder(ref.state_dict()).forward_features(imgs),
        ref.forward_features(imgs),
        1e-5,
    )


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
@pytest.mark.parametrize(
    "kind",
    ["ViTModel", "ViTForImageClassification", "ViTMAEModel", "ViTMAEForPreTraining"],
)
def test_load_encoder_of_hugging_face(kind, saved, tmp_path):
    mae = "MAE" in kind
    ref = shake(hf_model(kind, **({"mask_ratio": 0.0} if mae else {})))
    imgs = randn(2, 3, 32, 32)
    # Writes the names of the hub, which differ from those in memory
    ref.save_pretrained(tmp_path)
    state = ref.state_dict()
    if saved:
        safetensors = pytest.importorskip("safetensors.torch")
        state = safetensors.load_file(tmp_path / "model.safetensors")
    unmasked = {"noise": torch.arange(64.0).expand(2, -1)} if mae else {}
    want = getattr(ref, "vit", ref)(imgs, **unmasked).last_hidden_state
    got = attg_mae.load_encoder(state, heads=4).forward_features(imgs)
    assert close(got, want, 1e-5) and not close(got.roll(1, 1), want, 1e-1)


def test_safetensors_are_read_where_the_package_is(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path, state = tmp_path / "model.safetensors", timm_model().state_dict()
    safetensors.save_file(state, path)
    imgs = randn(2, 3, 32, 32)
    model = attg_mae.load_encoder(path, heads=4)
    want = timm_model().forward_features(imgs)
    assert close(model.forward_features(imgs), want, 1e-5)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors: damaged, or no safetens"):
        attg_mae.load_encoder(path, heads=4)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ValueError, match="model.safetensors: .* pip install safetensors"
    ):
        attg_mae.load_encoder(path, heads=4)


def test_messages_about_files_tell_them_apart(tmp_path):
    """None repeats PyTorch's advice to load the file without its check."""
    ran, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"model": Evil(ran)}, path)
    with pytest.raises(ValueError) as error:
        attg_mae.load_checkpoint(path)
    assert "evil.pth: holds io.open, which is no tensor" in str(error.value)
    texts = [str(error.value)]
    torch.save({"model": randn(500)}, path)
    whole = path.read_bytes()
    cases = (
        (whole[:700], "damaged, or no file of weights"),
        (b"", "damaged"),
        (b"<html>not found</html>", "damaged, or no file of weights"),
    )
    for content, words in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"evil.pth: {words}") as error:
            attg_mae.load_checkpoint(path)
        texts.append(str(error.value))
    for missing, words in ((tmp_path, "a folder"), (tmp_path / "no", "no such file")):
        with pytest.raises(ValueError, match=words) as error:
            attg_mae.load_checkpoint(missing)
        texts.append(str(error.value))
    assert not [text for text in texts if "weights_only" in text or "\n" in text]
    assert not ran.exists()


def test_load_encoder_of_this_project(tmp_path):
    cfg = attg_mae.Config(
        img_size=(32, 48), norm_pix=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    model, imgs = shake(attg_mae.build_model(cfg)), randn(2, 3, 32, 48)
    parts = dict(
        model=model.state_dict(), optimizer={}, scaler={}, step=7, config=asdict(cfg)
    )
    attg_mae.save_checkpoint(tmp_path / "0.pt", **parts)
    torch.save({k: parts[k] for k in ("model", "config")}, tmp_path / "1.pt")
    torch.save(
        {"model": encoder_only(parts["model"]), "config": parts["config"]},
        tmp_path / "2.pt",
    )
    for i in range(3):
        got = attg_mae.load_encoder(tmp_path / f"{i}.pt")
        assert got.forward_features(imgs).equal(model.forward_features(imgs))
        assert tuple(got.cfg.mean) == cfg.mean and tuple(got.cfg.std) == cfg.std


def test_load_encoder_at_another_size():
    # sin-cos is computed anew
    own = attg_mae.build_model(attg_mae.Config())
    same = attg_mae.build_model(attg_mae.Config(img_size=(40, 64)))
    big = attg_mae.load_encoder(
        {"model": own.state_dict(), "config": asdict(own.cfg)}, img_size=(40, 64)
    )
    assert big.pos_embed.equal(same.pos_embed)
    assert big.forward_features(randn(1, 3, 40, 64)).shape == (1, 161, 128)
    ref, imgs = timm_model(img_size=(32, 64)), randn(2, 3, 32, 64)
    got = attg_mae.load_encoder(ref.state_dict(), heads=4, img_size=(32, 64))
    assert close(got.forward_features(imgs), ref.forward_features(imgs), 1e-5)
    # A learned table of another size is no reason to guess
    for kw in ({}, {"img_size": (64, 32 * 3)}):
        with pytest.raises(ValueError, match="pos_embed"):
            attg_mae.load_encoder(ref.state_dict(), heads=4, **kw)


def test_learned_positions_are_resized_as_by_hugging_face():
    hf = transformers()
    kw = dict(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=256,
        patch_size=8,
    )
    ref = shake(hf.ViTModel(hf.ViTConfig(image_size=32, **kw))).eval()
    for size in ((48, 48), (32, 80)):
        model = attg_mae.load_encoder(ref.state_dict(), heads=2, img_size=size)
        imgs = randn(2, 3, *size)
        want = ref.embeddings(imgs, interpolate_pos_encoding=True)
        assert close(model.embed(model.patchify(imgs)), want, 1e-5)
        assert not close(
            model.embed(model.patchify(imgs)) - model.pos_embed, want, 1e-2
        )


def refused(ran=""):
    """name: content of a file, and what the error must name beside the file."""
    state, part = timm_model().state_dict(), hf_model("ViTModel").state_dict()
    # As transformers 5 and 4 name it.
    first_key = re.compile(r"0\.attention\.(k_proj|attention\.key)")
    return {
        "resnet": (
            {"layer1.0.conv1.weight": randn(4, 4, 3, 3), "fc.bias": randn(4)},
            "layer1.0.conv1.weight",
        ),
        "numbers": ({"weird": 3}, "weird"),
        "nested": ({"net": {"cls_token": randn(1, 1, 8)}}, "net"),
        "sequence": ([1, 2], "list"),
        "evil": ({"model": state, "args": Evil(ran)}, "open"),
        "part": (
            {k: v for k, v in state.items() if k != "blocks.1.mlp.fc2.weight"},
            "blocks.1.mlp.fc2.weight",
        ),
        "more": (state | {"surplus": randn(3)}, "surplus"),
        "stray key": (
            state | {"blocks.0.attn.k.weight": randn(3, 3)},
            "unexpected blocks.0.attn.k.weight",
        ),
        "shape": (state | {"blocks.0.norm1.weight": randn(3)}, "blocks.0.norm1.weight"),
        "hf_part": (
            {k: v for k, v in part.items() if not first_key.search(k)},
            "blocks.0.attn",
        ),
    }


@pytest.mark.parametrize("name", refused())
def test_load_encoder_refuses_what_it_does_not_know(name, tmp_path):
    path, ran = tmp_path / f"{name}.pth", tmp_path / "ran"
    content, says = refused(ran)[name]
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(path.name)) as error:
        attg_mae.load_encoder(path, heads=4)
    assert says in str(error.value).replace(str(path), "") and not ran.exists()
    if name == "evil":
        torch.load(path, weights_only=False)["args"].close()
        assert ran.exists()  # it would have run
        with pytest.raises(ValueError, match="heads"):
            attg_mae.load_encoder(content["model"])
        path.write_text("not a checkpoint")
        with pytest.raises(ValueError, match=path.name):
            attg_mae.load_encoder(path)


def test_checkpoint_round_trip_and_atomicity(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    model = attg_mae.build_model(attg_mae.Config())
    real = torch.save
    optimizer = torch.optim.AdamW(attg_mae.param_groups(model, 0.05))
    model(randn(2, 3, 32, 32))[0].backward()
    optimizer.step()
    parts = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        step=3,
        config=asdict(model.cfg),
    )
    parts["scaler"] = {"scale": 65536.0}

    def same(a, b):
        if isinstance(a, dict | list | tuple):
            items = a.items() if isinstance(a, dict) else enumerate(a)
            return (
                type(a) is type(b)
                and len(a) == len(b)
                and all(same(v, b[k]) for k, v in items)
            )
        return (
            a.equal(b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b
        )

    attg_mae.save_checkpoint(path, **parts)
    assert same(attg_mae.load_checkpoint(path), parts)
    plain = torch.load(path, weights_only=True)
    assert plain.pop("checksums") and same(plain, parts)
    assert not same(parts | {"step": 4}, parts)
    assert not same(parts | {"model": {}}, parts)
    old = path.read_bytes()

    # Breaks after a part is written, as on a full disk
    def half(obj, file, *args, **kw):
        real({"half": randn(1000)}, file, *args, **kw)
        raise RuntimeError("PytorchStreamWriter failed writing file")

    def full(*args):
        raise OSError("no space left on device")

    for owner, name, broken in ((torch, "save", half), (os, "replace", full)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(OSError, match=r"last\.pt"):
                attg_mae.save_checkpoint(path, **parts | {"step": 4})
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    attg_mae.save_checkpoint(path, **parts | {"step": 4})
    assert attg_mae.load_checkpoint(path)["step"] == 4
    path.write_bytes(old[: len(old) // 2])
    with pytest.raises(ValueError, match=r"last\.pt"):
        attg_mae.load_checkpoint(path)
