"""
Deviations over seeds, of few shots: those of samples.
"""

import numpy as np
import pytest

import attg_mae
import eval_knn
from attg.datasets import shot_indices
from attg.evaluation import mean_and_deviation
from tests.helpers import blobs, save_features

# Of these the sample deviation is sqrt(7 / 3), that of a population sqrt(14 / 9).
SEEDS = [1.0, 2.0, 4.0]


def test_deviations_are_those_of_samples():
    runs = [[x, 10 * x] for x in SEEDS]
    want = {"top-1": 7 / 3, "+-": (7 / 3) ** 0.5, "top-5": 70 / 3}
    assert mean_and_deviation(runs) == pytest.approx(want)
    assert mean_and_deviation(runs[:1])["+-"] == 0


def test_deviations_in_the_rows_are_over_the_seeds(tmp_path):
    """eval_knn.py --shots: calculated anew from one run of each seed."""
    (x, labels), (queries, truth) = blobs(90, 3), blobs(60, 3, seed=7)
    tops = []
    for seed in range(3):
        chosen = shot_indices(labels, 2, seed)
        guess = attg_mae.knn_classify(x[chosen], labels[chosen], queries, k=5)[:, 0]
        tops.append(100 * (guess == truth).double().mean().item())
    file = str(tmp_path / "features.pt")
    save_features(file, x, labels, queries, truth)
    rows = eval_knn.main(["--features", file, "--seeds", "3", "--shots", "2"])
    assert rows[0]["top-1"] == pytest.approx(np.mean(tops))
    assert rows[0]["+-"] == pytest.approx(np.std(tops, ddof=1)) and rows[0]["+-"] > 1
