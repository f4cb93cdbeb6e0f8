"""
Reading weights of other code bases: the layouts of facebookresearch/mae, DINO, timm and
Hugging Face are mapped to the names of this project, which are MAE's and timm's.
"""

import dataclasses
import math
import re

import torch
import torch.nn.functional as F

from attg.checkpoint import load_checkpoint, load_state

DECODER = re.compile("decoder|mask_token")
CLASSIFIER = re.compile("head|fc_norm|pooler|classifier")
POSITIONS = ("pos_embed", "decoder_pos_embed")
# Weights that every ViT encoder has, and their number of dimensions.
ESSENTIAL = {
    "cls_token": 3,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.attn.qkv.weight": 2,
}
# Heads of the standard ViTs by width, for files without settings.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Prefixes of wrappers, then Hugging Face's names before and since transformers 5.
RENAMES = (
    (r"^((module|_orig_mod|backbone|vit|decoder)\.)+", ""),
    (r"^embeddings\.", ""),
    (r"^position_embeddings", "pos_embed"),
    (r"^patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"^decoder_layers\.", "decoder_blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^layernorm\.", "norm."),
    (r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
)

# -- Reading a file --------------------------------------------------------------------


def read_weights(source):
    """Read a file or state dict of any known layout.

    Returns (state dict under MAE's names, settings of a file of this project or None,
    name of the source for messages). ValueError if there is no ViT encoder in it.
    """
    in_memory = isinstance(source, dict)
    name = "the state dict" if in_memory else source
    state = source if in_memory else load_checkpoint(source)
    config = state.get("config")
    if not (isinstance(config, dict) and "decoder_heads" in config):
        config = None  # another project's config
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not all(isinstance(key, str) for key in state):
        raise ValueError(f"{name}: not a state dict, its keys are not strings")
    try:
        weights = join_qkv({rename(key): value for key, value in state.items()})
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: damaged query, key or value: {error}") from error
    tensors = {key: x.dim() for key, x in weights.items() if torch.is_tensor(x)}
    missing = [key for key, dims in ESSENTIAL.items() if tensors.get(key) != dims]
    if missing:
        raise ValueError(
            f"{name}: no ViT encoder: {missing} missing, keys are {sorted(weights)[:8]}"
        )
    return weights, config, name


def rename(key):
    """Translate the name of a weight to MAE's."""
    for pattern, new in RENAMES:
        key = re.sub(pattern, new, key)
    return key


def join_qkv(weights):
    """Concatenate Hugging Face's separate query, key and value weights."""
    for key in [key for key in weights if ".attn.q." in key]:
        parts = [weights.pop(key.replace(".q.", f".{x}.")) for x in "qkv"]
        weights[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return weights


# -- The config of an encoder ----------------------------------------------------------


def weight_sizes(state):
    """{name of a setting: value} for all sizes that the shapes of the weights reveal."""
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = {"in_chans": in_chans, "patch_size": patch_size, "width": width}
    blocks = [key.split(".")[0] for key in state if key.endswith(".norm1.weight")]
    sizes["depth"] = blocks.count("blocks")
    if "decoder_embed.weight" in state:
        sizes["decoder_width"] = len(state["decoder_embed.weight"])
        sizes["decoder_depth"] = blocks.count("decoder_blocks")
    return sizes


def read_encoder(kind, source, heads=None, img_size=None):
    """Config (of class `kind`), weights and name of the encoder in a file or state dict.

    Without stored settings the Config follows from the shapes of the weights. heads:
    required if the width is not that of a standard ViT. img_size: instead of the file's.
    """
    weights, settings, name = read_weights(source)
    sizes, tokens = weight_sizes(weights), weights["pos_embed"].shape[1]
    config = settings
    if settings is None:
        heads = heads or HEADS.get(sizes["width"])
        if not heads:
            raise ValueError(
                f"{name}: width {sizes['width']} is not standard; pass heads="
            )
        sizes = {key: x for key, x in sizes.items() if not DECODER.match(key)}
        side = sizes["patch_size"] * math.isqrt(tokens - 1)
        config = {"model": "vit_base", "heads": heads, "img_size": side, **sizes}
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        # None is the default, whatever that was when the file was written.
        given = {key: x for key, x in config.items() if x is not None and key in known}
        cfg = kind(**given)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: damaged settings ({error})") from error
    # Before anything of the settings' size is allocated.
    check_sizes(cfg, sizes, name)
    if settings and tokens != 1 + math.prod(cfg.grid):
        raise ValueError(
            f"{name}: pos_embed has {tokens} positions, not 1 + {cfg.grid}"
        )
    return dataclasses.replace(cfg, img_size=img_size or cfg.img_size), weights, name


# -- Positions -------------------------------------------------------------------------


def fit_positions(positions, own, grid, sincos_table):
    """Positions (1, 1 + L, D) of a square grid, adapted to a model of another grid.

    own: the model's positions, which replace a sin-cos table; learned positions are
    resized. Positions of other shapes are returned unchanged, for load_weights to reject.
    """
    side = math.isqrt(positions.shape[1] - 1)
    table = sincos_table(positions.shape[2], (side, side))  # (1 + L, D)
    if positions.shape[1:] != table.shape:
        return positions
    if torch.allclose(positions[0].float(), table, atol=1e-4):
        return own
    if table.shape == own.shape[1:]:
        return positions
    return resize_positions(positions, (side, side), grid)


def resize_positions(positions, old, grid):
    """Resize positions (1, 1 + L, D) from the grid `old` (rows, columns) to another.

    The position of the class token is kept.
    """
    image = positions[:, 1:].float().unflatten(1, old).permute(0, 3, 1, 2)
    # As in transformers: bicubic, corners not aligned, no antialiasing.
    image = F.interpolate(image, grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], image.flatten(2).mT], dim=1)


# -- Loading into a model --------------------------------------------------------------


def load_initial(model, run, checkpoint, sincos_table):
    """Load the weights of the checkpoint (parts of last.pt, or None) or of --init."""
    cfg = run.cfg
    if checkpoint:
        load_state(model, checkpoint["model"], checkpoint["path"])
    elif cfg.init:
        weights = read_weights(cfg.init)[0]
        message = load_weights(model, weights, cfg.init, sincos_table)
        run.log.say(f"--init {cfg.init}: {message}")


def load_weights(model, state, name, sincos_table):
    """Load the state dict of read_weights; returns a note on unused and missing weights.

    ValueError if the encoder is incomplete, or if a weight does not fit the model.
    """
    state = dict(state)
    if not hasattr(model, "mask_token"):
        state = {key: x for key, x in state.items() if not DECODER.match(key)}
    for key in set(POSITIONS) & set(state):
        own = model.get_parameter(key)
        state[key] = fit_positions(state[key], own, model.cfg.grid, sincos_table)
    check_sizes(model.cfg, weight_sizes(state), name)
    mismatch = f"{name} does not fit this {model.cfg.model}"
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        # A line for each weight of another shape, below a title.
        raise ValueError(f"{mismatch}: {' '.join(str(error).split())}") from error
    has_decoder = any(DECODER.match(key) for key in state)
    missing = [key for key in missing if has_decoder or not DECODER.match(key)]
    surplus = [key for key in unexpected if not CLASSIFIER.match(key)]
    if missing or surplus:
        raise ValueError(f"{mismatch}: missing {missing[:4]}, unexpected {surplus[:4]}")
    notes = [f"{key} is not used" for key in unexpected]
    if not has_decoder:
        notes.insert(0, "no decoder in the file, it starts from random weights")
    return ", ".join(notes) or "all weights loaded"


def check_sizes(cfg, sizes, name):
    """ValueError with the flags of the model that weights of these sizes would fit."""
    flags = [f"--{k} {x}" for k, x in sizes.items() if x != getattr(cfg, k)]
    if flags:
        heads = HEADS.get(sizes["width"], "NUMBER")
        raise ValueError(
            f"{name} does not fit this {cfg.model}; use {' '.join(flags)} --heads {heads}"
        )
