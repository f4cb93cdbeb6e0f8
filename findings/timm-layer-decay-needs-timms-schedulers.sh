#!/usr/bin/env bash
# timm: layer decay without one of timm's schedulers is no layer decay; a model that is wrapped
# first loses the exemptions from weight decay, too.
#
# Versions: timm 1.0.31, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6.
# Expected: create_optimizer_v2(model, lr=1e-3, layer_decay=0.65), the recipe for fine-tuning a
# masked autoencoder, returns an optimizer whose lower layers learn more slowly, whatever
# schedules it; torch's schedulers keep the ratios of the groups. Compiled or in DDP the model
# gets the same groups: their names only have another prefix.
# Behavior: every group has the full lr and an entry lr_scale, which nothing but timm's own
# schedulers reads. With a scheduler of torch, as in Lightning, or none, the patch embedding
# learns 270 times as fast as asked for, as in plain fine-tuning, without a message. The
# docstring says that learning rates will be scaled. And names are matched from their beginning:
# of a model that torch.compile or DDP has wrapped no layer is recognized, which a log line
# tells, nor any name in no_weight_decay(), which none tells: position embedding and class token
# decay, also without layer decay.
# Workaround: multiply lr by lr_scale in each group at once; make the optimizer before wrapping.
#
# Output seen (lr of patch embedding, third block and head; weight decay of the positions):
#   timm's scheduler       3.7e-06 1.3e-05 1.0e-03   0.00
#   torch's scheduler      1.0e-03 1.0e-03 1.0e-03   0.00
#   no scheduler           1.0e-03 1.0e-03 1.0e-03   0.00
#   lr scaled, torch's     3.7e-06 1.3e-05 1.0e-03   0.00
#   timm's, compiled       1.0e-03 1.0e-03 1.0e-03   0.05
#   timm's, DDP            1.0e-03 1.0e-03 1.0e-03   0.05
#   without layer decay
#   plain                  1.0e-03 1.0e-03 1.0e-03   0.00
#   compiled               1.0e-03 1.0e-03 1.0e-03   0.05
#   DDP                    1.0e-03 1.0e-03 1.0e-03   0.05
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 timm==1.0.31
STORE="file://$dir/store" "$dir/venv/bin/python" -W ignore - <<'PY'
import os

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR

torch.distributed.init_process_group("gloo", os.environ["STORE"], rank=0, world_size=1)
NAMES = ("patch_embed.proj.weight", "blocks.2.mlp.fc1.weight", "head.weight", "pos_embed")


def same(x):
    return x


def groups(label, schedule, wrap=same, layer_decay=0.65):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    optimizer = create_optimizer_v2(
        wrap(model), "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)  # fmt: skip
    schedule(optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = [group_of[id(model.get_parameter(name))] for name in NAMES]
    rates = [group["lr"] for group in found[:3]]
    decay = found[3]["weight_decay"]
    print(f"{label:22}", *(f"{rate:.1e}" for rate in rates), f"  {decay:.2f}")
    return rates, decay


def timms(optimizer):
    CosineLRScheduler(optimizer, t_initial=10)


def torchs(optimizer):
    CosineAnnealingLR(optimizer, T_max=10)


def scaled(optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    torchs(optimizer)


asked = [1e-3 * 0.65**n for n in (13, 10, 0)]
full = [1e-3] * 3


def check(result, rates, decay):
    assert all(abs(a / b - 1) < 1e-6 for a, b in zip(result[0], rates)), result
    assert result[1] == decay, result


ddp = torch.nn.parallel.DistributedDataParallel
check(groups("timm's scheduler", timms), asked, 0)
check(groups("torch's scheduler", torchs), full, 0)
check(groups("no scheduler", same), full, 0)
check(groups("lr scaled, torch's", scaled), asked, 0)
check(groups("timm's, compiled", timms, torch.compile), full, 0.05)
check(groups("timm's, DDP", timms, ddp), full, 0.05)
print("without layer decay")
check(groups("plain", timms, layer_decay=None), full, 0)
check(groups("compiled", timms, torch.compile, None), full, 0.05)
check(groups("DDP", timms, ddp, None), full, 0.05)
torch.distributed.destroy_process_group()
PY
