"""eval_knn.py on data sets and on files of features, with all labels and with few."""

import json
from pathlib import Path

import numpy as np
import pytest

import attg.features
import eval_knn
from attg.datasets import shot_indices
from attg.features import knn_classify
from tests.helpers import blobs, save_features


def test_results_of_a_data_set(encoder, labelled, tmp_path, capsys):
    """The same from --features, and written to --out."""
    data = ["--data", labelled["data"], "--device", "cpu", "--batch_size", "7"]
    kept = str(tmp_path / "f.pt")
    flags = [encoder, *data, "--k", "1", "20", "--save_features", kept]
    results = eval_knn.main(flags)
    printed = capsys.readouterr().out.splitlines()
    file = Path(encoder).with_name("eval_knn.jsonl")
    report = json.loads(file.read_text())
    assert printed[-1] == f"with all settings: {file}"
    assert report["results"] == results and "top-1" in printed[2]
    line = "images: train 25, test 15; 3 classes, chance 33.3 %, the largest has 36 %"
    assert printed[0] == printed[1] == f"data {labelled['data']}, {line}"
    assert report["settings"]["k"] == [1, 20]
    cases = [(row["feature"], row["k"]) for row in results]
    assert cases == [(f, k) for f in eval_knn.FEATURES for k in (1, 20)]

    from_file = ["--features", kept, "--device", "cpu"]
    assert eval_knn.main([*from_file, "--k", "1", "20"]) == results
    # Classes of 9, 8 and 8 images: 50 shots are all of them.
    shots, out = "--shots 3 50 --seeds 4 --k 20".split(), tmp_path / "deep" / "few.json"
    few = eval_knn.main([encoder, *data, *shots, "--out", str(out)])
    assert eval_knn.main([*from_file, *shots]) == few
    cases = [(row["protocol"], row["k"], row["seeds"], row["images"]) for row in few]
    assert cases == [("3 shots", 20, 4, 9), ("50 shots", 20, 4, 25)] * 2
    assert few[1]["top-1"] == results[1]["top-1"] and few[0]["std"] > 0 == few[1]["std"]
    assert json.loads(out.read_text())["results"] == few
    # Both evaluations of the file of features are beside it.
    one, two = map(json.loads, (tmp_path / "eval_knn.jsonl").open())
    assert [one["results"], two["results"]] == [results, few]
    for name in attg.features.SOURCE:
        assert two["settings"][name] == report["settings"][name]


def test_deviations_over_the_seeds_and_standard_error(tmp_path, capsys):
    """The former are those of samples, the latter is that of 60 test images."""
    (x, labels), (queries, truth) = blobs(90, 3), blobs(60, 3, seed=7)
    tops = []
    for seed in range(3):
        chosen = shot_indices(labels, 2, seed)
        guess = knn_classify(x[chosen], labels[chosen], queries, k=5)[:, 0]
        tops.append(100 * (guess == truth).double().mean().item())
    mean = np.mean(tops)
    file = str(tmp_path / "features.pt")
    save_features(file, x, labels, queries, truth)
    rows = eval_knn.main(["--features", file, "--seeds", "3", "--shots", "2"])
    assert rows[0]["top-1"] == pytest.approx(mean) and rows[0]["test_images"] == 60
    assert rows[0]["std"] == pytest.approx(np.std(tops, ddof=1)) and rows[0]["std"] > 1
    assert not rows[0]["std"] == pytest.approx(np.std(tops))
    error = (mean * (100 - mean) / 60) ** 0.5
    assert f" {mean:.2f} +- {error:.2f} " in capsys.readouterr().out
