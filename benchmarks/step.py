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

import numpy as np
import torch

from attg.export import hf_arguments
from attg.loader import Batch
from attg_mae import (
    Config,
    build_model,
    model_inputs,
    param_groups,
    resolve,
    sincos_table,
    train_step,
)
from benchmarks.measure import compare, peak_memory, take_turns

DTYPES = {"bf16": torch.bfloat16, "fp32": None}


def ours(cfg):
    """This project's model and loss."""
    return build_model(cfg), lambda model, imgs, noise: model(imgs, noise=noise)[0]


def hugging_face(cfg):
    """transformers' ViTMAEForPreTraining with its fused attention."""
    import transformers

    arguments = hf_arguments(vars(cfg), with_decoder=True)
    config = transformers.ViTMAEConfig(**arguments, attn_implementation="sdpa")
    model = transformers.ViTMAEForPreTraining(config)
    # transformers 5.24 leaves the positions of a model without a checkpoint at zero.
    positions = model.vit.embeddings.position_embeddings
    for x in (positions, model.decoder.decoder_pos_embed):
        x.data[0] = sincos_table(x.shape[-1], cfg.grid)
    return model, lambda model, imgs, noise: model(imgs, noise=noise).loss


def facebook(repo, cfg):
    """models_mae.py of a copy of facebookresearch/mae; it draws its own masks."""
    from timm.models.vision_transformer import Block

    # It was written for timm 0.3.2, whose blocks take qk_scale, and NumPy below 1.24.
    np.float = float
    sys.path.insert(0, repo)
    models_mae = importlib.import_module("models_mae")
    models_mae.Block = lambda *args, qk_scale, **options: Block(*args, **options)
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


def available_impls(cfg, device, mae_repo=None):
    """{name: (model, loss, optimizer)} of what is installed; prints what is missing."""
    makers = {"ours": ours, "HF sdpa": hugging_face}
    if mae_repo:
        makers["mae"] = partial(facebook, mae_repo)
    impls = {}
    for name, make in makers.items():
        try:
            model, loss = make(cfg)
        except ImportError as error:
            print(f"without {name}: {error}")
            continue
        groups = param_groups(model.train().to(device), weight_decay=0.05)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        impls[name] = model, loss, optimizer
    return impls


def random_batch(cfg, batch_size, device):
    """Batch of random 8-bit crops and maps, half of them flipped."""
    where = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shape = (batch_size, cfg.in_chans, *cfg.size)
    box = torch.tensor([0.1, 0.2, 0.8, 0.9], device=device)
    return Batch(
        image=torch.randint(0, 256, shape, dtype=torch.uint8, **where),
        maps=torch.rand(batch_size, *cfg.grid, **where),
        box=box.expand(batch_size, 4),
        flip=torch.rand(batch_size, **where) < 0.5,
        noise=torch.rand(batch_size, math.prod(cfg.grid), **where),
    )


def plain_step(model, loss, optimizer, imgs, noise, dtype):
    """Forward, backward and update."""
    with torch.autocast(imgs.device.type, dtype, enabled=dtype is not None):
        value = loss(model, imgs, noise)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def make_steps(impls, batch, cfg, dtype):
    """{name: call} of all implementations, and train_step with and without maps."""
    vanilla = batch._replace(maps=None)
    device = batch.image.device
    tau = torch.tensor(0.75, device=device)
    imgs, _, noise = model_inputs(vanilla, cfg, tau)
    steps = {}
    for name, impl in impls.items():
        steps[name] = partial(plain_step, *impl, imgs, noise, dtype)
    model, _, optimizer = impls["ours"]
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for name, x in (("vanilla", vanilla), ("guided", batch)):
        steps[f"train_step, {name}"] = partial(
            train_step, model, optimizer, scaler, [x], tau, cfg, dtype
        )
    return steps


def run(settings, device):
    """Rows: time and images per second of the steps of all implementations."""
    B = settings.batch_size
    for name, precision in product(settings.models, settings.precision):
        if precision not in DTYPES:
            raise ValueError(f"--precision {precision}: choose from bf16 and fp32")
        cfg = resolve(Config(name))
        impls = available_impls(cfg, device, settings.mae_repo)
        batch = random_batch(cfg, B, device)
        steps = make_steps(impls, batch, cfg, DTYPES[precision])
        if settings.compile:
            for model, *_ in impls.values():
                model.compile()
        times = take_turns(steps, device, settings.repeats)
        for step, columns in compare(times, B).items():
            case = {"model": name, "type": precision, "batch": B, "step": step}
            row = case | {"img/s": 1e3 / columns["ms"]} | columns
            yield row | peak_memory(steps[step], device)
