"""
The kernels: as operators of PyTorch, where they cannot run, compiled ahead of time.

tests/test_loss.py compares their results with the equations.
"""

import importlib.util
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import DEVICE, ROOT, close, kernel, python, rand, randn, some_loss


def test_operators_are_registered():
    loss, leaf, (imgs, mask, attn) = some_loss("triton")
    patches, tau = kernel._patchify(imgs, 4).half(), torch.tensor(0.75, device=DEVICE)
    for target, m, a, norm_pix, side, reduction, return_mse in (
        (imgs, mask, attn, True, 4, "mean", True),
        (imgs, mask, attn, True, 4, "sum", False),
        (patches, None, None, False, 0, "none", True),
    ):
        args = leaf, target, m, a, tau, norm_pix, 1e-6, side, True
        args += reduction, return_mse
        torch.library.opcheck(kernel._patch_loss_op, args)
        rows, mse, stats, divisor = kernel._patch_loss_op(*args)
        assert mse.shape == (rows.shape if return_mse else (0,))
        args = torch.rand_like(rows), leaf.detach(), target, m, stats, divisor, side
        torch.library.opcheck(kernel._patch_loss_backward_op, args)
    importlib.reload(kernel)  # Operators of the same name replace the first ones.
    assert some_loss("triton")[0].equal(loss)


TRANSFORMS = {
    "forward-mode differentiation": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "a transform of torch.func": lambda f, x: torch.func.grad(f)(x),
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False)(x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_left_to_pytorch(name, capsys):
    if "torch.func" in name and not hasattr(torch.func, "debug_unwrap"):
        pytest.skip("this PyTorch cannot detect it")
    _, leaf, args = some_loss("torch")
    pred = leaf.detach()

    def transformed(impl):
        def loss(pred):
            return kernel.attg_loss(pred, *args, patch_size=4, impl=impl)

        return TRANSFORMS[name](loss, pred)

    kernel._log_once.cache_clear()
    want = transformed("torch")
    assert want.any() and transformed("auto").equal(want)
    assert f"attg_loss: PyTorch ({name})" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f'impl: .* {name}; pass "auto" or "torch"'):
        transformed("triton")
    if "forward-mode" in name:  # A compiled tangent is not silently zero.
        torch.compiler.reset()
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        assert close(compiled("auto").cpu(), want.cpu(), 1e-6)
        torch.compiler.reset()


def test_reasons_against_the_kernels(monkeypatch, capsys):
    def check(reason, dtype=torch.float32, **replaced):
        kernel._log_once.cache_clear()
        with monkeypatch.context() as patch:
            for name, value in replaced.items():
                patch.setattr(kernel, name, value)
            for _ in range(2):
                loss = some_loss("auto", dtype)[0]
                assert loss.isfinite() and loss.equal(some_loss("torch", dtype)[0])
            with pytest.raises(ValueError, match=f'{reason}.*"torch"'):
                some_loss("triton", dtype)
        assert capsys.readouterr().err == f"attg_loss: PyTorch ({reason})\n"  # once

    check("pred is torch.float64", torch.float64)
    check("a patch takes 16 x 4 values, above 63", MAX_TILE=63)
    check("Triton is not installed", HAS_TRITON=False)
    if DEVICE == "cpu":
        check("cpu tensors", INTERPRETED=False)
    # On ROCm this is the major version of gfx9 and later.
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    pred = SimpleNamespace(dtype=torch.float32, shape=(2, 9, 48))
    pred.device, properties = torch.device("cuda"), SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for properties.major in (7, 8, 9):
        reason = kernel._why_not_fused(pred, torch.zeros(2, 9, 48), None, None, 0.75)
        assert bool(reason) == ("7, below 8" in reason) == (properties.major == 7)


def test_launches_can_be_captured_in_a_cuda_graph(monkeypatch):
    """As far as a CPU can tell: no value is read."""
    kernel._triton()
    launcher = defaultdict(lambda: lambda *args, **named: None)
    for name in ("_forward_kernel", "_total_kernel", "_backward_kernel"):
        monkeypatch.setattr(kernel, name, launcher)

    def operators(read):
        with torch.profiler.profile() as profile:
            loss = some_loss("triton", tau=torch.tensor(0.75, device=DEVICE))[0]
            loss.backward()
            if read:
                loss.item()
        return {event.key for event in profile.key_averages()}

    synchronizing = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}
    assert not operators(read=False) & synchronizing
    assert operators(read=True) & synchronizing


PATCHES = ((3, 3, 27), None)
IMAGES = [((3, 3, 4, 4), 4), ((3, 3, 3, 3), 3), ((3, 3, 12, 4), 4), ((3, 3, 3, 3), 1)]


@pytest.mark.parametrize("shape, p", [PATCHES, *IMAGES])
def test_offsets_beyond_2_to_31(shape, p):
    """In each dimension of each tensor: memory of 4 GB, hardly any of it touched.

    Strides stay below 2^31, as larger ones would make all offsets int64.
    """
    L, P = shape[1:] if p is None else (shape[2] * shape[3] // p**2, 3 * p**2)
    target, mask = (255 * rand(*shape, seed=1)).byte(), rand(3, L, seed=2) < 0.6
    mask[:, -1] = True
    tensors = randn(3, L, P).half(), target, mask, rand(3, L, seed=3).half()
    tensors = [x.to(DEVICE) for x in tensors]

    def run(pred, *args):
        leaf = pred.detach().requires_grad_()
        options = {"patch_size": p, "impl": "triton", "reduction": "none"}
        loss = kernel.attg_loss(leaf, *args, **options)
        loss.sum().backward()
        return loss.detach().cpu(), leaf.grad.cpu()

    want = run(*tensors)
    assert want[0][:, -1].all()
    for i, x in enumerate(tensors):
        size = (2**32 + 2**17) // x.element_size()
        pool = torch.empty(size, dtype=x.dtype, device=DEVICE)
        for dim, size in enumerate(x.shape):
            # From the first to the last, or to the last patch
            steps = size - p if x.dim() == 4 and dim > 1 and size > p else size - 1
            if steps < 2:
                continue
            strides = list(x.contiguous().stride())
            strides[dim] = math.ceil(2**31 / steps)
            far = pool.as_strided(x.shape, strides).copy_(x)
            got = run(*tensors[:i], far, *tensors[i + 1 :])
            assert close(got[0], want[0], 1e-6), (i, dim)
            assert close(got[1], want[1], 1e-3), (i, dim)


def check_known(attg_loss, **options):
    """For predictions of 1: x_norm has mean 0 and unbiased variance 1."""
    pred = torch.ones(1, 4, 12, requires_grad=True)
    loss = attg_loss(pred, torch.rand(1, 3, 4, 4), patch_size=2, **options)
    loss.backward()
    assert abs(loss.item() - (1 + 11 / 12)) < 1e-3
    # 2 / P * sum(1 - x_norm) of a patch, and 4 patches
    assert (pred.grad.sum(2) - 2 / 4).abs().max() < 1e-5
    assert pred.grad.std() > 0.01


@pytest.mark.parametrize("first", ["", "import sys; sys.modules['triton'] = None"])
def test_kernel_file_works_alone(tmp_path, first):
    code = (
        f"{first}\n{inspect.getsource(check_known)}"
        + """
import sys, warnings
warnings.simplefilter("error")
import attg_loss, torch
assert not sys.modules.get("triton") and not {"attg", "kernels"} & {*sys.modules}
check_known(attg_loss.attg_loss)
assert not sys.modules.get("triton") and not torch.cuda.is_initialized()
"""
    )
    shutil.copy(kernel.__file__, tmp_path)
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("attg_loss: PyTorch (")


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes no CPU tensors")
def test_two_copies_of_the_kernel_file_in_one_process(tmp_path):
    path = shutil.copy(kernel.__file__, tmp_path)
    # A name that is none of Python's
    spec = importlib.util.spec_from_file_location("3-mae.attg_loss", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    for module in (kernel, other, kernel):
        check_known(module.attg_loss, impl="triton")


@pytest.mark.skipif(not kernel.HAS_TRITON, reason="needs Triton")
def test_kernels_compile_ahead_of_time_without_spills(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = {"env": env | {"TRITON_CACHE_DIR": str(tmp_path)}, "cwd": ROOT}
    runs = {}
    for target in ("sm_90", "sm_80", "gfx942"):
        command = [sys.executable, "-m", "tests.aot", target]
        runs[target] = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    for target, run in runs.items():
        compiled = json.loads(run.communicate()[0])
        assert run.returncode == 0 and (compiled or target == "gfx942")
        if compiled:
            check_compiled(*compiled)


def check_compiled(launches, oversized, groups):
    """Check the launches of a target, as tests/aot.py prints them."""
    assert len(launches) == (15 if oversized else 6)
    for x in launches:
        # At P = 768 none, but by Triton 3.2; a register or two elsewhere.
        usual = x["case"] in ("images", "patches", "bytes")
        assert x["spills"] <= (0 if usual and groups else 16), x
        # Triton 3.2 uses the plain layout for images.
        if not usual or not groups and x["case"] != "patches":
            continue
        if x["kernel"] == "_forward_kernel":
            assert x["barriers"] == 0, x
        if "loads" in x and x["kernel"] != "_total_kernel":
            # Values are loaded by 16 bytes, or by 8 pixels of a byte each. Masks and
            # numbers per patch take 1 or 4 bytes.
            several = {"8", "16"} if x["case"] == "bytes" else {"16"}
            assert several <= set(x["loads"]) <= several | {"1", "4"}, x
    assert not oversized or oversized["spills"] > 16
