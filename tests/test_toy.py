"""
The embedded data set: its pixels, its masks, its variants.
"""

import hashlib

import numpy as np
import pytest
import torch

import attg_mae
from attg import trainer
from attg.datasets import open_data
from attg.toy import TOY_VARIANTS, toy

SPLITS = ("train", "test", *TOY_VARIANTS)


def test_pixels_are_the_published_ones():
    """Results in results/ were measured on these bits; every machine makes the same."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for array in toy(split)[:2]:
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "b54cce59a0482881"


def test_splits_as_data_sets():
    for split in SPLITS:
        dataset, (images, masks, labels) = open_data("toy", split), toy(split)
        n = 10_000 if split == "train" else 2_000
        assert len(dataset) == len(set(dataset.names)) == n
        assert dataset.masks is masks and set(np.unique(masks)) == {0, 1}
        assert np.bincount(labels).tolist() == [n // 10] * 10
        sample = dataset[13]
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0), images[13])
        assert (sample.label, sample.box.tolist()) == (3, [0, 0, 1, 1])
    assert len({open_data("toy", split).fingerprint for split in SPLITS}) == 6
    with pytest.raises(ValueError, match="split 'val' of --data toy.*'only_fg'"):
        toy("val")


def test_a_guided_run_takes_toys_masks(tmp_path):
    """The default run has no --maps, a vanilla one no maps."""
    for guidance, maps in (("attg", toy("train")[1]), ("none", None)):
        cfg = attg_mae.Config(guidance=guidance, out=str(tmp_path / guidance))
        with trainer.setup(cfg, None, (torch.device("cpu"), 0, 1), []) as (
            run,
            checkpoint,
        ):
            assert run.maps is maps and checkpoint is None
            assert len(run.train_set) == 10_000 and len(run.test_set) == 2_000
