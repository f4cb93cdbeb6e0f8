#!/usr/bin/env bash
# grain: iterating again over a shuffled, augmented dataset repeats order and augmentation.
#
# Versions: grain 0.2.18, numpy 2.4.6.
# Expected: as with PyTorch's DataLoader or tf.data, a second loop over the data is a new
# epoch, with another order and other random crops and masks.
# Behavior: every loop restarts from the seed. Order and RandomMap draws are identical in
# all epochs, for MapDataset, IterDataset and DataLoader alike, so a masked autoencoder
# sees one fixed mask per image. Only repeat() advances the seed, also for a RandomMap
# placed before it. Workaround: put the epochs into the dataset, with repeat(epochs), or with
# repeat() and a step count.
#
# Output seen (image, mask):
#   loop, epoch 1: (1, 926) (2, 268) (4, 599) (5, 855) (3, 565) (0, 39)
#   loop, epoch 2: (1, 926) (2, 268) (4, 599) (5, 855) (3, 565) (0, 39)
#   repeat, epoch 2: (5, 929) (3, 381) (1, 246) (4, 150) (2, 413) (0, 913)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 grain==0.2.18
"$dir/venv/bin/python" - 2>"$dir/log" <<'EOF' || { cat "$dir/log" >&2; exit 1; }
import grain

IMAGES = 6


class Mask(grain.transforms.RandomMap):
    def random_map(self, image, rng):
        return image, int(rng.integers(1000))


def show(title, pairs):
    print(f"{title}:", *pairs)


dataset = grain.MapDataset.range(IMAGES).seed(0).shuffle().random_map(Mask())
iterable = dataset.to_iter_dataset()
loader = grain.DataLoader(
    data_source=list(range(IMAGES)),
    sampler=grain.samplers.IndexSampler(IMAGES, shuffle=True, seed=0, num_epochs=1),
    operations=[Mask()],
    worker_count=0,
)
for source in (dataset, iterable, loader):
    epochs = [list(source) for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert sorted(image for image, _ in epochs[0]) == list(range(IMAGES))
    assert [image for image, _ in epochs[0]] != list(range(IMAGES))
first, second = list(iterable), list(iterable)
show("loop, epoch 1", first)
show("loop, epoch 2", second)

repeated = list(dataset.repeat(2).to_iter_dataset())
assert repeated[:IMAGES] == first
other = repeated[IMAGES:]
show("repeat, epoch 2", other)
assert sorted(image for image, _ in other) == list(range(IMAGES))
assert not set(other) & set(first)
assert [image for image, _ in other] != [image for image, _ in first]
EOF
