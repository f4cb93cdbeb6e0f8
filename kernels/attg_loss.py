"""
The attention-guided reconstruction loss of a masked autoencoder (Sick et al., arXiv
2402.15172), for any MAE code base. Self-contained: copy this one file. It needs
PyTorch; on NVIDIA and AMD GPUs it uses Triton, which PyTorch brings along.

    from attg_loss import attg_loss
    loss = attg_loss(pred, imgs, mask, attn, tau=0.75, patch_size=16)

Without a map (attn=None) this is the loss of MAE.

A batch has B images of L patches. A patch has P = p*p*C values in the order (p, p, C).
The mask is 1 where a patch was removed and is predicted:

    M_norm = (M - min M) / (max M - min M)        per image, over all L patches
    w      = exp(M_norm / tau)                    Eq. 1: the background (0) has weight 1
    x_norm = (x - mean x) / sqrt(var x + eps)     per patch, over its P values,
                                                  unbiased variance
    l      = mean_P (pred - x_norm)^2             per patch
    loss   = sum(mask * w * l) / sum(mask)        Eq. 2

The PyTorch code (`normalize_map`, `_patch_loss`) is the specification. One kernel fuses
the forward pass, a small one adds up what its programs found, one makes the gradient.
They read masked patches only, and images in place. The forward kernel keeps three numbers a
patch; the backward kernel reads the patches again and writes the gradient. These are
the bytes that both passes move for n masked patches, s being the size of an element:

    this way                     2 n P (s_pred + s_target) + B L P s_pred
    the gradient made forward      n P (s_pred + s_target) + 2 n P s_pred + B L P s_pred

With elements of one size they are equal. For bf16 predictions of fp32 images (75 %
masked) the second moves 14 % less, for uint8 images 12 % more. The second also holds
B L P s_pred of memory and rounds 16-bit gradients twice. Neither has been timed on a
GPU; this way is the simpler one.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A map with max - min <= FLAT * max|M| says nothing. Without this rule a noise of 1e-7
# would be stretched to the full range.
FLAT = 1e-5

# Only looked for here: Triton is imported at the first call of a kernel.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on CPU tensors. It is meant for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The most values that fit into the registers and the shared memory of one program.
MAX_TILE = 16384
# A program takes STEPS tiles one after the other. A tile has WARP values, or those of
# one patch if they are more, and a warp for each WARP of them. Neither has been tuned on
# a GPU yet.
STEPS = 4
WARP = 1024

# The operators are registered under the module's name, so that two copies of this file
# may live in one process.
NAMESPACE = __name__.replace(".", "_")
# What the kernels read. Targets may be uint8 as well.
FUSED = (torch.float32, torch.bfloat16, torch.float16)


# -- The specification, in PyTorch -----------------------------------------------------


def is_flat(attn: Tensor) -> Tensor:
    """(B, L) maps -> (B,) bool: max - min <= 1e-5 max|M|, and finite."""
    low, high = attn.aminmax(dim=1)
    largest = torch.maximum(high.abs(), low.abs())
    return (high - low <= FLAT * largest) & (high - low < math.inf)


def normalize_map(attn: Tensor) -> Tensor:
    """Min-max normalizes each map over its L patches.

    attn is (B, L) floats; returns (B, L) in [0, 1], fp32, or float64 for float64. A
    flat map becomes zeros, that is weight 1. Raises ValueError for other shapes and
    dtypes.
    """
    if attn.dim() != 2 or not attn.is_floating_point():
        raise ValueError(
            f"attn: got {attn.dtype} of shape {tuple(attn.shape)}; "
            "pass floats of shape (B, L)"
        )
    if attn.dtype != torch.float64:
        attn = attn.float()
    low, high = attn.aminmax(dim=1, keepdim=True)
    return torch.where(is_flat(attn)[:, None], 0.0, (attn - low) / (high - low))


def _patch_loss(
    pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn, return_mse
):
    """mask * w * l and, detached, mask * l, (B, L) each; None for what is not needed.

    The arguments are those of `attg_loss`.
    """
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    x = _patches(target, patch_size, dtype)
    y = pred.to(dtype)
    if mask is not None:
        mask = mask.bool()
        # A product would keep NaN (NaN * 0 is NaN), here and in the gradient.
        y = torch.where(mask[..., None], y, 0.0)

    if norm_pix:
        # In these steps, as torch.var_mean is slower on CPUs.
        x = x - x.mean(dim=-1, keepdim=True)
        variance = x.square().sum(dim=-1, keepdim=True) / (x.shape[-1] - 1)
        x = x / (variance + eps).sqrt()
    loss = (y - x).square().mean(dim=-1)  # (B, L)
    mse = loss.detach().clone() if return_mse else None

    if attn is not None:
        if normalize_attn:
            # A float64 map of fp32 predictions is normalized in float64.
            attn = normalize_map(attn.to(torch.promote_types(attn.dtype, dtype)))
        loss = torch.exp(attn.to(dtype) / tau) * loss  # Eq. 1
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
        mse = torch.where(mask, mse, 0.0) if return_mse else None
    return loss, mse


def _patches(target, patch_size, dtype):
    """The target, images or patches, as patches (B, L, P) of a dtype."""
    if target.dim() == 4:
        target = _patchify(target, patch_size)
    if target.dtype == torch.uint8:
        return target.to(dtype) / 255
    return target.to(dtype)


def _patchify(imgs: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C)."""
    B, C, H, W = imgs.shape
    x = imgs.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


# -- What the kernels share ------------------------------------------------------------
#
# A program is a warp, or a few for large patches. It takes STEPS tiles of ROWS patches of
# one image, one after the other. A tile is (ROWS, PIXELS, CHANNELS), each a power of 2:
# a pixel's channels lie side by side. Sums over a patch stay within the warp, so that no
# thread waits for another. Offsets are int64 and all arithmetic is fp32. A target of
# patches (B, L, P) is read as if it were an image of L rows with P pixels of one channel;
# PATCH is 0 then.

_TRITON_FUNCTIONS = []


def _jit(function):
    """Marks a function in Triton's language, for `_triton` to hand to `triton.jit`."""
    _TRITON_FUNCTIONS.append(function)
    return function


@functools.cache
def _triton():
    """Imports Triton, at the first call and nowhere else, and returns it.

    It binds `tl`, Triton's language, and replaces the functions marked `_jit` by
    jitted ones. Both have to be globals of this module: that is where Triton looks up
    the names that a kernel uses.
    """
    global tl
    import triton
    import triton.language as tl

    for function in _TRITON_FUNCTIONS:
        globals()[function.__name__] = triton.jit(function)
    return triton


@_jit
def _first_patch(program, L, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The image of a program, and the first of its patches there."""
    blocks = (L + ROWS * STEPS - 1) // (ROWS * STEPS)
    b = (program // blocks).to(tl.int64)
    first = (program % blocks) * (ROWS * STEPS)
    return b, first


@_jit
def _in_loss(mask, b, row, inside, mask_b, mask_l, MASK: tl.constexpr):
    """Which of the patches that lie inside the image enter the loss, (ROWS,)."""
    keep = inside
    if MASK:
        removed = tl.load(mask + b * mask_b + row.to(tl.int64) * mask_l, inside, 0)
        keep = keep & (removed != 0)
    return keep


@_jit
def _corners(row, columns, target_y, target_x, PATCH: tl.constexpr):
    """Offsets in an image of the first values of its patches, (ROWS,)."""
    if PATCH > 0:
        line = (row // columns).to(tl.int64)
        column = (row % columns).to(tl.int64)
        return (line * target_y + column * target_x) * PATCH
    else:
        return row.to(tl.int64) * target_y


@_jit
def _in_patch(
    keep, P: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Where a tile has values that count, (ROWS, PIXELS, CHANNELS)."""
    pixel = tl.arange(0, PIXELS)[None, :, None]
    c = tl.arange(0, CHANNELS)[None, None, :]
    return keep[:, None, None] & (pixel < P // C) & (c < C)


@_jit
def _load_patches(
    pred,  # (ROWS,), points at the first value of each patch
    target,  # (ROWS,), likewise
    keep,
    pred_e,
    target_y,
    target_x,
    target_c,
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Predictions and targets (ROWS, PIXELS, CHANNELS) in fp32; 0 where none count."""
    if GROUP > 0:
        y, x = _load_groups(
            pred, target, keep, target_y, target_c, P, PATCH, ROWS, PIXELS, GROUP
        )
    else:
        read = _in_patch(keep, P, C, PIXELS, CHANNELS)
        pixel = tl.arange(0, PIXELS)[None, :, None]
        c = tl.arange(0, CHANNELS)[None, None, :]
        e = (pixel * C + c).to(tl.int64)
        if PATCH > 0:
            within = (pixel // PATCH).to(tl.int64) * target_y
            within += (pixel % PATCH).to(tl.int64) * target_x
            within += c.to(tl.int64) * target_c
        else:
            within = e * target_x
        y = tl.load(pred[:, None, None] + e * pred_e, read, 0.0)
        x = tl.load(target[:, None, None] + within, read, 0)
    y = y.to(tl.float32)
    x = x.to(tl.float32)
    if BYTES:
        x = x * (1 / 255)
    return y, x


@_jit
def _store_patches(
    out,  # (ROWS,), points at the first value of each patch
    g,
    inside,
    P: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes a tile (ROWS, PIXELS, CHANNELS) to patches that are contiguous."""
    if GROUP > 0:
        _store_groups(out, g, inside, P, ROWS, PIXELS, GROUP)
    else:
        pixel = tl.arange(0, PIXELS)[None, :, None]
        c = tl.arange(0, CHANNELS)[None, None, :]
        write = _in_patch(inside, P, C, PIXELS, CHANNELS)
        tl.store(out[:, None, None] + (pixel * C + c), g, write)


# -- Register groups -------------------------------------------------------------------
#
# An image holds its colours in three planes, pred holds the colours of a pixel side by
# side. Read pixel by pixel, neither gives the memory more than 2 or 4 bytes at a time.
# So a thread takes a group of GROUP pixels: GROUP neighbours in each plane, and
# 3 * GROUP neighbours in pred. With GROUP = 4:
#
#     planes   r0 r1 r2 r3     g0 g1 g2 g3     b0 b1 b2 b3       three vectors
#     pred     r0 g0 b0 r1     g1 b1 r2 g2     b2 r3 g3 b3       three vectors
#
# Both are read as vectors of up to 16 bytes. They meet in the registers of the thread,
# where another order costs nothing: `_apart` names the values of a group one by one, and
# `_together` makes tensors of any choice of them. The gradient goes the way back. The
# tile is the same as without groups: (ROWS, PIXELS, 4), the fourth channel 0.


@_jit
def _four_apart(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(ROWS, GROUPS, 4) -> four tensors (ROWS, GROUPS)."""
    even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@_jit
def _apart(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """(ROWS, GROUPS, GROUP) -> a tuple of GROUP tensors (ROWS, GROUPS); GROUP 4 or 8."""
    if GROUP == 4:
        return _four_apart(x, ROWS, GROUPS)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, 4, 2]))
        a, c, e, g = _four_apart(even, ROWS, GROUPS)
        b, d, f, h = _four_apart(odd, ROWS, GROUPS)
        return a, b, c, d, e, f, g, h


@_jit
def _four_together(a, b, c, d, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Four tensors (ROWS, GROUPS) -> (ROWS, GROUPS, 4)."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, [ROWS, GROUPS, 4])


@_jit
def _together(
    values,
    first: tl.constexpr,
    step: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """GROUP values: first, first + step, first + 2 step ... -> (ROWS, GROUPS, GROUP)."""
    a = values[first]
    b = values[first + step]
    c = values[first + 2 * step]
    d = values[first + 3 * step]
    if GROUP == 4:
        return _four_together(a, b, c, d, ROWS, GROUPS)
    else:
        e = values[first + 4 * step]
        f = values[first + 5 * step]
        g = values[first + 6 * step]
        h = values[first + 7 * step]
        even = _four_together(a, c, e, g, ROWS, GROUPS)
        odd = _four_together(b, d, f, h, ROWS, GROUPS)
        return tl.reshape(tl.join(even, odd), [ROWS, GROUPS, 8])


@_jit
def _pixels(red, green, blue, ROWS: tl.constexpr, PIXELS: tl.constexpr):
    """Three planes -> (ROWS, PIXELS, 4)."""
    ends = tl.join(red, blue)
    middle = tl.join(green, tl.zeros_like(green))
    return tl.reshape(tl.join(ends, middle), [ROWS, PIXELS, 4])


@_jit
def _load_groups(
    pred,
    target,
    keep,
    target_y,
    target_c,
    P: tl.constexpr,
    PATCH: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `_load_patches`, in the dtypes of pred and target."""
    GROUPS: tl.constexpr = PIXELS // GROUP
    group = tl.arange(0, GROUPS)[None, :, None]
    i = tl.arange(0, GROUP)[None, None, :]
    pixel = group * GROUP + i
    read = keep[:, None, None] & (group < P // (3 * GROUP))

    within = (pixel // PATCH).to(tl.int64) * target_y + pixel % PATCH
    plane = target[:, None, None] + within
    red = tl.load(plane, read, 0)
    plane += target_c
    green = tl.load(plane, read, 0)
    plane += target_c
    blue = tl.load(plane, read, 0)
    x = _pixels(red, green, blue, ROWS, PIXELS)

    part = pred[:, None, None] + (group * (3 * GROUP) + i)
    first = _apart(tl.load(part, read, 0.0), ROWS, GROUPS, GROUP)
    second = _apart(tl.load(part + GROUP, read, 0.0), ROWS, GROUPS, GROUP)
    third = _apart(tl.load(part + 2 * GROUP, read, 0.0), ROWS, GROUPS, GROUP)
    values = first + second + third
    red = _together(values, 0, 3, ROWS, GROUPS, GROUP)
    green = _together(values, 1, 3, ROWS, GROUPS, GROUP)
    blue = _together(values, 2, 3, ROWS, GROUPS, GROUP)
    y = _pixels(red, green, blue, ROWS, PIXELS)
    return y, x


@_jit
def _store_groups(
    out,
    g,
    inside,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `_store_patches`."""
    GROUPS: tl.constexpr = PIXELS // GROUP
    ends, middle = tl.split(tl.reshape(g, [ROWS, GROUPS, GROUP, 2, 2]))
    red, blue = tl.split(ends)
    green, zero = tl.split(middle)
    red = _apart(red, ROWS, GROUPS, GROUP)
    green = _apart(green, ROWS, GROUPS, GROUP)
    blue = _apart(blue, ROWS, GROUPS, GROUP)
    values = ()
    for k in tl.static_range(GROUP):
        values = values + (red[k], green[k], blue[k])
    first = _together(values, 0, 1, ROWS, GROUPS, GROUP)
    second = _together(values, GROUP, 1, ROWS, GROUPS, GROUP)
    third = _together(values, 2 * GROUP, 1, ROWS, GROUPS, GROUP)
    # Written in one piece, which Triton passes through shared memory: each store alone
    # would fill every third vector, and each sector of the L2 cache would be written
    # twice.
    parts = _pixels(first, second, third, ROWS, PIXELS)
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
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _map_range(attn, L, flat, attn_l, MAP: tl.constexpr, MAPS: tl.constexpr):
    """Minimum and maximum of the whole map that `attn` points at.

    The minimum is NaN if the map holds one. A flat map has an infinite maximum, which
    makes M_norm = (M - low) / inf = 0. The map is read in MAPS pieces of MAP values.
    """
    low = tl.full([MAP], float("inf"), tl.float32)
    high = tl.full([MAP], float("-inf"), tl.float32)
    for piece in range(MAPS):
        i = piece * MAP + tl.arange(0, MAP)
        m = tl.load(attn + i.to(tl.int64) * attn_l, i < L, 0.0).to(tl.float32)
        low = tl.where(i < L, _least(low, m), low)
        high = tl.where(i < L, _largest(high, m), high)
    low = tl.reduce(low, 0, _least)
    high = tl.reduce(high, 0, _largest)
    if high - low < float("inf"):
        if high - low <= flat * tl.maximum(tl.abs(high), tl.abs(low)):
            high = low + float("inf")
    return low, high


# The GPU's exp alone is not exact enough for large m (Eq. 1 with a small tau). Hence
# exp(m) = exp(m - n ln 2) 2^n for the integer n that is nearest to m / ln 2. The product
# n ln 2 must not round: ln 2 is split into 0.693359375 = 355 / 512, whose product with n
# is exact, and the rest, -2.12194440e-4. Source: W. J. Cody and W. Waite, Software
# Manual for the Elementary Functions, 1980, chapter 6.
@_jit
def _exp(m):
    """exp(m), accurate for large |m| too: 0 for -inf, inf for inf."""
    m = tl.where(m < -1000, -1000, m)
    m = tl.where(m > 1000, 1000, m)
    n = tl.floor(m * 1.4426950408889634 + 0.5)
    # 2^128 is above what fp32 holds, half of it times 2 is not.
    return tl.exp(m - n * 0.693359375 + n * 2.12194440e-4) * tl.exp2(n - 1) * 2


@_jit
def _sum(x):
    """Sum over each patch of a tile, (ROWS,)."""
    return tl.sum(tl.sum(x, 2), 1)


@_jit
def _forward_kernel(
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P)
    mask,  # (B, L), not zero where the patch enters the loss
    attn,  # (B, L)
    tau,  # one value
    stats,  # out: (B, L, 3) fp32, contiguous: mean, 1 / deviation, weight w
    out,  # out: fp32, contiguous: mask * w * l (B, L), or with TOTAL (2, programs):
    # for each program its sum, and the number of patches in it
    mse,  # out: likewise mask * l (B, L), or with TOTAL (programs,); None: not needed
    L,
    columns,  # patches side by side in an image
    eps,
    flat,
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
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,  # pixels along an edge; 0: the target is patches
    MASK: tl.constexpr,  # False: `mask` is None; likewise ATTN
    ATTN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORM_PIX: tl.constexpr,
    BYTES: tl.constexpr,  # the target is uint8
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,  # pixels of a register group; 0: none
    STEPS: tl.constexpr,
    MAP: tl.constexpr,
    MAPS: tl.constexpr,
):
    # From the last image to the first: the backward kernel begins with the first ones,
    # some of which the L2 cache still holds then.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b, first = _first_patch(program, L, ROWS, STEPS)
    if ATTN:
        t = tl.load(tau).to(tl.float32)
        if NORMALIZE:
            low, high = _map_range(attn + b * attn_b, L, flat, attn_l, MAP, MAPS)

    total = tl.zeros([ROWS], tl.float32)
    total_mse = 0.0
    count = tl.zeros([ROWS], tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        # What is masked out is not read.
        keep = _in_loss(mask, b, row, inside, mask_b, mask_l, MASK)
        mean = tl.zeros([ROWS], tl.float32)
        rstd = mean + 1
        w = rstd
        unweighted = mean
        # A patch alone in its tile is passed over; in a tile of several each waits for
        # the others anyway.
        needed = True
        if ROWS == 1:
            needed = tl.max(keep.to(tl.int32), 0) > 0
        if needed:
            corner = _corners(row, columns, target_y, target_x, PATCH)
            y, x = _load_patches(
                pred + b * pred_b + row.to(tl.int64) * pred_l,
                target + b * target_b + corner,
                keep,
                pred_e,
                target_y,
                target_x,
                target_c,
                P,
                C,
                PATCH,
                BYTES,
                ROWS,
                PIXELS,
                CHANNELS,
                GROUP,
            )

            if NORM_PIX:
                mean = _sum(x) / P
                # Places without a value must not count: they would hold 0 - mean.
                x = tl.where(
                    _in_patch(inside, P, C, PIXELS, CHANNELS),
                    x - mean[:, None, None],
                    0.0,
                )
                rstd = 1 / tl.sqrt(_sum(x * x) / (P - 1) + eps)
                x = x * rstd[:, None, None]
            if ATTN:
                m = tl.load(attn + b * attn_b + row.to(tl.int64) * attn_l, keep, 0.0)
                m = m.to(tl.float32)
                if NORMALIZE:
                    m = tl.div_rn(m - low, high - low)
                w = _exp(tl.div_rn(m, t))
            error = y - x
            unweighted = _sum(error * error) / P
        loss = tl.where(keep, w * unweighted, 0.0)
        unweighted = tl.where(keep, unweighted, 0.0)

        at = b * L + row
        tl.store(stats + at * 3, mean, inside)
        tl.store(stats + at * 3 + 1, rstd, inside)
        tl.store(stats + at * 3 + 2, w, inside)
        if TOTAL:
            total += loss
            count += keep.to(tl.float32)
            if mse is not None:
                total_mse += tl.sum(unweighted, 0)
        else:
            tl.store(out + at, loss, inside)
            if mse is not None:
                tl.store(mse + at, unweighted, inside)
    if TOTAL:
        tl.store(out + program, tl.sum(total, 0))
        tl.store(out + tl.num_programs(0) + program, tl.sum(count, 0))
        if mse is not None:
            tl.store(mse + program, total_mse)


@_jit
def _total_kernel(
    sums,  # (2, n) fp32, what the forward kernel's programs found
    mse_sums,  # (n,) fp32, likewise, or None
    loss,  # out: one value, their sum, or with MEAN their mean
    mse,  # out: likewise; used if there are mse_sums
    divisor,  # out: one value, what the sum was divided by
    n,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second stage of the sum, by one program: always in the same order."""
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
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P)
    mask,  # (B, L), not zero where the patch enters the loss
    stats,  # (B, L, 3) fp32, contiguous, as the forward kernel wrote it
    grad,  # upstream gradient, (B, L)
    divisor,  # one value, what the loss was divided by, or None
    out,  # out: (B, L, P), contiguous: the gradient for pred
    L,
    columns,
    pred_b,
    pred_l,
    pred_e,
    target_b,
    target_y,
    target_x,
    target_c,
    mask_b,
    mask_l,
    grad_b,
    grad_l,
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,  # pixels along an edge; 0: the target is patches
    MASK: tl.constexpr,  # False: `mask` is None
    BYTES: tl.constexpr,  # the target is uint8
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,  # pixels of a register group; 0: none
    STEPS: tl.constexpr,
):
    b, first = _first_patch(tl.program_id(0), L, ROWS, STEPS)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        keep = _in_loss(mask, b, row, inside, mask_b, mask_l, MASK)
        corner = _corners(row, columns, target_y, target_x, PATCH)
        y, x = _load_patches(
            pred + b * pred_b + row.to(tl.int64) * pred_l,
            target + b * target_b + corner,
            keep,
            pred_e,
            target_y,
            target_x,
            target_c,
            P,
            C,
            PATCH,
            BYTES,
            ROWS,
            PIXELS,
            CHANNELS,
            GROUP,
        )

        at = b * L + row
        # Zeros for what is masked out, pred and target too: a gradient of zero.
        mean = tl.load(stats + at * 3, keep, 0.0)
        rstd = tl.load(stats + at * 3 + 1, keep, 0.0)
        w = tl.load(stats + at * 3 + 2, keep, 0.0)
        upstream = tl.load(grad + b * grad_b + row.to(tl.int64) * grad_l, keep, 0.0)

        # d loss / d pred = upstream * w * 2 (pred - x_norm) / P
        scale = upstream.to(tl.float32) * w * (2 / P)
        if divisor is not None:
            scale = scale / tl.load(divisor)
        x_norm = (x - mean[:, None, None]) * rstd[:, None, None]
        g = scale[:, None, None] * (y - x_norm)
        g = g.to(out.dtype.element_ty)
        _store_patches(out + at * P, g, inside, P, C, ROWS, PIXELS, CHANNELS, GROUP)


# -- The launches and the registered operators -----------------------------------------


def _tile(P, C):
    """The powers of 2 that hold the pixels and the channels of a patch."""
    return 1 << (P // C - 1).bit_length(), 1 << (C - 1).bit_length()


def _has_tuples():
    """Whether Triton can keep tensors in tuples, which 3.2 cannot."""
    return hasattr(_triton().language, "tuple")


def _group(pred, target, patch_size):
    """Pixels of a register group; 0 for the plain layout, which is right everywhere."""
    if not _has_tuples():
        return 0
    if target.dim() < 4 or target.shape[1] != 3:
        return 0
    if pred.stride(2) != 1 or target.stride(3) != 1:
        return 0
    group = math.gcd(patch_size, 16 // pred.element_size())
    # Smaller groups gain nothing.
    return group if group >= 4 else 0


def _strides(x):
    """Of a (B, L) tensor; zeros for None, whose strides no kernel uses."""
    return (0, 0) if x is None else x.stride()


def _shared_arguments(pred, target, mask, patch_size):
    """(number of programs, arguments by name) of both kernels."""
    triton = _triton()
    B, L, P = pred.shape
    if target.dim() == 4:
        C = target.shape[1]
        columns = target.shape[3] // patch_size
        target_b, target_c, target_y, target_x = target.stride()
    else:
        patch_size, C, columns = 0, 1, 1
        target_b, target_y, target_x = target.stride()
        target_c = target_x
    pred_b, pred_l, pred_e = pred.stride()
    mask_b, mask_l = _strides(mask)

    pixels, channels = _tile(P, C)
    lanes = pixels * channels
    rows = max(1, min(WARP // lanes, triton.next_power_of_2(L)))
    if INTERPRETED and not _has_tuples():
        # The interpreter of Triton 3.2 takes a mask of one element for none.
        rows = max(rows, 2)
    # Each program reads the whole map: a long map is to be less than what it is read for.
    steps = max(STEPS, triton.cdiv(2 * L, rows * P))
    steps = min(steps, triton.cdiv(L, rows))
    programs = B * triton.cdiv(L, rows * steps)
    return programs, {
        "L": L,
        "columns": columns,
        "pred_b": pred_b,
        "pred_l": pred_l,
        "pred_e": pred_e,
        "target_b": target_b,
        "target_y": target_y,
        "target_x": target_x,
        "target_c": target_c,
        "mask_b": mask_b,
        "mask_l": mask_l,
        "P": P,
        "C": C,
        "PATCH": patch_size,
        "MASK": mask is not None,
        "BYTES": target.dtype == torch.uint8,
        "ROWS": rows,
        "PIXELS": pixels,
        "CHANNELS": channels,
        "GROUP": _group(pred, target, patch_size),
        "STEPS": steps,
        "num_warps": min(16, triton.cdiv(rows * lanes, WARP)),
    }


def _launch_forward(
    pred,
    target,
    mask,
    attn,
    tau,
    stats,
    loss,
    mse,
    divisor,
    norm_pix,
    eps,
    patch_size,
    normalize_attn,
    reduction,
):
    """Fills stats (B, L, 3), loss and mse: (B, L), or one value, then divisor too.

    An empty mse is left alone.
    """
    triton = _triton()
    programs, shared = _shared_arguments(pred, target, mask, patch_size)
    attn_b, attn_l = _strides(attn)
    L = pred.shape[1]
    piece = min(512, triton.next_power_of_2(L))
    total = reduction != "none"
    out, out_mse = loss, mse if mse.numel() else None
    if total:
        out = pred.new_empty((2, programs), dtype=torch.float32)
        if out_mse is not None:
            out_mse = pred.new_empty(programs, dtype=torch.float32)
    _forward_kernel[(programs,)](
        pred,
        target,
        mask,
        attn,
        tau,
        stats,
        out,
        out_mse,
        eps=eps,
        flat=FLAT,
        attn_b=attn_b,
        attn_l=attn_l,
        ATTN=attn is not None,
        NORMALIZE=normalize_attn,
        NORM_PIX=norm_pix,
        TOTAL=total,
        MAP=piece,
        MAPS=triton.cdiv(L, piece),
        **shared,
    )
    if total:
        mean = reduction == "mean"
        _total_kernel[(1,)](
            out,
            out_mse,
            loss,
            mse,
            divisor,
            programs,
            MEAN=mean,
            BLOCK=8192,
            num_warps=16,
        )


def _launch_backward(pred, target, mask, stats, grad, divisor, out, patch_size):
    """Fills out (B, L, P), given the upstream gradient (B, L)."""
    programs, shared = _shared_arguments(pred, target, mask, patch_size)
    grad_b, grad_l = grad.stride()
    _backward_kernel[(programs,)](
        pred,
        target,
        mask,
        stats,
        grad,
        divisor,
        out,
        grad_b=grad_b,
        grad_l=grad_l,
        **shared,
    )


@torch.library.custom_op(f"{NAMESPACE}::patch_loss", mutates_args=())
def _op(
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
    """The loss by the kernels, the mse, and what the backward pass needs, all fp32.

    The loss (B, L), or one value; the mse alike, or empty where it is not asked for;
    per patch mean, 1 / deviation and weight (B, L, 3); what the sum was divided by, one
    value, or none.
    """
    loss, mse, stats, divisor = _op_fake(pred, reduction, return_mse)
    if stats.numel() == 0:
        return loss.zero_(), mse.zero_(), stats, divisor.fill_(1)
    with torch.cuda.device_of(pred):
        _launch_forward(
            pred,
            target,
            mask,
            attn,
            tau,
            stats,
            loss,
            mse,
            divisor,
            norm_pix,
            eps,
            patch_size,
            normalize_attn,
            reduction,
        )
    return loss, mse, stats, divisor


@_op.register_fake
def _op_fake(pred, *rest):
    B, L, _ = pred.shape
    *_, reduction, return_mse = rest
    each = reduction == "none"
    shape = (B, L) if each else ()
    loss = pred.new_empty(shape, dtype=torch.float32)
    mse = pred.new_empty(shape if return_mse else (0,), dtype=torch.float32)
    stats = pred.new_empty((B, L, 3), dtype=torch.float32)
    divisor = pred.new_empty((0,) if each else (), dtype=torch.float32)
    return loss, mse, stats, divisor


@torch.library.custom_op(f"{NAMESPACE}::patch_loss_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    divisor: Tensor,
    patch_size: int,
) -> Tensor:
    """The gradient for pred, of its shape and dtype.

    The upstream gradient, (B, L) or one value, is applied in fp32.
    """
    out = _op_backward_fake(grad, pred)
    if out.numel():
        grad = grad.expand(pred.shape[:2])
        if divisor.numel() == 0:
            divisor = None
        with torch.cuda.device_of(pred):
            _launch_backward(pred, target, mask, stats, grad, divisor, out, patch_size)
    return out


@_op_backward.register_fake
def _op_backward_fake(grad, pred, *_):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    pred, target, mask, _, _, _, _, patch_size, *_ = inputs
    _, mse, stats, divisor = output
    ctx.patch_size = patch_size
    # Or zeros would be made for what has no gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mse, stats, divisor)
    ctx.save_for_backward(pred, target, mask, stats, divisor)


def _differentiate(ctx, grad, *_):
    pred, target, mask, stats, divisor = ctx.saved_tensors
    gradient = _op_backward(grad, pred, target, mask, stats, divisor, ctx.patch_size)
    # The other ten inputs of `_op` have no gradient.
    return gradient, *[None] * 10


def _save_backward(ctx, inputs, output):
    *tensors, patch_size = inputs
    ctx.patch_size = patch_size
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx, v):
    """The second derivative, in PyTorch: of grad * slope * (pred - x_norm)."""
    grad, pred, target, mask, stats, divisor = ctx.saved_tensors
    mean, rstd, w = stats.unbind(dim=-1)  # (B, L) each
    slope = w * 2 / pred.shape[-1]
    if divisor.numel():
        slope = slope / divisor
    x = _patches(target, ctx.patch_size, torch.float32)
    error = pred.float() - (x - mean[..., None]) * rstd[..., None]
    if mask is not None:
        slope = torch.where(mask != 0, slope, 0.0)
        error = torch.where(mask[..., None] != 0, error, 0.0)

    v = v.float()
    for_grad = ((v * error).sum(dim=-1) * slope).sum_to_size(grad.shape)
    for_pred = (v * (grad * slope)[..., None]).to(pred.dtype)
    return for_grad, for_pred, None, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)
_op_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


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
    """Masked reconstruction error, each patch weighted by exp(M_norm / tau).

    arXiv 2402.15172, Eq. 1 and 2.

    pred        (B, L, P) predictions, any float dtype, any strides.
    target      patches (B, L, P), or images (B, C, H, W) with `patch_size`; float, or
                uint8, which is read as value / 255.
    mask        (B, L) bool or 0/1, 1 = removed = enters the loss; None = every patch.
                What pred and target hold in the other patches, NaN included, changes
                neither loss nor gradient; a map counts as a whole where it is normalized.
    attn        (B, L) attention map M; None = weight 1, the loss of MAE. -inf with
                normalize_attn=False is weight 0.
    tau         temperature > 0: a float, or a 0-d tensor, whose value is not checked
                (that would synchronise). A CUDA graph keeps the value of a float, and
                cannot copy a tensor from the CPU: pass a 0-d tensor on the GPU there.
    norm_pix    normalize each target patch to mean 0 and variance 1 (unbiased, plus
                `eps`).
    normalize_attn
                min-max normalize `attn` per image. Code that gathers the masked patches
                before the loss calls `normalize_map` before it gathers, and passes
                False.
    reduction   "mean" (Eq. 2; 0 where nothing is masked), "sum", or "none" =
                mask * w * l of shape (B, L).
    impl        "torch"; "triton", the fused kernels (on CPU tensors only under
                TRITON_INTERPRET=1, for tests); "auto", the kernels on AMD GPUs and on
                NVIDIA GPUs from Ampere on, else, and for float64, PyTorch. "auto" says
                once which.
    return_mse  return (loss, mse): the same reduction of mask * l, the loss with weight
                1, from the same forward pass and detached.

    Returns fp32 (float64 for float64 `pred`), the precision of all arithmetic. The
    gradient flows to `pred` only. Raises ValueError for wrong shapes, dtypes or values,
    and for `target`, `attn` or `tau` that require a gradient.
    """
    _check(
        pred,
        target,
        mask,
        attn,
        tau,
        norm_pix,
        eps,
        patch_size,
        normalize_attn,
        reduction,
        impl,
        return_mse,
    )
    if _is_fused(pred, target, mask, attn, tau, impl):
        if isinstance(tau, Tensor):
            tau = tau.to(device=pred.device, non_blocking=True)
        else:
            tau = torch.full((), tau, device=pred.device)
        side = patch_size if target.dim() == 4 else 0
        options = norm_pix, float(eps), side, normalize_attn, reduction, return_mse
        loss, mse, _, _ = _op(pred, target, mask, attn, tau, *options)
        return (loss, mse) if return_mse else loss

    options = norm_pix, eps, patch_size, normalize_attn, return_mse
    loss, mse = _patch_loss(pred, target, mask, attn, tau, *options)
    loss = _reduce(loss, mask, reduction)
    return (loss, _reduce(mse, mask, reduction)) if return_mse else loss


def _reduce(rows, mask, reduction):
    """Of rows that are 0 where the mask is, (B, L)."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if mask is None:
        return rows.sum() / max(rows.numel(), 1)
    return rows.sum() / (mask != 0).sum().clamp(min=1)


# -- Which of the two computes it ------------------------------------------------------


def _is_fused(pred, target, mask, attn, tau, impl):
    """Whether the kernels run. ValueError if impl is "triton" and they cannot."""
    if impl == "torch":
        return False
    obstacle = (
        _transform(pred, target, mask, attn, tau)
        or _unfit(pred, target, attn)
        or _obstacle(pred.device)
    )
    if impl == "triton":
        if obstacle:
            raise ValueError(
                f'impl: "triton" cannot run here: {obstacle}; pass "auto" or "torch"'
            )
        return True

    # On the CPU "auto" takes PyTorch, in Triton's interpreter too.
    fused = pred.is_cuda and not obstacle
    if not torch.compiler.is_compiling():
        if fused:
            _say("fused Triton kernel")
        else:
            _say(f"PyTorch ({obstacle or 'cpu tensors'})")
    return fused


def _transform(*arguments):
    """What PyTorch is doing that the kernels cannot take part in; "" for nothing."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    for x in tensors:
        # Without this the derivative would be zero, and nobody would be told.
        if forward_ad.unpack_dual(x).tangent is not None:
            return "forward-mode differentiation"
    if torch.compiler.is_compiling():
        return ""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    # Older versions have no public way to tell, and raise an error of their own.
    if hasattr(torch.func, "debug_unwrap"):
        for x in tensors:
            if torch.func.debug_unwrap(x) is not x:
                return "a transform of torch.func"
    return ""


def _unfit(pred, target, attn):
    """Why the kernels cannot read these tensors; "" where they can."""
    reasons = []
    if pred.dtype not in FUSED:
        reasons.append(f"pred is {pred.dtype}")
    if target.dtype not in (*FUSED, torch.uint8):
        reasons.append(f"target is {target.dtype}")
    if attn is not None and attn.dtype not in FUSED:
        reasons.append(f"attn is {attn.dtype}")
    C = target.shape[1] if target.dim() == 4 else 1
    pixels, channels = _tile(pred.shape[2], C)
    if pixels * channels > MAX_TILE:
        reasons.append(f"a patch takes {pixels} x {channels} values, above {MAX_TILE}")
    return "; ".join(reasons)


def _obstacle(device):
    """Why the kernels cannot run on this device; "" where they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    # PyTorch calls AMD's GPUs "cuda" too.
    if device.type != "cuda":
        return f"{device.type} tensors"
    major = torch.cuda.get_device_properties(device).major
    if major < 8:
        return f"a GPU of compute capability {major}, below 8"
    return ""


@functools.cache
def _say(path):
    """Prints which path runs, once for each and in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"attg_loss: {path}", file=sys.stderr)


# -- The checks of the arguments -------------------------------------------------------


def _check(
    pred,
    target,
    mask,
    attn,
    tau,
    norm_pix,
    eps,
    patch_size,
    normalize_attn,
    reduction,
    impl,
    return_mse,
):
    _check_types(pred, target, mask, attn)
    _check_shapes(pred, target, mask, attn, patch_size)
    _check_tensors(pred, target, mask, attn, tau)
    _check_flags(norm_pix, normalize_attn, reduction, impl, return_mse)
    _check_numbers(pred, tau, norm_pix, eps)


def _check_types(pred, target, mask, attn):
    """Dense tensors of PyTorch."""
    for name, x in (("pred", pred), ("target", target), ("mask", mask), ("attn", attn)):
        if x is None and name in ("mask", "attn"):
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}; pass a torch.Tensor")
        if x.layout != torch.strided:
            raise ValueError(
                f"{name}: got a tensor of layout {x.layout}; pass {name}.to_dense()"
            )


def _describe(x):
    return f"{x.dtype} of shape {tuple(x.shape)}"


def _check_shapes(pred, target, mask, attn, patch_size):
    """Shapes and dtypes."""
    if pred.dim() != 3 or not pred.is_floating_point() or 0 in pred.shape[1:]:
        raise ValueError(
            f"pred: got {_describe(pred)}; "
            "pass floats of shape (B, L, P), L and P above 0"
        )
    B, L, P = pred.shape
    if not target.is_floating_point() and target.dtype != torch.uint8:
        raise ValueError(
            f"target: got {_describe(target)}; "
            "pass floats, or uint8 (read as value / 255)"
        )
    patches = tuple(target.shape)
    if target.dim() == 4:
        patches = _shape_of_patches(target, patch_size)
    if patches != (B, L, P):
        raise ValueError(
            f"target: got {_describe(target)}, that is patches {patches}, "
            f"but pred has {(B, L, P)}; "
            "pass patches (B, L, P), or images (B, C, H, W) with patch_size"
        )
    for name, x in (("mask", mask), ("attn", attn)):
        if x is not None and tuple(x.shape) != (B, L):
            raise ValueError(
                f"{name}: got {_describe(x)}; "
                f"pass one value for each patch of pred, shape {(B, L)}"
            )
    if mask is not None and mask.is_complex():
        raise ValueError(f"mask: got {_describe(mask)}; pass bool or 0/1, 1 = removed")
    if attn is not None and not attn.is_floating_point():
        raise ValueError(f"attn: got {_describe(attn)}; pass floats")


def _shape_of_patches(imgs, patch_size):
    """(B, L, P) of images (B, C, H, W). ValueError if they do not divide."""
    # True and False are integers for Python.
    is_integer = isinstance(patch_size, int) and not isinstance(patch_size, bool)
    if not is_integer or patch_size < 1:
        raise ValueError(
            f"patch_size: got {patch_size!r}; "
            "target is images (B, C, H, W), pass their patch size"
        )
    B, C, H, W = imgs.shape
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"target: {H}x{W} images do not divide into patches of {patch_size}; "
            "crop or resize them"
        )
    return B, (H // patch_size) * (W // patch_size), patch_size**2 * C


def _check_tensors(pred, target, mask, attn, tau):
    """Gradients and devices."""
    for name, x in (("target", target), ("attn", attn), ("tau", tau)):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but the loss has one for pred only; "
                f"pass {name}.detach()"
            )
    for name, x in (("target", target), ("mask", mask), ("attn", attn)):
        if x is not None and x.device != pred.device:
            raise ValueError(
                f"{name}: is on {x.device}, pred on {pred.device}; "
                "move it with .to(pred.device)"
            )


def _check_flags(norm_pix, normalize_attn, reduction, impl, return_mse):
    """Values out of a few."""
    for name, x in (
        ("norm_pix", norm_pix),
        ("normalize_attn", normalize_attn),
        ("return_mse", return_mse),
    ):
        if not isinstance(x, bool):
            raise ValueError(f"{name}: got {x!r}; pass True or False")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}; pass "mean", "sum" or "none"')
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl: got {impl!r}; pass "auto", "torch" or "triton"')


def _check_numbers(pred, tau, norm_pix, eps):
    """Numbers, which fp32 has to hold on both paths."""
    fp32 = torch.finfo(torch.float32)
    if isinstance(tau, Tensor):
        if tau.dim() != 0 or tau.is_complex():
            raise ValueError(f"tau: got {_describe(tau)}; pass a float or a 0-d tensor")
    elif not _is_number(tau) or not fp32.tiny <= tau <= fp32.max:
        raise ValueError(
            f"tau: got {tau!r}; pass a float above 0, "
            f"from {fp32.tiny:.2g} to {fp32.max:.2g}"
        )
    if not _is_number(eps) or not 0 <= eps <= fp32.max:
        raise ValueError(
            f"eps: got {eps!r}; pass a float, 0 or above, up to {fp32.max:.2g}"
        )
    if norm_pix and pred.shape[2] == 1:
        raise ValueError(
            "norm_pix: patches of one value (P = 1) have no variance; "
            "pass norm_pix=False"
        )


def _is_number(x):
    """Whether it is a real number of Python or NumPy that PyTorch calculates with."""
    return isinstance(x, Real) and not isinstance(x, (bool, Fraction))
