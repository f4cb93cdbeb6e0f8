"""
The kernel: as an operator of torch, where it cannot run, compiled ahead of time, on GPUs.
"""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import attg_mae
import tests.helpers as helpers
from tests.helpers import (
    DEVICE,
    DIMS,
    GRAD_TOL,
    ROOT,
    check_grad,
    check_loss,
    close,
    kernel,
    needs_gpu,
    rand,
    randn,
    records,
    some_loss,
    train,
)


@pytest.mark.parametrize("dtype", kernel.FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_kernel_shapes_and_masks(dims, dtype):
    B, L, P = dims
    pred = randn(*dims, dtype=dtype)
    target = randn(*dims, seed=1, dtype=dtype) * 2 + 1
    attn = rand(B, L).to(dtype)
    some, single = rand(B, L, seed=3) < 0.6, torch.zeros(B, L)
    single[-1, L // 2] = 1
    kw = dict(impl="triton", norm_pix=P > 1)
    masks = [
        some.long(),
        some.to(dtype),
        0 * single,
        torch.ones(B, L).bool(),
        single,
        None,
    ]
    # Each mask with a third of the smaller shapes and types
    others = masks[(DIMS.index(dims) + kernel.FUSED_DTYPES.index(dtype)) % 3 :: 3]
    if P > 500:
        others = []
    for mask in (some, *others):
        check_loss(pred, target, mask, attn, reductions=["none"], **kw)
    check_loss(pred, target.float(), some, None, reductions=["mean"], **kw)
    check_loss(
        pred,
        target.half(),
        some,
        attn.bfloat16(),
        reductions=["sum"],
        **kw | {"norm_pix": False},
    )


def test_kernel_operators_are_well_registered():
    loss, leaf, (imgs, mask, attn) = some_loss("triton")
    patches, tau = kernel._patchify(imgs, 4).half(), torch.tensor(0.75, device=DEVICE)
    for target, m, a, norm_pix, side, reduction, return_mse in (
        (imgs, mask, attn, True, 4, "mean", True),
        (imgs, mask, attn, True, 4, "sum", False),
        (patches, None, None, False, 0, "none", True),
    ):
        args = leaf, target, m, a, tau, norm_pix, 1e-6, side, True
        args += reduction, return_mse
        torch.library.opcheck(kernel._op, args)
        rows, mse, stats, divisor = kernel._op(*args)
        assert mse.shape == (rows.shape if return_mse else (0,))
        args = torch.rand_like(rows), leaf, target, m, stats, divisor, side
        torch.library.opcheck(kernel._op_backward, args)
    importlib.reload(kernel)  # operators of the same name replace the first
    assert some_loss("triton")[0].equal(loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernel_has_a_second_derivative(reduction):
    def second(impl, dtype):
        _, leaf, (imgs, mask, attn) = some_loss("torch")
        pred = leaf.detach().to(dtype).requires_grad_()
        options = {"patch_size": 4, "reduction": reduction, "impl": impl}
        loss = kernel.attg_loss(pred, imgs.to(dtype), mask, attn.to(dtype), **options)
        up = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape)
        up = up.to(loss).requires_grad_()
        (grad,) = torch.autograd.grad(loss, pred, up, create_graph=True)
        return torch.autograd.grad((grad * 100).square().sum(), (pred, up))

    got, want = second("triton", torch.float32), second("torch", torch.float64)
    for a, b in zip(got, want, strict=True):
        check_grad(a.cpu(), b.cpu(), 1e-5)


TRANSFORMS = {
    "forward-mode differentiation": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "a transform of torch.func": lambda f, x: torch.func.grad(f)(x),
    "a transform of torch.func, vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False)(x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("words", TRANSFORMS)
def test_kernel_leaves_transforms_to_pytorch(words, capsys):
    if "torch.func" in words and not hasattr(torch.func, "debug_unwrap"):
        pytest.skip("this PyTorch cannot tell")
    _, leaf, (imgs, mask, attn) = some_loss("torch")

    def transformed(impl):
        options = {"patch_size": 4, "impl": impl}

        def loss(pred):
            return kernel.attg_loss(pred, imgs, mask, attn, **options)

        return TRANSFORMS[words](loss, leaf.detach())

    kernel._log_once.cache_clear()
    want = transformed("torch")
    assert want.any() and transformed("auto").equal(want)
    says = words.split(",")[0]
    assert f"attg_loss: PyTorch ({says})" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f'impl: .* {says}; pass "auto" or "torch"'):
        transformed("triton")


def test_kernel_compiled_under_jvp_makes_no_zero_tangent():
    _, leaf, (imgs, mask, attn) = some_loss("torch")

    def loss(pred):
        return kernel.attg_loss(pred, imgs, mask, attn, patch_size=4)

    def tangent(pred):
        return torch.func.jvp(loss, (pred,), (pred,))[1]

    torch.compiler.reset()
    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    pred = leaf.detach()
    assert close(compiled(pred).cpu(), tangent(pred).cpu(), 1e-6) and tangent(pred) != 0
    torch.compiler.reset()


def test_kernel_can_be_captured_in_a_cuda_graph(monkeypatch):
    """As far as a CPU can tell: no value is read, and the launches are alike."""
    some_loss("triton")  # binds the kernels
    launches = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, **named: launches.append((grid, args, named))

    for name in ("_forward_kernel", "_total_kernel", "_backward_kernel"):
        monkeypatch.setattr(kernel, name, Launcher())

    def operators(tau, read=False):
        with torch.profiler.profile() as profile:
            loss = some_loss("triton", tau=tau)[0]
            loss.backward()
            if read:
                loss.item()
        return {event.key for event in profile.key_averages()}

    synchronise = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}
    tau = torch.tensor(0.75, device=DEVICE)
    assert not operators(tau) & synchronise
    assert operators(tau, read=True) & synchronise
    first, second = launches[:3], launches[3:]
    for a, b in zip(first, second, strict=True):
        numbers = [
            [x for x in (*args, *named.values()) if not isinstance(x, torch.Tensor)]
            for _, args, named in (a, b)
        ]
        assert a[0] == b[0] and numbers[0] == numbers[1]
    if DEVICE == "cpu":  # tensors without values
        pred = torch.empty(2, 9, 48, device="meta", requires_grad=True)
        rows, options = pred[..., 0].detach(), {"tau": tau, "impl": "triton"}
        loss = kernel.attg_loss(pred, pred.detach(), rows, rows, **options)
        loss.backward()
        assert loss.is_meta and pred.grad.shape == pred.shape


def test_kernel_offsets_beyond_2_to_31():
    """Views with wide strides into memory that is hardly touched."""
    code = """
import torch
from tests.helpers import kernel, rand, randn
far = 2**30
bytes = torch.empty(4 * far, dtype=torch.uint8)
halves = torch.empty(2 * far + 2**20, dtype=torch.float16)
def check(pred, target, **options):
    x = (rand(*target.shape) * 255).byte()
    target.copy_(x)
    losses = []
    rows = torch.ones(pred.shape[:2])
    mask, attn = options.pop("mask", rows), options.pop("attn", rand(*rows.shape))
    for y, t, m, a in (
        (pred, target, mask, attn),
        (pred.contiguous(), x, mask.contiguous(), attn.contiguous()),
    ):
        leaf = y.detach().requires_grad_()
        options |= {"impl": "triton", "reduction": "none"}
        loss = kernel.attg_loss(leaf, t, m, a, **options)
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        losses.append((loss, grad))
    assert all(a.equal(b) for a, b in zip(*losses))
    assert (losses[0][0] != 0).equal(mask != 0) and losses[0][1].any()
small = randn(3, 4, 48).half()
# rows, images and values of pred
for shape, strides in (
    ((1, 3, 48), (0, far, 1)), ((3, 1, 48), (far, 0, 1)), ((1, 4, 3), (0, 1, far))
):
    pred = halves.as_strided(shape, strides)
    pred.copy_(randn(*shape))
    check(pred, bytes.as_strided(shape, strides))
# rows and images of mask and map
for shape, strides in (((1, 3), (0, far)), ((3, 1), (far, 0))):
    mask, attn = bytes.as_strided(shape, strides), halves.as_strided(shape, strides)
    mask.copy_(torch.tensor([1, 0, 1]).view(shape))
    attn.copy_(torch.tensor([0.2, 0.9, 0.5]).view(shape))
    for one in ({"mask": mask}, {"attn": attn}):
        check(small[:, :1].reshape(*shape, 48), torch.empty(*shape, 48).byte(), **one)
# images, channels, lines and columns of a patch (3 pixels do not fit register groups),
# lines and columns of patches
for p, shape, strides in (
    (4, (3, 3, 4, 4), (far, 16, 4, 1)),
    (4, (1, 3, 4, 4), (0, far, 8, 1)),
    (4, (1, 3, 4, 4), (0, 16, far, 1)),
    (3, (1, 3, 3, 3), (0, far, 4, 1)),
    (3, (1, 3, 3, 3), (0, 16, far, 1)),
    (3, (1, 3, 3, 3), (0, 16, 1, far)),
    (4, (1, 3, 12, 4), (0, 16, far // 4, 1)),
    (1, (1, 3, 3, 1), (0, 16, far, 1)),
    (1, (1, 3, 1, 3), (0, 16, 1, far)),
):
    patches = shape[2] * shape[3] // p**2
    pred = small[: shape[0], :patches, : 3 * p**2]
    check(pred, bytes.as_strided(shape, strides), patch_size=p)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_kernel_where_it_cannot_run(monkeypatch, capsys):
    def path(words, **kw):
        kernel._log_once.cache_clear()
        assert some_loss("auto", **kw)[0].equal(some_loss("torch", **kw)[0])
        assert some_loss("auto", **kw)[0].isfinite()
        # once
        assert re.findall("attg_loss: .*", capsys.readouterr().err) == [
            f"attg_loss: PyTorch ({words})"
        ]
        with pytest.raises(ValueError, match=re.escape(words) + '.*"torch"'):
            some_loss("triton", **kw)

    path("pred is torch.float64", dtype=torch.float64)
    monkeypatch.setattr(kernel, "MAX_TILE", 63)
    path("a patch takes 16 x 4 values, above 63")
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    if DEVICE == "cpu":
        path("cpu tensors")
    monkeypatch.setattr(kernel, "HAS_TRITON", False)
    path("Triton is not installed")
    monkeypatch.setattr(kernel, "HAS_TRITON", True)
    # ROCm: gfx9 and later
    _, leaf, (imgs, mask, attn) = some_loss("torch")
    pred = SimpleNamespace(
        device=torch.device("cuda"), dtype=leaf.dtype, shape=leaf.shape
    )
    for major, words in (
        (7, "a GPU of compute capability 7, below 8"),
        (8, ""),
        (9, ""),
    ):
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda _, m=major: SimpleNamespace(major=m),
        )
        assert kernel._why_not_fused(pred, imgs, mask, attn, 0.75) == words


def check_known(attg_loss, **options):
    """For predictions of 1: x_norm has mean 0 and, unbiased, variance 1."""
    pred = torch.ones(1, 4, 12, requires_grad=True)
    loss = attg_loss(pred, torch.rand(1, 3, 4, 4), patch_size=2, **options)
    loss.backward()
    assert abs(loss.item() - (1 + 11 / 12)) < 1e-3
    # 2 / P * sum(1 - x_norm) of a patch, and 4 patches
    assert (pred.grad.sum(2) - 2 / 4).abs().max() < 1e-5
    assert pred.grad.std() > 0.01


def test_kernel_file_works_alone(tmp_path):
    code = """
import sys, warnings
warnings.simplefilter("error")
import attg_loss, torch
assert not sys.modules.get("triton") and "kernels" not in sys.modules
check_known(attg_loss.attg_loss)
assert not sys.modules.get("triton") and not torch.cuda.is_initialized()
"""
    Path(tmp_path, "attg_loss.py").write_bytes(Path(kernel.__file__).read_bytes())
    for first in ("", "import sys; sys.modules['triton'] = None"):
        done = subprocess.run(
            [sys.executable, "-c", f"{first}\n{inspect.getsource(check_known)}{code}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("attg_loss: PyTorch (") and done.stdout == ""


@pytest.mark.skipif(
    DEVICE != "cpu", reason="without a GPU the kernel takes CPU tensors"
)
def test_two_copies_of_the_kernel_file_live_together(tmp_path):
    path = tmp_path / "attg_loss.py"
    path.write_bytes(Path(kernel.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("attg_loss", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    for module in (kernel, other, kernel):
        check_known(module.attg_loss, impl="triton")
    assert kernel._op is not other._op
    assert kernel._op._qualname != other._op._qualname


@pytest.mark.skipif(not kernel.HAS_TRITON, reason="needs Triton")
def test_kernel_compiles_ahead_of_time_without_spills(tmp_path):
    env = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    env.pop("TRITON_INTERPRET", None)
    options = {"env": env, "cwd": ROOT, "stdout": subprocess.PIPE}
    options |= {"stderr": subprocess.PIPE, "text": True}
    runs = {}
    for target in ("sm_90", "sm_80", "gfx942"):
        command = [sys.executable, "-m", "tests.ahead", target]
        runs[target] = subprocess.Popen(command, **options)
    for target, run in runs.items():
        out, err = run.communicate()
        assert run.returncode == 0, err
        compiled = json.loads(out)
        assert compiled or target == "gfx942"
        if compiled:
            check_compiled(*compiled)


def check_compiled(launches, oversized, groups):
    """The launches of a target, as tests/ahead.py prints them."""
    assert len(launches) == (15 if oversized else 6)
    for x in launches:
        # At P = 768 none; a register or two elsewhere.
        usual = x["case"] in ("images", "patches", "bytes")
        assert x["spills"] <= (0 if usual else 16), x
        # Triton 3.2 takes the plain layout for images.
        if not groups and x["case"] != "patches":
            continue
        if usual and x["kernel"] == "_forward_kernel":
            assert x["barriers"] == 0, x
        if usual and "loads" in x and x["kernel"] != "_total_kernel":
            # Values come 16 bytes at a time, or 8 pixels of a byte each. What is
            # loaded by 1 or 4 bytes are masks and one number for a patch.
            several = {"bytes": {"8", "16"}}.get(x["case"], {"16"})
            assert several <= set(x["loads"]) <= several | {"1", "4"}, x
    assert not oversized or oversized["spills"] > 16


def test_training_with_the_kernel_is_the_same(labelled, tmp_path, monkeypatch):
    settings = dict(
        labelled, img_size=8, batch_size=2, epochs=1, device=DEVICE, eval_every=0
    )
    plain = attg_mae.masked_loss
    monkeypatch.setattr(attg_mae, "masked_loss", partial(plain, fused=False))
    train(tmp_path / "torch", **settings)
    used = []

    def fused(*args, **options):
        used.append(1)
        return kernel.attg_loss(*args, impl="triton", **options)

    monkeypatch.setattr(attg_mae, "masked_loss", partial(plain, fused=True))
    monkeypatch.setattr(attg_mae, "attg_loss", fused)
    train(tmp_path / "triton", **settings)
    a, b = (
        np.array([(r["loss"], r["mse"]) for r in records(tmp_path / name)])
        for name in ("torch", "triton")
    )
    assert len(used) > 2 * len(a) >= 24
    assert np.allclose(a, b, rtol=1e-5)
    assert len({*a[:, 0]}) == len(a)


@needs_gpu
@pytest.mark.parametrize("kind", ["images", "patches", "transposed"])
def test_kernel_above_2_to_31_elements(kind):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    pred = torch.randn(15000, 196, 768, device=DEVICE, dtype=torch.bfloat16)
    imgs = torch.randint(0, 255, (15000, 3, 224, 224), device=DEVICE, dtype=torch.uint8)
    target = imgs if kind == "images" else pred.flip(0)
    if kind == "transposed":
        pred = pred.view(-1, 768).T.contiguous().T.view(15000, 196, 768)
    assert pred.numel() > 2**31 and target.numel() > 2**31
    leaf, kw = pred.requires_grad_(), dict(patch_size=16, reduction="none")
    rows = kernel.attg_loss(leaf, target, impl="triton", **kw)
    rows.backward(torch.ones_like(rows))
    for i in (slice(0, 2), slice(-2, None)):
        part = leaf.detach()[i].clone().requires_grad_()
        want = kernel.attg_loss(part, target[i], impl="torch", **kw)
        want.backward(torch.ones_like(want))
        assert close(rows[i].cpu(), want.cpu(), 5e-6)
        check_grad(leaf.grad[i].cpu(), part.grad.cpu(), GRAD_TOL[torch.bfloat16])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_on_a_second_gpu(monkeypatch):
    want = some_loss("torch")[0]
    monkeypatch.setattr(helpers, "DEVICE", "cuda:1")
    loss, leaf, _ = some_loss("triton")
    loss.backward()
    assert loss.device == leaf.grad.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert close(loss.cpu(), want.cpu(), 5e-6)


@needs_gpu
@pytest.mark.skipif(
    not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer"
)
def test_kernel_touches_no_foreign_memory():
    code = """
import torch
from tests.helpers import some_loss
for L, P in (9, 48), (1, 48), (49, 16), (100, 768), (4, 80):
    some_loss("triton", L=L, P=P)[0].backward()
torch.cuda.synchronize()
"""
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        *"compute-sanitizer --tool memcheck --error-exitcode 9".split(),
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
