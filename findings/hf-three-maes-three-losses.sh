#!/usr/bin/env bash
# transformers: three masked autoencoders of one library, three meanings of mask and target.
#
# Versions: transformers 5.24.0, torch 2.14.1.
# Expected: what reproduces the loss of ViTMAE (its mask, patches by rows with the channel
# last, each normalized by its own mean and variance + 1e-6 under the root) reproduces the
# loss of VideoMAE and Hiera, too, given what they call bool_masked_pos.
# Behavior: ViTMAE's `mask` is 1 at hidden patches, and VideoMAE's `bool_masked_pos` is True
# there. Hiera returns a `bool_masked_pos` that is True at *visible* patches, and its patch
# values have the channel first. VideoMAE normalizes each channel of a patch by itself, and
# adds 1e-6 to the deviation. A loss written for one of them runs on the two others, without
# an error, and differs by less than 0.02 on fresh models, where all are near 1.
# Workaround: compute the model's own loss with your code before you change anything in it.
#
# Output seen (the model's loss; the loss by the conventions of ViTMAE; those that fit):
#   ViTMAE   1.00969 1.00969 ['hidden, channel last, by patch']
#   VideoMAE 1.00773 1.00127 ['hidden, channel last, by channel']
#   Hiera    1.02102 1.01151 ['visible, channel first, by patch']
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.14.1 transformers==5.24.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
import torch
from transformers import (
    HieraConfig,
    HieraForPreTraining,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)


def patches(imgs, size, order):
    """Images (B, 3, H, W) as (B, L, values)."""
    x = imgs.unfold(2, size, size).unfold(3, size, size)
    dims = (0, 2, 3, 1, 4, 5) if order == "first" else (0, 2, 3, 4, 5, 1)
    return x.permute(dims).flatten(1, 2).flatten(2)


def by_patch(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6) ** 0.5


def by_channel(x):
    x = x.unflatten(-1, (-1, 3))
    x = (x - x.mean(-2, keepdim=True)) / (x.std(-2, keepdim=True) + 1e-6)
    return x.flatten(-2)


CONVENTIONS = {
    f"{meaning}, channel {order}, {norm.__name__.replace('_', ' ')}": (meaning, order, norm)
    for meaning in ("hidden", "visible")
    for order, norm in (("last", by_patch), ("last", by_channel), ("first", by_patch))
}


def compare(name, loss, pred, imgs, size, mask):
    losses = {}
    for label, (meaning, order, norm) in CONVENTIONS.items():
        hidden = mask.bool() if meaning == "hidden" else ~mask.bool()
        # VideoMAE predicts hidden patches only.
        chosen = pred[hidden] if pred.shape[1] == mask.shape[1] else pred.flatten(0, 1)
        target = norm(patches(imgs, size, order))[hidden]
        if chosen.shape == target.shape:
            losses[label] = ((chosen - target) ** 2).mean().item()
    fits = [label for label, x in losses.items() if abs(x - loss.item()) < 1e-5]
    usual = losses["hidden, channel last, by patch"]
    print(f"{name:8} {loss:.5f} {usual:.5f} {fits}")
    return fits


torch.manual_seed(0)
size = dict(image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=1)
size |= dict(num_attention_heads=2, intermediate_size=64, norm_pix_loss=True)
size |= dict(decoder_hidden_size=32, decoder_num_hidden_layers=1)
size |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=64)
# Smooth images whose channels differ in brightness and contrast.
imgs = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8), 64, mode="bicubic")
imgs = imgs * torch.tensor([1.0, 0.3, 2.0]).view(3, 1, 1)
imgs = imgs + torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1)

model = ViTMAEForPreTraining(ViTMAEConfig(**size)).eval()
out = model(imgs)
found = [compare("ViTMAE", out.loss, out.logits, imgs, 16, out.mask)]

# A video of one frame. Targets are of the values before ImageNet's mean and deviation.
model = VideoMAEForPreTraining(VideoMAEConfig(num_frames=1, tubelet_size=1, **size)).eval()
mask = torch.rand(4, 16).argsort(1) < 12
out = model(imgs[:, None], bool_masked_pos=mask)
frame = imgs * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
frame = frame + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
found.append(compare("VideoMAE", out.loss, out.logits, frame, 16, mask))

config = HieraConfig(
    image_size=[64, 64],
    embed_dim=16,
    depths=[1, 1, 1],
    num_heads=[1, 2, 4],
    num_query_pool=2,
    masked_unit_size=[4, 4],
    masked_unit_attention=[True, True, False],
    decoder_hidden_size=32,
    decoder_depth=1,
    decoder_num_heads=2,
    mask_ratio=0.75,
)
model = HieraForPreTraining(config).eval()
out = model(imgs)
found.append(
    compare("Hiera", out.loss, out.logits, imgs, model.pred_stride, out.bool_masked_pos)
)
assert found == [
    ["hidden, channel last, by patch"],
    ["hidden, channel last, by channel"],
    ["visible, channel first, by patch"],
]
EOF
