"""
Attention-Guided Masked Autoencoders (Sick, Engel, Hermosilla, Ropinski; arXiv 2402.15172) in one file.

A ViT masked autoencoder (He et al., arXiv 2111.06377) whose per-patch reconstruction loss is weighted by
exp(M_norm / tau): M is an attention map of the object, found without labels ahead of training. Masking stays random.

    python attg_mae.py                                                   # the embedded toy set on a CPU
    python attg_mae.py --data /path/to/images --maps maps.npy --model vit_small --accum 16               # one GPU
    torchrun --nproc_per_node=8 attg_mae.py --model vit_large --data /path/to/imagenet --maps maps.npy   # eight
    python attg_mae.py --init mae_visualize_vit_large.pth --model vit_large --data photos --epochs 0     # pictures only

The run folder (--out) receives config.json, log.jsonl, last.pt, encoder.pt and reconstructions.png. The same command
continues an interrupted run. The first command takes about 4 minutes on 2 CPU cores.

Shapes: B images, L patches in an image, K of them kept (visible), N = 1 + L tokens, D width, H heads,
p patch size, P = p*p*C values in a patch. mask is (B, L), 1 = removed = predicted.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import roi_align
from tqdm import tqdm

from common.data import Feed, TrainBatches, open_data, seed_for
from common.features import (  # noqa: F401
    FEATURES,
    extract_features,
    features_of,
    knn_accuracy,
    knn_classify,
)
from common.files import replacing, require, save_sheet
from common.maps import open_maps
from common.run import find_checkpoint, load_checkpoint, processes, save_checkpoint  # noqa: F401
from common.weights import DECODER, HEADS, load_weights, read_weights
from kernels import attg_loss, is_flat, normalize_map

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation

# -- Configuration -----------------------------------------------------------------------------------------------------
FIELDS = "patch_size img_size width depth heads decoder_width decoder_depth decoder_heads epochs batch_size blr".split()
PRESETS = {
    "vit_micro": (4, 32, 128, 4, 4, 64, 2, 4, 8, 64, 6e-3),
    "vit_tiny": (16, 224, 192, 12, 3, 192, 4, 3, 800, 4096, 1.5e-4),
    "vit_small": (16, 224, 384, 12, 6, 256, 4, 8, 800, 4096, 1.5e-4),
    "vit_base": (16, 224, 768, 12, 12, 512, 8, 16, 800, 4096, 1.5e-4),
    "vit_large": (16, 224, 1024, 24, 16, 512, 8, 16, 800, 4096, 1.5e-4),
    "vit_huge": (14, 224, 1280, 32, 16, 512, 8, 16, 800, 4096, 1.5e-4),
}
FIXED = {
    *FIELDS[:8],
    "in_chans",
    "data",
    "classes",
    "batch_size",
    "seed",
}  # of a run, once it has begun
FREE = {
    "out",
    "epochs",
    "precision",
    "compile",
    "device",
    "workers",
    "resume",
    "knn_every",
    "save_every",
    "log_every",
}
GUIDANCE = ("attg", "none", "inverted", "foreground", "background", "input_masking")


def flag(default, text, **more):
    text += " [%(default)s]" * (default is not None)
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class Config:
    """Every setting of a run; the command line is generated from it. None is filled in from the preset of `model`."""

    model: str = flag("vit_micro", "architecture preset", choices=tuple(PRESETS))
    data: str = flag(
        "toy", "toy, a torchvision name, an ImageFolder root or a folder of images"
    )
    maps: str | None = flag(
        None, "attention maps (.npy beside its .json); toy brings its own"
    )
    out: str | None = flag(None, "run folder (out/DATA-MODEL-GUIDANCE)")
    guidance: str = flag(
        "attg",
        "attg = the paper, none = vanilla MAE, others = ablations",
        choices=GUIDANCE,
    )
    map_norm: str = flag(
        "image",
        "min-max normalise over the whole image or the crop",
        choices=("image", "crop"),
    )
    tau: float = flag(0.75, "temperature at the start (paper)")
    tau_end: float = flag(1.0, "temperature at the end (ours; the paper names none)")
    tau_schedule: str = flag(
        "cosine",
        "half-cycle cosine from tau to tau_end (paper)",
        choices=("cosine", "constant"),
    )
    mask_ratio: float = flag(0.75, "share of patches removed")
    norm_pix: bool = flag(
        True, "predict patches normalised by their own mean and variance"
    )
    epochs: int | None = flag(
        None, "passes over the data (800; vit_micro 8; toy at 224 px 1)"
    )
    batch_size: int | None = flag(
        None, "images in a step, all processes together (4096; vit_micro 64)"
    )
    accum: int = flag(1, "micro-batches a step is split into, to save memory")
    blr: float | None = flag(
        None, "lr = blr * batch_size / 256 (1.5e-4; vit_micro 6e-3)"
    )
    lr: float | None = flag(None, "learning rate at its peak, instead of blr")
    warmup_epochs: float | None = flag(None, "linear warm-up (5 %% of the epochs)")
    weight_decay: float = flag(0.05, "AdamW, not on biases and norms")
    clip_grad: float = flag(0.0, "largest gradient norm, 0 = no clipping (MAE)")
    img_size: int | tuple | None = flag(None, "input size in pixels")
    patch_size: int | None = flag(None, "patch size in pixels")
    in_chans: int = flag(3, "channels (pictures from files have 3)")
    width: int | None = flag(None, "encoder width")
    depth: int | None = flag(None, "encoder blocks")
    heads: int | None = flag(None, "encoder heads")
    decoder_width: int | None = flag(None, "decoder width")
    decoder_depth: int | None = flag(None, "decoder blocks")
    decoder_heads: int | None = flag(None, "decoder heads")
    mean: tuple = flag(
        IMAGENET[0], "channel means of the input normalisation", type=float, nargs=3
    )
    std: tuple = flag(
        IMAGENET[1],
        "channel deviations of the input normalisation",
        type=float,
        nargs=3,
    )
    classes: str | None = flag(None, "file with the class folders to keep, one a line")
    precision: str = flag(
        "auto",
        "auto = bf16 (fp16) on a GPU, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = flag(False, "torch.compile the model")
    device: str | None = flag(None, "cuda, mps or cpu (the first there is)")
    workers: int | None = flag(
        None, "loader processes of each process (CPU 0, GPU up to 16)"
    )
    seed: int = flag(0, "decides weights, order, augmentation and masks")
    init: str | None = flag(
        None, "start from these weights: this project's, MAE's, timm's, HF's or DINO's"
    )
    resume: str = flag(
        "auto",
        "auto = continue OUT/last.pt if it is there, none = start anew, or a checkpoint's path",
    )
    knn_every: int = flag(0, "epochs between k-NN evaluations (0 = at the end only)")
    save_every: int = flag(1, "epochs between checkpoints")
    log_every: int = flag(20, "steps between log lines")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            require(
                not choices or value in choices,
                f"--{f.name} {value}: choose from {', '.join(choices or ())}",
            )
        defaults = dict(zip(FIELDS, PRESETS[self.model], strict=True))
        if (
            self.data == "toy" and self.model != "vit_micro"
        ):  # toy enlarged to 224 px only shows that everything runs
            defaults |= {"epochs": 1, "batch_size": 64}
        defaults["out"] = (
            f"out/{Path(self.data).resolve().name}-{self.model}-{self.guidance}"
        )
        for name, value in defaults.items():
            setattr(
                self,
                name,
                value if getattr(self, name) is None else getattr(self, name),
            )
        self.warmup_epochs = (
            0.05 * self.epochs if self.warmup_epochs is None else self.warmup_epochs
        )
        for name in (
            "batch_size",
            "accum",
            "save_every",
            "log_every",
            "patch_size",
            "tau",
            "tau_end",
        ):
            require(
                0 < getattr(self, name) < math.inf,
                f"--{name} {getattr(self, name)}: must be above 0",
            )
        self.lr = self.blr * self.batch_size / 256 if self.lr is None else self.lr
        self.blr = self.lr * 256 / self.batch_size
        for name in (
            "epochs",
            "knn_every",
            "warmup_epochs",
            "clip_grad",
            "weight_decay",
            "lr",
            "workers",
        ):
            require(
                (getattr(self, name) or 0) >= 0,
                f"--{name} {getattr(self, name)}: must not be negative",
            )
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        self.size = (
            (self.img_size,) * 2
            if isinstance(self.img_size, int)
            else tuple(self.img_size)
        )  # (height, width)
        (h, w), p = self.size, self.patch_size
        require(
            h % p == w % p == 0 < h * w,
            f"--img_size {h}x{w} is not divisible by --patch_size {p}; use a multiple",
        )
        for width, heads in (
            (self.width, self.heads),
            (self.decoder_width, self.decoder_heads),
        ):
            require(
                width % heads == width % 4 == 0,
                f"width {width}: must be divisible by 4 and by its {heads} heads",
            )
        self.grid = (h // p, w // p)  # (rows, columns) of patches
        L, K = math.prod(self.grid), int(math.prod(self.grid) * (1 - self.mask_ratio))
        require(
            0 < K < L,
            f"--mask_ratio {self.mask_ratio}: must keep and remove at least one of {L} patches",
        )


# -- Model: MAE's ViT, with its parameter names ------------------------------------------------------------------------
def sincos_table(dim, grid):
    """Fixed positions (1 + L, dim), zeros for the class token; the first half of the channels encodes the column."""
    omega = 10000.0 ** -(
        torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
    )  # (dim/4,)
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]  # 2 x (L, dim/4)
    table = torch.cat(
        [f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1
    )  # (L, dim)
    return torch.cat([torch.zeros(1, dim), table.float()])  # (1 + L, dim)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_qkv(self, x):
        B, N, D = x.shape
        return (
            self.qkv(x)
            .reshape(B, N, 3, self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )  # 3 x (B, H, N, D/H)

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.split_qkv(x))  # (B, H, N, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)
            )
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MAE(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        convolution = nn.Conv2d(cfg.in_chans, cfg.width, cfg.patch_size, cfg.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=convolution))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(
            sincos_table(cfg.width, cfg.grid)[None], requires_grad=False
        )  # (1, N, D)
        self.blocks = nn.Sequential(
            *(Block(cfg.width, cfg.heads) for _ in range(cfg.depth))
        )
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.decoder_embed = nn.Linear(cfg.width, cfg.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.decoder_width))
        self.decoder_pos_embed = nn.Parameter(
            sincos_table(cfg.decoder_width, cfg.grid)[None], requires_grad=False
        )
        blocks = [
            Block(cfg.decoder_width, cfg.decoder_heads)
            for _ in range(cfg.decoder_depth)
        ]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(cfg.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(
            cfg.decoder_width, cfg.patch_size**2 * cfg.in_chans
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.patch_embed.proj.weight.view(cfg.width, -1)
        )  # as a linear layer, which it is here
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, imgs):
        """(B, C, H, W) -> (B, L, P), the values of a patch in the order (p, p, C)."""
        C, (h, w), p = self.cfg.in_chans, self.cfg.grid, self.cfg.patch_size
        expected = (C, h * p, w * p)
        require(
            tuple(imgs.shape[1:]) == expected,
            f"imgs: got {tuple(imgs.shape)}; this model takes (B, *{expected})",
        )
        return (
            imgs.reshape(-1, C, h, p, w, p)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(-1, h * w, p * p * C)
        )

    def unpatchify(self, patches):
        """(B, L, P) -> (B, C, H, W)."""
        C, (h, w), p = self.cfg.in_chans, self.cfg.grid, self.cfg.patch_size
        return (
            patches.reshape(-1, h, w, p, p, C)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(-1, C, h * p, w * p)
        )

    def embed(self, patches, ids_keep=None):
        """Patches (B, L, P) -> tokens (B, N, D), or (B, 1 + K, D) of the visible ones, ids_keep (B, K)."""
        B, pos = len(patches), self.pos_embed[:, 1:].expand(len(patches), -1, -1)
        if ids_keep is not None:
            ids = ids_keep[..., None]
            patches = patches.gather(
                1, ids.expand(-1, -1, patches.shape[-1])
            )  # (B, K, P)
            pos = pos.gather(1, ids.expand(-1, -1, pos.shape[-1]))  # (B, K, D)
        proj = self.patch_embed.proj  # as a product, so that only visible patches pay
        x = (
            F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)
            + pos
        )
        return torch.cat(
            [(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1
        )

    def normalize(self, imgs):
        return normalize(imgs, self.cfg)

    def forward_encoder(self, patches, ids_keep=None):
        return self.norm(
            self.blocks(self.embed(patches, ids_keep))
        )  # (B, 1 + K, D), or (B, N, D) of all patches

    def forward_decoder(self, latent, ids_keep):
        x = self.decoder_embed(latent)  # (B, 1 + K, D)
        B, _, D = x.shape
        tokens = self.mask_token.to(x.dtype).expand(
            B, self.decoder_pos_embed.shape[1] - 1, D
        )  # (B, L, D)
        tokens = tokens.scatter(
            1, ids_keep[..., None].expand(-1, -1, D), x[:, 1:]
        )  # visible ones at their place
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # (B, N, D)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[
            :, 1:
        ]  # (B, L, P)

    def forward(
        self,
        imgs,
        attn=None,
        tau=0.75,
        mask_ratio=0.75,
        noise=None,
        normalize_attn=True,
    ):
        """The loss (Eq. 2), pred (B, L, P) and mask (B, L), 1 = removed, of normalised float imgs (B, C, H, W).
        attn (B, L): attention map, None = vanilla; tau: float or 0-d tensor; noise (B, L): the lowest stay visible."""
        patches = self.patchify(imgs)  # (B, L, P)
        B, L, _ = patches.shape
        noise = torch.rand(B, L, device=imgs.device) if noise is None else noise
        ids_keep = noise.argsort(dim=1)[:, : int(L * (1 - mask_ratio))]  # (B, K)
        mask = torch.ones(B, L, device=imgs.device).scatter(1, ids_keep, 0.0)
        pred = self.forward_decoder(
            self.forward_encoder(patches, ids_keep), ids_keep
        )  # (B, L, P)
        options = {
            "tau": tau,
            "norm_pix": self.cfg.norm_pix,
            "normalize_attn": normalize_attn,
        }
        loss = attg_loss(pred, patches, mask, attn, **options)  # Eq. 1 and 2
        return loss, pred, mask

    def forward_features(self, imgs):
        """(B, C, H, W) -> tokens (B, N, D) after the last norm, nothing masked; [:, 0] is the class token."""
        return self.forward_encoder(self.patchify(imgs))

    def last_qkv(self, imgs):
        """q, k, v of the last block, each (B, H, N, D/H)."""
        x, last = self.blocks[:-1](self.embed(self.patchify(imgs))), self.blocks[-1]
        return last.attn.split_qkv(last.norm1(x))


build_model = MAE


# -- Guidance: from the map of an image to the weights of its patches --------------------------------------------------
def pool_maps(maps, box, flip, grid):
    """Mean of the maps (B, h, w) of whole pictures under each patch of the augmented images: (B, L) fp32.
    box (B, 4): the crop x0, y0, x1, y1 as fractions of width and height; flip (B,) bool comes after it."""
    h, w = maps.shape[1:]
    x0, y0, x1, y1 = box.unbind(1)
    rois = torch.stack(
        [torch.arange(len(maps), device=maps.device), x0 * w, y0 * h, x1 * w, y1 * h],
        dim=1,
    ).float()
    pooled = roi_align(
        maps.float()[:, None],
        rois,
        grid,
        spatial_scale=1.0,
        sampling_ratio=-1,
        aligned=True,
    )
    return torch.where(flip[:, None, None, None], pooled.flip(-1), pooled).flatten(1)


def guide(m, noise, flat, guidance):
    """What M_norm, m (B, L), does to a step: (attn, noise). w = exp(attn / tau), -inf is weight 0, None weight 1.
    noise (B, L) decides the mask; flat (B,) marks maps that say nothing, their patches have weight 1 in every mode."""
    if guidance == "none":
        return None, noise
    if (
        guidance == "input_masking"
    ):  # the lowest M stays visible; sorting by noise first puts ties in random order
        order = noise.argsort(dim=1)
        m = m.masked_fill(flat[:, None], 0.0).gather(1, order)
        order = order.gather(1, m.argsort(dim=1, stable=True))
        return None, order.argsort(dim=1).to(noise.dtype)  # the rank of each patch
    if guidance in ("inverted", "background"):
        m = 1 - m
    if guidance in ("foreground", "background"):
        m = m.masked_fill(m < m.quantile(0.1, dim=1, keepdim=True), -math.inf)
    return m.masked_fill(flat[:, None], 0.0), noise


@functools.cache
def channels(values, device):  # cached, for a tensor made of a list waits for the GPU
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def normalize(imgs, cfg):
    """uint8 (B, 3, H, W) -> fp32, (x / 255 - mean) / std."""
    return (imgs / 255 - channels(cfg.mean, imgs.device)) / channels(
        cfg.std, imgs.device
    )


def prepare(sample, noise, maps, cfg, device):
    """A batch from the loader -> (imgs, attn, noise) on the device; maps (n, h, w) on the host or None."""

    def move(x):  # from pinned memory, or the copy waits for the GPU
        return (x.pin_memory() if device.type == "cuda" else x).to(
            device, non_blocking=True
        )

    image, box, flip, noise = map(move, (sample.image, sample.box, sample.flip, noise))
    imgs = normalize(torch.where(flip[:, None, None, None], image.flip(-1), image), cfg)
    if maps is None or cfg.guidance == "none":
        return imgs, None, noise
    m = move(torch.from_numpy(maps[sample.index.numpy()])).float()  # (B, h, w)
    flat = is_flat(m.flatten(1))  # (B,)
    m = pool_maps(m, box, flip, cfg.grid)  # (B, L)
    if cfg.map_norm == "crop":
        flat, m = is_flat(m), normalize_map(m)
    return imgs, *guide(m, noise, flat, cfg.guidance)


# -- Schedules and optimiser -------------------------------------------------------------------------------------------
def tau_at(step, total_steps, cfg):
    """Temperature of Eq. 1: a half-cycle cosine from cfg.tau up to cfg.tau_end."""
    rise = 0.0 if cfg.tau_schedule == "constant" else cfg.tau_end - cfg.tau
    return cfg.tau + rise * (1 - math.cos(math.pi * step / total_steps)) / 2


def lr_at(step, total_steps, warmup_steps, lr):
    """Linear warm-up from 0, then a half-cycle cosine down to 0 (MAE)."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return (
        lr
        * (
            1
            + math.cos(
                math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)
            )
        )
        / 2
    )


def mask_noise(seed, step, batch_size, grid):
    """(batch_size, L) uniform noise of a whole global batch: a function of seed and step, the same everywhere."""
    generator = torch.Generator().manual_seed(seed_for("masks", seed, step))
    return torch.rand(batch_size, math.prod(grid), generator=generator)


def param_groups(model, weight_decay):
    """No weight decay on biases and norms (MAE); the fixed position tables are in no group."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in params if (p.dim() > 1) == m],
            "weight_decay": m * weight_decay,
        }
        for m in (1, 0)
    ]


# -- Files: checkpoints, and weights from here and elsewhere -----------------------------------------------------------


def load_encoder(path_or_state_dict, heads=None, img_size=None):
    """An encoder in eval mode from a checkpoint or export of this project, or weights of MAE, timm, HF or DINO.
    Use forward_features and last_qkv, on images normalised by .cfg.mean and .cfg.std, ImageNet's unless the file says
    otherwise (many of timm's and HF's ViTs want 0.5 and 0.5). Its decoder has no blocks.
    heads: for widths that are no standard ViT's. img_size: int or (height, width), if not that of the weights: sin-cos
    positions are made anew, learned ones resized. ValueError if there is no such encoder in the file."""
    state, config, name = read_weights(path_or_state_dict)
    if config is None:
        width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        heads = heads or HEADS.get(width)
        require(
            heads,
            f"no standard ViT has width {width}, and the weights do not tell the heads; pass heads=",
        )
        config = {
            "model": "vit_base",
            "in_chans": in_chans,
            "patch_size": patch_size,
            "width": width,
            "heads": heads,
        }
        config["depth"] = sum(
            bool(re.fullmatch(r"blocks\.\d+\.norm1\.weight", k)) for k in state
        )
        config["img_size"] = patch_size * math.isqrt(state["pos_embed"].shape[1] - 1)
    config = {
        f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config
    }
    config |= {"img_size": img_size or config["img_size"], "decoder_depth": 0}
    model = build_model(Config(**config))
    load_weights(
        model,
        {k: v for k, v in state.items() if not DECODER.match(k)},
        name,
        sincos_table,
    )
    return model.eval()


# -- Features and k-NN -------------------------------------------------------------------------------------------------


# -- Training ----------------------------------------------------------------------------------------------------------
LINE = "step {step:6}/{total} epoch {epoch:6.2f} loss {loss:.4f} mse {mse:.4f} lr {lr:.2e} tau {tau:.3f} "
LINE += "{img_s:7.1f} img/s data {data_wait:4.0%} ETA {eta}"


@torch.no_grad()
def save_reconstructions(path, model, dataset, maps, count=8):
    """A sheet: original | map | masked | reconstruction, the visible patches pasted in."""
    cfg, device = (
        dataclasses.replace(model.cfg, guidance="attg", map_norm="image"),
        model.cls_token.device,
    )
    ids = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    sample = torch.utils.data.default_collate([dataset[i] for i in ids])
    imgs, m, noise = prepare(
        sample, mask_noise(cfg.seed, 0, len(ids), cfg.grid), maps, cfg, device
    )
    _, pred, mask = model.forward(imgs, mask_ratio=cfg.mask_ratio, noise=noise)
    patches, hidden = model.patchify(imgs), mask[..., None].bool()
    title = "reconstruction" + " (true patch mean, std)" * cfg.norm_pix
    if cfg.norm_pix:
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    shown = {
        "original": patches,
        "masked": patches.masked_fill(hidden, 0.0),
        title: torch.where(hidden, pred, patches),
    }
    mean, std = channels(cfg.mean, device), channels(cfg.std, device)
    columns = [
        (name, (model.unpatchify(x) * std + mean).clamp(0, 1))
        for name, x in shown.items()
    ]
    if m is not None:
        columns.insert(
            1,
            (
                "map",
                F.interpolate(m.view(-1, 1, *cfg.grid), cfg.size).expand(-1, 3, -1, -1),
            ),
        )
    save_sheet(path, columns)


def train(cfg):
    """Pre-trains; returns {"step", "knn", "out", "stopped"}. Reads torchrun's environment, writes files to cfg.out."""
    stop = []  # the signals received: the step is finished first, a second signal acts at once
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            old = signal.signal(
                number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL))
            )
            stack.callback(signal.signal, number, old)
        return run(cfg, *stack.enter_context(processes(cfg.device)), stop)


def run(cfg, device, rank, world, stop):
    out = Path(cfg.out)

    def say(text, record=None):
        if rank == 0 and text:
            tqdm.write(text)
        if rank == 0 and record:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def evaluate(step):
        if not (train_set.labelled and test_set and test_set.labelled):
            return {}
        knn = knn_accuracy(model, train_set, test_set, loader_args, dtype, rank, world)
        words = ", ".join(
            f"{name.replace('_', ' ')} {value:.2f} %" for name, value in knn.items()
        )
        say(
            f"step {step}: k-NN (k = 20) on the test split: {words}",
            {"step": step, "knn": knn},
        )
        return knn

    # -- data
    train_set = open_data(
        cfg.data, "train", cfg.size, augment=True, seed=cfg.seed, classes=cfg.classes
    )
    test_set = open_data(cfg.data, "test", cfg.size, classes=cfg.classes)
    vanilla = cfg.guidance == "none" or (
        cfg.epochs == 0 and not cfg.maps and train_set.masks is None
    )
    maps = None if vanilla else open_maps(cfg.maps, train_set, cfg.data)
    steps_per_epoch = max(1, len(train_set) // cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = 0 if device.type == "cpu" else min(16, cores)
    loader_args = {
        "workers": workers if cfg.workers is None else cfg.workers,
        "pin_memory": device.type == "cuda",
    }
    # -- model, optimiser, state
    parts = find_checkpoint(cfg, total, say, FIXED, FREE) if total else None
    torch.manual_seed(seed_for("weights", cfg.seed))
    model = build_model(cfg)
    if cfg.init and not parts:
        say(
            f"--init {cfg.init}: {load_weights(model, read_weights(cfg.init)[0], cfg.init, sincos_table)}"
        )
    model.to(device)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.epochs == 0:
        if rank == 0:
            save_reconstructions(out / "reconstructions.png", model, train_set, maps)
        say(f"pictures: {out / 'reconstructions.png'}")
        return {"step": 0, "knn": {}, "out": str(out), "stopped": None}
    precision = (
        "fp32"
        if device.type != "cuda"
        else "bf16"
        if torch.cuda.is_bf16_supported(False)
        else "fp16"
    )
    precision = precision if cfg.precision == "auto" else cfg.precision
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    optimizer = torch.optim.AdamW(
        param_groups(model, cfg.weight_decay), lr=cfg.lr, betas=(0.9, 0.95), fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state, start = {"model": model, "optimizer": optimizer, "scaler": scaler}, 0
    if parts:
        start = parts["step"]
        for name in filter(parts.get, state):  # the scaler's part is empty without fp16
            state[name].load_state_dict(parts[name])
        optimizer.param_groups[0]["weight_decay"] = cfg.weight_decay
        parts.clear()
    batches = TrainBatches(
        len(train_set), cfg.batch_size, start, total, cfg.seed, cfg.accum, rank, world
    )
    feed = Feed(
        train_set, batches, **loader_args
    )  # counts unreadable pictures and the time spent waiting
    micro_size = cfg.batch_size // (cfg.accum * world)
    if cfg.compile:
        model.compile()
    ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    params = [p for p in model.parameters() if p.requires_grad]
    # -- run folder and first words
    if rank == 0:
        lines = (
            (out / "log.jsonl").read_text()
            if start and (out / "log.jsonl").exists()
            else ""
        )
        lines = lines[: lines.rfind("\n") + 1].splitlines(
            keepends=True
        )  # a killed run leaves half a line,
        lines = [
            x for x in lines if (json.loads(x)["step"], '"knn"' in x) <= (start, False)
        ]  # and what comes again
        with replacing(out / "log.jsonl") as temporary:
            temporary.write_text("".join(lines))
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    git = subprocess.getstatusoutput(
        f'git -C "{Path(__file__).parent}" describe --always --dirty'
    )
    versions = f"attg_mae {'unknown' if git[0] else git[1]}, python {sys.version.split()[0]}, torch {torch.__version__}"
    say(
        f"{versions}, {name}, {precision}, {torch.get_num_threads()} threads, {loader_args}\n{cfg}"
    )
    words = "smoke test, on the toy set enlarged: " * (
        cfg.data == "toy" and cfg.model != "vit_micro"
    )
    words += f"{len(train_set)} images, {sum(p.numel() for p in params) / 1e6:.1f} M parameters, {total} steps of "
    words += f"{cfg.batch_size} = {micro_size} x {world} ranks x {cfg.accum}, base lr {cfg.blr:.2e}, lr {cfg.lr:.2e}"
    say(
        f"{words}, tau {tau_at(0, total, cfg)} to {tau_at(total, total, cfg)}, out {out}"
    )
    # -- the loop
    tau = torch.zeros(
        (), device=device
    )  # a tensor: a float would recompile at every step
    history = []  # (3,) a step: loss, unweighted mse, gradient norm; on the device until the log line
    began = logged = time.perf_counter()
    for step in tqdm(
        range(start, total),
        initial=start,
        total=total,
        disable=None if rank == 0 else True,
        leave=False,
    ):
        if step and cfg.knn_every and step % (cfg.knn_every * steps_per_epoch) == 0:
            evaluate(step)
            logged = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(
                step, total, cfg.warmup_epochs * steps_per_epoch, cfg.lr
            )
        tau.fill_(tau_at(step, total, cfg))
        all_noise = mask_noise(cfg.seed, step, cfg.batch_size, cfg.grid)
        losses = torch.zeros(2, device=device)
        for micro in range(cfg.accum):
            share = slice(
                (micro * world + rank) * micro_size,
                (micro * world + rank + 1) * micro_size,
            )
            imgs, attn, noise = prepare(next(feed), all_noise[share], maps, cfg, device)
            local = (
                world > 1 and micro + 1 < cfg.accum
            )  # gradients travel with the last micro-batch
            with ddp.no_sync() if local else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss, pred, mask = ddp(
                        imgs, attn, tau, cfg.mask_ratio, noise, normalize_attn=False
                    )
                scaler.scale(loss / cfg.accum).backward()
            mse = loss.detach()
            if (
                attn is not None
            ):  # the loss of a vanilla MAE, to compare with; the weighted one depends on tau
                mse = attg_loss(
                    pred.detach(),
                    imgs,
                    mask,
                    norm_pix=cfg.norm_pix,
                    patch_size=cfg.patch_size,
                )
            losses += torch.stack([loss.detach(), mse]) / cfg.accum
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, cfg.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append(torch.cat([losses, norm[None]]))
        done = step + 1
        epoch, rest = divmod(done, steps_per_epoch)
        if rest and done % cfg.log_every and not (stop and world == 1):
            continue  # nothing so far waits for the device
        history.append(
            torch.tensor([len(stop), len(feed.unreadable), 0.0], device=device) * world
        )
        values = torch.stack(history) / world
        if world > 1:
            dist.all_reduce(values)
        *rows, (stopping, bad, _) = values.tolist()
        history.clear()
        require(
            bad <= len(train_set) / 100,
            f"--data {cfg.data}: over 1 % unreadable, {bad:.0f} so far",
        )
        for at, (loss, mse, norm) in enumerate(rows, done - len(rows)):
            if not math.isfinite(
                loss + mse + (norm if precision != "fp16" else 0.0)
            ):  # fp16's scaler skips such steps
                part = (
                    "gradient"
                    if math.isfinite(loss)
                    else "weight"
                    if math.isfinite(mse)
                    else "prediction or input"
                )
                ids = batches.indices(at).tolist()
                say("", {"step": at + 1, "not_finite": part, "indices": ids})
                words = f"{part} not finite; images {ids[:9]} ... (all in log.jsonl). Checkpoints are from before"
                raise ValueError(
                    f"step {at + 1}: {words}. Try a lower --lr, --clip_grad 1 or --precision fp32"
                )
        now = time.perf_counter()
        rate = 1 / (now - logged)
        finite = ([*filter(math.isfinite, x)] for x in zip(*rows, strict=True))
        loss, mse, norm = (sum(x) / max(1, len(x)) for x in finite)
        record = {
            "step": done,
            "epoch": done / steps_per_epoch,
            "loss": loss,
            "mse": mse,
            "grad_norm": norm,
        }
        record |= {
            "lr": group["lr"],
            "tau": tau.item(),
            "skipped": sum(not math.isfinite(x[2]) for x in rows),
        }
        record |= {
            "img_s": len(rows) * cfg.batch_size * rate,
            "data_wait": feed.waited * rate,
            "unreadable": int(bad),
        }
        eta = datetime.timedelta(
            seconds=round((total - done) * (now - began) / (done - start))
        )
        odd = [f" {k} {record[k]}" for k in ("skipped", "unreadable") if record[k]]
        say(LINE.format(**record, total=total, eta=eta) + "".join(odd), record)
        feed.waited, logged = 0.0, now
        if rank == 0 and (
            stopping or done == total or (rest == 0 and epoch % cfg.save_every == 0)
        ):
            states = {name: part.state_dict() for name, part in state.items()}
            save_checkpoint(
                out / "last.pt", **states, step=done, config=dataclasses.asdict(cfg)
            )
        if stopping and done < total:
            say(f"stopped by a signal after step {done}; the same command continues")
            return {
                "step": done,
                "knn": {},
                "out": str(out),
                "stopped": (stop or [signal.SIGTERM])[0],
            }
        if rest == 0:
            feed.unreadable.clear()

    knn = evaluate(total)
    if rank == 0:
        weights = {k: v for k, v in model.state_dict().items() if not DECODER.match(k)}
        save_checkpoint(
            out / "encoder.pt", model=weights, config=dataclasses.asdict(cfg)
        )
        save_reconstructions(out / "reconstructions.png", model, train_set, maps)
    say(f"pictures: {out / 'reconstructions.png'}, encoder: {out / 'encoder.pt'}")
    return {"step": total, "knn": knn, "out": str(out), "stopped": None}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in dataclasses.fields(Config):
        kind = {"type": (typing.get_args(f.type) or (f.type,))[0]}  # int | None -> int
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        parser.add_argument(f"--{f.name}", **kind | {"default": f.default} | f.metadata)
    return train(Config(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    try:
        stopped = main()["stopped"]
    except (ValueError, OSError) as error:
        sys.exit(f"attg_mae.py: error: {error}")
    sys.exit(128 + stopped if stopped else 0)
