"""
Attention-guided masked autoencoders (Sick, Engel, Hermosilla, Ropinski; arXiv 2402.15172)
in one file, to be read from top to bottom.

A masked autoencoder (MAE; He et al., arXiv 2111.06377) hides 75 % of the patches of an
image and learns to predict them from the others; every hidden patch counts the same.
Here each counts by an attention map M of the object in the image, which was found
without labels ahead of training (object_discovery.py). Masking stays random.

    M_norm = (M - min M) / (max M - min M)
    w      = exp(M_norm / tau)                               Eq. 1
    l      = mean over the values of a patch of (pred - x_norm)^2
    loss   = sum(mask * w * l) / sum(mask)                   Eq. 2

x_norm is the patch normalized by its own mean and deviation. The background (M_norm = 0)
has weight 1, as in MAE. tau starts at 0.75 and rises: guidance is strongest at first.
A map is computed on the whole picture and min-max normalized there, once, before
training. Each step crops and flips it with the picture and averages it over each patch.
(--map_norm crop normalizes the crop, as the paper's Algorithm 1 reads.)

The method is masked_loss, crop_maps, guide and tau_at; train_step joins them. The rest
is MAE: its model, its schedules, a training loop.

    python attg_mae.py                        # the embedded toy set, a CPU, some minutes
    python attg_mae.py --data path/to/images --maps maps.npy --model vit_small --accum 16
    torchrun --nproc_per_node=8 attg_mae.py --model vit_large --data DIR --maps maps.npy
    python attg_mae.py --init WEIGHTS --model vit_large --data DIR --epochs 0    # pictures

The run folder (--out) receives config.json, log.jsonl, last.pt, encoder.pt, curves.png
and reconstructions.png. The same command continues an interrupted run.

Shapes, in the comments behind the lines: B images, L patches in an image, K of them kept
(visible), N = 1 + L tokens, D width (of encoder or decoder), p patch size, P = p*p*C
values in a patch. mask is (B, L): 1 = removed = predicted.
"""

if __name__ == "__main__":
    # Ctrl-C during the imports, which take seconds, needs no traceback.
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import contextlib
import dataclasses
import functools
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import roi_align

from attg.checkpoint import load_checkpoint, load_state, save_checkpoint
from attg.cli import check_numbers, check_types, count_or_auto, end, parse_settings
from attg.distributed import TIMEOUT, processes, stop_signals
from attg.features import extract_features, knn_classify
from attg.figures import save_reconstructions
from attg.images import MAX_PIXELS
from attg.kernels import attg_loss, is_flat, normalize_map
from attg.loader import to_device
from attg.seeding import generator_for, seed_for
from attg.trainer import Run
from attg.weights import DECODER, config_from_checkpoint, load_weights, read_weights

# For `from attg_mae import ...`, those of other files included.
__all__ = ["MAE", "Config", "ViT", "build_model", "extract_features", "knn_classify"]
__all__ += ["load_checkpoint", "load_encoder", "save_checkpoint", "train"]

# -- Configuration ---------------------------------------------------------------------

# ViT-L with MAE's decoder and schedule. The other presets say how they differ from it.
MAE_DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
MAE_SCHEDULE = {"epochs": 800, "batch_size": 4096, "blr": 1.5e-4}
VIT_LARGE = {"img_size": 224, "patch_size": 16, "width": 1024, "depth": 24, "heads": 16}
VIT_LARGE |= MAE_DECODER | MAE_SCHEDULE

SMALL_DECODER = {"decoder_width": 256, "decoder_depth": 4, "decoder_heads": 8}
TINY_DECODER = {"decoder_width": 192, "decoder_depth": 4, "decoder_heads": 3}
# For pictures of 32 pixels, and for minutes on a CPU.
VIT_MICRO = {"img_size": 32, "patch_size": 4, "width": 128, "depth": 4, "heads": 4}
VIT_MICRO |= {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
VIT_MICRO |= {"epochs": 8, "batch_size": 64, "blr": 6e-3}

PRESETS = {
    "vit_micro": VIT_MICRO,
    "vit_tiny": VIT_LARGE | {"width": 192, "depth": 12, "heads": 3} | TINY_DECODER,
    "vit_small": VIT_LARGE | {"width": 384, "depth": 12, "heads": 6} | SMALL_DECODER,
    "vit_base": VIT_LARGE | {"width": 768, "depth": 12, "heads": 12},
    "vit_large": VIT_LARGE,
    "vit_huge": VIT_LARGE | {"width": 1280, "depth": 32, "patch_size": 14},
}
GUIDANCE = ("attg", "none", "inverted", "foreground", "background", "input_masking")
PRECISION = ("auto", "fp32", "bf16", "fp16")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def flag(default, text, **more):
    """A setting and its help, which says in brackets what stands in for None."""
    if default is not None:
        text += " [%(default)s]"
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class Config:
    """Every setting of a run. The command line is generated from it."""

    model: str = flag("vit_micro", "preset of the model", choices=tuple(PRESETS))
    data: str = flag("toy", "toy, a torchvision name, or a folder of images")
    maps: str | None = flag(None, "attention maps, .npy beside its .json [toy's own]")
    out: str | None = flag(None, "run folder [out/DATA-MODEL-GUIDANCE]")
    # The method
    guidance: str = flag(
        "attg", "attg = the paper, none = MAE, or an ablation", choices=GUIDANCE
    )
    map_norm: str = flag("image", "min, max are those of", choices=("image", "crop"))
    tau: float = flag(0.75, "temperature at the start (paper)")
    tau_end: float = flag(1.0, "temperature at the end (ours; the paper names none)")
    tau_schedule: str = flag(
        "cosine", "how tau goes to its end", choices=("cosine", "constant")
    )
    mask_ratio: float = flag(0.75, "share of patches removed")
    norm_pix: bool = flag(True, "predict patches normalized by their mean and variance")
    # The schedule
    epochs: int | None = flag(None, "passes over the data [800; vit_micro 8]")
    batch_size: int | None = flag(
        None, "images in a step, all processes [4096; micro 64]"
    )
    accum: int | str | None = flag(
        None,
        "micro-batches a step is split into, to save memory; auto tries how many it needs "
        "[auto on a GPU, but for toy; else 1]",
        type=count_or_auto,
    )
    blr: float | None = flag(None, "lr = blr * batch_size / 256 [1.5e-4; micro 6e-3]")
    lr: float | None = flag(None, "learning rate at its peak, instead of blr")
    warmup_epochs: float | None = flag(
        None, "linear warm-up [40 from 400 epochs on (MAE), 5 %% of fewer]"
    )
    weight_decay: float = flag(0.05, "of AdamW, not on biases and norms")
    clip_grad: float = flag(0.0, "largest gradient norm, 0 = no clipping (MAE)")
    # The model, where it is not the preset's
    img_size: int | tuple | None = flag(
        None, "side of the input in pixels, or height and width", type=int, nargs="+"
    )
    patch_size: int | None = flag(None, "patch size in pixels")
    in_chans: int = flag(3, "channels: 3, or 1 for grey with one --mean and --std")
    width: int | None = flag(None, "encoder width")
    depth: int | None = flag(None, "encoder blocks")
    heads: int | None = flag(None, "encoder heads")
    decoder_width: int | None = flag(None, "decoder width")
    decoder_depth: int | None = flag(None, "decoder blocks")
    decoder_heads: int | None = flag(None, "decoder heads")
    # The pictures
    mean: tuple = flag(
        IMAGENET_MEAN, "channel means of the input", type=float, nargs="+"
    )
    std: tuple = flag(IMAGENET_STD, "channel deviations", type=float, nargs="+")
    classes: str | None = flag(None, "file with the class folders to keep, one a line")
    max_pixels: int = flag(MAX_PIXELS, "a picture with more is unreadable")
    # The machine
    precision: str = flag(
        "auto", "auto = the fastest that serves, by device and width", choices=PRECISION
    )
    compile: bool = flag(False, "torch.compile the model")
    device: str | None = flag(None, "cuda, mps or cpu [the first there is]")
    workers: int | None = flag(None, "loader processes of each [CPU 0, GPU up to 16]")
    seed: int = flag(0, "decides weights, order, augmentation and masks")
    # Files
    init: str | None = flag(
        None, "weights to start from: ours, MAE's, timm's, HF's, DINO's"
    )
    resume: str = flag(
        "auto", "auto = from OUT/last.pt if there, none = anew, or a file"
    )
    eval_every: int = flag(
        0, "epochs between evaluations, k-NN and val_mse (0 = at the end only)"
    )
    save_every: int = flag(1, "epochs between checkpoints")
    keep_ckpt_every: int = flag(
        0, "epochs between those that are kept (0 = the last only)"
    )
    log_every: int = flag(20, "steps between log lines")
    timeout: float = flag(TIMEOUT, "minutes after which a silent process is given up")

    def __post_init__(self):
        check_types(self)
        self.fill_in()
        self.check()
        self.derive()

    def fill_in(self):
        """What was not given: the preset's, or what follows from other settings."""
        if self.model not in PRESETS:
            raise ValueError(f"--model {self.model}: choose from {', '.join(PRESETS)}")
        defaults = dict(PRESETS[self.model])
        if self.data == "toy" and self.model != "vit_micro":
            # Enlarged to 224 pixels it only shows that everything runs.
            defaults |= {"epochs": 1, "batch_size": 64}
        data = Path(self.data).resolve().name
        defaults["out"] = f"out/{data}-{self.model}-{self.guidance}"
        if self.lr is not None:
            del defaults["blr"]
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.accum is None:
            on_gpu = torch.cuda.is_available() and "cuda" in (self.device or "cuda")
            self.accum = "auto" if on_gpu and self.data != "toy" else 1
        if self.warmup_epochs is None:
            # 40 epochs, however long the run, is MAE's; short ones would be all warm-up.
            self.warmup_epochs = 40 if self.epochs >= 400 else 0.05 * self.epochs
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if not isinstance(self.img_size, int) and len(self.img_size) == 1:
            (self.img_size,) = self.img_size

    def check(self):
        """ValueError names the flag, the value and the remedy."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value not in choices:
                words = ", ".join(choices)
                raise ValueError(f"--{field.name} {value}: choose from {words}")
        check_numbers(dataclasses.asdict(self))  # attg/cli.py has the ranges
        if len(self.size) != 2:
            raise ValueError(f"--img_size {self.size}: a side, or height and width")
        (h, w), p = self.size, self.patch_size
        if h % p or w % p:
            raise ValueError(
                f"--img_size {h}x{w} is not divisible by --patch_size {p}; use a multiple"
            )
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % heads or width % 4:
                raise ValueError(
                    f"--{part}width {width}: must be divisible by 4 and by "
                    f"--{part}heads {heads}"
                )
        L = math.prod(self.grid)
        if not 0 < int(L * (1 - self.mask_ratio)) < L:
            raise ValueError(
                f"--mask_ratio {self.mask_ratio}: must keep and remove at least one of "
                f"{L} patches"
            )

    def derive(self):
        """lr from blr, or blr from lr."""
        scale = self.batch_size / 256
        if self.lr is None:
            self.lr = self.blr * scale
        elif self.blr is not None and not math.isclose(self.lr, self.blr * scale):
            raise ValueError(
                f"--lr {self.lr} and --blr {self.blr}: do not agree; give one of them"
            )
        self.blr = self.lr / scale

    @property
    def size(self):
        """(height, width) of the input in pixels."""
        if isinstance(self.img_size, int):
            return (self.img_size, self.img_size)
        return tuple(self.img_size)

    @property
    def grid(self):
        """(rows, columns) of patches."""
        return tuple(side // self.patch_size for side in self.size)


# -- Model: MAE's ViT, with its parameter names ----------------------------------------


def patchify(imgs, p):
    """(B, C, H, W) -> (B, L, P), the values of a patch in the order (p, p, C)."""
    x = imgs.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
    x = torch.einsum("bchpwq->bhwpqc", x)  # (B, h, w, p, p, C)
    return x.flatten(1, 2).flatten(2)


def take(x, ids):
    """The rows ids (B, K) of x (B, L, D): (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def normalize(imgs, cfg):
    """uint8 (B, C, H, W) -> fp32, (x / 255 - mean) / std."""
    mean, std = channels(cfg.mean, imgs.device), channels(cfg.std, imgs.device)
    return (imgs / 255 - mean) / std


# Cached, because making a tensor of a list waits for the GPU.
@functools.cache
def channels(values, device):
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def sincos_table(dim, grid):
    """Fixed positions (1 + L, dim), zeros for the class token.

    The first half of the channels encodes the column, the second the row (MAE).
    """
    exponent = torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
    omega = 10000.0**-exponent  # (dim/4,)
    rows = torch.arange(grid[0], dtype=torch.float64)
    columns = torch.arange(grid[1], dtype=torch.float64)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    x = column.reshape(-1, 1) * omega  # (L, dim/4)
    y = row.reshape(-1, 1) * omega
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (L, dim)
    return torch.cat([torch.zeros(1, dim), table.float()])  # (1 + L, dim)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_qkv(self, x):
        """Tokens (B, N, D) -> q, k, v, each (B, heads, N, D/heads)."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        q, k, v = self.split_qkv(x)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = OrderedDict()
        layers["fc1"] = nn.Linear(dim, 4 * dim)
        layers["act"] = nn.GELU()
        layers["fc2"] = nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(layers)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The encoder. Its weights come from MAE below, or from a file (load_encoder)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        p, D = cfg.patch_size, cfg.width
        # A convolution by name, for the weights of others; embed applies it.
        projection = nn.Conv2d(cfg.in_chans, D, kernel_size=p, stride=p)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        positions = sincos_table(D, cfg.grid)[None]  # (1, N, D)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(*[Block(D, cfg.heads) for _ in range(cfg.depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def normalize(self, imgs):
        """uint8 (B, C, H, W) -> the normalized floats that the other methods take."""
        return normalize(imgs, self.cfg)

    def patchify(self, imgs):
        """(B, C, H, W) -> (B, L, P), the values of a patch in the order (p, p, C)."""
        expected = (self.cfg.in_chans, *self.cfg.size)
        if tuple(imgs.shape[1:]) != expected:
            raise ValueError(
                f"imgs: got {tuple(imgs.shape)}; this model takes (B, *{expected})"
            )
        return patchify(imgs, self.cfg.patch_size)

    def unpatchify(self, patches):
        """(B, L, P) -> (B, C, H, W)."""
        (h, w), p = self.cfg.grid, self.cfg.patch_size
        x = patches.reshape(-1, h, w, p, p, self.cfg.in_chans)
        x = torch.einsum("bhwpqc->bchpwq", x)  # (B, C, h, p, w, p)
        return x.reshape(-1, self.cfg.in_chans, h * p, w * p)

    def embed(self, patches, ids_keep=None):
        """Patches (B, L, P) -> tokens (B, N, D) of all patches with their positions.

        With ids_keep (B, K): those of the visible patches alone, (B, 1 + K, D).
        """
        B = len(patches)
        positions = self.pos_embed[:, 1:].expand(B, -1, -1)  # (B, L, D)
        if ids_keep is not None:
            patches = take(patches, ids_keep)  # (B, K, P)
            positions = take(positions, ids_keep)  # (B, K, D)
        # The convolution as a matrix product, so that only visible patches pay for it.
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P)
        x = F.linear(patches, weight, proj.bias) + positions
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        return torch.cat([cls_token, x], dim=1)

    def forward_encoder(self, patches, ids_keep=None):
        """As embed, after all blocks and the last norm."""
        return self.norm(self.blocks(self.embed(patches, ids_keep)))

    def forward_features(self, imgs):
        """Images (B, C, H, W) -> tokens (B, N, D), nothing masked.

        [:, 0] is the class token.
        """
        return self.forward_encoder(self.patchify(imgs))

    def last_qkv(self, imgs):
        """q, k, v of the last block, each (B, heads, N, D/heads), for attention maps."""
        x = self.blocks[:-1](self.embed(self.patchify(imgs)))
        last = self.blocks[-1]
        return last.attn.split_qkv(last.norm1(x))


class MAE(ViT):
    """The encoder, and the decoder that predicts the hidden patches."""

    def __init__(self, cfg):
        super().__init__(cfg)
        D = cfg.decoder_width
        self.decoder_embed = nn.Linear(cfg.width, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        positions = sincos_table(D, cfg.grid)[None]  # (1, N, D)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        blocks = [Block(D, cfg.decoder_heads) for _ in range(cfg.decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, cfg.patch_size**2 * cfg.in_chans)
        self.initialize_weights()

    def initialize_weights(self):
        """Encoder and decoder as in MAE."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The convolution counts as the linear layer that it is in embed.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.cfg.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def random_masking(self, noise, mask_ratio):
        """noise (B, L): its lowest values stay visible -> ids_keep (B, K), mask (B, L)."""
        K = int(noise.shape[1] * (1 - mask_ratio))
        ids_keep = noise.argsort(dim=1)[:, :K]
        mask = torch.ones(noise.shape, device=noise.device).scatter(1, ids_keep, 0.0)
        return ids_keep, mask

    def forward_decoder(self, latent, ids_keep):
        """Tokens (B, 1 + K, D) of the visible patches -> pred (B, L, P) of all."""
        x = self.decoder_embed(latent)  # (B, 1 + K, D), D now the decoder's
        B, _, D = x.shape
        L = self.decoder_pos_embed.shape[1] - 1
        # Mask tokens everywhere, then the visible ones at their places.
        tokens = self.mask_token.to(x.dtype).expand(B, L, D)
        places = ids_keep[..., None].expand(-1, -1, D)  # (B, K, D)
        tokens = tokens.scatter(1, places, x[:, 1:])
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # (B, N, D)
        # Without the class token from here on: its gradient would be zeros in a copy of
        # pred.
        x = self.decoder_blocks(x)[:, 1:]  # (B, L, D)
        return self.decoder_pred(self.decoder_norm(x))  # (B, L, P)

    def forward(
        self,
        imgs,
        attn=None,
        tau=0.75,
        mask_ratio=0.75,
        noise=None,
        normalize_attn=True,
    ):
        """The loss (Eq. 2), pred (B, L, P) and mask (B, L) of images (B, C, H, W).

        attn (B, L): the map M; with normalize_attn=False, as in training, M_norm, or -inf
        for weight 0; None is MAE.
        tau: float or 0-d tensor. noise (B, L): the lowest stay visible; None is random.
        """
        patches = self.patchify(imgs)  # (B, L, P)
        B, L, _ = patches.shape
        if noise is None:
            noise = torch.rand(B, L, device=imgs.device)
        if attn is not None and tuple(attn.shape) != (B, L):
            raise ValueError(
                f"attn: got {attn.dtype} of shape {tuple(attn.shape)}; pass one value for "
                f"each patch of pred, shape {(B, L)}"
            )
        if not torch.is_tensor(tau) and not 0 < tau < math.inf:
            raise ValueError(f"tau: got {tau!r}; pass a finite number above 0")
        ids_keep, mask = self.random_masking(noise, mask_ratio)
        latent = self.forward_encoder(patches, ids_keep)  # (B, 1 + K, D)
        pred = self.forward_decoder(latent, ids_keep)  # (B, L, P)
        if attn is not None and normalize_attn:
            attn = normalize_map(attn)
        loss = masked_loss(pred, patches, mask, attn, tau, self.cfg.norm_pix)
        return loss, pred, mask


build_model = MAE  # the name that other programs call


# -- Loss ------------------------------------------------------------------------------


def masked_loss(pred, patches, mask, m_norm=None, tau=0.75, norm_pix=True, fused=None):
    """The loss of the paper from pred and patches (B, L, P), mask and m_norm (B, L).

    m_norm None is the loss of MAE; -inf is weight 0. norm_pix: the target is each patch
    normalized by its own mean and variance. fused, the default on a GPU: the same by the
    kernels of kernels/attg_loss.py. The lines below define it, and are what a CPU runs.
    """
    if fused is None:
        fused = pred.is_cuda
    if fused:
        options = {"tau": tau, "norm_pix": norm_pix, "normalize_attn": False}
        return attg_loss(pred, patches, mask, m_norm, **options)

    # In fp32 at least, whatever the precision of the model.
    dtype = torch.promote_types(pred.dtype, torch.float32)
    hidden = mask.bool()
    # What the model says of visible patches does not count, not even if it is NaN.
    pred = torch.where(hidden[..., None], pred.to(dtype), 0.0)
    target = patches.to(dtype)
    if norm_pix:
        P = patches.shape[-1]
        centred = target - target.mean(dim=-1, keepdim=True)
        variance = centred.square().sum(dim=-1, keepdim=True) / (P - 1)
        target = centred / (variance + 1e-6).sqrt()
    error = (pred - target).square().mean(dim=-1)  # (B, L)
    weight = 1.0
    if m_norm is not None:
        weight = torch.exp(m_norm.to(dtype) / tau)  # Eq. 1
    weighted = torch.where(hidden, weight * error, 0.0)  # mask * w * l
    return weighted.sum() / mask.sum().clamp(min=1)  # Eq. 2


# -- Guidance: from the map of a picture to the weights of the patches of a crop -------


def pool_maps(maps, box, flip, grid):
    """Mean of the maps (B, h, w) of whole pictures under each patch of their crops.

    box (B, 4): the crop x0, y0, x1, y1 as fractions of width and height; flip (B,) bool:
    mirrored after it. Returns (B, L) fp32.
    """
    B, h, w = maps.shape
    index = torch.arange(B, device=maps.device)  # which map a box belongs to
    x0, y0, x1, y1 = box.unbind(1)
    rois = torch.stack([index, x0 * w, y0 * h, x1 * w, y1 * h], dim=1).float()
    # aligned: without it all is off by half a cell. sampling_ratio -1: as many samples
    # as a patch covers cells of the map.
    pooled = roi_align(
        maps.float()[:, None], rois, grid, sampling_ratio=-1, aligned=True
    )  # (B, 1, rows, columns)
    mirrored = pooled.flip(-1)
    return torch.where(flip[:, None, None, None], mirrored, pooled).flatten(1)


def crop_maps(maps, box, flip, cfg):
    """M_norm (B, L) of a batch of crops, and flat (B,): constant maps, of no object.

    maps (B, h, w) were min-max normalized over their whole pictures when the map file
    was written, so their means under the patches are M_norm, and a crop without the
    object keeps weights near 1. --map_norm crop normalizes anew over the patches of the
    crop, as Algorithm 1 reads.
    """
    m = pool_maps(maps, box, flip, cfg.grid)  # (B, L)
    if cfg.map_norm == "crop":
        return normalize_map(m), is_flat(m)
    return m, is_flat(maps.flatten(1))


def guide(m, noise, flat, guidance, ties=None):
    """What M_norm, m (B, L), does to a step: (attn, noise), w = exp(attn / tau).

    attn None is weight 1, -inf weight 0. noise (B, L) decides the mask. The patches of
    flat maps (B,) have weight 1 in every mode. attg is the method, the others are the
    paper's ablations (Table 10). foreground drops what is below the 10 % quantile of
    M_norm, background of 1 - M_norm; of patches that tie there, those of lowest ties
    (B, L), None is random. Not those of lowest noise: all of them would be visible.
    """
    if guidance == "none":
        return None, noise
    if guidance == "input_masking":
        # The highest patches are hidden.
        return None, ranks(m.masked_fill(flat[:, None], 0.0), noise).to(noise.dtype)
    if guidance in ("inverted", "background"):
        m = 1 - m
    if guidance in ("foreground", "background"):
        if ties is None:
            ties = torch.rand_like(m)
        # So many are below the quantile where none tie.
        below = math.ceil((m.shape[1] - 1) / 10)
        m = m.masked_fill(ranks(m, ties) < below, -math.inf)
    return m.masked_fill(flat[:, None], 0.0), noise


def ranks(m, ties):
    """Of each patch by its m (B, L), from 0 for the lowest; equal ones by their ties."""
    order = ties.argsort(dim=1)
    by_map = m.gather(1, order).argsort(dim=1, stable=True)
    return order.gather(1, by_map).argsort(dim=1)


# -- Schedules and optimiser -----------------------------------------------------------


def tau_at(step, total_steps, cfg):
    """Temperature of Eq. 1: a half-cycle cosine from cfg.tau up to cfg.tau_end."""
    if cfg.tau_schedule == "constant":
        return cfg.tau
    rise = cfg.tau_end - cfg.tau
    return cfg.tau + rise * (1 - math.cos(math.pi * step / total_steps)) / 2


def lr_at(step, total_steps, warmup_steps, lr):
    """Linear warm-up from 0, then a half-cycle cosine down to 0 (MAE)."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return lr * (1 + math.cos(angle)) / 2


def param_groups(model, weight_decay):
    """For AdamW: no weight decay on biases and norms (MAE); fixed positions are in none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() > 1]
    no_decay = [p for p in trained if p.dim() <= 1]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


# -- One step of training --------------------------------------------------------------


def model_inputs(batch, cfg, ties=None):
    """What the model takes: imgs (B, C, H, W), attn (B, L) or None, noise (B, L).

    batch: random crops on the device, as image (B, C, H, W) uint8, not flipped yet; maps
    (B, h, w) of the whole pictures, or None for a vanilla MAE; box (B, 4) and flip (B,)
    as in pool_maps; noise (B, L), which decides the mask unless guide replaces it.
    ties: see guide.
    """
    mirrored = batch.image.flip(-1)
    image = torch.where(batch.flip[:, None, None, None], mirrored, batch.image)
    imgs = normalize(image, cfg)
    if batch.maps is None:
        return imgs, None, batch.noise
    m_norm, flat = crop_maps(batch.maps, batch.box, batch.flip, cfg)  # (B, L), (B,)
    attn, noise = guide(m_norm, batch.noise, flat, cfg.guidance, ties)
    return imgs, attn, noise


def train_step(model, optimizer, scaler, batches, tau, cfg, dtype=None, ties=None):
    """One optimisation step: Algorithm 1 of the paper, over cfg.accum micro-batches.

    tau: 0-d tensor. dtype: of autocast, None is fp32. scaler: for fp16, else it does
    nothing. ties (accum, B, L): see guide. Returns (3,) on the device: loss, unweighted
    error, gradient norm.
    """
    losses = torch.zeros(2, device=tau.device)
    for number, batch in enumerate(batches, start=1):
        own_ties = None if ties is None else ties[number - 1]
        imgs, attn, noise = model_inputs(batch, cfg, own_ties)
        # Processes exchange gradients once a step, with the last micro-batch.
        wait = number < cfg.accum and isinstance(model, DistributedDataParallel)
        with model.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(tau.device.type, dtype, enabled=dtype is not None):
                loss, pred, mask = model(
                    imgs,
                    attn,
                    tau=tau,
                    mask_ratio=cfg.mask_ratio,
                    noise=noise,
                    normalize_attn=False,  # crop_maps has done it
                )
            scaler.scale(loss / cfg.accum).backward()
        loss = loss.detach()
        mse = loss
        if attn is not None:
            # The unweighted loss, to compare runs by: the weighted one depends on tau.
            patches = patchify(imgs, cfg.patch_size)
            mse = masked_loss(pred.detach(), patches, mask, norm_pix=cfg.norm_pix)
        losses += torch.stack([loss, mse]) / cfg.accum

    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return torch.cat([losses, norm[None]])


# -- The run ---------------------------------------------------------------------------

# Settings of a run that is continued: FIXED must be the same, FREE may always differ,
# the others (lr, tau ...) may differ as long as it has not ended.
FIXED = {"patch_size", "img_size", "in_chans", "width", "depth", "heads"}
FIXED |= {"decoder_width", "decoder_depth", "decoder_heads"}
FIXED |= {"data", "classes", "batch_size", "seed"}
FREE = {"out", "precision", "compile", "device", "workers", "resume"}
FREE |= {
    "eval_every",
    "save_every",
    "keep_ckpt_every",
    "log_every",
    "max_pixels",
    "timeout",
}


def train(cfg, data=None):
    """Pre-trains a model and writes the run folder, cfg.out.

    data: pictures of your own, of which cfg.data is the name then: a map-style data set
    of (PIL picture, label), a label being an int or None, or {"train": one, "test":
    another}; see open_data in attg/datasets.py.

    One process, or one of several if torchrun's environment says so. Returns {"step":
    the last one, "val_mse": error on the test split if there is one, "knn": {feature:
    top-1 in percent} if there are labels, "out": the folder, "stopped": the signal that
    ended the run early, or None}.
    """
    cfg = dataclasses.replace(cfg)  # the run settles what is "auto"
    with (
        stop_signals() as signals,
        processes(cfg.device, cfg.timeout) as (device, rank, world),
        # Pictures, log, checkpoints, k-NN: nothing of the method (attg/trainer.py).
        Run(cfg, device, rank, world, signals, data) as run,
    ):
        checkpoint = run.find_checkpoint(FIXED, FREE)
        model = first_model(cfg, checkpoint, run.log).to(device)
        if cfg.epochs == 0:
            draw(model, run)
            return run.result(step=0)

        groups = param_groups(model, cfg.weight_decay)
        run.resolve_accum(model)
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        run.begin(model, optimizer, scaler, checkpoint)
        if cfg.compile:
            model.compile()
        parallel = DistributedDataParallel(model) if world > 1 else model
        # A tensor: under torch.compile a float would recompile at every step.
        tau = torch.zeros((), device=device)

        for step in run.steps():
            if run.evaluation_is_due(step):
                run.evaluate(step)
            lr = lr_at(step, run.total_steps, run.warmup_steps, cfg.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            tau.fill_(tau_at(step, run.total_steps, cfg))
            batches, ties = micro_batches(step, run), tie_breaks(step, run)
            values = train_step(
                parallel, optimizer, scaler, batches, tau, cfg, run.dtype, ties
            )
            if run.after(step + 1, values, lr, tau):
                return run.stopped(step + 1)

        result = run.finish()
        draw(model, run)
        return result


def first_model(cfg, checkpoint, log):
    """The model before its first step: of the checkpoint, --init or --seed."""
    torch.manual_seed(seed_for("weights", cfg.seed))
    model = build_model(cfg)
    if checkpoint:
        load_state(model, checkpoint["model"], checkpoint["path"])
    elif cfg.init:
        weights = read_weights(cfg.init)[0]
        words = load_weights(model, weights, cfg.init, sincos_table)
        log.say(f"--init {cfg.init}: {words}")
    return model


def mask_noise(seed, step, batch_size, grid, use="masks"):
    """(batch_size, L) uniform noise of the global batch of a step.

    A function of seed and step: any number of processes draws the same, and there is no
    state of a generator to save. Another use gets another draw.
    """
    generator = generator_for(use, seed, step)
    return torch.rand(batch_size, math.prod(grid), generator=generator)


def micro_batches(step, run):
    """The cfg.accum Batches of a step that are this process's, from the loader.

    Each takes its rows of the global batch's noise as it takes its pictures, so that
    processes and accumulation change nothing.
    """
    cfg = run.cfg
    noise = mask_noise(cfg.seed, step, cfg.batch_size, cfg.grid)
    for mine in run.share(noise):
        yield to_device(next(run.feed), mine, run.maps, run.device)


def tie_breaks(step, run):
    """(accum, B, L) for guide, the rows of micro_batches; None if it needs none."""
    cfg = run.cfg
    if cfg.guidance not in ("foreground", "background"):
        return None
    ties = mask_noise(cfg.seed, step, cfg.batch_size, cfg.grid, use="ties")
    return run.share(ties).to(run.device)


def draw(model, run):
    """reconstructions.png: examples of the training set, with their maps if any."""
    path = run.out / "reconstructions.png"
    if run.rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        examples = run.examples()
        noise = mask_noise(run.cfg.seed, 0, len(examples.index), run.cfg.grid)
        batch = to_device(examples, noise, run.maps, run.device)
        # The map as it is, whatever an ablation makes of it.
        cfg = dataclasses.replace(run.cfg, guidance="attg", map_norm="image")
        imgs, m_norm, noise = model_inputs(batch, cfg)
        save_reconstructions(path, model, imgs, m_norm, noise)
    run.log.say(f"pictures: {path}")


# -- Weights from files ----------------------------------------------------------------


def load_encoder(path_or_state_dict, heads=None, img_size=None):
    """A ViT in eval mode from a file of this project, MAE, DINO, timm or Hugging Face.

    Its .cfg.mean and .cfg.std are ImageNet's unless the file says otherwise (many of
    timm's and HF's ViTs want 0.5 and 0.5). heads: for widths that are no standard ViT's.
    img_size: int or (height, width), if not that of the weights: sin-cos positions are
    made anew, learned ones resized. ValueError if there is no such encoder in the file.
    """
    state, stored, name = read_weights(path_or_state_dict)
    cfg = config_from_checkpoint(Config, stored, state, name, heads)
    if img_size:
        cfg = dataclasses.replace(cfg, img_size=img_size)
    model = ViT(cfg)
    encoder = {key: value for key, value in state.items() if not DECODER.match(key)}
    load_weights(model, encoder, name, sincos_table)
    return model.eval()


# -- Command line ----------------------------------------------------------------------


def main(argv=None):
    """Trains as the flags say; returns what `train` does."""
    return train(parse_settings(Config, __doc__, argv))


if __name__ == "__main__":
    end(main, memory="raise --accum, which changes nothing else, or lower --batch_size")
