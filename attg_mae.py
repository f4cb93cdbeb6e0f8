"""
Attention-guided masked autoencoders (Sick, Engel, Hermosilla, Ropinski; arXiv 2402.15172)
in one file, to be read from top to bottom.

A masked autoencoder (MAE; He et al., arXiv 2111.06377) hides 75 % of the patches of an
image and learns to predict them from the rest; in its loss every masked patch counts the
same. Here each patch is weighted by an attention map M of the object in the image, which
is computed without labels before training (object_discovery.py). Masking stays random.

    M_norm = (M - min M) / (max M - min M)       over the image      normalize_map
    w      = exp(M_norm / tau)                              Eq. 1    patch_weights
    l      = mean((pred - x_norm)^2) over each patch
    loss   = sum(mask * w * l) / sum(mask)                  Eq. 2    masked_loss

x_norm is the patch normalized by its own mean and standard deviation. The background
(M_norm = 0) has weight 1, as in MAE. tau rises from 0.75 to 1.0, so guidance is strongest
at first. Map files hold M_norm of whole images, computed once when they are written.

    python attg_mae.py --demo                 # three steps on random images, in seconds
    python attg_mae.py                        # the embedded toy set, on a CPU in minutes
    python attg_mae.py --data path/to/images --maps maps.npy --model vit_small
    torchrun --nproc_per_node=8 attg_mae.py --model vit_large --data DIR --maps maps.npy

The second command ends near loss 0.78, mse 0.64 (0.74 on the test split), k-NN 62 % (class
token) and 60 % (patch mean); with --guidance none near 0.64, 0.64, 54 % and 50 %. Seeds
differ by several points. --out receives config.json, log.jsonl, last.pt, encoder.pt,
curves.png and reconstructions.png. The same command resumes an interrupted run.
"""

# Copied alone, this file needs torch and torchvision only, and has everything up to train_step,
# Config and the demo. "mae:", "timm:" and "HF:" in comments give the name of the same thing in
# facebookresearch/mae, timm and Hugging Face; "MAE, Table 1" is the paper's.
#
# Shapes: B images, C channels, L patches in an image, K of them visible, N = 1 + L tokens
# (the class token first), D width of encoder or decoder, p patch size in pixels,
# P = p*p*C values in a patch. mask is (B, L): 1 = masked (mae: removed) = in the loss.

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections import OrderedDict
from types import SimpleNamespace

if __name__ == "__main__":
    # Ctrl-C during the imports, which take seconds, ends without a traceback.
    with contextlib.suppress(ModuleNotFoundError):
        from attg.cli import quiet_sigint_during_import

        quiet_sigint_during_import()

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

# -- The method: M_norm, weights, loss -------------------------------------------------
# Uses of the map (--guidance): the paper, plain MAE, and the ablations of Table 10 (1 - M_norm;
# no weight for the lowest tenth of M_norm, or of 1 - M_norm; hide the highest 75 %). To add
# one, name it here and compute its weights in patch_weights.
GUIDANCE = ("attg", "none", "inverted", "foreground", "background", "input_masking")
# These give weight 0 to about a tenth of the patches, with ties broken at random.
DROPS_PATCHES = ("foreground", "background")


def is_flat(attn):
    """Maps (B, L) -> (B,) bool: no object, as max - min <= 1e-5 max|M|, or <= 1e-30."""
    # amin and amax take a fraction of aminmax's time on a CPU.
    low, high = attn.amin(dim=1), attn.amax(dim=1)
    largest = torch.maximum(high.abs(), low.abs())
    spread = high - low
    # A map with infinite cells is not flat: its loss, NaN, stops the run.
    return (spread <= (1e-5 * largest).clamp(min=1e-30)) & (spread < math.inf)


def normalize_map(attn):
    """M_norm (B, L): each map min-max normalized over all its patches, masked or not."""
    # Training calls it for --map_norm crop; by default the map file holds M_norm. A flat map
    # becomes zeros, weight 1: rounding errors would be stretched to the full range.
    attn = attn.to(torch.promote_types(attn.dtype, torch.float32))
    low, high = attn.amin(dim=1, keepdim=True), attn.amax(dim=1, keepdim=True)
    return torch.where(is_flat(attn)[:, None], 0.0, (attn - low) / (high - low))


def patch_weights(m_norm, tau, guidance="attg", flat=None, ties=None):
    """Weights w (B, L) of the patches from M_norm (B, L); None stands for all ones.

    tau: float or 0-d tensor. guidance: one of GUIDANCE. flat (B,): maps without an
    object, which get weight 1 in every mode. ties (B, L): see patch_order.
    """
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance: got {guidance!r}; pass one of {GUIDANCE}")
    if guidance in ("none", "input_masking"):
        return None
    if guidance in ("inverted", "background"):
        m_norm = 1 - m_norm
    w = torch.exp(m_norm / tau)  # Eq. 1
    if guidance in DROPS_PATCHES:
        # As many as lie below the 10 % quantile of L distinct values: 7 of 64.
        dropped = math.ceil((m_norm.shape[1] - 1) / 10)
        w = w.masked_fill(patch_order(m_norm, ties) < dropped, 0.0)
    if flat is not None:
        w = w.masked_fill(flat[:, None], 1.0)
    return w


def masked_loss(pred, patches, mask, weight=None, norm_pix=True, fused=None):
    """Loss of Eq. 2 from pred and patches (B, L, P), mask and weight (B, L).

    Returns (loss, mse): mse is the loss without weights, detached. Compare runs by mse:
    the loss itself changes with tau. weight None is the loss of MAE.
    """
    # On a GPU kernels/attg_loss.py computes the same; the lines below are the definition.
    if fused is None:
        fused = pred.is_cuda and attg_loss is not None
    if fused:
        # The kernel takes a map and tau, and computes w = exp(map / tau) itself. Given log w
        # and tau = 1 that is w again; weight 0 becomes -inf.
        attn = None if weight is None else weight.log()
        options = {"tau": 1.0, "norm_pix": norm_pix, "normalize_attn": False}
        return attg_loss(pred, patches, mask, attn, return_mse=True, **options)

    # In fp32 at least, whatever the precision of the model.
    dtype = torch.promote_types(pred.dtype, torch.float32)
    masked = mask.bool()
    # Predictions of visible patches do not count, not even if they are NaN.
    pred = torch.where(masked[..., None], pred.to(dtype), 0.0)
    target = patches.to(dtype)
    if norm_pix:
        # Without its brightness and contrast a patch is structure; predicting that gives
        # better features than predicting pixels (MAE, Table 1d).
        centered = target - target.mean(dim=-1, keepdim=True)
        variance = centered.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
        target = centered / (variance + 1e-6).sqrt()  # x_norm
    error = (pred - target).square().mean(dim=-1)  # l, (B, L)
    count = mask.sum().clamp(min=1)
    mse = torch.where(masked, error, 0.0).sum() / count  # MAE's loss
    if weight is None:
        return mse, mse.detach()
    weighted = torch.where(masked, weight.to(dtype) * error, 0.0)  # mask * w * l
    # The denominator is MAE's, so the background counts exactly as without guidance.
    return weighted.sum() / count, mse.detach()  # Eq. 2


# -- Model: MAE's ViT, with its parameter names ----------------------------------------
# timm's VisionTransformer and HF's ViTMAEForPreTraining compute the same; tests compare.
def patchify(imgs, p):
    """(B, C, H, W) -> (B, L, P); values in a patch are ordered (p, p, C), as in mae, HF."""
    x = imgs.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
    x = torch.einsum("bchpwq->bhwpqc", x)  # (B, h, w, p, p, C)
    return x.flatten(1, 2).flatten(2)  # (B, L, P)


def gather_tokens(x, ids):
    """Rows ids (B, K) of x (B, L, D) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def normalize(imgs, cfg):
    """uint8 (B, C, H, W) -> fp32, (x / 255 - mean) / std. ValueError for floats."""
    if imgs.is_floating_point():  # those of torchvision's ToTensor are divided already
        raise ValueError(f"imgs: got {imgs.dtype}; pass uint8, from 0 to 255")
    mean, std = channels(cfg.mean, imgs.device), channels(cfg.std, imgs.device)
    return (imgs / 255 - mean) / std


# Cached, because creating a tensor from a list forces a GPU sync.
@functools.cache
def channels(values, device):
    return torch.tensor(values, device=device).view(-1, 1, 1)


def sincos_table(dim, grid):
    """Fixed position embeddings (1 + L, dim), zeros for the class token.

    The first half of the channels encodes the column, the second the row (mae:
    get_2d_sincos_pos_embed).
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
    # timm: Attention; q, k and v are one matrix. HF keeps three (see attg/weights.py).
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
    # timm: Block, pre-norm, with MAE's eps; mlp.fc1 and mlp.fc2 are its names, too.
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
        # Stored as timm's convolution, so that checkpoints load unchanged.
        projection = nn.Conv2d(cfg.in_chans, D, kernel_size=p, stride=p)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        # The class token has no loss of its own: it learns because patches attend to it in
        # encoder and decoder. The evaluations read it as the feature of the image.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        # Frozen; a parameter as in mae and timm, (1, N, D).
        positions = sincos_table(D, cfg.grid)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.Sequential(*[Block(D, cfg.heads) for _ in range(cfg.depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def normalize(self, imgs):
        """uint8 (B, C, H, W) -> the normalized floats that the other methods take."""
        return normalize(imgs, self.cfg)

    def patchify(self, imgs):
        """(B, C, H, W) -> (B, L, P). ValueError for another image size."""
        C, H, W = self.cfg.in_chans, *self.cfg.size
        if imgs.shape[1:] != (C, H, W) or not imgs.is_floating_point():
            got = f"imgs: got {imgs.dtype} {tuple(imgs.shape)}; pass model.normalize of"
            raise ValueError(f"{got} uint8, or floats (B, {C}, {H}, {W})")
        return patchify(imgs, self.cfg.patch_size)

    def embed(self, patches, ids_keep=None):
        """Patches (B, L, P) -> tokens (B, N, D) with their positions.

        With ids_keep (B, K), only those of the visible patches: (B, 1 + K, D).
        """
        B = len(patches)
        positions = self.pos_embed[:, 1:].expand(B, -1, -1)  # (B, L, D)
        if ids_keep is not None:
            # The encoder never sees mask tokens: it processes a quarter of the tokens, and
            # gets no input in pre-training that is absent afterwards (MAE, Table 1c).
            patches = gather_tokens(patches, ids_keep)  # (B, K, P)
            positions = gather_tokens(positions, ids_keep)  # (B, K, D)
        # timm: PatchEmbed is this matrix product. mae embeds all patches, then drops most.
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P)
        x = F.linear(patches, weight, proj.bias) + positions
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        return torch.cat([cls_token, x], dim=1)

    def forward_encoder(self, patches, ids_keep=None):
        """Patches (B, L, P) -> tokens as from embed, after all blocks and the norm."""
        return self.norm(self.blocks(self.embed(patches, ids_keep)))

    def forward_features(self, imgs):
        """Images (B, C, H, W) -> tokens (B, N, D), class token first, nothing masked."""
        return self.forward_encoder(self.patchify(imgs))

    def last_qkv(self, imgs):
        """q, k, v of the last block, each (B, heads, N, D/heads), for attention maps."""
        x = self.blocks[:-1](self.embed(self.patchify(imgs)))
        last = self.blocks[-1]
        return last.attn.split_qkv(last.norm1(x))


class MAE(ViT):
    """The encoder, and the decoder that predicts the masked patches."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # The decoder is dropped after pre-training. A narrow one is cheap, and leaves
        # recognition to the encoder (MAE, Table 1a and b).
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
        """Initialize encoder and decoder as mae does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Initialize the convolution like the linear layer it is applied as.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.cfg.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def random_masking(self, noise, mask_ratio):
        """noise (B, L): its lowest values stay visible -> ids_keep (B, K), mask (B, L)."""
        # Why 75 %: images are redundant. Fewer masked patches can be interpolated from their
        # neighbors, without learning what the image shows (MAE, Figure 5).
        K = int(noise.shape[1] * (1 - mask_ratio))
        ids_keep = noise.argsort(dim=1)[:, :K]
        # HF: bool_masked_pos is this mask as bool.
        mask = torch.ones(noise.shape, device=noise.device).scatter(1, ids_keep, 0.0)
        return ids_keep, mask

    def forward_decoder(self, latent, ids_keep):
        """Tokens (B, 1 + K, D) of the visible patches -> pred (B, L, P) of all."""
        x = self.decoder_embed(latent)  # (B, 1 + K, D), D now the decoder's
        B, _, D = x.shape
        L = self.decoder_pos_embed.shape[1] - 1
        # Mask tokens everywhere, then the visible ones scattered to their positions. mae
        # appends mask tokens and sorts by ids_restore, which moves every token twice.
        tokens = self.mask_token.to(x.dtype).expand(B, L, D)
        places = ids_keep[..., None].expand(-1, -1, D)  # (B, K, D)
        tokens = tokens.scatter(1, places, x[:, 1:])
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # (B, N, D)
        # Drop the class token here: slicing after decoder_pred would make backward zero-pad
        # a copy of pred's gradient.
        x = self.decoder_blocks(x)[:, 1:]  # (B, L, D)
        return self.decoder_pred(self.decoder_norm(x))  # (B, L, P)

    def forward(
        self,
        imgs,
        attn=None,
        tau=0.75,
        mask_ratio=None,
        noise=None,
        weight=None,
        return_mse=False,
    ):
        """Loss (Eq. 2), pred (B, L, P) and mask (B, L) of normalized imgs (B, C, H, W).

        weight (B, L): see patch_weights, what training passes; or attn (B, L): maps, to be
        normalized over these crops, with tau for Eq. 1. Neither: MAE. mask_ratio None: the
        config's. noise (B, L): its lowest stay visible. return_mse appends the detached mse.
        """
        patches = self.patchify(imgs)  # (B, L, P)
        B, L, _ = patches.shape
        if noise is None:
            noise = torch.rand(B, L, device=imgs.device)
        if mask_ratio is None:
            mask_ratio = self.cfg.mask_ratio
        if not torch.is_tensor(tau) and not 0 < tau < math.inf:
            raise ValueError(f"tau: got {tau!r}; pass a finite number above 0")
        for name, x in {"attn": attn, "weight": weight}.items():
            if x is not None and x.shape != (B, L):
                got = tuple(x.shape)
                raise ValueError(f"{name}: got {got}; pass one per patch, {(B, L)}")
        if attn is not None and weight is not None:
            raise ValueError("attn, weight: pass one of them")
        if attn is not None:
            weight = patch_weights(normalize_map(attn), tau)

        # mae: the same three steps, forward_encoder, forward_decoder and forward_loss.
        ids_keep, mask = self.random_masking(noise, mask_ratio)
        latent = self.forward_encoder(patches, ids_keep)  # (B, 1 + K, D)
        pred = self.forward_decoder(latent, ids_keep)  # (B, L, P)
        loss, mse = masked_loss(pred, patches, mask, weight, self.cfg.norm_pix)
        if return_mse:
            return loss, pred, mask, mse
        return loss, pred, mask


# -- Maps: from the map of an image to M_norm of the patches of a crop -----------------
# Maps are computed before training, on whole images; a step sees random crops of them.
def pool_maps(maps, box, flip, grid):
    """Mean of the maps (B, h, w) of whole images under each patch of their crops.

    box (B, 4): the crop x0, y0, x1, y1 as fractions of width and height; flip (B,) bool:
    mirrored after it. Returns (B, L) fp32.
    """
    from torchvision.ops import roi_align  # here, because it takes as long as torch

    B, h, w = maps.shape
    index = torch.arange(B, device=maps.device)  # which map a box belongs to
    x0, y0, x1, y1 = box.unbind(1)
    rois = torch.stack([index, x0 * w, y0 * h, x1 * w, y1 * h], dim=1).float()
    # Without aligned=True everything is off by half a cell. The mean is that of bilinear
    # samples, about one for each cell of the map under a patch, and at least one.
    pooled = roi_align(maps.float()[:, None], rois, grid, aligned=True)  # (B, 1, *grid)
    mirrored = pooled.flip(-1)
    return torch.where(flip[:, None, None, None], mirrored, pooled).flatten(1)


def crop_maps(maps, box, flip, cfg):
    """M_norm (B, L) of a batch of crops, and flat (B,): maps without an object."""
    m = pool_maps(maps, box, flip, cfg.grid)  # (B, L)
    if cfg.map_norm == "crop":
        return normalize_map(m), is_flat(m)
    # maps (B, h, w) were normalized over their whole images when the map file was written.
    # So a crop without the object keeps weights near 1, and is not stretched to full range.
    return m, is_flat(maps.float().flatten(1))


def patch_order(m, ties=None):
    """Rank of each patch by m (B, L), 0 the lowest; ties are broken by `ties`, or at random."""
    # To drop patches from the loss, do not pass the mask noise as ties: it would always drop
    # visible ones. `ties` shuffles the patches, and a stable sort keeps that order in ties.
    if ties is None:
        ties = torch.rand_like(m)
    order = ties.argsort(dim=1)
    by_map = m.gather(1, order).argsort(dim=1, stable=True)
    return order.gather(1, by_map).argsort(dim=1)


# -- Schedules and optimizer -----------------------------------------------------------
# Functions of the step alone, so that a resumed run continues exactly.
def tau_at(step, total_steps, cfg):
    """Temperature of Eq. 1: a half-cycle cosine from cfg.tau up to cfg.tau_end."""
    # The object counts up to exp(1 / 0.75) = 3.8 times the background at first, and
    # exp(1 / 1.0) = 2.7 times at the end. The paper names the start only.
    if cfg.tau_schedule == "constant":
        return cfg.tau
    rise = cfg.tau_end - cfg.tau
    return cfg.tau + rise * (1 - math.cos(math.pi * step / total_steps)) / 2


def lr_at(step, total_steps, warmup_steps, lr):
    """Learning rate: linear warm-up from 0, then a half-cycle cosine down to 0 (MAE)."""
    # mae: adjust_learning_rate, by step instead of by fraction of an epoch.
    if step < warmup_steps:
        return lr * step / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return lr * (1 + math.cos(angle)) / 2


def param_groups(model, weight_decay):
    """Groups for AdamW: weight decay on matrices and tokens only, as in mae."""
    # timm: param_groups_weight_decay. Fixed positions are in no group.
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() > 1]
    no_decay = [p for p in trained if p.dim() <= 1]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


# -- One step of training --------------------------------------------------------------
def model_inputs(batch, cfg, tau):
    """imgs (B, C, H, W), weight (B, L) or None, and noise (B, L), which decides the mask.

    batch: random crops on the device, with the fields image uint8 (B, C, H, W), not
    flipped yet; maps (B, h, w) of the whole images, or None for a vanilla MAE; box (B, 4)
    and flip (B,) as in pool_maps; noise (B, L); ties (B, L) or None, see patch_order.
    """
    # The loader crops; the device flips, so that image and map are mirrored alike.
    mirrored = batch.image.flip(-1)
    image = torch.where(batch.flip[:, None, None, None], mirrored, batch.image)
    imgs, noise = normalize(image, cfg), batch.noise
    if batch.maps is None:
        return imgs, None, noise
    m_norm, flat = crop_maps(batch.maps, batch.box, batch.flip, cfg)  # (B, L), (B,)
    if cfg.guidance == "input_masking":
        # Hides the patches with the highest M_norm, in ties at random, by the mask noise.
        m_norm = m_norm.masked_fill(flat[:, None], 0.0)
        noise = patch_order(m_norm, noise).to(noise.dtype)
    weight = patch_weights(m_norm, tau, cfg.guidance, flat, batch.ties)
    return imgs, weight, noise


def train_step(model, optimizer, scaler, batches, tau, cfg, dtype=None):
    """Take one optimizer step over cfg.accum micro-batches: Algorithm 1 of the paper.

    batches: see model_inputs. tau: 0-d tensor. dtype: of autocast, None is fp32. scaler:
    enabled for fp16. Returns (3,) on the device: loss, mse without weights, gradient norm.
    """
    losses = torch.zeros(2, device=tau.device)
    for number, batch in enumerate(batches, start=1):
        # Flip images, crop and flip maps alike; M_norm, w = exp(M_norm / tau) (Eq. 1).
        imgs, weight, noise = model_inputs(batch, cfg, tau)
        # DDP: exchange gradients once a step, with the last micro-batch.
        skip_sync = number < cfg.accum and isinstance(model, DistributedDataParallel)
        with model.no_sync() if skip_sync else contextlib.nullcontext():
            with torch.autocast(tau.device.type, dtype, enabled=dtype is not None):
                # Hide patches at random, encode the rest, decode all; weighted loss (Eq. 2).
                loss, _, _, mse = model(
                    imgs, noise=noise, weight=weight, return_mse=True
                )
            scaler.scale(loss / cfg.accum).backward()
        losses += torch.stack([loss.detach(), mse]) / cfg.accum

    # Unscale first: norm and clipping are for the true gradient.
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    # Still on the device: reading them here would force a sync at every step.
    return torch.cat([losses, norm[None]])


# -- Configuration ---------------------------------------------------------------------
# From here on the file is about runs. Our packages are imported here, not above, so that a
# copy of this file alone runs down to this line. Some are for `from attg_mae import ...`.
IMPORT_ERROR = None
try:
    from attg.checkpoint import load_checkpoint, restore, save_checkpoint
    from attg.cli import flag, parse, run_cli, validate
    from attg.distributed import processes, stop_signals
    from attg.features import extract_features, knn_classify
    from attg.figures import save_examples
    from attg.images import seed_for
    from attg.kernels import attg_loss
    from attg.loader import BatchIterator
    from attg.pretraining import TrainFlags, check_config, resolve
    from attg.trainer import Trainer, result, setup
    from attg.weights import encoder_config, load_initial, load_weights, read_weights
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "attg":
        raise
    IMPORT_ERROR = f"{error}: all but --demo needs attg/ and kernels/ beside this file"
    attg_loss, TrainFlags = None, object

    def flag(default, *_, **__):
        return dataclasses.field(default=default)


build_model = MAE  # what train() builds

# img_size, patch_size; width, depth, heads of the encoder; the same of the decoder.
# From vit_base on these are MAE's models; vit_micro is for small images and a CPU.
PRESETS = {
    "vit_micro": (32, 4, 128, 4, 4, 64, 2, 4),
    "vit_tiny": (224, 16, 192, 12, 3, 192, 4, 3),
    "vit_small": (224, 16, 384, 12, 6, 256, 4, 8),
    "vit_base": (224, 16, 768, 12, 12, 512, 8, 16),
    "vit_large": (224, 16, 1024, 24, 16, 512, 8, 16),
    "vit_huge": (224, 14, 1280, 32, 16, 512, 8, 16),
}
SHAPE = ("img_size", "patch_size", "width", "depth", "heads")
SHAPE += ("decoder_width", "decoder_depth", "decoder_heads")
# Ranges that several flags share, and whether a resumed run may change them; see attg.cli.flag.
COUNT = {"low": 1, "high": 1024, "resume": "fixed"}
WIDTH = {"low": 4, "high": 32768, "resume": "fixed"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass
class Config(TrainFlags):
    """Settings of method and model, each a flag; TrainFlags has those of a run."""

    # None: the preset's value for sizes; in TrainFlags, chosen by `resolve`. Without
    # resume=, a flag may change until the run has ended.
    model: str = flag("vit_micro", "preset of the model", choices=tuple(PRESETS))
    maps: str | None = flag(None, "attention maps, a .npy file [toy: its object masks]")
    guidance: str = flag("attg", "use of the maps, none = MAE", choices=GUIDANCE)
    map_norm: str = flag(
        "image", "normalize a map over its image or its crop", choices=("image", "crop")
    )
    tau: float = flag(0.75, "initial temperature (paper)", 1e-6, 1e6)
    tau_end: float = flag(1.0, "final temperature (ours)", 1e-6, 1e6)
    tau_schedule: str = flag("cosine", "tau schedule", choices=("cosine", "constant"))
    mask_ratio: float = flag(0.75, "fraction of patches to hide", 0, 1)
    norm_pix: bool = flag(True, "predict patches normalized by their mean and variance")
    img_size: int | tuple[int, ...] | None = flag(
        None, "side, or height and width", 1, 8192, resume="fixed"
    )
    patch_size: int | None = flag(None, "patch size in pixels", **COUNT)
    in_chans: int = flag(3, "channels; for gray 1, with one --mean and --std", **COUNT)
    width: int | None = flag(None, "encoder width", **WIDTH)
    depth: int | None = flag(None, "encoder blocks", **COUNT)
    heads: int | None = flag(None, "encoder heads", **COUNT)
    decoder_width: int | None = flag(None, "decoder width", **WIDTH)
    decoder_depth: int | None = flag(None, "decoder blocks", **COUNT)
    decoder_heads: int | None = flag(None, "decoder heads", **COUNT)
    mean: tuple[float, ...] = flag(IMAGENET_MEAN, "channel means of [0, 1]", 0, 1)
    std: tuple[float, ...] = flag(IMAGENET_STD, "channel stds of [0, 1]", 1e-38, 1)
    accum: int = flag(1, "micro-batches per step", 1, 10**7, resume="free")
    weight_decay: float = flag(0.05, "of AdamW, not on biases and norms", 0, 1e6)
    clip_grad: float = flag(0.0, "maximum gradient norm, 0 = off", 0, 1e38)

    def __post_init__(self):
        if not IMPORT_ERROR:
            validate(self)
        # If both are unset, resolve chooses them for vit_micro by the image sizes.
        self.default_size = (self.img_size, self.patch_size) == (None, None)
        for name, value in zip(SHAPE, PRESETS[self.model], strict=True):
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.mean = tuple(self.mean)
        self.std = tuple(self.std)
        if not isinstance(self.img_size, int) and len(self.img_size) == 1:
            (self.img_size,) = self.img_size
        if not IMPORT_ERROR:
            check_config(self)

    @property
    def size(self):
        """(height, width) of the input in pixels."""
        side = self.img_size
        return (side, side) if isinstance(side, int) else tuple(side)

    @property
    def grid(self):
        """(rows, columns) of patches."""
        return tuple(side // self.patch_size for side in self.size)


# -- Runs ------------------------------------------------------------------------------
# Data, log, checkpoints and evaluation are in attg/trainer.py, the loop is here.
def train(cfg, data=None, on_log=None):
    """Pre-train a model and write the run folder, cfg.out; resumes an interrupted run.

    data: your own data set, with cfg.data as its name: map-style, of (PIL image, int or
    None); or {"train": one, "test": another}. on_log: called with each record of
    log.jsonl. Returns {"step", "val_mse": on the test split or None, "knn": {feature:
    top-1 in percent} on rank 0, "out": the folder, "stopped": the signal or None}.
    """
    if IMPORT_ERROR:
        raise ModuleNotFoundError(IMPORT_ERROR)
    with (
        stop_signals() as signals,
        processes(cfg.device, cfg.timeout) as dist_info,
        setup(cfg, data, dist_info, signals, on_log) as (run, checkpoint),
    ):
        cfg, device = run.cfg, run.device
        torch.manual_seed(seed_for("weights", cfg.seed))
        model = build_model(cfg).to(device)
        if checkpoint or cfg.init:
            load_initial(model, run, checkpoint)
        if cfg.epochs == 0:
            save_examples(model, run, checkpoint, model_inputs, pool_maps)
            return result(run, step=0)

        groups = param_groups(model, cfg.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        start = restore(optimizer, scaler, checkpoint) if checkpoint else 0
        # Images, maps and mask noise depend on seed and step alone.
        ties = cfg.guidance in DROPS_PATCHES
        loader = BatchIterator(run, start, math.prod(cfg.grid), ties)
        trainer = Trainer(run, model, optimizer, scaler, start, signals, loader)
        if cfg.compile:
            model.compile()
        ddp = DistributedDataParallel(model) if run.world > 1 else model
        warmup_steps = cfg.warmup_epochs * run.steps_per_epoch
        tau = torch.zeros((), device=device)
        micro_batches = iter(loader)

        # Around the steps there are only schedules, evaluations, log and checkpoints.
        for step in trainer.steps:
            if step in trainer.eval_steps:
                trainer.evaluate(step)
            lr = lr_at(step, run.total_steps, warmup_steps, cfg.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            tau.fill_(tau_at(step, run.total_steps, cfg))
            batches = itertools.islice(micro_batches, cfg.accum)
            values = train_step(ddp, optimizer, scaler, batches, tau, cfg, run.dtype)
            if trainer.after_step(step + 1, values, lr, tau):
                return trainer.stop(step + 1)

        metrics = trainer.finish()
        save_examples(model, run, checkpoint, model_inputs, pool_maps)
        return metrics


def load_encoder(path_or_state_dict, heads=None, img_size=None, **names):
    """Load a ViT in eval mode from a file of this project, MAE, DINO, timm or HF.

    Its .cfg.mean and .cfg.std are ImageNet's unless the file has others (many ViTs of timm
    and HF want 0.5 and 0.5). heads, img_size, an int or (height, width): instead of the
    file's. names: weights_key, weights_prefix, see --help. ValueError if there is no encoder.
    """
    if IMPORT_ERROR:
        raise ModuleNotFoundError(IMPORT_ERROR)
    weights = read_weights(path_or_state_dict, **names)
    model = ViT(encoder_config(Config, weights, heads, img_size))
    load_weights(model, weights)
    return model.eval()


def demo():
    """Three steps on eight random images and maps, printing shapes and losses."""
    torch.manual_seed(0)
    cfg = Config()
    # What the loader yields: uint8 crops, maps of whole images, boxes, flips, mask noise.
    image = torch.randint(0, 256, (8, 3, *cfg.size), dtype=torch.uint8)
    batch = SimpleNamespace(image=image, ties=None)
    batch.maps = torch.zeros(8, *cfg.size)
    batch.maps[:, 8:24, 8:24] = 1.0  # a square object
    batch.box = torch.tensor([0.1, 0.2, 0.8, 0.9]).expand(8, 4)
    batch.flip = torch.rand(8) < 0.5
    batch.noise = torch.rand(8, math.prod(cfg.grid))
    model, tau = MAE(cfg), torch.tensor(cfg.tau)
    groups = param_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(enabled=False)
    imgs, weight, noise = model_inputs(batch, cfg, tau)
    _, pred, mask = model(imgs, noise=noise, weight=weight)
    for name, x in {"imgs": imgs, "w": weight, "mask": mask, "pred": pred}.items():
        print(f"{name:5} {str(tuple(x.shape)):15} {x.min():5.2f} to {x.max():.2f}")
    for step in range(3):
        tau.fill_(tau_at(step, 3, cfg))
        loss, mse, norm = train_step(model, optimizer, scaler, [batch], tau, cfg)
        print(f"step {step}: loss {loss:.3f}, mse {mse:.3f}, gradient norm {norm:.2f}")


def main(argv=None):
    """Parse the flags and train. Returns the result of `train`."""
    return train(parse(Config, __doc__, argv))


if __name__ == "__main__":
    if sys.argv[1:] == ["--demo"]:  # takes no other flags
        demo()
    elif IMPORT_ERROR:
        sys.exit(f"{__file__}: error: {IMPORT_ERROR}")
    else:
        run_cli(main, memory_hint="raise --accum (the same run) or lower --batch_size")
