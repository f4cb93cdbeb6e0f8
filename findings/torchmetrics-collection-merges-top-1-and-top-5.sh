#!/usr/bin/env bash
# torchmetrics: a MetricCollection of top-1 and top-5 accuracy reports top-1 twice, for good, if
# they agree on the first batch, as they do before training.
#
# Versions: torchmetrics 1.9.0, torch 2.14.1, numpy 2.4.6.
# Expected: metrics are merged to save work only where their arguments allow it.
# Behavior: after the first update() the collection compares states, not arguments. Equal states
# become one, and from then on only the first metric of a group is updated. An untrained head
# seldom has the right class among its five best: of 1000 classes, nearly nine of ten first
# batches of 32 merge top1 and top5. reset() keeps the groups, so one batch before training, as in
# Lightning's sanity check, spoils all later epochs. (The wrong top5 is slightly above top1, as it
# averages over fewer classes.) Likewise two thresholds, if the first map has no value in between.
# The reference explains groups by precision and recall and names no condition. forward() does not
# merge; average="micro" does not either, as the states differ in shape.
# Workaround: compute_groups=False.
#
# Output seen (5000 images in batches of 32):
#   top1, top5: new                  0.239 0.464
#   one batch before training        0.239 0.241
#   the same, compute_groups=False   0.239 0.464
#   merged by the first batch: 51 of 60
#   IoU at 0.3 and 0.7: alone 1.000 0.500; collection 1.000 1.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchmetrics==1.9.0
"$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryJaccardIndex, MulticlassAccuracy

CLASSES, IMAGES, BATCH = 1000, 5000, 32
torch.manual_seed(0)
labels = torch.randint(CLASSES, (IMAGES,))
untrained = torch.randn(IMAGES, CLASSES)
trained = untrained + 2.5 * torch.nn.functional.one_hot(labels, CLASSES)


def collect(**options):
    accuracies = {f"top{k}": MulticlassAccuracy(CLASSES, top_k=k) for k in (1, 5)}
    return MetricCollection(accuracies, **options)


def evaluate(text, metrics, warm_up=False):
    """The accuracies after an epoch of validation: update, compute, reset."""
    if warm_up:
        metrics.update(untrained[:BATCH], labels[:BATCH])
        metrics.reset()
    for logits, truth in zip(trained.split(BATCH), labels.split(BATCH)):
        metrics.update(logits, truth)
    values = [value.item() for value in metrics.compute().values()]
    print(f"{text:32}", *(f"{value:.3f}" for value in values))
    return values


new = evaluate("top1, top5: new", collect())
late = evaluate("one batch before training", collect(), warm_up=True)
apart = evaluate("the same, compute_groups=False", collect(compute_groups=False), warm_up=True)
assert new == apart and new[1] > new[0] + 0.2, (new, apart)
assert late[0] == new[0] and late[1] < new[0] + 0.01, late

merged = 0
for logits, truth in list(zip(untrained.split(BATCH), labels.split(BATCH)))[:60]:
    metrics = collect()
    metrics.update(logits, truth)
    merged += len(metrics.compute_groups) == 1
print(f"merged by the first batch: {merged} of 60")
assert merged > 45

# Attention maps of two images and their masks; only the second has values between 0.3 and 0.7.
maps = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.9, 0.5, 0.5, 0.5]])
masks = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
alone = [BinaryJaccardIndex(threshold)(maps, masks).item() for threshold in (0.3, 0.7)]
metrics = MetricCollection({f"at{t}": BinaryJaccardIndex(t / 10) for t in (3, 7)})
for map, mask in zip(maps, masks):
    metrics.update(map, mask)
values = [value.item() for value in metrics.compute().values()]
print("IoU at 0.3 and 0.7: alone {:.3f} {:.3f}; collection {:.3f} {:.3f}".format(*alone, *values))
assert values == [alone[0]] * 2 and alone[0] > alone[1] + 0.2, (alone, values)
EOF
