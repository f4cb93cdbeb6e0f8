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

The PyTorch code (`normalize_map`, `_patch_loss`) is the specification. The kernels fuse
all of it but the last sum: one for the forward, one for the backward pass. They read
masked patches only, and images in place. The forward kernel keeps three numbers a
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
from numbers import Real

import torch
from torch import Tensor

# A map with max - min <= FLAT * max|M| says nothing. Without this rule a noise of 1e-7
# would be stretched to the full range.
FLAT = 1e-5

# Only looked for here: Triton is imported at the first call of a kernel.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on CPU tensors. It is meant for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The most values that fit into the registers and the shared memory of one program.
MAX_TILE = 16384
# A program takes STEPS tiles one after the other. A tile has TILE values, or those of
# one patch if they are more, and a warp for each WARP of them. These three have not
# been tuned on a GPU yet.
TILE = 1024
STEPS = 4
WARP = 256

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
    """Min-max normalises each map over its L patches.

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
    pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn
):
    """mask * w * l of shape (B, L). The arguments are those of `attg_loss`."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    if target.dim() == 4:
        target = _patchify(target, patch_size)  # (B, L, P)
    x = target.to(dtype)
    if target.dtype == torch.uint8:
        x = x / 255
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

    if attn is not None:
        if normalize_attn:
            # A float64 map of fp32 predictions is normalised in float64.
            attn = normalize_map(attn.to(torch.promote_types(attn.dtype, dtype)))
        loss = torch.exp(attn.to(dtype) / tau) * loss  # Eq. 1
    if mask is None:
        return loss
    return torch.where(mask, loss, 0.0)


def _patchify(imgs: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C)."""
    B, C, H, W = imgs.shape
    x = imgs.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


# -- What the kernels share ------------------------------------------------------------
#
# A program takes STEPS tiles of ROWS patches of one image, one after the other. A tile
# is (ROWS, PIXELS, CHANNELS), each a power of 2. With channels on an axis of their own
# images are read along their rows and pred along its channels. Offsets are int64 and
# all arithmetic is fp32. A target of patches (B, L, P) is read as if it were an image
# of L rows with P pixels of one channel; PATCH is 0 then.

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
def _first_patch(L, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The image of this program, and the first of its patches there."""
    blocks = (L + ROWS * STEPS - 1) // (ROWS * STEPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * (ROWS * STEPS)
    return b, first


@_jit
def _lanes(
    target_y,
    target_x,
    target_c,
    P: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """For each lane of a patch, (1, PIXELS, CHANNELS): whether it has a value, the
    place of this value in the patch, and its offset in the target from the patch's
    corner."""
    pixel = tl.arange(0, PIXELS)[None, :, None]
    c = tl.arange(0, CHANNELS)[None, None, :]
    lane = (pixel < P // C) & (c < C)
    e = (pixel * C + c).to(tl.int64)
    if PATCH > 0:
        y = (pixel // PATCH).to(tl.int64)
        x = (pixel % PATCH).to(tl.int64)
        within = y * target_y + x * target_x
        within += c.to(tl.int64) * target_c
    else:
        within = e * target_x
    return lane, e, within


@_jit
def _in_loss(mask, b, row, inside, mask_b, mask_l, MASK: tl.constexpr):
    """Which of the patches that lie inside the image enter the loss, (ROWS,)."""
    keep = inside
    if MASK:
        removed = tl.load(mask + b * mask_b + row.to(tl.int64) * mask_l, inside, 0)
        keep = keep & (removed != 0)
    return keep


@_jit
def _load_patches(
    pred,  # points at the image's first patch
    target,  # points at the image
    row,
    columns,
    e,
    within,
    read,
    pred_l,
    pred_e,
    target_y,
    target_x,
    PATCH: tl.constexpr,
    BYTES: tl.constexpr,
):
    """The tile's predictions and targets in fp32; 0 where `read` is False."""
    line = (row // columns).to(tl.int64)
    column = (row % columns).to(tl.int64)
    row = row.to(tl.int64)
    if PATCH > 0:
        corner = (line * target_y + column * target_x) * PATCH
    else:
        corner = row * target_y
    y = tl.load(pred + (row * pred_l)[:, None, None] + e * pred_e, read, 0.0)
    x = tl.load(target + corner[:, None, None] + within, read, 0)
    y = y.to(tl.float32)
    x = x.to(tl.float32)
    if BYTES:
        x = x * (1 / 255)
    return y, x


# -- The forward kernel ----------------------------------------------------------------


@_jit
def _map_range(attn, L, flat, attn_l, MAP: tl.constexpr, MAPS: tl.constexpr):
    """Minimum and maximum of the whole map that `attn` points at.

    The minimum is NaN if the map holds one. A flat map has an infinite maximum, which
    makes M_norm = (M - low) / inf = 0. The map is read in MAPS pieces of MAP values.
    """
    low = tl.full([MAP], float("inf"), tl.float32)
    high = tl.full([MAP], float("-inf"), tl.float32)
    # Minimum and maximum pass over NaN, so that it has a place of its own.
    bad = tl.full([MAP], 0.0, tl.float32)
    for piece in range(MAPS):
        i = piece * MAP + tl.arange(0, MAP)
        m = tl.load(attn + i.to(tl.int64) * attn_l, i < L, 0.0).to(tl.float32)
        low = tl.where(i < L, tl.minimum(low, m), low)
        high = tl.where(i < L, tl.maximum(high, m), high)
        bad = tl.where(m == m, bad, m)
    low = tl.min(low, 0) + tl.sum(bad, 0)
    high = tl.max(high, 0)
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
    """exp(m), accurate for large |m| too; 0 for -inf."""
    m = tl.where(m < -1000, -1000, m)
    n = tl.floor(m * 1.4426950408889634 + 0.5)
    return tl.exp(m - n * 0.693359375 + n * 2.12194440e-4) * tl.exp2(n)


@_jit
def _forward_kernel(
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P)
    mask,  # (B, L), not zero where the patch enters the loss
    attn,  # (B, L)
    tau,  # one value
    stats,  # out: (B, L, 3) fp32, contiguous: mean, 1 / deviation, weight w
    out,  # out: (B, L) fp32, contiguous: mask * w * l
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
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    MAP: tl.constexpr,
    MAPS: tl.constexpr,
):
    b, first = _first_patch(L, ROWS, STEPS)
    lane, e, within = _lanes(
        target_y, target_x, target_c, P, C, PATCH, PIXELS, CHANNELS
    )
    if ATTN:
        t = tl.load(tau).to(tl.float32)
        if NORMALIZE:
            low, high = _map_range(attn + b * attn_b, L, flat, attn_l, MAP, MAPS)

    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        keep = _in_loss(mask, b, row, inside, mask_b, mask_l, MASK)
        # What is masked out is not read.
        read = keep[:, None, None] & lane
        y, x = _load_patches(
            pred + b * pred_b,
            target + b * target_b,
            row,
            columns,
            e,
            within,
            read,
            pred_l,
            pred_e,
            target_y,
            target_x,
            PATCH,
            BYTES,
        )

        mean = tl.full([ROWS], 0.0, tl.float32)
        rstd = mean + 1
        w = rstd
        if NORM_PIX:
            mean = tl.sum(tl.sum(x, 1), 1) / P
            # Lanes without a value must not count: they would hold 0 - mean.
            x = tl.where(read, x - mean[:, None, None], 0.0)
            rstd = 1 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 1) / (P - 1) + eps)
            x = x * rstd[:, None, None]
        if ATTN:
            m = tl.load(attn + b * attn_b + row.to(tl.int64) * attn_l, keep, 0.0)
            m = m.to(tl.float32)
            if NORMALIZE:
                m = tl.div_rn(m - low, high - low)
            w = _exp(tl.div_rn(m, t))
        error = tl.where(read, y - x, 0.0)
        loss = w * (tl.sum(tl.sum(error * error, 1), 1) / P)

        at = b * L + row
        tl.store(out + at, tl.where(keep, loss, 0.0), inside)
        tl.store(stats + at * 3, mean, inside)
        tl.store(stats + at * 3 + 1, rstd, inside)
        tl.store(stats + at * 3 + 2, w, inside)


# -- The backward kernel ---------------------------------------------------------------


@_jit
def _backward_kernel(
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P)
    mask,  # (B, L), not zero where the patch enters the loss
    stats,  # (B, L, 3) fp32, contiguous, as the forward kernel wrote it
    grad,  # (B, L): the upstream gradient
    out,  # out: (B, L, P), contiguous: the gradient for pred, 0 in the other patches
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
    STEPS: tl.constexpr,
):
    b, first = _first_patch(L, ROWS, STEPS)
    lane, e, within = _lanes(
        target_y, target_x, target_c, P, C, PATCH, PIXELS, CHANNELS
    )
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        keep = _in_loss(mask, b, row, inside, mask_b, mask_l, MASK)
        read = keep[:, None, None] & lane
        y, x = _load_patches(
            pred + b * pred_b,
            target + b * target_b,
            row,
            columns,
            e,
            within,
            read,
            pred_l,
            pred_e,
            target_y,
            target_x,
            PATCH,
            BYTES,
        )

        at = b * L + row
        mean = tl.load(stats + at * 3, keep, 0.0)
        rstd = tl.load(stats + at * 3 + 1, keep, 0.0)
        w = tl.load(stats + at * 3 + 2, keep, 0.0)
        upstream = tl.load(grad + b * grad_b + row.to(tl.int64) * grad_l, keep, 0.0)

        # d loss / d pred = upstream * w * 2 (pred - x_norm) / P
        scale = upstream.to(tl.float32) * w * (2 / P)
        x_norm = (x - mean[:, None, None]) * rstd[:, None, None]
        g = scale[:, None, None] * (y - x_norm)
        g = tl.where(read, g, 0.0).to(out.dtype.element_ty)
        tl.store(out + (at * P)[:, None, None] + e, g, inside[:, None, None] & lane)


# -- The launches and the registered operators -----------------------------------------


def _tile(P, C):
    """The powers of 2 that hold the pixels and the channels of a patch."""
    return 1 << (P // C - 1).bit_length(), 1 << (C - 1).bit_length()


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
    rows = max(1, min(TILE // lanes, triton.next_power_of_2(L)))
    steps = min(STEPS, triton.cdiv(L, rows))
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
        "STEPS": steps,
        "num_warps": min(16, max(1, rows * lanes // WARP)),
    }


def _launch_forward(
    pred,
    target,
    mask,
    attn,
    tau,
    stats,
    out,
    norm_pix,
    eps,
    patch_size,
    normalize_attn,
):
    """Fills out (B, L) and stats (B, L, 3)."""
    triton = _triton()
    programs, shared = _shared_arguments(pred, target, mask, patch_size)
    attn_b, attn_l = _strides(attn)
    L = pred.shape[1]
    piece = min(4096, triton.next_power_of_2(L))
    _forward_kernel[(programs,)](
        pred,
        target,
        mask,
        attn,
        tau,
        stats,
        out,
        eps=eps,
        flat=FLAT,
        attn_b=attn_b,
        attn_l=attn_l,
        ATTN=attn is not None,
        NORMALIZE=normalize_attn,
        NORM_PIX=norm_pix,
        MAP=piece,
        MAPS=triton.cdiv(L, piece),
        **shared,
    )


def _launch_backward(pred, target, mask, stats, grad, out, patch_size):
    """Fills out (B, L, P), given the upstream gradient (B, L)."""
    programs, shared = _shared_arguments(pred, target, mask, patch_size)
    grad_b, grad_l = grad.stride()
    _backward_kernel[(programs,)](
        pred,
        target,
        mask,
        stats,
        grad,
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
) -> tuple[Tensor, Tensor]:
    """`_patch_loss` by the kernel, (B, L), and what its backward pass needs, (B, L, 3).

    Both are fp32.
    """
    loss, stats = _op_fake(pred)
    if loss.numel():
        with torch.cuda.device_of(pred):
            _launch_forward(
                pred,
                target,
                mask,
                attn,
                tau,
                stats,
                loss,
                norm_pix,
                eps,
                patch_size,
                normalize_attn,
            )
    return loss, stats


@_op.register_fake
def _op_fake(pred, *_):
    B, L, _ = pred.shape
    loss = pred.new_empty((B, L), dtype=torch.float32)
    stats = pred.new_empty((B, L, 3), dtype=torch.float32)
    return loss, stats


@torch.library.custom_op(f"{NAMESPACE}::patch_loss_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    patch_size: int,
) -> Tensor:
    """The gradient for pred, of its shape and dtype.

    The upstream gradient, (B, L), is applied in fp32.
    """
    out = _op_backward_fake(grad, pred)
    if out.numel():
        with torch.cuda.device_of(pred):
            _launch_backward(pred, target, mask, stats, grad, out, patch_size)
    return out


@_op_backward.register_fake
def _op_backward_fake(grad, pred, *_):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    pred, target, mask, _, _, _, _, patch_size, _ = inputs
    _, stats = output
    ctx.patch_size = patch_size
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(pred, target, mask, stats)


def _differentiate(ctx, grad, _):
    pred, target, mask, stats = ctx.saved_tensors
    gradient = _op_backward(grad, pred, target, mask, stats, ctx.patch_size)
    # The other eight inputs of `_op` have no gradient.
    return gradient, None, None, None, None, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


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
) -> Tensor:
    """Masked reconstruction error, each patch weighted by exp(M_norm / tau).

    arXiv 2402.15172, Eq. 1 and 2.

    pred        (B, L, P) predictions, any float dtype, any strides.
    target      patches (B, L, P), or images (B, C, H, W) with `patch_size`; float, or
                uint8, which is read as value / 255.
    mask        (B, L) bool or 0/1, 1 = removed = enters the loss; None = every patch.
                What stands in the other patches, NaN included, changes neither loss
                nor gradient.
    attn        (B, L) attention map M; None = weight 1, the loss of MAE. -inf with
                normalize_attn=False is weight 0.
    tau         temperature > 0: a float, or a 0-d tensor, whose value is not checked
                (that would synchronise).
    norm_pix    normalise each target patch to mean 0 and variance 1 (unbiased, plus
                `eps`).
    normalize_attn
                min-max normalise `attn` per image. Code that gathers the masked patches
                before the loss calls `normalize_map` before it gathers, and passes
                False.
    reduction   "mean" (Eq. 2; 0 where nothing is masked), "sum", or "none" =
                mask * w * l of shape (B, L).
    impl        "torch"; "triton", the fused kernels (on CPU tensors only under
                TRITON_INTERPRET=1, for tests); "auto", the kernels on AMD GPUs and on
                NVIDIA GPUs from Ampere on, else, and for float64, PyTorch. "auto" says
                once which.

    Returns fp32 (float64 for float64 `pred`), the precision of all arithmetic. The
    gradient flows to `pred` only. Raises ValueError for wrong shapes, dtypes or values,
    and for `target`, `attn` or `tau` that require a gradient.
    """
    _check(pred, target, mask, attn, tau, norm_pix, eps, patch_size, reduction, impl)
    if _is_fused(pred, target, attn, impl):
        if isinstance(tau, Tensor):
            tau = tau.to(device=pred.device, non_blocking=True)
        else:
            tau = torch.full((), tau, device=pred.device)
        side = patch_size or 0
        loss, _ = _op(
            pred, target, mask, attn, tau, norm_pix, eps, side, normalize_attn
        )
    else:
        loss = _patch_loss(
            pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn
        )

    # loss is mask * w * l, (B, L).
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if mask is None:
        return loss.sum() / max(loss.numel(), 1)
    return loss.sum() / (mask != 0).sum().clamp(min=1)


# -- Which of the two computes it ------------------------------------------------------


def _is_fused(pred, target, attn, impl):
    """Whether the kernels run. ValueError if impl is "triton" and they cannot."""
    if impl == "torch":
        return False
    obstacle = _unfit(pred, target, attn) or _obstacle(pred.device)
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


def _check(pred, target, mask, attn, tau, norm_pix, eps, patch_size, reduction, impl):
    _check_shapes(pred, target, mask, attn, patch_size)
    _check_tensors(pred, target, mask, attn, tau)
    _check_options(pred, tau, norm_pix, eps, reduction, impl)


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


def _check_options(pred, tau, norm_pix, eps, reduction, impl):
    """Values."""
    if isinstance(tau, Tensor):
        if tau.dim() != 0:
            raise ValueError(
                f"tau: got a tensor of shape {tuple(tau.shape)}; "
                "pass a float or a 0-d tensor"
            )
    else:
        is_number = isinstance(tau, Real) and not isinstance(tau, bool)
        if not is_number or not 0 < tau < math.inf:
            raise ValueError(f"tau: got {tau!r}; pass a finite number above 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps!r}; pass a finite number, 0 or above")
    if norm_pix and pred.shape[2] == 1:
        raise ValueError(
            "norm_pix: patches of one value (P = 1) have no variance; "
            "pass norm_pix=False"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}; pass "mean", "sum" or "none"')
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl: got {impl!r}; pass "auto", "torch" or "triton"')
