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


def test_metrics_equal_a_plain_reading_of_the_protocol(tmp_path):
    database, queries, gnd = randn(120, 6), randn(9, 6, seed=1), some_truth(120, 9)
    scaled = database * (0.5 + rand(120, 1)), queries * 3
    got = eval_knn.retrieval_map(*scaled, gnd, ks=(1, 5, 119))
    for name, wanted, ignored in (
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["junk", "easy"]),
    ):
        ap, precision = [], {1: [], 5: [], 119: []}
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

    none = eval_retrieval.retrieval_map(database, queries[1:2], gnd[1:2])["hard"]
    assert math.isnan(none["mAP"])
    report([none], {"header": "", "out": str(tmp_path / "o.jsonl")})  # JSON has no NaN
    assert json.loads((tmp_path / "o.jsonl").read_text())["results"][0]["mAP"] is None


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_ground_truth_is_read_and_code_is_not(protocol, tmp_path):
    names = [f"i{i}" for i in range(40)]
    truth = {"imlist": names, "qimlist": ["q0", "q1"], "gnd": some_truth(40, 2)}
    arrays = copy.deepcopy(truth)
    for query in arrays["gnd"]:
        query |= {key: np.array(values) for key, values in query.items()}
        query["bbx"] = [np.float32(x) for x in query["bbx"]]
    path, mark = tmp_path / "gnd.pkl", tmp_path / "ran"
    for content in (truth, arrays):
        path.write_bytes(pickle.dumps(content, protocol))
        assert eval_retrieval.load_ground_truth(path) == truth
    bad = [Evil(mark), truth | {"gnd": [Evil(mark)]}, [1]]
    bad += [truth | {"qimlist": ["q0"]}, truth | {"imlist": ["i"]}]
    contents = [pickle.dumps(x, protocol) for x in bad]
    for content in (*contents, pickle.dumps(truth, protocol)[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="--gnd .*gnd.pkl.*gnd_roxford5k"):
            eval_retrieval.load_ground_truth(path)
        assert not mark.exists()


# Landscape, portrait, square, of odd sizes, smaller than the encoder's 48 pixels.
PHOTOS = [(100, 60), (60, 100), (64, 64), (97, 71), (30, 20), (48, 48), (300, 77)]


def photographs(folder):
    """(paths, ground truth, flags) of 40 photographs of many sizes, then 2 queries."""
    names = [f"oxford_{i:06d}" for i in range(40)]
    names += ["all_souls_000013", "keble_000055"]
    paths = [folder / f"{name}.jpg" for name in names]
    for i, path in enumerate(paths):
        write(path, noise(*PHOTOS[i % len(PHOTOS)], i))
    gnd = some_truth(40, 2)
    truth = {"imlist": names[:40], "qimlist": names[40:], "gnd": gnd}
    file = folder / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps(truth))
    flags = ["--data", str(folder), "--gnd", str(file), "--device", "cpu"]
    return paths, gnd, flags


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
    file = tmp_path / "encoder.pt"
    attg_mae.save_checkpoint(file, model=encoder_only(state), config=asdict(config))
    paths, gnd, source = photographs(tmp_path / "jpg")
    seen, metrics = [], eval_retrieval.retrieval_map

    def spy(images, queries, gnd):
        seen.append(torch.cat([images, queries]))
        return metrics(images, queries, gnd)

    monkeypatch.setattr(eval_retrieval, "retrieval_map", spy)
    results = eval_retrieval.main([str(file), *source, *flags])

    peer, longest = to_hugging_face(file), 64 if flags else 48
    tokens = [tokens_of_hugging_face(peer, path, longest) for path in paths]
    means = torch.cat([x[:, 1:].mean(dim=1) for x in tokens])
    assert close(seen[0], torch.cat([x[:, 0] for x in tokens]), 1e-4)
    assert close(seen[1], means, 1e-4)
    # Other photographs have other features.
    assert not close(seen[1], means.roll(1, 0), 1e-2)
    labels = {"feature": "patch_mean", "protocol": "roxford5k hard"}
    assert results[3] == labels | metrics(seen[1][:40], seen[1][40:], gnd)["hard"]


def test_photographs_are_cropped_to_whole_patches(tmp_path):
    path, cfg = tmp_path / "wide.jpg", SimpleNamespace(patch_size=8, in_chans=3)
    (image,) = eval_retrieval.load_photograph(write(path, ramp(200, 9)), 48, cfg)
    assert image.shape == (3, 8, 48) and image[:, :2].any()
    assert image[:, 3:].max() == 0  # 2 rows of the photograph, then black


def test_what_is_missing_is_named(encoder, tmp_path):
    paths, _, flags = photographs(tmp_path / "jpg")
    paths[7].write_bytes(b"not an image")
    for wrong, message in (
        (flags[:2], "--gnd: missing"),
        (flags[2:], "--data: missing"),
        (flags, "oxford_000007.jpg is unreadable"),
    ):
        with pytest.raises(ValueError, match=message):
            eval_retrieval.main([encoder, *wrong])
