"""
From the map of an image to the weights of the patches of a crop.
"""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import attg_mae
from attg.loader import Batch
from tests.helpers import rand

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
    m[flat], image = 0.5, torch.zeros(B, 3, 7, rows, dtype=torch.uint8)
    maps, unflipped = m.view(B, 7, rows), torch.zeros(B, dtype=torch.bool)
    batch = Batch(image, maps, WHOLE.expand(B, 4), unflipped, noise)
    _, weight, order = attg_mae.model_inputs(batch, cfg, tau)
    visible, want = order.argsort(1)[:, : L // 4], np.lexsort((noise, m))[:, : L // 4]
    assert weight is None and np.array_equal(np.sort(visible), np.sort(want))


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
        assert flat.tolist() == want and not m[0].any() and m[2].any()
