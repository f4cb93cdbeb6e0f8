"""
Reading weights of other code bases: facebookresearch/mae, DINO, timm, Hugging Face, and
whatever wraps their encoders. Their names become this project's, which are MAE's and timm's.

The prefix of the patch embedding is that of the encoder, and what lies outside is left
out. Sizes follow from the weights; grid, heads and eps from the settings in the file or
from Hugging Face's config.json beside it. If they do not give the number of heads, it
is guessed from the width, which is logged.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from attg.checkpoint import leaves, load_checkpoint, load_state
from attg.log import log_line

# Entries of a file that may hold the weights; the first one found is taken. As in timm,
# averaged weights come first.
ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
ENTRIES += ("teacher", "target_encoder", "state_dict")
ENTRIES += ("model", "model_state_dict", "module", "net")
PATCH_EMBED = r"(patch_embed\.proj|(embeddings\.)?patch_embeddings\.projection)\.weight"
DECODER_KEYS = re.compile("decoder_|mask_token")
# Names of this project's models. Others are refused, because they may change the features,
# but for heads of any method, and networks with blocks of their own.
KNOWN = r"(cls_token|pos_embed|patch_embed|blocks|norm|fc_norm)\b|decoder_|mask_"
HEAD_PATTERN = r"\w*head|fc\.|pooler|classifier|projector|predictor|embeddings\.mask"
NETWORK = re.compile(r"(\w+)\..*\b(?:blocks|layers?)\.\d")
# Weights that every ViT encoder has, with their number of dimensions; those of a decoder.
ESSENTIAL = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
ESSENTIAL |= {"blocks.0.attn.qkv.weight": 2}
OF_DECODER = {"decoder_embed.weight": 2, "decoder_pos_embed": 3}
# Heads of the standard ViTs by width, for files without settings.
HEADS_BY_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Hugging Face's names before and since transformers 5.
RENAMES = (
    (r"^decoder\.(?=decoder_|mask_token)", ""),
    (r"^decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
    (r"^embeddings\.(?!mask_token)", ""),
    (r"^position_embeddings", "pos_embed"),
    (r"^patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^layernorm\.", "norm."),
    (r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
)
# Settings of Config, and their names in Hugging Face's config.json.
HF_SETTINGS = {"img_size": "image_size", "patch_size": "patch_size"}
HF_SETTINGS |= {"in_chans": "num_channels", "width": "hidden_size"}
HF_SETTINGS |= {"depth": "num_hidden_layers", "heads": "num_attention_heads"}


@dataclasses.dataclass
class Weights:
    """Weights under MAE's names, and what the file tells about their model."""

    state: dict
    name: str  # of the file, for messages
    settings: dict  # of Config, or those that settings_beside returns
    is_own: bool  # written by this project
    unused: list  # names in the file
    grid: tuple | None = None  # of the positions, from encoder_config


def read_weights(source, weights_key=None, weights_prefix=None):
    """Weights of a file or state dict; ValueError if there is no ViT encoder in it."""
    in_memory = isinstance(source, dict)
    name = "the state dict" if in_memory else str(source)
    content = source if in_memory else read_file(source)
    settings = content.get("config")
    is_own = isinstance(settings, dict) and "decoder_heads" in settings
    if not is_own:
        settings = {} if in_memory else settings_beside(Path(source).parent)
        # facebookresearch/mae keeps its command line in training files.
        norm_pix = getattr(content.get("args"), "norm_pix_loss", None)
        settings |= {} if norm_pix is None else {"norm_pix": bool(norm_pix)}
    state = select_entry(content, weights_key, name)
    start = find_prefix(state, PATCH_EMBED, weights_prefix, name)
    state, unused = rename_all(state, start, name)
    state = join_qkv(state, name)
    dims = {key: x.dim() if x.numel() else 0 for key, x in state.items()}
    missing = [key for key, n in ESSENTIAL.items() if dims.get(key) != n]
    missing += [key for key, n in OF_DECODER.items() if dims.get(key, n) != n]
    if missing:
        keys = sorted(state)[:8]
        raise ValueError(f"{name}: no ViT encoder: {missing} missing, keys are {keys}")
    return Weights(state, name, settings, is_own, unused)


def read_file(path):
    """The content of a checkpoint, or of all files that an index of shards names."""
    path = Path(path)
    if not path.name.endswith(".index.json"):
        return load_checkpoint(path)
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path}: not an index of shards, it has no weight_map")
    content = {}
    for shard in sorted(set(map(str, shards.values()))):
        content |= load_checkpoint(path.with_name(Path(shard).name))
    return content


def read_json(path):
    """The dict in a JSON file; ValueError names the file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not settings")
    return content


def settings_beside(folder):
    """Settings of Config, and eps, by the JSON files of timm or Hugging Face in a folder."""
    files = [folder / "config.json", folder / "preprocessor_config.json"]
    config, images = (read_json(path) if path.is_file() else {} for path in files)
    if "architecture" in config:
        return image_statistics(config.get("pretrained_cfg"))
    if "hidden_size" not in config:
        return image_statistics(images)
    names = HF_SETTINGS | {"norm_pix": "norm_pix_loss"}
    settings = {old: config[new] for old, new in names.items() if new in config}
    eps, activation = config.get("layer_norm_eps"), config.get("hidden_act")
    if activation != "gelu" or not isinstance(eps, float):
        reason = f"hidden_act {activation}, layer_norm_eps {eps}: not a plain ViT"
        raise ValueError(f"{files[0]}: {reason}; try hf:{folder}")
    return settings | image_statistics(images) | {"eps": eps}


def image_statistics(images):
    """mean and std in timm's pretrained_cfg or Hugging Face's settings of images."""
    if not isinstance(images, dict):
        return {}
    if images.get("do_normalize") is False:
        images = {"mean": [0.0] * 3, "std": [1.0] * 3}
    values = {x: images.get(x, images.get(f"image_{x}")) for x in ("mean", "std")}
    return {name: value for name, value in values.items() if value is not None}


def select_entry(content, key, name):
    """The state dict in the content of a file; logs the choice if there is one."""
    while True:
        entries = [k for k, x in content.items() if isinstance(x, dict) and x]
        nets = [k for k in entries if holds_weights(content[k])]
        names = (*ENTRIES, *nets) if len(nets) == 1 else ENTRIES
        chosen = key or next((k for k in names if k in entries), None)
        if chosen is None:
            break
        if chosen not in entries:
            raise ValueError(f"--weights_key {key}: {name} has the entries {entries}")
        if len(nets) > 1 and not key:
            log_line(f"{name}: takes {chosen} of {nets}; see --weights_key")
        content, key = content[chosen], None
    if not all(isinstance(key, str) for key in content):
        raise ValueError(f"{name}: not a state dict, its keys are not strings")
    return content


def holds_weights(entry):
    """Whether a dict holds weights at any depth, which an optimizer's state does not."""
    return any(k.endswith("weight']") and torch.is_tensor(x) for k, x in leaves(entry))


def find_prefix(state, anchor, prefix, name):
    """The prefix of the network that has a weight whose name matches a pattern.

    prefix: --weights_prefix, for files that hold several such networks.
    """
    matches = (re.fullmatch(rf"(|.*?\.){anchor}", key) for key in state)
    found = sorted({match[1] for match in matches if match})
    wanted = f"{prefix.rstrip('.')}." if prefix else ""
    chosen = [start for start in found if start.startswith(wanted)]
    if wanted in chosen:
        return wanted
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        remedy = f"choose one: --weights_prefix {chosen[-1]}"
        raise ValueError(f"{name}: holds the networks {', '.join(chosen)}; {remedy}")
    flag = f"--weights_prefix {prefix}: " if prefix else ""
    keys = f"keys are {sorted(state)[:8]}; see --weights_key"
    raise ValueError(f"{flag}{name}: no such network, {keys}")


def rename_all(state, start, name):
    """(weights of the encoder with the prefix `start` by MAE's names, names left out)."""
    # Hugging Face's decoder is beside vit.
    outer, names = start.removesuffix("vit."), {}
    # lightly's encoder has a mask token, too, which MAE does not use.
    unused = f"{outer}mask_token" if "decoder.mask_token" in state else None
    for old in state:
        if old == unused:
            continue
        inside = old.startswith(start)
        new = to_mae_name(old[len(start) :] if inside else old.removeprefix(outer))
        if inside or DECODER_KEYS.match(new):
            if new in names:
                raise ValueError(f"{name}: {names[new]} and {old} both map to {new}")
            names[new] = old
    networks = {match[1] for match in map(NETWORK.match, names) if match}
    weights = {}
    for new, old in names.items():
        if re.match(KNOWN, new):
            check_parameter(state[old], f"{name}: {old}")
            weights[new] = state[old]
        elif not re.match(HEAD_PATTERN, new) and new.split(".")[0] not in networks:
            raise ValueError(f"{name}: unexpected {old}: not part of a plain ViT")
    kept = {names[new] for new in weights}
    return weights, [old for old in state if old not in kept]


def to_mae_name(key):
    """Translate the name of a weight to MAE's."""
    for pattern, new in RENAMES:
        key = re.sub(pattern, new, key)
    return key


def check_parameter(x, name):
    """ValueError unless x is a dense tensor of finite floating-point numbers."""
    dense = torch.is_tensor(x) and x.layout == torch.strided and not x.is_meta
    if not dense or not x.is_floating_point():
        kind = f"{x.dtype} {x.layout}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"{name} is {kind}; must be a dense floating-point tensor")
    # float8 has no isfinite.
    if not x.to(torch.promote_types(x.dtype, torch.bfloat16)).isfinite().all():
        raise ValueError(f"{name} is not finite")


def join_qkv(state, name):
    """Concatenate Hugging Face's separate query, key and value; absent biases are zero."""
    for key in [key for key in state if ".attn.q." in key]:
        names = [key.replace(".q.", f".{x}.") for x in "qkv"]
        parts = [state.pop(part, torch.empty(0)) for part in names]
        if len({part.shape for part in parts}) != 1 or not parts[0].dim():
            raise ValueError(f"{name}: {names}: one is missing or has another shape")
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    if not any(key.endswith("attn.qkv.bias") for key in state):
        for key in [key for key in state if key.endswith("attn.qkv.weight")]:
            bias = torch.zeros(state[key].shape[:1])
            state[key.removesuffix("weight") + "bias"] = bias
    return state


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


def encoder_config(kind, weights, heads=None, img_size=None):
    """Config (of class `kind`) of the encoder of Weights; sets the grid of their positions.

    heads, img_size: instead of the file's. Logs what is guessed.
    """
    name, given, positions = weights.name, weights.settings, weights.state["pos_embed"]
    sizes = weight_sizes(weights.state)
    sizes = {key: value for key, value in sizes.items() if not DECODER_KEYS.match(key)}
    channels = sizes["in_chans"]
    settings = {"model": "vit_base", "data": ""} | sizes
    if channels != 3:
        # The averages of ImageNet's, as there is no better guess.
        settings |= {"mean": (0.449,) * channels, "std": (0.226,) * channels}
    settings |= given
    settings["heads"] = (
        heads or given.get("heads") or HEADS_BY_WIDTH.get(sizes["width"])
    )
    if not settings["heads"]:
        raise ValueError(f"{name}: no standard width, {sizes['width']}; give --heads")
    if not heads and "heads" not in given:
        log_line(f"{name}: {settings['heads']} heads, a guess by width; see --heads")
    if "mean" not in given:
        log_line(
            f"{name}: assumes ImageNet's mean and std; timm:NAME@FILE knows timm's"
        )
    if "img_size" not in given:
        number = positions.shape[1] - 1
        side = math.isqrt(max(number, 0))
        is_square = side**2 == number > 0
        settings["img_size"] = side * sizes["patch_size"] if is_square else img_size
    names = {field.name for field in dataclasses.fields(kind)} & set(settings)
    try:
        cfg = kind(**{key: settings[key] for key in names})
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: damaged settings ({error})") from error
    # Before anything of the settings' size is allocated.
    for key, value in sizes.items():
        if getattr(cfg, key) != value:
            reason = f"its settings have {key} {getattr(cfg, key)}, its weights {value}"
            raise ValueError(f"{name}: {reason}")
    if positions.shape[1] != 1 + math.prod(cfg.grid):
        shape = tuple(positions.shape)
        raise ValueError(
            f"{name}: pos_embed {shape} does not match the grid {cfg.grid}"
        )
    weights.grid = cfg.grid
    return dataclasses.replace(cfg, img_size=img_size or cfg.img_size)


def resize_positions(positions, old, grid):
    """Resize positions (1, 1 + L, D) but the class token's from the grid `old`."""
    # Sin-cos tables, too: computed for the new grid, they would have rows and columns that
    # training never saw, which lowers k-NN of the class token.
    image = positions[:, 1:].float().unflatten(1, old).permute(0, 3, 1, 2)
    # As in transformers: bicubic, corners not aligned, no antialiasing.
    image = F.interpolate(image, grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], image.flatten(2).mT], dim=1)


def load_initial(model, run, checkpoint):
    """Load the weights of the checkpoint (parts of last.pt, or None) or of --init."""
    cfg = run.cfg
    if checkpoint:
        load_state(model, checkpoint["model"], checkpoint["path"])
    elif cfg.init:
        weights = read_weights(cfg.init, cfg.weights_key, cfg.weights_prefix)
        sizes = weight_sizes(weights.state)
        # What no weight reveals.
        heads = ["heads", "decoder_heads"] if "decoder_depth" in sizes else ["heads"]
        sizes |= {key: weights.settings.get(key, getattr(cfg, key)) for key in heads}
        flags = [f"--{key} {n}" for key, n in sizes.items() if n != getattr(cfg, key)]
        if flags:
            reason = f"does not fit this {cfg.model}; use {' '.join(flags)}"
            raise ValueError(f"{cfg.init} {reason}")
        trained = encoder_config(type(cfg), weights, cfg.heads, cfg.img_size)
        message = load_weights(model, weights)
        guesses = [f"--{x} {sizes[x]}" for x in heads if x not in weights.settings]
        if guesses:
            message += f"; the file does not say whether {' '.join(guesses)} is right"
        if weights.settings.get("norm_pix", cfg.norm_pix) != cfg.norm_pix:
            message += f"; trained with norm_pix {not cfg.norm_pix}"
        for key in ("mean", "std"):
            values = getattr(trained, key)
            if key in weights.settings and values != getattr(cfg, key):
                message += f"; trained with --{key} {' '.join(map(str, values))}"
        run.log.info(f"--init {cfg.init}: {message}")


def load_weights(model, weights):
    """Load Weights into a ViT or an MAE; returns a note on unused and missing weights.

    ValueError if the encoder is incomplete, or if a weight does not fit the model.
    """
    state, name, untrained, notes = dict(weights.state), weights.name, set(), []
    if not hasattr(model, "mask_token"):
        state = {key: x for key, x in state.items() if not DECODER_KEYS.match(key)}
        if "fc_norm.weight" in state:
            # As in timm and mae, the mean of the patches is normalized, not each token.
            model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.cfg.width)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = weights.settings.get("eps", 1e-6)
    else:
        if not any(map(DECODER_KEYS.match, state)):
            untrained |= {key for key in model.state_dict() if DECODER_KEYS.match(key)}
            notes.append("no decoder in the file, it starts from random weights")
        if state.pop("fc_norm.weight", None) is not None:
            state.pop("fc_norm.bias", None)
            untrained |= {"norm.weight", "norm.bias"}
            notes.append("no final norm in the file, it starts untrained")
    for key in {"pos_embed", "decoder_pos_embed"} & set(state):
        if not state[key].any():
            log_line(f"{name}: {key} is all zero: the model has no positions")
        of_grid = state[key].shape[1] == 1 + math.prod(weights.grid)
        if of_grid and weights.grid != model.cfg.grid:
            log_line(f"{name}: {key} resized from {weights.grid} to {model.cfg.grid}")
            state[key] = resize_positions(state[key], weights.grid, model.cfg.grid)
    load_checked(model, state, untrained, name)
    if weights.unused:
        some = ", ".join(weights.unused[:3])
        notes.append(f"{len(weights.unused)} weights are not used, such as {some}")
        if not hasattr(model, "mask_token"):
            log_line(f"{name}: {notes[-1]}")
    return ", ".join(notes) or "all weights loaded"


def load_checked(model, state, untrained, name):
    """Load weights of any precision; ValueError unless all but `untrained` names agree."""
    own = model.state_dict()
    kept = {key: own[key] for key in untrained}
    same = {key: x.to(own[key].dtype) if key in own else x for key, x in state.items()}
    load_state(model, kept | same, name)
