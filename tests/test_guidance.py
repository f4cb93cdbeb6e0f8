"""
From the map of a picture to the weights of the patches of a crop; the schedules.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

import attg_mae
from attg.loader import Batch
from attg.seeding import generator_for
from tests.helpers import close, oracle, rand, randn, run


def test_tau_at_and_lr_at():
    half = math.sqrt(0.5)
    for step, part in {
        0: 0.0,
        25: (1 - half) / 2,
        50: 0.5,
        75: (1 + half) / 2,
        100: 1.0,
    }.items():
        assert attg_mae.tau_at(step, 100, attg_mae.Config()) == pytest.approx(
            0.75 + 0.25 * part, abs=1e-12
        )
        assert attg_mae.tau_at(
            step, 100, attg_mae.Config(tau=2.0, tau_end=0.5)
        ) == pytest.approx(2 - 1.5 * part, abs=1e-12)
        assert (
            attg_mae.tau_at(
                step, 100, attg_mae.Config(tau=0.6, tau_schedule="constant")
            )
            == 0.6
        )
    values = {
        0: 0.0,
        1: 0.2,
        5: 1.0,
        9: 1.8,
        10: 2.0,
        35: 1 + half,
        60: 1.0,
        85: 1 - half,
        110: 0.0,
    }
    for step, want in values.items():
        assert attg_mae.lr_at(step, 110, 10, 2.0) == pytest.approx(want, abs=1e-12)
    assert attg_mae.lr_at(0, 100, 0, 2.0) == 2.0
    assert attg_mae.lr_at(50, 100, 0, 2.0) == pytest.approx(1.0)


def test_guide():
    e, one = math.exp(2), [1.0] * 11  # tau = 0.5
    ramp = [math.exp(i / 5) for i in range(11)]
    maps = [  # and the weights for attg, inverted, foreground, background
        # Quantile 0.1
        (
            [i / 10 for i in range(11)],
            ramp,
            ramp[::-1],
            [0.0] + ramp[1:],
            ramp[:0:-1] + [0.0],
        ),
        # Quantile 0: of patches that tie the first is dropped, see ties below
        (
            [0] * 3 + [1] * 8,
            [1] * 3 + [e] * 8,
            [e] * 3 + [1] * 8,
            [0] + [1] * 2 + [e] * 8,
            [e] * 3 + [0] + [1] * 7,
        ),
        # Quantile 1, of 1 - M: 0
        (
            [0] + [1] * 10,
            [1] + [e] * 10,
            [e] + [1] * 10,
            [0] + [e] * 10,
            [e] + [0] + [1] * 9,
        ),
        # A crop without object is not flat
        ([0] * 11, one, [e] * 11, [0] + one[1:], [0] + [e] * 10),
        ([0] * 11, one, one, one, one),  # flat
        ([0.4] * 11, one, one, one, one),  # flat
    ]
    m, *weights = (
        torch.tensor(x, dtype=torch.float64) for x in zip(*maps, strict=True)
    )
    m, flat = m.float(), torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    before = m.clone()
    ties = torch.linspace(0, 1, 11).expand(6, -1)
    pred = randn(6, 11, 4)
    x = randn(6, 11, 4, seed=1)
    mask = rand(6, 11) < 0.7
    for i, guidance in enumerate(("attg", "inverted", "foreground", "background")):
        got = attg_mae.patch_weights(m, 0.5, guidance, flat, ties)
        assert m.equal(before)
        assert [
            torch.allclose(got.double(), w, rtol=1e-5, atol=0) for w in weights
        ] == [j == i for j in range(4)]
        rows = run(
            pred,
            x,
            mask,
            got.log(),
            torch.ones(6, 11),
            tau=1.0,
            normalize_attn=False,
            reduction="none",
        )[0]
        assert close(rows, oracle(pred, x, mask)[0] * weights[i], 5e-6)
    assert attg_mae.patch_weights(m, 0.5, "none", flat) is None


@pytest.mark.parametrize("guidance", ["foreground", "background"])
def test_ties_at_the_quantile_have_a_draw_of_their_own(guidance):
    """On two-valued maps a tenth of the masked patches has weight 0.

    The mask noise would drop visible ones only, so it must not break the ties.
    """
    B, L, steps = 8, 64, 100
    m = (rand(B, L, seed=1) < 0.5).float()
    grid = (8, 8)
    by_ties, by_noise = [], []
    for step in range(steps):
        noise, ties = (
            attg_mae.mask_noise(B, grid, generator_for(stream, 0, step))
            for stream in ("masks", "ties")
        )
        hidden = noise.argsort(dim=1).argsort(dim=1) >= 16
        for draw, shares in ((ties, by_ties), (noise, by_noise)):
            dropped = attg_mae.patch_weights(m, 1.0, guidance, ties=draw) == 0
            lowest = 0.0 if guidance == "foreground" else 1.0
            assert (dropped.sum(1) == 7).all() and (m[dropped] == lowest).all()
            shares.append(dropped[hidden].float().mean().item())
    # ceil(0.1 * 63) = 7 of 64, of 38,400 hidden patches: five deviations
    assert abs(np.mean(by_ties) - 7 / 64) < 5 * math.sqrt(0.11 * 0.89 / 38400)
    assert np.mean(by_noise) < 0.01


def test_without_ties_the_quantile_decides():
    """torch.quantile's 10 %; where that is one of the values its rounding decides."""
    for L in (2, 5, 16, 20, 49, 64, 196, 256, 300):
        m = rand(5, L, seed=L)
        for guidance, x in (("foreground", m), ("background", 1 - m)):
            low = x < x.quantile(0.1, dim=1, keepdim=True)
            weight = attg_mae.patch_weights(m, 1.0, guidance)
            assert (weight == 0).equal(low) and low.any()


def test_input_masking():
    n, L, keep = 6000, 16, 4
    m, noise, never = rand(n, L, seed=1), rand(n, L), torch.zeros(n).bool()

    def removed(noise):
        return torch.ones(n, L).scatter(1, noise.argsort(1)[:, :keep], 0.0)

    cfg = attg_mae.Config(guidance="input_masking", img_size=16, patch_size=4)
    image, box = torch.zeros(n, 3, 16, 16), torch.tensor([[0.0, 0, 1, 1]]).expand(n, 4)

    def masked(m, flat=never):
        before = noise.clone()
        maps = torch.where(flat[:, None], 0.5, m).view(n, 4, 4)
        batch = Batch(image, maps, box, never, noise)
        _, weight, new = attg_mae.model_inputs(batch, cfg, 0.75)
        assert weight is None and noise.equal(before)
        return removed(new)

    top = torch.zeros(n, L).scatter(1, m.topk(L - keep).indices, 1.0)
    plain = removed(noise)
    flat = torch.arange(n) % 2 == 0
    assert masked(m).equal(top) and not plain.equal(top)
    # Flat maps change nothing, whatever they hold
    assert masked(m, flat).equal(torch.where(flat[:, None], plain, top))
    assert masked(torch.full((n, L), 0.3)).equal(plain)
    for ones, share_one, share_zero in (
        (8, 1.0, 0.5),
        (14, 12 / 14, 0.0),
        (12, 1.0, 0.0),
        (3, 1.0, 9 / 13),
    ):
        binary = (rand(L, seed=ones).argsort() < ones).float().expand(n, L)
        want, gone = torch.where(binary[0] > 0, share_one, share_zero), masked(binary)
        limit = 5 * (want * (1 - want) / n).sqrt()
        assert (gone.sum(1) == L - keep).all()
        assert ((gone.mean(0) - want).abs() <= limit).all()
        # Ties broken by position
        by_place = removed(binary.argsort(dim=1, stable=True).argsort(1).float()).mean(
            0
        )
        assert ones == 12 or ((by_place - want).abs() > limit).any()


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (14, 20), (16, 7)], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (40, 56), (224, 160)], ids=str)
def test_pool_maps_follows_crop_and_flip(size, grid):
    (h, w), (gh, gw), n = size, grid, 40
    area = 0.2 + 0.8 * rand(n, seed=1)
    ratio = ((rand(n, seed=2) * 2 - 1) * math.log(4 / 3)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    place = rand(n, 2, seed=3)
    # The corners
    place[:4] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    sides[-1] = 1  # the whole picture
    box = torch.cat([(1 - sides) * place, (1 - sides) * place + sides], 1)
    flip = rand(n, seed=4) < 0.5
    # A ramp's mean over a patch of the crop is its value at the patch's centre. A map of
    # pixels is level within half a pixel of the picture's border; patches that reach in
    # there are border patches.
    ramps, wants, border = [], [], torch.zeros(n, gh, gw).bool()
    for axis, (g, pixels) in enumerate(((gw, w), (gh, h))):
        side = sides[:, axis, None] / g
        centre = box[:, axis, None] + side * (torch.arange(g) + 0.5)  # (n, g)
        near = (centre - side / 2 < 0.5 / pixels) | (
            centre + side / 2 > 1 - 0.5 / pixels
        )
        ramp = ((torch.arange(pixels) + 0.5) / pixels).half()
        if axis == 0:
            centre, near = (
                torch.where(flip[:, None], v.flip(1), v) for v in (centre, near)
            )
        wants.append(
            (centre[:, None] if axis == 0 else centre[:, :, None]).expand(n, gh, gw)
        )
        border |= near[:, None] if axis == 0 else near[:, :, None]
        ramps.append((ramp if axis == 0 else ramp[:, None]).expand(n, h, w))

    def passes(pool):
        pairs = zip(ramps, wants, strict=True)
        errors = [
            (pool(m, box, flip, grid).reshape(n, gh, gw) - want).abs()
            for m, want in pairs
        ]
        return all(
            e[~border].max() <= 0.005 and e[border].max() <= 0.01 for e in errors
        )

    def variant(maps, box, flip, grid, order=(0, 1, 2, 3), aligned=True, flips=True):
        rois = torch.cat(
            [torch.arange(n)[:, None], box[:, order] * torch.tensor([w, h, w, h])], 1
        )
        out = roi_align(maps.float()[:, None], rois, grid, 1.0, -1, aligned)
        return torch.where(flip[:, None, None, None] & flips, out.flip(-1), out)

    assert passes(attg_mae.pool_maps)
    assert passes(variant)
    assert attg_mae.pool_maps(ramps[0], box, flip, grid).dtype == torch.float32
    assert not passes(partial(variant, order=(1, 0, 3, 2)))
    assert not passes(partial(variant, flips=False))
    # Half a pixel of a large map is nothing
    assert h > 100 or not passes(partial(variant, aligned=False))
    # The whole picture at a multiple of the grid is average pooling
    for times in (1, 2, 4):
        m = rand(1, times * gh, times * gw)
        whole = attg_mae.pool_maps(m, box[-1:], torch.tensor([False]), grid)
        assert close(whole, nn.functional.avg_pool2d(m, times).flatten(1), 1e-6)


def test_a_flat_crop_of_a_map_that_is_not_flat():
    """--map_norm crop finds no object in it: weight 1 in every mode, as a flat map has.

    --map_norm image knows the rest of the picture: the crop is all background.
    """
    maps = torch.zeros(3, 8, 8)
    maps[0, :, 4:] = 1.0  # an object in the right half
    maps[1], maps[2] = 0.5, rand(8, 8)
    left = torch.tensor([0.0, 0.0, 0.5, 1.0]).expand(3, 4)
    flip = torch.zeros(3).bool()
    cfg = {"img_size": 16, "patch_size": 4}  # 4 x 4 patches, of a map's 2 x 1 pixels
    means = maps[2, :, :4].reshape(4, 2, 4).mean(1).flatten()

    crop = attg_mae.Config(map_norm="crop", **cfg)
    m, flat = attg_mae.crop_maps(maps, left, flip, crop)
    assert flat.tolist() == [True, True, False] and not m[:2].any()
    assert close(m[2], (means - means.min()) / (means.max() - means.min()), 1e-5)
    for guidance in ("attg", "inverted", "foreground", "background"):
        weight = attg_mae.patch_weights(m, 1.0, guidance, flat)
        assert (weight[:2] == 1).all() and (weight[2] != 1).any()

    image = attg_mae.Config(map_norm="image", **cfg)
    m, flat = attg_mae.crop_maps(maps, left, flip, image)
    assert flat.tolist() == [False, True, False]
    assert not m[0].any() and (m[1] == 0.5).all() and close(m[2], means, 1e-6)
    weight = attg_mae.patch_weights(m, 1.0, "inverted", flat)
    assert (weight[0] == math.e).all() and (weight[1] == 1).all()
