"""
eval_knn.py: k-NN, few labels, retrieval.
"""

import copy
import json
import math
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import attg.features
import attg_mae
import eval_knn
from attg.datasets import open_data
from attg.export import to_hugging_face
from tests.helpers import (
    SMALL,
    Evil,
    close,
    encoder_only,
    noise,
    ramp,
    rand,
    randn,
    shake,
    some_truth,
    transformers,
    write,
)


@pytest.mark.parametrize(
    ("classes", "n", "tests"), [(1, 9, 4), (3, 60, 33), (1000, 3000, 50)]
)
def test_accuracy_equals_scikit_learn(classes, n, tests):
    neighbors = pytest.importorskip("sklearn.neighbors")
    labels = torch.arange(n) % classes
    train = randn(classes, 12)[labels] + randn(n, 12, seed=1)
    truth = torch.randint(classes, (tests,))
    test = randn(classes, 12)[truth] + 0.7 * randn(tests, 12, seed=2)
    got = eval_knn.accuracy(train, labels, test, truth, [1, 10], classes, "cpu")
    setup = dict(
        metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    for k, (one, five) in zip((1, 10), got.tolist(), strict=True):
        knn = neighbors.KNeighborsClassifier(min(k, n), **setup)
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
    want = attg.features.knn_accuracy(model, *sets, {}, None, 0, 1)
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


# Landscape, portrait, square, of odd sizes, smaller than the encoder's 48 pixels.
PHOTOS = [(100, 60), (60, 100), (64, 64), (97, 71), (30, 20), (48, 48), (300, 77)]


def photographs(folder):
    """(names, queries, ground truth) of photographs of many sizes in folder."""
    names = [f"oxford_{i:06d}" for i in range(40)]
    queries = ["all_souls_000013", "keble_000055"]
    gnd = some_truth(40, 2)
    gnd[1] = gnd[0] | {"bbx": [3, 4, 20, 30]}
    for i, name in enumerate([*names, *queries]):
        write(folder / f"{name}.jpg", noise(*PHOTOS[i % len(PHOTOS)], i))
    truth = {"imlist": names, "qimlist": queries, "gnd": gnd}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    return names, queries, gnd


def shrunk_by_hugging_face(model, path, longest):
    """Tokens (1, N, D) of a whole photograph, with positions resized by transformers."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    imgs = attg_mae.normalize(pixels, attg_mae.Config())
    return model(imgs, interpolate_pos_encoding=True).last_hidden_state


@pytest.mark.parametrize("flags", [[], ["--img_size", "64"]])
def test_retrieval_features_equal_hugging_face(flags, tmp_path):
    """Aspect ratio kept, queries whole, positions resized to the grid of each image."""
    transformers()
    settings = SMALL | {"img_size": 48, "patch_size": 8, "depth": 2}
    model = shake(attg_mae.build_model(attg_mae.Config(**settings)), 0.1)
    file = tmp_path / "encoder.pt"
    attg_mae.save_checkpoint(
        file, model=encoder_only(model.state_dict()), config=asdict(model.cfg)
    )
    names, queries, gnd = photographs(tmp_path / "jpg")
    argv = [str(file), "--retrieval", "roxford5k", "--data", str(tmp_path / "jpg")]
    argv += ["--save_features", str(tmp_path / "f.pt"), "--device", "cpu", *flags]
    rows = eval_knn.main(argv)

    peer = to_hugging_face(file)
    longest = 64 if flags else 48
    tokens = {}
    for part, stems in (("train", names), ("test", queries)):
        paths = [tmp_path / "jpg" / f"{name}.jpg" for name in stems]
        tokens[part] = [shrunk_by_hugging_face(peer, path, longest) for path in paths]
    kept = attg_mae.load_checkpoint(tmp_path / "f.pt")
    for part, found in tokens.items():
        first = torch.cat([x[:, 0] for x in found])
        means = torch.cat([x[:, 1:].mean(dim=1) for x in found])
        assert close(kept[part]["class_token"], first, 1e-4)
        assert close(kept[part]["patch_mean"], means, 1e-4)
        # Other photographs give other features
        assert not close(kept[part]["patch_mean"], means.roll(1, 0), 1e-2)
    want = eval_knn.retrieval_map(
        kept["train"]["patch_mean"], kept["test"]["patch_mean"], gnd
    )["hard"]
    assert {k: rows[3][k] for k in want} == pytest.approx(want)
    made = [(r["feature"], r["protocol"]) for r in rows]
    assert made == [
        (f, f"roxford5k {x}") for f in eval_knn.FEATURES for x in ("medium", "hard")
    ]
    again = [*argv[1:5], "--features", str(tmp_path / "f.pt"), "--device", "cpu"]
    assert eval_knn.main(again) == rows


def test_photographs_are_cut_to_whole_patches(tmp_path):
    write(tmp_path / "wide.jpg", ramp(200, 9))
    write(tmp_path / "small.png", ramp(30, 20)).rename(tmp_path / "small.jpg")
    cfg = SimpleNamespace(patch_size=8, in_chans=3)
    views = eval_knn.Landmarks(tmp_path, ["wide", "small"], 48, cfg)
    assert views[0].image.shape == (3, 8, 48)
    assert views[0].image[:, 3:].max() == 0  # 2 rows of picture, then black
    assert views[1].image.shape == (3, 16, 24)  # not enlarged
    assert np.array_equal(
        views[1].image.permute(1, 2, 0), ramp(30, 20).crop((0, 0, 24, 16))
    )
    cfg.in_chans = 1
    grey = eval_knn.Landmarks(tmp_path, ["small"], 48, cfg, max_pixels=600)
    assert grey[0].image.shape == (1, 16, 24)
    few = eval_knn.Landmarks(tmp_path, ["small"], 48, cfg, max_pixels=599)
    with pytest.raises(ValueError, match="small.jpg is unreadable .*--max_pixels 599"):
        few[0]


def test_retrieval_tells_what_is_missing(encoder, tmp_path):
    photographs(tmp_path / "jpg")
    argv = [encoder, "--retrieval", "roxford5k", "--data", str(tmp_path / "jpg")]
    argv += ["--device", "cpu"]
    with pytest.raises(
        ValueError, match="--batch_size: does nothing beside --retrieval"
    ):
        eval_knn.main([*argv, "--batch_size", "8"])
    with pytest.raises(ValueError, match="--val: does nothing beside --retrieval"):
        eval_knn.main([*argv, "--val", "x"])
    with pytest.raises(
        ValueError, match="--retrieval roxford5k: takes no data of your"
    ):
        eval_knn.main(argv, [])
    with pytest.raises(ValueError, match="--img_size 8: a patch has 16 pixels"):
        eval_knn.main([*argv, "--img_size", "8"])
    (tmp_path / "jpg" / "oxford_000007.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="oxford_000007.jpg is unreadable"):
        eval_knn.main(argv)
    (tmp_path / "jpg" / "oxford_000007.jpg").unlink()
    missing = "1 of 40 photographs are missing.*oxford_000007"
    with pytest.raises(ValueError, match=missing):
        eval_knn.main(argv)


def test_features_of_another_set_are_refused(encoder, labelled, tmp_path):
    photographs(tmp_path / "jpg")
    kept = str(tmp_path / "f.pt")
    flags = ["--data", labelled["data"], "--device", "cpu", "--save_features", kept]
    eval_knn.main([encoder, *flags])
    argv = ["--retrieval", "roxford5k", "--data", str(tmp_path / "jpg")]
    with pytest.raises(
        ValueError, match="features of 25 images, but imlist of --gnd tells of 40"
    ):
        eval_knn.main([*argv, "--features", kept, "--device", "cpu"])


def test_shots_that_a_class_does_not_have(encoder, labelled, capsys):
    """Classes of 9, 8 and 8 images: 50 shots are all of them, and it is said once."""
    flags = [encoder, "--data", labelled["data"], "--device", "cpu", "--seeds", "2"]
    rows = eval_knn.main([*flags, "--shots", "8", "9", "50"])
    words = [x for x in capsys.readouterr().out.splitlines() if x.startswith("--shots")]
    assert words == [
        "--shots 9: 2 of 3 classes have fewer images, the smallest 8; they give all "
        "they have",
        "--shots 50: 3 of 3 classes have fewer images, the smallest 8; they give all "
        "they have",
    ]
    assert [row["images"] for row in rows] == [24, 25, 25] * 2
    everything = eval_knn.main([*flags, "--k", "5"])
    assert [row["top-1"] for row in everything] == [rows[2]["top-1"], rows[5]["top-1"]]
    assert rows[2]["+-"] == 0


KNN_ERRORS = [
    ("", "checkpoint --features"),
    ("encoder.pt --k 0", "--k 0 at least 1"),
    ("encoder.pt --shots 0", "--shots 0 at least 1"),
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
