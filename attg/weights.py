"""
Weights from here and elsewhere: the layouts of facebookresearch/mae, DINO, timm and
Hugging Face are read as those of this project.
"""

import dataclasses
import math
import re

import torch
import torch.nn.functional as F

from attg.checkpoint import load_checkpoint
from attg.files import require

DECODER = re.compile("decoder|mask_token")
CLASSIFIER = re.compile("head|fc_norm|pooler|classifier")
POSITIONS = ("pos_embed", "decoder_pos_embed")
# What every encoder of ours holds, by its name in timm and facebookresearch/mae, and the
# number of its dimensions.
ESSENTIAL = {
    "cls_token": 3,
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "blocks.0.attn.qkv.weight": 2,
}
# Heads of the standard ViTs by their width, for files that do not tell.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Prefixes that wrappers leave, then Hugging Face's names before and since transformers 5.
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


def read_weights(source):
    """A file or state dict of any known layout -> (state dict, config, name).

    The state dict has MAE's names; config is this project's, as a dict, or None; name
    stands for the source in messages. ValueError if there is no ViT encoder in it.
    """
    if isinstance(source, dict):
        state, name = source, "the state dict"
    else:
        state, name = load_checkpoint(source), source
    config = state.get("config")
    if not (isinstance(config, dict) and "decoder_heads" in config):
        config = None  # others store a config, too
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state.get(key), dict):
            state = state[key]
    require(all(isinstance(key, str) for key in state), f"{name}: no names of weights")
    weights = join_qkv({rename(key): value for key, value in state.items()}, name)
    lacks = []
    for key, dims in ESSENTIAL.items():
        value = weights.get(key)
        if not (isinstance(value, torch.Tensor) and value.dim() == dims):
            lacks.append(key)
    found = sorted(weights)[:8]
    require(not lacks, f"{name}: no ViT encoder in it: lacks {lacks}, found {found}")
    return weights, config, name


def rename(key):
    for pattern, new in RENAMES:
        key = re.sub(pattern, new, key)
    return key


def join_qkv(weights, name):
    """Hugging Face keeps queries, keys and values apart: here they are one matrix."""
    joined = dict(weights)
    for key, q in weights.items():
        if ".attn.q." in key:
            # Where k or v is missing the matrix is too small, which loading then says.
            names = [key.replace(".q.", f".{x}.") for x in "qkv"]
            parts = [joined.pop(part, q[:0]) for part in names]
            try:
                joined[key.replace(".q.", ".qkv.")] = torch.cat(parts)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{name}: {', '.join(names)}: {error}") from error
    return joined


def infer_config(state, heads=None):
    """Settings of a Config, as the shapes of an encoder's weights tell them."""
    width, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    heads = heads or HEADS.get(width)
    require(
        heads,
        f"no standard ViT has width {width}, and the weights do not tell the heads; "
        "pass heads=",
    )
    blocks = [key for key in state if re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    return {
        "model": "vit_base",
        "in_chans": in_chans,
        "patch_size": patch_size,
        "img_size": patch_size * side,
        "width": width,
        "depth": len(blocks),
        "heads": heads,
    }


def config_from_checkpoint(kind, settings, state, name, heads=None):
    """The Config, `kind`, of an encoder's weights and the settings stored beside them.

    settings: a dict, None if there are none; heads: see infer_config. name: of the
    file, for the ValueError if settings and weights differ. Nothing has been made of
    their sizes by then.
    """
    if settings is None:
        return kind(**infer_config(state, heads))
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        cfg = kind(**{key: value for key, value in settings.items() if key in known})
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: its settings are damaged ({error})") from error
    stored = dataclasses.asdict(cfg) | {"positions": math.prod(cfg.grid) + 1}
    told = sizes_of_weights(state) | {"positions": state["pos_embed"].shape[1]}
    for key, value in told.items():
        require(
            stored[key] == value,
            f"{name}: its settings say {key} {stored[key]}, its weights {value}",
        )
    return cfg


def fit_positions(positions, own, grid, sincos_table):
    """Positions (1, 1 + L, D) of a square grid, for a model of another grid.

    own: the model's. Sin-cos tables are replaced by them, learned ones are resized; what
    is no square grid is left to load_state_dict to refuse.
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
    """Positions (1, 1 + L, D) of a grid `old` (rows, columns), for another grid.

    That of the class token stays.
    """
    image = positions[:, 1:].float().unflatten(1, old).permute(0, 3, 1, 2)
    # Hugging Face resizes so: bicubic, corners not aligned, no antialiasing.
    image = F.interpolate(
        image, grid, mode="bicubic", align_corners=False, antialias=False
    )
    return torch.cat([positions[:, :1], image.flatten(2).mT], dim=1)


def sizes_of_weights(state):
    """{flag: value} of the sizes that the weights tell, those of a decoder too."""
    # Positions fit any size of the pictures, and no shape tells the heads.
    sizes = infer_config(state, heads=1)
    for name in ("model", "img_size", "heads"):
        del sizes[name]
    if "decoder_embed.weight" in state:
        sizes["decoder_width"] = len(state["decoder_embed.weight"])
        norms = r"decoder_blocks\.\d+\.norm1\.weight"
        sizes["decoder_depth"] = sum(bool(re.fullmatch(norms, key)) for key in state)
    return sizes


def refuse_other_sizes(model, state, name):
    """ValueError says by which flags the model would fit the weights."""
    cfg = model.cfg
    flags = []
    for key, value in sizes_of_weights(state).items():
        if value != getattr(cfg, key):
            flags.append(f"--{key} {value}")
            if key == "width":
                flags.append(f"--heads {HEADS.get(value, 'NUMBER')}")
    require(
        not flags,
        f"{name} does not fit this {cfg.model}; its model is that of {' '.join(flags)}",
    )
    own = model.state_dict()
    wrong = []
    for key, value in state.items():
        if key in own and own[key].shape != getattr(value, "shape", None):
            got, needed = tuple(getattr(value, "shape", ())), tuple(own[key].shape)
            wrong.append(f"{key} is {got}, must be {needed}")
    require(not wrong, f"{name} does not fit this {cfg.model}: {first_few(wrong)}")


def first_few(words, most=4):
    """They in a line, or the first of them and how many more there are."""
    line = ", ".join(words[:most])
    if len(words) > most:
        line += f" and {len(words) - most} more"
    return line


def load_weights(model, state, name, sincos_table):
    """Loads what read_weights gave; returns in words what was not in it.

    ValueError if the encoder is not whole, or a weight has no place in the model.
    """
    state = dict(state)
    for key in POSITIONS:
        if key in state:
            own = model.get_parameter(key)
            state[key] = fit_positions(state[key], own, model.cfg.grid, sincos_table)
    refuse_other_sizes(model, state, name)
    missing, unexpected = model.load_state_dict(state, strict=False)

    has_decoder = any(DECODER.match(key) for key in state)
    wrong = []
    for key in missing:
        if has_decoder or not DECODER.match(key):
            wrong.append(f"no {key}")
    for key in unexpected:
        if not CLASSIFIER.match(key):
            wrong.append(f"unexpected {key}")
    words = first_few(wrong)
    require(not wrong, f"{name} does not fit this {model.cfg.model}: {words}")

    notes = [f"{key} is not used" for key in unexpected]
    if not has_decoder:
        notes.insert(0, "no decoder in it, the decoder starts afresh")
    return ", ".join(notes) or "every weight found"
