"""
The loss, in PyTorch and as a kernel, against float64 loops over the paper's equations.
"""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from tests.helpers import (
    DEVICE,
    DIMS,
    GRAD_TOL,
    IMPLS,
    REDUCTIONS,
    check_grad,
    check_loss,
    close,
    kernel,
    on_device,
    oracle,
    rand,
    randn,
    run,
)


@pytest.mark.parametrize("dtype", GRAD_TOL, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_loss_shapes_and_masks(dims, dtype):
    B, L, P = dims
    pred = randn(*dims, dtype=dtype)
    target = randn(*dims, seed=1, dtype=dtype) * 2 + 1
    attn = rand(B, L).to(dtype)
    some, single = rand(B, L, seed=3) < 0.6, torch.zeros(B, L)
    single[-1, L // 2] = 1
    for mask in (
        None,
        some,
        some.float(),
        some.long(),
        some.to(dtype),
        0 * single,
        torch.ones(B, L).bool(),
        single,
    ):
        for norm_pix in (True, False)[P == 1 :]:
            check_loss(pred, target, mask, attn, norm_pix=norm_pix)
            check_loss(pred, target, mask, None, norm_pix=norm_pix)


def test_loss_is_float64_for_float64_pred_with_any_map():
    pred, target, attn = randn(3, 8, 12).double(), randn(3, 8, 12, seed=1), rand(3, 8)
    check_loss(pred, target, None, attn)
    assert not close(
        run(pred.float(), target, None, attn)[0],
        oracle(pred, target, None, attn)[0].mean(),
        1e-12,
    )


@pytest.mark.parametrize("tau", [0.02, 0.25, 1, 100.0])
@pytest.mark.parametrize("kind", ["random", "unscaled", "flat", "noise", "-inf"])
@pytest.mark.parametrize("impl", IMPLS)
def test_loss_maps_and_tau(impl, kind, tau):
    pred = randn(3, 8, 12)
    target = randn(3, 8, 12, seed=1)
    mask = rand(3, 8, seed=2) < 0.7
    m = rand(3, 8, seed=4)
    attn = {
        "random": m,
        "unscaled": m * 40 - 7,
        "flat": torch.tensor([0.3, 0.0, 0.9])[:, None].expand(3, 8),
        "noise": 0.3 + 1e-7 * m,
        "-inf": m.masked_fill(m < 0.4, -math.inf),
    }[kind]
    for t in (
        float(tau),
        torch.tensor(float(tau)),
        torch.tensor(float(tau), dtype=torch.float64),
    ):
        for normalize in {"-inf": (False,), "unscaled": (True,)}.get(
            kind, (False, True)
        ):
            if impl == "triton":
                y = pred.half() if tau >= 0.25 and isinstance(t, float) else pred
                check_loss(
                    y,
                    target,
                    mask,
                    attn,
                    tau=t,
                    normalize_attn=normalize,
                    impl=impl,
                    reductions=["none"],
                )
                continue
            check_loss(pred, target, mask, attn, tau=t, normalize_attn=normalize)
            check_loss(
                pred.double(),
                target,
                mask,
                attn.double(),
                tau=float(t),
                normalize_attn=normalize,
            )
    got = run(pred, target, mask, m, tau=tau, impl=impl)[0]
    assert tau > 1 or not close(
        got, oracle(pred, target, mask, m, tau * 1.001)[0].sum() / mask.sum(), 5e-6
    )


@pytest.mark.parametrize("chans", [1, 3, 4])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_loss_images(impl, grid, chans, dtype):
    kw = dict(impl=impl, reductions=["none"] if impl == "triton" else REDUCTIONS)
    (gh, gw), L = grid, grid[0] * grid[1]
    imgs = (rand(2, chans, gh * 4, gw * 4) * 255).to(dtype)
    pred = randn(2, L, 16 * chans, seed=1)
    mask = rand(2, L, seed=2) < 0.7
    attn = rand(2, L, seed=3)
    layouts = [
        imgs,
        imgs.to(memory_format=torch.channels_last),
        imgs[:1].expand_as(imgs),
        imgs.mT.contiguous().mT,
    ]
    for i, x in enumerate(layouts):
        both = (True, False)
        # In the interpreter every other layout with each, turned about with the grid.
        if impl == "triton":
            both = ((i + gh) % 2 == 0,)
        for norm_pix in both:
            check_loss(pred, x, mask, attn, norm_pix=norm_pix, patch_size=4, **kw)
    check_loss(pred, (rand(2, L, 16 * chans) * 255).to(dtype), mask, attn, **kw)
    # Another order of pixels is seen
    turned = run(pred, imgs.mT.contiguous(), mask, attn, impl=impl, patch_size=4)[1]
    assert not close(
        turned, run(pred, imgs, mask, attn, impl=impl, patch_size=4)[1], 1e-2
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_strides_gathered_rows_and_two_backward_passes(impl):
    full = randn(3, 9, 12)
    target = randn(3, 8, 12, seed=1)
    mask = rand(3, 8, seed=2) < 0.6
    attn = rand(3, 8, seed=3)
    check_loss(full[:, 1:], target, mask, attn, impl)  # what MAE hands over
    check_loss(randn(3, 12, 8).mT, target.mT.contiguous().mT, mask, attn, impl)
    check_loss(
        randn(3, 16, 24)[:, ::2, ::2],
        target,
        mask.t().contiguous().t(),
        attn.t().contiguous().t(),
        impl,
    )
    check_loss(
        randn(1, 1, 12).expand(3, 8, 12),
        target[:, :1].expand(3, 8, 12),
        mask,
        attn[:1].expand(3, 8),
        impl,
    )
    take = partial(torch.take_along_dim, dim=1)
    # Codes without mask gather the masked rows
    ids = torch.tensor([[0, 2, 5], [1, 2, 3], [7, 4, 0]])
    some = torch.zeros(3, 8).scatter(1, ids, 1.0)
    pred, x = (take(t, ids[..., None]) for t in (full[:, 1:], target))
    want = run(full[:, 1:], target, some, attn, impl=impl)[0]
    assert close(
        run(
            pred,
            x,
            None,
            take(kernel.normalize_map(attn), ids),
            impl=impl,
            normalize_attn=False,
        )[0],
        want,
        1e-6,
    )
    gathered = run(pred, x, None, take(attn, ids), impl=impl)[0]
    assert not close(gathered, want, 1e-2)  # min-max over the gathered patches is wrong
    for reduction, up in (
        ("mean", None),
        ("sum", None),
        ("none", torch.ones(()).expand(3, 8)),
        ("none", rand(3, 8)),
    ):
        leaf, *args, up = (
            on_device(x) if impl == "triton" else x
            for x in (full, target, mask, attn, up)
        )
        leaf = leaf.clone().requires_grad_()
        out = kernel.attg_loss(leaf[:, 1:], *args, reduction=reduction, impl=impl)
        out.backward(up, retain_graph=True)
        once = leaf.grad.clone()
        out.backward(up)
        assert once.any() and not once[:, 0].any() and leaf.grad.equal(2 * once)
    check_grad(
        once[:, 1:].cpu(),
        oracle(full[:, 1:], target, mask, attn)[1] * up.cpu()[..., None],
        5e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_loss_has_the_same_bits_without_map_and_with_a_flat_one(impl, dtype):
    pred = randn(3, 8, 48, dtype=dtype)
    target = randn(3, 8, 48, seed=1)
    mask = rand(3, 8, seed=2) < 0.7
    flat = torch.tensor([0.3, 0.0, -5.0])[:, None].expand(3, 8)
    for reduction, up in (("mean", 1.0), ("sum", 1.0), ("none", rand(3, 8))):
        want = run(pred, target, mask, None, up, impl=impl, reduction=reduction)
        for attn in (flat, flat * (1 + 1e-7 * rand(3, 8)), flat.half()):
            got = run(
                pred, target, mask, attn, up, impl=impl, reduction=reduction, tau=0.02
            )
            assert got[0].equal(want[0]) and got[1].equal(want[1])
        assert not run(
            pred, target, mask, rand(3, 8), up, impl=impl, reduction=reduction
        )[0].equal(want[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_loss_ignores_what_stands_in_visible_patches(impl, bad, dtype):
    pred = randn(2, 9, 48, dtype=dtype)
    imgs = randn(2, 3, 12, 12, seed=1)
    attn = rand(2, 9, seed=3)
    mask = rand(2, 9, seed=2) < 0.6
    dirty = pred.masked_fill(~mask[..., None], bad)
    dirty_attn = attn.masked_fill(~mask, bad)
    hidden = mask.reshape(2, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    dirty_imgs = imgs.masked_fill(~hidden, bad)
    for m in (mask, mask.float())[impl == "triton" :]:
        for reduction, up in (("mean", 1.0), ("none", rand(2, 9))):
            for norm_pix in (True, False):
                kw = dict(
                    upstream=up, reduction=reduction, patch_size=4, norm_pix=norm_pix
                )
                kw |= dict(normalize_attn=False, impl=impl)
                want = run(pred, imgs, m, attn, **kw)
                for x, y, a in (
                    (dirty, dirty_imgs, attn),
                    (dirty, imgs, dirty_attn),
                    (pred, dirty_imgs, attn),
                ):
                    got = run(x, y, m, a, **kw)
                    assert got[0].equal(want[0])
                    assert got[1].equal(want[1])
                    assert not got[1][~mask].any()
    dirty[mask] = bad
    # In a masked patch it is not hidden
    assert not run(dirty, imgs, mask, attn, impl=impl, patch_size=4)[0].isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_mse_of_the_same_pass(impl):
    """It is the loss with weight 1, detached, and costs the loss no bit."""
    pred, imgs = randn(2, 9, 48), rand(2, 3, 12, 12)
    mask = rand(2, 9, seed=2) < 0.6
    log_weight = rand(2, 9, seed=3).masked_fill(rand(2, 9, seed=4) < 0.3, -math.inf)
    options = {"tau": 1.0, "patch_size": 4, "normalize_attn": False, "impl": impl}

    def both(pred, imgs, mask, attn, reduction, compile=False):
        fn = kernel.attg_loss
        if compile:
            fn = torch.compile(fn, fullgraph=True, backend="aot_eager")
        kw = options | {"reduction": reduction, "return_mse": True}
        return fn(pred, imgs, mask, attn, **kw)

    for m in (mask, None, torch.zeros(2, 9)):
        for reduction in REDUCTIONS:
            rows = oracle(pred, imgs, m, patch_size=4)[0]
            count = 2 * 9 if m is None else max(m.sum().item(), 1)
            want = {"mean": rows.sum() / count, "sum": rows.sum(), "none": rows}
            want = want[reduction]
            up = torch.ones(want.shape)
            kw = options | {"reduction": reduction}
            one = run(pred, imgs, m, log_weight, up, **kw)
            for compile in (False, reduction == "mean"):
                args = (on_device(x) for x in (imgs, m, log_weight))
                leaf = on_device(pred).requires_grad_()
                loss, mse = both(leaf, *args, reduction, compile)
                loss.sum().backward()
                assert close(mse.cpu(), want, 1e-6) and not mse.requires_grad
                assert loss.detach().cpu().equal(one[0])
                assert leaf.grad.cpu().equal(one[1])


def test_loss_gradcheck():
    def zero(x):
        return x.detach() + 0 * x

    def shifted(x):
        return x.detach() + (x - x.detach()).roll(1, 1)

    pred = randn(2, 4, 5).double().requires_grad_()
    target = randn(2, 4, 5, seed=1).double()
    for reduction in ("mean", "sum", "none"):
        fn = partial(
            kernel.attg_loss,
            target=target,
            mask=rand(2, 4) < 0.6,
            attn=rand(2, 4).double(),
            reduction=reduction,
        )
        for change, good in ((torch.clone, True), (zero, False), (shifted, False)):
            check = partial(
                torch.autograd.gradcheck, atol=1e-8, rtol=1e-6, raise_exception=False
            )
            assert check(lambda x, fn=fn, change=change: fn(change(x)), pred) == good


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_autocast_and_fp16_scale(impl):
    args = (
        randn(2, 4, 48),
        randn(2, 4, 48, seed=1),
        rand(2, 4, seed=6) < 0.6,
        rand(2, 4),
    )
    want, weight = run(*args, impl=impl), randn(8, 48)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cuda", torch.bfloat16, enabled=DEVICE == "cuda"),
    ):
        got = run(*args, impl=impl)
        leaf, *moved = (
            on_device(x) if impl == "triton" else x
            for x in (randn(2, 4, 8), weight, *args[1:])
        )
        out = leaf.requires_grad_() @ moved[0]
        loss = kernel.attg_loss(out, *moved[1:], impl=impl)
    assert out.dtype == torch.bfloat16 and close(got[0], want[0], 1e-6)
    check_grad(got[1], want[1], 1e-6)
    loss.backward()
    rows, grad, count = oracle(out.cpu(), *args[1:])
    assert close(loss.cpu(), rows.sum() / count, 5e-6)
    check_grad(leaf.grad.cpu(), grad / count @ weight.double().T, 1e-2)
    pred, *args = (
        randn(2, 49, 48).half(),
        randn(2, 49, 48, seed=1),
        rand(2, 49) < 0.75,
        rand(2, 49),
    )
    want = run(pred.float(), *args, upstream=65536.0)[1]
    check_grad(run(pred, *args, upstream=65536.0, impl=impl)[1], want, 1e-3)
    # As with a thousand times the patches
    small = run(pred, *args, upstream=2.0**-10, impl=impl)[1]
    # Scaled after storing: underflow
    assert not close(small.float() * 2**26, want, 1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_compiles_once_for_all_tau(impl):
    def fn(pred, imgs, mask, attn, tau):
        return (
            kernel.attg_loss(pred, imgs, mask, attn, tau=tau, patch_size=4, impl=impl)
            * 100
        )

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    to = on_device if impl == "triton" else torch.clone
    args = [
        to(x)
        for x in (
            randn(2, 3, 12, 12, seed=1),
            rand(2, 9, seed=2) < 0.7,
            rand(2, 9, seed=3),
        )
    ]

    def compare(tau):
        a, b = (to(randn(2, 9, 48)).requires_grad_() for _ in range(2))
        got, want = compiled(a, *args, tau), fn(b, *args, tau)
        (got + want).backward()
        assert close(got.cpu(), want.cpu(), 1e-6)
        check_grad(a.grad.cpu(), b.grad.cpu(), 1e-6)

    compare(to(torch.tensor(0.75)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tau in (0.76, 0.9, 1.0):
            compare(to(torch.tensor(tau)))
    if impl == "triton":  # what a float costs
        compare(0.8)
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            pytest.raises(RuntimeError, match="recompil"),
        ):
            compare(0.81)
    torch.compiler.reset()


IMGS, COMPLEX = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, dtype=torch.complex64)


ERRORS = [  # the argument, its value, what the text names beside the argument
    ("pred", torch.zeros(2, 4), "2, 4"),
    ("pred", torch.zeros(2, 4, 12).long(), "int64"),
    ("target", torch.zeros(2, 4, 10), "2, 4, 10"),
    ("target", torch.zeros(2, 5, 12), "2, 5, 12"),
    ("target", torch.zeros(1, 4, 12), "1, 4, 12"),
    ("target", torch.zeros(4, 12), "4, 12"),
    ("target", torch.zeros(2, 4, 12).long(), "int64"),
    ("target", torch.zeros(2, 4, 12).bool(), "bool"),
    ("target", torch.zeros(2, 4, 12, requires_grad=True), "grad"),
    ("attn", torch.zeros(2, 4, requires_grad=True), "grad"),
    ("mask", COMPLEX, "complex"),
    ("mask", torch.zeros(2, 3), "2, 3"),
    ("mask", torch.zeros(2, 4, 1), "2, 4, 1"),
    ("attn", COMPLEX, "complex"),
    ("attn", torch.zeros(2, 3), "2, 3"),
    ("attn", torch.zeros(2, 2, 2), "2, 2, 2"),
    ("tau", 0, "0"),
    ("tau", -0.5, "-0.5"),
    ("tau", math.nan, "nan"),
    ("tau", "1", "1"),
    ("tau", True, "True"),
    ("tau", None, "None"),
    ("tau", torch.ones(2), "2"),
    ("tau", torch.ones((), requires_grad=True), "grad"),
    ("eps", -1e-6, "-1e-06"),
    ("eps", math.nan, "nan"),
    ("pred", torch.zeros(2, 0, 12), "2, 0, 12"),
    ("pred", torch.zeros(2, 4, 0), "2, 4, 0"),
    ("reduction", "avg", "avg"),
    ("impl", "cuda", "cuda"),
    ("tau", Fraction(3, 4), "Fraction"),
    ("tau", 10**400, "1000"),
    ("tau", 1e39, "1e+39"),
    ("tau", 1e-50, "1e-50"),
    ("tau", torch.tensor(1j), "complex"),
    ("eps", None, "None"),
    ("eps", 10**400, "1000"),
    ("eps", True, "True"),
    ("normalize_attn", 1, "1"),
    ("norm_pix", "yes", "yes"),
    ("pred", np.zeros((2, 4, 12)), "ndarray"),
    ("target", np.zeros((2, 4, 12)), "ndarray"),
    ("mask", np.zeros((2, 4)), "ndarray"),
    ("attn", np.zeros((2, 4)), "ndarray"),
    ("mask", torch.zeros(2, 4).to_sparse(), "sparse"),
    ("patch_size", None, "None", {"target": IMGS}),
    ("patch_size", 0, "0", {"target": IMGS}),
    ("target", IMGS, "3", {"patch_size": 3}),
    ("target", torch.zeros(2, 3, 5, 4), "5", {"patch_size": 2}),
    ("target", torch.zeros(2, 3, 4, 6), "2, 3, 4, 6", {"patch_size": 2}),
    ("target", torch.zeros(2, 1, 4, 4), "2, 1, 4, 4", {"patch_size": 2}),
    (
        "norm_pix",
        True,
        "1",
        {"pred": torch.zeros(2, 4, 1), "target": torch.zeros(2, 4, 1)},
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{case[0]}-{case[2]}")
def test_loss_errors(case):
    name, value, says, *more = case
    good = dict(
        pred=torch.zeros(2, 4, 12),
        target=torch.zeros(2, 4, 12),
        mask=torch.zeros(2, 4),
        attn=torch.zeros(2, 4),
    )
    assert kernel.attg_loss(**good) == 0
    texts = []
    for impl in IMPLS:
        bad = good | {"impl": impl} | {name: value} | (more[0] if more else {})
        with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
            kernel.attg_loss(**bad)
        texts.append(str(error.value))
    # Room for a remedy
    assert says in texts[0] and len(texts[0].split()) >= 6
    assert texts[0] == texts[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_overflows_as_fp32_does(impl):
    """To inf, and not to NaN, at the same values on both paths."""
    m = torch.tensor([math.inf, 3e38, 100.0, 66.5, 0.0, -64.0, -3e38, -math.inf])
    pred, target = torch.zeros(8, 1, 12), randn(8, 1, 12, seed=1)  # l = 11 / 12
    options = {"normalize_attn": False, "reduction": "none"}
    loss, grad = run(pred, target, None, m[:, None], rand(8, 1), impl=impl, **options)
    rows, _, _ = oracle(pred, target)
    want = torch.exp(m.double() / 0.75)[:, None] * rows
    finite = want < torch.finfo(torch.float32).max
    assert finite.flatten().tolist() == [False] * 3 + [True] * 5
    assert close(loss[finite], want[finite], 1e-5)
    assert (loss[~finite] == math.inf).all() and grad[~finite[:, 0]].isinf().all()
    # Squares that fp32 cannot hold: of the error, and of the target's deviations
    large = torch.tensor([1e30, 1e-3])[:, None, None] * randn(2, 1, 12, seed=2)
    for y, x in ((large, target[:2]), (target[:2], large)):
        for norm_pix in (True, False):
            kw = {"norm_pix": norm_pix, "reduction": "none"}
            got, want = (
                run(y, x, None, None, rand(2, 1), impl=i, **kw) for i in (impl, "torch")
            )
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, rtol=1e-5) and not b.isnan().any()
    assert run(large, target[:2], impl=impl)[0] == math.inf


@pytest.mark.parametrize("L", [9, 600])
@pytest.mark.parametrize("impl", IMPLS)
def test_loss_knows_the_whole_map(impl, L):
    """NaN in a patch that is not in the loss makes every weight of its image NaN.

    Of the loss and of the gradient, wherever it stands; not of other images. The kernel
    reads a map of 600 in two pieces.
    """
    pred, target = randn(2, L, 4), randn(2, L, 4, seed=1)
    for place in (0, 4, L // 2 + 1, L - 1):
        attn, mask = rand(2, L), torch.ones(2, L)
        attn[0, place], mask[:, place] = math.nan, 0
        options = {"impl": impl, "reduction": "none"}
        rows, grad = run(pred, target, mask, attn, rand(2, L) + 1, **options)
        assert rows[0].isnan().tolist() == mask[0].bool().tolist()
        assert grad[0].isnan().all(1).tolist() == mask[0].bool().tolist()
        assert rows[1].isfinite().all() and rows[1].count_nonzero() == L - 1
        assert grad[1].isfinite().all()
        assert not rows[:, place].any() and not grad[:, place].any()
        options |= {"reduction": "mean"}
        assert run(pred, target, mask, attn, **options)[0].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_edges(impl):
    pred, target, mask = randn(2, 4, 12), randn(2, 4, 12, seed=1), torch.ones(2, 4)
    # A map that is not finite makes a loss that is not: where M_norm has no value. Below
    # an infinite maximum it is 0.
    everywhere = [True] * 4
    for bad, spoilt in (
        (math.inf, [False, False, True, False]),
        (-math.inf, everywhere),
        (math.nan, everywhere),
    ):
        attn = rand(2, 4)
        want = oracle(pred, target, mask, attn)[0]
        want[0] = oracle(pred, target, mask)[0][0]  # weight 1
        attn[0, 2] = bad
        rows = run(pred, target, mask, attn, rand(2, 4), reduction="none", impl=impl)[0]
        assert rows[0].isnan().tolist() == spoilt
        assert close(rows[~rows.isnan()], want[~rows.isnan()], 5e-6)
    for shape in ((0, 4, 12), (0, 3, 4, 4)):
        loss, grad = run(
            pred[:0], torch.zeros(shape), mask[:0], rand(0, 4), impl=impl, patch_size=2
        )
        assert loss == 0 and grad.shape == (0, 4, 12)
    assert (
        run(pred, target, mask, tau=np.float32(0.75), impl=impl)[0]
        == run(pred, target, mask, impl=impl)[0]
    )
    many = (
        randn(1, 5000, 4),
        randn(1, 5000, 4, seed=1),
        rand(1, 5000) < 0.5,
        rand(1, 5000, seed=1),
    )
    many[3][0, 4900] = 7  # the maximum of a long map
    check_loss(*many, impl=impl, reductions=["none"])


def test_normalize_map():
    m = torch.stack(
        [rand(9) * 7 - 3, torch.full((9,), -4.0), torch.zeros(9), 0.3 + 1e-7 * rand(9)]
    )
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
    for bad in (rand(9), rand(2, 3, 4)):
        with pytest.raises(ValueError, match="attn"):
            kernel.normalize_map(bad)
