"""
The benchmarks: whether they measure what they claim, on the smallest sizes.
"""

import math
import os
import subprocess
import time
from functools import partial

import pytest
import torch
from PIL import Image

import attg_mae
import bench
from benchmarks import data, kernel, knn, maps, measure, step
from tests.helpers import ROOT, needs_gpu

CPU = torch.device("cpu")


def rows_of(benchmark, device=CPU, repeats=2, batch_size=2, size=32, **settings):
    settings |= {"repeats": repeats, "batch_size": batch_size, "size": size}
    rows = list(benchmark.run(bench.Settings(**settings), device))
    assert all(0 < row["p20"] <= row["ms"] <= row["p80"] for row in rows)
    return rows


def test_calls_take_turns():
    seen = []
    calls = {name: partial(seen.append, name) for name in "ab"}
    times = measure.take_turns(calls, CPU, 2)
    assert seen == list("ababab") and [len(x) for x in times.values()] == [2, 2]
    # CPU time: what waits does not count.
    assert measure.time_call(partial(time.sleep, 0.2), CPU) < 0.1


def test_comparison_by_rounds():
    # Twice as fast in each round, although rounds differ by more than that.
    base = [0.1, 0.4, 0.2, 0.8, 0.1, 0.3, 1.6]
    times = {"base": base, "fast": [x / 2 for x in base], "odd": base[::-1]}
    times["slow"] = [2 * x for x in base]
    rows = measure.compare(times, count=10)
    assert list(rows["fast"].values()) == pytest.approx([15, 6, 36, 2, 2, 2])
    assert rows["odd"]["low"] < 1 < rows["odd"]["high"] and rows["slow"]["high"] < 1


def test_median_interval():
    """scipy's binomial quantiles; five rounds decide nothing."""
    stats = pytest.importorskip("scipy.stats")
    assert measure.median_interval([1, 2, 3, 4, 5]) == (0, math.inf)
    for n in (6, 7, 8, 20, 50, 101):
        low, high = measure.median_interval(torch.randperm(n).tolist())
        # The chance that at most `low` of n values lie below the true median.
        outside, more = 2 * stats.binom.cdf([low, low + 1], n, 0.5)
        assert outside <= 0.05 < more and low + high == n - 1


def test_command_prints_a_table(capsys, monkeypatch):
    rows = [{"step": "ours", "ms": 1 / 3}, {"step": "HF", "ms": 2.0}]
    monkeypatch.setattr(step, "run", lambda settings, device: iter(rows))
    bench.main(["step", "--device", "cpu"])
    title, lines = capsys.readouterr().out.split(", CPU time\n")
    assert f"torch {torch.__version__.partition('+')[0]}" in title
    cells = ["step | ms", "- | -", "ours | 0.3333", "HF | 2"]
    assert lines.splitlines() == ["", *(f"| {x} |" for x in cells)]


def test_bench_kernel(monkeypatch):
    # Inductor compiles in C++, which takes 20 s.
    quick = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    monkeypatch.setattr(kernel.shutil, "which", lambda name: name)
    case = (8, torch.bfloat16, torch.uint8)
    monkeypatch.setattr(kernel, "CASES", [case])
    rows = rows_of(kernel)
    assert [row["loss"] for row in rows] == ["eager", "compile", "copy"] * 2
    pred, imgs, mask, _ = kernel.make_inputs(case, batch_size=3, size=16, device=CPU)
    # 3 of 4 patches of 3 images are masked; each has 192 values.
    masked, every = 3 * 3 * 192, 3 * 4 * 192
    moved = kernel.bytes_to_move(pred, imgs, mask)
    assert moved == {"forward": 3 * masked, "both": 6 * masked + 2 * every}


@needs_gpu
def test_bench_kernel_on_a_gpu():
    rows = rows_of(kernel, torch.device("cuda"), size=112)
    memory = {row["loss"]: row["peak MiB"] for row in rows}
    assert list(memory) == ["eager", "compile", "triton", "copy"]
    assert 0 < memory["triton"] < memory["eager"]


def test_bench_step():
    # This copy of facebookresearch/mae does not exist.
    rows = rows_of(step, models=("vit_micro",), mae_repo="/nowhere")
    names = ["ours", "HF sdpa", "train_step, vanilla", "train_step, guided"]
    assert [row["step"] for row in rows] == names * 2
    models = [x for x, *_ in step.available_impls(attg_mae.Config(), CPU).values()]
    our_size, size = (sum(p.numel() for p in model.parameters()) for model in models)
    positions = [p for name, p in models[1].named_parameters() if "pos" in name]
    assert our_size == size and positions and all(p.any() for p in positions)
    with pytest.raises(ValueError, match="--precision fp8: choose from bf16 and fp32"):
        rows_of(step, precision=("fp8",))


def test_bench_data(tmp_path):
    Image.effect_noise((60, 45), 50).convert("RGB").save(tmp_path / "a.JPEG")
    Image.effect_noise((45, 60), 50).save(tmp_path / "b.jpg")
    rows = rows_of(data, data=str(tmp_path), repeats=1)
    names = ["as they are", "4:2:0", "12 megapixels"]
    expected = [(x, y) for x in names for y in data.PIPELINES]
    assert [(row["files"], row["pipeline"]) for row in rows] == expected
    sets = tmp_path / "sets"
    assert list(data.write_sets(sets, tmp_path, 2).values()) == [2, 2, 1]
    copy, halved, large = (sets / x / "train" / "a" / "0.jpg" for x in names)
    assert copy.read_bytes() == (tmp_path / "a.JPEG").read_bytes()
    assert Image.open(halved).layer[0][1:3] == (2, 2)
    assert Image.open(large).size == (4000, 3000)
    first = (next(open_(sets / "4:2:0", 32, 2))[0] for open_ in data.PIPELINES.values())
    assert [x.dtype for x in first] == [torch.uint8, torch.uint8, torch.float32]
    with pytest.raises(ValueError, match="--data None: name a folder of JPEG"):
        rows_of(data)


def test_bench_maps():
    rows = rows_of(maps, size=48)
    assert [row["L"] for row in rows] == [9] * 7 + [36] * 7
    names = ["tokencut", "scipy", "backbone", "tokencut", "scipy"]
    assert [row["cut"] for row in rows[:5]] == names


def test_bench_knn(monkeypatch):
    monkeypatch.setitem(knn.SIZES, "cpu", (5000, 300, 32))
    rows = rows_of(knn)
    names = {row["k-NN"] for row in rows}
    assert names >= {"knn_classify", "one-hot", "sklearn"}
    assert len({round(row["top-1 %"], 3) for row in rows}) == 1
    assert 10 < rows[0]["top-1 %"] < 90


def test_gpu_script_runs_what_the_programs_accept(tmp_path):
    """With a `python` that prints its arguments and fails for one of the benchmarks."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n[ "$2" != knn ]\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    command = ["benchmarks/gpu.sh", out, "--data", "photographs", "--mae_repo", "mae"]
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    assert [path.name for path in out.glob("*.log")] == ["knn.log"]
    benchmarks = set()
    for path in out.iterdir():
        _, _, flags = path.read_text().partition(".py ")
        if path.read_text().startswith("bench"):
            settings = bench.parse(bench.Settings, "", flags.split())
            benchmarks.add(settings.benchmark)
        elif path.stem != "tests":
            attg_mae.parse(attg_mae.Config, "", flags.split())
    assert benchmarks == set(bench.BENCHMARKS)
