"""
The loss, in PyTorch and by the kernels, against a float64 loop over the paper's equations.

Without a GPU the kernels run in Triton's interpreter.
"""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import attg_mae
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
def arguments(draw, impl, kind):
    """Return [pred, target, mask, attn], options, and whether the map is flat.

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
    # Neighbors differ, so that no patch has a variance near 0.
    target = sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij")) % 2
    target = target + 0.7 * rand(*shape, seed=seed)
    target = pick((150 * target).byte(), (3 * target - 1).to(pick(*floats)))
    pred = randn(B, L, P, seed=seed + 1).to(pick(*floats))
    mask = rand(B, L, seed=seed + 2) < pick(0.6, 0.5, 0.7, 2, -1)  # some, all, none
    mask = pick(mask, mask.float(), mask.long(), mask.to(pred.dtype), None)

    m = rand(B, L, seed=seed + 3)
    flat = torch.tensor([0.3, -9.0])[:B, None].expand(B, L)
    kind_of_map, tiny = pick(*range(8)), 1e-39 * m  # denormal
    maps = [m, m * 40 - 7, flat, flat * (1 + 1e-7 * m), tiny], [m, m.log()], [None]
    maps[1][1][m < 0.4] = -math.inf
    attn = sum(maps, [])[kind_of_map]
    attn = attn if attn is None else attn.to(pick(*floats))
    tau = pick(0.75, 0.25, 100.0)
    tau = pick(tau, torch.tensor(tau), torch.tensor(tau).double())
    options = {"patch_size": p, "normalize_attn": kind_of_map < 5, "tau": tau}
    options |= {"norm_pix": P > 1 and pick(True, False), "eps": pick(1e-6, 0.1, 0.0)}
    layouts = list(LAYOUTS)
    if kind == "groups":  # The values of a row have stride 1.
        layouts = ["contiguous", "slice", "expanded"]
    tensors = [
        x if x is None else LAYOUTS[pick(*layouts)](x)
        for x in (pred, target, mask, attn)
    ]
    return tensors, options, kind_of_map in (2, 3, 4)


def check_loss(pred, target, mask, attn, impl, reduction, return_mse=True, **options):
    """Compare loss, gradient and mse with the loop, and the kernels' error with PyTorch's.

    It is at most twice as large (2.5 times for 16-bit gradients in the interpreter, which
    truncates). The upstream gradient is such that fp16 can hold the gradient.
    """
    rows, grad, count = oracle(pred, target, mask, attn, **options)
    plain = oracle(pred, target, mask, None, **options)[0]
    (B, L, P), count = pred.shape, max(count, 1)
    each = rand(B, L, seed=5).double() + 0.5
    upstream = P * {"mean": count, "sum": 1, "none": each}[reduction]
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
    # In fewer values, cancellation of one prediction and target decides.
    if impl == "triton" and grad.count_nonzero() > 32:
        torchs = run(pred, target, mask, attn, upstream, "torch", **options)
        for x, y, want in zip(got, torchs, (rows, grad, plain), strict=False):
            # PyTorch's sum may be exact by chance.
            eps = torch.finfo(x.dtype).eps * (0.5 if x.dtype.itemsize == 2 else 2)
            assert rms(x - want) <= factor * max(rms(y - want), eps * rms(want))


# -- Properties ------------------------------------------------------------------------


def spoiled(pred, target, mask, attn, bad, options):
    """The tensors with bad values in visible patches."""
    if mask is None:
        return pred, target, mask, attn
    visible, p = mask == 0, options["patch_size"]
    pixels = visible[..., None]
    if p is not None:
        grid = visible.view(len(target), 1, *(side // p for side in target.shape[2:]))
        pixels = grid.repeat_interleave(p, 2).repeat_interleave(p, 3)
    if attn is not None and not options["normalize_attn"]:
        attn = attn.masked_fill(visible, bad)
    pred = pred.masked_fill(visible[..., None], bad)
    bad = bad if target.is_floating_point() else 7
    return pred, target.masked_fill(pixels, bad), mask, attn


@pytest.mark.parametrize("kind", ["patches", "images", "groups"])
@each_impl
@given(data=st.data())
def test_loss_equals_the_equations(impl, kind, data):
    """NaN in visible patches changes no bit; a flat map has the bits of no map."""
    tensors, options, flat = data.draw(arguments(impl, kind))
    if impl == "triton" and kind == "groups" and kernel._has_tuples():
        assert kernel._group(*tensors[:2], options["patch_size"])
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    check_loss(*tensors, impl, reduction, data.draw(st.booleans()), **options)
    if reduction == "none":
        tensors = [x if x is None else x.contiguous() for x in tensors]
        bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        up = rand(*tensors[0].shape[:2]), impl
        options |= {"reduction": "none", "return_mse": True}
        got = run(*spoiled(*tensors, bad, options), *up, **options)
        want = run(*tensors[:3], None if flat else tensors[3], *up, **options)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


# -- Cases that the properties do not reach --------------------------------------------


@each_impl
def test_loss_of_a_small_tau_and_long_maps(impl):
    pred, target, mask = randn(3, 8, 12), randn(3, 8, 12, seed=1), rand(3, 8) < 0.7
    m = rand(3, 8, seed=4)
    check_loss(pred, target, mask, m, impl, "none", tau=0.02)
    args, options = (pred, target, mask, m), {"tau": 0.02, "impl": impl}
    loss, grad = run(*args, **options)
    with_mse = run(*args, **options, return_mse=True)
    assert loss.equal(with_mse[0]) and grad.equal(with_mse[1])  # the same bits
    assert not close(loss, run(*args, tau=0.02002)[0], 5e-6)
    # Several blocks of a map, the maximum in the last
    pred, target, attn = randn(1, 5000, 4), randn(1, 5000, 4, seed=1), rand(1, 5000)
    attn[0, 4900] = 7
    check_loss(pred, target, rand(1, 5000, seed=1) < 0.5, attn, impl, "none")
    # No images, and no map: loss and mse do not share memory.
    loss, grad = run(ZEROS[:0], IMGS[:0], patch_size=2, impl=impl)
    assert loss == 0 and grad.shape == (0, 4, 12)
    options = {"reduction": "none", "return_mse": True, "impl": impl}
    loss, mse = kernel.attg_loss(on_device(pred), on_device(target), **options)
    assert mse.equal(loss) and loss.zero_() is loss and mse.all()


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
    pred = randn(2, 4, 48).bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = run(pred, *args, impl=impl)[0]
    rows, _, count = oracle(pred, *args)
    assert close(loss, rows.sum() / count, 5e-6)


@each_impl
def test_fp16_gradients_do_not_underflow(impl):
    pred, args = randn(2, 49, 48).half(), (randn(2, 49, 48, seed=1), rand(2, 49) < 0.75)
    want = run(pred.float(), *args, upstream=65536.0)[1]
    check_grad(run(pred, *args, upstream=65536.0, impl=impl)[1], want, 1e-3)
    # They would if stored in fp16 before they are scaled: as with this upstream gradient.
    small = run(pred, *args, upstream=2.0**-10, impl=impl)[1]
    assert not close(small.float() * 2**26, want, 1e-3)


@each_impl
def test_loss_compiles_once_for_all_tau(impl):
    mask = (rand(2, 9) < 0.7).float()
    args = [
        on_device(x) for x in (randn(2, 3, 12, 12, seed=1), mask, rand(2, 9, seed=3))
    ]
    options = {"patch_size": 4, "impl": impl, "return_mse": True}

    def results(loss, tau):
        leaf = on_device(randn(2, 9, 48)).requires_grad_()
        loss, mse = loss(leaf, *args, tau=on_device(torch.tensor(tau)), **options)
        loss.backward()
        assert leaf.grad.any() and not mse.requires_grad
        return [x.cpu() for x in (loss, leaf.grad, mse)]

    torch.compiler.reset()
    compiled = torch.compile(kernel.attg_loss, fullgraph=True, backend="aot_eager")
    for i, tau in enumerate((0.75, 0.76, 0.9)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = results(compiled, tau)
        want = results(kernel.attg_loss, tau)
        assert all(close(a, b, 1e-6) for a, b in zip(got, want, strict=True))
    torch.compiler.reset()


@each_impl
def test_loss_overflows_as_fp32_does(impl):
    """To inf, and not to NaN."""
    m = torch.tensor([math.inf, 3e38, 100.0, 66.5, 0.0, -64.0, -3e38, -math.inf])
    pred, target = torch.zeros(8, 1, 12), randn(8, 1, 12, seed=1)  # l = 11 / 12
    options = {"normalize_attn": False, "reduction": "none", "impl": impl}
    loss, grad = run(pred, target, None, m[:, None], rand(8, 1), **options)
    want = torch.exp(m.double() / 0.75)[:, None] * oracle(pred, target)[0]
    finite = (want < 3e38).flatten()
    assert finite.tolist() == [False] * 3 + [True] * 5
    assert close(loss[finite], want[finite], 1e-5)
    assert loss[~finite].isinf().all() and grad[~finite].isinf().all()


@pytest.mark.parametrize("L", [9, 600])  # 600: two blocks of a map
@each_impl
def test_a_map_that_is_not_finite(impl, L):
    """The loss of its image is NaN, as the whole map is normalized; the mse is not.

    With an infinite maximum M_norm is 0 elsewhere.
    """
    pred, target = randn(2, L, 4), randn(2, L, 4, seed=1)
    options = {"impl": impl, "reduction": "none", "return_mse": True}
    for place, bad in ((0, math.nan), (L // 2 + 1, math.inf), (L - 1, -math.inf)):
        attn, mask = rand(2, L), torch.ones(2, L)
        attn[0, place], mask[:, place] = bad, bad == math.inf
        want = oracle(pred, target, mask, attn[1:].expand(2, L))[0]
        plain = oracle(pred, target, mask)[0]
        loss, grad, mse = run(pred, target, mask, attn, rand(2, L) + 1, **options)
        spoilt = mask[0].bool()
        if bad == math.inf:
            want[0], spoilt = plain[0], torch.arange(L) == place  # weight 1
        assert loss[0].isnan().equal(spoilt)
        assert grad[0].isnan().all(dim=1).equal(spoilt)
        assert close(loss[~loss.isnan()], want[~loss.isnan()], 5e-6)
        assert grad[1].isfinite().all() and close(mse, plain, 5e-6)


# -- Errors ----------------------------------------------------------------------------

IMGS, ZEROS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 12)
ROWS, GRAD = ZEROS[..., 0], torch.zeros(2, 4, requires_grad=True)
GOOD = {"pred": ZEROS, "target": ZEROS, "mask": ROWS, "attn": ROWS}
WRONG = [np.zeros((2, 4)), ROWS.to("meta"), ROWS[:, :3], ZEROS[..., :1]]
BAD = {
    "pred": [ZEROS[0], ZEROS[:, :0], ZEROS[..., :0], ZEROS.long(), ZEROS.numpy()],
    "target": [ZEROS[..., :10], ZEROS[:1], ZEROS.long(), ZEROS + GRAD[..., None]],
    "mask": [*WRONG, GRAD, ROWS + 0.5, ROWS.long() + 2, ROWS + math.nan],
    "attn": [*WRONG, GRAD, ROWS.long(), ROWS.to(torch.float8_e4m3fn)],
    "tau": [0, -0.5, math.nan, "1", None, 1e39, 1e-50, ZEROS, GRAD.sum()],
    "eps": [-1e-6, math.nan, None],
    "reduction": ["avg", None],
    "impl": ["cuda", None],
}
ERRORS = [({name: x}, name) for name, values in BAD.items() for x in values]
ERRORS += [({"target": IMGS, "patch_size": x}, "patch_size") for x in (None, 0)]
for x, p in ((IMGS, 3), (IMGS[:, :, 1:], 2), (IMGS[..., :2], 2)):
    ERRORS.append(({"target": x, "patch_size": p}, "target"))
ERRORS.append(({"pred": ZEROS[..., :1], "target": ZEROS[..., :1]}, "norm_pix"))


@each_impl
@pytest.mark.parametrize("i", range(len(ERRORS)))
def test_loss_errors(i, impl):
    """They name the argument, the value and a remedy."""
    wrong, name = ERRORS[i]
    assert kernel.attg_loss(**GOOD) == 0
    value = wrong.get(name, True)
    got = "array(" if isinstance(value, np.ndarray) else repr(value)[:60]
    if isinstance(value, torch.Tensor):
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
    with pytest.raises(
        ValueError, match=rf"(?s)\A{name}: got .*{re.escape(got)}.*; .+"
    ):
        kernel.attg_loss(**GOOD | {"impl": impl} | wrong)


def test_a_mask_is_not_read_on_a_gpu_in_a_transform_or_a_trace():
    assert kernel._holds(SimpleNamespace(device=torch.device("cuda")), None)
    imgs, mask, attn = randn(3, 3, 4, 4, seed=1), rand(3, 4) < 0.6, rand(3, 4, seed=2)
    args = randn(3, 4, 12), imgs, mask.float(), attn

    def each(*args):
        return kernel.attg_loss(*(x[None] for x in args), patch_size=2)

    want = torch.stack([each(*x) for x in zip(*args, strict=True)])
    assert close(torch.vmap(each)(*args), want, 1e-6) and want.std() > 0.01
    for mode in ("real", "fake"):
        graph = make_fx(torch.vmap(each), tracing_mode=mode)(*args)
        assert graph(*args).equal(torch.vmap(each)(*args))


def test_normalize_map_on_either_side_of_flat():
    """max - min <= 1e-5 max|M|, at any scale and sign."""
    edge = torch.ones(2, 9, dtype=torch.float64)
    edge[:, 3] += torch.tensor([0.9e-5, 1.1e-5])
    for scale in (1, -50, 1e-8):
        assert kernel.normalize_map(edge * scale).amax(1).tolist() == [0, 1]
    for bad in (rand(9), rand(2, 3, 4), torch.zeros(2, 9).long()):
        with pytest.raises(ValueError, match="attn"):
            kernel.normalize_map(bad)


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
)
def test_crop_map_is_that_of_training(seed, size, grid):
    torch.manual_seed(seed)
    maps, flips = torch.rand(8, *size), torch.rand(8) < 0.5
    corner, end = torch.rand(2, 8, 2).sort(0).values
    boxes = torch.cat([corner, end + 0.01], 1).clamp(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.pool_maps(maps, boxes, flips, grid)
    want = attg_mae.pool_maps(maps, boxes, flips, grid)
    # Rounding decides how many samples torchvision takes of a patch of 2 or 3 cells.
    cells = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor(size[::-1])
    steps = cells / torch.tensor(grid[::-1])
    sure = ((steps - steps.round()).abs() > 1e-4).all(1)
    torch.testing.assert_close(got[sure], want[sure], atol=1e-5, rtol=0)
    torch.testing.assert_close(got, want, atol=0.3, rtol=0)


BOX = torch.tensor([0.0, 0.1, 1.0, 0.7])
WRONG_BOXES = 224 * BOX, BOX - 0.2, BOX + 0.4, BOX[[2, 1, 0, 3]], BOX[[0, 3, 2, 1]]
WRONG_BOXES = [torch.stack([BOX, x]) for x in (*WRONG_BOXES, BOX * math.nan)]


def test_crop_map_errors():
    maps, boxes = rand(2, 6, 6), BOX.repeat(2, 1)
    good = {"maps": maps, "boxes": boxes, "flips": None, "grid": (3, 3)}
    bad = {"maps": [maps[:, None], maps.flatten(1), (255 * maps).byte()]}
    bad["boxes"] = [boxes[:1], boxes[:, :3], *WRONG_BOXES]
    bad["flips"] = [torch.zeros(2, 1) > 0, torch.zeros(2)]
    for name, values in bad.items():
        for wrong in values:
            with pytest.raises(ValueError, match=f"{name}: got .*; pass "):
                kernel.pool_maps(**good | {name: wrong})
    rounded = kernel.pool_maps(**good | {"boxes": boxes.bfloat16()})
    assert close(rounded, kernel.pool_maps(**good), 0.02)
    assert kernel.pool_maps(maps[:0], boxes[:0], None, (3, 3)).shape == (0, 9)


@each_impl
def test_boxes_that_are_not_read_make_the_loss_nan(impl):
    """In a graph, as on a GPU, and for their images only."""
    torch.compiler.reset()
    crop = torch.compile(kernel.pool_maps, backend="eager", fullgraph=True)
    maps, args = rand(2, 6, 6), (randn(2, 9, 12), randn(2, 9, 12, seed=1), None)
    options = {"normalize_attn": False, "reduction": "none", "impl": impl}
    want = kernel.pool_maps(maps, BOX.repeat(2, 1), None, (3, 3))
    for boxes in WRONG_BOXES:
        attn = crop(maps, boxes, None, (3, 3))
        assert close(attn[0], want[0], 1e-5) and attn[1].isnan().all()
        loss, grad = run(*args, attn, torch.ones(2, 9), **options)
        assert loss.isnan().equal(attn.isnan()) and grad[1].isnan().all()
    torch.compiler.reset()
