"""
Shared by several test files: random tensors and their comparison, reference models, small
data sets and runs on them. Every tolerance is shown to reject a fault.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import attg_mae
from attg.datasets import open_data
from attg.features import FEATURES, SOURCE
from attg.maps import save_maps
from attg.weights import join_qkv, to_mae_name

ROOT = Path(attg_mae.__file__).parent
# The package re-exports a function of the same name.
kernel = importlib.import_module("attg.kernels.attg_loss")
DEVICE = "cpu" if kernel.INTERPRETED else "cuda"  # of the kernel
IMPLS = ("torch", "triton")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def transformers():
    """Import transformers, or skip the test: it would import our folder kernels/."""
    with contextlib.suppress(PackageNotFoundError):
        pytest.skip(f"package kernels {version('kernels')} is hidden by our folder")
    return pytest.importorskip("transformers")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x):
    return x.double().square().mean().sqrt().item()


def close(a, ref, tol):
    """RMS(err) <= tol RMS(ref), and no entry further off than 10 tol max|ref|.

    NaN is never close.
    """
    a, ref = (torch.as_tensor(x).detach().double() for x in (a, ref))
    err = a - ref if a.shape == ref.shape else torch.tensor(math.nan)
    every = err.abs().max() <= 10 * tol * ref.abs().max()
    return bool(every and rms(err) <= tol * rms(ref))


def check_grad(grad, ref, tol):
    """Compare grad with ref to tol, which must be tight enough to reject faults.

    The faults are a zero gradient and one whose rows are shifted by one.
    """
    width = ref.shape[-1] if ref.dim() > 1 else 1
    grad = grad.detach().double().reshape(-1, width)
    ref = ref.detach().double().reshape(-1, width)
    assert close(grad, ref, tol), f"RMS {rms(grad - ref):.2e} of {rms(ref):.2e}"
    shifted = ref.roll(1, 0 if len(ref) > 1 else 1)
    assert not ref.any() or not close(torch.zeros_like(ref), ref, tol)
    assert shifted.equal(ref) or not close(shifted, ref, tol)


def oracle(pred, target, mask=None, attn=None, tau=0.75, **options):
    """mask * w * l (B, L), its gradient (B, L, P) and sum(mask), in float64.

    options: norm_pix, eps, patch_size and normalize_attn of attg_loss.
    """
    y, x = pred.detach().double(), target.double()
    if target.dtype == torch.uint8:
        x = x / 255
    if x.dim() == 4:
        p, (B, C, H, W) = options["patch_size"], x.shape
        x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(y.shape)
    if options.get("norm_pix", True):
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        x = (x - mean) / (variance + options.get("eps", 1e-6)).sqrt()
    hidden = torch.ones(y.shape[:2]) if mask is None else mask != 0
    w = hidden.double()
    if attn is not None:
        m = attn.double()
        if options.get("normalize_attn", True):
            low, high = m.aminmax(dim=1, keepdim=True)
            limit = (1e-5 * m.abs().amax(1, keepdim=True)).clamp(min=1e-30)
            flat = high - low <= limit
            m = torch.where(flat, 0.0, (m - low) / (high - low))
        w = torch.where(hidden.bool(), torch.exp(m / float(tau)), 0.0)
    rows = w * (y - x).square().mean(-1)
    return rows, (2 * w / y.shape[2])[..., None] * (y - x), int(hidden.sum())


def on_device(x):
    """Copy to the kernel's device with the same strides, gaps and overlaps."""
    if not isinstance(x, torch.Tensor):
        return x
    size = x.untyped_storage().nbytes() // x.element_size()
    flat = x.as_strided((size,), (1,), 0).to(DEVICE, copy=True)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def run(pred, target, mask=None, attn=None, upstream=1.0, impl="torch", **kw):
    """Loss, gradient for pred and, with return_mse, the mse.

    Checks their dtypes, and that inputs are unchanged.
    """
    inputs = [pred.detach(), target, mask, attn, upstream, kw.pop("tau", 0.75)]
    inputs = [on_device(x) for x in inputs]
    before = [x.clone() for x in inputs if isinstance(x, torch.Tensor)]
    leaf, x, m, a, up, tau = inputs
    leaf.requires_grad_()
    result = kernel.attg_loss(leaf, x, m, a, tau=tau, impl=impl, **kw)
    loss, *mse = result if kw.get("return_mse") else [result]
    loss.backward(torch.as_tensor(up, dtype=loss.dtype, device=loss.device))
    after = [x.detach() for x in inputs if isinstance(x, torch.Tensor)]
    for x, y in zip(after, before, strict=True):
        assert x.nan_to_num(1.5).equal(y.nan_to_num(1.5))
    double = pred.dtype == torch.float64
    assert loss.dtype == (torch.float64 if double else torch.float32)
    assert leaf.grad.dtype == pred.dtype and leaf.grad.shape == pred.shape
    assert not any(x.requires_grad or x.dtype != loss.dtype for x in mse)
    return loss.detach().cpu(), leaf.grad.cpu(), *(x.cpu() for x in mse)


GRAD_TOL = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def some_loss(impl, dtype=torch.float32, L=9, P=48, **kw):
    """A loss of images with 4 x 4 patches on the kernel's device, its leaf, other inputs."""
    side = math.isqrt(L) * 4
    imgs = on_device(randn(2, P // 16, side, side, seed=1))
    mask, attn = on_device(rand(2, L, seed=2) < 0.7), on_device(rand(2, L, seed=3))
    leaf = on_device(randn(2, L, P, dtype=dtype)).requires_grad_()
    loss = kernel.attg_loss(leaf, imgs, mask, attn, patch_size=4, impl=impl, **kw)
    return loss, leaf, (imgs, mask, attn)


# Patch, image, width, depth, heads, decoder width, depth, heads; MAE's published number of
# parameters in millions.
PRESETS = {
    "vit_micro": (4, 32, 128, 4, 4, 64, 2, 4, None),
    "vit_tiny": (16, 224, 192, 12, 3, 192, 4, 3, None),
    "vit_small": (16, 224, 384, 12, 6, 256, 4, 8, None),
    "vit_base": (16, 224, 768, 12, 12, 512, 8, 16, 111.9),
    "vit_large": (16, 224, 1024, 24, 16, 512, 8, 16, 329.5),
    "vit_huge": (14, 224, 1280, 32, 16, 512, 8, 16, 657.1),
}


def shake(model, std=0.03):
    """Randomize all parameters: fresh biases, norms and tokens would hide mistakes."""
    for i, p in enumerate(q for q in model.parameters() if q.requires_grad):
        p.data += std * randn(*p.shape, seed=i)
    return model.eval()


def hf_model(kind, name="vit_micro", **kw):
    hf, mae = transformers(), "MAE" in kind
    sizes = "hidden_size num_hidden_layers num_attention_heads".split()
    names = ["patch_size", "image_size", *sizes]
    if mae:
        names += [f"decoder_{size}" for size in sizes]
    options = dict(zip(names, PRESETS[name], strict=False)) | {"layer_norm_eps": 1e-6}
    for part in ("", "decoder_")[: 1 + mae]:
        options[f"{part}intermediate_size"] = 4 * options[f"{part}hidden_size"]
    config = hf.ViTMAEConfig if mae else hf.ViTConfig
    model = getattr(hf, kind)(config(**options | kw))
    if mae and model.device.type != "meta":
        # A fresh model of transformers 5 has tables of zeros
        patches = model.vit.embeddings.patch_embeddings
        patches.projection._is_hf_initialized = False
        model.vit.embeddings.initialize_weights()
        model.decoder.initialize_weights(patches.num_patches)
    return model


def from_hf(state):
    """Hugging Face's parameters or gradients under MAE's names; q, k, v joined."""
    names = {key: to_mae_name(key.removeprefix("vit.")) for key in state}
    return join_qkv({names[key]: value for key, value in state.items()}, "HF")


def timm_model(width=64, depth=2, heads=4, img_size=32, patch_size=8, **options):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": 0}
    model = timm_vit.VisionTransformer(img_size, patch_size, **sizes | options)
    return shake(model, 0.05)


def encoder_only(state):
    return {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}


def ramp(width, height):
    """Red grows with x, green with y, blue is 7: a crop shows where it comes from."""
    green, red = np.mgrid[0 : 255 : height * 1j, 0 : 255 : width * 1j]
    pixels = np.stack([red, green, np.full_like(red, 7)], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def noise(width, height, seed=0):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def correlation(a, b):
    """Of each row of a and b (B, L): (B,)."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return torch.cosine_similarity(a, b)


LUMA = (0.299, 0.587, 0.114)  # weights of RGB in Pillow's gray


def disc_images(folder, count, bad=()):
    """Write folder/data, images with a bright disc, and folder/masks. bad: unreadable."""
    y, x = np.mgrid[:32, :40]
    for i in range(count):
        rng = np.random.default_rng(i)
        disc = (x - rng.uniform(10, 30)) ** 2 + (y - rng.uniform(10, 22)) ** 2 < 60
        colors = np.where(disc[..., None], (230, 60, 40), (20, 60, 120))
        pixels = colors + rng.integers(0, 25, (32, 40, 3))
        write(folder / "data" / f"{i:02d}.png", Image.fromarray(np.uint8(pixels)))
        write(folder / "masks" / f"{i:02d}.png", Image.fromarray(np.uint8(disc) * 255))
    for i in bad:
        (folder / "data" / f"{i:02d}.png").write_bytes(b"not an image")
    return folder


def some_truth(images, queries):
    """Ground truth of a retrieval; query 1 has only junk, query 2 nothing hard."""
    rng, gnd = np.random.default_rng(0), []
    for q in range(queries):
        ids = rng.permutation(images)[:30].tolist()
        easy, hard = (0, 0) if q == 1 else sorted(rng.integers(0, 30, 2))
        hard = easy if q == 2 else hard
        row = {"easy": ids[:easy], "hard": ids[easy:hard], "junk": ids[hard:]}
        gnd.append(row | {"bbx": [2.0, 1.0, 30.0, 20.0]})
    return gnd


SIZE = dict(depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
SMALL = SIZE | dict(width=16, img_size=32, patch_size=16)
TINY = SIZE | dict(width=32, img_size=16, patch_size=4, epochs=4, batch_size=4, lr=1e-3)
TINY |= dict(warmup_epochs=1.0, log_every=1, eval_every=0, workers=0, device="cpu")


def make_images(folder, count, hue=0, size=(48, 40), suffix=".png"):
    """Write images of colored noise with a bright spot at a random position."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    for i in range(count):
        rng = np.random.default_rng([hue, i, *folder.name.encode()])
        dx, dy = x - rng.uniform(0, size[0]), y - rng.uniform(0, size[1])
        spot = np.exp(-(dx**2 + dy**2) / 128)[..., None]
        color = np.roll([0.8, 0.3, 0.3], hue) * rng.uniform(0.6, 1)
        pixels = 0.55 * color + 0.25 * rng.random((*y.shape, 3)) + 0.2 * spot
        Image.fromarray(np.uint8(255 * pixels)).save(folder / f"{i:03d}{suffix}")


def make_maps(path, data, flat=False):
    """Write maps for a data set: the brightness of its images."""
    dataset = open_data(str(data))
    gray = [dataset.read(i)[0].convert("L") for i in range(len(dataset))]
    maps = np.stack([np.asarray(image, dtype=np.float32) for image in gray])
    save_maps(path, 0 * maps if flat else maps, dataset, "brightness")
    return str(path)


def make_data(root):
    """Write a data set with maps and return its settings.

    25 training and 15 test images of 3 classes, 6 steps per epoch.
    """
    folder = root / "data"
    for hue, name in enumerate("rgb"):
        make_images(folder / "train" / name, 8, hue)
        make_images(folder / "test" / name, 5, hue + 3)
    make_images(folder / "train" / "r", 9)
    return {"data": str(folder), "maps": make_maps(root / "maps.npy", folder)}


def train(out, **settings):
    return attg_mae.train(attg_mae.Config(**TINY | {"out": str(out)} | settings))


def records(out, key="loss"):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if key in row]


def losses(out):
    """What two equal runs log, a tuple per line."""
    keys = ("step", "epoch", "loss", "mse", "grad_norm", "lr", "tau")
    return [tuple(row[key] for key in keys) for row in records(out)]


def last(out):
    return attg_mae.load_checkpoint(Path(out) / "last.pt")


def same(a, b):
    """Whether two values are equal bit for bit, with all they contain."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(out, reference):
    """Weights, optimizer, scaler, steps and losses are equal; configs but for the folder."""
    a, b = last(out), last(reference)
    changed = {k for k, v in a["config"].items() if b["config"][k] != v}
    assert changed <= {"out", "resume"}
    parts = ("model", "optimizer", "scaler", "step")
    assert [k for k in parts if not same(a[k], b[k])] == []
    assert losses(out) == losses(reference)


def content(folder):
    """{path: bytes} of the files directly in a folder."""
    return {p: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def python(*argv, **options):
    """The finished process of `python argv`, with its output as text."""
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, **options)


@contextlib.contextmanager
def refused(words):
    """The block raises a ValueError or an OSError that names all of the words."""
    with pytest.raises((ValueError, OSError)) as error:
        yield
    assert [word for word in words.split() if word not in str(error.value)] == []


@contextlib.contextmanager
def after_step(number, action):
    """Call action() after the optimizer step of this number, counted from 1."""
    steps = itertools.count(1)

    def count(*_):
        if next(steps) == number:
            action()

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def stop_after(step, number=signal.SIGTERM):
    handler = signal.getsignal(number)
    if handler is signal.SIG_IGN:  # SIGHUP under nohup, which a run would ignore, too
        signal.signal(number, signal.SIG_DFL)
    try:
        with after_step(step, lambda: os.kill(os.getpid(), number)):
            yield
    finally:
        signal.signal(number, handler)


def save_encoder(path, change=None, **settings):
    """Save an untrained model of SMALL's size after change(model); returns it."""
    model = attg_mae.build_model(attg_mae.Config(**SMALL | settings))
    if change:
        change(model)
    config = dataclasses.asdict(model.cfg)
    attg_mae.save_checkpoint(path, model=model.state_dict(), config=config)
    return model


def blobs(n, classes, width=16, spread=1.5, seed=0):
    """Overlapping classes: correlated features (n, width) of all scales, labels (n,)."""
    labels = torch.arange(n) % classes
    spreads = spread * torch.logspace(-0.8, 0.8, width)
    x = randn(classes, width)[labels] + spreads * randn(n, width, seed=seed + 1)
    x = x @ torch.linalg.qr(randn(width, width, seed=99))[0]
    return 5 + x * torch.logspace(-3, 2, width), labels


def save_features(path, x, labels, queries, truth):
    """Write a file as by --save_features, both features the same."""
    parts = {"settings": dict.fromkeys(SOURCE)}
    for name, features, y in (("train", x, labels), ("test", queries, truth)):
        parts[name] = dict.fromkeys(FEATURES, features) | {"labels": y}
    attg_mae.save_checkpoint(path, **parts)


class Evil:
    """Opens a file for writing when it is unpickled, which must never happen."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
