"""
TokenCut's threshold and the weight of its missing edges, and the signs of Grad-CAM.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import object_discovery
from tests.helpers import randn


def second_vector(edges, eps):
    """The cut of a graph, edges bool (L, L), by scipy; its largest entry is positive."""
    linalg = pytest.importorskip("scipy.linalg")
    A = np.where(edges, 1.0, eps)
    D = np.diag(A.sum(1))
    y = linalg.eigh(D - A, D)[1][:, 1]
    return y * np.sign(y[np.abs(y).argmax()])


def far(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_a_cosine_at_the_threshold_is_no_edge():
    """One-hot features have the cosine 0 exactly, which is not above tau = 0."""
    kinds = torch.tensor([0] * 5 + [1] * 12 + [2] * 8)
    features = F.one_hot(kinds).double()[None]
    got = object_discovery.tokencut(features, tau=0.0)[0].numpy()
    edges = (kinds[:, None] == kinds).numpy()
    assert far(got, second_vector(edges, 1e-5)) < 1e-6
    # With every edge there is nothing to cut; at -0.1 they are all above.
    every = object_discovery.tokencut(features, tau=-0.1)[0].numpy()
    assert far(every, second_vector(edges, 1e-5)) > 0.1


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
def test_missing_edges_weigh_eps(eps):
    features = randn(1, 40, 3, seed=4, dtype=torch.float64)
    x = F.normalize(features[0], dim=1)
    edges = (x @ x.T > 0.8).numpy()
    want = second_vector(edges, eps)
    assert far(object_discovery.tokencut(features, 0.8, eps)[0].numpy(), want) < 1e-8
    dense = object_discovery.tokencut_dense(torch.from_numpy(edges)[None], eps)
    assert far(dense[0].numpy(), want) < 1e-8
    assert far(second_vector(edges, 1.1 * eps), want) > 1e-7
    # Unless it is given it is the paper's.
    usual = object_discovery.tokencut(features, 0.8)[0].numpy()
    assert (far(usual, want) < 1e-8) == (eps == 1e-5)


def test_grad_cam_keeps_what_speaks_for_the_class():
    """Features of both signs: cells that speak against it are 0, not negative."""
    features, weight = randn(3, 5, 4, 6), randn(7, 5, seed=1)

    def classify(x):
        return x.mean((2, 3)).square() @ weight.T

    got = object_discovery.grad_cam(features, classify, (4, 6), (4, 6))
    x = features.double().numpy()
    pooled = x.mean((2, 3))
    best = (pooled**2 @ weight.double().numpy().T).argmax(1)
    # d score / d x, the same in each of the 24 cells.
    alpha = 2 * pooled * weight.double().numpy()[best] / 24
    cam = np.einsum("bc,bchw->bhw", alpha, x)
    assert (cam < 0).mean() > 0.2 and (cam > 0).mean() > 0.2
    np.testing.assert_allclose(got, np.maximum(cam, 0), rtol=1e-4, atol=1e-6)
    assert np.abs(got.numpy() - cam).max() > 1e-2
