"""
Training runs: exact resume, accumulation, log, evaluation, files, and what is refused.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from PIL import Image

import attg_mae
import eval_knn
from attg import pretraining, trainer
from attg.checkpoint import check_resume, read_run
from attg.cli import resume_class
from attg.datasets import open_data
from attg.distributed import STOP_SIGNALS
from attg.images import generator_for
from attg.log import RENAMED_SETTINGS, describe_machine, print_table, read_log
from attg.maps import save_maps
from tests.helpers import (
    LUMA,
    TINY,
    after_step,
    assert_same_run,
    content,
    correlation,
    last,
    losses,
    make_data,
    make_images,
    make_maps,
    records,
    refused,
    same,
    stop_after,
    train,
)

CFG = attg_mae.Config()


# -- Exact resume ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, step, number",
    [("bf16", 8, signal.SIGUSR1), ("fp16", 12, signal.SIGINT)],
    ids=["mid-epoch", "epoch end"],
)
def test_stopped_and_resumed_equals_uninterrupted(
    precision, step, number, labelled, whole, tmp_path, capsys
):
    options = {"accum": 2, "clip_grad": 1.0, "eval_every": 1}
    settings = labelled | {"precision": precision} | options
    reference = whole(**settings)
    handlers = [signal.getsignal(n) for n in STOP_SIGNALS]
    with stop_after(step, number):
        result = train(tmp_path, **settings)
    assert (result["step"], result["stopped"], result["knn"]) == (step, number, {})
    assert last(tmp_path)["step"] == step
    assert not same(last(tmp_path)["model"], last(reference)["model"])
    result = train(tmp_path, **settings)
    assert (result["step"], result["stopped"]) == (24, None)
    output = capsys.readouterr().out
    assert f"stopped by a signal after step {step}" in output
    assert f"resuming {tmp_path / 'last.pt'} after step {step}\n" in output
    assert_same_run(tmp_path, reference)
    assert records(tmp_path, "knn") == records(reference, "knn")
    assert result["knn"] == records(reference, "knn")[-1]["knn"]
    assert bool(last(tmp_path)["scaler"]) == (precision == "fp16")
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == handlers
    # Autocast does something, and not too much.
    a, b = losses(whole())[-1][2], losses(tmp_path)[-1][2]
    assert a != b and abs(a - b) < 0.05 * a


def test_workers_and_the_frequency_of_the_log_change_nothing(labelled, whole, tmp_path):
    """Log lines hold means since the line before; a stop does not wait for the next."""
    settings = labelled | {"workers": 2, "log_every": 4}
    with stop_after(9, signal.SIGHUP):
        assert train(tmp_path, **settings)["stopped"] == signal.SIGHUP
    train(tmp_path, **settings)
    rows, single = records(tmp_path), records(whole())
    ends = [r["step"] for r in rows]
    assert ends == [4, 6, 8, 9, 12, 16, 18, 20, 24]
    for row, start, end in zip(rows, [0, *ends], ends, strict=False):
        for key in ("loss", "mse", "grad_norm"):
            mean = np.mean([r[key] for r in single[start:end]])
            assert row[key] == pytest.approx(mean, rel=1e-6)
    assert same(last(tmp_path)["model"], last(whole())["model"])
    assert losses(whole(seed=1)) != losses(whole())


def test_checkpoints_of_a_killed_run_and_along_the_way(labelled, whole, tmp_path):
    """save_every and keep_ckpt_every; log lines after the checkpoint are dropped."""

    def crash():
        raise ConnectionError

    out, settings = tmp_path / "out", labelled | {"save_every": 3, "keep_ckpt_every": 2}
    settings["eval_every"] = 3
    with after_step(20, crash), pytest.raises(ConnectionError):
        train(out, **settings)
    assert last(out)["step"] == 18 and len(records(out)) == 19
    assert [r["step"] for r in records(out, "knn")] == [18]
    result = train(out, **settings)
    changed = [k for k, v in last(out)["config"].items() if v != settings.get(k, v)]
    assert changed == [] and losses(out) == losses(whole())
    # The evaluation after step 18 comes again, and is in the log once.
    assert [r["step"] for r in records(out, "knn")] == [18, 24]
    assert same(last(out)["model"], last(whole())["model"])
    # The same command after the end trains nothing, and logs nothing twice.
    log, parts = (out / "log.jsonl").read_text(), last(out)
    assert train(out, **settings) == result
    assert (out / "log.jsonl").read_text() == log and same(last(out), parts)

    assert sorted(p.name for p in out.glob("epoch*")) == [
        "epoch0002.pt",
        "epoch0004.pt",
    ]
    train(tmp_path / "on", **labelled, resume=str(out / "epoch0002.pt"))
    assert losses(tmp_path / "on") == losses(whole())[12:]
    assert same(last(tmp_path / "on")["model"], last(whole())["model"])


def test_accumulation_breaks_the_same_ties(labelled, passes, tmp_path):
    """On two-valued maps ties decide which patches have weight 0, in the global batch."""
    halves = np.zeros((25, 4, 4))
    halves[:, 2:] = 1
    save_maps(tmp_path / "halves.npy", halves, open_data(labelled["data"]), "halves")
    settings = labelled | {"maps": str(tmp_path / "halves.npy"), "epochs": 1}
    dropped = []
    for accum in (1, 4):
        train(tmp_path / str(accum), **settings, guidance="foreground", accum=accum)
        dropped.append(torch.cat([seen.weight for seen in passes]) == 0)
        hidden = torch.cat([seen.mask for seen in passes]).bool()
        passes.clear()
    assert dropped[0].equal(dropped[1]) and (dropped[0].sum(1) == 2).all()
    # Each image in each step has ties of its own.
    assert len(dropped[0]) == 24 and len(dropped[0].unique(dim=0)) > 12
    # The mask noise as ties would drop visible patches only.
    assert 0.1 < dropped[1][hidden].float().mean() < 0.15


# -- Defaults --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, width, expected",
    [
        (10_000, 128, (8, 64, 6e-3)),  # toy
        (402, 128, (199, 64, 6e-3)),
        (60, 128, (800, 8, 6e-3)),
        (1, 128, (800, 1, 6e-3)),
        (99_999, 768, (8, 64, 1e-3)),
        (100_000, 768, (800, 4096, 1.5e-4)),  # MAE's
        (1_281_167, 128, (800, 4096, 1.5e-4)),
    ],
)
def test_defaults_follow_the_number_of_images(images, width, expected):
    cfg = attg_mae.Config(data="x", width=width, img_size=32)
    cfg = attg_mae.resolve(cfg, SimpleNamespace(num_images=images))
    assert (cfg.epochs, cfg.batch_size, cfg.blr) == pytest.approx(expected)


def test_the_smallest_model_fits_the_images(tmp_path):
    """Never 32 pixels for larger images, unless that was chosen."""
    for name, size in {"small": (48, 80), "large": (70, 64)}.items():
        make_images(tmp_path / name, 5, size=size)
    shapes = {}
    for name, given in (("small", {}), ("large", {}), ("large", {"img_size": 32})):
        cfg = attg_mae.Config(data=str(tmp_path / name), **given)
        cfg = attg_mae.resolve(cfg, open_data(cfg.data))
        shapes[name, *given] = cfg.size, cfg.patch_size
    assert list(shapes.values()) == [((32, 32), 4), ((64, 64), 8), ((32, 32), 4)]
    cfg = attg_mae.Config(data=str(tmp_path / "large"))
    cfg.img_size, cfg.patch_size = 96, 16
    assert attg_mae.resolve(cfg, open_data(cfg.data)).grid == (6, 6)
    small = {"guidance": "none", "batch_size": 5, "img_size": None, "patch_size": None}
    out = tmp_path / "out"
    for _ in range(2):  # resumes
        train(out, **small, data=str(tmp_path / "large"), epochs=1)
    assert last(out)["config"]["img_size"] == 64
    sheet = Image.open(out / "reconstructions.png")
    assert min(sheet.size) > 128


def test_max_steps(labelled, tmp_path, capsys):
    """A complete run of so many steps, whose schedules end there."""
    settings = labelled | {"max_steps": 8, "warmup_epochs": None}
    assert train(tmp_path, **settings)["step"] == 8
    warmup = 0.05 * 8
    rates = [attg_mae.lr_at(step, 8, warmup, 1e-3) for step in range(8)]
    assert [r["lr"] for r in records(tmp_path)] == pytest.approx(rates, rel=1e-3)
    assert (tmp_path / "encoder.pt").exists() and records(tmp_path, "knn")
    printed = capsys.readouterr().out
    assert "stopped after 8 steps" in printed and "nothing left" not in printed
    train(tmp_path, **settings)
    assert "nothing left to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max_steps 8 -> 9"):
        train(tmp_path, **settings | {"max_steps": 9})
    # The last step is logged, and checked, however seldom the others are.
    train(tmp_path / "seldom", **settings, log_every=5)
    assert [r["step"] for r in records(tmp_path / "seldom")] == [5, 6, 8]


# -- Log -------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["attg", "none"])
def test_log(guidance, guided, tmp_path, capsys):
    """A record and a line for each step; config.json is the checkpoint's config."""
    # A stop signal in the last step changes nothing.
    with stop_after(12):
        result = train(tmp_path, **guided(guidance), epochs=2)
    assert (result["step"], result["stopped"]) == (12, None)
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if re.match("step .* loss", line)]
    rows, cfg = records(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert {"torch", "torchvision", "Pillow"} == set(cfg.pop("versions"))
    assert cfg == json.loads(json.dumps(last(tmp_path)["config"]))
    assert cfg["guidance"] == guidance and len(lines) == len(rows) == 12
    forms = {"loss": ".4f", "mse": ".4f", "lr": ".2e", "tau": ".3f"}
    for step, (row, line) in enumerate(zip(rows, lines, strict=True)):
        tau = 1.0 - 0.25 * (1 + math.cos(math.pi * step / 12)) / 2
        assert row["tau"] == pytest.approx(tau, rel=1e-6)
        assert row["lr"] == attg_mae.lr_at(step, 12, 6.0, 1e-3)
        assert (row["step"], row["epoch"]) == (step + 1, (step + 1) / 6)
        # Without weights, loss and mse are one.
        assert (row["loss"] == row["mse"]) == (guidance == "none")
        assert row["img_s"] > 0 and 0 <= row["data_wait"] <= 1
        assert row["skipped"] == row["unreadable"] == 0
        shown = dict(re.findall(r"(step|loss|mse|lr|tau|data|ETA) +(\S+)", line))
        for key, form in forms.items():
            assert shown[key] == format(row[key], form)
        assert "img/s" in line and re.match(r"\d+:\d\d:\d\d", shown["ETA"])


def test_header(guided, tmp_path, capsys):
    """tau with its schedule, where the use of the map has one; where the metrics are."""
    for guidance, schedule, shown in (
        ("inverted", "cosine", "tau 0.75 to 1.0 (cosine)"),
        ("attg", "constant", "tau 0.75 (constant)"),
        ("input_masking", "cosine", None),
        ("none", "cosine", None),
    ):
        settings = guided(guidance) | {"tau_schedule": schedule, "max_steps": 1}
        train(tmp_path / guidance, **settings)
        header = capsys.readouterr().out.partition("\nstep")[0]
        assert shown in header if shown else "tau" not in header
        assert "lr 1.00e-03" in header and "cosine" in header and "log.jsonl" in header
        assert "below 100,000 images: batch size 64" in header


def test_hooks(labelled, tmp_path, monkeypatch):
    """on_log gets the records of log.jsonl; --tensorboard writes their numbers."""
    seen, module = [], MagicMock()
    settings = TINY | labelled | {"out": str(tmp_path), "max_steps": 2}
    cfg = attg_mae.Config(**settings, tensorboard=True)
    monkeypatch.setattr(pretraining, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="--tensorboard: .* pip install tensorboard"):
        attg_mae.train(cfg)
    assert not (tmp_path / "last.pt").exists()
    monkeypatch.setattr(pretraining, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    attg_mae.train(cfg, on_log=seen.append)
    assert seen == records(tmp_path, "step") and len(seen) == 3
    module.SummaryWriter.assert_called_once_with(tmp_path, purge_step=1)
    writer = module.SummaryWriter.return_value
    writer.add_scalar.assert_any_call("loss", seen[1]["loss"], 2)
    writer.add_scalar.assert_any_call("patch_mean", seen[2]["knn"]["patch_mean"], 2)
    assert writer.method_calls[-1] == call.flush()


def test_busy_machines_are_named(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for load, named in ((os.cpu_count() + 0.5, True), (0.5, False)):
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))  # noqa: B023
        text = describe_machine(torch.device("cpu"), {"torch": "2.9"})
        assert ("OMP_NUM_THREADS=1" in text) == named and "threads" in text


def test_names_that_are_no_utf8_are_printed(capsys):
    print_table([{"in": "\udcff"}])  # capsys is as strict as a terminal
    assert capsys.readouterr().out == "in\n\\udcff\n"


def test_older_and_damaged_logs(tmp_path):
    """Records have today's names; lines that are none are left out."""
    path, good = tmp_path / "log.jsonl", b'{"step": 3, "mse_test": 0.5}\n'
    bad = [b"\n", b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b"[" * 10**5 + b"\n"]
    path.write_bytes(good + b"".join(bad) + b'{"step": 4, "loss": 1}\n{"step": 5')
    assert read_log(path) == [{"step": 3, "val_mse": 0.5}, {"step": 4, "loss": 1}]
    names = {field.name for field in dataclasses.fields(attg_mae.Config)}
    assert not names & set(RENAMED_SETTINGS)


def test_knn_in_the_run(labelled, plain, tmp_path, monkeypatch):
    """Every eval_every epochs and at the end, where it is that of the encoder's file."""
    settings = {"epochs": 5, "eval_every": 2, "guidance": "none"}
    settings |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}
    # A test image in the folder of another class tells the splits apart.
    folder = Path(shutil.copytree(labelled["data"], tmp_path / "data"))
    odd = sorted(Path(folder, "test", "r").iterdir())[0]
    odd.rename(folder / "test" / "g" / f"odd{odd.suffix}")
    result = train(tmp_path, data=str(folder), **settings)
    rows = records(tmp_path, "knn")
    assert [r["step"] for r in rows] == [12, 24, 30]
    assert rows[-1]["knn"] == result["knn"]
    flags = [str(tmp_path / "encoder.pt"), "--device", "cpu", "--batch_size", "4"]
    want = {row["feature"]: row["top-1"] for row in eval_knn.main(flags)}
    assert result["knn"] == pytest.approx(want, abs=1e-4)
    assert 50 < want["patch_mean"] < 100  # the classes are colors

    def fails(*_, **__):
        raise ValueError("no k-NN today")

    # Whatever happens to the k-NN, hours of training are in a file.
    monkeypatch.setattr(trainer, "knn_accuracy", fails)
    with pytest.raises(ValueError, match="no k-NN"):
        train(tmp_path / "out", **labelled, epochs=1)
    attg_mae.load_encoder(tmp_path / "out" / "encoder.pt")
    result = train(tmp_path / "plain", data=plain, guidance="none", epochs=1)
    assert (result["knn"], result["val_mse"], result["step"]) == ({}, None, 3)
    with pytest.raises(ValueError, match="--eval_every 1: --data .* no test split"):
        train(tmp_path / "other", data=plain, guidance="none", eval_every=1)


def test_val_mse(labelled, tmp_path, monkeypatch):
    """Eq. 2 without weights, with the same masks each time; also without labels."""
    settings = labelled | {"epochs": 2, "eval_every": 1, "lr": 0.0}
    result = train(tmp_path / "still", **settings)
    still = [r["val_mse"] for r in records(tmp_path / "still", "val_mse")]
    # Without learning, only other masks could tell the evaluations apart.
    assert still == [result["val_mse"]] * 2

    def unlabeled(*args, **options):
        return dataclasses.replace(open_data(*args, **options), known_classes=0)

    monkeypatch.setattr(trainer, "open_data", unlabeled)
    result = train(tmp_path / "out", **settings | {"lr": 1e-3, "workers": 2})
    rows = records(tmp_path / "out", "val_mse")
    assert [r["step"] for r in rows] == [6, 12] and result["knn"] == {}
    assert rows[-1]["val_mse"] == result["val_mse"] < still[0]
    parts = last(tmp_path / "out")
    model = attg_mae.build_model(attg_mae.Config(**parts["config"]))
    model.load_state_dict(parts["model"])
    dataset = open_data(labelled["data"], "test", 16)
    noise = torch.rand(15, 16, generator=generator_for("test masks"))
    imgs = model.normalize(torch.stack([sample.image for sample in dataset]))
    with torch.no_grad():
        _, pred, _ = model(imgs, noise=noise)
    patches = model.patchify(imgs)
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    error = (pred - (patches - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
    # The twelve patches of highest noise are hidden.
    hidden = error.gather(1, noise.argsort()[:, 4:]).mean().item()
    assert result["val_mse"] == pytest.approx(hidden, rel=1e-5)
    assert result["val_mse"] != pytest.approx(error.mean().item(), rel=1e-3)


def test_guidance_of_a_run(guided, passes, tmp_path):
    """The maps are the brightness of the images, so they must fit what the model sees."""
    runs, curves = {}, set()
    for guidance in attg_mae.GUIDANCE:
        train(
            tmp_path / guidance, **guided(guidance), epochs=1, tau_schedule="constant"
        )
        curves.add(tuple(row[2] for row in losses(tmp_path / guidance)))
        runs[guidance], passes[:] = list(passes), []
    assert len(curves) == len(attg_mae.GUIDANCE)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CFG.mean, CFG.std))
    for step, vanilla in enumerate(runs["none"]):
        for name, run in runs.items():
            assert run[step].imgs.equal(vanilla.imgs)
            assert run[step].mask.equal(vanilla.mask) == (name != "input_masking")
        m = CFG.tau * runs["attg"][step].weight.log()
        luma = ((vanilla.imgs * std + mean) * torch.tensor(LUMA).view(3, 1, 1)).sum(1)
        luma = attg_mae.patchify(luma[:, None], 4).mean(2)
        assert (correlation(m, luma) > 0.95).all()
        assert (correlation(m, luma.roll(1, 0)) < 0.95).all()


# -- --init, sizes, wrong settings ------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "encoder.pt"])
def test_init(name, whole, labelled, tmp_path, capsys):
    """From a checkpoint, or an encoder with a new decoder; lr 0 keeps what it starts with."""
    settings = labelled | {"seed": 1, "lr": 0.0, "epochs": 1}
    other = {"mean": (0.5,) * 3, "norm_pix": False}
    train(tmp_path / "out", **settings, init=str(whole() / name), **other)
    told = "; trained with norm_pix True; trained with --mean 0.485 0.456 0.406\n"
    assert told in capsys.readouterr().out
    train(tmp_path / "fresh", **settings)
    folders = (whole(), tmp_path / "fresh", tmp_path / "out")
    given, fresh, ours = (last(out)["model"] for out in folders)
    for key in ours:
        decoder = "decoder" in key or key == "mask_token"
        expected = fresh if decoder and name == "encoder.pt" else given
        assert same(ours[key], expected[key])
    assert not same(fresh, given) and records(tmp_path / "out")[0]["step"] == 1
    settings |= {"init": str(whole() / name), "decoder_heads": 4}
    refused = pytest.raises(ValueError, match="last.pt .*use --decoder_heads 2")
    # encoder.pt has no decoder.
    with refused if name == "last.pt" else contextlib.nullcontext():
        train(tmp_path / "other", **settings)


def test_gray_and_oblong_images(plain, passes, tmp_path):
    """--in_chans 1, --img_size H W; mean and std go to the encoder's file."""
    argv = [f"--{k}={v}" for k, v in TINY.items() if k not in ("img_size", "epochs")]
    argv += "--guidance none --epochs 1 --img_size 16 24 --in_chans 1".split()
    argv += f"--mean 0.5 --std 0.25 --data {plain} --out {tmp_path / 'out'}".split()
    attg_mae.main(argv)
    assert passes[0].imgs.shape == (4, 1, 16, 24)
    assert passes[0].imgs.min() >= -2 and passes[0].imgs.max() <= 2
    cfg = attg_mae.load_encoder(tmp_path / "out" / "encoder.pt").cfg
    assert (cfg.size, cfg.mean, cfg.std) == ((16, 24), (0.5,), (0.25,))
    # The same command finds its own checkpoint.
    assert attg_mae.main(argv)["step"] == 3 and len(passes) == 3


WRONG = [  # settings, what the error names
    ({"img_size": 18}, "--img_size 18 --patch_size 4 multiple"),
    ({"heads": 3}, "--heads 3 --width 32"),
    ({"lr": 1e-3, "blr": 1e-3}, "--lr 0.001 --blr 0.001 one"),
    ({"in_chans": 4, "mean": (0.5,) * 4, "std": (1.0,) * 4}, "--in_chans 4 gray"),
    ({"mean": (0.5,)}, "--mean 0.5 --in_chans 3"),
    ({"mean": (123.7, 116.3, 103.5)}, "--mean 123.7 from 0 to 1"),  # of 0 to 255
    ({"std": (58.4, 57.1, 57.4)}, "--std 58.4 to 1"),
    ({"guidance": "none"}, "--maps --guidance none"),
    ({"batch_size": 6, "accum": 4}, "--batch_size 6 --accum 4 multiple"),
    ({"device": "cuda"}, "--device cuda cpu"),
    ({"maps": None}, "--data object_discovery.py --guidance none --maps"),
    ({"init": "/absent.pt"}, "/absent.pt no file"),
]


@pytest.mark.parametrize("settings, words", WRONG, ids=[words for _, words in WRONG])
def test_wrong_settings(settings, words, labelled, tmp_path, monkeypatch):
    """ValueError with flag, value and remedy, before anything is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(words):
        train(tmp_path / "out", **labelled | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bf16", [True, False])
def test_precision_auto(bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: bf16)
    for device, name in ((None, "bf16" if bf16 else "fp16"), ("cpu", "fp32")):
        assert attg_mae.resolve(attg_mae.Config(device=device)).precision == name


# -- Resuming with other settings ------------------------------------------------------

DATA = ("data", "classes", "maps")  # these are compared by their content
OTHER = {"img_size": 32, "patch_size": 8, "in_chans": 1, "width": 16, "depth": 2}
OTHER |= {"heads": 4, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}
OTHER |= {"batch_size": 5, "seed": 1, "white": 255}


def test_resume_class_decides_what_may_change(copy):
    """Every setting, in the middle and at the end of a run."""
    out, settings = copy
    cfg = attg_mae.resolve(attg_mae.Config(**TINY | settings))
    checkpoint = read_run(out / "last.pt")
    checkpoint["config"]["out"] = cfg.out
    fixed, free = (resume_class(attg_mae.Config, name) for name in ("fixed", "free"))
    assert fixed == {*OTHER, *DATA[:2]} and "lr" not in free | fixed
    initial = {"init", "weights_key", "weights_prefix"}
    fixed, free = fixed - set(DATA) | initial, free | set(DATA)
    assert {"workers", "log_every", "precision"} <= free
    assert check_resume(cfg, checkpoint, 12) == []
    for field in dataclasses.fields(cfg):
        if field.name in ("epochs", "max_steps"):
            continue
        old = getattr(cfg, field.name)
        other = dataclasses.replace(cfg)
        setattr(other, field.name, OTHER.get(field.name, f"not {old}"))
        for ended in (False, True):
            args = (other, checkpoint, 6 if ended else 12)
            if field.name in fixed or (ended and field.name not in free):
                message = rf"last.pt.*--{field.name} .*-> .*--resume none"
                with pytest.raises(ValueError, match=message):
                    check_resume(*args)
            else:
                (change,) = check_resume(*args)
                assert change.startswith(f"--{field.name} ") and "-> " in change
    # A named checkpoint replaces the weights of --init, which may be left out.
    other = dataclasses.replace(cfg, resume="x", init="a.pt")
    with pytest.raises(ValueError, match="--init None -> a.pt"):
        check_resume(other, checkpoint, 12)
    other.init, checkpoint["config"]["init"] = None, "a.pt"
    assert check_resume(other, checkpoint, 12)[0] == "--init a.pt -> None"


def test_changed_settings_are_named_and_used(copy, capsys):
    out, settings = copy
    before = last(out)["config"]
    change = {"lr": 5e-4, "weight_decay": 0.3, "precision": "fp16", "tau_end": 2.0}
    change |= {"accum": 2, "clip_grad": 0.1, "guidance": "inverted"}
    train(**settings | change)
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if "resuming" in line)
    for key, value in change.items():
        assert f"--{key} {before[key]} -> {value}" in line
    assert "--width" not in line
    after, rows = last(out), records(out)
    assert {k: after["config"][k] for k in change} == change
    assert [r["step"] for r in rows] == [*range(1, 13)]
    lr = [attg_mae.lr_at(step, 12, 6.0, 5e-4) for step in range(6, 12)]
    assert [r["lr"] for r in rows[6:]] == lr and rows[-1]["tau"] > 1.5
    decays = [group["weight_decay"] for group in after["optimizer"]["param_groups"]]
    assert decays == [0.3, 0.0] and after["scaler"]


def test_other_epochs(copy, tmp_path):
    """Refused in the run's folder; --resume continues with the schedule of the new ones."""
    out, settings = copy
    path, content = out / "last.pt", (out / "last.pt").read_bytes()
    for epochs in (3, 1):
        message = f"{path} is of another run: --epochs 2 -> {epochs};.*--resume {path}$"
        with pytest.raises(ValueError, match=message):
            train(**settings | {"epochs": epochs})
    assert path.read_bytes() == content
    more = settings | {"epochs": 3, "resume": str(path), "out": str(tmp_path / "more")}
    assert train(**more)["step"] == 18
    lr = [attg_mae.lr_at(step, 18, 6.0, 1e-3) for step in range(6, 18)]
    assert [r["lr"] for r in records(tmp_path / "more")] == lr
    # Or the result of two epochs would pass for that of one.
    train(**settings)
    with pytest.raises(ValueError, match="last.pt has ended: --epochs 2 -> 1"):
        train(**settings | {"epochs": 1, "resume": str(path)})


# -- Other data and lost checkpoints ---------------------------------------------------


def test_data_may_move(tmp_path, monkeypatch):
    """Images and maps are compared, not their paths."""
    (tmp_path / "a").mkdir()
    settings = make_data(tmp_path / "a") | {"epochs": 2}
    train(tmp_path / "whole", **settings)
    with stop_after(8):
        train(tmp_path / "out", **settings)
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    moved = settings | {"data": "b/data", "maps": "b/maps.npy"}
    assert train(tmp_path / "out", **moved)["step"] == 12
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    train(tmp_path / "out", **moved)


@pytest.mark.parametrize("change", ["replaced", "added", "maps"])
def test_a_run_never_continues_on_other_data(change, tmp_path, capsys):
    settings = make_data(tmp_path) | {"epochs": 2}
    if change != "maps":
        settings |= {"maps": None, "guidance": "none"}
    out, folder = tmp_path / "out", Path(settings["data"], "train", "r")
    with stop_after(7):
        train(out, **settings)
    files = content(out)
    if change == "maps":
        make_maps(settings["maps"], settings["data"], flat=True)
    else:
        name = "003.png" if change == "replaced" else "new.png"
        shutil.copy(folder / "004.png", folder / name)
    flag = "maps" if change == "maps" else "data"
    message = f"last.pt was trained on other data .--{flag} .*--resume none"
    with pytest.raises(ValueError, match=message):
        train(out, **settings)
    assert content(out) == files
    assert train(out, **settings, resume="none")["step"] == 12
    # encoder.pt never stands for a run that has not finished.
    assert torch.load(out / "encoder.pt")["config"]["seed"] == 0
    train(out, **settings)
    (out / "epoch0002.pt").touch()  # of --keep_ckpt_every
    capsys.readouterr()
    with stop_after(7):
        train(out, **settings, seed=1, resume="none")
    assert "epoch0002.pt is of an earlier run" in capsys.readouterr().out
    assert not (out / "encoder.pt").exists()


def test_a_lost_checkpoint(copy, whole):
    """The latest complete temporary file replaces it; without one, the run is kept."""
    out, settings = copy
    saved = (out / "last.pt").read_bytes()
    older = whole() / "encoder.pt"
    (out / "last.pt").write_bytes(saved[:-1000])
    for resume in ("auto", str(out / "last.pt")):
        with pytest.raises(ValueError, match="last.pt: damaged"):
            train(**settings, resume=resume)
    (out / "last.pt").unlink()
    files = content(out)
    with pytest.raises(ValueError, match="last.pt is missing.*--resume none"):
        train(**settings)
    assert content(out) == files
    shutil.copy(older, out / "last.pt.1.tmp")
    (out / "last.pt.2.tmp").write_bytes(saved)
    (out / "last.pt.3.tmp").write_bytes(saved[:-1000])
    assert train(**settings)["step"] == 12
    assert [r["step"] for r in records(out)] == [*range(1, 13)]
    assert not list(out.glob("*.tmp"))
    (out / "last.pt").unlink()
    assert train(**settings, resume="none")["step"] == 12
