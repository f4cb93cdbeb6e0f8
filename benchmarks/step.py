"""
Training steps of this project beside those of other implementations, on the same images.

Each has a model of the preset's sizes with random weights, and AdamW. A step is forward,
backward and update on normalized floats on the device, without a map. `train_step` is
attg_mae.train_step, which also normalizes and flips 8-bit images, crops the maps and
measures the unweighted mse and the gradient norm; `guided` has maps, `vanilla` none.
"""

import importlib
import math
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attg.loader import Batch
from attg_mae import (
    Config,
    build_model,
    model_inputs,
    param_groups,
    resolve,
    train_step,
)
from benchmarks.measure import (
    clock_name,
    machine,
    nothing,
    peak_memory,
    percentiles,
    print_row,
    quiet_clock,
    table,
    take_turns,
)


class Impl(NamedTuple):
    """An implementation of MAE: its name, model, loss(model, imgs, noise), optimizer."""

    name: str
    model: Any
    loss: Any
    optimizer: Any


# -- Implementations -------------------------------------------------------------------


def ours(cfg):
    """This project's model and loss."""
    return build_model(cfg), lambda model, imgs, noise: model(imgs, noise=noise)[0]


def hugging_face(cfg):
    """transformers' ViTMAEForPreTraining with its fused attention."""
    import transformers

    config = transformers.ViTMAEConfig(
        image_size=cfg.img_size,
        patch_size=cfg.patch_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=4 * cfg.width,
        decoder_hidden_size=cfg.decoder_width,
        decoder_num_hidden_layers=cfg.decoder_depth,
        decoder_num_attention_heads=cfg.decoder_heads,
        decoder_intermediate_size=4 * cfg.decoder_width,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = transformers.ViTMAEForPreTraining(config)
    return model, lambda model, imgs, noise: model(imgs, noise=noise).loss


def facebook(repo, cfg):
    """models_mae.py of a copy of facebookresearch/mae; it draws its own masks.

    It was written for timm 0.3.2 and NumPy below 1.24. A newer timm's blocks take no
    qk_scale, which it passes as None, and use fused attention.
    """
    from timm.models.vision_transformer import Block

    def block(*args, qk_scale=None, **options):
        return Block(*args, **options)

    np.float = float
    sys.path.insert(0, str(repo))
    try:
        models_mae = importlib.import_module("models_mae")
    finally:
        sys.path.remove(str(repo))
    models_mae.Block = block
    model = models_mae.MaskedAutoencoderViT(
        img_size=cfg.img_size,
        patch_size=cfg.patch_size,
        embed_dim=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.heads,
        decoder_embed_dim=cfg.decoder_width,
        decoder_depth=cfg.decoder_depth,
        decoder_num_heads=cfg.decoder_heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    return model, lambda model, imgs, noise: model(imgs, mask_ratio=0.75)[0]


def available_impls(cfg, device, mae_repo=None, wanted=()):
    """[Impl] of what is installed, ours first; prints what is missing.

    wanted: beginnings of names; () is all.
    """
    makers = {"ours": ours, "HF sdpa": hugging_face}
    if mae_repo:
        makers["mae"] = partial(facebook, Path(mae_repo))
    if wanted:
        first = ("ours", *wanted)
        makers = {name: make for name, make in makers.items() if name.startswith(first)}
        if len(makers) == 1 and "ours" not in wanted:
            raise ValueError(f"--impls {' '.join(wanted)}: none of them is available")
    ready = []
    for name, make in makers.items():
        try:
            model, loss = make(cfg)
            model = model.train().to(device)
        # A peer may not be installed; its other versions may differ in anything.
        except Exception as error:
            if name == "ours":
                raise
            print(f"without {name}: {type(error).__name__}: {error}")
            continue
        groups = param_groups(model, 0.05)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        ready.append(Impl(name, model, loss, optimizer))
    return ready


# -- A step ----------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Inputs of the steps of all implementations."""

    cfg: Config
    # Normalized floats (B, C, H, W).
    imgs: torch.Tensor
    # The same images as 8-bit crops with maps and noise, for train_step.
    batch: Batch
    # Of autocast, or None.
    dtype: torch.dtype | None
    tau: torch.Tensor


def make_inputs(cfg, batch_size, dtype, device):
    """Inputs of random pixels and maps; torch.float32 is without autocast."""
    generator = torch.Generator(device).manual_seed(0)
    where = {"generator": generator, "device": device}
    shape = (batch_size, cfg.in_chans, *cfg.size)
    corners = torch.tensor([0.1, 0.2, 0.8, 0.9], device=device)
    batch = Batch(
        image=torch.randint(0, 256, shape, dtype=torch.uint8, **where),
        maps=torch.rand(batch_size, *cfg.grid, **where),
        box=corners.expand(batch_size, 4),
        flip=torch.rand(batch_size, **where) < 0.5,
        noise=torch.rand(batch_size, math.prod(cfg.grid), **where),
        ties=None,
    )
    tau = torch.tensor(0.75, device=device)
    imgs, *_ = model_inputs(batch._replace(maps=None), cfg, tau)
    return Inputs(cfg, imgs, batch, None if dtype == torch.float32 else dtype, tau)


def plain_step(impl, inputs, model, _=None):
    """Forward, backward and update."""
    device = inputs.imgs.device.type
    with torch.autocast(device, inputs.dtype, enabled=inputs.dtype is not None):
        loss = impl.loss(model, inputs.imgs, inputs.batch.noise)
    loss.backward()
    impl.optimizer.step()
    impl.optimizer.zero_grad()


def whole_step(impl, inputs, model, batch, _=None):
    """attg_mae.train_step, guided if the batch has maps."""
    tau, cfg, dtype = inputs.tau, inputs.cfg, inputs.dtype
    scaler = torch.amp.GradScaler(tau.device.type, enabled=False)
    train_step(model, impl.optimizer, scaler, [batch], tau, cfg, dtype)


def steps_of(impl, inputs, compiled):
    """{name: call} of an implementation: its plain step, and for ours train_step."""
    model, suffix = impl.model, ""
    if compiled:
        model, suffix = torch.compile(impl.model), ", compiled"
    steps = {impl.name + suffix: partial(plain_step, impl, inputs, model)}
    if impl.name == "ours":
        guided, vanilla = inputs.batch, inputs.batch._replace(maps=None)
        for name, batch in (("vanilla", vanilla), ("guided", guided)):
            call = partial(whole_step, impl, inputs, model, batch)
            steps[f"train_step, {name}{suffix}"] = call
    return steps


# -- FLOPs and memory of a step --------------------------------------------------------


def model_flops(step):
    """Floating-point operations of a step's matrix products and attention."""
    # The fused attention of CPUs would not be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(impl, inputs):
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        # Kept, so that no other storage gets its address.
        storages[storage.data_ptr()] = storage
        return x

    device = inputs.imgs.device.type
    with saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast(device, inputs.dtype, enabled=inputs.dtype is not None):
            loss = impl.loss(impl.model, inputs.imgs, inputs.batch.noise)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def costs_per_image(impl, inputs):
    """{"GFLOP/img", "saved MB/img"} of a plain step, which no clock changes."""

    def first(count):
        batch = inputs.batch._replace(noise=inputs.batch.noise[:count])
        return inputs._replace(imgs=inputs.imgs[:count], batch=batch)

    one = partial(plain_step, impl, first(1), impl.model)
    # The difference of two images and one, so that weights do not count.
    saved = saved_bytes(impl, first(2)) - saved_bytes(impl, first(1))
    return {"GFLOP/img": model_flops(one) / 1e9, "saved MB/img": saved / 1e6}


# -- The table -------------------------------------------------------------------------


def measure_steps(impls, inputs, modes, repeats):
    """A row for each implementation and step; prints those that fail.

    modes: False is eager, True compiled. `x ours` is relative to our plain step in the
    same mode.
    """
    device = inputs.imgs.device
    steps, rows_of = {}, {}
    for compiled, impl in product(modes, impls):
        costs = costs_per_image(impl, inputs) if len(inputs.imgs) > 1 else {}
        for name, step in steps_of(impl, inputs, compiled).items():
            try:
                # Compiles, and creates the state of the optimizer.
                step()
            except Exception as error:
                print(f"without {name}: {type(error).__name__}: {str(error)[:300]}")
                continue
            steps[name] = step
            rows_of[name] = dict(costs) if name.startswith(impl.name) else {}
            rows_of[name] |= peak_memory(step, device)
    calls = {name: (nothing, step) for name, step in steps.items()}
    times = take_turns(calls, device, repeats, quiet_clock())
    B, rows = len(inputs.imgs), []
    for name, seconds in times.items():
        compiled = name.endswith(", compiled")
        base = times.get("ours, compiled" if compiled else "ours", seconds)
        median, p20, p80 = percentiles(seconds)
        row = {
            "model": inputs.cfg.model,
            "type": str(inputs.dtype or torch.float32).removeprefix("torch."),
            "batch": B,
            "step": name,
            "img/s": 1e3 * B / median,
            "p20": 1e3 * B / p80,
            "p80": 1e3 * B / p20,
            "x ours": percentiles(base)[0] / median,
        }
        rows.append(row | rows_of[name])
    return rows


def run(args, device, out):
    """Measure images per second of training steps."""
    on_gpu = device.type == "cuda"
    batch_size = (args.batches or [128 if on_gpu else 4])[0]
    dtypes = args.dtypes or ["bfloat16" if on_gpu else "float32"]
    modes = [False, True] if args.compile else [False]
    rows = []
    for name, dtype in product(args.models, dtypes):
        cfg = resolve(Config(name))
        impls = available_impls(cfg, device, args.mae_repo, args.impls)
        inputs = make_inputs(cfg, batch_size, getattr(torch, dtype), device)
        more = measure_steps(impls, inputs, modes, args.repeats)
        for row in more:
            print_row(row)
        rows += more
    table(rows, out, "step", f"{machine(device)}; {clock_name(device)}")
