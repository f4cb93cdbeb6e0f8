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

    Returns (state dict under MAE's names, config, name). config is the dict of settings
    that this project stores, None for other files; name identifies the source in error
    messages. ValueError if there is no ViT encoder in it.
    """
    if isinstance(source, dict):
        state, name = source, "the state dict"
    else:
        state, name = load_checkpoint(source), source
    config = state.get("config")
    if not (isinstance(config, dict) and "decoder_heads" in config):
        config = None  # another project's config
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state.get(key), dict):
            state = state[key]
    if not all(isinstance(key, str) for key in state):
        raise ValueError(f"{name}: not a state dict, its keys are not strings")
    weights = join_qkv({rename(key): value for key, value in state.items()}, name)
    missing = []
    for key, dims in ESSENTIAL.items():
        value = weights.get(key)
        if not (isinstance(value, torch.Tensor) and value.dim() == dims):
            missing.append(key)
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


def join_qkv(weights, name):
    """Concatenate Hugging Face's separate query, key and value weights."""
    joined = dict(weights)
    for key, q in weights.items():
        if ".attn.q." in key:
            # If k or v is missing, the matrix is too small and load_weights reports it.
            names = [key.replace(".q.", f".{x}.") for x in "qkv"]
            try:
                parts = [joined.pop(part, q[:0]) for part in names]
                joined[key.replace(".q.", ".qkv.")] = torch.cat(parts)
            except (RuntimeError, TypeError, IndexError) as error:
                raise ValueError(f"{name}: {names}: {error}") from error
    return joined


# -- The config of an encoder ----------------------------------------------------------


def weight_sizes(state):
    """{name of a setting: value} for all sizes that the shapes of the weights reveal."""
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = {"in_chans": in_chans, "patch_size": patch_size, "width": width}
    sizes["depth"] = count_blocks(state, "blocks")
    if "decoder_embed.weight" in state:
        sizes["decoder_width"] = len(state["decoder_embed.weight"])
        sizes["decoder_depth"] = count_blocks(state, "decoder_blocks")
    return sizes


def count_blocks(state, name):
    pattern = rf"{name}\.\d+\.norm1\.weight"
    return sum(bool(re.fullmatch(pattern, key)) for key in state)


def read_encoder(kind, source, heads=None, img_size=None):
    """Config (of class `kind`), weights and name of the encoder in a file or state dict.

    Without stored settings the Config follows from the shapes of the weights. heads:
    required if the width is not that of a standard ViT. img_size: instead of the file's.
    """
    weights, settings, name = read_weights(source)
    sizes = weight_sizes(weights)
    tokens = weights["pos_embed"].shape[1]
    if settings is None:
        heads = heads or HEADS.get(sizes["width"])
        if not heads:
            raise ValueError(
                f"{name}: width {sizes['width']} is not standard; pass heads="
            )
        encoder = {key: value for key, value in sizes.items() if not DECODER.match(key)}
        side = sizes["patch_size"] * math.isqrt(tokens - 1)
        cfg = kind(model="vit_base", heads=heads, img_size=side, **encoder)
    else:
        cfg = stored_config(kind, settings, sizes | {"positions": tokens}, name)
    if img_size:
        cfg = dataclasses.replace(cfg, img_size=img_size)
    return cfg, weights, name


def stored_config(kind, settings, sizes, name):
    """The Config of stored settings; ValueError if they contradict the weights' sizes.

    This comes before anything of the settings' size is allocated.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        cfg = kind(**{key: value for key, value in settings.items() if key in known})
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: damaged settings ({error})") from error
    stored = dataclasses.asdict(cfg) | {"positions": math.prod(cfg.grid) + 1}
    for key, value in sizes.items():
        if stored[key] != value:
            raise ValueError(
                f"{name}: its settings have {key} {stored[key]}, its weights {value}"
            )
    return cfg


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
    image = F.interpolate(
        image, grid, mode="bicubic", align_corners=False, antialias=False
    )
    return torch.cat([positions[:, :1], image.flatten(2).mT], dim=1)


# -- Loading into a model --------------------------------------------------------------


def load_initial(model, run, checkpoint, sincos_table):
    """Load the weights of the checkpoint or of --init; without them the model stays fresh.

    run: attg.trainer.Setup. checkpoint: parts of last.pt, or None.
    """
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
    for key in POSITIONS:
        if key in state:
            own = model.get_parameter(key)
            state[key] = fit_positions(state[key], own, model.cfg.grid, sincos_table)
    check_sizes(model.cfg, state, name)
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


def check_sizes(cfg, state, name):
    """ValueError with the flags of the model that the weights would fit."""
    flags = []
    for key, value in weight_sizes(state).items():
        if value != getattr(cfg, key):
            flags.append(f"--{key} {value}")
            if key == "width":
                flags.append(f"--heads {HEADS.get(value, 'NUMBER')}")
    if flags:
        raise ValueError(f"{name} does not fit this {cfg.model}; use {' '.join(flags)}")
