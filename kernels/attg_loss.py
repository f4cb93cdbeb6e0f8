# SPDX-License-Identifier: MIT, Copyright 2026 attg-mae contributors
"""
Attention-guided reconstruction loss of a masked autoencoder (Sick et al., arXiv
2402.15172), for any MAE code base. Self-contained: copy this one file. It needs
PyTorch; on NVIDIA and AMD GPUs it uses Triton, which comes with PyTorch.

    from attg_loss import attg_loss
    loss = attg_loss(pred, imgs, mask, attn, tau=0.75, patch_size=16)

Without a map (attn=None) this is the loss of MAE. `pool_maps` turns maps of whole images
into attn of their random crops. A batch has B images of L patches of P values. The mask
is 1 where a patch was masked and is predicted:

    M_norm = (M - min M) / (max M - min M)        per image, over all L patches
    w      = exp(M_norm / tau)                    Eq. 1: the background (0) has weight 1
    x_norm = (x - mean x) / sqrt(var x + eps)     per patch, unbiased variance
    l      = mean_P (pred - x_norm)^2             per patch
    loss   = sum(mask * w * l) / sum(mask)        Eq. 2
    mse    = sum(mask * l) / sum(mask)            on request, from the same pass

Code bases differ in things that their tensors do not show:

mask        Where 1 means visible (Hiera, SparK), pass ~mask.
patches     Row by row, without a class token: pred[:, 1:], attn[:, 1:]. In images their
            values have the order (p, p, C). For another order, as (C, p, p) in Hiera,
            CROMA and Clay, or for video, pass your own patches as target.
norm_pix    True here, False by default in MAE. Pass False if targets are normalized.
attn        If only masked patches are predicted, use `normalize_map` before gathering,
            and normalize_attn=False. An image without a map gets zeros, that is weight 1.
mean        Over all masked patches of the call, not per image and then over images. If
            ranks mask unequal numbers: reduction="sum", times ranks / total number.

The PyTorch code (`normalize_map`, `_patch_loss`) is the specification. The kernels read
masked patches only, and images without a copy. The forward kernel stores three numbers
per patch; the backward kernel reads the patches again and writes the gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import sys
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A map with max - min <= FLAT_RTOL * max|M| has no object. Without this rule noise of
# 1e-7 would be stretched to the full range. Numbers below FLAT_ATOL are nearly denormal.
FLAT_RTOL, FLAT_ATOL = 1e-5, 1e-30

# Triton is only looked up here; the first call of a kernel imports it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on CPU tensors. It is meant for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The largest tile that fits into the registers and the shared memory of one program.
MAX_TILE = 16384
# A program loops over TILES_PER_PROGRAM tiles; more for large maps, fewer for few rows. A
# tile has VALUES_PER_WARP values, or those of one patch if these are more, and one warp for
# as many. Neither constant has been tuned on a GPU.
TILES_PER_PROGRAM = 4
VALUES_PER_WARP = 1024

# The operators are registered under the module's name, so that two copies of this file
# can live in one process.
NAMESPACE = re.sub(r"\W", "_", f"attg_{__name__}", flags=re.ASCII)
FP32 = torch.finfo(torch.float32)
# Dtypes that the kernels read. Targets may also be uint8.
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*FUSED_DTYPES, torch.float64)


# -- The specification, in PyTorch -----------------------------------------------------


def normalize_map(attn: Tensor) -> Tensor:
    """Min-max normalize each map over its L patches.

    attn is (B, L) floats; returns (B, L) in [0, 1], fp32, or float64 for float64. A
    flat map becomes zeros, that is weight 1. Raises ValueError for other shapes and
    dtypes.
    """
    if attn.dim() != 2 or attn.dtype not in FLOATS:
        raise ValueError(f"attn: got {_describe(attn)}; pass floats of shape (B, L)")
    attn = attn.to(torch.promote_types(attn.dtype, torch.float32))
    low, high = attn.amin(1, keepdim=True), attn.amax(1, keepdim=True)
    spread = high - low
    largest = torch.maximum(high.abs(), low.abs())
    limit = (FLAT_RTOL * largest).clamp(min=FLAT_ATOL)
    is_flat = (spread <= limit) & (spread < math.inf)
    return torch.where(is_flat, 0.0, (attn - low) / spread)


def pool_maps(
    maps: Tensor, boxes: Tensor, flips: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """Average maps of whole images under each patch of random crops.

    maps (B, H, W) cover the whole images, at any resolution, in [0, 1]. boxes (B, 4) are
    the crops, x0, y0, x1, y1 as fractions of the image's width and height. flips (B,),
    bool: mirror after the crop; None: none. grid: rows and columns of patches. Returns
    (B, L) fp32. ValueError for other shapes, types and boxes; on a GPU and in a compiled
    graph, where boxes are not read, NaN for other boxes, so that the loss is NaN.

    Normalize the maps before, over the whole image, and pass normalize_attn=False to
    `attg_loss`: a crop without the object then has weights near 1. Equals torchvision's
    roi_align(aligned=True), which is not needed.
    """
    if maps.dim() != 3 or maps.dtype not in FLOATS:
        raise ValueError(f"maps: got {_describe(maps)}; pass floats (B, H, W)")
    B, H, W = maps.shape
    if boxes.shape != (B, 4) or not _holds(boxes, _are_fractions):
        message = f"pass x0, y0, x1, y1 as fractions of width and height, ({B}, 4)"
        raise ValueError(f"boxes: got {_describe(boxes)} for {B} maps; {message}")
    if flips is not None and (flips.shape != (B,) or flips.dtype != torch.bool):
        raise ValueError(f"flips: got {_describe(flips)}; pass bool ({B},), or None")
    x0, y0, x1, y1 = boxes.float().T[..., None, None]
    rows = _pooling(y0 * H, y1 * H, H, grid[0])  # (B, h, H)
    columns = _pooling(x0 * W, x1 * W, W, grid[1])  # (B, w, W)
    with torch.autocast(maps.device.type, enabled=False):
        pooled = rows @ maps.float() @ columns.mT  # (B, h, w)
    if flips is not None:
        pooled = torch.where(flips[:, None, None], pooled.flip(-1), pooled)
    return torch.where(_are_fractions(boxes), pooled.flatten(1), math.nan)


def _are_fractions(boxes):
    """Return whether each box is not empty and lies within its image, (B, 1)."""
    boxes = boxes.float()
    is_inside = (boxes - 0.5).abs().amax(1, keepdim=True) < 0.501
    return is_inside & (boxes[:, :2] < boxes[:, 2:]).all(1, keepdim=True)


def _pooling(start, end, size, parts):
    """Return weights (B, parts, size) that average a row of `size` cells.

    start, end (B, 1, 1): a section of each row, divided into equal parts. Each part is
    the mean of linearly interpolated samples, about one per cell.
    """
    step = (end - start) / parts
    number = step.ceil().clamp(min=1)
    i = torch.arange(math.ceil(size / parts) + 1, device=start.device)
    part = torch.arange(parts, device=start.device)[:, None]
    at = start + (part + (i + 0.5) / number) * step
    # Centers of cells are at 0.5, 1.5 ... Beyond them a map is level.
    at = (at - 0.5).clamp(0, size - 1)  # (B, parts, samples)
    cell = torch.arange(size, device=start.device)
    near = (1 - (at[..., None] - cell).abs()).clamp(min=0)  # (B, parts, samples, size)
    return (near * (i < number)[..., None]).sum(dim=2) / number


def _patch_loss(
    pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn
):
    """Return mask * w * l and mask * l (detached), (B, L), as `attg_loss` defines them."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    x = _patchify(target, patch_size) if target.dim() == 4 else target
    x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
    pred = pred.to(dtype)
    if mask is not None:
        mask = mask.bool()
        # A product would keep NaN (NaN * 0 is NaN), here and in the gradient.
        pred = torch.where(mask[..., None], pred, 0.0)

    if norm_pix:
        # Step by step, because torch.var_mean is slower on CPUs.
        x = x - x.mean(dim=-1, keepdim=True)
        variance = x.square().sum(dim=-1, keepdim=True) / (x.shape[-1] - 1)
        x = x / (variance + eps).sqrt()
    patch_mse = (pred - x).square().mean(dim=-1)  # l, (B, L)
    loss = patch_mse
    if attn is not None:
        if normalize_attn:
            # The float64 map of fp32 predictions is normalized in float64.
            attn = normalize_map(attn.to(torch.promote_types(attn.dtype, dtype)))
        loss = torch.exp(attn.to(dtype) / tau) * patch_mse  # Eq. 1
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
        patch_mse = torch.where(mask, patch_mse, 0.0)
    # A copy: with weight 1 the two would share memory.
    return loss, patch_mse.detach().clone()


def _reduce(rows, mask, reduction):
    """Reduce rows (B, L) that are 0 where the mask is 0; Eq. 2 for "mean"."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if mask is None:
        return rows.sum() / max(rows.numel(), 1)
    return rows.sum() / (mask != 0).sum().clamp(min=1)


def _patchify(imgs: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C)."""
    B, C, H, W = imgs.shape
    x = imgs.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


# -- Device functions of both kernels --------------------------------------------------
#
# A program is one warp, or a few for large patches. It loops over TILES_PER_PROGRAM tiles
# of ROWS patches of one image. A tile is (ROWS, PIXELS, CHANNELS), each a power of 2, with
# the channels of a pixel side by side. Names in capitals are compile-time constants, as is
# None for a tensor that is not there. Sums over a patch stay within the warp, so that no
# thread waits for another. Offsets are int64 and all arithmetic is fp32. A target of
# patches (B, L, P) is read as an image of L rows with P pixels of one channel; PATCH_SIZE
# is 0 then.

_TRITON_FUNCTIONS = []


def _jit(function):
    """Mark a function in Triton's language, for `_triton` to pass to `triton.jit`."""
    _TRITON_FUNCTIONS.append(function)
    return function


@functools.cache
def _triton():
    """Import Triton, at the first call and nowhere else, and return it.

    Binds `tl`, Triton's language, and replaces the functions marked `_jit` by jitted
    ones. Both must be globals of this module, where Triton looks up the names that a
    kernel uses.
    """
    global tl
    import triton
    import triton.language as tl

    for function in _TRITON_FUNCTIONS:
        globals()[function.__name__] = triton.jit(function)
    return triton


@_jit
def _first_patch(program, L, ROWS, TILES_PER_PROGRAM):
    """Return the image of a program, and the first of its patches in that image."""
    blocks = (L + ROWS * TILES_PER_PROGRAM - 1) // (ROWS * TILES_PER_PROGRAM)
    b = (program // blocks).to(tl.int64)
    first = (program % blocks) * (ROWS * TILES_PER_PROGRAM)
    return b, first


@_jit
def _active_rows(mask, b, row, inside, mask_b, mask_l):
    """Return which rows of a tile are patches that enter the loss, (ROWS,)."""
    active = inside
    if mask is not None:
        masked = tl.load(mask + b * mask_b + row.to(tl.int64) * mask_l, inside, 0)
        active = active & (masked != 0)
    return active


@_jit
def _patch_offsets(row, columns, target_y, target_x, PATCH_SIZE):
    """Return the offsets in an image of the first values of its patches, (ROWS,)."""
    if PATCH_SIZE > 0:
        line = (row // columns).to(tl.int64)
        column = (row % columns).to(tl.int64)
        return (line * target_y + column * target_x) * PATCH_SIZE
    else:
        return row.to(tl.int64) * target_y


@_jit
def _tile(active, P, C, PIXELS, CHANNELS):
    """Return the pixels and channels of a tile, and where it holds values of rows `active`.

    Shapes (1, PIXELS, 1), (1, 1, CHANNELS) and (ROWS, PIXELS, CHANNELS).
    """
    pixel = tl.arange(0, PIXELS)[None, :, None]
    c = tl.arange(0, CHANNELS)[None, None, :]
    return pixel, c, active[:, None, None] & (pixel < P // C) & (c < C)


@_jit
def _load_tile(
    pred,  # (ROWS,) pointers to the first value of each patch
    target,  # (ROWS,) likewise
    active,
    pred_e,
    target_y,
    target_x,
    target_c,
    P,
    C,
    PATCH_SIZE,
    ROWS,
    PIXELS,
    CHANNELS,
    GROUP,
):
    """Load predictions and targets (ROWS, PIXELS, CHANNELS) as fp32, 0 outside `active`."""
    if GROUP > 0:
        pred_tile, target_tile = _load_groups(
            pred, target, active, target_y, target_c, P, PATCH_SIZE, ROWS, PIXELS, GROUP
        )
    else:
        pixel, c, read = _tile(active, P, C, PIXELS, CHANNELS)
        e = (pixel * C + c).to(tl.int64)
        if PATCH_SIZE > 0:
            within = (pixel // PATCH_SIZE).to(tl.int64) * target_y
            within += (pixel % PATCH_SIZE).to(tl.int64) * target_x
            within += c.to(tl.int64) * target_c
        else:
            within = e * target_x
        pred_tile = tl.load(pred[:, None, None] + e * pred_e, read, 0.0)
        target_tile = tl.load(target[:, None, None] + within, read, 0)
    pred_tile = pred_tile.to(tl.float32)
    target_tile = target_tile.to(tl.float32)
    if target.dtype.element_ty == tl.uint8:
        target_tile = target_tile * (1 / 255)
    return pred_tile, target_tile


@_jit
def _store_tile(out, g, inside, P, C, ROWS, PIXELS, CHANNELS, GROUP):
    """Store a tile (ROWS, PIXELS, CHANNELS) to contiguous patches.

    out (ROWS,): pointers to the first value of each patch.
    """
    if GROUP > 0:
        _store_groups(out, g, inside, P, ROWS, PIXELS, GROUP)
    else:
        pixel, c, write = _tile(inside, P, C, PIXELS, CHANNELS)
        tl.store(out[:, None, None] + (pixel * C + c), g, write)


# -- Register groups -------------------------------------------------------------------
#
# An image stores its colors in three planes, pred stores the colors of a pixel side by
# side. A thread that reads single pixels loads 2 or 4 bytes at a time from either. So a
# thread takes a group of GROUP pixels: GROUP neighbors in each plane, and 3 * GROUP
# neighbors in pred. With GROUP = 4:
#
#     planes   r0 r1 r2 r3     g0 g1 g2 g3     b0 b1 b2 b3       three vectors
#     pred     r0 g0 b0 r1     g1 b1 r2 g2     b2 r3 g3 b3       three vectors
#
# Both are loaded as vectors of up to 16 bytes and matched in the registers of the thread,
# where a permutation is free: `_split_group` turns a vector into single values and
# `_join_group` builds vectors of any selection of them. The gradient goes the other way.
# The tile is the same as without groups: (ROWS, PIXELS, 4) with a fourth channel of 0.


@_jit
def _split_four(x, ROWS, GROUPS):
    """(ROWS, GROUPS, 4) -> four tensors (ROWS, GROUPS)."""
    even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@_jit
def _split_group(x, ROWS, GROUPS, GROUP):
    """(ROWS, GROUPS, GROUP) -> a tuple of GROUP tensors (ROWS, GROUPS); GROUP 4 or 8."""
    if GROUP == 4:
        return _split_four(x, ROWS, GROUPS)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, 4, 2]))
        a, c, e, g = _split_four(even, ROWS, GROUPS)
        b, d, f, h = _split_four(odd, ROWS, GROUPS)
        return a, b, c, d, e, f, g, h


@_jit
def _join_four(values, first, step, ROWS, GROUPS):
    """Join four values: first, first + step ... (ROWS, GROUPS, 4)."""
    even = tl.join(values[first], values[first + 2 * step])
    odd = tl.join(values[first + step], values[first + 3 * step])
    return tl.reshape(tl.join(even, odd), [ROWS, GROUPS, 4])


@_jit
def _join_group(values, first, step, ROWS, GROUPS, GROUP):
    """Join GROUP values: first, first + step, first + 2 step ... (ROWS, GROUPS, GROUP)."""
    if GROUP == 4:
        return _join_four(values, first, step, ROWS, GROUPS)
    else:
        even = _join_four(values, first, 2 * step, ROWS, GROUPS)
        odd = _join_four(values, first + step, 2 * step, ROWS, GROUPS)
        return tl.reshape(tl.join(even, odd), [ROWS, GROUPS, 8])


@_jit
def _join_planes(red, green, blue, ROWS, PIXELS):
    """Three planes -> (ROWS, PIXELS, 4)."""
    ends = tl.join(red, blue)
    middle = tl.join(green, tl.zeros_like(green))
    return tl.reshape(tl.join(ends, middle), [ROWS, PIXELS, 4])


@_jit
def _load_groups(
    pred, target, active, target_y, target_c, P, PATCH_SIZE, ROWS, PIXELS, GROUP
):
    """`_load_tile` by register groups, in the dtypes of pred and target."""
    GROUPS: tl.constexpr = PIXELS // GROUP
    group = tl.arange(0, GROUPS)[None, :, None]
    i = tl.arange(0, GROUP)[None, None, :]
    pixel = group * GROUP + i
    read = active[:, None, None] & (group < P // (3 * GROUP))

    within = (pixel // PATCH_SIZE).to(tl.int64) * target_y + pixel % PATCH_SIZE
    plane = target[:, None, None] + within
    red = tl.load(plane, read, 0)
    green = tl.load(plane + target_c, read, 0)
    blue = tl.load(plane + target_c + target_c, read, 0)
    target_tile = _join_planes(red, green, blue, ROWS, PIXELS)

    part = pred[:, None, None] + (group * (3 * GROUP) + i)
    values = ()
    for k in tl.static_range(3):
        vector = tl.load(part + k * GROUP, read, 0.0)
        values = values + _split_group(vector, ROWS, GROUPS, GROUP)
    red = _join_group(values, 0, 3, ROWS, GROUPS, GROUP)
    green = _join_group(values, 1, 3, ROWS, GROUPS, GROUP)
    blue = _join_group(values, 2, 3, ROWS, GROUPS, GROUP)
    pred_tile = _join_planes(red, green, blue, ROWS, PIXELS)
    return pred_tile, target_tile


@_jit
def _store_groups(out, g, inside, P, ROWS, PIXELS, GROUP):
    """`_store_tile` by register groups."""
    GROUPS: tl.constexpr = PIXELS // GROUP
    ends, middle = tl.split(tl.reshape(g, [ROWS, GROUPS, GROUP, 2, 2]))
    red, blue = tl.split(ends)
    green, zero = tl.split(middle)
    red = _split_group(red, ROWS, GROUPS, GROUP)
    green = _split_group(green, ROWS, GROUPS, GROUP)
    blue = _split_group(blue, ROWS, GROUPS, GROUP)
    values = ()
    for k in tl.static_range(GROUP):
        values = values + (red[k], green[k], blue[k])
    first = _join_group(values, 0, 1, ROWS, GROUPS, GROUP)
    second = _join_group(values, GROUP, 1, ROWS, GROUPS, GROUP)
    third = _join_group(values, 2 * GROUP, 1, ROWS, GROUPS, GROUP)
    # One store, for which Triton exchanges values through shared memory. Three stores
    # would each fill every third vector, and write each sector of the L2 cache twice.
    parts = _join_planes(first, second, third, ROWS, PIXELS)
    parts = tl.reshape(parts, [ROWS, GROUPS, GROUP, 4])
    parts = tl.permute(parts, (0, 1, 3, 2))  # (ROWS, GROUPS, 4, GROUP)
    group = tl.arange(0, GROUPS)[None, :, None, None]
    part = tl.arange(0, 4)[None, None, :, None]
    i = tl.arange(0, GROUP)[None, None, None, :]
    e = (group * 3 + part) * GROUP + i
    write = inside[:, None, None, None] & (group < P // (3 * GROUP)) & (part < 3)
    tl.store(out[:, None, None, None] + e, parts, write)


# -- The forward kernel ----------------------------------------------------------------


@_jit
def _nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _map_range(attn, L, flat, floor, attn_l, MAP_BLOCK, NUM_MAP_BLOCKS):
    """Return minimum and maximum of the whole map that `attn` points at.

    The minimum is NaN if the map holds one. A flat map gets an infinite maximum, which
    makes M_norm = (M - low) / inf = 0. The map is read in blocks of MAP_BLOCK values.
    """
    low = tl.full([MAP_BLOCK], float("inf"), tl.float32)
    high = tl.full([MAP_BLOCK], float("-inf"), tl.float32)
    for block in range(NUM_MAP_BLOCKS):
        i = block * MAP_BLOCK + tl.arange(0, MAP_BLOCK)
        m = tl.load(attn + i.to(tl.int64) * attn_l, i < L, 0.0).to(tl.float32)
        low = tl.where(i < L, _nan_min(low, m), low)
        high = tl.where(i < L, _nan_max(high, m), high)
    low = tl.reduce(low, 0, _nan_min)
    high = tl.reduce(high, 0, _nan_max)
    if high - low < float("inf"):
        limit = flat * tl.maximum(tl.abs(high), tl.abs(low))
        if high - low <= tl.maximum(limit, floor):
            high = low + float("inf")
    return low, high


# The GPU's exp alone is not accurate enough for large m (Eq. 1 with a small tau). Hence
# exp(m) = exp(m - n ln 2) 2^n with n the integer nearest to m / ln 2. The product n ln 2
# must not round: ln 2 is split into 0.693359375 = 355 / 512, whose product with n is
# exact, and the rest, -2.12194440e-4. Source: W. J. Cody and W. Waite, Software Manual
# for the Elementary Functions, 1980, chapter 6.
@_jit
def _exp(m):
    """exp(m), accurate for large |m| too: 0 for -inf, inf for inf."""
    m = tl.where(m < -1000, -1000, m)
    m = tl.where(m > 1000, 1000, m)
    n = tl.floor(m * 1.4426950408889634 + 0.5)
    # 2^128 overflows fp32, half of it times 2 does not.
    return tl.exp(m - n * 0.693359375 + n * 2.12194440e-4) * tl.exp2(n - 1) * 2


@_jit
def _sum(x):
    """Sum over each patch of a tile, (ROWS,)."""
    return tl.sum(tl.sum(x, 2), 1)


@_jit
def _forward_kernel(
    # Inputs
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P)
    mask,  # (B, L), nonzero where the patch enters the loss, or None
    attn,  # (B, L), or None
    tau,  # one value
    # Outputs, contiguous fp32
    stats,  # (B, L, 3): mean, 1 / std, weight w
    loss,  # mask * w * l (B, L); with REDUCE (2, programs): the sum over the patches of
    # each program, and their number
    mse,  # mask * l (B, L); with REDUCE (programs,) sums; None: not requested
    # Sizes and strides
    L,
    columns,  # patches side by side in an image
    eps,
    flat,
    floor,
    pred_b,
    pred_l,
    pred_e,
    target_b,
    target_y,
    target_x,
    target_c,
    mask_b,
    mask_l,
    attn_b,
    attn_l,
    # Compile-time constants
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH_SIZE: tl.constexpr,  # 0: the target is patches
    NORMALIZE_ATTN: tl.constexpr,
    NORM_PIX: tl.constexpr,
    REDUCE: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,  # pixels of a register group; 0: none
    TILES_PER_PROGRAM: tl.constexpr,
    MAP_BLOCK: tl.constexpr,
    NUM_MAP_BLOCKS: tl.constexpr,
):
    # From the last image to the first: the backward kernel starts with the first ones,
    # some of which are still in the L2 cache then.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b, first = _first_patch(program, L, ROWS, TILES_PER_PROGRAM)
    if attn is not None:
        t = tl.load(tau).to(tl.float32)
        if NORMALIZE_ATTN:
            low, high = _map_range(
                attn + b * attn_b, L, flat, floor, attn_l, MAP_BLOCK, NUM_MAP_BLOCKS
            )

    loss_sum = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    mse_sum = 0.0  # One number: a vector would cost registers in every thread.
    for step in range(TILES_PER_PROGRAM):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        # Visible patches are not read.
        active = _active_rows(mask, b, row, inside, mask_b, mask_l)
        mean = tl.zeros([ROWS], tl.float32)
        rstd = mean + 1
        w = rstd
        patch_mse = mean
        # A tile of one visible patch is skipped; in a tile of several patches each waits
        # for the others anyway.
        needed = True
        if ROWS == 1:
            needed = tl.max(active.to(tl.int32), 0) > 0
        if needed:
            offset = _patch_offsets(row, columns, target_y, target_x, PATCH_SIZE)
            pred_tile, target_tile = _load_tile(
                pred + b * pred_b + row.to(tl.int64) * pred_l,
                target + b * target_b + offset,
                active,
                pred_e,
                target_y,
                target_x,
                target_c,
                P,
                C,
                PATCH_SIZE,
                ROWS,
                PIXELS,
                CHANNELS,
                GROUP,
            )

            if NORM_PIX:
                mean = _sum(target_tile) / P
                # Padding must stay 0 and not become 0 - mean.
                _, _, valid = _tile(inside, P, C, PIXELS, CHANNELS)
                target_tile = tl.where(valid, target_tile - mean[:, None, None], 0.0)
                rstd = 1 / tl.sqrt(_sum(target_tile * target_tile) / (P - 1) + eps)
                target_tile = target_tile * rstd[:, None, None]
            if attn is not None:
                m = tl.load(attn + b * attn_b + row.to(tl.int64) * attn_l, active, 0.0)
                m = m.to(tl.float32)
                if NORMALIZE_ATTN:
                    m = tl.div_rn(m - low, high - low)
                w = _exp(tl.div_rn(m, t))
            error = pred_tile - target_tile
            patch_mse = _sum(error * error) / P
        patch_loss = tl.where(active, w * patch_mse, 0.0)
        patch_mse = tl.where(active, patch_mse, 0.0)

        at = b * L + row
        tl.store(stats + at * 3, mean, inside)
        tl.store(stats + at * 3 + 1, rstd, inside)
        tl.store(stats + at * 3 + 2, w, inside)
        if REDUCE:
            loss_sum += patch_loss
            count += active.to(tl.float32)
            if mse is not None:
                mse_sum += tl.sum(patch_mse, 0)
        else:
            tl.store(loss + at, patch_loss, inside)
            if mse is not None:
                tl.store(mse + at, patch_mse, inside)
    if REDUCE:
        tl.store(loss + program, tl.sum(loss_sum, 0))
        tl.store(loss + tl.num_programs(0) + program, tl.sum(count, 0))
        if mse is not None:
            tl.store(mse + program, mse_sum)


@_jit
def _total_kernel(
    # Inputs, contiguous fp32
    sums,  # (2, n), as the forward kernel wrote them
    mse_sums,  # (n,) likewise, or None
    # Outputs, one value each
    loss,  # the sum, or with MEAN the mean
    mse,  # likewise; unused without mse_sums
    divisor,  # the number by which the sums were divided
    n,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second stage of the sum, by one program: always in the same order."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    total_mse = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        total += tl.load(sums + first + i, first + i < n, 0.0)
        count += tl.load(sums + n + first + i, first + i < n, 0.0)
        if mse_sums is not None:
            total_mse += tl.load(mse_sums + first + i, first + i < n, 0.0)
    divide_by = 1.0
    if MEAN:
        divide_by = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(loss, tl.sum(total, 0) / divide_by)
    if mse_sums is not None:
        tl.store(mse, tl.sum(total_mse, 0) / divide_by)
    tl.store(divisor, divide_by)


# -- The backward kernel ---------------------------------------------------------------


@_jit
def _backward_kernel(
    # Inputs
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P)
    mask,  # (B, L), nonzero where the patch enters the loss, or None
    stats,  # (B, L, 3) contiguous fp32, as the forward kernel wrote it
    grad_loss,  # upstream gradient, (B, L)
    divisor,  # one value, the number by which the loss was divided, or None
    # Output
    grad_pred,  # (B, L, P) contiguous: the gradient for pred
    # Sizes and strides
    L,
    columns,  # patches side by side in an image
    pred_b,
    pred_l,
    pred_e,
    target_b,
    target_y,
    target_x,
    target_c,
    mask_b,
    mask_l,
    grad_loss_b,
    grad_loss_l,
    # Compile-time constants
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH_SIZE: tl.constexpr,  # 0: the target is patches
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,  # pixels of a register group; 0: none
    TILES_PER_PROGRAM: tl.constexpr,
):
    b, first = _first_patch(tl.program_id(0), L, ROWS, TILES_PER_PROGRAM)
    for step in range(TILES_PER_PROGRAM):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        active = _active_rows(mask, b, row, inside, mask_b, mask_l)
        offset = _patch_offsets(row, columns, target_y, target_x, PATCH_SIZE)
        pred_tile, target_tile = _load_tile(
            pred + b * pred_b + row.to(tl.int64) * pred_l,
            target + b * target_b + offset,
            active,
            pred_e,
            target_y,
            target_x,
            target_c,
            P,
            C,
            PATCH_SIZE,
            ROWS,
            PIXELS,
            CHANNELS,
            GROUP,
        )

        at = b * L + row
        # Zeros for visible patches, as in pred and target: a gradient of zero.
        mean = tl.load(stats + at * 3, active, 0.0)
        rstd = tl.load(stats + at * 3 + 1, active, 0.0)
        w = tl.load(stats + at * 3 + 2, active, 0.0)
        upstream = tl.load(
            grad_loss + b * grad_loss_b + row.to(tl.int64) * grad_loss_l, active, 0.0
        )

        # d loss / d pred = upstream * w * 2 (pred - x_norm) / P
        scale = upstream.to(tl.float32) * w * (2 / P)
        if divisor is not None:
            scale = scale / tl.load(divisor)
        x_norm = (target_tile - mean[:, None, None]) * rstd[:, None, None]
        g = scale[:, None, None] * (pred_tile - x_norm)
        g = g.to(grad_pred.dtype.element_ty)
        _store_tile(grad_pred + at * P, g, inside, P, C, ROWS, PIXELS, CHANNELS, GROUP)


# -- The launches and the registered operators -----------------------------------------


def _tile_shape(P, C):
    """Return the powers of 2 that hold the pixels and the channels of a patch."""
    return 1 << (P // C - 1).bit_length(), 1 << (C - 1).bit_length()


def _has_tuples():
    """Return whether Triton supports tuples of tensors, which 3.2 does not."""
    return hasattr(_triton().language, "tuple")


def _group(pred, target, patch_size):
    """Return the pixels of a register group; 0 for the plain layout, always correct."""
    if not _has_tuples() or target.dim() < 4 or target.shape[1] != 3:
        return 0
    if pred.stride(2) != 1 or target.stride(3) != 1:
        return 0
    group = math.gcd(patch_size, 16 // pred.element_size())
    # Smaller groups gain nothing.
    return group if group >= 4 else 0


def _strides(name, x, axes):
    """Return strides by argument name; zeros for None, whose strides no kernel uses."""
    strides = [0] * len(axes) if x is None else x.stride()
    return {f"{name}_{axis}": s for axis, s in zip(axes, strides, strict=True)}


def _shared_arguments(pred, target, mask, patch_size):
    """Return (number of programs, arguments by name) for both kernels."""
    triton = _triton()
    B, L, P = pred.shape
    if target.dim() == 4:
        C, columns = target.shape[1], target.shape[3] // patch_size
        target_strides = _strides("target", target, "bcyx")
    else:
        patch_size, C, columns = 0, 1, 1
        target_strides = _strides("target", target, "byx") | {"target_c": 0}

    pixels, channels = _tile_shape(P, C)
    lanes = pixels * channels
    rows = max(1, min(VALUES_PER_WARP // lanes, triton.next_power_of_2(L)))
    if INTERPRETED and not _has_tuples():
        # The interpreter of Triton 3.2 ignores a mask of one element.
        rows = max(rows, 2)
    # Each program reads the whole map; enough tiles make that the smaller part.
    tiles = max(TILES_PER_PROGRAM, triton.cdiv(2 * L, rows * P))
    tiles = min(tiles, triton.cdiv(L, rows))
    programs = B * triton.cdiv(L, rows * tiles)
    return programs, {
        "L": L,
        "columns": columns,
        **_strides("pred", pred, "ble"),
        **target_strides,
        **_strides("mask", mask, "bl"),
        "P": P,
        "C": C,
        "PATCH_SIZE": patch_size,
        "ROWS": rows,
        "PIXELS": pixels,
        "CHANNELS": channels,
        "GROUP": _group(pred, target, patch_size),
        "TILES_PER_PROGRAM": tiles,
        "num_warps": min(16, triton.cdiv(rows * lanes, VALUES_PER_WARP)),
    }


@torch.library.custom_op(f"{NAMESPACE}::patch_loss", mutates_args=())
def _patch_loss_op(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    attn: Tensor | None,
    tau: Tensor,
    norm_pix: bool,
    eps: float,
    patch_size: int,
    normalize_attn: bool,
    reduction: str,
    return_mse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss with the kernels.

    Returns fp32 tensors: the loss, (B, L) or one value; the mse alike, empty without
    return_mse; mean, 1 / std and weight of each patch (B, L, 3); the number by
    which the sum was divided, one value, empty with reduction "none".
    """
    loss, mse, stats, divisor = _patch_loss_fake(pred, reduction, return_mse)
    if stats.numel() == 0:
        return loss.zero_(), mse.zero_(), stats, divisor.fill_(1)

    triton = _triton()
    L = pred.shape[1]
    programs, shared = _shared_arguments(pred, target, mask, patch_size)
    map_block = min(512, triton.next_power_of_2(L))
    sums, mse_sums = loss, mse if return_mse else None
    if reduction != "none":
        sums = pred.new_empty((2, programs), dtype=torch.float32)
        if return_mse:
            mse_sums = pred.new_empty(programs, dtype=torch.float32)
    with torch.cuda.device_of(pred):
        _forward_kernel[(programs,)](
            *(pred, target, mask, attn, tau),
            *(stats, sums, mse_sums),
            eps=eps,
            flat=FLAT_RTOL,
            floor=FLAT_ATOL,
            NORMALIZE_ATTN=normalize_attn,
            NORM_PIX=norm_pix,
            REDUCE=reduction != "none",
            MAP_BLOCK=map_block,
            NUM_MAP_BLOCKS=triton.cdiv(L, map_block),
            **_strides("attn", attn, "bl"),
            **shared,
        )
        if reduction != "none":
            options = {"MEAN": reduction == "mean", "BLOCK": 8192, "num_warps": 16}
            _total_kernel[(1,)](sums, mse_sums, loss, mse, divisor, programs, **options)
    return loss, mse, stats, divisor


@_patch_loss_op.register_fake
def _patch_loss_fake(pred, *rest):
    *_, reduction, return_mse = rest
    B, L, _ = pred.shape
    shape, one = ((B, L), (0,)) if reduction == "none" else ((), ())
    loss = pred.new_empty(shape, dtype=torch.float32)
    mse = pred.new_empty(shape if return_mse else (0,), dtype=torch.float32)
    stats = pred.new_empty((B, L, 3), dtype=torch.float32)
    divisor = pred.new_empty(one, dtype=torch.float32)
    return loss, mse, stats, divisor


@torch.library.custom_op(f"{NAMESPACE}::patch_loss_backward", mutates_args=())
def _patch_loss_backward_op(
    grad_loss: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    divisor: Tensor,
    patch_size: int,
) -> Tensor:
    """Compute the gradient for pred, in its shape and dtype.

    The upstream gradient, (B, L) or one value, is applied in fp32.
    """
    grad_pred = _patch_loss_backward_fake(grad_loss, pred)
    if grad_pred.numel() == 0:
        return grad_pred
    programs, shared = _shared_arguments(pred, target, mask, patch_size)
    grad_loss = grad_loss.expand(pred.shape[:2])
    shared |= _strides("grad_loss", grad_loss, "bl")
    divisor = divisor if divisor.numel() else None
    with torch.cuda.device_of(pred):
        _backward_kernel[(programs,)](
            pred, target, mask, stats, grad_loss, divisor, grad_pred, **shared
        )
    return grad_pred


@_patch_loss_backward_op.register_fake
def _patch_loss_backward_fake(grad_loss, pred, *_):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    pred, target, mask, _, _, _, _, patch_size, *_ = inputs
    _, mse, stats, divisor = output
    ctx.patch_size = patch_size
    # Otherwise autograd would allocate zeros for outputs without a gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mse, stats, divisor)
    ctx.save_for_backward(pred, target, mask, stats, divisor)


def _backward(ctx, grad_loss, *_):
    saved, patch_size = ctx.saved_tensors, ctx.patch_size
    gradient = _patch_loss_backward_op(grad_loss, *saved, patch_size)
    return gradient, *[None] * 10  # None for the other inputs of `_patch_loss_op`


_patch_loss_op.register_autograd(_backward, setup_context=_setup_context)


# -- The loss --------------------------------------------------------------------------


def attg_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    attn: Tensor | None = None,
    *,
    tau: float | Tensor = 0.75,
    norm_pix: bool = True,
    eps: float = 1e-6,
    patch_size: int | None = None,
    normalize_attn: bool = True,
    reduction: str = "mean",
    impl: str = "auto",
    return_mse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Masked reconstruction error with weight exp(M_norm / tau), Eq. 1 and 2.

    pred        (B, L, P) predictions, any float dtype, any strides.
    target      patches (B, L, P) in pred's order, or images (B, C, H, W) with
                `patch_size`; float, or uint8, read as value / 255 (no mean and std).
    mask        (B, L) bool or 0/1, 1 = masked = enters the loss; None = every patch.
                Nothing in visible patches, not even NaN, changes loss or gradient.
                Other values are an error, but count as 1 on a GPU or in a compiled graph.
    attn        (B, L) attention map M, normalized as a whole; None = weight 1, the loss
                of MAE. NaN in a map makes the loss NaN.
    tau         temperature > 0: a float, or a 0-d tensor, whose value is not checked
                (that would synchronize). torch.compile recompiles for each float, and a
                CUDA graph bakes it in: pass a 0-d tensor on the GPU there.
    norm_pix    normalize each target patch to mean 0, variance 1 (unbiased, plus `eps`).
    normalize_attn
                min-max normalize `attn` per image. False: it is M_norm already, in
                [0, 1] (not checked: x has the weight exp(x / tau), and -inf 0).
    reduction   "mean" (Eq. 2; 0 if nothing is masked), "sum", or "none" = mask * w * l
                of shape (B, L).
    impl        "torch"; "triton", the fused kernels (on CPU tensors only under
                TRITON_INTERPRET=1, for tests); "auto", the kernels on AMD GPUs and on
                NVIDIA GPUs from Ampere on, else PyTorch, and it logs the choice once.
    return_mse  return (loss, mse): the same reduction with all weights 1, detached,
                from the same forward pass.

    Returns fp32 (float64 for float64 `pred`), the precision of all arithmetic. The
    gradient flows to `pred` only. Raises ValueError for wrong shapes, dtypes or values,
    and for any other argument that requires a gradient.
    """
    rules = _rules(
        pred, target, mask, attn, tau, norm_pix, eps, patch_size, reduction, impl
    )
    for name, value, is_valid, remedy in rules:
        if not is_valid:
            raise ValueError(f"{name}: got {_describe(value)}; {remedy}")

    if _is_fused(pred, target, mask, attn, tau, impl):
        if isinstance(tau, Tensor):
            tau = tau.to(device=pred.device, non_blocking=True)
        else:
            tau = torch.full((), tau, device=pred.device)
        side = patch_size if target.dim() == 4 else 0
        options = norm_pix, float(eps), side, normalize_attn, reduction, return_mse
        loss, mse, _, _ = _patch_loss_op(pred, target, mask, attn, tau, *options)
    else:
        parts = _patch_loss(
            pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn
        )
        loss, mse = (_reduce(rows, mask, reduction) for rows in parts)
    return (loss, mse) if return_mse else loss


# -- Kernels or PyTorch ----------------------------------------------------------------


def _is_fused(pred, target, mask, attn, tau, impl):
    """Return whether the kernels run; ValueError if impl is "triton" and they cannot."""
    if impl == "torch":
        return False
    reason = _why_not_fused(pred, target, mask, attn, tau)
    if impl == "triton" and reason:
        raise ValueError(f'impl: "triton" cannot run: {reason}; pass "auto" or "torch"')
    if impl == "auto":
        # PyTorch on CPUs, in Triton's interpreter too.
        if not pred.is_cuda:
            reason = reason or "cpu tensors"
        if not torch.compiler.is_compiling():
            _log_once(f"PyTorch ({reason})" if reason else "fused Triton kernel")
    return not reason


def _why_not_fused(pred, target, mask, attn, tau):
    """Return why the kernels cannot compute this loss; "" if they can."""
    tensors = [x for x in (pred, target, mask, attn, tau) if isinstance(x, Tensor)]
    # PyTorch's function transforms. An operator would silently drop the tangent.
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "forward-mode differentiation"
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "torch.jit.trace"
        # Older versions have no public way to detect this, and raise their own error.
        unwrap = getattr(torch.func, "debug_unwrap", lambda x: x)
        if any(unwrap(x) is not x for x in tensors):
            return "a transform of torch.func"

    if pred.dtype not in FUSED_DTYPES:
        return f"pred is {pred.dtype}"
    if target.dtype not in (*FUSED_DTYPES, torch.uint8):
        return f"target is {target.dtype}"
    if attn is not None and attn.dtype not in FUSED_DTYPES:
        return f"attn is {attn.dtype}"
    C = target.shape[1] if target.dim() == 4 else 1
    pixels, channels = _tile_shape(pred.shape[2], C)
    if pixels * channels > MAX_TILE:
        return f"a patch takes {pixels} x {channels} values, above {MAX_TILE}"

    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    # PyTorch calls AMD GPUs "cuda" too.
    if pred.device.type != "cuda":
        return f"{pred.device.type} tensors"
    major = torch.cuda.get_device_properties(pred.device).major
    return f"a GPU of compute capability {major}, below 8" if major < 8 else ""


@functools.cache
def _log_once(path):
    """Print the path that runs, once each, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"attg_loss: {path}", file=sys.stderr)


# -- Argument checks -------------------------------------------------------------------


def _describe(x):
    """Describe a value for an error message."""
    if not isinstance(x, Tensor):
        return f"{x!r:.60}"
    grad = ", requires_grad" if x.requires_grad else ""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}{grad}"


def _holds(x, condition):
    """Return whether condition(x) holds; True on a GPU and in a graph, which it would sync."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    try:
        return bool(condition(x).all())
    except RuntimeError:  # A transform or a trace, in which tensors have no values
        return True


def _rules(pred, target, mask, attn, tau, norm_pix, eps, patch_size, reduction, impl):
    """Yield (argument, value, whether it is valid, remedy) for each rule.

    Each may rely on those above it, because they are generated one by one.
    """
    rows = {k: x for k, x in (("mask", mask), ("attn", attn)) if x is not None}
    for name, x in {"pred": pred, "target": target, **rows}.items():
        yield name, x, isinstance(x, Tensor), "pass a torch.Tensor"
        yield name, x, x.device == pred.device, f"move it to pred's, {pred.device}"

    is_valid = pred.dim() == 3 and pred.dtype in FLOATS and 0 not in pred.shape[1:]
    yield "pred", pred, is_valid, "pass floats of shape (B, L, P), L and P above 0"
    is_valid = target.dtype in (*FLOATS, torch.uint8)
    yield "target", target, is_valid, "pass floats, or uint8 (read as value / 255)"
    shape = target.shape
    remedy = f"pass patches like pred, {tuple(pred.shape)}, or images with patch_size"
    if target.dim() == 4:
        is_valid = isinstance(patch_size, int) and patch_size >= 1
        yield "patch_size", patch_size, is_valid, "pass the side of a patch, an int"
        B, C, H, W = shape
        is_valid = H % patch_size == 0 and W % patch_size == 0
        yield "target", target, is_valid, "crop or resize to multiples of patch_size"
        shape = B, (H // patch_size) * (W // patch_size), patch_size**2 * C
        remedy = f"its patches are {shape}: fix patch_size, or drop pred's class token"
    yield "target", target, tuple(shape) == tuple(pred.shape), remedy

    shape = tuple(pred.shape[:2])
    for name, x in rows.items():
        remedy = f"pass one value per patch of pred, {shape}, none for the class token"
        yield name, x, tuple(x.shape) == shape, remedy
    is_valid = mask is None or mask.dtype == torch.bool
    is_valid = is_valid or _holds(mask, lambda m: (m == 0) | (m == 1))
    remedy = "pass 1 for masked patches, 0 for others; attn is the next argument"
    yield "mask", mask, is_valid, remedy
    is_valid = attn is None or attn.dtype in FLOATS
    yield "attn", attn, is_valid, "pass floats of 16 bits or more"
    if isinstance(tau, Tensor):
        yield "tau", tau, tau.dim() == 0, "pass a float or a 0-d tensor"
    else:
        is_valid = isinstance(tau, Real) and FP32.tiny <= tau <= FP32.max
        yield "tau", tau, is_valid, "pass a float above 0 that fp32 can hold"
    for name, x in {"target": target, **rows, "tau": tau}.items():
        is_valid = not (isinstance(x, Tensor) and x.requires_grad)
        yield name, x, is_valid, f"pass {name}.detach(), only pred gets a gradient"

    is_valid = isinstance(eps, Real) and 0 <= eps <= FP32.max
    yield "eps", eps, is_valid, "pass a float, 0 or above, that fp32 can hold"
    is_valid = reduction in ("mean", "sum", "none")
    yield "reduction", reduction, is_valid, 'pass "mean", "sum" or "none"'
    is_valid = impl in ("auto", "torch", "triton")
    yield "impl", impl, is_valid, 'pass "auto", "torch" or "triton"'
    is_valid = not norm_pix or pred.shape[2] > 1
    yield "norm_pix", norm_pix, is_valid, "pass False: one value has no variance"
