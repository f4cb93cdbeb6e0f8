"""
The methods against other implementations: TokenCut and MaskCut against scipy, class
attention against Hugging Face, Grad-CAM against the grad-cam package.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import object_discovery
from attg.kernels import normalize_map
from attg_mae import normalize
from object_discovery import IMAGENET, Settings, cut_maps, tokencut
from tests.helpers import close, hf_model, rand, randn, shake


def model_settings(**changes):
    return Settings(**{"sign": "max"} | changes)


def smooth_features(number, grid):
    """Features (number, L, 8) of images."""
    x = F.interpolate(randn(number, 8, 4, 4), grid, mode="bilinear")
    return x.flatten(2).mT.clone()


# -- TokenCut --------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Features float64 (L, d): noise, smooth, two sides, clusters; some with zeros."""
    L, d = draw(st.integers(5, 120)), draw(st.integers(2, 64))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, families = rng.normal(size=(L, d)), ["noise", "smooth", "sides", "clusters"]
    family = draw(st.sampled_from(families))
    if family == "sides":
        x = 0.5 * x + rng.normal(size=(2, d))[rng.integers(0, 2, L)]
        # One patch holds the two sides together.
        x[0] = x.mean(0)
    elif family == "clusters":
        # Unconnected but for eps; equal sizes give a repeated eigenvalue.
        x = np.eye(d)[np.sort(rng.integers(0, draw(st.integers(2, d)), L))]
    elif family == "smooth":
        x = np.cumsum(x, axis=0)
    if draw(st.booleans()):
        x[:: draw(st.integers(2, 5))] = 0
    return x


def cosines(x):
    x = F.normalize(torch.from_numpy(x), dim=-1)
    return (x @ x.T).numpy()


def generalized_eigen(edges, eps):
    """scipy's eigenvalues and vectors of (D - A) y = lambda D y, D (L,) and A."""
    linalg = pytest.importorskip("scipy.linalg")
    A = np.where(edges | edges.T, 1.0, eps)
    d = A.sum(1)
    return *linalg.eigh(np.diag(d) - A, np.diag(d)), d, A


def scipy_cut(edges, eps=1e-5):
    y = generalized_eigen(edges, eps)[1][:, 1]
    return y * np.sign(y[np.abs(y).argmax()])


def distance(y, want):
    """The largest difference, relative to the largest entry, whatever the sign."""
    return min(np.abs(want - y).max(), np.abs(want + y).max()) / np.abs(want).max()


@given(graphs(), st.sampled_from([-0.1, 0.0, 0.2, 0.9]), st.sampled_from([1e-5, 0.01]))
def test_tokencut_equals_scipy(x, tau, eps):
    edges = cosines(x) > tau
    edges |= edges.T
    values, vectors, d, A = generalized_eigen(edges, eps)
    arguments = torch.from_numpy(x)[None], tau, eps
    with pytest.MonkeyPatch.context() as patch:
        # As if it never converged
        patch.setattr(
            object_discovery, "lanczos", lambda S, v: (v.clone(), v[:, 0] < 0)
        )
        dense = tokencut(*arguments)[0].numpy()
    for y in (tokencut(*arguments)[0].numpy(), dense):
        if edges.all() or not (edges & ~np.eye(len(x), dtype=bool)).any():
            assert not y.any()  # Any vector is a solution.
            continue
        assert math.isclose(y @ (d * y), 1, rel_tol=1e-9)
        left, right = d * y - A @ y, d * y
        assert abs(y @ left - values[1]) < 1e-9
        norm = np.linalg.norm
        assert norm(left - values[1] * right) < 1e-8 * norm(right)
        if values[2] - values[1] > 1e-6:  # Else any vector of a plane is a solution.
            assert distance(y, vectors[:, 1]) < 1e-5
        # If the two highest peaks are tied, the sign may be either's.
        second, first = np.sort(np.abs(y))[-2:]
        assert y.max() == first or second > (1 - 1e-5) * first


def test_a_graph_on_which_lanczos_does_not_converge():
    """A path of 300 patches: its eigenvalues are close together, both ends are peaks."""
    angle = torch.arange(300, dtype=torch.float64) * math.pi / 300
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    tau = math.cos(1.5 * math.pi / 300)
    want = scipy_cut(cosines(x.numpy()) > tau)
    assert distance(tokencut(x[None], tau)[0].numpy(), want) < 1e-6


def test_which_peak_decides_the_sign():
    """The largest magnitude; the first of those that are equal up to rounding."""
    y = torch.tensor([[0.99, -1.0], [0.9999999, -1.0], [-1.0, 1.0]])
    got = object_discovery.positive_peak(y)
    assert got.equal(torch.tensor([[-0.99, 1.0], [0.9999999, -1.0], [1.0, -1.0]]))


def test_tokencut_is_independent_of_the_batch():
    features = smooth_features(60, 14)
    alone = torch.cat([tokencut(x[None]) for x in features])
    assert torch.allclose(tokencut(features), alone, atol=1e-7)
    assert len(alone.unique(dim=0)) == len(alone)
    assert alone.dtype == torch.float32
    assert torch.allclose(tokencut(features.half()), alone, atol=1e-2)
    assert tokencut(features[:, :1]).equal(torch.zeros(60, 1))
    features[7, 3, 1], features[9, 0, 0] = math.nan, math.inf
    y = tokencut(features)
    assert y[[7, 9]].isnan().all() and y.isnan().any(1).sum() == 2


# -- MaskCut ---------------------------------------------------------------------------


def dense_maskcut(x, grid, objects=1, sign="max"):
    """MaskCut of features (L, d) -> (h, w) in [0, 1], with scipy."""
    ndimage = pytest.importorskip("scipy.ndimage")
    left, merged, inside = np.ones(grid, bool), np.zeros(grid), np.zeros(grid, bool)
    inside[1:-1, 1:-1] = True
    for _ in range(objects):
        edges = cosines(np.where(left.reshape(-1, 1), x, 0)) > 0.2
        y = scipy_cut(edges).reshape(grid)
        y = y * np.sign(y[left][np.abs(y[left]).argmax()])
        low, high = y[left].min(), y[left].max()
        m = np.where(left, (y - low) / (high - low), 0)
        if sign == "border" and m[left & ~inside].mean() > m[left & inside].mean():
            m = np.where(left, 1 - m, 0)
        merged = np.maximum(merged, m)
        regions, _ = ndimage.label(m > m[left].mean())
        left = left & (regions != regions.flat[m.argmax()])
    return merged


def test_cuts_equal_a_dense_maskcut():
    features, maps = smooth_features(8, (12, 14)), []
    for objects, sign in product((1, 2, 3), ("max", "border")):
        settings = model_settings(objects=objects, sign=sign)
        got = cut_maps(features, (12, 14), settings).numpy()
        for x, m in zip(features.double().numpy(), got, strict=True):
            assert np.abs(m - dense_maskcut(x, (12, 14), objects, sign)).max() < 1e-3
        # Another number of objects or another sign is another map.
        assert all(np.abs(got - other).max() > 0.1 for other in maps)
        maps.append(got)


def test_cuts_without_a_solution():
    """All patches alike, or none: flat maps. Features that are not finite: NaN."""
    for alike in (torch.ones(1, 9, 4), torch.eye(9)[None]):
        assert not cut_maps(alike, (3, 3), model_settings(sign="border")).any()
    halves = torch.eye(2)[torch.tensor([0] * 8 + [1] * 8)][None]
    one = cut_maps(halves, (4, 4), model_settings())
    # Each half is all alike: nothing is left to be cut.
    assert cut_maps(halves, (4, 4), model_settings(objects=5)).equal(one)
    assert one.unique().tolist() == [0, 1]
    # Nor has a grid without inner cells a border.
    narrow = smooth_features(1, (2, 9))
    want = cut_maps(narrow, (2, 9), model_settings())
    assert cut_maps(narrow, (2, 9), model_settings(sign="border")).equal(want)
    features = smooth_features(3, 14)
    features[1, 2, 0] = math.nan
    m = cut_maps(features, (14, 14), model_settings(objects=2, sign="border"))
    assert m.isnan().any(2).any(1).tolist() == [False, True, False]


# -- Backbones -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 48])
def test_class_attention_equals_hugging_face(size, tmp_path):
    options = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    options["attn_implementation"] = "eager"
    ref = shake(hf_model("ViTModel", "vit_small", **options))
    torch.save(ref.state_dict(), tmp_path / "vit.pt")
    file = str(tmp_path / "vit.pt")
    settings = model_settings(backbone=file, method="dino", img_size=size)
    backbone = object_discovery.vit(settings, "cpu")
    assert backbone.size == (size, size) and backbone.grid == (size // 8,) * 2
    imgs = (rand(2, 3, size, size) * 255).byte()
    got = backbone.maps(imgs).flatten(1)
    x = normalize(imgs, IMAGENET)
    out = ref(x, output_attentions=True, interpolate_pos_encoding=True)
    want = out.attentions[-1][:, :, 0, 1:].mean(1)
    assert close(got, want, 1e-5) and not close(got.roll(1, 1), want, 1e-3)


def random_cnn(name, size, path, method):
    """An untrained classifier that sees its input, as a Backbone; 3 images."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    for module in model.modules():
        if method == "gradcam" and isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.2, 0.6)
    torch.save(model.state_dict(), path)
    flags = {"method": method, "weights": str(path), "img_size": size}
    backbone = object_discovery.cnn(model_settings(backbone=name, **flags), "cpu")
    return model, backbone, F.interpolate(rand(3, 3, 8, 8) * 255, (size, size)).byte()


@pytest.mark.parametrize(("name", "size"), [("resnet50", 96), ("mobilenet_v2", 160)])
def test_grad_cam_equals_the_package(name, size, tmp_path):
    from pytorch_grad_cam import GradCAM

    ref, backbone, imgs = random_cnn(name, size, tmp_path / "cnn.pt", "gradcam")
    with GradCAM(ref, [ref.layer4 if name == "resnet50" else ref.features[-1]]) as cam:
        want = torch.from_numpy(cam(normalize(imgs, IMAGENET), targets=None))
    want = normalize_map(F.adaptive_avg_pool2d(want[:, None], 14).flatten(1))
    got = normalize_map(backbone.maps(imgs).flatten(1))
    assert backbone.grid == (14, 14) and want.std(1).min() > 0.1
    assert torch.allclose(got, want, atol=1e-4)
    assert not torch.allclose(got.roll(1, 1), want, atol=1e-2)


def test_grad_cam_clips_what_speaks_against_the_class():
    """Features of both signs, the gradient in closed form."""
    features, weight = randn(3, 5, 4, 6), randn(7, 5, seed=1)
    classify = lambda x: x.mean((2, 3)).square() @ weight.T  # noqa: E731
    got = object_discovery.grad_cam(features, classify, (4, 6), (4, 6))
    # d score / d x, the same in each of the 24 cells.
    alpha = features.mean((2, 3)) * weight[classify(features).argmax(1)] / 12
    cam = torch.einsum("bc,bchw->bhw", alpha, features)
    assert 0.2 < (cam < 0).float().mean() < 0.8
    torch.testing.assert_close(got, cam.relu(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("resnet50", 96), ("mobilenet_v2", 104)])
def test_cut_of_a_classifier_equals_scipy(name, size, tmp_path):
    ref, backbone, imgs = random_cnn(name, size, tmp_path / "cnn.pt", "tokencut")
    layer, seen = ref.layer3 if name == "resnet50" else ref.features[13], []
    layer.register_forward_hook(lambda *values: seen.append(values[-1].detach()))
    ref(normalize(imgs, IMAGENET))
    assert seen[0].shape[2:] == backbone.grid == (math.ceil(size / 16),) * 2
    for m, x in zip(backbone.maps(imgs).numpy(), seen[0], strict=True):
        x = x.flatten(1).T.double().numpy()
        want = dense_maskcut(x - x.mean(0), backbone.grid)
        assert np.abs(m - want).max() < 1e-3
        # Neither another layout of the grid nor features that are not centered would do.
        assert np.abs(m - want.T).max() > 0.1
        assert np.abs(m - dense_maskcut(x, backbone.grid)).max() > 0.1
