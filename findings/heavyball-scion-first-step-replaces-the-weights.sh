#!/usr/bin/env bash
# heavyball: the first step of Scion replaces all weights of the model by new random ones and sets
# biases and LayerNorms to 0, whatever the learning rate; a pretrained model is lost.
#
# Versions: heavyball 3.2.1, torch 2.14.1, numpy 2.4.6; pytorch-optimizer 4.1.0 for comparison.
# Expected: an optimizer moves the weights by a multiple of the learning rate. "The API matches
# torch.optim", says the README; the docstring of Scion tells of norms and sources only.
# Behavior: the paper's initialization is part of the step. The first time that a tensor has a
# gradient it becomes an orthogonal matrix, seeded by its place in the group, times a scale, and all
# vectors become 0, among them the weights of LayerNorm, so that the gradients of what comes before
# them are 0. Of an encoder to be fine-tuned nothing is left; layers that are unfrozen later are
# lost when they are unfrozen; a warmup from 0 does not help. The loss of the first step is still
# that of the pretrained model, that of the second one is chance, as with a learning rate too large.
# No message. A loaded optimizer state keeps the weights. heavyball's AdamW and Muon do no such
# thing, and pytorch-optimizer has the initialization of Scion as a method of its own.
# Workaround: one step, then the pretrained weights loaded again; or another package's Scion.
#
# Output seen:
#   pretrained: accuracy 1.000
#   after a step:               lr 1e-5: accuracy, change    lr 0: accuracy, change
#     heavyball.AdamW                      1.000 0.00001           1.000 0.00000
#     heavyball.Muon                       1.000 0.00001           1.000 0.00000
#     heavyball.Scion                      0.109 2.09172           0.106 2.09174
#     pytorch_optimizer.SCION              1.000 0.00003           1.000 0.00000
#   first layer: change 0.000 while frozen, 0.889 one step later
#   with the state of an earlier run: accuracy 1.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 heavyball==3.2.1 pytorch-optimizer==4.1.0
"$dir/venv/bin/python" -W ignore - <<'PROGRAM'
import copy

import heavyball
import heavyball.utils
import pytorch_optimizer
import torch
from torch import nn
from torch.nn.functional import cross_entropy

heavyball.utils.compile_mode = None  # saves a minute of compilation, changes nothing else
torch.set_num_threads(1)
torch.manual_seed(0)
images = torch.randn(2000, 32)
labels = (images @ torch.randn(32, 10)).argmax(1)
model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))


def train(model, optimizer, steps):
    for _ in range(steps):
        batch = torch.randint(2000, (256,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def accuracy(model):
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


train(model, torch.optim.AdamW(model.parameters(), 1e-2), 300)
pretrained = accuracy(model)
print(f"pretrained: accuracy {pretrained:.3f}")
assert pretrained > 0.9
print("after a step:               lr 1e-5: accuracy, change    lr 0: accuracy, change")

for name, make in {
    "heavyball.AdamW": heavyball.AdamW,
    "heavyball.Muon": heavyball.Muon,
    "heavyball.Scion": heavyball.Scion,
    "pytorch_optimizer.SCION": pytorch_optimizer.SCION,
}.items():
    row = []
    for rate in (1e-5, 0):
        tuned = copy.deepcopy(model)
        train(tuned, make(tuned.parameters(), lr=rate), 1)
        pairs = zip(tuned.parameters(), model.parameters())
        row += [accuracy(tuned), max((p - q).abs().max().item() for p, q in pairs)]
        norms = [p.norm().item() for p in tuned.parameters() if p.ndim == 1]
    print(f"  {name:32}", "{:9.3f} {:.5f} {:15.3f} {:.5f}".format(*row))
    lost = name == "heavyball.Scion"
    assert (row[0] < 0.3) == (row[2] < 0.3) == (row[1] > 0.5) == (max(norms) == 0) == lost, name

frozen = copy.deepcopy(model)
frozen[0].requires_grad_(False)
optimizer = heavyball.Scion(frozen.parameters(), lr=1e-3)
changes = []
for trainable in (False, True):
    frozen[0].requires_grad_(trainable)
    train(frozen, optimizer, 1)
    changes.append((frozen[0].weight - model[0].weight).abs().max().item())
print("first layer: change {:.3f} while frozen, {:.3f} one step later".format(*changes))
assert changes[0] == 0 and changes[1] > 0.1

state = optimizer.state_dict()
resumed = copy.deepcopy(model)
optimizer = heavyball.Scion(resumed.parameters(), lr=0)
optimizer.load_state_dict(state)
for group in optimizer.param_groups:
    group["lr"] = 0.0
train(resumed, optimizer, 1)
print(f"with the state of an earlier run: accuracy {accuracy(resumed):.3f}")
assert accuracy(resumed) == pretrained
PROGRAM
