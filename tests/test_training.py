"""
A run: continued, logged, evaluated, refused, and what it leaves behind.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import attg_mae
from attg import figures, trainer
from attg.datasets import open_data
from attg.loader import ResumableBatchSampler, make_loader
from attg.maps import save_maps
from attg.seeding import generator_for
from tests.helpers import (
    LUMA,
    TINY,
    after_step,
    assert_same_run,
    last,
    losses,
    make_data,
    make_maps,
    records,
    same,
    train,
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "step, number",
    [(8, signal.SIGTERM), (12, signal.SIGINT)],
    ids=["mid-epoch", "epoch end"],
)
def test_stopped_and_continued_equals_uninterrupted(
    precision, step, number, labelled, whole, tmp_path, capsys
):
    settings = labelled | {"precision": precision, "accum": 2, "clip_grad": 1.0}
    reference = whole(**settings)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with after_step(step, lambda: os.kill(os.getpid(), number)):
        result = train(tmp_path, **settings)
    assert (result["step"], result["stopped"], result["knn"]) == (step, number, {})
    assert last(tmp_path)["step"] == step
    assert f"stopped by a signal after step {step}" in capsys.readouterr().out
    assert not same(last(tmp_path)["model"], last(reference)["model"])
    result = train(tmp_path, **settings)
    assert (result["step"], result["stopped"]) == (24, None)
    assert "resuming" in capsys.readouterr().out
    assert_same_run(tmp_path, reference)
    ours, theirs = (
        torch.load(out / "encoder.pt", weights_only=True)["model"]
        for out in (tmp_path, reference)
    )
    assert same(ours, theirs) and result["knn"] == records(reference, "knn")[-1]["knn"]
    assert bool(last(tmp_path)["scaler"]) == (precision == "fp16")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_stop_does_not_wait_for_the_log_line(labelled, whole, tmp_path):
    with after_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train(tmp_path, **labelled, log_every=20)["step"] == 8
    assert [r["step"] for r in records(tmp_path)] == [6, 8]
    assert last(tmp_path)["step"] == 8
    train(tmp_path, **labelled, log_every=20)
    assert [r["step"] for r in records(tmp_path)] == [6, 8, 12, 18, 20, 24]
    assert same(last(tmp_path)["model"], last(whole())["model"])


def test_precisions_differ(whole):
    """Or the tests above would not show anything of autocast."""
    options = {"accum": 2, "clip_grad": 1.0}
    a, b, c = (
        losses(whole(precision=p, **options))[-1][2] for p in ("fp32", "bf16", "fp16")
    )
    assert len({a, b, c}) == 3 and abs(a - b) < 0.02 * a and abs(a - c) < 0.02 * a


def test_workers_and_repetition_change_nothing(whole, labelled, tmp_path):
    for workers in (0, 2):
        train(tmp_path / str(workers), **labelled, workers=workers)
        assert losses(tmp_path / str(workers)) == losses(whole())
        assert same(last(tmp_path / str(workers))["model"], last(whole())["model"])
    assert losses(whole(seed=1)) != losses(whole())


@pytest.mark.parametrize("guidance", ["attg", "none"])
def test_accumulation_changes_nothing(guidance, guided, tmp_path):
    """Gradients of the first step, losses of 24 steps; a zero and a row-shifted
    gradient would be noticed.
    """
    rows, grads, steps = [], [], []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: steps.append(
            [p.grad.clone() for g in optimizer.param_groups for p in g["params"]]
        )
    )
    for accum in (1, 2, 4):
        steps.clear()
        train(tmp_path / str(accum), **guided(guidance), accum=accum)
        grads.append(steps[0])
        rows.append(np.array([row[2:4] for row in losses(tmp_path / str(accum))]))
    hook.remove()
    for i in (1, 2):
        np.testing.assert_allclose(rows[i], rows[0], rtol=1e-5)
        assert not np.isclose(rows[i][1:], rows[0][:-1], rtol=1e-5).any()
        for grad, ref in zip(grads[i], grads[0], strict=True):
            # Qkv: the key's is 0
            if grad.dim() == 1 and len(grad) in (
                3 * TINY["width"],
                3 * TINY["decoder_width"],
            ):
                grad, ref = (x.view(3, -1)[::2] for x in (grad, ref))
            assert (grad - ref).norm() <= 1e-5 * ref.norm()
            assert (ref.roll(1, 0) - ref).norm() > 1e-5 * ref.norm() > 0 or len(
                ref
            ) == 1


class Memory:
    """Room for so many pictures at a time, in forward passes that learn."""

    def __init__(self, monkeypatch, room):
        self.room, self.refused, forward = room, [], attg_mae.MAE.forward

        def limited(model, imgs, *args, **options):
            if torch.is_grad_enabled() and len(imgs) > self.room:
                self.refused.append(len(imgs))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return forward(model, imgs, *args, **options)

        monkeypatch.setattr(attg_mae.MAE, "forward", limited)


def test_accum_auto(labelled, tmp_path, monkeypatch, capsys):
    """Finds what fits before the first step, says so, and keeps it."""
    settings = labelled | {"batch_size": 12, "epochs": 3}
    train(tmp_path / "given", **settings, accum=4)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        memory = Memory(patch, room=4)
        with after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            train(tmp_path / "auto", **settings, accum="auto")
        words = capsys.readouterr().out
        # 12, 6, 3: the batch is 12
        assert memory.refused == [12, 6] and "--accum auto: 4, 3 images at" in words
        assert "12 = 3 x 1 (processes) x 4 (--accum)" in words
        assert last(tmp_path / "auto")["config"]["accum"] == 4
        # It is stored: with more room now it stays.
        memory.room = 99
        train(tmp_path / "auto", **settings, accum="auto")
        assert "--accum auto" not in capsys.readouterr().out
    assert last(tmp_path / "auto")["config"]["accum"] == 4
    assert_same_run(tmp_path / "auto", tmp_path / "given")


def test_accum_auto_without_any_room(labelled, tmp_path, monkeypatch):
    settings = labelled | {"accum": "auto"}
    with monkeypatch.context() as patch:
        memory = Memory(patch, room=0)
        with pytest.raises(
            ValueError, match="--accum auto: not even 1 image .*--model"
        ):
            train(tmp_path / "out", **settings)
        assert memory.refused == [4, 2, 1] and not (tmp_path / "out").exists()

    def broken(*_, **__):
        raise RuntimeError("not for want of memory")

    monkeypatch.setattr(attg_mae.MAE, "forward", broken)
    with pytest.raises(RuntimeError, match="not for want"):
        train(tmp_path / "out", **settings)


def test_accum_is_auto_on_gpus_but_for_toy(monkeypatch):
    assert (
        attg_mae.resolve(attg_mae.Config(data="x")).accum
        == attg_mae.resolve(attg_mae.Config()).accum
        == 1
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert attg_mae.resolve(attg_mae.Config(data="x")).accum == "auto"
        assert (
            attg_mae.resolve(attg_mae.Config(data="x", device="cuda:1")).accum == "auto"
        )
        assert attg_mae.resolve(attg_mae.Config(data="x", device="cpu")).accum == 1
        assert attg_mae.resolve(attg_mae.Config(data="x", accum=2)).accum == 2
        assert attg_mae.resolve(attg_mae.Config()).accum == 1


def test_precision_auto(tmp_path, monkeypatch, labelled, capsys):
    """bf16 on CPUs that multiply in it, for wide models; a continued run keeps it."""
    for flags, has in (("avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)):
        (tmp_path / flags).write_text(f"processor: 0\nflags : fpu vme {flags} pni\n")
        assert trainer.cpu_has_bf16(tmp_path / flags) is has
    assert not trainer.cpu_has_bf16(tmp_path / "absent")
    cpu = torch.device("cpu")
    for has, width, name in (
        (True, 384, "bf16"),
        (True, 380, "fp32"),
        (False, 768, "fp32"),
    ):
        monkeypatch.setattr(trainer, "cpu_has_bf16", lambda has=has: has)
        assert trainer.fastest_precision(cpu, width) == name

    monkeypatch.setattr(trainer, "cpu_has_bf16", lambda: True)
    wide = labelled | {"width": 384, "heads": 6, "patch_size": 8, "epochs": 1}
    with after_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tmp_path / "out", **wide)
    assert last(tmp_path / "out")["config"]["precision"] == "bf16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["precision"] == "bf16"
    assert "--precision" not in capsys.readouterr().out  # it is no unusual setting
    monkeypatch.setattr(trainer, "cpu_has_bf16", lambda: False)
    train(tmp_path / "out", **wide)
    assert last(tmp_path / "out")["config"]["precision"] == "bf16"


def test_ties_do_not_depend_on_accumulation(labelled, passes, tmp_path):
    """Which patches of two-valued maps have weight 0, in the whole global batch."""
    dataset = open_data(labelled["data"])
    halves = np.zeros((25, 4, 4))
    halves[:, 2:] = 1
    save_maps(tmp_path / "halves.npy", halves, dataset, "halves")
    settings = labelled | {"maps": str(tmp_path / "halves.npy"), "epochs": 1}
    dropped = []
    for accum in (1, 2):
        train(tmp_path / str(accum), **settings, guidance="foreground", accum=accum)
        weight = torch.cat([seen.weight for seen in passes])
        dropped.append(weight == 0)
        passes.clear()
    assert dropped[0].equal(dropped[1]) and (dropped[0].sum(1) == 2).all()
    # Each picture and each step has its own.
    assert len(dropped[0].unique(dim=0)) > 12


def test_flat_maps_equal_vanilla(labelled, whole, tmp_path):
    flat = make_maps(tmp_path / "flat.npy", labelled["data"], flat=True)
    train(tmp_path / "out", **labelled | {"maps": flat})
    ours, vanilla = last(tmp_path / "out"), last(whole(guidance="none"))
    assert same(ours["model"], vanilla["model"])
    assert same(ours["optimizer"], vanilla["optimizer"])
    assert [row[2] for row in losses(tmp_path / "out")] == [
        row[2] for row in losses(whole(guidance="none"))
    ]
    assert not same(last(whole())["model"], vanilla["model"])


@pytest.mark.parametrize("guidance", ["attg", "none"])
def test_log(guidance, guided, passes, tmp_path, capsys):
    """A line for each step here; loss and mse are those of Eq. 2 with and without
    weights, in float64.
    """
    train(tmp_path, **guided(guidance), epochs=2)
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("step ") and "loss" in line
    ]
    rows, cfg = records(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert cfg == json.loads(json.dumps(last(tmp_path)["config"]))
    assert cfg["guidance"] == guidance
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert len(lines) == len(passes) == 12
    for step, (row, line, seen) in enumerate(zip(rows, lines, passes, strict=True)):
        patches = seen.model.patchify(seen.imgs).double()
        target = (patches - patches.mean(-1, keepdim=True)) / (
            patches.var(-1, keepdim=True) + 1e-6
        ).sqrt()
        error = seen.mask * (seen.pred.double() - target).square().mean(-1)
        tau = 1.0 - 0.25 * (1 + math.cos(math.pi * step / 12)) / 2
        weight = torch.ones(()) if guidance == "none" else seen.weight.double()
        expected = {
            "mse": error.sum() / seen.mask.sum(),
            "loss": (error * weight).sum() / seen.mask.sum(),
        }
        expected |= {
            "tau": tau,
            "lr": attg_mae.lr_at(step, 12, 6.0, 1e-3),
            "step": step + 1,
            "epoch": (step + 1) / 6,
        }
        assert {k: row[k] for k in expected} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-5
        )
        assert row["img_s"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert row["skipped"] == row["unreadable"] == 0
        shown = dict(re.findall(r"(step|loss|mse|lr|tau|data|ETA) +(\S+)", line))
        assert shown["loss"] == f"{row['loss']:.4f}"
        assert shown["mse"] == f"{row['mse']:.4f}"
        assert "img/s" in line
        assert shown["tau"] == f"{tau:.3f}"
        assert shown["data"].endswith("%")
        assert re.match(r"\d+:\d\d:\d\d", shown["ETA"])
    equal = [row["loss"] == row["mse"] for row in rows]
    assert all(equal) if guidance == "none" else not any(equal)


def test_log_every_and_means(labelled, whole, tmp_path):
    """A line every log_every steps and at the end of an epoch: means since the line
    before; weights are the same.
    """
    train(tmp_path, **labelled, log_every=4)
    rows, single = records(tmp_path), records(whole())
    ends = [r["step"] for r in rows]
    assert ends == [4, 6, 8, 12, 16, 18, 20, 24]
    for row, start, end in zip(rows, [0, *ends], ends, strict=False):
        for key in ("loss", "mse", "grad_norm"):
            assert row[key] == pytest.approx(
                np.mean([r[key] for r in single[start:end]]), rel=1e-6
            )
    assert same(last(tmp_path)["model"], last(whole())["model"])


def test_log_of_a_killed_run(labelled, whole, tmp_path):
    """Its lines after the checkpoint are removed, none is there twice; save_every keeps
    the time of checkpoints.
    """

    def crash():
        raise ConnectionError

    with after_step(11, crash), pytest.raises(ConnectionError):
        train(tmp_path, **labelled, save_every=1)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 11))
    assert last(tmp_path)["step"] == 6
    train(tmp_path, **labelled, save_every=1)
    assert_same_run(tmp_path, whole())
    with after_step(20, crash), pytest.raises(ConnectionError):
        train(tmp_path, **labelled, save_every=3, resume="none")
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 20))
    assert last(tmp_path)["step"] == 18


def test_keep_every(labelled, whole, tmp_path):
    """Checkpoints along the way, from which a run goes on to the same end."""
    out = tmp_path / "out"
    train(out, **labelled, keep_ckpt_every=2, save_every=3)
    kept = sorted(p.name for p in out.glob("epoch*"))
    assert kept == ["epoch0002.pt", "epoch0004.pt"]
    assert same(last(out)["model"], last(whole())["model"])
    parts = torch.load(out / "epoch0002.pt", weights_only=True)
    assert parts["step"] == 12 and not same(parts["model"], last(out)["model"])
    train(tmp_path / "on", **labelled, resume=str(out / "epoch0002.pt"))
    assert losses(tmp_path / "on") == losses(whole())[12:]
    assert same(last(tmp_path / "on")["model"], last(whole())["model"])
    assert not list(whole().glob("epoch*"))


def test_same_command_after_the_end(labelled, tmp_path):
    """Nothing is trained, and nothing is twice in the log."""
    result = train(tmp_path, **labelled, epochs=2, eval_every=1)
    log, parts = (tmp_path / "log.jsonl").read_text(), last(tmp_path)
    assert train(tmp_path, **labelled, epochs=2, eval_every=1) == result
    assert (tmp_path / "log.jsonl").read_text() == log and same(last(tmp_path), parts)


def test_knn_in_the_run(labelled, tmp_path):
    """Every eval_every epochs and at the end; the last one is that of the weights in the
    checkpoint.
    """
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    result = train(tmp_path, **labelled, epochs=5, eval_every=2, mean=mean, std=std)
    rows = records(tmp_path, "knn")
    assert [r["step"] for r in rows] == [12, 24, 30]
    assert rows[-1]["knn"] == result["knn"]
    model, features = attg_mae.load_encoder(tmp_path / "last.pt"), []
    for split in ("train", "test"):
        dataset = open_data(labelled["data"], split, 16)
        image, label = (
            torch.stack([torch.as_tensor(dataset[i][k]) for i in range(len(dataset))])
            for k in (0, 1)
        )
        imgs = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
            std
        ).view(3, 1, 1)
        with torch.no_grad():
            tokens = model.forward_features(imgs)
        features.append((tokens[:, 0], tokens[:, 1:].mean(1), label))
        for ours, theirs in zip(
            attg_mae.extract_features(model, make_loader(dataset, 4)),
            features[-1],
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (*banks, labels), (*queries, truth) = features
    for name, bank, x in zip(
        ("class_token", "patch_mean"), banks, queries, strict=True
    ):
        hits = attg_mae.knn_classify(bank, labels, x)[:, 0] == truth
        assert result["knn"][name] == pytest.approx(
            100 * hits.float().mean().item(), abs=1e-4
        )
        assert hits.any()
    assert result["knn"]["patch_mean"] > 50  # the classes are colours


@pytest.mark.parametrize("when", [11, 12, 13])
def test_knn_of_a_stopped_run(when, labelled, whole, tmp_path):
    """Its k-NN lines are those of the uninterrupted run."""
    with after_step(when, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tmp_path, **labelled, eval_every=1)
    train(tmp_path, **labelled, eval_every=1)
    assert records(tmp_path, "knn") == records(whole(eval_every=1), "knn")


def test_error_on_held_out_pictures(labelled, tmp_path, monkeypatch):
    """val_mse: the error of Eq. 2 without weights, with the same masks each time; also
    without labels.
    """

    def unlabelled(*args, **options):
        dataset = open_data(*args, **options)
        dataset.labelled = False
        return dataset

    settings = labelled | {"epochs": 3, "eval_every": 1, "lr": 0.0}
    result = train(tmp_path / "still", **settings)
    still = [r["val_mse"] for r in records(tmp_path / "still", "val_mse")]
    # Without learning there is nothing to tell the evaluations apart but the masks.
    assert len(still) == 3 and len(set(still)) == 1 and result["val_mse"] == still[0]

    monkeypatch.setattr(trainer, "open_data", unlabelled)
    result = train(tmp_path / "out", **settings | {"lr": 1e-3, "workers": 2})
    rows = records(tmp_path / "out", "val_mse")
    assert [r["step"] for r in rows] == [6, 12, 18] and result["knn"] == {}
    assert not records(tmp_path / "out", "knn")
    assert rows[-1]["val_mse"] == result["val_mse"] < still[0]
    parts = last(tmp_path / "out")
    model = attg_mae.build_model(attg_mae.Config(**parts["config"]))
    model.load_state_dict(parts["model"])
    dataset = open_data(labelled["data"], "test", 16)
    noise = torch.rand(15, 16, generator=generator_for("test masks"))
    errors, others = [], []
    for sample, row in zip(dataset, noise, strict=True):
        patches = model.patchify(model.normalize(sample.image[None])).detach()
        with torch.no_grad():
            pred = model(model.normalize(sample.image[None]), noise=row[None])[1]
        # The twelve of highest noise are hidden.
        hidden = row.argsort()[4:]
        target = patches[0] - patches[0].mean(1, keepdim=True)
        target = target / (patches[0].var(1, keepdim=True) + 1e-6).sqrt()
        error = (pred[0] - target).square().mean(1)
        errors.append(error[hidden].mean().item())
        others.append(error.mean().item())
    assert result["val_mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert result["val_mse"] != pytest.approx(np.mean(others), rel=1e-3)


def test_the_encoder_is_written_before_the_evaluation(labelled, tmp_path, monkeypatch):
    """Whatever happens to the k-NN, hours of training are in a file."""

    def fails(*_):
        raise ValueError("no k-NN today")

    monkeypatch.setattr(trainer, "knn_accuracy", fails)
    with pytest.raises(ValueError, match="no k-NN"):
        train(tmp_path, **labelled, epochs=1)
    assert attg_mae.load_encoder(tmp_path / "encoder.pt").cfg.width == TINY["width"]


def test_curves(labelled, tmp_path, monkeypatch, capsys):
    """Of the log, drawn where matplotlib is there; a continued run draws all of it."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(trainer, "save_curves", figures.save_curves)
    drawn = []

    class Spy(figure.Figure):
        def savefig(self, *args, **options):
            drawn.append(self)
            super().savefig(*args, **options)

    monkeypatch.setattr(figure, "Figure", Spy)
    settings = labelled | {"epochs": 2, "eval_every": 1}
    with after_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tmp_path / "out", **settings)
    train(tmp_path / "out", **settings)
    (figure,) = drawn
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert min(picture.size) > 400
    lines = {}
    for axes in figure.axes:
        for line in axes.lines:
            lines[line.get_label()] = np.array(line.get_xydata())
    rows, tests = records(tmp_path / "out"), records(tmp_path / "out", "knn")
    assert set(lines) == {
        *("loss", "mse", "val_mse", "lr", "tau", "class token", "patch mean")
    }
    for name in ("loss", "mse", "lr", "tau"):
        want = [(r["step"], r[name]) for r in rows]
        assert len(want) == 12 and (lines[name] == np.array(want)).all()
    want = [(r["step"], r["val_mse"]) for r in tests]
    assert len(want) == 2 and (lines["val_mse"] == np.array(want)).all()
    want = [(r["step"], r["knn"]["patch_mean"]) for r in tests]
    assert (lines["patch mean"] == np.array(want)).all()
    assert "matplotlib" not in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(tmp_path / "without", **labelled, epochs=1)
    words = capsys.readouterr().out
    assert words.count("curves.png is not drawn: pip install matplotlib, or see") == 1
    assert not (tmp_path / "without" / "curves.png").exists()


def test_no_knn_without_labels(plain, tmp_path):
    result = train(tmp_path, data=plain, guidance="none", epochs=1)
    assert result["knn"] == {} and not records(tmp_path, "knn") and result["step"] == 3


@pytest.mark.parametrize("map_norm", ["image", "crop"])
def test_guidance_of_a_run(map_norm, guided, passes, tmp_path):
    """An epoch of each. The maps are the brightness of the pictures, so they fit the
    images that the model sees.
    """
    runs = {}
    for guidance in attg_mae.GUIDANCE:
        train(
            tmp_path / guidance,
            **guided(guidance),
            map_norm=map_norm,
            epochs=1,
        )
        runs[guidance], passes[:] = list(passes), []
        assert all(
            map(math.isfinite, (r["loss"] for r in records(tmp_path / guidance)))
        )
    assert (
        len(
            {
                tuple(row[2] for row in losses(tmp_path / guidance))
                for guidance in attg_mae.GUIDANCE
            }
        )
        == 6
    )
    for step, vanilla in enumerate(runs["none"]):
        seen = {guidance: run[step] for guidance, run in runs.items()}
        assert len(runs["none"]) == 6
        assert all(x.imgs.equal(vanilla.imgs) for x in seen.values())
        assert all(
            x.mask.equal(vanilla.mask) for k, x in seen.items() if k != "input_masking"
        )
        assert vanilla.weight is None and seen["input_masking"].weight is None
        tau = attg_mae.tau_at(step, 6, attg_mae.Config())
        mean, std, grey = (
            torch.tensor(x).view(3, 1, 1)
            for x in (attg_mae.Config().mean, attg_mae.Config().std, LUMA)
        )
        luma = (
            ((vanilla.imgs * std + mean) * grey)
            .sum(1)
            .unfold(1, 4, 4)
            .unfold(2, 4, 4)
            .mean((3, 4))
            .flatten(1)
        )
        m = tau * seen["attg"].weight.log()
        for i in range(4):
            assert torch.corrcoef(torch.stack([m[i], luma[i]]))[0, 1] > 0.95
            assert torch.corrcoef(torch.stack([m[i], luma[i - 1]]))[0, 1] < 0.95
            hidden = seen["input_masking"].mask[i].bool()
            assert hidden.sum() == 12 and m[i][hidden].min() >= m[i][~hidden].max()
        if map_norm == "crop":
            assert m.amin(1).eq(0).all() and (m.amax(1) - 1).abs().max() < 1e-6
        else:
            assert m.min() > 0 and m.max() < 1 and m.amax(1).min() < 0.99
        torch.testing.assert_close(tau * seen["inverted"].weight.log(), 1 - m)
        for guidance, x in (("foreground", m), ("background", 1 - m)):
            low = x < x.quantile(0.1, dim=1, keepdim=True)
            weight = seen[guidance].weight
            assert (weight == 0).equal(low) and low.sum(1).eq(2).all()
            torch.testing.assert_close(tau * weight.log()[~low], x[~low])


def test_toy_brings_its_maps_and_has_the_pictures_alone(tmp_path, capsys):
    sizes = [f"--{k}={v}" for k, v in TINY.items() if k not in ("img_size", "epochs")]
    result = attg_mae.main([*sizes, "--out", str(tmp_path), "--epochs", "0"])
    assert result["step"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["reconstructions.png"]
    assert str(tmp_path / "reconstructions.png") in capsys.readouterr().out
    assert len(tiles(tmp_path, 32)) == 4


def test_encoder_goes_to_timm(whole):
    """Strictly, and with the same features; so do load_encoder of the export and of the
    checkpoint.
    """
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    exported = torch.load(whole() / "encoder.pt", weights_only=True)
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": TINY["width"],
        "depth": 1,
        "num_heads": 2,
        "num_classes": 0,
    }
    vit, imgs = timm_vit.VisionTransformer(**sizes).eval(), torch.randn(2, 3, 16, 16)
    vit.load_state_dict(exported["model"], strict=True)
    for name in ("encoder.pt", "last.pt"):
        model = attg_mae.load_encoder(whole() / name)
        assert not model.training
        assert model.cfg.mean == attg_mae.Config().mean
        assert model.cfg.heads == 2
        with torch.no_grad():
            ours, theirs = model.forward_features(imgs), vit.forward_features(imgs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (ours - theirs.roll(1, 1)).abs().max() > 0.1
    assert not same(
        exported["model"],
        {k: last(whole(seed=1))["model"][k] for k in exported["model"]},
    )


def tiles(out, size):
    """The sheet of pictures as columns of uint8 (rows, size, size, 3), enlarged ones
    reduced again.
    """
    sheet = np.asarray(Image.open(Path(out) / "reconstructions.png").convert("RGB"))

    def spans(filled):
        edges = np.flatnonzero(np.diff(np.r_[0, filled, 0].astype(int)))
        return [slice(*pair) for pair in edges.reshape(-1, 2)]

    rows = [r for r in spans((sheet != 255).any((1, 2))) if r.stop - r.start >= size]
    columns = spans((sheet[rows[0].start : rows[-1].stop] != 255).any((0, 2)))
    scale = (rows[0].stop - rows[0].start) // size
    assert {s.stop - s.start for s in (*rows, *columns)} == {scale * size}
    columns = [np.stack([sheet[r, c] for r in rows]) for c in columns]
    small = [c[:, scale // 2 :: scale, scale // 2 :: scale] for c in columns]
    assert all(
        (s.repeat(scale, 1).repeat(scale, 2) == c).all()
        for s, c in zip(small, columns, strict=True)
    )
    return small


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstructions(norm_pix, whole, labelled):
    """original | map | masked | reconstruction: visible patches as they are, hidden
    ones grey, then predicted.
    """
    original, m, masked, reconstruction = tiles(whole(norm_pix=norm_pix), 16)
    dataset = open_data(labelled["data"], size=16)
    ids = np.linspace(0, 24, 8).astype(int)
    images = np.stack([dataset[i].image.permute(1, 2, 0).numpy() for i in ids]).astype(
        int
    )
    assert original.shape == (8, 16, 16, 3) and abs(original - images).max() <= 1

    def patches(x):
        return (
            x.reshape(8, 4, 4, 4, 4, -1).swapaxes(2, 3).reshape(8, 16, -1).astype(int)
        )

    a, c, d, grey = (
        *map(patches, (original, masked, reconstruction)),
        np.tile(255 * np.array(attg_mae.Config().mean), 16),
    )
    hidden = (abs(c - grey) <= 1).all(-1)
    assert (hidden.sum(1) == 12).all() and len(np.unique(hidden, axis=0)) > 1
    assert (c[~hidden] == a[~hidden]).all() and (d[~hidden] == a[~hidden]).all()
    error = abs(d - a)[hidden].mean()
    assert 1 < error < 45 and (patches(m).reshape(8, 16, 16, 3).std((2, 3)) == 0).all()
    luma = (a.reshape(8, 16, 16, 3) @ LUMA).mean(-1)
    for x, y, other in zip(patches(m).mean(-1), luma, np.roll(luma, 1, 0), strict=True):
        assert np.corrcoef(x, y)[0, 1] > 0.95 > np.corrcoef(x, other)[0, 1]


def test_pictures_only(whole, plain, tmp_path, capsys):
    """--init CKPT --data DIR --epochs 0, whether there are maps or not; the batch size
    does not matter.
    """
    sizes = [f"--{k}={v}" for k, v in TINY.items() if k not in ("epochs", "batch_size")]
    argv = [
        *sizes,
        "--init",
        str(whole() / "last.pt"),
        "--data",
        plain,
        *"--epochs 0 --seed 3".split(),
    ]
    assert attg_mae.main([*argv, "--out", str(tmp_path / "a")])["step"] == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["reconstructions.png"]
    assert "all weights loaded" in capsys.readouterr().out
    a = tiles(tmp_path / "a", 16)
    assert len(a) == 3 and len(a[0]) == 8
    argv[argv.index("--init") + 1] = str(whole(seed=1) / "last.pt")
    attg_mae.main([*argv, "--out", str(tmp_path / "b")])
    b = tiles(tmp_path / "b", 16)
    # Other weights, other predictions
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and (a[2] != b[2]).any()


def test_pictures_of_a_run_show_its_own_weights(whole, labelled, tmp_path, capsys):
    """--epochs 0 in its folder; other weights need another folder."""
    out = shutil.copytree(whole(), tmp_path / "out")
    want = tiles(out, 16)
    (out / "reconstructions.png").unlink()
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    settings = labelled | {"epochs": 0, "batch_size": 8}
    assert train(out, **settings)["step"] == 0
    assert "of " + str(out / "last.pt") in capsys.readouterr().out
    for ours, theirs in zip(tiles(out, 16), want, strict=True):
        assert (ours == theirs).all()
    (drawn,) = (p for p in out.iterdir() if p.name not in files)
    files[drawn.name] = drawn.read_bytes()
    other = str(whole(seed=1) / "last.pt")
    for wrong in ({"init": other}, {"resume": other}, {"resume": "none"}):
        ((flag, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"last.pt.*--{flag} {value} .*--out"):
            train(out, **settings | wrong)
    with pytest.raises(ValueError, match="--width 32 -> 16"):
        train(out, **settings, width=16)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    # In another folder they are drawn.
    train(tmp_path / "a", **settings, resume=other)
    train(tmp_path / "b", **settings, init=other)
    a, b = tiles(tmp_path / "a", 16), tiles(tmp_path / "b", 16)
    assert (a[3] == b[3]).all() and (a[3] != want[3]).any()


@pytest.mark.parametrize("name", ["last.pt", "encoder.pt"])
def test_init(name, whole, labelled, tmp_path, capsys):
    """From a whole checkpoint, or an encoder with a fresh decoder; a learning rate of 0
    shows what it begins with.
    """
    capsys.readouterr()
    train(
        tmp_path / "out", **labelled, init=str(whole() / name), seed=1, lr=0.0, epochs=1
    )
    words = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("--init")
    )
    assert words.startswith(f"--init {whole() / name}: ")
    assert words.endswith(
        "all weights loaded"
        if name == "last.pt"
        else "no decoder in the file, it starts from random weights"
    )
    train(tmp_path / "fresh", **labelled, seed=1, lr=0.0, epochs=1)
    given, fresh, ours = (
        last(out)["model"] for out in (whole(), tmp_path / "fresh", tmp_path / "out")
    )
    for key in ours:
        decoder = "decoder" in key or key == "mask_token"
        assert same(
            ours[key], fresh[key] if decoder and name == "encoder.pt" else given[key]
        )
    assert not same(fresh, given) and records(tmp_path / "out")[0]["step"] == 1


def test_init_errors(whole, labelled, tmp_path):
    state = last(whole())["model"]
    state["extra.weight"] = state.pop("norm.weight")
    state.pop("decoder_norm.bias")
    torch.save({"model": state}, tmp_path / "odd.pt")
    with pytest.raises(ValueError) as error:
        train(tmp_path / "out", **labelled, init=str(tmp_path / "odd.pt"))
    for word in (
        str(tmp_path / "odd.pt"),
        "no norm.weight",
        "no decoder_norm.bias",
        "unexpected extra.weight",
    ):
        assert word in str(error.value)
    # Which flags would fit: those of TINY.
    change = {"width": 16, "depth": 3, "decoder_depth": 2, "patch_size": 8}
    with pytest.raises(ValueError) as error:
        train(tmp_path / "out", **labelled | change, init=str(whole() / "last.pt"))
    assert str(error.value) == (
        f"{whole() / 'last.pt'} does not fit this vit_micro; use "
        "--patch_size 4 --width 32 --heads NUMBER --depth 1 --decoder_depth 1"
    )
    for path, words in (
        (tmp_path / "absent.pt", ": there is no such file"),
        (tmp_path, ": a folder; name a file in it, such as last.pt"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path) + words)}$"):
            train(tmp_path / "out", **labelled, init=str(path))
    assert not (tmp_path / "out").exists()


FLAGS = """
model data maps out epochs batch_size accum blr lr warmup_epochs weight_decay clip_grad
mask_ratio norm_pix tau tau_end tau_schedule guidance map_norm img_size patch_size
precision compile device workers seed init resume classes mean std eval_every save_every
keep_ckpt_every log_every
""".split()


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        attg_mae.main(["--help"])
    words = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert not [f for f in FLAGS if not re.search(rf"--{f}\b", words)]
    assert "torchrun" in words and "attention map" in words


def test_flags_reach_the_config(monkeypatch):
    """Each as its type; without flags it is the preset's."""
    seen = []
    monkeypatch.setattr(attg_mae, "train", seen.append)
    attg_mae.main([])
    assert asdict(seen[0]) == asdict(attg_mae.Config())
    argv = "--model vit_small --epochs 3 --lr 1e-3 --no-norm_pix --compile "
    argv += "--mean .1 .2 .3 --data x --warmup_epochs 0.5"
    attg_mae.main([*argv.split(), "--guidance", "none"])
    cfg = seen[1]
    assert (cfg.width, cfg.img_size, cfg.epochs, cfg.batch_size, cfg.lr) == (
        384,
        224,
        3,
        4096,
        1e-3,
    )
    assert (cfg.norm_pix, cfg.compile, cfg.mean, cfg.warmup_epochs) == (
        False,
        True,
        (0.1, 0.2, 0.3),
        0.5,
    )
    assert cfg.out == "out/x-vit_small-none"
    assert cfg.blr == pytest.approx(1e-3 * 256 / 4096)


WRONG = [  # settings, words of the error
    ({"guidance": "attention"}, "--guidance attention none"),
    ({"model": "vit_giant"}, "--model vit_giant vit_base"),
    ({"map_norm": "x"}, "--map_norm x image"),
    ({"tau_schedule": "linear"}, "--tau_schedule linear cosine"),
    ({"precision": "fp8"}, "--precision fp8 bf16"),
    ({"img_size": 18}, "--img_size 18 --patch_size 4 multiple"),
    ({"img_size": (16, 30)}, "--img_size 30 --patch_size 4 multiple"),
    ({"tau": 0.0}, "--tau 0 above"),
    ({"tau": math.nan}, "--tau nan"),
    ({"tau_end": -1.0}, "--tau_end -1"),
    ({"mask_ratio": 1.0}, "--mask_ratio 1"),
    ({"mask_ratio": 0.0}, "--mask_ratio 0"),
    ({"epochs": -1}, "--epochs -1"),
    ({"accum": 0}, "--accum 0"),
    ({"batch_size": 0}, "--batch_size 0"),
    ({"log_every": 0}, "--log_every 0"),
    ({"save_every": 0}, "--save_every 0"),
    ({"lr": -1.0}, "--lr -1"),
    ({"lr": math.nan}, "--lr nan"),
    ({"heads": 3}, "--heads 3 --width 32"),
    ({"decoder_heads": 3}, "--decoder_heads 3 --decoder_width 16"),
    ({"heads": 0}, "--heads 0 least"),
    ({"heads": -2}, "--heads -2 least"),
    ({"width": 0}, "--width 0 least"),
    ({"depth": 0}, "--depth 0 least"),
    ({"depth": 2.5}, "--depth 2.5 whole"),
    ({"mask_ratio": math.nan}, "--mask_ratio nan from"),
    ({"mask_ratio": math.inf}, "--mask_ratio inf from"),
    ({"mask_ratio": -0.1}, "--mask_ratio -0.1 negative"),
    ({"tau": 1e300}, "--tau 1e+300 from"),
    ({"warmup_epochs": math.inf}, "--warmup_epochs inf from"),
    ({"std": (1.0, math.inf, 1.0)}, "--std inf from"),
    ({"std": (1.0, -1.0, 1.0)}, "--std -1.0 above"),
    ({"img_size": 10**9}, "--img_size 1000000000 8192"),
    ({"img_size": (16, 16, 16)}, "--img_size height width"),
    ({"lr": 1e-3, "blr": 1e-3}, "--lr 0.001 --blr 0.001 one"),
    ({"in_chans": 4}, "--in_chans 4 grey"),
    ({"in_chans": 1}, "--mean 0.485 --in_chans 1 --std"),
    ({"mean": (0.5,)}, "--mean 0.5 --in_chans 3"),
    ({"std": (0.5,)}, "--std 0.5 --in_chans 3"),
    ({"guidance": "none"}, "--maps --guidance none"),
    ({"workers": -1}, "--workers -1"),
    ({"batch_size": 6, "accum": 4}, "--batch_size 6 --accum 4 multiple"),
    ({"batch_size": 1000}, "--batch_size 1000 25"),
    ({"device": "cuda"}, "--device cuda cpu"),
    ({"device": "gpu"}, "--device gpu cpu"),
    ({"maps": None}, "--data object_discovery.py --guidance none --maps"),
]


@pytest.mark.parametrize("settings, words", WRONG, ids=[words for _, words in WRONG])
def test_wrong_settings(settings, words, labelled, tmp_path, monkeypatch):
    """ValueError with the flag, the value and the remedy, not long after the start."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as error:
        train(tmp_path / "out", **labelled | settings)
    assert [word for word in words.split() if word not in str(error.value)] == []
    assert not (tmp_path / "out").exists()


def test_evaluations_need_a_test_split(plain, tmp_path):
    with pytest.raises(ValueError, match="--eval_every 1: --data .* no test split"):
        train(tmp_path / "out", data=plain, guidance="none", eval_every=1)
    assert not (tmp_path / "out").exists()


def test_wrong_flags(capsys):
    for argv in (["--guidance", "attention"], ["--epochs", "many"], ["--no_such_flag"]):
        with pytest.raises(SystemExit) as end:
            attg_mae.main(argv)
        assert end.value.code == 2 and argv[0] in capsys.readouterr().err


def test_grey_pictures_and_oblong_ones(labelled, passes, tmp_path):
    """One channel is decoded as grey; --img_size takes height and width."""
    folder = tmp_path / "grey"
    folder.mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    sizes = {k: v for k, v in TINY.items() if k not in ("img_size", "epochs")}
    argv = [f"--{k}={v}" for k, v in sizes.items()]
    argv += "--guidance none --epochs 1 --img-size 16 24 --in_chans 1".split()
    argv += "--mean 0.5 --std 0.25 --seed 3".split()
    out = tmp_path / "out"
    attg_mae.main([*argv, "--data", str(folder), "--out", str(out)])
    imgs = passes[0].imgs
    assert imgs.shape == (4, 1, 16, 24) and tiles_exist(out)
    # Grey stays what it is: the crop that the data set yields, flipped or not.
    dataset = open_data(str(folder), "train", (16, 24), True, 3)
    for i, index in enumerate(ResumableBatchSampler(6, 4, 0, 1, 3).indices(0).tolist()):
        sample = dataset[0, index]
        want = sample.image[0].flip(-1) if sample.flip else sample.image[0]
        torch.testing.assert_close(
            imgs[i, 0], (want / 255 - 0.5) / 0.25, atol=1e-5, rtol=0
        )
    model = attg_mae.load_encoder(out / "encoder.pt")
    assert model.cfg.size == (16, 24) and model.cfg.mean == (0.5,)
    # The same command finds its own checkpoint again.
    again = attg_mae.main([*argv, "--data", str(folder), "--out", str(out)])
    assert again["step"] == 1


def tiles_exist(out):
    with Image.open(out / "reconstructions.png") as sheet:
        return min(sheet.size) > 60


def test_mean_and_std(labelled, passes, tmp_path):
    """They change the normalization, and go with the checkpoint and the export."""
    sizes = [f"--{k}={v}" for k, v in (TINY | labelled | {"epochs": 1}).items()]
    attg_mae.main([*sizes, "--out", str(tmp_path / "a")])
    default, passes[:] = passes[0].imgs, []
    attg_mae.main(
        [
            *sizes,
            "--out",
            str(tmp_path / "b"),
            *"--mean 0.5 0.4 0.3 --std 0.2 0.25 0.5".split(),
        ]
    )
    values = (
        attg_mae.Config().mean,
        attg_mae.Config().std,
        (0.5, 0.4, 0.3),
        (0.2, 0.25, 0.5),
    )
    m, s, mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in values)
    torch.testing.assert_close(
        passes[0].imgs, (default * s + m - mean) / std, rtol=1e-4, atol=1e-5
    )
    assert (passes[0].imgs - default).abs().max() > 0.1
    for name in ("last.pt", "encoder.pt"):
        cfg = attg_mae.load_encoder(tmp_path / "b" / name).cfg
        assert (cfg.mean, cfg.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


BAD = [
    "empty",
    "truncated",
    "flipped",
    "text",
    "tensor",
    "foreign",
    "encoder",
    "evil",
    "folder",
]


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint_is_named_and_kept(kind, copy, whole, tmp_path, monkeypatch):
    (out, settings), trap = copy, tmp_path / "trap"
    monkeypatch.setenv("EVIL", str(trap))
    path, content = out / "last.pt", (out / "last.pt").read_bytes()
    if kind in ("empty", "truncated", "text"):
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "text": b"not a checkpoint",
            }[kind]
        )
    elif kind == "flipped":
        path.write_bytes(content.replace(b"optimizer", b"optimizex"))
    elif kind == "encoder":
        shutil.copy(whole() / "encoder.pt", path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        things = {
            "tensor": torch.zeros(3),
            "foreign": {"state_dict": {}},
            "evil": {"model": Evil(), "step": 3},
        }
        torch.save(things[kind], path)
        trap.unlink(missing_ok=True)
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for resume in ("auto", str(path)):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            train(**settings, resume=resume)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == files
    assert not trap.exists()
    if kind in ("truncated", "foreign"):
        assert train(**settings, resume="none")["step"] == 12  # starts anew
        assert [r["step"] for r in records(out)] == [*range(1, 13)]
        fresh = tmp_path / "fresh"
        train(**settings | {"out": fresh})
        assert_same_run(out, fresh)


class Evil:
    def __reduce__(self):
        return (open, (os.environ["EVIL"], "w"))


def test_evil_pickles_run_where_nothing_stops_them(tmp_path, monkeypatch):
    """Or the test above would show nothing."""
    monkeypatch.setenv("EVIL", str(tmp_path / "trap"))
    torch.save({"model": Evil()}, tmp_path / "last.pt")
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "trap").exists()


OTHERS = [
    {"width": 16},
    {"depth": 2},
    {"heads": 4},
    {"decoder_depth": 2},
    {"img_size": 32},
    {"patch_size": 8},
]


OTHERS += [{"batch_size": 5}, {"seed": 1}, {"model": "vit_tiny"}]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: next(iter(change)))
def test_checkpoint_of_another_run(change, copy):
    out, settings = copy
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    if "model" in change:
        change |= {
            k: None
            for k in (
                "width",
                "depth",
                "heads",
                "decoder_depth",
                "decoder_width",
                "decoder_heads",
            )
        }
    with pytest.raises(ValueError) as error:
        train(**settings | change)
    key = "width" if "model" in change else next(iter(change))
    assert all(
        word in str(error.value)
        for word in (str(out / "last.pt"), f"--{key}", "--resume none")
    )
    assert "--epochs" not in str(error.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files


def test_checkpoint_of_other_data(copy, tmp_path):
    with pytest.raises(ValueError, match="last.pt.*--data.*--resume none"):
        train(**copy[1] | make_data(tmp_path))


CHANGES = [
    ("lr", 5e-4),
    ("weight_decay", 0.3),
    ("precision", "fp16"),
    ("precision", "bf16"),
]


CHANGES += [
    ("tau_end", 2.0),
    ("accum", 2),
    ("clip_grad", 0.1),
    ("guidance", "inverted"),
]


@pytest.mark.parametrize("key, value", CHANGES)
def test_changed_settings_are_named_and_used(key, value, copy, capsys):
    """What is changed shows in the steps after the checkpoint; what is not, keeps the
    run as it was.
    """
    out, settings = copy
    before = last(out)["config"][key]
    capsys.readouterr()
    train(**settings | {key: value})
    words = next(
        line for line in capsys.readouterr().out.splitlines() if "continuing" in line
    )
    assert f"--{key} {before} -> {value}" in words
    assert "--width" not in words
    after = last(out)
    assert (
        after["config"][key]
        == value
        == json.loads((out / "config.json").read_text())[key]
    )
    rows = records(out)
    assert [r["step"] for r in rows] == [*range(1, after["step"] + 1)]
    total = after["step"]
    assert total == 12
    lr = [
        attg_mae.lr_at(step, total, 6.0, value if key == "lr" else 1e-3)
        for step in range(6, total)
    ]
    assert [r["lr"] for r in rows[6:]] == lr
    tau = [
        attg_mae.tau_at(
            step, total, attg_mae.Config(**{key: value} if key == "tau_end" else {})
        )
        for step in range(6, total)
    ]
    assert [r["tau"] for r in rows[6:]] == pytest.approx(tau, rel=1e-6)
    decays = [group["weight_decay"] for group in after["optimizer"]["param_groups"]]
    assert decays == [value if key == "weight_decay" else 0.05, 0.0]
    assert bool(after["scaler"]) == (value == "fp16")


def test_other_epochs(copy, tmp_path):
    """Refused in the run's folder; --resume goes on with the schedule of the new ones."""
    out, settings = copy
    path, content = out / "last.pt", (out / "last.pt").read_bytes()
    for epochs in (3, 1):
        words = f"{path} was made for --epochs 2, not {epochs}, .*--resume {path}$"
        with pytest.raises(ValueError, match=words):
            train(**settings | {"epochs": epochs})
    assert path.read_bytes() == content
    more = settings | {"epochs": 3, "resume": str(path), "out": str(tmp_path / "more")}
    assert train(**more)["step"] == 18
    lr = [attg_mae.lr_at(step, 18, 6.0, 1e-3) for step in range(6, 18)]
    assert [r["lr"] for r in records(tmp_path / "more")] == lr
    assert lr[1] != attg_mae.lr_at(7, 12, 6.0, 1e-3)
    # Or the result of two epochs would pass for that of one.
    train(**settings)
    with pytest.raises(ValueError, match="last.pt is of another run: --epochs 2 -> 1"):
        train(**settings | {"epochs": 1, "resume": str(path)})


def test_warm_up(copy, tmp_path):
    """MAE's 40 epochs from 400 on; a run of an earlier default keeps its own."""
    for epochs, warmup in ((8, 0.4), (399, 19.95), (400, 40), (800, 40), (1600, 40)):
        cfg = attg_mae.resolve(attg_mae.Config(epochs=epochs))
        assert cfg.warmup_epochs == pytest.approx(warmup)
    assert (
        attg_mae.resolve(attg_mae.Config(epochs=1600, warmup_epochs=7)).warmup_epochs
        == 7
    )
    out, settings = copy
    settings["warmup_epochs"] = None
    parts = last(out)
    parts["config"]["warmup_epochs"] = 0.5  # 0.1 is the default of 2 epochs
    torch.save(parts, out / "last.pt")
    train(**settings)
    assert last(out)["config"]["warmup_epochs"] == 0.5
    lr = [attg_mae.lr_at(step, 12, 3.0, 1e-3) for step in range(6, 12)]
    assert [r["lr"] for r in records(out)][6:] == lr
    given = settings | {"warmup_epochs": 2.0, "resume": "none"}
    train(**given)
    assert last(out)["config"]["warmup_epochs"] == 2.0
