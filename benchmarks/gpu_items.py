"""
What `bench.py gpu` measures, in the order of its worth, each item on its own.

An item's record holds rows for the tables of gpu.md, and notes: what was left out, and
why. --tiny runs all of it on small sizes; what needs a GPU is left out on a CPU.
"""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import attg_mae
from attg.datasets import open_data
from attg.kernels import attg_loss
from attg.loader import Batch
from attg.maps import save_maps
from attg.seeding import generator_for
from attg.toy import toy
from attg_mae import Config, build_model, param_groups, resolve, train_step
from benchmarks import data, kernel, knn, maps, step
from benchmarks.gpu import add_record, read_records, results
from benchmarks.gpu_checks import CHECKS, kernel_impl, loss_path, row_of
from benchmarks.gpu_report import write_report
from benchmarks.measure import copy_bandwidth, machine, print_row, time_alone

ROOT = Path(__file__).parent.parent
GIB = 2**30


class Item(NamedTuple):
    name: str
    # What it takes on an H100, compilation included: an estimate. An item is not begun
    # when less time is left, and ended when it takes three times as long.
    seconds: float
    # run(setup) -> rows
    run: Any


class Setup:
    """Where the items run, and what they share."""

    def __init__(self, args, device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.tiny = args.tiny
        self.mae_repo = args.mae_repo
        self.scratch = args.scratch
        self.repeats = 2 if args.tiny else 30
        self.backend = "aot_eager" if args.tiny else "inductor"
        self.notes = []
        # Set when the process is of no use any more.
        self.lost = False

    def note(self, text):
        """Prints what was left out, and keeps it for the record."""
        print(text, flush=True)
        if text not in self.notes:
            self.notes.append(text)

    @functools.cached_property
    def pictures(self):
        """A folder of JPEG files of ImageNet's size, with maps beside it."""
        folder = self.scratch / "pictures"
        # The maps come last.
        if not (self.scratch / "maps.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            count, different = (8, 2) if self.tiny else (1024, 64)
            data.write_pictures(folder, count, different)
            pictures = open_data(folder, "train", 224)
            coarse = torch.rand(len(pictures), 1, 4, 4)
            grids = torch.nn.functional.interpolate(coarse, 14, mode="bilinear")
            save_maps(self.scratch / "maps.npy", grids[:, 0].numpy(), pictures, "none")
        return folder


# -- Commands --------------------------------------------------------------------------


def train_command(setup, name, *flags, torchrun=False):
    """Runs attg_mae.py in a process of its own; returns the run folder's log."""
    out = setup.scratch / name
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["attg_mae.py", "--out", str(out), "--device", setup.device.type]
    command += [str(flag) for flag in flags]
    print("$", *command[1:], flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"{name}: exit code {code}")
    return step_records(out / "log.jsonl")


def step_records(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def run_row(command, steps, began):
    """A row on a run, from its log; the speed is the median of the second half."""
    late = steps[len(steps) // 2 :]
    return {
        "command": command,
        "steps": steps[-1]["step"],
        "first loss": steps[0]["loss"],
        "last loss": steps[-1]["loss"],
        "img/s": float(np.median([line["img_s"] for line in late])),
        "% waiting for data": 100 * float(np.median([x["data_wait"] for x in late])),
        "s": time.time() - began,
    }


def headline(setup):
    """torchrun attg_mae.py --model vit_large with pictures and maps, for 20 steps."""
    began = time.time()
    flags = ["--data", setup.pictures, "--maps", setup.scratch / "maps.npy"]
    flags += ["--log_every", 1, "--save_every", 1000]
    if setup.tiny:
        # One step is an epoch.
        flags += ["--model", "vit_micro", "--batch_size", 8, "--epochs", 3]
    else:
        flags += ["--model", "vit_large", "--batch_size", 1024, "--epochs", 20]
        flags += ["--accum", 4, "--warmup_epochs", 5]
    steps = train_command(setup, "headline", *flags, torchrun=True)
    return [run_row("torchrun attg_mae.py --model vit_large", steps, began)]


RUNS = {
    "quick start": [],
    "resumed": [],
    "fp16": ["--precision", "fp16"],
    "fp32": ["--precision", "fp32"],
    "compiled": ["--compile"],
}


def short_run(name, setup):
    """The quick start for an epoch, with k-NN at the end; `resumed`: for one more."""
    if not setup.on_gpu and name in ("fp16", "compiled"):
        setup.note(f"without {name}: needs a GPU")
        return []
    began = time.time()
    flags = ["--log_every", 10, "--warmup_epochs", 0.4, *RUNS[name]]
    if setup.tiny:
        flags += ["--data", setup.pictures, "--guidance", "none", "--batch_size", 4]
    epochs = 1
    if name == "resumed":
        train_command(setup, name, *flags, "--epochs", 1)
        epochs = 2
    steps = train_command(setup, name, *flags, "--epochs", epochs)
    words = ["attg_mae.py", *map(str, RUNS[name]), f"({name})"]
    return [run_row(" ".join(words), steps, began)]


# -- Checks and tests ------------------------------------------------------------------


def checks(setup):
    """The kernels beside float64, and as parts of a program."""
    rows = []
    for check in CHECKS:
        try:
            more = check(setup)
        except Exception as error:
            traceback.print_exc()
            name = check.__name__.replace("_", " ")
            more = [row_of(name, f"{type(error).__name__}: {str(error)[:200]}", 0.0)]
            setup.lost = is_fatal(error)
        for row in more:
            print_row(row)
        rows += more
        if setup.lost:
            break
    return rows


def tests(setup):
    """The project's own tests of the loss and of its kernels."""
    for package in ("pytest", "timm", "transformers"):
        if not find_spec(package):
            setup.note(f"without the project's tests: {package} is not installed")
            return []
    large = "above_2_to_31"
    several = ["-n", "8"] if find_spec("xdist") else []
    if setup.tiny:
        return [run_tests(setup, "where_it_cannot_run", [])]
    # The large ones fill the GPU's memory, and run one after the other.
    return [run_tests(setup, f"not {large}", several), run_tests(setup, large, [])]


def run_tests(setup, words, flags):
    """A row of counts; words: pytest's -k. Failed tests become notes."""
    began = time.time()
    report = setup.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_kernel.py", "tests/test_loss.py", "-k", words, *flags]
    code = subprocess.run([*command, f"--junit-xml={report}"], cwd=ROOT).returncode
    if not report.exists():
        raise RuntimeError(f"{' '.join(command[1:])}: exit code {code}")
    row = {"tests": words}
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    for name in ("tests", "failures", "errors", "skipped"):
        row[f"number of {name}"] = int(suite.get(name))
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                setup.note(f"{case.get('name')}: {found.get('message')[:300]}")
    report.unlink()
    return row | {"s": time.time() - began}


# -- The loss alone --------------------------------------------------------------------


def kernel_case(case, setup):
    losses = kernel.available_losses(setup.device, setup.note, setup.backend)
    if not setup.on_gpu:
        losses["triton"] = partial(attg_loss, impl=kernel_impl(setup))
    bandwidth = copy_bandwidth(setup.device, 3 if setup.tiny else 20)
    rows = kernel.measure_case(
        losses, case, setup.device, setup.repeats, bandwidth, setup.note
    )
    for row in rows:
        row["copy GB/s"] = bandwidth / 1e9
        print_row(row)
    return rows


def kernel_cases(tiny):
    """The budget's case first, then types, patch sizes and batches."""
    if tiny:
        return [kernel.Case("patch 8", "float32", "float32", 2, 16)]
    cases = []
    large = "ViT-B/L 16"
    for images in kernel.IMAGES:
        cases.append(kernel.Case(large, "bfloat16", images, 256))
    for shape in kernel.SHAPES:
        for dtype in ("bfloat16", "float32"):
            cases.append(kernel.Case(shape, dtype, "float32", 256))
    for batch in (64, 1024, 32, 128, 512):
        cases.append(kernel.Case(large, "bfloat16", "float32", batch))
    return list(dict.fromkeys(cases))


# -- The training step -----------------------------------------------------------------


def steps(name, compiled, setup):
    """Rows of a preset beside its peers; compiled: eager and compiled in turns."""
    cfg, batch_size, dtype = Config(name), 128, torch.bfloat16
    if setup.tiny:
        small = {"width": 32, "depth": 1, "heads": 2, "img_size": 32, "patch_size": 8}
        small |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
        cfg, batch_size = Config(name, **small), 2
    codes = step.available_codes(cfg, setup.device, setup.mae_repo, say=setup.note)
    inputs = step.make_inputs(cfg, batch_size, dtype, setup.device)
    modes = [False, True] if compiled else [False]
    repeats = max(1, setup.repeats // 2)
    rows = step.measure_steps(codes, inputs, modes, repeats, setup.note, setup.backend)
    for row in rows:
        print_row(row)
    return rows


def largest(fits, start, most):
    """The largest number up to `most` that fits, to a sixteenth; 0 if start does not."""
    if not fits(start):
        return 0
    good, bad = start, None
    while bad is None and good < most:
        if fits(min(2 * good, most)):
            good = min(2 * good, most)
        else:
            bad = min(2 * good, most)
    while bad is not None and bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def micro_batch(name, setup):
    """The most images of a guided step in bf16, AdamW included, and its speed."""
    sizes = {"depth": 1, "decoder_depth": 1} if setup.tiny else {}
    cfg = Config(name, **sizes)
    with setup.device:
        model = build_model(cfg)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, fused=True)
    code = step.Code("ours", model, step.our_loss, optimizer)
    tau = torch.tensor(0.75, device=setup.device)
    # The steps take their images from the batch alone.
    inputs = step.Inputs(cfg, None, None, None, torch.bfloat16, tau)

    def call(batch_size):
        batch = step.random_batch(cfg, batch_size, setup.device)
        return partial(step.whole_step, code, inputs, model, batch)

    def fits(batch_size):
        good = fits_in_memory(call, batch_size)
        # Gradients of a step that was cut short would stay.
        optimizer.zero_grad()
        free_memory(setup)
        print(name, batch_size, "fits" if good else "does not fit", flush=True)
        return good

    most = 4 if setup.tiny else 8192
    found = largest(fits, min(8, most), most)
    if found == most:
        setup.note(f"{most} images fit; more were not tried")
    row = {"model": name, "type": "bfloat16", "micro-batch": found}
    if found:
        whole = call(found)
        seconds = time_alone((step.nothing, whole), setup.device, 3)
        row["img/s"] = found / float(np.median(seconds))
    if found and setup.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        whole()
        row["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
        row["of GiB"] = torch.cuda.mem_get_info()[1] / GIB
    return [row]


def fits_in_memory(call, batch_size):
    """Whether call(batch_size)() runs."""
    try:
        call(batch_size)()
        return True
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:
        # cuBLAS's words for it.
        if "ALLOC_FAILED" in str(error):
            return False
        raise


def free_memory(setup):
    gc.collect()
    if setup.on_gpu:
        torch.cuda.empty_cache()


# -- Training with each loss -----------------------------------------------------------


def toy_batches(cfg, device):
    """Endless guided batches of the toy set, which lies on the device."""
    images, masks, _ = toy("train")
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    masks = torch.from_numpy(masks).float().to(device)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(cfg.batch_size, 4)
    patches = cfg.grid[0] * cfg.grid[1]
    generator = generator_for("bench", cfg.seed)
    while True:
        ids = torch.randint(len(images), (cfg.batch_size,), generator=generator)
        flip = torch.rand(cfg.batch_size, generator=generator) < 0.5
        noise = torch.rand(cfg.batch_size, patches, generator=generator)
        ids = ids.to(device)
        yield Batch(images[ids], masks[ids], whole, flip.to(device), noise.to(device))


def train_toy(setup, fused, dtype, stop, seconds=float("inf")):
    """[(loss, unweighted error)] of each step: `stop` steps, or as many as fit.

    The learning rate stays at its peak after 100 steps, as nobody knows the end.
    """
    cfg = resolve(Config(batch_size=4 if setup.tiny else 256))
    torch.manual_seed(0)
    model = build_model(cfg).to(setup.device)
    optimizer = torch.optim.AdamW(
        param_groups(model, 0.05), lr=cfg.lr, betas=(0.9, 0.95), fused=True
    )
    scaler = torch.amp.GradScaler(setup.device.type, enabled=False)
    tau = torch.tensor(cfg.tau, device=setup.device)
    values = []
    batches = toy_batches(cfg, setup.device)
    began = time.time()
    with loss_path(fused, kernel_impl(setup)):
        while len(values) < stop and time.time() - began < seconds:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, (len(values) + 1) / 100)
            batch = next(batches)
            value = train_step(model, optimizer, scaler, [batch], tau, cfg, dtype)
            values.append(value[:2])
            # Else the host would run ahead of the clock.
            if len(values) % 50 == 0:
                value.tolist()
    return torch.stack(values).tolist(), time.time() - began


def losses(setup):
    """20 steps in fp32 with each loss, and a minute in bf16."""
    rows = []
    number = 2 if setup.tiny else 20
    fused, _ = train_toy(setup, True, None, number)
    plain, _ = train_toy(setup, False, None, number)
    worst = 0.0
    for (a, _), (b, _) in zip(fused, plain, strict=True):
        worst = max(worst, abs(a - b) / abs(b))
    rows.append(row_of(f"first {number} losses in fp32, fused and plain", worst, 1e-3))

    seconds = 0.5 if setup.tiny else 60
    fused, took = train_toy(setup, True, torch.bfloat16, 10**6, seconds)
    plain, took_plain = train_toy(setup, False, torch.bfloat16, len(fused))
    last = max(1, len(fused) // 20)
    ends = [np.mean([mse for _, mse in run[-last:]]) for run in (fused, plain)]
    error = abs(ends[0] - ends[1]) / ends[1]
    words = f"mse after {len(fused)} steps in bf16, fused and plain"
    rows.append(row_of(words, float(error), 0.02))
    rows[-1] |= {"mse fused": ends[0], "mse plain": ends[1]}
    rows[-1] |= {"s fused": took, "s plain": took_plain}
    for row in rows:
        print_row(row)
    return rows


# -- Maps, k-NN, data ------------------------------------------------------------------


def cut(patch, setup):
    size, batch = (48, 3) if setup.tiny else (224, 32)
    repeats = max(1, setup.repeats // 3)
    return maps.measure_cut(patch, size, batch, setup.device, repeats, setup.note)


def neighbours(setup):
    sizes = (5000, 300, 32) if setup.tiny else (1_281_167, 50_000, 1024)
    rows = knn.measure_knn(*sizes, setup.device, 1 if setup.tiny else 2)
    for row in rows:
        print_row(row)
    return rows


def data_path(setup):
    batch_size = 4 if setup.tiny else 64
    workers = [0, 1] if setup.tiny else [0, min(16, os.cpu_count() or 1)]
    repeats = 1 if setup.tiny else 15
    return data.measure(setup.pictures, 224, batch_size, workers, setup.device, repeats)


# -- All of them -----------------------------------------------------------------------


def all_items(tiny):
    """[Item], the most worth first."""
    items = [
        Item("headline", 75, headline),
        Item("checks", 60, checks),
        Item("tests", 150, tests),
    ]
    cases = kernel_cases(tiny)
    for case in cases[:3]:
        items.append(kernel_item(case))
    for name in ("vit_base", "vit_large"):
        items.append(Item(f"step/{name}", 45, partial(steps, name, False)))
    items.append(Item("step/vit_base/compiled", 120, partial(steps, "vit_base", True)))
    for case in cases[3:]:
        items.append(kernel_item(case))
    items.append(
        Item("step/vit_large/compiled", 180, partial(steps, "vit_large", True))
    )
    for name in attg_mae.PRESETS:
        items.append(Item(f"micro-batch/{name}", 25, partial(micro_batch, name)))
    items.append(Item("losses", 160, losses))
    for patch in (16, 8):
        items.append(Item(f"maps/{patch}", 25, partial(cut, patch)))
    items.append(Item("knn", 120, neighbours))
    items.append(Item("data", 60, data_path))
    for name in RUNS:
        items.append(Item(f"runs/{name}", 40, partial(short_run, name)))
    return items


def kernel_item(case):
    name = f"kernel/{case.shape}/{case.pred}/{case.images}/{case.batch}"
    return Item(name.replace(" ", "-"), 20, partial(kernel_case, case))


def is_fatal(error):
    """Whether the process is of no use after it: the GPU's context is lost."""
    words = ("CUDA error", "illegal memory access", "misaligned address")
    return any(word in str(error) for word in words)


def run(args, device, out):
    """Measures what is left, in order, as long as the time lasts."""
    if device.type != "cuda" and not args.tiny:
        raise ValueError(
            f"bench.py gpu on {device}: needs a GPU; --tiny --device cpu tries it all"
        )
    items = all_items(args.tiny)
    names = [item.name for item in items]
    setup = Setup(args, device)
    done = results(read_records(out), args.since)
    write_report(out, read_records(out), names)
    for item in items:
        if item.name in done:
            continue
        if args.items and not item.name.startswith(tuple(args.items)):
            continue
        left = args.until - time.time()
        needs = min(item.seconds, 20) if args.tiny else item.seconds
        if left < needs:
            print(f"left: {item.name} takes {needs} s, {left:.0f} s are left")
            continue
        print(f"== {item.name}", flush=True)
        add_record(out, begins=item.name, limit=3 * item.seconds + 30)
        measure_item(item, setup, out)
        write_report(out, read_records(out), names)


def measure_item(item, setup, out):
    """Runs an item and records its rows, or the error."""
    setup.notes = []
    began = time.time()
    record = {"item": item.name, "on": machine(setup.device)}
    try:
        record["rows"] = item.run(setup)
    except Exception as error:
        traceback.print_exc()
        record["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
        setup.lost = is_fatal(error)
    record |= {"notes": setup.notes, "seconds": time.time() - began}
    add_record(out, **record)
    if setup.lost:
        raise SystemExit(3)
    torch.compiler.reset()
    free_memory(setup)
