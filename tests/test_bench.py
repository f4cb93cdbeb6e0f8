"""
The benchmarks: that they measure what they say, on the smallest sizes.
"""

import json
import math
import shutil

import pytest
import torch
from PIL import Image

import bench
from tests.helpers import DEVICE, needs_gpu

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def test_bench_kernel(tmp_path, capsys):
    names = {"eager", "compile"} if COMPILER else {"eager"}
    flags = [
        "--shapes",
        "patch 8",
        *"--dtypes float32 --size 16 --batches 3".split(),
    ]
    bench.main(
        ["kernel", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path), *flags]
    )
    about, *rows = [
        json.loads(line)
        for line in (tmp_path / "kernel.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 3 * len(names)
    assert {r["loss"] for r in rows} == names
    assert "torch 2" in about["on"]
    masked, written = 3 * 3 * 192 * 8, 3 * 4 * 192 * 4
    for r in rows:
        moved = {
            "forward": masked,
            "backward": masked + written,
            "both": 2 * masked + written,
        }[r["pass"]]
        assert math.isclose(r["GB/s"], moved / r["ms"] / 1e6, rel_tol=1e-9)
        assert 0 < r["p20"] <= r["ms"] <= r["p80"]
        assert r["x eager"] == 1 if r["loss"] == "eager" else r["x eager"] > 0
    assert Image.open(tmp_path / "kernel.png").size[0] > 300
    printed = capsys.readouterr().out
    assert "no GPU" in printed
    assert (tmp_path / "kernel.md").read_text().split("\n", 2)[2].strip() in printed
    with pytest.raises(SystemExit, match="GPU"):
        bench.main(["kernel", "--sweep", "--device", "cpu"])


@needs_gpu
def test_bench_kernel_on_a_gpu(tmp_path):
    flags = [
        "--shapes",
        "patch 8",
        *"--dtypes bfloat16 --size 32 --batches 2".split(),
        "--out",
        str(tmp_path),
    ]
    bench.main(["kernel", "--repeats", "3", *flags])
    bench.main(["kernel", "--repeats", "1", "--sweep", *flags])
    _, *rows = [
        json.loads(line)
        for line in (tmp_path / "kernel.jsonl").read_text().splitlines()
    ]
    assert {r["loss"] for r in rows} == {"eager", "compile", "triton"}
    assert all(0 < r["ms"] < 10 for r in rows)
    memory = {r["loss"]: r["peak MiB"] for r in rows}
    assert 0 < memory["triton"] < memory["eager"]
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1 + 3 * 4 * 3


def test_bench_maps(tmp_path):
    bench.main(
        [
            *"maps --device cpu --size 48 --batches 3 --repeats 2".split(),
            "--out",
            str(tmp_path),
        ]
    )
    _, *rows = [
        json.loads(line) for line in (tmp_path / "maps.jsonl").read_text().splitlines()
    ]
    assert [r["L"] for r in rows] == [9] * 5 + [36] * 5
    assert len({r["graphs"] for r in rows}) == 5
    for r in rows:
        assert math.isclose(r["x scipy"], r["scipy ms"] / r["ms"])
        assert 0 < r["p20"] <= r["ms"] <= r["p80"]
        assert math.isclose(r["% of backbone"], 100 * r["ms"] / r["backbone ms"])


def test_bench_knn(tmp_path):
    bench.main(
        [
            *"knn --device cpu --knn 5000 300 32 --repeats 2".split(),
            "--out",
            str(tmp_path),
        ]
    )
    _, *rows = [
        json.loads(line) for line in (tmp_path / "knn.jsonl").read_text().splitlines()
    ]
    assert [r["k-NN"] for r in rows] == ["knn_classify", "one-hot", "scikit-learn"]
    assert len({round(r["top-1 %"], 3) for r in rows}) == 1
    assert 10 < rows[0]["top-1 %"] < 90
    assert rows[0]["x knn_classify"] == 1
    assert all(0 < r["p20"] <= r["s"] <= r["p80"] for r in rows)
    assert all(math.isclose(r["x knn_classify"], r["s"] / rows[0]["s"]) for r in rows)


def test_bench_memory_is_that_of_the_call():
    kept = [torch.ones(2**18) for _ in range(200)]
    # After 200 MiB of the heap, which are free again: to be counted
    kept = [torch.ones(2**15) for _ in range(9)]
    size = bench.peak_memory(
        lambda: kept.append(torch.ones(2**24)), torch.device(DEVICE)
    )
    assert size == "not measured" or 60 < size < 80  # MiB


def test_bench_takes_turns():
    calls, seen = (
        {
            n: (lambda n=n: seen.append((n, "prepare")), lambda _, n=n: seen.append(n))
            for n in "ab"
        },
        [],
    )
    times = bench.take_turns(calls, torch.device("cpu"), 2)
    assert seen == [("a", "prepare"), "a", ("b", "prepare"), "b"] * 3
    assert [len(x) for x in times.values()] == [2, 2]
    assert bench.percentiles([0.001, 0.002, 0.003, 0.004, 0.1]) == pytest.approx(
        [3, 1.8, 23.2]
    )
