#!/usr/bin/env bash
# adam-atan2-pytorch: MuonAdamAtan2 never trains the muon_params if they come as a generator, such
# as model.blocks.parameters(); its saved state is loaded into other parameters.
#
# Versions: adam-atan2-pytorch 0.4.1, torch 2.14.1, numpy 2.4.6.
# Expected: like all optimizers of PyTorch it takes any iterable of parameters, as it does for its
# second argument; the state of an optimizer built in the same way fits.
# Behavior: with remove_muon_params_from_params (the default) it makes a set of muon_params first,
# to take them out of params. That uses a generator up. The group of Muon is then empty, which
# PyTorch accepts, and the matrices, in neither group, keep their first values. The loss still
# falls, as biases, norms and the head are trained. No message. The others, too, are a set, in the
# order of their addresses in memory. PyTorch's state dict goes by order, so after a resume they get
# each other's averages: an error if the shapes do not fit, none for LayerNorms without biases.
# Workaround: two lists without a common parameter, remove_muon_params_from_params=False.
#
# Output seen (the 8 varies with the addresses):
#   muon_params           sizes of the groups   change of the matrices   loss
#   list                   [8, 6]                0.315                   0.622
#   generator              [8, 0]                0.000                   1.807
#   no removal             [8, 6]                0.315                   0.622
#   state loaded into the same parameter, default: 8 of 40
#   state loaded into the same parameter, no removal: 40 of 40
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 adam-atan2-pytorch==0.4.1
"$dir/venv/bin/python" -W ignore - <<'PROGRAM'
import torch
from adam_atan2_pytorch import MuonAdamAtan2
from torch import nn
from torch.nn.functional import cross_entropy

torch.set_num_threads(1)
torch.manual_seed(0)
images = torch.randn(2000, 32)
labels = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))(images).argmax(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        layers = [(nn.Linear(32, 32, bias=False), nn.LayerNorm(32, bias=False)) for _ in range(6)]
        self.blocks = nn.Sequential(*(module for pair in layers for module in (*pair, nn.GELU())))
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        return self.head(self.blocks(images))


def train(model, optimizer, steps):
    for step in range(steps):
        batch = torch.randint(2000, (200,), generator=torch.Generator().manual_seed(step))
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def matrices(model):
    return (p for p in model.blocks.parameters() if p.ndim == 2)


def rest(model):
    return [p for p in model.parameters() if all(p is not q for q in matrices(model))]


def change(model):
    pairs = zip(matrices(model), matrices(Model()))
    return max((p - q).abs().max().item() for p, q in pairs)


print("muon_params           sizes of the groups   change of the matrices   loss")
KEEP = {"remove_muon_params_from_params": False}
for name, kind, options in ("list", list, {}), ("generator", iter, {}), ("no removal", iter, KEEP):
    model = Model()
    params = rest(model) if options else model.parameters()
    optimizer = MuonAdamAtan2(kind(list(matrices(model))), params, lr=1e-2, **options)
    loss = train(model, optimizer, 100)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    print(f"{name:22} {str(sizes):21} {change(model):.3f} {loss:23.3f}")
    if name == "generator":
        assert sizes == [8, 0] and change(model) == 0 and loss > worse
    else:
        assert sizes == [8, 6] and change(model) > 0.1
        worse = 1.5 * loss


def build(model, **options):
    optimizer = MuonAdamAtan2(list(matrices(model)), rest(model), lr=1e-2, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return optimizer, [names[id(p)] for p in optimizer.param_groups[0]["params"]]


for options in ({}, KEEP):
    fits, models = [], []
    for _ in range(5):
        models.append(Model())
        optimizer, order = build(models[-1], **options)
        train(models[-1], optimizer, 3)
        models.append(Model())
        resumed, other_order = build(models[-1], **options)
        resumed.load_state_dict(optimizer.state_dict())
        fits += [name == other for name, other in zip(order, other_order)]
    text = "no removal" if options else "default"
    print(f"state loaded into the same parameter, {text}: {sum(fits)} of {len(fits)}")
    assert all(fits) == bool(options)
PROGRAM
