#!/usr/bin/env bash
# timm: a ViT without its head is "loaded" from a file of which nothing fits.
#
# Versions: timm 1.0.31, torch 2.14.1, torchvision 0.29.1.
# Expected: create_model(pretrained=True) with a file refuses missing weights, with the head or
# without it (num_classes=0, the way to get features), as load_state_dict does.
# Behavior: with the head it does. num_classes=0 differs from the 1000 of the model's
# config, so timm loads with strict=False, to tolerate the file's head, and tolerates
# everything: of a Lightning checkpoint, whose names begin with "model.", not a single
# weight is loaded. A log line lists names that it did not expect; of missing ones, such as
# a block that the file lacks, it says nothing. Features are those of a random network, and
# other ones at each call. Models whose config has num_classes=0 (DINOv2) load strictly.
# Workaround: strip the prefix, and compare a weight before and after; or load_state_dict.
#
# Output seen (weights that are the file's, of 152, 150 without head):
#   names as in timm    head 152   no head 150
#   model.NAME          head RuntimeError   no head 0
#   without blocks.3    head RuntimeError   no head 138
#   two random networks of the same call agree: False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
import timm
import torch

NAME = "vit_tiny_patch16_224"
torch.manual_seed(0)
source = timm.create_model(NAME).state_dict()
# Biases and norms of fresh networks are alike.
source = {name: x + 0.1 * torch.randn_like(x) for name, x in source.items()}


def load(state, **options):
    torch.save(state, "weights.pt")
    overlay = {"file": "weights.pt"}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def loaded(state, **options):
    """The number of weights that are those of the source, or the name of the error."""
    try:
        model = load(state, **options).state_dict()
    except RuntimeError as error:
        return type(error).__name__
    return sum(x.equal(source[name]) for name, x in model.items())


files = {
    "names as in timm": source,
    "model.NAME": {f"model.{name}": x for name, x in source.items()},
    "without blocks.3": {k: x for k, x in source.items() if not k.startswith("blocks.3.")},
}
found = {}
for name, state in files.items():
    found[name] = loaded(state), loaded(state, num_classes=0)
    print("{:19} head {}   no head {}".format(name, *found[name]))
state = files["model.NAME"]
one, two = (load(state, num_classes=0).patch_embed.proj.weight for _ in range(2))
print("two random networks of the same call agree:", one.equal(two))
assert list(found.values()) == [(152, 150), ("RuntimeError", 0), ("RuntimeError", 138)]
assert not one.equal(two)
EOF
