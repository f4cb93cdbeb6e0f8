#!/usr/bin/env bash
# albumentations in a DataLoader: all workers draw the same crops, and so do all epochs.
#
# Versions: albumentations 2.0.8 (the latest), torch 2.14.1, numpy 2.4.6,
# opencv-python-headless 5.0.0.93.
# Expected: with the default seed=None, workers and epochs differ. PyTorch reseeds random,
# numpy.random and torch in every worker, so the old bug of identical NumPy draws in all
# workers should be gone.
# Behavior: a Compose owns its generators, which PyTorch does not know and copies with
# the dataset into each worker. With two workers every crop is drawn twice, and without
# persistent_workers epoch 2 repeats epoch 1, because the copies start from the same
# state again. A long self-supervised run sees the crops of one epoch over and over.
# Workaround: a worker_init_fn that calls set_random_seed with the worker's seed.
#
# Output seen (left column of the crops of 16 images, batches of 4, 2 workers):
#   seed None fork : workers the same, epochs the same; torch: different, different
#   seed None spawn: workers the same, epochs the same; torch: different, different
#   seed 7    fork : workers the same, epochs the same; torch: different, different
#   with worker_init_fn: workers different, epochs different
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 albumentations==2.0.8 \
    opencv-python-headless==5.0.0.93
export NO_ALBUMENTATIONS_UPDATE=1
cat >"$dir/check.py" <<'EOF'
import albumentations as A
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

COLUMNS = np.arange(256, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)


class Crops(Dataset):
    """The left column of a random crop, and a number of torch's generator."""

    def __init__(self, seed):
        self.transform = A.Compose([A.RandomCrop(8, 8)], seed=seed)

    def __len__(self):
        return 16

    def __getitem__(self, i):
        crop = self.transform(image=COLUMNS)["image"]
        return int(crop[0, 0, 0]), torch.randint(1000, ()).item()


def reseed(_):
    info = get_worker_info()
    info.dataset.transform.set_random_seed(info.seed % 2**32)


def compare(seed, start, init=None):
    """Whether workers, and epochs, draw the same: of albumentations, and of torch."""
    torch.manual_seed(0)
    loader = DataLoader(
        Crops(seed),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=start,
        worker_init_fn=init,
    )
    epochs = [torch.stack([torch.stack(batch) for batch in loader]) for _ in range(2)]
    for kind in (0, 1):
        first, second = [epoch[:, kind] for epoch in epochs]
        yield torch.equal(first[0::2], first[1::2]), torch.equal(first, second)


def words(pair):
    return tuple("the same" if same else "different" for same in pair)


if __name__ == "__main__":
    for seed, start in [(None, "fork"), (None, "spawn"), (7, "fork")]:
        crops, numbers = compare(seed, start)
        line = "seed {!s:4} {:5}: workers {}, epochs {}; torch: {}, {}"
        print(line.format(seed, start, *words(crops), *words(numbers)))
        assert crops == (True, True) and numbers == (False, False)
    crops, _ = compare(None, "fork", reseed)
    print("with worker_init_fn: workers {}, epochs {}".format(*words(crops)))
    assert crops == (False, False)
EOF
"$dir/venv/bin/python" "$dir/check.py"
