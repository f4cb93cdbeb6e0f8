"""
The attention-guided reconstruction loss of a masked autoencoder (Sick et al., arXiv 2402.15172), for any MAE code base.
Self-contained: copy this one file. It needs PyTorch; on NVIDIA and AMD GPUs it uses Triton, which PyTorch brings along.

    from attg_loss import attg_loss
    loss = attg_loss(pred, imgs, mask, attn, tau=0.75, patch_size=16)     # attn=None is the loss of MAE

B batch, L patches per image, P = p*p*C values per patch in the order (p, p, C), mask 1 = removed = predicted:

    M_norm = (M - min M) / (max M - min M)        per image, over all L patches
    w      = exp(M_norm / tau)                    Eq. 1: the background (0) has weight 1
    x_norm = (x - mean x) / sqrt(var x + eps)     per patch, over its P values, unbiased variance
    l      = mean_P (pred - x_norm)^2             per patch
    loss   = sum(mask * w * l) / sum(mask)        Eq. 2

The PyTorch code (`normalize_map`, `_patch_loss`) is the specification. The kernel fuses all of it but the last sum. It
reads masked patches only, images in place, and keeps three numbers a patch; the backward pass reads the patches again
and writes the gradient. Bytes that both passes move for n masked patches, s being the size of an element:

    this way                     2 n P (s_pred + s_target) + B L P s_pred
    the gradient made forward      n P (s_pred + s_target) + 2 n P s_pred + B L P s_pred

With elements of one size they are equal; for bf16 predictions of fp32 images (75 % masked) the second moves 14 % less,
for uint8 images 12 % more. The second also holds B L P s_pred of memory and rounds 16-bit gradients twice. Neither has
been timed on a GPU; this way is the simpler one.
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

FLAT = 1e-5  # a map with max - min <= FLAT * max|M| says nothing; without this rule 1e-7 of noise becomes full range
HAS_TRITON = (
    importlib.util.find_spec("triton") is not None
)  # imported at the first call only
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's interpreter, on CPU tensors: for tests
MAX_TILE = (
    16384  # values that fit into the registers and the shared memory of one program
)
TILE = 1024  # values in a tile, or more if P is more; these three have not been tuned on a GPU yet
STEPS = 4  # tiles that a program takes one after the other
WARP = 256  # values in a tile for each warp
NAMESPACE = __name__.replace(
    ".", "_"
)  # of the operators: two copies of this file may live in one process
FUSED = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # what it reads, beside uint8 targets

# ---------------------------------------------------------------------------------------------------------------------
# The specification, in PyTorch


def is_flat(attn: Tensor) -> Tensor:
    """(B, L) maps -> (B,) bool: max - min <= 1e-5 max|M|, and finite."""
    low, high = attn.aminmax(dim=1)
    return (high - low <= FLAT * torch.maximum(high.abs(), low.abs())) & (
        high - low < math.inf
    )


def normalize_map(attn: Tensor) -> Tensor:
    """Min-max normalises each map, attn (B, L), to [0, 1] over its L patches; a flat map becomes zeros (weight 1)."""
    if attn.dim() != 2 or not attn.is_floating_point():
        raise ValueError(
            f"attn: got {attn.dtype} of shape {tuple(attn.shape)}; pass floats of shape (B, L)"
        )
    attn = attn if attn.dtype == torch.float64 else attn.float()
    low, high = (x[:, None] for x in attn.aminmax(dim=1))
    return torch.where(is_flat(attn)[:, None], 0.0, (attn - low) / (high - low))


def _patch_loss(
    pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn
):
    """mask * w * l of shape (B, L)."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    if target.dim() == 4:
        target = _patchify(target, patch_size)  # (B, L, P)
    x = target.to(dtype)
    if target.dtype == torch.uint8:
        x = x / 255
    y = pred.to(dtype)
    if mask is not None:
        mask = mask.bool()
        y = torch.where(
            mask[..., None], y, 0.0
        )  # a product would keep NaN (NaN * 0), here and in the gradient
    if norm_pix:  # in these steps, not by torch.var_mean, which is slower on CPUs
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().sum(dim=-1, keepdim=True) / (x.shape[-1] - 1) + eps).sqrt()
    loss = (y - x).square().mean(dim=-1)  # (B, L)
    if attn is not None:
        if normalize_attn:
            attn = normalize_map(attn.to(torch.promote_types(attn.dtype, dtype)))
        loss = torch.exp(attn.to(dtype) / tau) * loss  # Eq. 1
    return loss if mask is None else torch.where(mask, loss, 0.0)


def _patchify(imgs: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C)."""
    B, C, H, W = imgs.shape
    x = imgs.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


# ---------------------------------------------------------------------------------------------------------------------
# The kernel. `tl` is Triton's language, bound by `_triton` at the first call. All arithmetic is fp32.


def _kernel(
    pred,  # (B, L, P)
    target,  # images (B, C, H, W), or patches (B, L, P) as if L rows of P one-channel pixels
    mask,  # (B, L), nonzero = in the loss
    attn,  # (B, L)
    tau,  # one value
    stats,  # (B, L, 3) fp32, contiguous: mean, 1 / deviation, weight; written forward, read backward
    out,  # forward (B, L) fp32: mask * w * l; backward (B, L, P): the gradient; contiguous
    grad,  # backward: upstream gradient (B, L)
    L, columns, eps, flat,  # columns: patches side by side in an image
    pred_b, pred_l, pred_e, target_b, target_y, target_x, target_c, mask_b, mask_l, attn_b, attn_l, grad_b, grad_l,
    P: tl.constexpr, C: tl.constexpr, PATCH: tl.constexpr,  # PATCH 0: the target is patches
    MASK: tl.constexpr, ATTN: tl.constexpr, NORMALIZE: tl.constexpr, NORM_PIX: tl.constexpr,
    BYTES: tl.constexpr, BACKWARD: tl.constexpr,  # BYTES: the target is uint8
    ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    MAP: tl.constexpr, MAPS: tl.constexpr,  # a map is read in MAPS pieces of MAP values
):  # fmt: skip
    # A program takes STEPS tiles of ROWS patches of one image, one after the other. A tile is (ROWS, PIXELS, CHANNELS):
    # with channels on an axis of their own, images are read along their rows and pred along its channels.
    blocks = (L + ROWS * STEPS - 1) // (ROWS * STEPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * (ROWS * STEPS)
    pixel = tl.arange(0, PIXELS)[None, :, None]
    c = tl.arange(0, CHANNELS)[None, None, :]
    lane = (pixel < P // C) & (c < C)
    e = (pixel * C + c).to(tl.int64)  # place in the patch
    if PATCH > 0:
        within = (pixel // PATCH).to(tl.int64) * target_y + (pixel % PATCH).to(
            tl.int64
        ) * target_x
        within += c.to(tl.int64) * target_c
    else:
        within = e * target_x
    if ATTN and not BACKWARD:
        t = tl.load(tau).to(tl.float32)
        if NORMALIZE:  # min and max of the whole map, NaN if it holds one
            low = tl.full([MAP], float("inf"), tl.float32)
            high = tl.full([MAP], float("-inf"), tl.float32)
            bad = tl.full([MAP], 0.0, tl.float32)
            for piece in range(MAPS):
                i = piece * MAP + tl.arange(0, MAP)
                m = tl.load(attn + b * attn_b + i.to(tl.int64) * attn_l, i < L, 0.0).to(
                    tl.float32
                )
                low = tl.where(i < L, tl.minimum(low, m), low)
                high = tl.where(i < L, tl.maximum(high, m), high)
                bad = tl.where(m == m, bad, m)
            low = tl.min(low, 0) + tl.sum(bad, 0)
            high = tl.max(high, 0)
            if high - low < float("inf"):
                if high - low <= flat * tl.maximum(tl.abs(high), tl.abs(low)):
                    high = low + float("inf")  # M_norm = (M - low) / inf = 0
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = row < L
        at = b * L + row  # of this patch in (B, L)
        line, column = (row // columns).to(tl.int64), (row % columns).to(tl.int64)
        row = row.to(tl.int64)
        keep = inside
        if MASK:
            keep = keep & (tl.load(mask + b * mask_b + row * mask_l, inside, 0) != 0)
        read = keep[:, None, None] & lane  # what is masked out is not read
        if PATCH > 0:
            corner = (line * target_y + column * target_x) * PATCH
        else:
            corner = row * target_y
        y = tl.load(
            pred + b * pred_b + (row * pred_l)[:, None, None] + e * pred_e, read, 0.0
        ).to(tl.float32)
        x = tl.load(target + b * target_b + corner[:, None, None] + within, read, 0).to(
            tl.float32
        )
        if BYTES:
            x = x * (1 / 255)
        if BACKWARD:
            mean = tl.load(stats + at * 3, keep, 0.0)
            rstd = tl.load(stats + at * 3 + 1, keep, 0.0)
            w = tl.load(stats + at * 3 + 2, keep, 0.0)
            scale = (
                tl.load(grad + b * grad_b + row * grad_l, keep, 0.0).to(tl.float32)
                * w
                * (2 / P)
            )
            g = scale[:, None, None] * (
                y - (x - mean[:, None, None]) * rstd[:, None, None]
            )
            g = tl.where(read, g, 0.0).to(out.dtype.element_ty)
            tl.store(out + (at * P)[:, None, None] + e, g, inside[:, None, None] & lane)
        else:
            mean = tl.full([ROWS], 0.0, tl.float32)
            rstd = mean + 1
            w = rstd
            if NORM_PIX:
                mean = tl.sum(tl.sum(x, 1), 1) / P
                x = tl.where(read, x - mean[:, None, None], 0.0)
                rstd = 1 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 1) / (P - 1) + eps)
                x = x * rstd[:, None, None]
            if ATTN:
                m = tl.load(attn + b * attn_b + row * attn_l, keep, 0.0).to(tl.float32)
                if NORMALIZE:
                    m = tl.div_rn(m - low, high - low)
                m = tl.div_rn(m, t)
                m = tl.where(m < -1000, -1000, m)  # -inf is weight 0
                n = tl.floor(
                    m * 1.4426950408889634 + 0.5
                )  # exp(m) = exp(m - n ln 2) 2^n: the GPU's exp alone is not
                w = tl.exp(m - n * 0.693359375 + n * 2.12194440e-4) * tl.exp2(
                    n
                )  # exact enough for large m (Eq. 1)
            error = tl.where(read, y - x, 0.0)
            loss = w * (tl.sum(tl.sum(error * error, 1), 1) / P)
            tl.store(out + at, tl.where(keep, loss, 0.0), inside)
            tl.store(stats + at * 3, mean, inside)
            tl.store(stats + at * 3 + 1, rstd, inside)
            tl.store(stats + at * 3 + 2, w, inside)


@functools.cache
def _triton():
    """(triton, the jitted kernel). Triton is imported here, at the first call, and nowhere else."""
    global tl
    import triton
    import triton.language as tl

    return triton, triton.jit(_kernel)


def _tile(P, C):
    """The powers of 2 that hold the pixels and the channels of a patch."""
    return 1 << (P // C - 1).bit_length(), 1 << (C - 1).bit_length()


def _launch(
    pred,
    target,
    mask,
    attn,
    tau,
    stats,
    out,
    grad,
    norm_pix,
    eps,
    patch_size,
    normalize_attn,
):
    """One pass over the patches, forward (grad None) or backward."""
    triton, kernel = _triton()
    B, L, P = pred.shape
    images = target.dim() == 4
    C = target.shape[1] if images else 1
    pixels, channels = _tile(P, C)
    lanes = pixels * channels
    rows = max(1, min(TILE // lanes, triton.next_power_of_2(L)))
    steps, piece = (
        min(STEPS, triton.cdiv(L, rows)),
        min(4096, triton.next_power_of_2(L)),
    )
    kernel[(B * triton.cdiv(L, rows * steps),)](
        pred, target, mask, attn, tau, stats, out, grad,
        L, target.shape[3] // patch_size if images else 1, eps, FLAT, *pred.stride(),
        *(target.stride(i) for i in ((0, 2, 3, 1) if images else (0, 1, 2, 2))),
        *(x.stride(i) if x is not None else 0 for x in (mask, attn, grad) for i in (0, 1)),
        P=P, C=C, PATCH=patch_size if images else 0, MASK=mask is not None, ATTN=attn is not None,
        NORMALIZE=normalize_attn, NORM_PIX=norm_pix, BYTES=target.dtype == torch.uint8, BACKWARD=grad is not None,
        ROWS=rows, PIXELS=pixels, CHANNELS=channels, STEPS=steps, MAP=piece, MAPS=triton.cdiv(L, piece),
        num_warps=min(16, max(1, rows * lanes // WARP)),
    )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::patch_loss", mutates_args=())
def _op(
    pred: Tensor, target: Tensor, mask: Tensor | None, attn: Tensor | None, tau: Tensor,
    norm_pix: bool, eps: float, patch_size: int, normalize_attn: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_patch_loss` by the kernel, and what its backward pass needs: (B, L), (B, L, 3), both fp32."""
    loss, stats = _op_fake(pred)
    if loss.numel():
        with torch.cuda.device_of(pred):
            _launch(
                pred,
                target,
                mask,
                attn,
                tau,
                stats,
                loss,
                None,
                norm_pix,
                eps,
                patch_size,
                normalize_attn,
            )
    return loss, stats


@_op.register_fake
def _op_fake(pred, *_):
    B, L, _ = pred.shape
    return pred.new_empty((B, L), dtype=torch.float32), pred.new_empty(
        (B, L, 3), dtype=torch.float32
    )


@torch.library.custom_op(f"{NAMESPACE}::patch_loss_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    patch_size: int,
) -> Tensor:
    """The gradient for pred, of its shape and dtype. The upstream gradient, (B, L), is applied in fp32."""
    out = _op_backward_fake(grad, pred)
    if out.numel():
        with torch.cuda.device_of(pred):
            _launch(
                pred,
                target,
                mask,
                None,
                None,
                stats,
                out,
                grad,
                False,
                0.0,
                patch_size,
                False,
            )
    return out


@_op_backward.register_fake
def _op_backward_fake(grad, pred, *_):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    pred, target, mask, _, _, _, _, ctx.patch_size, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(pred, target, mask, output[1])


def _differentiate(ctx, grad, _):
    pred, target, mask, stats = ctx.saved_tensors
    return _op_backward(grad, pred, target, mask, stats, ctx.patch_size), *[None] * 8


_op.register_autograd(_differentiate, setup_context=_save)


def _obstacle(device):
    """Why the kernel cannot run there; "" where it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED:
        return ""
    if device.type != "cuda":  # NVIDIA and AMD
        return f"{device.type} tensors"
    major = torch.cuda.get_device_properties(device).major
    return f"a GPU of compute capability {major}, below 8" if major < 8 else ""


@functools.cache
def _say(path):
    if os.environ.get("RANK", "0") == "0":
        print(f"attg_loss: {path}", file=sys.stderr)


def _is_fused(pred, target, attn, impl):
    if impl == "torch":
        return False
    odd = [f"{name} is {x.dtype}" for name, x in (("pred", pred), ("target", target), ("attn", attn))
           if x is not None and x.dtype not in FUSED and (name, x.dtype) != ("target", torch.uint8)]  # fmt: skip
    pixels, channels = _tile(pred.shape[2], target.shape[1] if target.dim() == 4 else 1)
    if pixels * channels > MAX_TILE:
        odd.append(f"a patch takes {pixels} x {channels} values, above {MAX_TILE}")
    obstacle = "; ".join(odd) or _obstacle(pred.device)
    if impl == "triton" and obstacle:
        raise ValueError(
            f'impl: "triton" cannot run here: {obstacle}; pass "auto" or "torch"'
        )
    fused = impl == "triton" or (pred.is_cuda and not obstacle)
    if impl == "auto" and not torch.compiler.is_compiling():
        _say(
            "fused Triton kernel" if fused else f"PyTorch ({obstacle or 'cpu tensors'})"
        )
    return fused


# ---------------------------------------------------------------------------------------------------------------------
# The loss


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
    """Masked reconstruction error, each patch weighted by exp(M_norm / tau) (arXiv 2402.15172, Eq. 1 and 2).

    pred        (B, L, P) predictions, any float dtype, any strides.
    target      patches (B, L, P), or images (B, C, H, W) with `patch_size`; float, or uint8 read as value / 255.
    mask        (B, L) bool or 0/1, 1 = removed = enters the loss; None = every patch. What stands in the other patches,
                NaN included, changes neither loss nor gradient.
    attn        (B, L) attention map M; None = weight 1, the loss of MAE. -inf with normalize_attn=False is weight 0.
    tau         temperature > 0: a float, or a 0-d tensor, whose value is not checked (that would synchronise).
    norm_pix    normalise each target patch to mean 0 and variance 1 (unbiased, plus `eps`).
    normalize_attn   min-max normalise `attn` per image. Code that gathers the masked patches before the loss calls
                `normalize_map` before it gathers, and passes False.
    reduction   "mean" (Eq. 2; 0 where nothing is masked), "sum", or "none" = mask * w * l of shape (B, L).
    impl        "torch"; "triton", the fused kernel (on CPU tensors under TRITON_INTERPRET=1 only, for tests); "auto",
                the kernel on AMD and NVIDIA GPUs from Ampere on, else, and for float64, PyTorch; says once which.

    Returns fp32 (float64 for float64 `pred`), the precision of all arithmetic. The gradient flows to `pred` only.
    Raises ValueError for wrong shapes, dtypes or values, and for `target` or `attn` that require a gradient.
    """
    _check(pred, target, mask, attn, tau, norm_pix, eps, patch_size, reduction, impl)
    if _is_fused(pred, target, attn, impl):
        like = {"device": pred.device}
        tau = (
            tau.to(**like, non_blocking=True)
            if isinstance(tau, Tensor)
            else torch.full((), tau, **like)
        )
        loss, _ = _op(
            pred,
            target,
            mask,
            attn,
            tau,
            norm_pix,
            eps,
            patch_size or 0,
            normalize_attn,
        )  # (B, L)
    else:
        loss = _patch_loss(
            pred, target, mask, attn, tau, norm_pix, eps, patch_size, normalize_attn
        )  # (B, L)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (
        max(loss.numel(), 1) if mask is None else (mask != 0).sum().clamp(min=1)
    )


def _check(pred, target, mask, attn, tau, norm_pix, eps, patch_size, reduction, impl):
    def shape(x):
        return f"{x.dtype} of shape {tuple(x.shape)}"

    if pred.dim() != 3 or not pred.is_floating_point() or 0 in pred.shape[1:]:
        raise ValueError(
            f"pred: got {shape(pred)}; pass floats of shape (B, L, P), L and P above 0"
        )
    B, L, P = pred.shape
    if not (target.is_floating_point() or target.dtype == torch.uint8):
        raise ValueError(
            f"target: got {shape(target)}; pass floats, or uint8 (read as value / 255)"
        )
    if target.dim() == 4:
        if (
            isinstance(patch_size, bool)
            or not isinstance(patch_size, int)
            or patch_size < 1
        ):
            raise ValueError(
                f"patch_size: got {patch_size!r}; target is images (B, C, H, W), pass their patch size"
            )
        H, W = target.shape[2:]
        if H % patch_size or W % patch_size:
            raise ValueError(
                f"target: {H}x{W} images do not divide into patches of {patch_size}; crop or resize them"
            )
        expected = (
            target.shape[0],
            (H // patch_size) * (W // patch_size),
            patch_size**2 * target.shape[1],
        )
    else:
        expected = tuple(target.shape)
    if expected != (B, L, P):
        raise ValueError(
            f"target: got {shape(target)}, that is patches {expected}, but pred has {(B, L, P)}; "
            "pass patches (B, L, P), or images (B, C, H, W) with patch_size"
        )
    for name, x in (("mask", mask), ("attn", attn)):
        if x is not None and tuple(x.shape) != (B, L):
            raise ValueError(
                f"{name}: got {shape(x)}; pass one value for each patch of pred, shape {(B, L)}"
            )
    if mask is not None and mask.is_complex():
        raise ValueError(f"mask: got {shape(mask)}; pass bool or 0/1, 1 = removed")
    if attn is not None and not attn.is_floating_point():
        raise ValueError(f"attn: got {shape(attn)}; pass floats")
    for name, x in (("target", target), ("attn", attn), ("tau", tau)):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but the loss has one for pred only; pass {name}.detach()"
            )
    for name, x in (("target", target), ("mask", mask), ("attn", attn)):
        if x is not None and x.device != pred.device:
            raise ValueError(
                f"{name}: is on {x.device}, pred on {pred.device}; move it with .to(pred.device)"
            )
    if isinstance(tau, Tensor):
        if tau.dim() != 0:
            raise ValueError(
                f"tau: got a tensor of shape {tuple(tau.shape)}; pass a float or a 0-d tensor"
            )
    elif isinstance(tau, bool) or not isinstance(tau, Real) or not (0 < tau < math.inf):
        raise ValueError(f"tau: got {tau!r}; pass a finite number above 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps!r}; pass a finite number, 0 or above")
    if norm_pix and P == 1:
        raise ValueError(
            "norm_pix: patches of one value (P = 1) have no variance; pass norm_pix=False"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}; pass "mean", "sum" or "none"')
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl: got {impl!r}; pass "auto", "torch" or "triton"')
