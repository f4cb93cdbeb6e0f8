"""
The claims of this project, as its specification: what each part equals, and what it leaves
unchanged. The deep tests, a file for each module, are in tests/.

Every comparison is with other people's code, or with a formula written apart from ours;
and every tolerance is shown to reject a wrong answer.
"""

import copy
import math
import os
import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import attg_mae
from attg.features import knn_classify
from attg.loader import Batch, ResumableBatchSampler
from attg_mae import (
    MAE,
    Config,
    crop_maps,
    extract_features,
    load_encoder,
    lr_at,
    masked_loss,
    normalize_map,
    patch_weights,
    resolve,
    tau_at,
)
from object_discovery import tokencut
from tests.helpers import (
    DEVICE,
    ROOT,
    TINY,
    assert_same_run,
    check_grad,
    close,
    encoder_only,
    from_hf,
    hf_model,
    kernel,
    last,
    make_maps,
    python,
    rand,
    randn,
    records,
    shake,
    stop_after,
    timm_model,
    train,
)
from tests.processes import Process

# -- The loss --------------------------------------------------------------------------


def equations(pred, patches, mask, m_norm, tau):
    """Eq. 1 and 2 of arXiv 2402.15172, one patch at a time, in float64."""
    total = 0.0
    for b in range(len(pred)):
        for i in range(pred.shape[1]):
            if mask[b, i] == 0:
                continue
            x = patches[b, i].double()
            x_norm = (x - x.mean()) / (x.var() + 1e-6) ** 0.5
            weight = math.exp(m_norm[b, i] / tau)
            total += weight * ((pred[b, i].double() - x_norm) ** 2).mean()
    return total / mask.sum()


@pytest.fixture
def patches_of_a_batch():
    """pred, patches (B, L, P), mask and M_norm (B, L)."""
    pred, patches = randn(3, 8, 48), 2 * randn(3, 8, 48, seed=1) + 1
    mask = (rand(3, 8, seed=2) < 0.75).float()
    return pred.requires_grad_(), patches, mask, normalize_map(rand(3, 8, seed=3))


def test_the_loss_is_that_of_the_equations(patches_of_a_batch):
    """Value and gradient of attg_mae.py's own lines; mse is the loss without weights."""
    pred, patches, mask, m_norm = patches_of_a_batch
    loss, mse = masked_loss(pred, patches, mask, patch_weights(m_norm, 0.75))
    want = equations(pred, patches, mask, m_norm, 0.75)
    assert close(loss, want, 1e-6)
    assert close(mse, equations(pred, patches, mask, 0 * m_norm, 0.75), 1e-6)
    (grad,) = torch.autograd.grad(loss, pred)
    (want_grad,) = torch.autograd.grad(want, pred)
    check_grad(grad, want_grad, 1e-6)
    # The tolerance rejects another temperature, another map, another mask, no weights.
    weight = patch_weights(m_norm, 0.75)
    others = [(mask, patch_weights(m_norm, 0.76)), (mask, weight.roll(1, 1))]
    for wrong in (*others, (1 - mask, weight), (mask, None)):
        assert not close(masked_loss(pred, patches, *wrong)[0], want, 1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_kernel_computes_the_same(impl, norm_pix, patches_of_a_batch, monkeypatch):
    """kernels/attg_loss.py, in PyTorch and on the GPU or in Triton's interpreter."""
    if DEVICE != "cpu" and impl == "triton":
        patches_of_a_batch = [x.detach().to(DEVICE) for x in patches_of_a_batch]
    pred, patches, mask, m_norm = patches_of_a_batch
    pred = pred.detach().requires_grad_()
    inputs = pred, patches, mask, patch_weights(m_norm, 0.8), norm_pix
    plain, plain_mse = masked_loss(*inputs, fused=False)
    (want,) = torch.autograd.grad(plain, pred)
    fused = partial(kernel.attg_loss, impl=impl)
    monkeypatch.setattr(attg_mae, "attg_loss", fused)
    loss, mse = masked_loss(*inputs, fused=True)
    assert close(loss, plain, 1e-6) and close(mse, plain_mse, 1e-6)
    assert not mse.requires_grad and not close(mse, loss, 1e-2)
    check_grad(torch.autograd.grad(loss, pred)[0], want, 1e-5)


def test_a_flat_map_is_a_vanilla_mae():
    """To the bit; a map that is not flat gives another loss."""
    torch.manual_seed(1)
    model, imgs, noise = MAE(Config(**TINY)), randn(2, 3, 16, 16), rand(2, 16)
    vanilla = model(imgs, noise=noise)[0]
    for flat in (torch.zeros(2, 16), torch.full((2, 16), 7.0)):
        assert model(imgs, attn=flat, noise=noise)[0].equal(vanilla)
    assert not close(model(imgs, attn=rand(2, 16), noise=noise)[0], vanilla, 1e-2)


# -- The model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm_pix", "dtype", "tol"),
    [(True, torch.float32, 1e-5), (False, torch.float64, 1e-11)],
    ids=["fp32", "fp64"],
)
def test_the_model_is_that_of_mae(norm_pix, dtype, tol):
    """Hugging Face's ViTMAEForPreTraining: loss, predictions, mask, every gradient."""
    theirs = hf_model("ViTMAEForPreTraining", norm_pix_loss=norm_pix)
    theirs, ours = shake(theirs).to(dtype), MAE(Config(norm_pix=norm_pix)).to(dtype)
    state = from_hf(theirs.state_dict())
    for name in ("pos_embed", "decoder_pos_embed"):
        table, half = state[name], state[name].shape[-1] // 2
        assert close(getattr(ours, name), table, 1e-6)
        assert not close(table.roll(half, -1), table, 1e-2)  # rows for columns
    ours.load_state_dict(state)  # strict: the same names, no more and no fewer
    imgs, noise = randn(2, 3, 32, 32, dtype=dtype), rand(2, 64)
    want, (loss, pred, mask) = theirs(imgs, noise=noise), ours(imgs, noise=noise)
    assert close(loss, want.loss, tol) and close(pred, want.logits, tol)
    assert mask.equal(want.mask) and not close(pred.roll(1, 1), want.logits, 1e-2)
    loss.backward()
    want.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    grads = from_hf(grads)
    for name, p in ours.named_parameters():
        if not p.requires_grad:
            continue
        got, want_grad = p.grad, grads.pop(name)
        if name.endswith("qkv.bias"):
            # Softmax does not depend on the key's bias: its gradient is rounding.
            got, want_grad = (x.unflatten(0, (3, -1))[::2] for x in (got, want_grad))
        check_grad(got, want_grad, tol)
    assert not grads


def test_the_encoder_is_that_of_timm():
    """timm's VisionTransformer takes its weights; tokens, and q, k, v of the last block."""
    ours = shake(MAE(Config("vit_micro")))
    theirs = timm_model(128, 4, 4, patch_size=4)
    theirs.load_state_dict(encoder_only(ours.state_dict()))
    imgs, seen = randn(2, 3, 32, 32), []
    hook = theirs.blocks[-1].attn.qkv.register_forward_hook
    hook(lambda module, args, out: seen.append(out))
    want = theirs.forward_features(imgs)
    assert close(ours.forward_features(imgs), want, 1e-5)
    assert not close(ours.forward_features(imgs.flip(3)), want, 1e-2)
    # timm's order: q, k, v, then heads
    qkv = seen[0].reshape(2, 65, 3, 4, 32).permute(2, 0, 3, 1, 4)
    for x, want in zip(ours.last_qkv(imgs), qkv, strict=True):
        assert close(x, want, 1e-5) and not close(x.roll(1, 2), want, 1e-1)


# -- Guidance and schedules ------------------------------------------------------------


def test_maps_follow_the_crop_and_the_flip():
    """Under each patch the mean of the map's pixels, written as slices."""
    maps = rand(2, 32, 32)
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])  # x0 y0 x1 y1
    flip = torch.tensor([False, True])
    m_norm, flat = crop_maps(maps, box, flip, Config(**TINY))  # 4 x 4 patches
    first = maps[0, 16:32, 8:24].reshape(4, 4, 4, 4).mean(dim=(1, 3))
    second = maps[1].reshape(4, 8, 4, 8).mean(dim=(1, 3)).flip(1)
    assert close(m_norm, torch.stack([first, second]).flatten(1), 1e-6)
    assert not flat.any() and not close(m_norm[1], second.flip(1).flatten(), 1e-2)
    # --map_norm crop normalizes again, over the patches of the crop.
    by_crop, _ = crop_maps(maps, box, flip, Config(**TINY, map_norm="crop"))
    low, high = m_norm.amin(1, keepdim=True), m_norm.amax(1, keepdim=True)
    assert close(by_crop, (m_norm - low) / (high - low), 1e-5)
    assert not close(by_crop, m_norm, 1e-2)


def test_weights_of_the_ablations():
    """Table 10 of the paper; a flat map has weight 1 in every mode."""
    m, flat = torch.linspace(0, 1, 20).repeat(2, 1), torch.tensor([False, True])
    weights = {}
    for guidance in ("attg", "inverted", "foreground", "background"):
        weights[guidance] = patch_weights(m, 0.75, guidance, flat)
        assert (weights[guidance][1] == 1).all()
    assert close(weights["attg"][0], (m[0] / 0.75).exp(), 1e-6)
    assert close(weights["inverted"][0], ((1 - m[0]) / 0.75).exp(), 1e-6)
    assert (weights["foreground"][0] == 0).tolist() == [True] * 2 + [False] * 18
    assert (weights["background"][0] == 0).tolist() == [False] * 18 + [True] * 2
    assert patch_weights(m, 0.75, "none") is None
    with pytest.raises(ValueError, match="'typo'.*'inverted'"):
        patch_weights(m, 0.75, "typo")


def test_tau_rises_and_the_learning_rate_falls_by_half_a_cosine():
    """tau from 0.75 to 1.0; the learning rate after a linear warm-up."""
    cfg, steps = Config(), np.arange(101)
    half_cycle = (1 - np.cos(np.pi * steps / 100)) / 2
    taus = [tau_at(step, 100, cfg) for step in steps]
    np.testing.assert_allclose(taus, 0.75 + 0.25 * half_cycle, rtol=1e-12)
    assert tau_at(50, 100, Config(tau_schedule="constant")) == 0.75
    rates = [lr_at(step, 110, 10, 2.0) for step in range(111)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(10), rtol=1e-12)
    np.testing.assert_allclose(rates[10:], 2.0 - 2.0 * half_cycle, atol=1e-12)


# -- Training --------------------------------------------------------------------------


@pytest.mark.parametrize("clip_grad", [0.0, 0.1])
def test_a_training_step_is_algorithm_1(clip_grad):
    """Two micro-batches, against their batch written out: M_norm, weights, loss, gradient.

    SGD with lr 1 moves the weights by the gradient; AdamW would hide its scale.
    """
    options = {"accum": 2, "clip_grad": clip_grad, "std": (0.2, 0.2, 0.2)}
    cfg = resolve(Config(**TINY | options))
    torch.manual_seed(2)
    ours = MAE(cfg)
    theirs = copy.deepcopy(ours)
    image = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    maps, noise, flip = rand(4, 4, 4), rand(4, 16), torch.tensor([True, False] * 2)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(4, 1)
    batch = Batch(image, maps, box, flip, noise)
    halves = [Batch(*[x[rows] for x in batch[:5]]) for rows in ([0, 1], [2, 3])]
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    tau = torch.tensor(0.8)
    values = attg_mae.train_step(ours, optimizer, scaler, halves, tau, cfg)

    imgs, m_norm = image / 255, maps.clone()
    imgs = (imgs - torch.tensor(cfg.mean).view(3, 1, 1)) / cfg.std[0]
    imgs[::2], m_norm[::2] = imgs[::2].flip(3), m_norm[::2].flip(2)
    _, pred, mask = theirs(imgs, noise=noise)
    patches = imgs.reshape(4, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)
    patches, m_norm = patches.reshape(4, 16, 48), m_norm.flatten(1)
    loss = equations(pred, patches, mask, m_norm, 0.8)
    mse = equations(pred, patches, mask, 0 * m_norm, 0.8)
    loss.backward()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    norm = torch.cat([p.grad.flatten() for p in trained]).norm()
    assert close(values, torch.stack([loss, mse, norm]), 1e-5)
    assert norm > 0.5
    scale = clip_grad / norm if clip_grad else 1.0
    for before, p in zip(theirs.parameters(), ours.parameters(), strict=True):
        if before.requires_grad:
            assert (p - before + scale * before.grad).norm() < 1e-4 * norm * scale


def test_each_step_has_masks_and_crops_of_its_own(labelled, passes, tmp_path):
    """No mask and no crop comes twice; every patch is hidden in about 3 steps of 4."""
    train(tmp_path, **labelled)
    masks = torch.stack([seen.mask for seen in passes])  # (24, 4, 16)
    assert len(masks) == len(masks.unique(dim=0)) == 24
    assert len(masks.flatten(0, 1).unique(dim=0)) > 80  # of 96; 1,820 are possible
    crops = torch.cat([seen.imgs for seen in passes])
    assert len(crops.flatten(1).unique(dim=0)) == 96
    five_deviations = 5 * math.sqrt(0.75 * 0.25 / 96)
    assert ((masks.mean(dim=(0, 1)) - 0.75).abs() < five_deviations).all()


def test_a_stopped_run_goes_on_to_the_bit(labelled, whole, tmp_path):
    """SIGTERM in the middle of an epoch, then the same command."""
    with stop_after(8):
        assert train(tmp_path, **labelled)["stopped"] == signal.SIGTERM
    assert last(tmp_path)["step"] == 8
    train(tmp_path, **labelled)
    assert_same_run(tmp_path, whole())


KEYS = ("loss", "mse", "grad_norm")


def test_accumulation_and_workers_change_nothing(labelled, whole, tmp_path):
    """The same log from two micro-batches a step, decoded by two loader workers."""
    train(tmp_path, **labelled, accum=2, workers=2)
    got = [[row[key] for key in KEYS] for row in records(tmp_path)]
    want = np.array([[row[key] for key in KEYS] for row in records(whole())])
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert not np.isclose(want[1:, 0], want[:-1, 0], rtol=1e-4).any()


def test_two_processes_are_one(ask, labelled, distributed, tmp_path):
    """The same log at every step, whichever process computed which part."""
    one = Process(ask, tmp_path / "one", TINY | labelled | {"eval_every": 2})
    assert one.wait()[0] == 0
    got, want = (
        [[r[k] for k in KEYS] for r in records(x)] for x in (distributed, one.out)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_processes_share_the_global_batch():
    """Micro-batch a of rank r is rows (a * world + r) * b and following."""
    size = {"n": 30, "batch_size": 12, "start": 1, "stop": 5, "seed": 3}
    (*whole,) = ResumableBatchSampler(**size)
    for rank in range(3):
        shards = iter(ResumableBatchSampler(**size, accum=2, rank=rank, world=3))
        for batch in whole:
            for first in (2 * rank, 6 + 2 * rank):
                assert next(shards) == batch[first : first + 2]
    # Steps 1 to 4 of 2 per epoch: batches of an epoch share no image.
    assert not set(whole[1]) & set(whole[2]) and len(whole) == 4


def test_a_run_guided_by_flat_maps_is_a_vanilla_run(labelled, tmp_path):
    """Its weights are the same bits."""
    flat = make_maps(tmp_path / "flat.npy", labelled["data"], flat=True)
    train(tmp_path / "flat", **labelled | {"maps": flat}, epochs=1)
    vanilla = labelled | {"maps": None, "guidance": "none"}
    train(tmp_path / "vanilla", **vanilla, epochs=1)
    flat, vanilla = last(tmp_path / "flat"), last(tmp_path / "vanilla")
    assert all(x.equal(vanilla["model"][name]) for name, x in flat["model"].items())


# -- Maps and features -----------------------------------------------------------------


def test_tokencut_solves_the_normalized_cut():
    """The eigenvector that scipy.linalg.eigh(D - A, D) finds."""
    linalg = pytest.importorskip("scipy.linalg")
    features = randn(3, 30, 8)
    features[:, :9] += 2  # an object
    for x, y in zip(F.normalize(features, dim=-1), tokencut(features), strict=True):
        A = np.where((x @ x.T).double().numpy() > 0.2, 1.0, 1e-5)
        D = np.diag(A.sum(axis=1))
        _, vectors = linalg.eigh(D - A, D)
        want = vectors[:, 1] * np.sign(vectors[np.abs(vectors[:, 1]).argmax(), 1])
        assert close(y, want, 1e-5) and not close(y, vectors[:, 2], 1e-1)


def test_features_are_the_class_token_and_the_mean_of_the_patches():
    """Of images that are not masked."""
    vit = timm_model(128, 4, 4, patch_size=4)
    ours = load_encoder(vit.state_dict(), heads=4)
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(3)
    batches = [SimpleNamespace(image=image, label=labels)]
    class_token, patch_mean, got_labels = extract_features(ours, batches)
    tokens = vit.forward_features(ours.normalize(image))
    assert close(class_token, tokens[:, 0], 1e-5) and got_labels.equal(labels)
    assert close(patch_mean, tokens[:, 1:].mean(1), 1e-5)
    assert not close(patch_mean, tokens.mean(1), 1e-3)  # with the class token


def test_knn_is_that_of_scikit_learn():
    """Cosine, votes weighted by exp(similarity / 0.07)."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels, queries = randn(300, 8), torch.arange(300) % 5, randn(80, 8, seed=1)

    def weights(distance):
        return np.exp((1 - distance) / 0.07)

    peer = neighbors.KNeighborsClassifier(20, metric="cosine", weights=weights)
    want = peer.fit(bank, labels).predict(queries)
    assert knn_classify(bank, labels, queries)[:, 0].tolist() == want.tolist()
    assert knn_classify(bank, labels, queries, k=1)[:, 0].tolist() != want.tolist()


# -- Layout -------------------------------------------------------------------------


def test_the_method_is_in_one_file(tmp_path):
    """attg_mae.py copied alone trains on random images; a run asks for the packages."""
    shutil.copy(ROOT / "attg_mae.py", tmp_path)
    code = "import attg_mae as a; a.demo(); a.demo(); a.train(a.Config())"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = python("-c", code, cwd=tmp_path, env=env)
    losses = [float(x) for x in re.findall(r"loss (\S+),", done.stdout)]
    assert losses[:3] == losses[3:] and losses[0] > losses[1] > losses[2], done.stderr
    assert re.match("ModuleNotFoundError: .*attg/", done.stderr.splitlines()[-1])


def test_imports_go_one_way():
    """attg/ imports no program, kernels/ nothing of this repository."""
    programs = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "docs"}
    for folder, others in (("attg", programs), ("kernels", programs | {"attg"})):
        for path in ROOT.glob(f"{folder}/*.py"):
            lines = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.M)
            assert not others & set(lines), path
