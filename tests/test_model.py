"""
The model on grids of any shape, its presets, initialization and arguments. That it equals
Hugging Face's and timm's is in test_attg.py.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attg_mae
from tests.helpers import (
    PRESETS,
    SMALL,
    check_grad,
    close,
    encoder_only,
    from_hf,
    hf_model,
    oracle,
    rand,
    randn,
    shake,
    timm_model,
)


def test_positions_of_any_grid():
    """Those of the same rows and columns in a square, which are compared in test_attg.py."""
    square = attg_mae.sincos_table(64, (9, 9))[1:].view(9, 9, 64)
    table = attg_mae.sincos_table(64, (5, 2))
    assert table[1:].view(5, 2, 64).equal(square[:5, :2]) and not table[0].any()


MAES = {"epochs": 1600, "eval_every": 400, "batch_size": 4096, "warmup_epochs": 40}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, monkeypatch):
    """Names and shapes are those of Hugging Face and timm, sizes MAE's, as its settings."""
    p, size, width, depth, heads, *_, decoder_heads, published = PRESETS[name]
    # Older timm reads numbers of a linspace, which a meta tensor does not have.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        model = attg_mae.MAE(attg_mae.Config(model=name, **MAES))
        ref = from_hf(hf_model("ViTMAEForPreTraining", name).state_dict())
        encoder = timm_model(width, depth, heads, size, p).state_dict()
    shapes = {key: x.shape for key, x in model.state_dict().items()}
    assert shapes == {key: x.shape for key, x in ref.items()}
    assert encoder_only(shapes) == {key: x.shape for key, x in encoder.items()}
    millions = round(sum(map(math.prod, shapes.values())) / 1e6, 1)
    assert published in (None, millions)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.attn.num_heads for block in model.decoder_blocks} == {decoder_heads}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_initialization_and_weight_decay():
    """MAE's: Xavier, tokens 0.02; no decay on norms and biases, fixed positions in no group."""
    model = attg_mae.MAE(attg_mae.Config("vit_tiny", depth=2, decoder_depth=1))
    decay = {}
    for group in attg_mae.param_groups(model, 0.05):
        decay |= {p: group["weight_decay"] for p in group["params"]}
    for key, p in model.named_parameters():
        assert p.requires_grad == (p in decay) == ("pos_embed" not in key)
        if p not in decay:
            continue
        bias = key.endswith("bias")
        assert decay[p] == (0.0 if "norm" in key or bias else 0.05), key
        if key in ("cls_token", "mask_token"):
            assert abs(p.std() - 0.02) < 0.004 and abs(p.mean()) < 0.006
        elif p.dim() > 1:
            w = p.flatten(1)  # the patch embedding as a linear layer
            bound = math.sqrt(6 / sum(w.shape))
            assert 0.99 * bound < w.abs().max() <= bound, key
            assert abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.02, key
        elif key == "patch_embed.proj.bias":
            assert p.abs().max() <= 1 / math.sqrt(768)  # mae keeps the convolution's
        else:
            assert p.eq(0.0 if bias else 1.0).all(), key


@given(
    seed=st.integers(0, 2**32),
    grid=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    chans=st.sampled_from([1, 3, 4]),
    ratio=st.sampled_from([0.5, 0.75, 0.9]),
)
def test_weighted_loss_masks_and_grids(seed, grid, chans, ratio):
    """Loss, gradient and mask of forward, on any grid, against loops in float64."""
    size, L = (4 * grid[0], 4 * grid[1]), math.prod(grid)
    keep = int(L * (1 - ratio))
    shape = SMALL | {"patch_size": 4, "img_size": size, "in_chans": chans}
    if not 0 < keep < L:
        with pytest.raises(ValueError, match="--mask_ratio"):
            attg_mae.Config(**shape, mask_ratio=ratio)
        return
    model = shake(attg_mae.MAE(attg_mae.Config(**shape, mask_ratio=ratio)), 0.1)
    torch.manual_seed(seed)
    imgs, noise = torch.randn(2, chans, *size), torch.rand(2, L)
    attn = torch.rand(2, L) * 5 - 2
    weights = {"weight": attn.exp()}  # of tau 1, not normalized
    for guide, tau in (({"attn": attn}, 0.75), (weights, 1.0), ({}, 1.0)):
        loss, pred, mask = model(imgs, tau=torch.tensor(tau), noise=noise, **guide)
        m = attn if guide else None
        options = {"patch_size": 4, "normalize_attn": "attn" in guide}
        rows, grad, count = oracle(pred, imgs, mask, m, tau, **options)
        assert close(loss, rows.sum() / count, 5e-6)
        (got,) = torch.autograd.grad(loss, pred)
        check_grad(got, grad / count, 5e-6)
    lowest = torch.ones(2, L).scatter(1, noise.argsort(1)[:, :keep], 0.0)
    assert mask.equal(lowest)
    # An argument wins over the config; without noise the mask is random.
    assert (model(imgs, mask_ratio=1 - 1.5 / L)[2].sum(1) == L - 1).all()
    random = {str(model(imgs)[2].tolist()) for _ in range(1 if L < 16 else 4)}
    assert L < 16 or len(random) > 1  # else of 16^-6 at most


def test_model_compiles_once_for_all_tau():
    torch.compiler.reset()
    model, imgs = attg_mae.MAE(attg_mae.Config(**SMALL)), randn(2, 3, 32, 32)
    attn, noise = rand(2, 4), rand(2, 4, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    stances = ("default", "fail_on_recompile", "fail_on_recompile")
    for stance, tau in zip(stances, (0.75, 0.8, 0.9), strict=True):
        with torch.compiler.set_stance(stance):
            got = compiled(imgs, attn, torch.tensor(tau), noise=noise)[0]
        assert close(got, model(imgs, attn, tau, noise=noise)[0], 1e-6)
        assert not close(got, model(imgs, attn, tau + 0.01, noise=noise)[0], 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_ignores_predictions_of_visible_patches(bad):
    """Loss, mse and gradient are those of finite predictions; without a mask they are 0."""
    pred, patches, weight = randn(2, 6, 12), randn(2, 6, 12, seed=1), 1 + rand(2, 6)
    mask, results = (rand(2, 6, seed=2) < 0.6).float(), []
    for x in (pred, pred.masked_fill(mask[..., None] == 0, bad)):
        leaf = x.clone().requires_grad_()
        loss, mse = attg_mae.masked_loss(leaf, patches, mask, weight)
        results.append([loss, mse, *torch.autograd.grad(loss, leaf)])
    assert all(x.any() and x.equal(y) for x, y in zip(*results, strict=True))
    assert attg_mae.masked_loss(0 * pred + bad, patches, 0 * mask, weight) == (0, 0)
    spoilt = attg_mae.masked_loss(0 * pred + bad, patches, mask, weight)
    assert not torch.stack(spoilt).isfinite().any()


def test_loss_is_fp32_for_any_model():
    """Equal to that of the same numbers in fp32."""
    x, mask, weight = randn(2, 2, 6, 12).bfloat16(), torch.ones(2, 6), 1 + rand(2, 6)
    loss, mse = attg_mae.masked_loss(*x, mask, weight)
    want = attg_mae.masked_loss(*x.float(), mask, weight)
    assert loss.dtype == torch.float32 and (loss, mse) == want


def test_forward_refuses_wrong_arguments():
    model, imgs = attg_mae.MAE(attg_mae.Config(**SMALL)), randn(2, 3, 32, 32)
    wrong = [({"tau": tau}, f"tau: got {tau}") for tau in (0, math.nan, math.inf)]
    wrong += [({x: rand(2, 5)}, r"\(2, 5\).*\(2, 4\)") for x in ("attn", "weight")]
    both = dict.fromkeys(("attn", "weight"), rand(2, 4))
    wrong.append((both, "attn, weight: pass one"))
    wrong += [({"imgs": bad}, "imgs: got ") for bad in (imgs[..., 1:], imgs.byte())]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(**{"imgs": imgs} | arguments)
    with pytest.raises(ValueError, match="--img_size 34x32"):
        attg_mae.Config(**SMALL | {"img_size": (34, 32)})
