"""Weights of other code bases, what is refused, and checkpoint files."""

import argparse
import json
import math
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torchvision
from hypothesis import assume, given
from hypothesis import strategies as st

import attg_mae
import eval_retrieval
from attg.backbones import load_cnn
from attg.features import pool_tokens
from attg.weights import (
    HEADS_BY_WIDTH,
    encoder_config,
    load_initial,
    load_weights,
    read_weights,
)
from tests.helpers import Evil, close, encoder_only, hf_model, randn, shake, timm_model

IMGS = randn(2, 3, 32, 32)


def same_features(model, ref, imgs=IMGS):
    """Whether all tokens are those of timm's model, and differ from swapped channels'."""
    got, want = model.forward_features(imgs), ref.forward_features(imgs)
    other = ref.forward_features(imgs.flip(1))
    return close(got, want, 1e-5) and not close(got, other, 1e-3)


def save(content, path):
    torch.save(content, path)
    return path


# -- Layouts of other code bases -------------------------------------------------------


def layouts():
    """{name: (content of a file with the weights of timm_model(), options)}."""
    state = timm_model().state_dict()
    wrong = {k: x + 1 for k, x in state.items()}
    args = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=False)
    sizes = dict(img_size=32, patch_size=8, width=64, depth=2, heads=4, decoder_depth=1)
    full = attg_mae.MAE(attg_mae.Config(**sizes)).state_dict() | state
    dino = prefixed(state, "module.backbone.")
    dino |= {"module.head.mlp.0.weight": randn(9, 64)}
    training = {"optimizer": {"state": {}}, "epoch": 3, "args": args}
    both = prefixed(state, "module.base_encoder.")
    both |= prefixed(wrong, "module.momentum_encoder.")
    callback = {"kth_value": torch.tensor(math.inf), "best_model_path": ""}
    lightning = {"callbacks": {"ModelCheckpoint": callback}, "loops": {}}
    lightning["state_dict"] = prefixed(state, "model.encoder.")
    decoder = prefixed(timm_model(width=32, heads=2).state_dict(), "decoder.")
    blocks = {key: x for key, x in decoder.items() if "patch_embed" not in key}
    names = ("projector.0.weight", "dino_head.x", "student_head.x", "fc.fc1.bias")
    heads = dict.fromkeys(names, randn(3))
    averaged = torch.optim.swa_utils.AveragedModel(timm_model()).state_dict()
    return {
        "timm": state,
        "mae training": training | {"model": full, "scaler": {}},
        "dino training": training | {"student": wrong, "teacher": dino},
        "timm EMA": {"state_dict": wrong, "state_dict_ema": state},
        "timm EMA of 2020": {"state_dict": wrong, "model_ema": state},
        "EMA": {"model": wrong, "ema": {"module": state, "updates": 3}},
        "EMA's state": {"state_dict": wrong, "ema_state_dict": state},
        "Lightning": lightning,
        "averaged": averaged,
        "i-jepa": {"encoder": wrong, "target_encoder": prefixed(state, "module.")},
        "heads": state | heads | {"head.weight": randn(10, 64)},
        "beside a network": prefixed(state, "encoder.") | blocks,
        "above a network": state | decoder,
    } | {key: {key: state} for key in ("model_state_dict", "module", "net")}


def prefixed(state, prefix):
    return {prefix + key: x for key, x in state.items()}


@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout, tmp_path, capsys):
    content = layouts()[layout]
    model = attg_mae.load_encoder(save(content, tmp_path / "a.pth"), heads=4)
    assert not model.training and same_features(model, timm_model())
    assert model.cfg.norm_pix == ("args" not in content)
    told = "a.pth: 5 weights are not used, such as projector.0.weight"
    assert (told in capsys.readouterr().out) == (layout == "heads")


def test_mae_of_lightly():
    """Whose encoder has a mask token beside that of the decoder."""
    modules = pytest.importorskip("lightly.models.modules")
    ref = timm_model()
    sizes = dict(num_patches=16, patch_size=8, embed_dim=64, decoder_embed_dim=32)
    decoder = modules.MAEDecoderTIMM(**sizes, decoder_depth=1, decoder_num_heads=2)
    encoder = modules.MaskedVisionTransformerTIMM(vit=ref)
    both = torch.nn.ModuleDict({"backbone": encoder, "decoder": decoder})
    state = shake(both).state_dict()
    assert {"backbone.mask_token", "decoder.mask_token"} <= set(state)
    assert same_features(attg_mae.load_encoder(state, heads=4), ref.eval())
    weights = read_weights(state)
    assert weights.state["mask_token"].equal(decoder.mask_token)


WORDS = st.sampled_from(
    "module model student visual backbone timm_model net vit x1".split()
)


def test_any_prefix():
    """The encoder is found below any names; two of them need --weights_prefix."""
    ref = timm_model(depth=1)
    wrong = {key: x + 1 for key, x in ref.state_dict().items()}

    @given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=2), st.booleans())
    def check(words, others, twice):
        start = "".join(f"{word}." for word in words)
        content, options = prefixed(ref.state_dict(), start), {"heads": 4}
        if twice:
            content |= prefixed(wrong, "".join(f"{word}." for word in ["a", *others]))
        if twice and words:
            message = f"networks .*{re.escape(start)}.*--weights_prefix"
            with pytest.raises(ValueError, match=message):
                attg_mae.load_encoder(content, **options)
            options["weights_prefix"] = start.rstrip(".")
        model = attg_mae.load_encoder(content, **options)
        assert model.norm.bias.equal(ref.norm.bias)
        assert model.blocks[0].attn.qkv.weight.equal(ref.blocks[0].attn.qkv.weight)

    check()


def test_entries_are_chosen_and_told(capsys):
    ref = timm_model()
    content = {"state_dict": ref.state_dict(), "state_dict_ema": {"pos_embed": 3}}
    content["state_dict_ema"] |= {k: x + 1 for k, x in ref.state_dict().items()}
    attg_mae.load_encoder(content, heads=4)
    assert "takes state_dict_ema of ['state_dict', 'state_d" in capsys.readouterr().out
    model = attg_mae.load_encoder(content, heads=4, weights_key="state_dict")
    assert same_features(model, ref) and "takes" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--weights_key x: .*state_dict_ema"):
        attg_mae.load_encoder(content, weights_key="x")
    # Of a callback of Lightning.
    content["callbacks"] = {"EMA": {"decay": 0.9, "ema": content.pop("state_dict")}}
    content["optimizer"] = {"state": {0: {"exp_avg": randn(3, 3)}}}
    attg_mae.load_encoder(content, heads=4)
    assert "of ['state_dict_ema', 'callbacks']; see" in capsys.readouterr().out
    model = attg_mae.load_encoder(content, heads=4, weights_key="callbacks")
    assert same_features(model, ref)


def test_heads_are_a_guess(capsys):
    assert (
        all(n == 64 * HEADS_BY_WIDTH[n] for n in HEADS_BY_WIDTH if n != 1280)
        and HEADS_BY_WIDTH[1280] == 16
    )
    ref = timm_model(384, 1, 6)
    assert same_features(attg_mae.load_encoder(ref.state_dict()), ref)
    assert ": 6 heads, a guess" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--heads"):
        attg_mae.load_encoder(timm_model().state_dict())


FILES = {"file": ("model.safetensors", "10MB")}
FILES["shards"] = ("model.safetensors.index.json", "1MB")


@pytest.mark.parametrize("saved", ["in memory", *FILES])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTMAEForPreTraining"])
def test_load_encoder_of_hugging_face(kind, saved, tmp_path, capsys):
    """By its names in memory and by those of its files, with what config.json tells."""
    pytest.importorskip("safetensors.torch")
    mae = "MAE" in kind
    # In memory, nothing tells eps.
    options = {"layer_norm_eps": 1e-6 if saved == "in memory" else 0.1}
    options |= {"mask_ratio": 0.0} if mae else {"qkv_bias": False}
    ref = shake(hf_model(kind, **options))
    unmasked = {"noise": torch.arange(64.0).expand(2, -1)} if mae else {}
    want = ref.vit(IMGS, **unmasked).last_hidden_state
    if saved == "in memory":
        model = attg_mae.load_encoder(ref.state_dict(), heads=4)
    else:
        name, size = FILES[saved]
        ref.save_pretrained(tmp_path, max_shard_size=size)
        images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
        model = attg_mae.load_encoder(tmp_path / name)
        assert model.cfg.mean == (0.1, 0.2, 0.3) and model.cfg.std == (0.4, 0.5, 0.6)
        assert model.cfg.norm_pix is not mae  # Hugging Face's default is plain pixels
        assert "a guess" not in capsys.readouterr().out
    got = model.forward_features(IMGS)
    assert close(got, want, 1e-5) and not close(got.roll(1, 1), want, 1e-1)


def test_settings_of_hugging_face_are_checked(tmp_path):
    hf_model("ViTModel").save_pretrained(tmp_path)
    file, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(file.read_text())
    for change, named in (
        ({"num_attention_heads": 5}, "heads 5"),
        ({"hidden_size": 256}, "width 256"),
        ({"image_size": 64}, "pos_embed"),
        ({"hidden_act": "relu"}, "config.json: hidden_act relu"),
        ({"layer_norm_eps": "small"}, "config.json: .*layer_norm_eps small"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"{tmp_path}.*{named}"):
            attg_mae.load_encoder(path)
    for text in ("[]", "{", "[" * 10**5):
        file.write_text(text)
        with pytest.raises(ValueError, match="config.json: "):
            attg_mae.load_encoder(path)


def test_damaged_indices_of_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content, named in (
        ({}, "weight_map"),
        ({"weight_map": {"x": "../../a.safetensors"}}, "a.safetensors: no such file"),
        ({"weight_map": {"x": "b.pth"}}, "index.json: no such network"),
    ):
        torch.save({"y": randn(1)}, tmp_path / "b.pth")
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=named):
            attg_mae.load_encoder(index)


def test_damaged_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"damaged")
    pytest.importorskip("safetensors.torch")
    for message in ("damaged", ".*pip install"):
        with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
            attg_mae.load_encoder(path, heads=4)
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)


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


def test_settings_must_be_those_of_the_weights(tmp_path):
    """They are refused before anything of their size is allocated."""
    model = attg_mae.MAE(attg_mae.Config(depth=1))
    parts, config = {"model": model.state_dict()}, asdict(model.cfg)
    for key, value, words in (
        ("depth", 10**9, "--depth 1000000000"),
        ("depth", 2, "depth 2, its weights 1"),
        ("width", 32768, "width 32768, its weights 128"),
        ("img_size", 8192, "pos_embed"),
        ("data", ["x"], "--data"),
    ):
        path = save(parts | {"config": config | {key: value}}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"{path}: .*{words}"):
            attg_mae.load_encoder(path)


def test_fine_tuned_encoders_normalize_the_mean(monkeypatch):
    """As timm does with global_pool="avg"."""
    ref = timm_model(global_pool="avg", num_classes=5)
    content = {"model": ref.state_dict()}
    model = attg_mae.load_encoder(content, heads=4)
    pooled = ref.forward_head(ref.forward_features(IMGS), pre_logits=True)
    assert close(pool_tokens(model, model.forward_features(IMGS))[1], pooled, 1e-5)
    monkeypatch.setattr(eval_retrieval, "load_photograph", lambda imgs, *_: imgs)
    model.normalize = lambda imgs: imgs
    features = eval_retrieval.photograph_features(model, IMGS.split(1), 32, "cpu")
    assert close(features[1], pooled, 1e-5)
    # Pre-training continues with a fresh norm of each token.
    weights = read_weights(content)
    weights.grid = (4, 4)
    mae = attg_mae.MAE(model.cfg)
    message = load_weights(mae, weights)
    assert "norm" in message and "decoder" in message and "head" in message
    assert mae.norm.weight.equal(torch.ones(64))
    assert mae.blocks[1].mlp.fc2.bias.equal(ref.blocks[1].mlp.fc2.bias)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_other_channels(channels):
    ref = timm_model(in_chans=channels)
    model = attg_mae.load_encoder(ref.state_dict(), heads=4)
    imgs = randn(2, channels, 32, 32)
    assert close(model.forward_features(imgs), ref.forward_features(imgs), 1e-5)
    white = torch.full((1, channels, 32, 32), 255, dtype=torch.uint8)
    want = torch.full(white.shape, 0.551 / 0.226)
    assert close(model.normalize(white), want, 1e-5)
    with pytest.raises(ValueError, match="imgs: got torch.float32; pass uint8"):
        model.normalize(white / 255)  # as ToTensor gives them


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_cnn_backbones(name, tmp_path):
    """With 7 classes or no classifier, below any prefix, equal to torchvision's own."""
    torch.manual_seed(0)
    ref = torchvision.models.get_model(name, num_classes=7).eval()
    head = "fc." if name == "resnet50" else "classifier."
    state, imgs = ref.state_dict(), randn(2, 3, 64, 64)
    path = save({"state_dict": prefixed(state, "module.backbone.")}, tmp_path / "a.pth")
    model, has_head = load_cnn(name, path)
    assert has_head and close(model.eval()(imgs), ref(imgs), 1e-5)
    headless = {k: x for k, x in state.items() if not k.startswith(head)}
    model, has_head = load_cnn(name, save({"model": headless}, path))
    first, weight = next(iter(state.items()))
    assert not has_head and model.get_parameter(first).equal(weight)


def test_wrong_cnns_are_refused(tmp_path):
    state = torchvision.models.mobilenet_v2().state_dict()
    key, path = "features.3.conv.0.0.weight", tmp_path / "a.pth"
    ints = torch.zeros(state[key].shape, dtype=torch.int8)
    for name, value in ((key, randn(3)), (key, ints), ("x", randn(1)), (key, None)):
        changed = state | {name: value}
        if value is None:
            del changed[key]
        with pytest.raises(ValueError, match=f"{path}: .*{re.escape(name)}"):
            load_cnn("mobilenet_v2", save(changed, path))
    with pytest.raises(ValueError, match=f"{path}: no such network"):
        load_cnn("resnet50", path)


# -- Positions of another grid ---------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_are_resized_as_by_hugging_face(positions):
    """Also to a grid of as many patches: it is the grid that counts."""
    ref = shake(hf_model("ViTModel", num_hidden_layers=1))
    stored = ref.embeddings.position_embeddings.data
    if positions == "sincos":
        stored[0] = attg_mae.sincos_table(stored.shape[2], (8, 8))
    assert attg_mae.load_encoder(ref.state_dict(), heads=4).pos_embed.equal(stored)
    for size in ((48, 48), (32, 80), (16, 64)):
        model = attg_mae.load_encoder(ref.state_dict(), heads=4, img_size=size)
        imgs = randn(2, 3, *size)
        want = ref.embeddings(imgs, interpolate_pos_encoding=True)
        got = model.embed(model.patchify(imgs))
        assert close(got, want, 1e-5) and not close(got - model.pos_embed, want, 1e-2)


def test_learned_positions_of_a_rectangle(tmp_path, capsys):
    ref, imgs = timm_model(img_size=(32, 64)), randn(2, 3, 32, 64)
    state, size = ref.state_dict(), {"img_size": (32, 64)}
    model = attg_mae.load_encoder(state, heads=4, **size)
    assert same_features(model, ref, imgs)
    # Also as a start of pre-training.
    init = str(save(state, tmp_path / "a.pth"))
    cfg = attg_mae.Config(**asdict(model.cfg) | size | {"init": init})
    mae, log = attg_mae.MAE(cfg), MagicMock()
    load_initial(mae, SimpleNamespace(cfg=cfg, log=log), None)
    assert mae.pos_embed.equal(model.pos_embed)
    # Nor do shapes show the number of heads.
    assert "does not say whether --heads 4 is right" in log.info.call_args[0][0]
    # Their grid is not known, so they are not resized.
    for other in ({}, {"img_size": (64, 32 * 3)}):
        with pytest.raises(ValueError, match="pos_embed|img_size"):
            attg_mae.load_encoder(state, heads=4, **other)
    # Settings tell it, here of as many patches as a square has.
    square = timm_model(img_size=64)
    cfg = attg_mae.Config(**asdict(model.cfg) | {"img_size": (32, 128)})
    content = {"model": square.state_dict(), "config": asdict(cfg)}
    assert "resized" not in capsys.readouterr().out
    got = attg_mae.load_encoder(content, img_size=64)
    assert not close(got.pos_embed, square.pos_embed, 1e-2)
    assert "pos_embed resized from (4, 16) to (8, 8)" in capsys.readouterr().out
    assert attg_mae.load_encoder(content).pos_embed.equal(square.pos_embed)


def test_empty_positions_are_told(capsys):
    """As in models that transformers 5.24 makes."""
    state = timm_model().state_dict()
    attg_mae.load_encoder(state | {"pos_embed": torch.zeros(1, 17, 64)}, heads=4)
    assert "pos_embed is all zero" in capsys.readouterr().out
    attg_mae.load_encoder(state, heads=4)
    assert "zero" not in capsys.readouterr().out


# -- What is refused -------------------------------------------------------------------


def refused(ran=""):
    """{name: (content of a file, what the error must name beside the file)}."""
    state, norm = timm_model().state_dict(), "blocks.0.norm1.weight"
    nan = torch.full((64,), math.nan)
    cases = {"not finite": (state | {norm: nan}, norm)}
    for key in ("surplus", "norm_pre.weight", "dist_token", "blocks.0.ls1.gamma", ""):
        cases[f"key {key}"] = state | {key: randn(3)}, key
    positions = {"pos_embed": torch.ones(1, 12, 64)}
    cases["12 positions"] = state | positions, "pos_embed"
    twice = state | {"position_embeddings": randn(1)}
    return cases | {
        "resnet": ({"layer1.0.conv1.weight": randn(4, 4, 3, 3)}, "layer1.0.conv1"),
        "sequence": ([1, 2], "list"),
        "number as key": ({1: randn(3)}, "keys"),
        "evil": ({"model": state, "args": Evil(ran)}, "open"),
        "missing": ({k: v for k, v in state.items() if k != norm}, norm),
        "two names": (twice, "pos_embed and position_embeddings"),
    }


@pytest.mark.parametrize("name", refused())
def test_load_encoder_refuses_other_files(name, tmp_path):
    path, ran = tmp_path / "weights.pth", tmp_path / "ran"
    content, named = refused(ran)[name]
    with pytest.raises(ValueError) as error:
        attg_mae.load_encoder(save(content, path), heads=4)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert named in str(error.value).replace(str(path), "") and not ran.exists()
    if name == "evil":
        torch.load(path, weights_only=False)["args"].close()
        assert ran.exists()  # it would have run
        # PyTorch's advice to load without the check is not repeated.
        assert "weights_only" not in str(error.value)


def test_damaged_weights_are_refused():
    """Any weight of another kind or shape: an error that names the source."""
    mae = shake(hf_model("ViTMAEForPreTraining", num_hidden_layers=1)).state_dict()
    values = [torch.tensor(1.0), torch.ones(0), torch.ones(3), torch.ones(2, 2, 2)]
    values += [torch.ones(1, 1, 1, 1, dtype=torch.int64), None, {"y": randn(1)}]
    token = torch.ones(1, 1, 128)
    values += [token, torch.ones(1, 0, 128), torch.ones(1, 12, 128)]
    values += [torch.ones(128, dtype=x) for x in (torch.bool, torch.complex64)]
    values += [torch.quantize_per_tensor(randn(128), 0.1, 0, torch.qint8)]
    values += [torch.ones(9, device="meta"), torch.ones(9).to_sparse()]
    cfg = attg_mae.Config(depth=1)
    model = attg_mae.MAE(cfg)

    @given(st.sampled_from(sorted(mae)), st.sampled_from(values))
    def check(key, value):
        assume(value is not token or key != "vit.embeddings.cls_token")
        with pytest.raises(ValueError, match="the state dict"):
            weights = read_weights(mae | {key: value})
            encoder_config(attg_mae.Config, weights, 4)
            load_weights(model, weights)

    check()
