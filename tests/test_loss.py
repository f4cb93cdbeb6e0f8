"""
The loss, in PyTorch and by the kernels, against a float64 loop over the paper's equations.

Without a GPU the kernels run in Triton's interpreter.
"""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import (
    DEVICE,
    GRAD_TOL,
    IMPLS,
    check_grad,
    close,
    kernel,
    on_device,
    oracle,
    rand,
    randn,
    rms,
    run,
)

each_impl = pytest.mark.parametrize("impl", IMPLS)
# Triton's interpreter takes a tenth of a second for an example.
fewer = settings(max_examples=max(1, settings.default.max_examples // 3))

# -- Random arguments ------------------------------------------------------------------

# Tensors with the same values in other memory layouts. (MAE passes the slice.)
LAYOUTS = {
    "contiguous": lambda x: x,
    "slice": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "expanded": lambda x: x[:1].expand_as(x),  # the first image, as often
}


@st.composite
def arguments(draw, impl, kind, layouts=tuple(LAYOUTS)):
    """Return [pred, target, mask, attn] and a dictionary of options.

    kind is "patches", "images", or "groups": images that the kernels read in register
    groups.
    """

    def pick(*values):
        return draw(st.sampled_from(values))

    B, gh, gw, seed = pick(1, 2), pick(1, 2, 3), pick(1, 2, 3), pick(*range(0, 100, 5))
    P, p = pick(1, 3, 12, 47, 48, 588, 768, 1023), None
    if kind != "patches":
        p, C = pick(2, 1, 3, 4, 8), pick(3, 1, 4)
        if kind == "groups":
            gw, p, C = 1, pick(8, 4, 16), 3
        P = p * p * C
    L = gh * gw
    shape = (B, L, P) if p is None else (B, C, gh * p, gw * p)
    floats = kernel.FUSED_DTYPES + ((torch.float64,) if impl == "torch" else ())
    # Neighbours differ, so that no patch has a variance near 0.
    target = sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij")) % 2
    target = target + 0.7 * rand(*shape, seed=seed)
    target = pick((150 * target).byte(), (3 * target - 1).to(pick(*floats)))
    pred = randn(B, L, P, seed=seed + 1).to(pick(*floats))
    mask = rand(B, L, seed=seed + 2) < pick(0.6, 0.5, 0.7, 2, -1)  # some, all, none
    mask = pick(mask, mask.float(), mask.long(), mask.to(pred.dtype), None)

    m = rand(B, L, seed=seed + 3)
    flat = torch.tensor([0.3, 0.9])[:B, None].expand(B, L)
    dropped = m.masked_fill(m < 0.4, -math.inf)
    attn, normalize = pick(
        (m, True),
        (m, False),
        (None, True),
        (m * 40 - 7, True),
        (dropped, False),
        (flat, True),
        (flat, False),
        (0.3 + 1e-7 * m, True),
    )
    attn = attn if attn is None else attn.to(pick(*floats))
    tau = pick(0.75, 0.25, 100.0)
    tau = pick(tau, torch.tensor(tau), torch.tensor(tau).double())
    options = {"patch_size": p, "normalize_attn": normalize, "tau": tau}
    options |= {"norm_pix": P > 1 and pick(True, False), "eps": pick(1e-6, 0.1, 0.0)}
    if kind == "groups":  # The values of a row have stride 1.
        layouts = [x for x in layouts if x in ("contiguous", "slice", "expanded")]
    tensors = pred, target, mask, attn
    return [x if x is None else LAYOUTS[pick(*layouts)](x) for x in tensors], options


def check_loss(pred, target, mask, attn, impl, reduction, return_mse=True, **options):
    """Compare loss, gradient and mse with the loop.

    The upstream gradient is chosen so that fp16 can hold the gradient. The error of the
    kernels is at most twice that of PyTorch as well (2.5 times for 16-bit gradients in
    the interpreter, which truncates).
    """
    rows, grad, count = oracle(pred, target, mask, attn, **options)
    plain = oracle(pred, target, mask, None, **options)[0]
    (B, L, P), count = pred.shape, max(count, 1)
    upstream = {"mean": count, "sum": 1, "none": rand(B, L, seed=5).double() + 0.5}
    upstream = P * upstream[reduction]
    if reduction == "none":
        grad = grad * upstream[..., None]
    else:
        rows, plain, grad = rows.sum(), plain.sum(), P * grad
    if reduction == "mean":
        rows, plain = rows / count, plain / count

    truncates = impl == "triton" and kernel.INTERPRETED and pred.dtype.itemsize == 2
    factor = 2.5 if truncates else 2
    tol = GRAD_TOL[pred.dtype] * (factor if truncates else 1)
    options |= {"reduction": reduction, "return_mse": return_mse}
    got = run(pred, target, mask, attn, upstream, impl, **options)
    for x, want in zip(got[::2], (rows, plain), strict=False):
        assert close(x, want, min(tol, 5e-6))
    check_grad(got[1], grad, tol)
    if impl == "triton":
        torchs = run(pred, target, mask, attn, upstream, "torch", **options)
        for x, y, want in zip(got, torchs, (rows, grad, plain), strict=False):
            eps = torch.finfo(x.dtype).eps * (0.5 if x.dtype.itemsize == 2 else 1)
            assert rms(x - want) <= factor * max(rms(y - want), eps * rms(want))


# -- Properties ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["patches", "images", "groups"])
@each_impl
@given(data=st.data())
def test_loss_equals_the_equations(impl, kind, data):
    tensors, options = data.draw(arguments(impl, kind))
    if impl == "triton" and kind == "groups" and kernel._has_tuples():
        assert kernel._group(*tensors[:2], options["patch_size"])
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    check_loss(*tensors, impl, reduction, data.draw(st.booleans()), **options)


@each_impl
@fewer
@given(data=st.data())
def test_loss_ignores_visible_patches(impl, data):
    """NaN and inf there change no bit of loss, mse and gradient."""
    values = arguments(impl, "images", layouts=["contiguous"])
    (pred, imgs, mask, attn), options = data.draw(values)
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    p = options["patch_size"]
    mask = torch.ones(pred.shape[:2]) if mask is None else mask
    visible = mask == 0
    dirty = pred.masked_fill(visible[..., None], bad)
    grid = visible.reshape(len(imgs), 1, imgs.shape[2] // p, imgs.shape[3] // p)
    pixels = grid.repeat_interleave(p, 2).repeat_interleave(p, 3)
    dirty_imgs = imgs.masked_fill(pixels, bad if imgs.is_floating_point() else 7)
    dirty_attn = attn
    if attn is not None and not options["normalize_attn"]:
        dirty_attn = attn.masked_fill(visible, bad)
    up = {"upstream": rand(*mask.shape), "impl": impl, "reduction": "none"}
    up |= {"return_mse": True}
    want = run(pred, imgs, mask, attn, **options, **up)
    got = run(dirty, dirty_imgs, mask, dirty_attn, **options, **up)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert not any(x[visible].any() for x in got)


@each_impl
@fewer
@given(data=st.data())
def test_loss_of_a_flat_map_has_the_bits_of_no_map(impl, data):
    (pred, target, mask, _), options = data.draw(arguments(impl, "patches"))
    options |= {"normalize_attn": True, "impl": impl, "tau": 0.02}
    flat = torch.tensor([0.3, -5.0])[: len(pred), None].expand(pred.shape[:2])
    noise = flat * (1 + 1e-7 * rand(*flat.shape))
    attn = data.draw(st.sampled_from([flat, noise, flat.half(), 0 * flat]))
    kinds = [("mean", 1.0), ("sum", 1.0), ("none", rand(*flat.shape))]
    reduction, up = data.draw(st.sampled_from(kinds))
    options |= {"reduction": reduction, "return_mse": True}
    want = run(pred, target, mask, None, up, **options)
    got = run(pred, target, mask, attn, up, **options)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert want[2].equal(want[0])  # without a map the loss is the mse


# -- Cases that the properties do not reach --------------------------------------------


@each_impl
def test_loss_of_a_small_tau_and_long_maps(impl):
    pred, target, mask = randn(3, 8, 12), randn(3, 8, 12, seed=1), rand(3, 8) < 0.7
    m = rand(3, 8, seed=4)
    check_loss(pred, target, mask, m, impl, "none", tau=0.02)
    loss, grad = run(pred, target, mask, m, tau=0.02, impl=impl)
    with_mse = run(pred, target, mask, m, tau=0.02, impl=impl, return_mse=True)
    assert loss.equal(with_mse[0]) and grad.equal(with_mse[1])  # the same bits
    wrong = oracle(pred, target, mask, m, 0.02 * 1.001)[0]
    assert not close(loss, wrong.sum() / mask.sum(), 5e-6)
    # Several blocks of a map, the maximum in the last
    pred, target, attn = randn(1, 5000, 4), randn(1, 5000, 4, seed=1), rand(1, 5000)
    attn[0, 4900] = 7
    check_loss(pred, target, rand(1, 5000, seed=1) < 0.5, attn, impl, "none")


@each_impl
def test_loss_without_map_or_images(impl):
    args = [on_device(x) for x in (randn(2, 4, 12), randn(2, 4, 12, seed=1))]
    options = {"reduction": "none", "return_mse": True, "impl": impl}
    loss, mse = kernel.attg_loss(*args, **options)
    assert mse.equal(loss) and loss.zero_() is loss and mse.all()  # no shared memory
    loss, grad = run(
        torch.zeros(0, 4, 12), torch.zeros(0, 3, 4, 4), patch_size=2, impl=impl
    )
    assert loss == 0 and grad.shape == (0, 4, 12)


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backward_passes_give_twice_the_gradient(impl, reduction):
    args = randn(3, 8, 12, seed=1), rand(3, 8, seed=2) < 0.6, rand(3, 8, seed=3)
    leaf = on_device(randn(3, 9, 12)).requires_grad_()
    options = {"reduction": reduction, "impl": impl}
    loss = kernel.attg_loss(leaf[:, 1:], *map(on_device, args), **options)
    up = torch.ones_like(loss[:1, :1]).expand_as(loss) if loss.dim() else None
    loss.backward(up, retain_graph=True)
    once = leaf.grad.clone()
    loss.backward(up)
    assert once.any() and not once[:, 0].any() and leaf.grad.equal(2 * once)


@each_impl
def test_loss_under_autocast(impl):
    args = randn(2, 4, 48, seed=1), rand(2, 4, seed=6) < 0.6, rand(2, 4)
    leaf, weight = on_device(randn(2, 4, 8)).requires_grad_(), randn(8, 48)
    with torch.autocast(DEVICE, torch.bfloat16):
        pred = leaf @ on_device(weight)
        loss = kernel.attg_loss(pred, *map(on_device, args), impl=impl)
    loss.backward()
    rows, grad, count = oracle(pred.cpu(), *args)
    assert pred.dtype == torch.bfloat16
    assert close(loss.cpu(), rows.sum() / count, 5e-6)
    check_grad(leaf.grad.cpu(), grad / count @ weight.double().T, 1e-2)


@each_impl
def test_fp16_gradients_do_not_underflow(impl):
    pred, args = randn(2, 49, 48).half(), (randn(2, 49, 48, seed=1), rand(2, 49) < 0.75)
    want = run(pred.float(), *args, upstream=65536.0)[1]
    check_grad(run(pred, *args, upstream=65536.0, impl=impl)[1], want, 1e-3)
    # They would if stored in fp16 before they are scaled. With this upstream gradient
    # the patches seem to be a thousand times as many.
    small = run(pred, *args, upstream=2.0**-10, impl=impl)[1]
    assert not close(small.float() * 2**26, want, 1e-3)


@each_impl
def test_loss_compiles_once_for_all_tau(impl):
    def fn(pred, tau):
        options = {"tau": tau, "patch_size": 4, "impl": impl, "return_mse": True}
        return kernel.attg_loss(pred, *args, **options)

    def results(fn, tau):
        leaf = on_device(randn(2, 9, 48)).requires_grad_()
        loss, mse = fn(leaf, on_device(torch.tensor(tau)))
        loss.backward()
        assert leaf.grad.any() and not mse.requires_grad
        return [x.cpu() for x in (loss, leaf.grad, mse)]

    args = randn(2, 3, 12, 12, seed=1), rand(2, 9) < 0.7, rand(2, 9, seed=3)
    args = [on_device(x) for x in args]
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for i, tau in enumerate((0.75, 0.76, 0.9, 1.0)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = results(compiled, tau)
        pairs = zip(got, results(fn, tau), strict=True)
        assert all(close(a, b, 1e-6) for a, b in pairs)
    torch.compiler.reset()


@each_impl
def test_loss_overflows_as_fp32_does(impl):
    """To inf, and not to NaN, at the same values on both paths."""
    m = torch.tensor([math.inf, 3e38, 100.0, 66.5, 0.0, -64.0, -3e38, -math.inf])
    pred, target = torch.zeros(8, 1, 12), randn(8, 1, 12, seed=1)  # l = 11 / 12
    options = {"normalize_attn": False, "reduction": "none", "impl": impl}
    loss, grad = run(pred, target, None, m[:, None], rand(8, 1), **options)
    want = torch.exp(m.double() / 0.75)[:, None] * oracle(pred, target)[0]
    finite = want < torch.finfo(torch.float32).max
    assert finite.flatten().tolist() == [False] * 3 + [True] * 5
    assert close(loss[finite], want[finite], 1e-5)
    assert (loss[~finite] == math.inf).all() and grad[~finite[:, 0]].isinf().all()
    # Squares that fp32 cannot hold: of the error, and of the target's deviations
    large = torch.tensor([1e30, 1e-3])[:, None, None] * randn(2, 1, 12, seed=2)
    for (y, x), norm_pix in product([(large, target[:2]), (target[:2], large)], (0, 1)):
        kw = {"norm_pix": bool(norm_pix), "reduction": "none"}
        got, want = (
            run(y, x, None, None, rand(2, 1), i, **kw) for i in (impl, "torch")
        )
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-5) and not b.isnan().any()
    assert run(large, target[:2], impl=impl)[0] == math.inf


@pytest.mark.parametrize("L", [9, 600])  # 600: two blocks of a map
@each_impl
def test_a_map_that_is_not_finite(impl, L):
    """The loss is not finite either, as the whole map is normalized; the mse is.

    Only in that image. With an infinite maximum M_norm is 0 elsewhere.
    """
    pred, target = randn(2, L, 4), randn(2, L, 4, seed=1)
    options = {"impl": impl, "reduction": "none", "return_mse": True}
    bad_values = (math.nan, math.inf, -math.inf)
    for place, bad in zip((0, L // 2 + 1, L - 1), bad_values, strict=True):
        attn, mask = rand(2, L), torch.ones(2, L)
        attn[0, place], mask[:, place] = bad, bad == math.inf
        want = oracle(pred, target, mask, attn[1:].expand(2, L))[0]
        plain = oracle(pred, target, mask)[0]
        loss, grad, mse = run(pred, target, mask, attn, rand(2, L) + 1, **options)
        spoilt = mask[0].bool()
        if bad == math.inf:
            want[0] = plain[0]  # weight 1
            spoilt = torch.arange(L) == place
        assert loss[0].isnan().equal(spoilt)
        assert grad[0].isnan().all(dim=1).equal(spoilt)
        assert close(loss[~loss.isnan()], want[~loss.isnan()], 5e-6)
        assert grad[1].isfinite().all() and close(mse, plain, 5e-6)
        assert run(pred, target, mask, attn, impl=impl)[0].isnan()


# -- Errors ----------------------------------------------------------------------------

IMGS, ZEROS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 12)
GOOD = {"pred": ZEROS, "target": ZEROS, "mask": ZEROS[..., 0], "attn": ZEROS[..., 0]}
WRONG = [np.zeros((2, 4)), ZEROS[..., 0].to_sparse(), torch.zeros(2, 4, device="meta")]
WRONG += [torch.zeros(s, dtype=torch.cfloat) for s in ((2, 4), (2, 3), (2, 4, 1))]
GRAD = torch.zeros(2, 4, requires_grad=True)
BAD = {
    "pred": [
        ZEROS[0],
        ZEROS[:, :0],
        ZEROS[..., :0],
        ZEROS.long(),
        np.zeros((2, 4, 12)),
    ],
    "target": [ZEROS[..., :10], ZEROS[:, :3], ZEROS[:1], ZEROS[0], ZEROS.long()],
    "mask": [*WRONG, ZEROS[:, :3, 0]],
    "attn": [*WRONG, ZEROS[:, :3, 0], GRAD, ZEROS[..., 0].long()],
    "tau": [0, -0.5, math.nan, "1", True, None, Fraction(3, 4), 10**400, 1e39, 1e-50],
    "eps": [-1e-6, math.nan, None, 10**400, True],
    "reduction": ["avg", None],
    "impl": ["cuda", None],
}
BAD["target"] += [ZEROS.bool(), ZEROS.clone().requires_grad_(), np.zeros((2, 4, 12))]
BAD["tau"] += [torch.ones(2), torch.tensor(1j), GRAD.sum()]
BAD |= dict.fromkeys(("norm_pix", "normalize_attn", "return_mse"), ["yes", 1, None])
ERRORS = [({name: x}, name) for name, values in BAD.items() for x in values]
ERRORS += [({"target": IMGS, "patch_size": x}, "patch_size") for x in (None, 0, True)]
for shape, p in (((2, 3, 4, 4), 3), ((2, 3, 5, 4), 2), ((2, 3, 4, 6), 2)):
    ERRORS.append(({"target": torch.zeros(shape), "patch_size": p}, "target"))
ERRORS.append(({"pred": ZEROS[..., :1], "target": ZEROS[..., :1]}, "norm_pix"))


@each_impl
@pytest.mark.parametrize("i", range(len(ERRORS)))
def test_loss_errors(i, impl):
    """They name the argument, the value and a remedy."""
    wrong, name = ERRORS[i]
    assert kernel.attg_loss(**GOOD) == 0
    with pytest.raises(ValueError, match=rf"\A{name}: .+; .+") as error:
        kernel.attg_loss(**GOOD | {"impl": impl} | wrong)
    value = wrong.get(name, True)
    if isinstance(value, torch.Tensor):
        names = [str(value.dtype), str(tuple(value.shape)), str(value.device)]
    else:
        names = [type(value).__name__ if isinstance(value, np.ndarray) else repr(value)]
    assert all(text in str(error.value) for text in names)


def test_normalize_map():
    m = torch.zeros(4, 9)
    m[0], m[1], m[3] = rand(9) * 7 - 3, -4.0, 0.3 + 1e-7 * rand(9)
    want = torch.zeros(4, 9)
    want[0] = (m[0] - m[0].min()) / (m[0].max() - m[0].min())
    assert close(kernel.normalize_map(m), want, 1e-6)
    assert not kernel.normalize_map(m)[1:].any()
    edge = torch.ones(2, 9, dtype=torch.float64)
    # Either side of max - min <= 1e-5 max|M|, at any scale and sign
    edge[:, 3] += torch.tensor([0.9e-5, 1.1e-5])
    for scale in (1, -50, 1e-8):
        assert not kernel.normalize_map(edge * scale)[0].any()
        assert kernel.normalize_map(edge * scale)[1].max() == 1
    for bad in (rand(9), rand(2, 3, 4), torch.zeros(2, 9).long()):
        with pytest.raises(ValueError, match="attn"):
            kernel.normalize_map(bad)
