"""
Weights from here and elsewhere: the layouts of facebookresearch/mae, DINO, timm and Hugging Face.
"""

import math
import re

import torch
import torch.nn.functional as F

from common.files import require
from common.run import load_checkpoint

DECODER = re.compile("decoder|mask_token")


HEADS = {
    192: 3,
    384: 6,
    768: 12,
    1024: 16,
    1280: 16,
}  # by width, for files that do not say


RENAMES = (  # prefixes, and HF's names before and since transformers 5 -> timm's and MAE's
    (r"^((module|_orig_mod|backbone|vit|decoder)\.)+", ""), (r"^embeddings\.", ""),
    (r"^position_embeddings", "pos_embed"), (r"^patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.", "blocks."), (r"^decoder_layers\.", "decoder_blocks."),
    (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
    (r"^layernorm\.", "norm."), (r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r"attn.\1."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."), (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
)  # fmt: skip


def read_weights(source):
    """A file or state dict of any known layout -> (state dict in MAE's names, this project's config or None, name)."""
    state = source if isinstance(source, dict) else load_checkpoint(source)
    config = state.get("config")
    config = (
        config if isinstance(config, dict) and "decoder_heads" in config else None
    )  # others have one, too
    for key in ("model", "state_dict", "teacher"):
        state = state[key] if isinstance(state.get(key), dict) else state
    weights = {}
    for key, value in state.items():
        for pattern, new in RENAMES:
            key = re.sub(pattern, new, key)
        weights[key] = value
    for key, q in [
        (key, q) for key, q in weights.items() if ".attn.q." in key
    ]:  # an absent k or v: wrong shape
        parts = [weights.pop(key.replace(".q.", f".{x}."), q[:0]) for x in "qkv"]
        weights[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    lacks = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
    } - set(weights)
    name = "the state dict" if isinstance(source, dict) else source
    require(
        not lacks,
        f"{name}: no ViT encoder in it: lacks {sorted(lacks)}, found {sorted(weights)[:8]}",
    )
    return weights, config, name


def load_weights(model, state, name, sincos_table):
    """Loads what read_weights gave; returns in words what was not in it. ValueError if the encoder is not whole."""
    for k in {"pos_embed", "decoder_pos_embed"} & set(
        state
    ):  # positions of a square grid
        side = math.isqrt(state[k].shape[1] - 1)
        table, new = (
            sincos_table(state[k].shape[2], (side, side)),
            model.get_parameter(k),
        )
        if state[k].shape[1:] == table.shape and torch.allclose(
            state[k][0].float(), table, atol=1e-4
        ):
            state = {**state, k: new}  # sin-cos: made anew
        elif state[k].shape[1:] == table.shape != new.shape[1:]:  # learned: resized
            grid = (
                state[k][:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
            )  # (1, D, side, side)
            grid = F.interpolate(
                grid,
                model.cfg.grid,
                mode="bicubic",
                align_corners=False,
                antialias=False,
            )
            state = {
                **state,
                k: torch.cat([state[k][:, :1], grid.flatten(2).mT], dim=1),
            }
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"{name} does not fit this {model.cfg.model}: {error}"
        ) from error
    fresh = not any(map(DECODER.match, state))
    wrong = [f"no {k}" for k in missing if not (fresh and DECODER.match(k))]
    wrong += [
        f"unexpected {k}"
        for k in unexpected
        if not re.match("head|fc_norm|pooler|classifier", k)
    ]
    require(
        not wrong, f"{name} does not fit this {model.cfg.model}: {', '.join(wrong)}"
    )
    notes = ["no decoder in it, the decoder starts afresh"] * fresh + [
        f"{k} is not used" for k in unexpected
    ]
    return ", ".join(notes) or "every weight found"
