"""
eval_knn.py: k-NN, few labels, retrieval.
"""

import copy
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

import attg_mae
import common.features
import eval_knn
from common.data import make_loader, open_data
from tests.helpers import Evil, noise, rand, randn, some_truth, write


@pytest.mark.parametrize(
    ("classes", "n", "tests"), [(1, 9, 4), (3, 60, 33), (1000, 3000, 50)]
)
def test_accuracy_equals_scikit_learn(classes, n, tests):
    labels = torch.arange(n) % classes
    train = randn(classes, 12)[labels] + randn(n, 12, seed=1)
    truth = torch.randint(classes, (tests,))
    test = randn(classes, 12)[truth] + 0.7 * randn(tests, 12, seed=2)
    got = eval_knn.accuracy(train, labels, test, truth, [1, 10], classes, "cpu")
    setup = dict(
        metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    for k, (one, five) in zip((1, 10), got.tolist(), strict=True):
        knn = KNeighborsClassifier(min(k, n), **setup)
        votes = knn.fit(train.double().numpy(), labels.numpy()).predict_proba(
            test.double().numpy()
        )
        order = np.argsort(-votes, kind="stable")
        assert one == pytest.approx(100 * (order[:, 0] == truth.numpy()).mean())
        hits = (order[:, :5] == truth.numpy()[:, None]).any(1)
        assert five == pytest.approx(100 * hits.mean()) and five >= one
    if classes < 5:
        assert (got[:, 1] == 100).all()  # five guesses among fewer classes
    thirds = [slice(r, None, 3) for r in range(3)]
    parts = [
        eval_knn.accuracy(train, labels, test[i], truth[i], [1, 10], classes, "cpu")
        * len(truth[i])
        for i in thirds
    ]
    assert torch.allclose(sum(parts) / tests, got)


def test_retrieval_equals_a_reading_of_the_protocol():
    database, queries, gnd = randn(120, 6), randn(9, 6, seed=1), some_truth(120, 9)
    got = eval_knn.retrieval_map(database * (0.5 + rand(120, 1)), queries * 3, gnd)
    for name, wanted, ignored in (
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["junk", "easy"]),
    ):
        ap, precision = [], {1: [], 5: [], 10: []}
        for q, truth in enumerate(gnd):
            good = {i for k in wanted for i in truth[k]}
            drop = {i for k in ignored for i in truth[k]}
            if not good:
                continue
            near = F.cosine_similarity(queries[q][None], database).tolist()
            cosine = {i: x for i, x in enumerate(near) if i not in drop}
            ranks = [
                r
                for r, i in enumerate(sorted(cosine, key=lambda i: -cosine[i]))
                if i in good
            ]
            area = 0.0
            for j, r in enumerate(ranks):  # trapezoids under precision over recall
                area += ((j / r if r else 1.0) + (j + 1) / (r + 1)) / 2 / len(good)
            ap.append(area)
            for k in precision:
                last = min(k, ranks[-1] + 1)
                precision[k].append(sum(r + 1 <= last for r in ranks) / last)
        want = {"mAP": ap, **{f"mP@{k}": v for k, v in precision.items()}}
        assert got[name] == pytest.approx(
            {k: 100 * np.mean(v) for k, v in want.items()}
        )
        assert len(ap) == {"medium": 8, "hard": 7}[name]
    perfect = torch.eye(120)
    gnd = [{"easy": [q], "hard": [q + 1], "junk": [5]} for q in range(3)]
    best = eval_knn.retrieval_map(perfect, perfect[:3] + 0.5 * perfect[1:4], gnd)
    assert (
        best["medium"]
        == best["hard"]
        == {"mAP": 100, "mP@1": 100, "mP@5": 100, "mP@10": 100}
    )
    assert math.isnan(
        eval_knn.retrieval_map(
            perfect, perfect[:1], [{"easy": [0], "hard": [], "junk": []}]
        )["hard"]["mAP"]
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_ground_truth_is_read_and_poison_is_not(protocol, tmp_path, monkeypatch):
    truth = {
        "imlist": [f"i{i}" for i in range(40)],
        "qimlist": ["q0", "q1"],
        "gnd": some_truth(40, 2),
    }
    arrays = copy.deepcopy(truth)
    for query in arrays["gnd"]:
        query |= {k: np.array(v) for k, v in query.items()}
        query["bbx"] = [np.float32(x) for x in query["bbx"]]
    path = tmp_path / "gnd.pkl"
    for content in (truth, arrays):
        path.write_bytes(pickle.dumps(content, protocol))
        assert eval_knn.load_ground_truth(path) == truth
    mark = tmp_path / "ran"
    short = truth | {"qimlist": ["q0"]}, truth | {"imlist": ["i"]}
    for poison in (Evil(mark), truth | {"gnd": [Evil(mark)]}, *short, [1]):
        path.write_bytes(pickle.dumps(poison, protocol))
        with pytest.raises(ValueError, match="--gnd .*gnd.pkl.*gnd_roxford5k"):
            eval_knn.load_ground_truth(path)
        assert not mark.exists()
    path.write_bytes(pickle.dumps(truth, protocol)[:-9])
    with pytest.raises(ValueError, match="--gnd"):
        eval_knn.load_ground_truth(path)


def test_eval_knn_of_a_data_set(encoder, labelled, tmp_path, capsys):
    flags = [
        encoder,
        "--data",
        labelled["data"],
        *"--device cpu --batch_size 7".split(),
    ]
    rows = eval_knn.main(
        [*flags, "--k", "1", "20", "--save_features", str(tmp_path / "f.pt")]
    )
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(printed[-1])
    assert report["results"] == rows
    assert report["settings"]["k"] == [1, 20]
    assert "top-1" in printed[0]
    assert json.loads(Path(encoder).with_name("eval_knn.jsonl").read_text()) == report
    assert [(r["feature"], r["k"]) for r in rows] == [
        (f, k) for f in eval_knn.FEATURES for k in (1, 20)
    ]
    model = attg_mae.load_encoder(encoder)
    sets = [open_data(labelled["data"], s, 32) for s in ("train", "test")]
    want = common.features.knn_accuracy(model, *sets, {}, None, 0, 1)
    assert {r["feature"]: r["top-1"] for r in rows if r["k"] == 20} == pytest.approx(
        want
    )
    again = eval_knn.main(
        ["--features", str(tmp_path / "f.pt"), "--k", "1", "20", "--device", "cpu"]
    )
    assert again == rows
    assert len((tmp_path / "eval_knn.jsonl").read_text().splitlines()) == 1
    few = eval_knn.main(
        [
            *flags,
            *"--shots 1 3 --seeds 4".split(),
            "--out",
            str(tmp_path / "deep" / "few.json"),
        ]
    )
    assert [(r["protocol"], r["k"], r["seeds"]) for r in few[:2]] == [
        ("1 shots", 5, 4),
        ("3 shots", 5, 4),
    ]
    assert few == eval_knn.main(
        [
            "--features",
            str(tmp_path / "f.pt"),
            *"--shots 1 3 --seeds 4 --device cpu".split(),
        ]
    )
    assert any(r["+-"] > 0 for r in few)
    assert json.loads((tmp_path / "deep" / "few.json").read_text())["results"] == few
    # Both kept
    assert [
        len(json.loads(line)["results"])
        for line in (tmp_path / "eval_knn.jsonl").open()
    ] == [4, 4]


def test_eval_knn_retrieval(encoder, tmp_path):
    names = [f"oxford_{i:06d}" for i in range(40)]
    queries = ["all_souls_000013", "keble_000055"]
    gnd = some_truth(40, 2)
    gnd[1] = gnd[0] | {"bbx": [3, 4, 20, 30]}
    for i, name in enumerate([*names, *queries]):
        write(tmp_path / "jpg" / f"{name}.jpg", noise(40 + i % 7, 40, i))
    truth = {"imlist": names, "qimlist": queries, "gnd": gnd}
    (tmp_path / "jpg" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    flags = [
        encoder,
        *"--retrieval roxford5k".split(),
        "--data",
        str(tmp_path / "jpg"),
        "--device",
        "cpu",
    ]
    rows = eval_knn.main(flags)
    made = [(r["feature"], r["protocol"]) for r in rows]
    assert made == [
        (f, f"roxford5k {x}") for f in eval_knn.FEATURES for x in ("medium", "hard")
    ]
    model = attg_mae.load_encoder(encoder)
    cut = (
        Image.open(tmp_path / "jpg" / "keble_000055.jpg")
        .convert("RGB")
        .crop((3, 4, 20, 30))
        .resize((32, 32), 3)
    )
    views = [eval_knn.Landmarks(tmp_path / "jpg", names, (32, 32))]
    views.append(
        eval_knn.Landmarks(tmp_path / "jpg", queries, (32, 32), [g["bbx"] for g in gnd])
    )
    assert np.array_equal(views[1][1].image.permute(1, 2, 0), cut)
    bank, asked = (attg_mae.extract_features(model, make_loader(x))[1] for x in views)
    want = eval_knn.retrieval_map(bank, asked, gnd)["hard"]
    assert {k: rows[3][k] for k in want} == pytest.approx(want)
    (tmp_path / "jpg" / "oxford_000007.jpg").unlink()
    with pytest.raises(
        ValueError, match="1 of 40 photographs are missing.*oxford_000007"
    ):
        eval_knn.main(flags)


KNN_ERRORS = [
    ("", "checkpoint --features"),
    ("encoder.pt --k 0", "--k above"),
    ("encoder.pt --shots 99", "--shots 99 class fewer"),
    ("encoder.pt --data flat", "--data flat labelled train/CLASS"),
    ("encoder.pt --img_size 30", "--img_size 16 multiple"),
    ("missing.pt", "missing.pt"),
    ("text.pt", "text.pt damaged"),
    ("--features encoder.pt", "--features encoder.pt --save_features"),
    ("encoder.pt --retrieval rparis6k --data flat", "--gnd"),
    ("decoder.pt", "decoder.pt no ViT encoder"),
    ("encoder.pt --data other", "other"),
]


@pytest.mark.parametrize(("flags", "words"), KNN_ERRORS, ids=[x[0] for x in KNN_ERRORS])
def test_eval_knn_errors(flags, words, wrong, labelled):
    shutil.copytree(labelled["data"], "other")
    test = next(x for x in (Path("other/test"), Path("other/val")) if x.is_dir())
    next(test.iterdir()).rename(test / "another_class")
    argv = flags.split()
    argv += [] if "--data" in argv else ["--data", labelled["data"]]
    with pytest.raises((ValueError, OSError)) as error:
        eval_knn.main([*argv, "--device", "cpu"])
    assert [w for w in words.split() if w not in str(error.value)] == []
