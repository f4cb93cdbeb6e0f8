"""
The loss, forward and backward: PyTorch, torch.compile and the fused kernels.
"""

import shutil
from functools import partial

import torch

from attg.kernels import attg_loss
from benchmarks.measure import compare, peak_memory, take_turns

# Patch size, dtypes of predictions and images: those of the table in docs/kernel.md.
CASES = (
    (16, torch.bfloat16, torch.float32),
    (16, torch.bfloat16, torch.bfloat16),
    (16, torch.bfloat16, torch.uint8),
    (16, torch.float32, torch.float32),
    (14, torch.bfloat16, torch.float32),
    (8, torch.bfloat16, torch.float32),
    (4, torch.bfloat16, torch.float32),
)


def available_losses(device):
    """{name: loss} of the implementations that run here."""
    eager = partial(attg_loss, impl="torch")
    losses = {"eager": eager}
    # torch.compile needs a C++ compiler on a CPU.
    if device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++"))):
        losses["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    if device.type == "cuda":
        losses["triton"] = partial(attg_loss, impl="triton")
    return losses


def make_inputs(case, batch_size, size, device):
    """(pred, imgs, mask, attn) of the loss, 75 % of the patches masked.

    pred is a slice, as MAE passes it.
    """
    patch, pred_dtype, image_dtype = case
    L, P = (size // patch) ** 2, 3 * patch**2
    pred = torch.randn(batch_size, L + 1, P, device=device, dtype=pred_dtype)
    imgs = 255 * torch.rand(batch_size, 3, size, size, device=device)
    imgs = imgs.to(image_dtype)
    attn, noise = torch.rand(2, batch_size, L, device=device)
    mask = noise.argsort(1) >= L // 4
    pred = pred[:, 1:].requires_grad_()
    return pred, imgs, mask.float(), attn


def bytes_to_move(pred, imgs, mask):
    """{"forward": of the forward pass, "both": of forward and backward}.

    forward reads pred and image of the masked patches; backward reads them again and
    writes the whole gradient. (Memory moves sectors of 32 bytes, so small patches in
    images cost more.)
    """
    values = int(mask.sum()) * pred.shape[2]
    read = values * (pred.element_size() + imgs.element_size())
    written = pred.numel() * pred.element_size()
    return {"forward": read, "both": 2 * read + written}


def forward_and_backward(forward, pred):
    pred.grad = None
    forward().backward()


def run(settings, device):
    """Rows: ms of each loss and pass, and of a copy that moves as many bytes."""
    losses = available_losses(device)
    # A float would be copied to the GPU at each call.
    tau = torch.tensor(0.75, device=device)
    for case in CASES:
        torch.compiler.reset()
        pred, *others = make_inputs(case, settings.batch_size, settings.size, device)
        passes = {"forward": {}, "both": {}}
        for name, loss in losses.items():
            call = partial(loss, pred, *others, tau=tau, patch_size=case[0])
            passes["forward"][name] = call
            passes["both"][name] = partial(forward_and_backward, call, pred)
        moved = bytes_to_move(pred, *others[:2])
        for which, calls in passes.items():
            # It reads one half and writes the other.
            x = torch.ones(moved[which] // 2, dtype=torch.uint8, device=device)
            y = torch.empty_like(x)
            calls["copy"] = partial(y.copy_, x)
            times = take_turns(calls, device, settings.repeats)
            for name, columns in compare(times).items():
                row = dict(zip(("patch", "pred", "images"), case, strict=True))
                row |= {"pass": which, "loss": name}
                yield row | columns | peak_memory(calls[name], device)
