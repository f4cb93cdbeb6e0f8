"""
Checks of the loss's kernels on a GPU that need nothing but PyTorch and Triton.

They do not replace the project's tests, which need their peers. A row holds the error,
what is allowed, and whether it is kept.
"""

import contextlib
import os
from functools import partial
from itertools import product

import torch

import attg_mae
from attg.kernels import attg_loss
from attg_mae import Config, build_model

# Relative errors of sums of a thousand squares. Gradients are rounded to their type.
LOSS_ALLOWED = 1e-5
GRADIENT_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# (image, patch) in pixels: ViT-B/L, ViT-H, and small ones; 49 and 15 are odd.
IMAGE_KINDS = ("float32", "bfloat16", "uint8", "channels_last")
IMAGE_SIZES = ((224, 16), (224, 14), (224, 8), (32, 4), (49, 7), (225, 15))


def row_of(check, error, allowed):
    """error: a number, or the words of an exception."""
    met = isinstance(error, float) and error <= allowed
    return {"check": check, "error": error, "allowed": allowed, "ok": met}


def distance(a, b):
    """||a - b|| / ||b||; inf if there is a NaN."""
    a, b = a.detach().double(), b.detach().double()
    error = ((a - b).norm() / b.norm()).item()
    return error if error == error else float("inf")


def kernel_impl(setup):
    """The kernels on a GPU, or in Triton's interpreter; else PyTorch, with a note."""
    if setup.on_gpu or os.environ.get("TRITON_INTERPRET") == "1":
        return "triton"
    setup.note("no GPU and no interpreter: PyTorch is compared with itself")
    return "torch"


@contextlib.contextmanager
def loss_path(fused, impl="auto"):
    """Models use the kernels (impl: see attg_loss), or attg_mae.masked_loss's lines."""
    lines, kernels = attg_mae.masked_loss, attg_mae.attg_loss
    attg_mae.masked_loss = partial(lines, fused=fused)
    attg_mae.attg_loss = partial(kernels, impl=impl)
    try:
        yield
    finally:
        attg_mae.masked_loss, attg_mae.attg_loss = lines, kernels


def example(B, L, P, dtype, device, seed=0):
    """pred, a slice as MAE hands it over, mask and attn."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(B, L + 1, P, generator=generator).to(device, dtype)
    mask = (torch.rand(B, L, generator=generator) < 0.75).float().to(device)
    attn = torch.rand(B, L, generator=generator).to(device)
    return whole[:, 1:], mask, attn


def images(B, size, kind, device, seed=1):
    """(B, 3, size, size) of a type by its name; channels_last is fp32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 3, size, size, generator=generator).to(device)
    if kind == "uint8":
        return (255 * x).to(torch.uint8)
    if kind == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return x.to(getattr(torch, kind))


def loss_and_gradient(pred, target, mask, attn, impl, **options):
    leaf = pred.detach().requires_grad_()
    loss = attg_loss(leaf, target, mask, attn, impl=impl, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss, gradient


def beside_float64(setup):
    """The worst losses and gradients of each type, over images and patch sizes."""
    impl = kernel_impl(setup)
    B, sizes = (2, ((16, 8), (14, 7))) if setup.tiny else (16, IMAGE_SIZES)
    rows = []
    for dtype, allowed in GRADIENT_ALLOWED.items():
        worst = {"loss": (0.0, ""), "gradient": (0.0, "")}
        for (size, patch), kind in product(sizes, IMAGE_KINDS):
            errors = errors_of_case(B, size, patch, kind, dtype, impl, setup.device)
            for name, error in errors.items():
                where = f"p {patch}, {kind}"
                print(f"{dtype} {where} {name}: {error:.2e}")
                worst[name] = max(worst[name], (error, where))
        for name, limit in (("loss", LOSS_ALLOWED), ("gradient", allowed)):
            error, where = worst[name]
            words = f"{name} beside float64, {str(dtype)[6:]} (worst: {where})"
            rows.append(row_of(words, error, limit))
    return rows


def errors_of_case(B, size, patch, kind, dtype, impl, device):
    """{"loss": relative error, "gradient": relative error}."""
    L, P = (size // patch) ** 2, 3 * patch * patch
    pred, mask, attn = example(B, L, P, dtype, device)
    imgs = images(B, size, kind, device)
    exact = imgs if kind == "uint8" else imgs.double()
    want = loss_and_gradient(
        pred.double(), exact, mask, attn.double(), "torch", patch_size=patch
    )
    got = loss_and_gradient(pred, imgs, mask, attn, impl, patch_size=patch)
    return {
        "loss": distance(got[0], want[0]),
        "gradient": distance(got[1], want[1]),
    }


def same_bits_twice(setup):
    """The loss is deterministic."""
    impl = kernel_impl(setup)
    B, size, patch = (2, 16, 8) if setup.tiny else (256, 224, 16)
    L, P = (size // patch) ** 2, 3 * patch * patch
    pred, mask, attn = example(B, L, P, torch.bfloat16, setup.device)
    imgs = images(B, size, "float32", setup.device)
    first = loss_and_gradient(pred, imgs, mask, attn, impl, patch_size=patch)
    again = loss_and_gradient(pred, imgs, mask, attn, impl, patch_size=patch)
    different = 0.0
    for a, b in zip(first, again, strict=True):
        different += float((a != b).sum())
    return [row_of("values that differ between two calls", different, 0.0)]


def scaled_fp16(setup):
    """fp16 under a loss scale of 65536 is fp32 to 1e-3."""
    impl = kernel_impl(setup)
    B, L, P = (2, 4, 48) if setup.tiny else (64, 196, 768)
    pred, mask, attn = example(B, L, P, torch.float16, setup.device)
    target, _, _ = example(B, L, P, torch.float32, setup.device, seed=2)
    gradients = []
    for x in (pred, pred.float()):
        leaf = x.detach().requires_grad_()
        loss = attg_loss(leaf, target, mask, attn, impl=impl) * 65536
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradients.append(gradient)
    return [row_of("fp16, scaled by 65536", distance(*gradients), 1e-3)]


def compiled_whole(setup):
    """torch.compile(fullgraph=True) of the kernels, with tau as a tensor."""
    impl = kernel_impl(setup)
    pred, mask, attn = example(4, 16, 48, torch.float32, setup.device)
    target, _, _ = example(4, 16, 48, torch.float32, setup.device, seed=2)

    def function(pred, tau):
        return attg_loss(pred, target, mask, attn, tau=tau, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend=setup.backend)
    worst = 0.0
    for value in (0.75, 0.9):
        tau = torch.tensor(value, device=setup.device)
        worst = max(worst, distance(compiled(pred, tau), function(pred, tau)))
    return [row_of("compiled with fullgraph=True", worst, 1e-6)]


def in_a_graph(setup):
    """A CUDA graph of forward and backward reads tau anew at each replay."""
    if not setup.on_gpu:
        setup.note("without a CUDA graph: needs a GPU")
        return []
    pred, mask, attn = example(4, 16, 48, torch.float32, setup.device)
    target, _, _ = example(4, 16, 48, torch.float32, setup.device, seed=2)
    tau = torch.tensor(0.75, device=setup.device)
    call = partial(loss_and_gradient, pred, target, mask, attn, "triton", tau=tau)
    # Compiles, beside the stream of the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    worst = 0.0
    for value in (0.75, 0.9):
        tau.fill_(value)
        graph.replay()
        for a, b in zip(replayed, call(), strict=True):
            worst = max(worst, distance(a, b))
    return [row_of("in a CUDA graph, tau changed", worst, 1e-6)]


def beyond_32_bits(setup):
    """Offsets above 2^31: the first and the last images, beside PyTorch."""
    if not setup.on_gpu or torch.cuda.mem_get_info()[0] < 30 * 2**30:
        setup.note("without offsets above 2^31: needs 30 GiB of free GPU memory")
        return []
    shape = (15000, 196, 768)
    pred = torch.randn(*shape, device=setup.device, dtype=torch.bfloat16)
    imgs = torch.randint(
        0, 256, (15000, 3, 224, 224), device=setup.device, dtype=torch.uint8
    )
    options = {"patch_size": 16, "reduction": "none"}
    leaf = pred.requires_grad_()
    rows = attg_loss(leaf, imgs, impl="triton", **options)
    rows.backward(torch.ones_like(rows))
    found = []
    for part in (slice(0, 2), slice(-2, None)):
        few = leaf.detach()[part].clone().requires_grad_()
        want = attg_loss(few, imgs[part], impl="torch", **options)
        want.backward(torch.ones_like(want))
        loss, gradient = distance(rows[part], want), distance(leaf.grad[part], few.grad)
        words = f"offsets above 2^31, images {part.start}"
        found.append(row_of(f"{words}, loss", loss, LOSS_ALLOWED))
        allowed = GRADIENT_ALLOWED[torch.bfloat16]
        found.append(row_of(f"{words}, gradient", gradient, allowed))
    return found


def whole_model(setup):
    """Gradients of a small MAE in fp32, through the kernels and the plain lines."""
    cfg = Config(depth=1, decoder_depth=1)
    torch.manual_seed(0)
    model = build_model(cfg).to(setup.device)
    # 64 patches; few images for the interpreter.
    B = 2 if setup.tiny else 64
    imgs = torch.randn(B, 3, 32, 32, device=setup.device)
    attn, noise = torch.rand(2, B, 64, device=setup.device)
    gradients = []
    impl = kernel_impl(setup)
    for fused in (True, False):
        with loss_path(fused, impl):
            loss, _, _ = model(imgs, attn, noise=noise)
        model.zero_grad()
        loss.backward()
        parts = []
        for parameter in model.parameters():
            if parameter.grad is not None:
                parts.append(parameter.grad.flatten())
        gradients.append(torch.cat(parts))
    return [row_of("gradient of an MAE, fp32", distance(*gradients), 1e-5)]


CHECKS = (
    beside_float64,
    same_bits_twice,
    scaled_fp16,
    compiled_whole,
    in_a_graph,
    whole_model,
    beyond_32_bits,
)
