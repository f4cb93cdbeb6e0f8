"""
The model against those of Hugging Face and timm, and its masking and weighting.
"""

import math

import numpy as np
import pytest
import torch
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
    kernel,
    oracle,
    rand,
    randn,
    shake,
    timm_model,
)

HF_CASES = [
    ("vit_micro", 4, 2, True, torch.float32),
    ("vit_micro", 4, 2, False, torch.float32),
    ("vit_micro", 4, 2, True, torch.float64),
    ("vit_base", 4, 2, True, torch.float32),
]


@pytest.mark.parametrize(
    ("name", "depth", "decoder_depth", "norm_pix", "dtype"), HF_CASES
)
def test_model_equals_hugging_face(name, depth, decoder_depth, norm_pix, dtype):
    tol, (p, size, *_) = 1e-5 if dtype == torch.float32 else 1e-11, PRESETS[name]
    kw = dict(
        num_hidden_layers=depth,
        decoder_num_hidden_layers=decoder_depth,
        norm_pix_loss=norm_pix,
    )
    ref = shake(hf_model("ViTMAEForPreTraining", name, **kw)).to(dtype)
    cfg = attg_mae.Config(
        model=name, depth=depth, decoder_depth=decoder_depth, norm_pix=norm_pix
    )
    model = attg_mae.build_model(cfg).to(dtype)
    tables = {k: v.clone() for k, v in model.state_dict().items() if "pos_embed" in k}
    # Strict: MAE's names, nothing more, nothing less
    model.load_state_dict(from_hf(ref.state_dict()))
    assert all(close(v, model.state_dict()[k], 1e-6) for k, v in tables.items())
    imgs, noise = randn(2, 3, size, size, dtype=dtype), rand(2, (size // p) ** 2)
    want, (loss, pred, mask) = ref(imgs, noise=noise), model(imgs, noise=noise)
    assert close(loss, want.loss, tol)
    assert close(pred, want.logits, tol)
    assert mask.equal(want.mask)
    assert not close(pred.roll(1, 1), want.logits, 1e-2)
    loss.backward()
    want.loss.backward()
    grads = from_hf({k: p.grad for k, p in ref.named_parameters() if p.requires_grad})
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert set(params) == set(grads)
    for key, p in params.items():
        mine, theirs = p.grad, grads[key]
        # Softmax does not see the key's bias: its gradient is zero but for rounding
        if key.endswith("qkv.bias"):
            mine, theirs = (x.unflatten(0, (3, -1))[[0, 2]] for x in (mine, theirs))
        assert (mine - theirs).norm() <= tol * theirs.norm(), key
        check_grad(mine, theirs, tol)


@pytest.mark.parametrize("chans", [3, 4])
def test_encoder_and_last_qkv_equal_timm(chans):
    model = shake(attg_mae.build_model(attg_mae.Config(in_chans=chans)))
    ref = timm_model(128, 4, 4, patch_size=4, in_chans=chans)
    ref.load_state_dict(encoder_only(model.state_dict()))  # strict
    seen, imgs = [], randn(3, chans, 32, 32)
    ref.blocks[-1].attn.qkv.register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    want, got = ref.forward_features(imgs), model.forward_features(imgs)
    assert close(got, want, 1e-5) and model.forward_features(imgs).equal(got)
    assert not close(got, ref.norm(want), 1e-3)
    assert not close(got.roll(1, 1), want, 1e-1)
    # timm's order: q, k, v, then heads
    qkv = seen[0].reshape(3, 65, 3, 4, 32).permute(2, 0, 3, 1, 4)
    assert all(
        close(a, b, 1e-5) for a, b in zip(model.last_qkv(imgs), qkv, strict=True)
    )
    assert not close(model.last_qkv(imgs)[1], qkv[0], 1e-1)
    # And the attention itself, as DINO's maps use it
    (q, k, _), (x, y) = qkv, model.last_qkv(imgs)[:2]
    want = nn.functional.scaled_dot_product_attention(
        q, k, torch.eye(65).expand(3, 4, 65, 65)
    )
    assert close((x @ y.mT / math.sqrt(32)).softmax(-1), want, 1e-5)


@pytest.mark.parametrize("grid", [(14, 14), (14, 29), (29, 14), (2, 5)], ids=str)
def test_position_tables(grid):
    model = attg_mae.build_model(attg_mae.Config(img_size=(4 * grid[0], 4 * grid[1])))
    for table, dim in ((model.pos_embed, 128), (model.decoder_pos_embed, 64)):
        rows = [[0.0] * dim]
        for i, j in np.ndindex(grid):
            # The column first
            angles = [
                [pos / 10000 ** (c / (dim / 4)) for c in range(dim // 4)]
                for pos in (j, i)
            ]
            rows.append(
                [f(x) for axis in angles for f in (math.sin, math.cos) for x in axis]
            )
        want = torch.tensor([rows], dtype=torch.float64)
        assert not table.requires_grad
        assert close(table, want, 1e-6)
        assert not close(table.roll(dim // 2, 2), want, 1e-2)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    p, size, width, depth, heads, dw, dd, dh, published = PRESETS[name]
    with torch.device("meta"):
        model = attg_mae.build_model(attg_mae.Config(model=name))
        ref = hf_model("ViTMAEForPreTraining", name)
        encoder = timm_vit.VisionTransformer(
            size, p, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in from_hf(ref.state_dict()).items()}
    assert encoder_only(shapes) == {k: v.shape for k, v in encoder.state_dict().items()}
    assert (
        published is None
        or round(sum(map(math.prod, shapes.values())) / 1e6, 1) == published
    )
    assert [b.attn.num_heads for b in model.blocks] == [heads] * depth
    assert [b.attn.num_heads for b in model.decoder_blocks] == [dh] * dd
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_initialisation():
    for key, p in attg_mae.build_model(
        attg_mae.Config(model="vit_tiny", depth=2, decoder_depth=1)
    ).named_parameters():
        if key in ("cls_token", "mask_token"):
            assert abs(p.std() - 0.02) < 0.004 and abs(p.mean()) < 0.006
        elif p.dim() > 1 and p.requires_grad:
            w = p.flatten(1)  # the patch embedding as a linear layer
            bound = math.sqrt(6 / sum(w.shape))
            assert 0.99 * bound < w.abs().max() <= bound, key
            assert abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.02, key
            assert abs(w.mean()) < 0.02 * bound, key
        elif key == "patch_embed.proj.bias":
            # MAE keeps the convolution's own
            assert p.abs().max() <= 1 / math.sqrt(768)
        elif p.requires_grad:
            assert p.eq(0.0 if key.endswith("bias") else 1.0).all(), key


@pytest.mark.parametrize(
    "grid", [(14, 14), (14, 29), (29, 14), (17, 23), (1, 6)], ids=str
)
@pytest.mark.parametrize("chans", [1, 4])
def test_weighted_loss_masks_and_grids(grid, chans):
    (gh, gw), L, ratio = grid, grid[0] * grid[1], 0.5 if grid == (17, 23) else 0.75
    small = dict(
        width=32,
        depth=1,
        heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        mask_ratio=ratio,
    )
    model = shake(
        attg_mae.build_model(
            attg_mae.Config(img_size=(gh * 4, gw * 4), in_chans=chans, **small)
        ),
        0.1,
    )
    imgs = randn(3, chans, gh * 4, gw * 4)
    attn = rand(3, L) * 5 - 2
    noise = rand(3, L, seed=1)
    for tau, normalize in ((0.75, True), (torch.tensor(0.2), True), (1.0, False)):
        given = {"attn": attn, "tau": tau}
        if not normalize:
            given = {"weight": attn.exp()}
        loss, pred, mask = model(imgs, noise=noise, **given)
        rows, grad, count = oracle(
            pred, imgs, mask, attn, tau, patch_size=4, normalize_attn=normalize
        )
        assert close(loss, rows.sum() / count, 5e-6)
        check_grad(
            torch.autograd.grad(loss, pred, retain_graph=True)[0], grad / count, 5e-6
        )
        assert not close(
            loss, oracle(pred, imgs, mask, patch_size=4)[0].sum() / count, 1e-2
        )
    loss.backward()
    assert all(
        p.grad.isfinite().all() and p.grad.any()
        for p in model.parameters()
        if p.requires_grad
    )
    keep = int(L * (1 - ratio))
    # The smallest noise
    kept = [set(sorted(range(L), key=row.__getitem__)[:keep]) for row in noise.tolist()]
    assert [{i for i, m in enumerate(row) if not m} for row in mask.tolist()] == kept
    # What is hidden does not reach the prediction, what is visible does
    other = imgs.clone()
    other[:, :, :4, :4] += 1
    changed = (model(other, noise=noise, mask_ratio=ratio)[1] != pred).any(2).any(1)
    assert changed.tolist() == [0 in ids for ids in kept]
    # Without noise: random, the same number in each image
    a, b = (model(imgs, mask_ratio=ratio)[2] for _ in range(2))
    assert not a.equal(b) and (a.sum(1) == L - keep).all()
    assert model.forward_features(imgs).shape == (3, 1 + L, 32)
    for h, w in ((gh * 4 + 2, gw * 4), (gh * 4, gw * 4 + 1)):
        with pytest.raises(ValueError, match=str(h if h % 4 else w)):
            model(randn(1, chans, h, w))
        with pytest.raises(ValueError, match="img_size"):
            attg_mae.Config(img_size=(h, w))


def test_param_groups():
    model = attg_mae.build_model(attg_mae.Config())
    names = {id(p): k for k, p in model.named_parameters()}
    modules = dict(model.named_modules())
    groups = torch.optim.AdamW(attg_mae.param_groups(model, 0.05), lr=1e-3).param_groups
    decay, rest = (
        [names[id(p)] for g in groups for p in g["params"] if g["weight_decay"] == w]
        for w in (0.05, 0)
    )
    assert sorted(decay + rest) == sorted(
        set(names.values()) - {"pos_embed", "decoder_pos_embed"}
    )
    norms = {
        k
        for k in names.values()
        if isinstance(modules[k.rpartition(".")[0]], nn.LayerNorm)
    }
    assert set(rest) == norms | {k for k in names.values() if k.endswith("bias")}


def test_model_compiles_once_for_all_tau():
    torch.compiler.reset()
    model, imgs = attg_mae.build_model(attg_mae.Config(**SMALL)), randn(2, 3, 32, 32)
    attn, noise_ = rand(2, 4), rand(2, 4, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for stance, tau in (
        ("default", 0.75),
        ("fail_on_recompile", 0.8),
        ("fail_on_recompile", 0.9),
    ):
        with torch.compiler.set_stance(stance):
            got = compiled(imgs, attn, torch.tensor(tau), noise=noise_)[0]
        assert close(got, model(imgs, attn, tau, noise=noise_)[0], 1e-6)
        assert not close(got, model(imgs, attn, tau + 0.01, noise=noise_)[0], 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_plain_loss_ignores_what_stands_in_visible_patches(bad):
    """As the kernel file does: neither the loss nor the gradient knows of it."""
    pred, patches = randn(2, 6, 12), randn(2, 6, 12, seed=1)
    mask, m_norm = (rand(2, 6, seed=2) < 0.6).float(), rand(2, 6, seed=3)
    weight = attg_mae.patch_weights(m_norm, 0.75)
    want, mse = attg_mae.masked_loss(pred.requires_grad_(), patches, mask, weight)
    want.backward()
    spoilt = torch.where(mask[..., None].bool(), pred.detach(), bad).requires_grad_()
    loss, same_mse = attg_mae.masked_loss(spoilt, patches, mask, weight)
    loss.backward()
    assert loss.equal(want) and spoilt.grad.equal(pred.grad) and pred.grad.any()
    assert same_mse.equal(mse)
    everywhere = torch.full_like(pred, bad)
    for x in attg_mae.masked_loss(everywhere, patches, mask, weight):
        assert not x.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_loss_is_fp32_for_any_model(dtype):
    """Equal to the kernel file's, which reads 16-bit numbers and computes in fp32."""
    pred, patches = randn(2, 6, 12, dtype=dtype), randn(2, 6, 12, seed=1, dtype=dtype)
    mask, m_norm = torch.ones(2, 6), rand(2, 6, seed=3).to(dtype)
    weight = attg_mae.patch_weights(m_norm.float(), 0.75)
    loss, _ = attg_mae.masked_loss(pred, patches, mask, weight)
    options = {"normalize_attn": False, "impl": "torch"}
    want = kernel.attg_loss(pred, patches, mask, m_norm, **options)
    assert loss.dtype == torch.float32 and close(loss, want, 1e-6)
    assert attg_mae.masked_loss(pred, patches, 0 * mask, weight) == (0, 0)


def test_forward_refuses_wrong_arguments():
    model, imgs = attg_mae.MAE(attg_mae.Config(**SMALL)), randn(2, 3, 32, 32)
    for tau in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"tau: got {tau}; pass a finite number"):
            model(imgs, attn=torch.rand(2, 4), tau=tau)
    with pytest.raises(ValueError, match=r"attn: .*\(2, 4\)"):
        model(imgs, attn=torch.rand(2, 5))
    with pytest.raises(ValueError, match="imgs: got"):
        model(imgs[..., 1:])
