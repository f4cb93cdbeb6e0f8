"""eval_retrieval.py against a plain reading of the protocol and Hugging Face's ViT."""

import copy
import json
import math
import pickle
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import attg_mae
import eval_knn
import eval_retrieval
from attg.evaluation import report
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

# -- Metrics ---------------------------------------------------------------------------


def test_metrics_equal_a_plain_reading_of_the_protocol():
    database, queries, gnd = randn(120, 6), randn(9, 6, seed=1), some_truth(120, 9)
    scaled = database * (0.5 + rand(120, 1)), queries * 3
    got = eval_knn.retrieval_map(*scaled, gnd)
    kinds = {
        "medium": (["easy", "hard"], ["junk"]),
        "hard": (["hard"], ["junk", "easy"]),
    }
    for name, (wanted, ignored) in kinds.items():
        ap, precision = [], {1: [], 5: [], 10: []}
        for q, truth in enumerate(gnd):
            good = {i for k in wanted for i in truth[k]}
            drop = {i for k in ignored for i in truth[k]}
            if not good:
                continue
            near = F.cosine_similarity(queries[q][None], database).tolist()
            left = sorted(set(range(120)) - drop, key=lambda i: -near[i])
            ranks = [rank for rank, i in enumerate(left) if i in good]
            area = 0.0
            for j, r in enumerate(ranks):  # trapezoids under precision over recall
                area += ((j / r if r else 1.0) + (j + 1) / (r + 1)) / 2 / len(good)
            ap.append(area)
            for k in precision:
                last = min(k, ranks[-1] + 1)
                precision[k].append(sum(r + 1 <= last for r in ranks) / last)
        want = {"mAP": ap} | {f"mP@{k}": values for k, values in precision.items()}
        want = {key: 100 * np.mean(values) for key, values in want.items()}
        assert got[name] == pytest.approx(want)
        assert len(ap) == {"medium": 8, "hard": 7}[name]


def test_metrics_of_perfect_features_and_without_positives(tmp_path):
    perfect = torch.eye(120)
    gnd = [{"easy": [q], "hard": [q + 1], "junk": [5]} for q in range(3)]
    queries = perfect[:3] + 0.5 * perfect[1:4]
    best = eval_retrieval.retrieval_map(perfect, queries, gnd)
    all_right = {"mAP": 100, "mP@1": 100, "mP@5": 100, "mP@10": 100}
    assert best == {"medium": all_right, "hard": all_right}
    gnd = [{"easy": [0], "hard": [], "junk": []}]
    none = eval_retrieval.retrieval_map(perfect, perfect[:1], gnd)["hard"]
    assert math.isnan(none["mAP"])
    report([none], {}, tmp_path / "o.jsonl")  # JSON has no NaN
    assert json.loads((tmp_path / "o.jsonl").read_text())["results"][0]["mAP"] is None


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_ground_truth_is_read_and_code_is_not(protocol, tmp_path):
    truth = {
        "imlist": [f"i{i}" for i in range(40)],
        "qimlist": ["q0", "q1"],
        "gnd": some_truth(40, 2),
    }
    arrays = copy.deepcopy(truth)
    for query in arrays["gnd"]:
        query |= {key: np.array(values) for key, values in query.items()}
        query["bbx"] = [np.float32(x) for x in query["bbx"]]
    path = tmp_path / "gnd.pkl"
    for content in (truth, arrays):
        path.write_bytes(pickle.dumps(content, protocol))
        assert eval_retrieval.load_ground_truth(path) == truth
    mark = tmp_path / "ran"
    bad = [Evil(mark), truth | {"gnd": [Evil(mark)]}, [1]]
    bad += [truth | {"qimlist": ["q0"]}, truth | {"imlist": ["i"]}]
    contents = [pickle.dumps(x, protocol) for x in bad]
    for content in (*contents, pickle.dumps(truth, protocol)[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="--gnd .*gnd.pkl.*gnd_roxford5k"):
            eval_retrieval.load_ground_truth(path)
        assert not mark.exists()


# -- Photographs -----------------------------------------------------------------------

# Landscape, portrait, square, of odd sizes, smaller than the encoder's 48 pixels.
PHOTOS = [(100, 60), (60, 100), (64, 64), (97, 71), (30, 20), (48, 48), (300, 77)]


def photographs(folder):
    """(names, queries, ground truth, flags) of photographs of many sizes in folder."""
    names = [f"oxford_{i:06d}" for i in range(40)]
    queries = ["all_souls_000013", "keble_000055"]
    gnd = some_truth(40, 2)
    gnd[1] = gnd[0] | {"bbx": [3, 4, 20, 30]}
    for i, name in enumerate([*names, *queries]):
        write(folder / f"{name}.jpg", noise(*PHOTOS[i % len(PHOTOS)], i))
    truth = {"imlist": names, "qimlist": queries, "gnd": gnd}
    path = folder / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(truth))
    return names, queries, gnd, ["--gnd", str(path), "--device", "cpu"]


def tokens_of_hugging_face(model, path, longest):
    """Tokens (1, N, D) of a whole photograph; transformers resizes the positions."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    imgs = attg_mae.normalize(pixels, attg_mae.Config())
    return model(imgs, interpolate_pos_encoding=True).last_hidden_state


@pytest.mark.parametrize("flags", [[], ["--img_size", "64"]])
def test_features_equal_hugging_face(flags, tmp_path, monkeypatch):
    """Aspect ratio kept, queries whole, positions resized to the grid of each image."""
    transformers()
    config = attg_mae.Config(**SMALL | {"img_size": 48, "patch_size": 8, "depth": 2})
    state = shake(attg_mae.build_model(config), 0.1).state_dict()
    file, folder = tmp_path / "encoder.pt", tmp_path / "jpg"
    attg_mae.save_checkpoint(file, model=encoder_only(state), config=asdict(config))
    names, queries, gnd, source = photographs(folder)
    seen, metrics = [], eval_retrieval.retrieval_map

    def spy(*features):
        seen.append(features)
        return metrics(*features)

    monkeypatch.setattr(eval_retrieval, "retrieval_map", spy)
    argv = [str(file), "--data", str(folder), *source, *flags]
    results = eval_retrieval.main(argv)

    peer, longest = to_hugging_face(file), 64 if flags else 48
    for part, stems in enumerate((names, queries)):
        paths = [folder / f"{name}.jpg" for name in stems]
        tokens = [tokens_of_hugging_face(peer, path, longest) for path in paths]
        class_tokens = torch.cat([x[:, 0] for x in tokens])
        means = torch.cat([x[:, 1:].mean(dim=1) for x in tokens])
        assert close(seen[0][part], class_tokens, 1e-4)
        assert close(seen[1][part], means, 1e-4)
        # Other photographs have other features.
        assert not close(seen[1][part], means.roll(1, 0), 1e-2)
    want = metrics(*seen[1][:2], gnd)["hard"]
    assert {key: results[3][key] for key in want} == pytest.approx(want)
    labels = [(row["feature"], row["protocol"]) for row in results]
    names = ("roxford5k medium", "roxford5k hard")
    assert labels == [(f, name) for f in eval_knn.FEATURES for name in names]


def test_photographs_are_cropped_to_whole_patches(tmp_path):
    write(tmp_path / "wide.jpg", ramp(200, 9))
    write(tmp_path / "small.png", ramp(30, 20)).rename(tmp_path / "small.jpg")
    cfg = SimpleNamespace(patch_size=8, in_chans=3)
    views = eval_retrieval.Landmarks(tmp_path, ["wide", "small"], 48, cfg)
    assert views[0].image.shape == (3, 8, 48)
    assert views[0].image[:, 3:].max() == 0  # 2 rows of the image, then black
    small = views[1].image.permute(1, 2, 0)  # not enlarged
    assert np.array_equal(small, ramp(30, 20).crop((0, 0, 24, 16)))
    cfg.in_chans = 1
    grey = eval_retrieval.Landmarks(tmp_path, ["small"], 48, cfg, max_pixels=600)
    assert grey[0].image.shape == (1, 16, 24)
    few = eval_retrieval.Landmarks(tmp_path, ["small"], 48, cfg, max_pixels=599)
    with pytest.raises(ValueError, match="small.jpg is unreadable .*--max_pixels 599"):
        few[0]


def test_what_is_missing_is_named(encoder, tmp_path):
    folder = tmp_path / "jpg"
    *_, source = photographs(folder)
    argv = [encoder, "--data", str(folder), *source]
    photo = folder / "oxford_000007.jpg"
    photo.write_bytes(b"not an image")
    for flags, message in (
        (argv[:3], "--gnd: .*gnd_roxford5k.pkl"),
        ([*argv, "--img_size", "8"], "--img_size 8: .*16 or more"),
        (argv, "oxford_000007.jpg is unreadable"),
    ):
        with pytest.raises(ValueError, match=message):
            eval_retrieval.main(flags)
