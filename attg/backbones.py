"""
Backbones of other libraries: ViTs of timm and Hugging Face by name, torchvision's CNNs.

    timm:vit_small_patch14_reg4_dinov2.lvd142m     timm's weights
    timm:vit_small_patch16_224@FILE                weights in a file
    hf:FOLDER_OR_NAME                              as for transformers' from_pretrained

Shapes: B images, L patches, N tokens, D width.
"""

import hashlib
import inspect
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from attg.checkpoint import checksums
from attg.weights import (
    HEAD_PATTERN,
    PATCH_EMBED,
    check_parameter,
    find_prefix,
    image_statistics,
    load_checked,
    read_file,
    read_json,
    select_entry,
)


def is_named(source):
    """Whether a string names a model of timm or Hugging Face, not a file."""
    return str(source).startswith(("timm:", "hf:"))


def open_backbone(source, img_size=None):
    """The NamedViT of timm:NAME, timm:NAME@FILE or hf:FOLDER_OR_NAME, in eval mode.

    img_size: in pixels, instead of the model's. ValueError names the source.
    """
    library, _, name = source.partition(":")
    try:
        return (open_timm if library == "timm" else open_hf)(name, img_size)
    # These libraries raise nearly anything for a wrong name, file or size.
    except Exception as error:
        reason = textwrap.shorten(str(error), 300)
        if isinstance(error, ModuleNotFoundError):
            reason += f"; pip install {'timm' if library == 'timm' else 'transformers'}"
        raise ValueError(f"{source}: {reason}") from error


# timm would resize it.
PATCHES = "patch_embed.proj.weight"


def open_timm(name, img_size):
    """See open_backbone."""
    import timm

    name, _, path = name.partition("@")
    options = {"img_size": img_size} if img_size else {}
    options |= {"num_classes": 0, "pretrained": True}
    if path:
        state = timm.models.clean_state_dict(select_entry(read_file(path), None, path))
        start = find_prefix(state, PATCH_EMBED, None, path)
        state = {k[len(start) :]: x for k, x in state.items() if k.startswith(start)}
        # If timm knew of a classifier to leave out, it would load what fits of the rest.
        unused = re.compile(f"decoder_|{HEAD_PATTERN}").match
        state = {k: x for k, x in state.items() if torch.is_tensor(x) and not unused(k)}
        options["pretrained_cfg_overlay"] = {"state_dict": state, "classifier": None}
    model = timm.create_model(name, **options)
    if path and model.get_parameter(PATCHES).shape != state[PATCHES].shape:
        shape = tuple(state[PATCHES].shape)
        raise ValueError(f"its {PATCHES} is {shape}; name a model of such patches")
    images = timm.data.resolve_model_data_config(model)
    beside = Path(path).with_name("config.json") if path else None
    if path and beside.is_file():
        images |= image_statistics(read_json(beside).get("pretrained_cfg"))
    size = (img_size, img_size) if img_size else images["input_size"][1:]
    return NamedViT(model, size, **image_statistics(images))


def open_hf(name, img_size):
    """See open_backbone."""
    import transformers as hf

    options = {"attn_implementation": "sdpa", "output_loading_info": True}
    model, info = hf.AutoModel.from_pretrained(name, **options)
    if hasattr(model.config, "mask_ratio"):
        remedy = "pass its model.safetensors, with config.json beside it"
        raise ValueError(f"{type(model).__name__} shuffles its patches; {remedy}")
    missing = sorted(k for k in info["missing_keys"] if "pooler." not in k)
    if missing:
        lacks = f"lacks {len(missing)} parameters: {', '.join(missing[:3])}"
        raise ValueError(f"the file {lacks}; it is of another model, or rename them")
    # CLIP and SigLIP have a text model, too.
    model = getattr(model, "vision_model", model)
    if info["missing_keys"]:
        model.pooler = None  # its weights would be random
    try:
        images = hf.AutoImageProcessor.from_pretrained(name).to_dict()
    except OSError as error:
        remedy = "save a ViTImageProcessor beside it, with its mean and std"
        raise ValueError(f"it has no preprocessor_config.json; {remedy}") from error
    side = img_size or model.config.image_size
    size = (side, side) if isinstance(side, int) else side
    return NamedViT(model, size, **image_statistics(images))


class StopForward(Exception):
    """Ends a forward pass; args: what was looked for."""


class FindAttention(TorchFunctionMode):
    """Raises StopForward with the arguments of scaled_dot_product_attention, a dict."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            raise StopForward(dict(zip(("query", "key"), args, strict=False)) | kwargs)
        return function(*args, **kwargs)


class NamedViT(nn.Module):
    """A ViT of timm or Hugging Face, with what the programs use of this project's ViT.

    Register and distillation tokens are left out. The feature of an attention pool takes
    the place of the class token; without both it is the model's pooled feature, or else
    the patch mean. fc_norm: see attg.features.pool_tokens.
    """

    def __init__(self, model, size, mean, std):
        super().__init__()
        # transformers keeps a file's 16 bits.
        self.model = model.float().eval().requires_grad_(False)
        modules = dict(model.named_modules())
        convs = [m for m in modules.values() if isinstance(m, nn.Conv2d)]
        # Projections to queries, keys and values, or to keys alone, one in each block.
        names = [n for n in modules if re.search(r"\b(qkv|k_proj|key)$", n)]
        if not names or not convs or convs[0].kernel_size != convs[0].stride:
            raise ValueError("not a ViT, no projection to keys or no patch embedding")
        self.key = modules[names[-1]]
        self.attention = modules[names[-1].rpartition(".")[0]]
        if hasattr(self.attention, "fused_attn"):
            self.attention.fused_attn = True
        p, channels = convs[0].stride[0], convs[0].in_channels
        if size[0] % p or size[1] % p:
            raise ValueError(f"--img_size {size[0]}: must be a multiple of {p}")
        self.cfg = SimpleNamespace(
            size=tuple(size),
            grid=(size[0] // p, size[1] // p),
            patch_size=p,
            in_chans=channels,
            width=self.key.in_features,
            depth=len(names),
            mean=tuple(mean),
            std=tuple(std),
            white=None,
        )
        last_names = {n.rpartition(".")[2] for n, _ in model.named_parameters()}
        self.has_class_token = bool(last_names & {"cls_token", "class_embedding"})
        norm = getattr(getattr(model, "pooler", None), "layernorm", None)
        self.fc_norm = getattr(model, "fc_norm", norm) or nn.Identity()
        self.norms_tokens = False
        # Tokens before those of the patches, in the last block and after it.
        imgs, L = torch.zeros(1, channels, *size), math.prod(self.cfg.grid)
        for tokens in (self.last_input(imgs)[0], self.tokens(imgs)[0]):
            self.first = tokens.shape[1] - L
            if tokens.dim() != 3 or not 0 <= self.first < 20:
                shape = tuple(tokens.shape)
                raise ValueError(f"not a plain ViT: {shape} tokens of {L} patches")
        # AIMv2's is a query of its pooling.
        self.has_class_token &= self.first > 0
        norm, dims = getattr(model, "post_layernorm", None), []
        if self.has_class_token and norm is not None:
            # CLIP normalizes the class token alone, (B, D), BLIP and GIT all tokens.
            with norm.register_forward_pre_hook(lambda _, x: dims.append(x[0].dim())):
                self.tokens(imgs)
            self.norms_tokens = 3 not in dims

    def normalize(self, imgs):
        """uint8 (B, C, H, W) -> normalized floats."""
        values = torch.tensor([self.cfg.mean, self.cfg.std], device=imgs.device)
        mean, std = values[:, :, None, None]
        return (imgs / 255 - mean) / std

    def tokens(self, imgs):
        """All tokens (B, N, D) after the last norm; the model's pooled feature, or None."""
        model = self.model
        if not hasattr(model, "forward_features"):
            # Not a parameter of models that always resize their positions.
            resize = "interpolate_pos_encoding"
            takes = resize in inspect.signature(model.forward).parameters
            output = model(imgs, **({resize: True} if takes else {}))
            tokens = output.last_hidden_state
            if self.norms_tokens:
                tokens = model.post_layernorm(tokens)
            # Where there is a class token, ViT's pooler is a head for another task.
            return tokens, None if self.has_class_token else output.get("pooler_output")
        tokens = model.forward_features(imgs)
        has_pool = getattr(model, "attn_pool", None) is not None
        return tokens, model.forward_head(tokens, True) if has_pool else None

    def forward_features(self, imgs):
        """Images (B, C, H, W) -> tokens (B, 1 + L, D)."""
        tokens, pooled = self.tokens(imgs)
        patches = tokens[:, self.first :]
        if pooled is None:
            pooled = tokens[:, 0] if self.has_class_token else patches.mean(dim=1)
        return torch.cat([pooled[:, None], patches], dim=1)

    def last_input(self, imgs):
        """Input (B, N, D) of the last block's attention, then its args and kwargs."""

        def stop(module, args, kwargs):
            raise StopForward(
                args[0] if args else kwargs["hidden_states"], args, kwargs
            )

        hook = self.attention.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.tokens(imgs)
        except StopForward as found:
            return found.args
        finally:
            hook.remove()
        raise ValueError("its last attention is not called as a module")

    def patch_keys(self, imgs):
        """Keys of the last block (B, L, D), heads joined, before norms and rotation."""
        x, D = self.last_input(imgs)[0], self.cfg.width
        rows = slice(D, 2 * D) if len(self.key.weight) == 3 * D else slice(None)
        bias = None if self.key.bias is None else self.key.bias[rows]
        return F.linear(x[:, self.first :], self.key.weight[rows], bias)

    def class_attention(self, imgs):
        """Mean attention (B, L) of the class token to the patches in the last block."""
        if not self.has_class_token:
            raise ValueError("this backbone has no class token; use --method tokencut")
        _, args, kwargs = self.last_input(imgs)
        try:
            with FindAttention():
                self.attention(*args, **kwargs)
        except StopForward as found:
            call = found.args[0]
        else:
            raise ValueError("this backbone's attention is not dot-product attention")
        q, k, mask = call["query"][:, :, :1], call["key"], call.get("attn_mask")
        logits = q @ k.mT * (call.get("scale") or q.shape[-1] ** -0.5)  # (B, H, 1, N)
        if mask is not None:
            logits = logits + mask[..., :1, :]
        return logits.softmax(dim=-1)[:, :, 0, self.first :].mean(dim=1)


def weights_sha256(model):
    """sha256 (hex digest) that identifies the weights of a model."""
    sums = checksums(model.state_dict())
    return hashlib.sha256(repr(sums).encode()).hexdigest()


# A weight whose name reveals the prefix of all names, and the classifier.
CNNS = {"resnet50": ("layer1.0.conv1.weight", "fc")}
CNNS["mobilenet_v2"] = ("features.1.conv.0.0.weight", "classifier.1")


def load_cnn(name, path, key=None, prefix=None):
    """torchvision's CNN with the weights of a file, and whether it has a classifier.

    The classifier may be of any number of classes. key, prefix: see read_weights.
    """
    from torchvision.models import get_model

    anchor, head = CNNS[name]
    state = select_entry(read_file(path), key, path)
    start = find_prefix(state, re.escape(anchor), prefix, path)
    state = {k[len(start) :]: x for k, x in state.items() if k.startswith(start)}
    matrix = state.get(f"{head}.weight")
    classes = len(matrix) if torch.is_tensor(matrix) and matrix.dim() == 2 else 0
    model = get_model(name, num_classes=classes or 1)
    counters = {k for k in model.state_dict() if k.endswith("num_batches_tracked")}
    state = {k: x for k, x in state.items() if k not in counters}
    for k, x in state.items():
        check_parameter(x, f"{path}: {k}")
    untrained = counters if classes else counters | {f"{head}.weight", f"{head}.bias"}
    load_checked(model, state, untrained, path)
    return model.eval().requires_grad_(False), classes > 0
