"""
The benchmarks: that they measure what they say, on the smallest sizes.
"""

import json
import math
import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import attg_mae
import bench
import benchmarks.kernel
from attg.datasets import open_data
from benchmarks import data, gpu, gpu_checks, gpu_items, gpu_report, measure, step
from tests.helpers import DEVICE, kernel, needs_gpu

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
CPU = torch.device("cpu")


def rows_of(path):
    """(title, rows) of a file of JSON lines."""
    about, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return about["on"], rows


def bench_rows(tmp_path, name, flags):
    bench.main([name, "--device", "cpu", "--out", str(tmp_path), *flags.split()])
    title, rows = rows_of(tmp_path / f"{name}.jsonl")
    assert "torch 2" in title
    assert (tmp_path / f"{name}.md").read_text().startswith(title)
    return rows


# -- The loss --------------------------------------------------------------------------


def test_bench_kernel(tmp_path, capsys, monkeypatch):
    # Inductor, which compiles in C++, takes 20 s for it.
    quick = partial(benchmarks.kernel.available_losses, backend="aot_eager")
    monkeypatch.setattr(benchmarks.kernel, "available_losses", quick)
    names = {"eager", "compile"} if COMPILER else {"eager"}
    flags = ["--shapes", "patch 8", *"--dtypes float32 --size 16 --batches 3".split()]
    bench.main(
        ["kernel", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path), *flags]
    )
    title, rows = rows_of(tmp_path / "kernel.jsonl")
    assert len(rows) == 3 * len(names)
    assert {r["loss"] for r in rows} == names
    assert "torch 2" in title
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


def test_bench_kernel_refuses():
    with pytest.raises(ValueError, match="--sweep: the kernel needs a GPU"):
        bench.main(["kernel", "--device", "cpu", "--sweep", "WARP=1024"])
    with pytest.raises(ValueError, match="--shapes patch 9: choose from ViT-B/L 16,"):
        bench.main(["kernel", "--device", "cpu", "--shapes", "patch 9"])
    with pytest.raises(ValueError, match="needs a GPU; --tiny --device cpu"):
        bench.main(["gpu", "--device", "cpu", "--until", "1"])


@needs_gpu
def test_bench_kernel_on_a_gpu(tmp_path):
    flags = ["--shapes", "patch 8", *"--dtypes bfloat16 --size 32 --batches 2".split()]
    flags += ["--images", "float32", "uint8", "--out", str(tmp_path)]
    bench.main(["kernel", "--repeats", "3", *flags])
    _, rows = rows_of(tmp_path / "kernel.jsonl")
    assert {r["loss"] for r in rows} == {"eager", "compile", "triton"}
    assert all(0 < r["ms"] < 10 for r in rows)
    memory = {r["loss"]: r["peak MiB"] for r in rows}
    assert 0 < memory["triton"] < memory["eager"]


# -- The training step -----------------------------------------------------------------


def test_bench_step(tmp_path):
    flags = "--models vit_micro --batches 2 --repeats 2 --mae_repo /nowhere"
    rows = bench_rows(tmp_path, "step", flags)
    # The copy of facebookresearch/mae is not there.
    names = ["ours", "train_step, vanilla", "train_step, guided", "HF sdpa", "lightly"]
    assert [r["step"] for r in rows] == names
    by_name = {r["step"]: r for r in rows}
    assert by_name["ours"]["x ours"] == 1
    for r in rows:
        assert 0 < r["p20"] <= r["img/s"] <= r["p80"]
        ratio = r["img/s"] / by_name["ours"]["img/s"]
        assert math.isclose(r["x ours"], ratio, rel_tol=1e-9)
    for name in ("HF sdpa", "lightly"):
        # The same model: they embed patches that are hidden, and little else.
        for what in ("GFLOP/img", "saved MB/img"):
            assert 1 < by_name[name][what] / by_name["ours"][what] < 1.15
    costs = step.guidance_cost(rows)
    speeds = [by_name[f"train_step, {x}"]["img/s"] for x in ("vanilla", "guided")]
    assert costs == {"": pytest.approx(100 * (speeds[0] / speeds[1] - 1))}


class Small(nn.Module):
    """Its products and what it keeps are counted by hand below."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 5)
        self.second = nn.Linear(5, 7)


def small_loss(model, imgs, noise):
    x = F.relu(model.first(imgs.flatten(1)))
    return model.second(x).square().sum()


def small_code():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = SimpleNamespace(imgs=torch.randn(3, 3, 2, 2), noise=None, dtype=None)
    inputs._replace = lambda imgs, noise: SimpleNamespace(imgs=imgs, dtype=None)
    return step.Code("small", model, small_loss, optimizer), inputs


def test_bench_step_counts_operations_and_saved_bytes():
    code, inputs = small_code()
    call = partial(step.plain_step, code, inputs, code.model)
    # Forward: 2 n m each. Backward: the weights' gradients, and that of the hidden values.
    assert step.model_flops(call) == 3 * 2 * (2 * 12 * 5 + 3 * 5 * 7)


def test_bench_step_counts_each_storage_once():
    imgs = torch.randn(2, 3, 4, 4)
    cfg = attg_mae.Config(img_size=8, patch_size=4)
    inputs = step.Inputs(cfg, imgs, torch.rand(2, 1), None, None, torch.tensor(0.75))

    def loss(model, imgs, noise):
        # exp keeps its result, 48 values of 4 bytes; a view of it is no new storage.
        x = imgs.requires_grad_().exp()
        return (x.flatten() * x.flatten()).sum()

    code = step.Code("exp", None, loss, None)
    assert step.saved_bytes(code, inputs) == 2 * 48 * 4
    assert step.saved_bytes_per_image(code, inputs) == 48 * 4


# -- The data path ---------------------------------------------------------------------


def test_bench_data(tmp_path):
    rows = bench_rows(
        tmp_path, "data", "--pictures 2 --batches 4 --size 32 --repeats 1"
    )
    assert [r["pipeline"] for r in rows] == list(data.PIPELINES)
    for r in rows:
        assert r["workers"] == 0
        assert math.isclose(r["x ours"], r["img/s"] / rows[0]["img/s"])


def test_bench_data_with_workers(tmp_path):
    data.write_pictures(tmp_path, 4, 2)
    rows = data.measure(tmp_path, 32, 2, [1], CPU, 1)
    names = ["ours", "ours, to the device", "torchvision, MAE's"]
    assert [(r["pipeline"], r["workers"]) for r in rows] == [(x, 1) for x in names]


def test_bench_data_pipelines_give_the_same_kind_of_batch(tmp_path):
    data.write_pictures(tmp_path, 3, 2)
    files = sorted(tmp_path.glob("train/a/*.jpg"))
    assert [Image.open(file).size for file in files] == [
        (500, 375),
        (375, 500),
        (500, 375),
    ]
    assert files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()
    # As large as ImageNet's on average.
    assert 80_000 < files[0].stat().st_size < 140_000
    shapes = {}
    for name, open_pipeline in data.PIPELINES.items():
        batch = next(open_pipeline(tmp_path, 32, 2, 0))
        shapes[name] = [tuple(x.shape) for x in batch if hasattr(x, "shape")][0]
    assert shapes.pop("decoding alone") == (375, 500, 3)
    assert set(shapes.values()) == {(2, 3, 32, 32)}


# -- Maps, k-NN ------------------------------------------------------------------------


def test_bench_maps(tmp_path):
    rows = bench_rows(tmp_path, "maps", "--size 48 --batches 3 --repeats 2")
    assert [r["L"] for r in rows] == [9] * 5 + [36] * 5
    assert len({r["graphs"] for r in rows}) == 5
    for r in rows:
        assert math.isclose(r["x scipy"], r["scipy ms"] / r["ms"])
        assert 0 < r["p20"] <= r["ms"] <= r["p80"]
        assert math.isclose(r["% of backbone"], 100 * r["ms"] / r["backbone ms"])


def test_bench_knn(tmp_path):
    rows = bench_rows(tmp_path, "knn", "--knn 5000 300 32 --repeats 2")
    assert [r["k-NN"] for r in rows] == ["knn_classify", "one-hot", "scikit-learn"]
    assert len({round(r["top-1 %"], 3) for r in rows}) == 1
    assert 10 < rows[0]["top-1 %"] < 90
    assert rows[0]["x knn_classify"] == 1
    assert all(0 < r["p20"] <= r["s"] <= r["p80"] for r in rows)
    assert all(math.isclose(r["x knn_classify"], r["s"] / rows[0]["s"]) for r in rows)


# -- Measuring -------------------------------------------------------------------------


def test_bench_memory_is_that_of_the_call():
    kept = [torch.ones(2**18) for _ in range(200)]
    # After 200 MiB of the heap, which are free again: to be counted
    kept = [torch.ones(2**15) for _ in range(9)]
    size = measure.peak_memory(
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
    times = measure.take_turns(calls, CPU, 2)
    assert seen == [("a", "prepare"), "a", ("b", "prepare"), "b"] * 3
    assert [len(x) for x in times.values()] == [2, 2]
    assert measure.percentiles([0.001, 0.002, 0.003, 0.004, 0.1]) == pytest.approx(
        [3, 1.8, 23.2]
    )


# -- All that a GPU has to show --------------------------------------------------------

# In place of bench.py: three items; `dies` and `hangs` do so, and leave half a line.
WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu import add_record, read_records, results
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(flags["--out"])
for name in ("first", {name!r}, "last"):
    if name not in results(read_records(out), float(flags["--since"])):
        add_record(out, begins=name, limit=0.3 if name == "hangs" else 60)
        print("begins", name, flush=True)
        if name == "dies":
            with open(out / "gpu.jsonl", "a") as file:
                file.write('{{"item": "dies", "ro')
                file.write("\\n")
            os._exit(7)
        if name in ("hangs", "waits"):
            time.sleep(60)
        add_record(out, item=name, rows=[{{"number": 1}}])
"""


def supervise(tmp_path, name, minutes=1.0, items=None):
    root = str(gpu.PROGRAM.parent)
    program = tmp_path / "worker.py"
    program.write_text(WORKER.format(root=root, name=name))
    args = SimpleNamespace(out=tmp_path, minutes=minutes, items=items, device=None)
    gpu.supervise(args, ["--out", str(tmp_path)], program)
    return gpu.results(gpu.read_records(tmp_path))


def test_bench_gpu_goes_on_after_an_item_that_ends_the_process(tmp_path, capfd):
    for name, words in (
        ("dies", "ended the process, exit code 7"),
        ("hangs", "took longer than 0 s"),
    ):
        out = tmp_path / name
        out.mkdir()
        ended = supervise(out, name)
        assert list(ended) == ["first", name, "last"]
        assert ended[name]["failed"] == words
        assert ended["last"]["rows"] == [{"number": 1}]
        printed = capfd.readouterr().out
        assert printed.count("begins first") == 1
        assert f"{name}: {words}" in printed
        assert (out / "gpu.log").read_text().count("begins") == 3


def test_bench_gpu_stops_when_the_time_is_up_and_goes_on_in_a_second_call(tmp_path):
    began = time.time()
    # 1.5 s: `waits` sleeps for a minute.
    assert list(supervise(tmp_path, "waits", minutes=0.025)) == ["first"]
    assert time.time() - began < 15
    first = gpu.results(gpu.read_records(tmp_path))["first"]
    # Its place is taken by one that ends.
    ended = supervise(tmp_path, "second")
    assert list(ended) == ["first", "second", "last"]
    assert ended["first"] == first
    # --items are measured again, done before or not.
    again = supervise(tmp_path, "second", items=["first"])
    assert again["first"]["at"] > first["at"]


def test_bench_gpu_says_when_its_process_cannot_begin(tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(5)")
    args = SimpleNamespace(out=tmp_path, minutes=1, items=None, device=None)
    with pytest.raises(SystemExit, match="exit code 5, see .*gpu.log"):
        gpu.supervise(args, [], tmp_path / "worker.py")


def trial(tmp_path, *items):
    """Records of a trial of these items, in this process."""
    flags = ["gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    flags += ["--until", str(time.time() + 600), "--since", "0"]
    bench.main([*flags, "--scratch", str(tmp_path / "scratch"), "--items", *items])
    return gpu.results(gpu.read_records(tmp_path))


def test_bench_gpu_trial(tmp_path):
    # Steps and k-NN have tests of their own.
    names = ["checks", "kernel", "micro-batch/vit_micro", "losses", "maps/16", "data"]
    ended = trial(tmp_path, *names)
    assert not [name for name, record in ended.items() if "failed" in record]
    rows = {name: record["rows"] for name, record in ended.items()}
    for row in rows["checks"] + rows["losses"]:
        assert row["ok"], row
    if kernel.INTERPRETED:
        losses = {row["loss"] for row in rows["kernel/patch-8/float32/float32/2"]}
        assert losses >= {"eager", "triton"}
    assert rows["micro-batch/vit_micro"][0]["micro-batch"] == 4
    report = (tmp_path / "gpu.md").read_text()
    for words in ("## Wanted and measured", "losses: first 2", "- headline: not mea"):
        assert words in report


def test_bench_gpu_records_an_item_that_fails(tmp_path, monkeypatch):
    def fails(setup):
        raise RuntimeError("out of luck")

    def lost(setup):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    items = [gpu_items.Item("a", 1, fails), gpu_items.Item("b", 1, lost)]
    items.append(gpu_items.Item("c", 1, lambda setup: [{"number": 2}]))
    monkeypatch.setattr(gpu_items, "all_items", lambda tiny: items)
    with pytest.raises(SystemExit):
        trial(tmp_path, "a", "b", "c")
    ended = trial(tmp_path, "a", "b", "c")
    assert ended["a"]["failed"] == "RuntimeError: out of luck"
    assert "CUDA error" in ended["b"]["failed"]
    assert ended["c"]["rows"] == [{"number": 2}]
    report = (tmp_path / "gpu.md").read_text()
    assert "- a: failed, RuntimeError: out of luck" in report


def test_bench_gpu_checks_notice_a_wrong_kernel(monkeypatch):
    notes = []
    setup = SimpleNamespace(
        on_gpu=False, tiny=True, device=CPU, note=notes.append, backend="aot_eager"
    )
    right = gpu_checks.attg_loss

    def wrong(pred, *args, impl, **options):
        # The caller's kernel is off by a thousandth; PyTorch in float64 is right.
        factor = 1 if pred.dtype == torch.float64 else 1.001
        return factor * right(pred, *args, impl="torch", **options)

    monkeypatch.setattr(gpu_checks, "attg_loss", wrong)
    rows = gpu_checks.beside_float64(setup)
    # 16-bit gradients are rounded by more than that.
    assert [row["ok"] for row in rows] == [False, False, False, True, False, False]


def test_bench_largest_batch():
    for limit in (0, 1, 5, 8, 100, 731, 5000):
        tried = []

        def fits(number, limit=limit, tried=tried):
            tried.append(number)
            return number <= limit

        found = gpu_items.largest(fits, 8, 1000)
        assert found <= limit and found <= 1000
        if limit >= 8:
            assert found >= min(limit, 1000) * 15 / 16 - 1
        assert len(tried) < 14


def test_bench_report_judges_by_the_budgets():
    case = {"shape": "ViT-B/L 16", "pred": "bfloat16", "images": "float32"}
    case |= {"batch": 256, "pass": "both"}
    ours = case | {"loss": "triton", "ms": 0.1, "x eager": 9.0, "% of copy": 79.0}
    rows = [case | {"loss": "compile", "ms": 0.16, "x eager": 5.0}, ours]
    claims = gpu_report.kernel_claims(rows)
    assert [c["met"] for c in claims] == [False, True, True]
    assert claims[2]["measured"] == pytest.approx(1.6)
    assert gpu_report.kernel_claims(rows[:1]) == []

    speeds = {"train_step, vanilla": 100.0, "train_step, guided": 98.0, "HF sdpa": 50.0}
    rows = []
    for name, speed in speeds.items():
        row = {"model": "vit_base", "type": "bfloat16", "step": name, "img/s": speed}
        rows.append(row | {"x ours": speed / 100})
    claims = gpu_report.step_claims(rows)
    assert [c["met"] for c in claims] == [False, True]
    assert claims[0]["measured"] == pytest.approx(100 * (100 / 98 - 1))
    assert claims[1]["measured"] == pytest.approx(2.0)


def test_bench_gpu_makes_its_pictures_once(tmp_path):
    args = SimpleNamespace(tiny=True, mae_repo=None, scratch=tmp_path)
    setup = gpu_items.Setup(args, CPU)
    pictures = open_data(setup.pictures, "train", 32)
    assert len(pictures) == 8 and (tmp_path / "maps.npy").exists()
    times = [path.stat().st_mtime_ns for path in setup.pictures.rglob("*.jpg")]
    again = gpu_items.Setup(args, CPU).pictures
    assert [path.stat().st_mtime_ns for path in again.rglob("*.jpg")] == times
