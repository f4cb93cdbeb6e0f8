"""
The attention-guided reconstruction loss of a masked autoencoder (Sick et al., arXiv 2402.15172), for any MAE code base.
Self-contained: copy this one file. It needs PyTorch only.

    from attg_loss import attg_loss
    loss = attg_loss(pred, imgs, mask, attn, tau=0.75, patch_size=16)     # attn=None is the loss of MAE

B batch, L patches per image, P = p*p*C values per patch in the order (p, p, C), mask 1 = removed = predicted:

    M_norm = (M - min M) / (max M - min M)        per image, over all L patches
    w      = exp(M_norm / tau)                    Eq. 1: the background (0) has weight 1
    x_norm = (x - mean x) / sqrt(var x + eps)     per patch, over its P values, unbiased variance
    l      = mean_P (pred - x_norm)^2             per patch
    loss   = sum(mask * w * l) / sum(mask)        Eq. 2
"""

import math

import torch
from torch import Tensor

FLAT = 1e-5  # a map with max - min <= FLAT * max|M| says nothing; without this rule 1e-7 of noise becomes full range


def is_flat(attn: Tensor) -> Tensor:
    """(B, L) maps -> (B,) bool: max - min <= 1e-5 max|M|."""
    low, high = attn.aminmax(dim=1)
    return high - low <= FLAT * torch.maximum(high.abs(), low.abs())


def normalize_map(attn: Tensor) -> Tensor:
    """Min-max normalises each map, attn (B, L), to [0, 1] over its L patches; a flat map becomes zeros (weight 1)."""
    if attn.dim() != 2 or not attn.is_floating_point():
        raise ValueError(f"attn: got {attn.dtype} of shape {tuple(attn.shape)}; pass floats of shape (B, L)")
    attn = attn if attn.dtype == torch.float64 else attn.float()
    low, high = (x[:, None] for x in attn.aminmax(dim=1))
    return torch.where(is_flat(attn)[:, None], 0.0, (attn - low) / (high - low))


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
    impl        "auto" or "torch".

    Returns fp32 (float64 for float64 `pred`), the precision of all arithmetic. The gradient flows to `pred` only.
    Raises ValueError for wrong shapes, dtypes or values, and for `target` or `attn` that require a gradient.
    """
    _check(pred, target, mask, attn, tau, norm_pix, patch_size, reduction, impl)
    if attn is not None and normalize_attn:
        attn = normalize_map(attn.to(torch.promote_types(attn.dtype, pred.dtype)))
    loss = _patch_loss(pred, target, mask, attn, tau, norm_pix, eps, patch_size)  # (B, L)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = loss.numel() if mask is None else mask.bool().sum()
    return loss.sum() / (max(count, 1) if mask is None else count.clamp(min=1))


def _patch_loss(pred, target, mask, attn, tau, norm_pix, eps, patch_size):
    """The specification, in PyTorch: mask * w * l of shape (B, L)."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    if target.dim() == 4:
        target = _patchify(target, patch_size)  # (B, L, P)
    x = target.to(dtype)
    if target.dtype == torch.uint8:
        x = x / 255
    y = pred.to(dtype)
    if mask is not None:
        mask = mask.bool()
        y = torch.where(mask[..., None], y, 0.0)  # a product would keep NaN (NaN * 0), here and in the gradient
    if norm_pix:
        var, mean = torch.var_mean(x, dim=-1, keepdim=True)  # (B, L, 1)
        x = (x - mean) / (var + eps).sqrt()
    loss = (y - x).square().mean(dim=-1)  # (B, L)
    if attn is not None:
        loss = torch.exp(attn.to(dtype) / tau) * loss  # Eq. 1
    return loss if mask is None else torch.where(mask, loss, 0.0)


def _patchify(imgs: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C)."""
    B, C, H, W = imgs.shape
    return imgs.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def _check(pred, target, mask, attn, tau, norm_pix, patch_size, reduction, impl):
    def shape(x):
        return f"{x.dtype} of shape {tuple(x.shape)}"

    if pred.dim() != 3 or not pred.is_floating_point():
        raise ValueError(f"pred: got {shape(pred)}; pass floats of shape (B, L, P)")
    B, L, P = pred.shape
    if not (target.is_floating_point() or target.dtype == torch.uint8):
        raise ValueError(f"target: got {shape(target)}; pass floats, or uint8 (read as value / 255)")
    if target.dim() == 4:
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size: got {patch_size!r}; target is images (B, C, H, W), pass their patch size")
        H, W = target.shape[2:]
        if H % patch_size or W % patch_size:
            raise ValueError(f"target: {H}x{W} images do not divide into patches of {patch_size}; crop or resize them")
        expected = (target.shape[0], (H // patch_size) * (W // patch_size), patch_size**2 * target.shape[1])
    else:
        expected = tuple(target.shape)
    if expected != (B, L, P):
        raise ValueError(
            f"target: got {shape(target)}, that is patches {expected}, but pred has {(B, L, P)}; "
            "pass patches (B, L, P), or images (B, C, H, W) with patch_size"
        )
    for name, x in (("mask", mask), ("attn", attn)):
        if x is not None and tuple(x.shape) != (B, L):
            raise ValueError(f"{name}: got {shape(x)}; pass one value for each patch of pred, shape {(B, L)}")
    if mask is not None and mask.is_complex():
        raise ValueError(f"mask: got {shape(mask)}; pass bool or 0/1, 1 = removed")
    if attn is not None and not attn.is_floating_point():
        raise ValueError(f"attn: got {shape(attn)}; pass floats")
    for name, x in (("target", target), ("attn", attn)):
        if x is not None and x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, but the loss has one for pred only; pass {name}.detach()")
    for name, x in (("target", target), ("mask", mask), ("attn", attn)):
        if x is not None and x.device != pred.device:
            raise ValueError(f"{name}: is on {x.device}, pred on {pred.device}; move it with .to(pred.device)")
    if isinstance(tau, Tensor):
        if tau.dim() != 0:
            raise ValueError(f"tau: got a tensor of shape {tuple(tau.shape)}; pass a float or a 0-d tensor")
    elif isinstance(tau, bool) or not isinstance(tau, (int, float)) or not (0 < tau < math.inf):
        raise ValueError(f"tau: got {tau!r}; pass a finite number above 0")
    if norm_pix and P == 1:
        raise ValueError("norm_pix: patches of one value (P = 1) have no variance; pass norm_pix=False")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}; pass "mean", "sum" or "none"')
    if impl not in ("auto", "torch"):
        raise ValueError(f'impl: got {impl!r}; this file holds the PyTorch implementation, pass "auto" or "torch"')
