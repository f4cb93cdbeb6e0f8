"""attg/backbones.py against the forward passes of timm and Hugging Face."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import attg_mae
import eval_finetune
import eval_knn
import object_discovery
from attg.backbones import open_backbone, weights_sha256
from attg.features import pool_tokens
from tests.helpers import close, hf_model, randn, shake, transformers

# Names in timm, and the number of tokens that are no patches.
TIMM = {
    "vit_tiny_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_small_patch16_dinov3": 5,
    "vit_base_patch16_siglip_224": 0,
    "beit_base_patch16_224": 1,
    "vit_pe_core_tiny_patch16_384": 1,  # an attention pool beside the class token
}
HF = {"ViT": 1, "DeiT": 2, "Dinov2WithRegisters": 5, "DINOv3ViT": 3, "SiglipVision": 0}
HF |= {"Beit": 1, "CLIPVision": 1, "Aimv2Vision": 0}
SIZES = dict(hidden_size=32, intermediate_size=64, image_size=48, patch_size=8)
SIZES |= dict(num_hidden_layers=2, num_attention_heads=2)


def open_timm(name, folder, monkeypatch):
    """(timm's model of two blocks and 6 x 6 patches, ours, its inputs)."""
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    create, side = timm.create_model, 6 * (14 if "14" in name else 16)
    shallow = lambda *args, **options: create(*args, **options, depth=2)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", shallow)
    torch.manual_seed(0)
    ref = shake(timm.create_model(name, num_classes=0, img_size=side), 0.05)
    state = ref.state_dict() | {"head.weight": randn(9), "decoder_pred.bias": randn(9)}
    state = {f"model.net.{key}": x for key, x in state.items()}
    torch.save({"state_dict": {}, "model_ema": state | {"x": 3}}, folder / "a.pth")
    model = open_backbone(f"timm:{name}@{folder / 'a.pth'}", side)
    assert model.cfg.mean == ref.pretrained_cfg["mean"] and model.cfg.depth == 2
    return ref, model, randn(2, 3, side, side)


def last_attention(ref, imgs):
    """The last block's normalized input, and the softmax that timm computes itself."""
    seen, attn = {}, ref.blocks[-1].attn
    attn.fused_attn = False
    attn.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.update(p=args[0]))
    ref(imgs)
    return seen["x"], seen["p"]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, tmp_path, monkeypatch):
    ref, model, imgs = open_timm(name, tmp_path, monkeypatch)
    first, tokens = TIMM[name], ref.forward_features(imgs)
    got = model.forward_features(imgs)
    assert got.shape == (2, 37, tokens.shape[2])
    assert close(got[:, 1:], tokens[:, first:], 1e-5)
    if first and "pe_core" not in name:
        assert close(got[:, 0], tokens[:, 0], 1e-5)
    if "distilled" not in name:  # which pools two tokens
        pooled = ref.forward_head(tokens, pre_logits=True)
        features = pool_tokens(model, got)
        assert close(features[ref.global_pool == "avg"], pooled, 1e-5)

    x, attention = last_attention(ref, imgs)
    attn, D = ref.blocks[-1].attn, x.shape[2]
    want = x @ attn.qkv.weight[D : 2 * D].T
    if attn.qkv.bias is not None:
        want = want + attn.qkv.bias[D : 2 * D]
    assert close(model.patch_keys(imgs), want[:, first:], 1e-5)
    if first:
        want = attention[:, :, 0, first:].mean(dim=1)
        got = model.class_attention(imgs)
        assert close(got, want, 1e-5) and not close(got.roll(1, 1), want, 1e-2)
    else:
        with pytest.raises(ValueError, match="no class token"):
            model.class_attention(imgs)

    path, missing, patches = (
        tmp_path / "a.pth",
        "blocks.1.norm2.bias",
        "patch_embed.proj.weight",
    )
    small = ref.state_dict()[patches][..., ::2, ::2].clone()
    for key, value in (
        (missing, None),
        ("blocks.2.ls1.gamma", randn(3)),
        (patches, small),
    ):
        state = ref.state_dict() | {key: value}
        torch.save({k: x for k, x in state.items() if x is not None}, path)
        with pytest.raises(ValueError, match=f"{path}: .*{key}"):
            open_backbone(f"timm:{name}@{path}", imgs.shape[2])


@pytest.mark.parametrize("kind", HF)
def test_hugging_face(kind, tmp_path):
    hf, first = transformers(), HF[kind]
    if not hasattr(hf, f"{kind}Model"):
        pytest.skip(f"transformers {hf.__version__} has no {kind}Model")
    options = {"num_register_tokens": 2} if kind == "DINOv3ViT" else {}
    config = getattr(hf, f"{kind}Config")(**SIZES | options)
    torch.manual_seed(0)
    ref = shake(getattr(hf, f"{kind}Model")(config), 0.05)
    ref.half().save_pretrained(tmp_path)
    images = {"image_processor_type": "ViTImageProcessor", "size": 48}
    images |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    model, imgs = open_backbone(f"hf:{tmp_path}"), randn(2, 3, 48, 48)
    assert model.cfg.mean == (0.1, 0.2, 0.3) and model.cfg.grid == (6, 6)
    load = getattr(hf, f"{kind}Model").from_pretrained
    ref = load(tmp_path, attn_implementation="eager").float()
    want = ref(imgs, output_attentions=True)
    got, tokens = model.forward_features(imgs), want.last_hidden_state
    if kind == "CLIPVision":  # which normalizes its pooled token only
        tokens = getattr(ref, "vision_model", ref).post_layernorm(tokens)
    assert close(got[:, 1:], tokens[:, first:], 1e-5)
    if kind in ("SiglipVision", "Beit", "CLIPVision", "Aimv2Vision"):
        features = pool_tokens(model, got)
        assert close(features[kind == "Beit"], want.pooler_output, 1e-5)
    else:
        assert close(got[:, 0], tokens[:, 0], 1e-5)
    assert model.patch_keys(imgs).shape == (2, 36, 32)
    if first:
        attention = want.attentions[-1][:, :, 0, first:].mean(dim=1)
        assert close(model.class_attention(imgs), attention, 1e-5)
    pixels = torch.randint(256, (1, 3, 2, 2))
    assert close(model.normalize(pixels)[0, 1], (pixels[0, 1] / 255 - 0.2) / 0.5, 1e-5)


def test_blip_2_normalizes_all_tokens_itself(tmp_path):
    hf = transformers()
    if not hf.Blip2Model._supports_sdpa:
        pytest.skip(f"BLIP-2 of transformers {hf.__version__} has no sdpa attention")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"vocab_size": 9}
    config = hf.Blip2Config(
        vision_config=SIZES,
        qformer_config=small | {"encoder_hidden_size": 32},
        text_config=small | {"model_type": "opt", "word_embed_proj_dim": 32},
    )
    ref = shake(hf.Blip2Model(config), 0.05).eval()
    ref.save_pretrained(tmp_path)
    images = {"image_processor_type": "ViTImageProcessor", "size": 48}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    model, imgs = open_backbone(f"hf:{tmp_path}"), randn(2, 3, 48, 48)
    want = ref.vision_model(imgs).last_hidden_state
    got = model.forward_features(imgs)
    assert close(got, want, 1e-5)
    assert not close(got, ref.vision_model.post_layernorm(want), 1e-2)


@pytest.mark.parametrize(
    "source, named",
    [
        ("timm:no_such_model", "no_such_model"),
        ("timm:vit_tiny_patch16_224@missing.pth", "missing.pth: no such file"),
        ("timm:swin_tiny_patch4_window7_224", "plain"),
        ("timm:resnet18", "keys"),
        ("hf:.", "model"),
    ],
)
def test_refused(source, named, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    transformers()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    create = timm.create_model
    untrained = lambda name, pretrained, **_: create(name)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", untrained)
    with pytest.raises(ValueError, match=f"^{source.replace('/', '.')}: .*{named}"):
        open_backbone(source).patch_keys(randn(1, 3, 224, 224))


def test_shuffled_patches_are_refused(tmp_path):
    """Hugging Face's ViTMAE returns visible patches in random order, at any ratio."""
    hf_model("ViTMAEForPreTraining", mask_ratio=0.0).vit.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"hf:{tmp_path}: ViTMAE.* shuffles .*pass its"
    ):
        open_backbone(f"hf:{tmp_path}")


def test_statistics_of_images(tmp_path):
    """Those of the JSON files beside the weights, for files and for timm:NAME@FILE."""
    timm = pytest.importorskip("timm")
    hf = transformers()
    name, path = "vit_tiny_patch16_224", tmp_path / "pytorch_model.bin"
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    options = {"img_size": 32, "num_classes": 0, "pretrained_cfg_overlay": cfg}
    save = timm.models._hub.save_for_hf  # timm 1.0.12 has it there only
    save(timm.create_model(name, depth=1, **options), tmp_path)
    save(timm.create_model(name, **options), tmp_path / "whole")
    for model in (
        attg_mae.load_encoder(path),
        open_backbone(f"timm:{name}@{tmp_path / 'whole' / path.name}", 32),
    ):
        assert {x: tuple(getattr(model.cfg, x)) for x in cfg} == cfg
    # Pixels in [0, 1].
    hf.ViTModel(hf.ViTConfig(**SIZES | {"intermediate_size": 128})).save_pretrained(
        tmp_path
    )
    images = {"image_processor_type": "ViTImageProcessor", "do_normalize": False}
    images |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    for model in (
        attg_mae.load_encoder(tmp_path / "model.safetensors"),
        open_backbone(f"hf:{tmp_path}"),
    ):
        assert model.normalize(white).equal(torch.ones(white.shape))
    # Beside the settings of several networks, such as an encoder and a text decoder.
    (tmp_path / "config.json").write_text('{"encoder": {"hidden_size": 32}}')
    model = attg_mae.load_encoder(tmp_path / "model.safetensors", heads=2)
    assert model.normalize(white).equal(torch.ones(white.shape))


def test_programs_take_named_models(labelled, tmp_path, monkeypatch, capsys):
    """With the results of a file of the same weights."""
    hf = transformers()
    monkeypatch.chdir(tmp_path)
    config = hf.ViTConfig(**SIZES | {"intermediate_size": 128})
    model = shake(hf.ViTModel(config, add_pooling_layer=False), 0.1)
    model.save_pretrained("vit")
    images = {"image_processor_type": "ViTImageProcessor"}
    images |= {"image_mean": [0.5] * 3, "image_std": [0.4] * 3}
    Path("vit/preprocessor_config.json").write_text(json.dumps(images))
    data = ["--data", labelled["data"], "--device", "cpu"]
    sources = ["hf:vit", "vit/model.safetensors"]
    # Not that of a random pooler.
    one, two = (weights_sha256(open_backbone("hf:vit")) for _ in range(2))
    assert one == two
    results = [eval_knn.main([source, *data]) for source in sources]
    told, statistics = capsys.readouterr().out, f"mean {(0.5,) * 3}, std {(0.4,) * 3}"
    assert told.count(f": images of 48 x 48, {statistics}\n") == 2
    assert results[0] == results[1] and Path("eval_knn.jsonl").exists()
    for method in ("tokencut", "dino"):
        maps = []
        for source in sources:
            argv = ["--method", method, "--backbone", source, "--out", "m.npy", *data]
            argv += ["--affinity_threshold=0.8"] * (method == "tokencut")
            object_discovery.main(argv)
            maps.append(np.load("m.npy").astype("float32"))
            Path("m.npy").unlink()
        assert close(maps[0], maps[1], 1e-2) and maps[0].std() > 0.1, method
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)).save_pretrained("siglip")
    Path("vit/preprocessor_config.json").rename("siglip/preprocessor_config.json")
    argv = ["--backbone", "hf:siglip", "--out", "m.npy", *data]
    with pytest.raises(ValueError, match="no class token"):
        object_discovery.main([*argv, "--method", "dino"])
    assert not list(Path().glob("m.npy*"))
    object_discovery.main(argv)
    assert np.load("m.npy").shape == (25, 6, 6)
    with pytest.raises(ValueError, match="checkpoint hf:vit: .*files only"):
        eval_finetune.main(["hf:vit", *data])
    state = {f"encoder.vit.{key}": x for key, x in model.state_dict().items()}
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state, sources[1], {"format": "pt"})
    with pytest.raises(ValueError, match="hf:vit: .*lacks .*: embeddings.cls_token,"):
        open_backbone("hf:vit")
