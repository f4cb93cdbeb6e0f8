"""
The benchmarks: whether they measure what they claim, on the smallest sizes.
"""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import attg_mae
import bench
from benchmarks import data, gpu, measure, step
from tests.helpers import needs_gpu

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
CPU = torch.device("cpu")


def bench_rows(tmp_path, name, flags, device="cpu"):
    """Rows of a table, without its title."""
    bench.main([name, "--device", device, "--out", str(tmp_path), *flags.split()])
    lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    title, *rows = map(json.loads, lines)
    assert "torch 2" in title["on"]
    assert (tmp_path / f"{name}.md").read_text().startswith(title["on"])
    return rows


def test_bench_kernel(tmp_path, monkeypatch):
    # Inductor compiles in C++, which takes 20 s.
    quick = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    flags = "--dtypes float32 --size 16 --batches 3 --repeats 2 --shapes"
    bench.main(
        ["kernel", "--device", "cpu", "--out", str(tmp_path), *flags.split(), "patch 8"]
    )
    lines = (tmp_path / "kernel.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    names = {"eager", "compile"} if COMPILER else {"eager"}
    assert {r["loss"] for r in rows} == names and len(rows) == 3 * len(names)
    masked, written = 3 * 3 * 192 * 8, 3 * 4 * 192 * 4
    moved = {"forward": masked, "backward": masked + written}
    moved["both"] = sum(moved.values())
    for r in rows:
        rate = moved[r["pass"]] / r["ms"] / 1e6
        assert math.isclose(r["GB/s"], rate, rel_tol=1e-9)
        assert 0 < r["p20"] <= r["ms"] <= r["p80"]
        assert r["x eager"] == 1 if r["loss"] == "eager" else r["x eager"] > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sweep", "WARP=1024"], "--sweep: the kernel needs a GPU"),
        (["--shapes", "patch 9"], "--shapes patch 9: choose from ViT-B/L 16,"),
        (["--dtypes", "int8"], "--dtypes int8: choose from bfloat16, float32"),
    ],
)
def test_bench_kernel_refuses(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench.main(["kernel", "--device", "cpu", "--out", str(tmp_path), *flags])


@needs_gpu
def test_bench_kernel_on_a_gpu(tmp_path):
    flags = (
        "--dtypes bfloat16 --size 224 --batches 2 --images float32 uint8 --repeats 3"
    )
    rows = bench_rows(tmp_path, "kernel", flags, "cuda")
    assert {r["loss"] for r in rows} == {"eager", "compile", "triton"}
    assert all(0 < r["ms"] < 10 for r in rows)
    memory = {r["loss"]: r["peak MiB"] for r in rows}
    assert 0 < memory["triton"] < memory["eager"]


# -- The training step -----------------------------------------------------------------


def test_bench_step(tmp_path):
    flags = "--models vit_micro --batches 2 --repeats 2 --mae_repo /nowhere"
    rows = bench_rows(tmp_path, "step", flags)
    # The copy of facebookresearch/mae does not exist.
    names = ["ours", "train_step, vanilla", "train_step, guided", "HF sdpa"]
    assert [r["step"] for r in rows] == names
    by_name = {r["step"]: r for r in rows}
    for r in rows:
        assert 0 < r["p20"] <= r["img/s"] <= r["p80"]
        ratio = r["img/s"] / by_name["ours"]["img/s"]
        assert math.isclose(r["x ours"], ratio, rel_tol=1e-9)
    for cost in ("GFLOP/img", "saved MB/img"):
        # The same model, but it embeds hidden patches as well.
        assert 1 < by_name["HF sdpa"][cost] / by_name["ours"][cost] < 1.15


class Small(nn.Module):
    """A model whose products are counted by hand below."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 5)
        self.second = nn.Linear(5, 7)


def inputs_of(imgs):
    cfg = attg_mae.Config(img_size=8, patch_size=4)
    batch = step.make_inputs(cfg, len(imgs), torch.float32, CPU).batch
    return step.Inputs(cfg, imgs, batch, None, torch.tensor(0.75))


def test_bench_step_counts_operations():
    def loss(model, imgs, noise):
        x = F.relu(model.first(imgs.flatten(1)))
        return model.second(x).square().sum()

    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    impl = step.Impl("small", model, loss, optimizer)
    call = partial(step.plain_step, impl, inputs_of(torch.randn(3, 3, 2, 2)), model)
    # Forward 2 n m each; backward: gradients of the weights and of the hidden values.
    assert step.model_flops(call) == 3 * 2 * (2 * 12 * 5 + 3 * 5 * 7)


def test_bench_step_counts_each_storage_once():
    def loss(model, imgs, noise):
        # exp keeps its result, 48 values of 4 bytes; a view of it is no new storage.
        x = imgs.requires_grad_().exp()
        return (x.flatten() * x.flatten()).sum()

    impl = step.Impl("exp", None, loss, None)
    assert step.saved_bytes(impl, inputs_of(torch.randn(2, 3, 4, 4))) == 2 * 48 * 4


# -- Data, maps, k-NN ------------------------------------------------------------------


def test_bench_data(tmp_path):
    flags = "--files 2 --batches 4 --size 32 --repeats 1 --workers 0 1"
    rows = bench_rows(tmp_path, "data", flags)
    expected = [(name, 0) for name in data.PIPELINES]
    expected += [("ours", 1), ("torchvision, MAE's", 1)]
    assert [(r["pipeline"], r["workers"]) for r in rows] == expected
    for r in rows[:4]:
        assert math.isclose(r["x ours"], r["img/s"] / rows[0]["img/s"])


def test_bench_data_pipelines_yield_the_same_kind_of_batch(tmp_path):
    data.write_images(tmp_path, 3, 2)
    files = sorted(tmp_path.glob("train/a/*.jpg"))
    sizes = [(500, 375), (375, 500), (500, 375)]
    assert [Image.open(file).size for file in files] == sizes
    assert files[0].read_bytes() == files[2].read_bytes() != files[1].read_bytes()
    # As large as ImageNet's on average.
    assert 80_000 < files[0].stat().st_size < 140_000
    shapes = {}
    for name, open_pipeline in data.PIPELINES.items():
        batch = next(open_pipeline(tmp_path, 32, 2, 0))
        shapes[name] = [tuple(x.shape) for x in batch if hasattr(x, "shape")][0]
    assert shapes.pop("decoding alone") == (375, 500, 3)
    assert set(shapes.values()) == {(2, 3, 32, 32)}


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
    assert all(0 < r["p20"] <= r["s"] <= r["p80"] for r in rows)
    assert all(math.isclose(r["x knn_classify"], r["s"] / rows[0]["s"]) for r in rows)


# -- Measuring -------------------------------------------------------------------------


def test_calls_take_turns():
    seen = []
    calls = {}
    for name in "ab":
        prepare = partial(seen.append, (name, "prepare"))
        calls[name] = (prepare, lambda _, name=name: seen.append(name))
    times = measure.take_turns(calls, CPU, 2)
    assert seen == [("a", "prepare"), "a", ("b", "prepare"), "b"] * 3
    assert [len(x) for x in times.values()] == [2, 2]
    percentiles = measure.percentiles([0.001, 0.002, 0.003, 0.004, 0.1])
    assert percentiles == pytest.approx([3, 1.8, 23.2])


# -- All on a GPU ----------------------------------------------------------------------


def test_bench_gpu_stops_in_time_and_continues(tmp_path, monkeypatch):
    settings = bench.Settings(benchmark="gpu", out=tmp_path, minutes=1)
    scripts = {"fails": "exit(3)", "works": "print('output')", "waits": ""}
    scripts["last"] = "print('last')"
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name, code in scripts.items():
        (folder / f"{name}.py").write_text(code)
    commands = {name: [f"{name}.py"] for name in scripts}
    commands["waits"] = ["-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu, "ROOT", folder)
    monkeypatch.setattr(gpu, "commands", lambda _: commands)
    settings.minutes = 0.05
    codes = {record["name"]: record["code"] for record in gpu.run(settings)}
    assert codes == {"fails": 3, "works": 0, "waits": "time is up"}
    assert (tmp_path / "works.log").read_text() == "output\n"
    commands["waits"] = ["works.py"]
    settings.minutes = 1
    # What ended well is not repeated.
    again = {record["name"]: record["code"] for record in gpu.run(settings)}
    assert again == {"fails": 3, "waits": 0, "last": 0}


def test_bench_gpu_commands_parse(tmp_path):
    """Each command of bench.py is one that its parser accepts."""
    settings = bench.Settings(benchmark="gpu", out=tmp_path, mae_repo=tmp_path)
    commands = gpu.commands(settings)
    benchmarks = [c for c in commands.values() if c[0] == "bench.py"]
    assert len(benchmarks) >= 6
    for _, *flags in benchmarks:
        parsed = bench.parse(bench.Settings, "", list(map(str, flags)))
        assert parsed.benchmark in bench.BENCHMARKS
    trainings = [c for c in commands.values() if "attg_mae.py" in c]
    for command in trainings:
        flags = command[command.index("attg_mae.py") + 1 :]
        attg_mae.parse(attg_mae.Config, "", list(map(str, flags)))
