#!/usr/bin/env bash
# huggingface_hub: a model of PyTorchModelHubMixin comes back with another depth, norm or
# activation, part of it random, without an error.
#
# Versions: huggingface_hub 2.4.0, torch 2.14.1, safetensors 0.8.0, numpy 2.4.6.
# Expected: save_pretrained writes the arguments of __init__ into config.json, or raises, and
# from_pretrained refuses a file that lacks weights, as load_state_dict does: what is loaded
# gives the features that were saved.
# Behavior: an argument that JSON cannot hold is left out, and the default takes its place.
# norm_layer and act_layer, arguments of MAE's and timm's models, come back as LayerNorm and
# GELU, an eps given by partial is lost, the mean of a data set comes back as ImageNet's. An
# integer of NumPy, as from a sweep over np.arange, is one of those arguments: six blocks come
# back as twelve. As weights are loaded with strict=False and what is missing is not looked at,
# six of them are random. No warning, neither when saving nor when loading.
# Workaround: Python's own types, coders= for others, and from_pretrained(strict=True).
#
# Output seen (blocks, relative change of the features, config.json):
#   depth 6        6 -> 6    0.0000  {'depth': 6, 'mean': [0.485, 0.456, 0.406]}
#   mean as list   12 -> 12  0.0000  {'depth': 12, 'mean': [0.491, 0.482, 0.447]}
#   depth np.int64 6 -> 12   0.8040  {'depth': 12, 'mean': [0.485, 0.456, 0.406]}
#   mean as array  12 -> 12  0.1144  {'depth': 12, 'mean': [0.485, 0.456, 0.406]}
#   RMSNorm        12 -> 12  0.3023  {'depth': 12, 'mean': [0.485, 0.456, 0.406]}
#   SiLU           12 -> 12  0.2153  {'depth': 12, 'mean': [0.485, 0.456, 0.406]}
#   strict=True: RuntimeError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 safetensors==0.8.0 \
    huggingface_hub==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

IMAGENET, CIFAR = [0.485, 0.456, 0.406], [0.491, 0.482, 0.447]


class Encoder(nn.Module, PyTorchModelHubMixin):
    def __init__(self, depth=12, norm_layer=nn.LayerNorm, act_layer=nn.GELU, mean=IMAGENET):
        super().__init__()
        self.mean = torch.as_tensor(mean, dtype=torch.float32)[:, None, None]
        self.patches = nn.Conv2d(3, 32, 8, 8)
        block = partial(nn.TransformerEncoderLayer, 32, 2, 64, norm_first=True, batch_first=True)
        self.blocks = nn.Sequential(*(block(activation=act_layer()) for _ in range(depth)))
        self.norm = norm_layer(32)

    def forward(self, images):
        return self.norm(self.blocks(self.patches(images - self.mean).flatten(2).mT))


images = torch.rand(8, 3, 32, 32)


@torch.no_grad()
def reload(label, **arguments):
    torch.manual_seed(0)
    model = Encoder(**arguments).eval()
    model.save_pretrained(label)
    torch.manual_seed(1)
    loaded = Encoder.from_pretrained(label)
    a, b = model(images), loaded(images)
    change = ((a - b).norm() / a.norm()).item()
    blocks = f"{len(model.blocks)} -> {len(loaded.blocks)}"
    config = json.loads(Path(label, "config.json").read_text())
    print(f"{label:14} {blocks:9} {change:.4f}  {config}")
    return change


assert reload("depth 6", depth=6) == 0
assert reload("mean as list", mean=CIFAR) == 0
assert reload("depth np.int64", depth=np.int64(6)) > 0.1
assert reload("mean as array", mean=np.array(CIFAR)) > 1e-3
assert reload("RMSNorm", norm_layer=nn.RMSNorm) > 0.01
assert reload("SiLU", act_layer=nn.SiLU) > 0.01
try:
    Encoder.from_pretrained("depth np.int64", strict=True)
except RuntimeError as error:
    print("strict=True:", type(error).__name__)
else:
    raise SystemExit("strict=True loads it, too")
PY
