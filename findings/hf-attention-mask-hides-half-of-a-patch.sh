#!/usr/bin/env bash
# transformers: patches hidden by attention_mask keep half of their influence in BEiT, and in any
# ViT under a 4-D bool mask once attention maps are asked for.
#
# Versions: transformers 5.24.0, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6.
# Expected: attention_mask, 1 for tokens to attend to and 0 for others, hides background patches. So
# does PyTorch's bool mask (B, 1, 1, tokens), by fused attention ("sdpa", the default) and by the
# one that returns maps ("eager") alike. What a model cannot take raises.
# Behavior: some masks are added to the scores as they are. True adds 1, so a hidden patch has 1 / e
# of the weight of a visible one instead of 0. This happens
# - to 4-D bool masks under "eager". Under "sdpa" they are right: the features and the attention
#   maps of one model then belong to two different masks;
# - to all bool and 2-D masks in BEiT under "sdpa", which adds them to its relative positions. It
#   documents the argument; as "eager", or without relative positions, it obeys 2-D masks;
# - to 2-D float masks in CLIP, SigLIP, AIMv2 and DINOv3, which have no such parameter but pass it
#   on, for one image at a time (more of them raise).
# Data2Vec and VideoMAE ignore all masks, and all models ignore head_mask, which version 5 dropped:
# by it no head matters. No warning anywhere.
# Workaround: a float mask (B, 1, 1, tokens) of 0 and the lowest float, and a test as this one.
#
# Output seen (how much of the right half's influence on CLS is left where it is hidden):
#               2-D mask     4-D bool     4-D float
#               sdpa eager   sdpa eager   sdpa eager
#   ViT         0.00  0.00   0.00  0.53   0.00  0.00
#   DINOv2      0.00  0.00   0.00  0.53   0.00  0.00
#   BEiT        0.55  0.00   0.55  0.55   0.00  0.00
#   CLIP        0.54  0.54   0.00  0.54   0.00  0.00
#   DINOv3      0.53  0.53   0.00  0.53   0.00  0.00
#   Data2Vec    1.00  1.00   1.00  1.00   1.00  1.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 transformers==5.24.0
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers as hf

sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
             image_size=32, patch_size=8)  # fmt: skip
relative = dict(sizes, use_relative_position_bias=True)
models = {
    "ViT": (hf.ViTModel, hf.ViTConfig(**sizes)),
    "DINOv2": (hf.Dinov2Model, hf.Dinov2Config(**sizes)),
    "BEiT": (hf.BeitModel, hf.BeitConfig(**relative)),
    "CLIP": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**sizes)),
    "DINOv3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**sizes)),
    "Data2Vec": (hf.Data2VecVisionModel, hf.Data2VecVisionConfig(**relative)),
}
torch.manual_seed(0)
image, other = torch.randn(2, 1, 3, 32, 32)
other[..., :16] = image[..., :16]  # only the right half differs
left_half = torch.arange(16) % 4 < 2
bool_mask = torch.cat([torch.tensor([True]), left_half])[None]  # CLS and 4 x 4 patches
lowest = torch.finfo(torch.float32).min
masks = (
    bool_mask.float(),
    bool_mask[:, None, None],
    torch.zeros(1, 1, 1, 17).masked_fill(~bool_mask[:, None, None], lowest),
)


def influence(model, **mask):
    return (model(image, **mask)[0] - model(other, **mask)[0])[:, 0].norm().item()


print(9 * " " + "   2-D mask     4-D bool     4-D float\n" + 9 * " " + 3 * "   sdpa eager")
for name, (Model, config) in models.items():
    shares = []
    for mask in masks:
        for attention in ("sdpa", "eager"):
            torch.manual_seed(1)
            model = Model._from_config(config, attn_implementation=attention).eval()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(std=0.3)
                shares.append(influence(model, attention_mask=mask) / influence(model))
                assert influence(model, head_mask=torch.zeros(3, 4)) == influence(model)
    print(f"{name:9}" + (3 * "   {:.2f}  {:.2f}").format(*shares))
    # o: hidden, h: half of the influence is left, a: all of it.
    want = {"BEiT": "hohhoo", "CLIP": "hhohoo", "DINOv3": "hhohoo", "Data2Vec": "aaaaaa"}
    for share, word in zip(shares, want.get(name, "ooohoo"), strict=True):
        low, high = {"o": (0, 1e-4), "h": (0.3, 0.8), "a": (0.9999, 1.0001)}[word]
        assert low <= share <= high, (name, shares)
PY
