"""
The embedded data set: its pixels, its masks, its variants.
"""

import hashlib

import numpy as np
from PIL import Image

from attg.datasets import open_data
from attg.toy import TOY_VARIANTS, save_pairs, toy, toy_pairs

SPLITS = ("train", "test", *TOY_VARIANTS)


def test_pixels_are_the_published_ones():
    """Results in results/ were measured on these bits; every machine makes the same."""
    digest = hashlib.sha256()
    for arrays in (*[toy(split)[:2] for split in SPLITS], toy_pairs(50)):
        for array in arrays:
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "c529b71d4398fca8"


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


def test_pairs_are_written_with_their_masks(tmp_path):
    save_pairs(tmp_path)
    images, masks = toy_pairs(200)
    for folder, arrays in (("images", images), ("masks", 255 * masks.max(1))):
        files = sorted((tmp_path / folder).iterdir())
        assert len(files) == 200
        np.testing.assert_array_equal(np.asarray(Image.open(files[7])), arrays[7])
