"""
From the map of an image to the weights of the patches of a crop.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attg_mae
from attg.loader import Batch
from tests.helpers import close, rand

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), levels=st.integers(1, 80))
def test_uses_of_a_map(seed, rows, levels):
    """Weights and masks patch by patch, for maps with few levels, which tie, or many."""
    L, B, tau = rows * 7, 4, 0.5
    torch.manual_seed(seed)
    m = torch.randint(levels, (B, L)) / max(levels - 1, 1)
    noise, ties, flat = torch.rand(B, L), torch.rand(B, L), torch.rand(B) < 0.3
    for guidance in ("attg", "inverted", "foreground", "background"):
        x = 1 - m if guidance in ("inverted", "background") else m
        want = (x.double() / tau).exp().numpy()
        if guidance in ("foreground", "background"):
            lowest = np.lexsort((ties, x))[:, : math.ceil((L - 1) / 10)]
            np.put_along_axis(want, lowest, 0.0, 1)
        want[flat] = 1
        got = attg_mae.patch_weights(m, tau, guidance, flat, ties)
        np.testing.assert_allclose(got, want, rtol=1e-5)

    # Input masking hides the highest patches, of a flat map random ones.
    cfg = attg_mae.Config(img_size=(7, rows), patch_size=1, guidance="input_masking")
    m[flat], image = 0.5, torch.zeros(B, 3, 7, rows)
    maps, unflipped = m.view(B, 7, rows), torch.zeros(B, dtype=torch.bool)
    batch = Batch(image, maps, WHOLE.expand(B, 4), unflipped, noise)
    _, weight, order = attg_mae.model_inputs(batch, cfg, tau)
    visible, want = order.argsort(1)[:, : L // 4], np.lexsort((noise, m))[:, : L // 4]
    assert weight is None and np.array_equal(np.sort(visible), np.sort(want))


@pytest.mark.parametrize("grid", [(8, 8), (14, 20), (16, 7)], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (40, 56), (224, 160)], ids=str)
def test_pool_maps_follows_crop_and_flip(size, grid):
    """The mean of a ramp over a patch of the crop is its value at the patch's center."""
    (h, w), (rows, columns), n = size, grid, 40
    ramp = 2 * (torch.arange(h)[:, None] + 0.5) / h + (torch.arange(w) + 0.5) / w
    sides = 0.4 + 0.5 * rand(n, 2, seed=1)
    # A pixel away from the border, where a map is level.
    corner = 1 / min(size) + (1 - 2 / min(size) - sides) * rand(n, 2, seed=3)
    box, flip = torch.cat([corner, corner + sides], 1), rand(n, seed=4) < 0.5
    x = corner[:, :1] + sides[:, :1] * (torch.arange(columns) + 0.5) / columns
    y = corner[:, 1:] + sides[:, 1:] * (torch.arange(rows) + 0.5) / rows
    x = torch.where(flip[:, None], x.flip(1), x)
    want = (2 * y[:, :, None] + x[:, None]).flatten(1)
    maps = ramp.expand(n, h, w)
    assert close(attg_mae.pool_maps(maps, box, flip, grid), want, 1e-5)
    half_a_pixel = 0.5 / torch.tensor([w, h, w, h])
    for wrong in (
        (box[:, [1, 0, 3, 2]], flip),
        (box, ~flip),
        (box + half_a_pixel, flip),
    ):
        assert not close(attg_mae.pool_maps(maps, *wrong, grid), want, 1e-3)
    # Of a whole image at a multiple of the grid it is average pooling.
    m = rand(1, 2 * rows, 2 * columns)
    whole = attg_mae.pool_maps(m.half(), WHOLE[None], torch.tensor([False]), grid)
    assert close(whole, nn.functional.avg_pool2d(m, 2).flatten(1), 1e-3)
    assert whole.dtype == torch.float32


def test_a_flat_crop_of_a_map_that_is_not_flat():
    """Weight 1 in every mode with --map_norm crop, background with --map_norm image."""
    maps = torch.zeros(3, 8, 8)
    maps[0, :, 4:] = 1.0  # an object in the right half
    maps[1], maps[2] = 0.5, rand(8, 8)
    left = torch.tensor([0.0, 0.0, 0.5, 1.0]).expand(3, 4)
    for map_norm, want in (
        ("crop", [True, True, False]),
        ("image", [False, True, False]),
    ):
        cfg = attg_mae.Config(map_norm=map_norm, img_size=16, patch_size=4)
        m, flat = attg_mae.crop_maps(maps, left, torch.zeros(3, dtype=torch.bool), cfg)
        assert flat.tolist() == want
        for guidance in ("attg", "inverted", "foreground", "background"):
            weight = attg_mae.patch_weights(m, 1.0, guidance, flat)
            assert (weight[flat] == 1).all() and (weight[2] != 1).any()
        assert map_norm == "crop" or (1 - m[0] == 1).all()  # background
