"""
What can go wrong in a run of the command line: signals, kill -9, a full disk, numbers
that are not finite, damaged files, several processes.
"""

import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attg_mae
from attg.loader import ResumableBatchSampler
from tests.helpers import (
    TINY,
    after_step,
    assert_same_run,
    last,
    losses,
    make_maps,
    make_pictures,
    records,
    same,
    train,
)
from tests.processes import SCRIPT, Process, command, members, ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_continues(
    number, ask, long, finished, tmp_path
):
    settings = long | {"workers": 2}
    run = Process(ask, tmp_path / "out", settings)
    assert run.until(lambda: run.steps() >= 8)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # Ctrl-C reaches the workers as well
    else:
        os.kill(run.pid, number)
    code, words, errors = run.wait()
    step = last(run.out)["step"]
    assert code == 128 + number and "Traceback" not in errors
    assert f"stopped by a signal after step {step}; the same command continues" in words
    assert 8 <= step < 60
    assert [r["step"] for r in records(run.out)] == list(range(1, step + 1))
    assert not members(run.pid) and not (run.out / "encoder.pt").exists()
    run = Process(ask, tmp_path / "out", settings)
    code, words, _ = run.wait()
    assert code == 0 and f"after step {step}" in words
    ours, reference = last(run.out)["config"], last(finished)["config"]
    assert ours.pop("workers") == 2 and reference.pop("workers") == 0
    parts = {k: v for k, v in last(run.out).items() if k != "config"}
    assert same(parts, {k: v for k, v in last(finished).items() if k != "config"})
    assert losses(run.out) == losses(finished)
    assert records(run.out, "knn") == records(finished, "knn")


def test_kill_9_at_any_moment(ask, long, finished, tmp_path):
    """In the steps, and while a checkpoint is being written: its temporary file is left
    behind.
    """
    out = tmp_path / "out"
    temporary = tmp_path / "out" / "last.pt.tmp"
    sessions = []
    torn = 0
    chance = random.Random(0)
    for kill in range(6):
        temporary.unlink(missing_ok=True)
        run = Process(ask, out, long | {"workers": 2 * (kill == 0)})
        sessions.append(run.pid)
        before, pause = run.steps(), chance.uniform(0, 0.05)
        if kill % 2:
            run.until(temporary.exists)
        elif run.until(lambda: run.steps() > before):  # noqa: B023
            time.sleep(pause)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        torn += temporary.exists()
        assert not (out / "last.pt").exists() or last(out)["step"] % 6 == 0
    assert torn, "no kill has hit the writing of a checkpoint"
    assert not (out / "encoder.pt").exists(), "there was nothing left to continue"
    code, words, _ = Process(ask, out, long).wait()
    assert code == 0 and "continuing" in words
    assert_same_run(out, finished)
    assert records(out, "knn") == records(finished, "knn") and not temporary.exists()
    for _ in range(300):  # workers look for their parent every 5 s
        time.sleep(0.1 * any(map(members, sessions)))
    assert not any(map(members, sessions))


@pytest.mark.parametrize("cut", ["", '{"step": 8, "epo'])
def test_kill_while_the_log_is_written(cut, labelled, tmp_path):
    """Its last line may be cut."""
    train(tmp_path / "reference", **labelled)
    with after_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tmp_path / "out", **labelled)
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write(cut)
    train(tmp_path / "out", **labelled)
    assert_same_run(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize("first", [True, False])
def test_disk_full(first, ask, long, finished, tmp_path):
    """A limit on the size of files makes torch.save fail as a full disk does; the log
    is smaller.
    """
    run = Process(ask, tmp_path / "out", long)
    assert run.until(
        lambda: (run.steps() > 0) if first else (run.out / "last.pt").exists()
    )
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10**6, 10**6))
    code, _, errors = run.wait()
    assert code == 1 and "Traceback" not in errors
    words = f"error: {run.out}/last.pt could not be written: [Errno 27] File too large"
    assert words in errors
    # An earlier file is promised only where there is one.
    assert ("is intact" in errors) == (not first)
    assert not list(run.out.glob("*.tmp"))
    if first:
        assert not list(run.out.glob("*.pt"))
    else:
        assert last(run.out)["step"] % 6 == 0
    assert Process(ask, run.out, long).wait()[0] == 0
    assert_same_run(run.out, finished)


@pytest.mark.parametrize("log_every", [1, 20])
@pytest.mark.parametrize(
    "change, step, part",
    [
        ({"lr": 1e30}, 8, "prediction or input"),
        ({"gradient": math.inf}, 8, "gradient"),
        ({"tau": 1e-3, "tau_end": 1e-3}, 7, "weight"),
        ({"std": (1e-37,) * 3, "norm_pix": False}, 7, "prediction or input"),
    ],
    ids=["huge lr", "gradient", "small tau", "no deviation"],
)
def test_not_finite(change, step, part, log_every, copy, monkeypatch):
    """Stops; the checkpoint of the first epoch stays. The step is named, wherever the
    log line is.
    """
    (out, settings), content = copy, (copy[0] / "last.pt").read_bytes()

    def build(cfg):
        model = attg_mae.MAE(cfg)
        bad = iter([1.0, change["gradient"], 1.0, 1.0, 1.0, 1.0])
        model.decoder_pred.bias.register_hook(lambda grad: grad * next(bad))
        return model

    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        if "gradient" in change:
            patch.setattr(attg_mae, "build_model", build)
        train(
            **settings | {k: v for k, v in change.items() if k != "gradient"},
            log_every=log_every,
        )
    at = records(out, "not_finite")
    ids = (
        ResumableBatchSampler(25, 4, 0, 12, seed=0).indices(at[0]["step"] - 1).tolist()
    )
    assert at == [{"step": step, "not_finite": part, "indices": ids}]
    assert str(error.value).startswith(f"step {step}: {part}")
    assert str(ids) in str(error.value)
    assert (out / "last.pt").read_bytes() == content and last(out)["step"] == 6
    assert [r["step"] for r in records(out)] == (
        [*range(1, step)] if log_every == 1 else [*range(1, 7)]
    )
    train(**settings)
    assert not records(out, "not_finite")
    assert [r["step"] for r in records(out)] == [*range(1, 13)]


def test_fp16_counts_skipped_steps(labelled, tmp_path, capsys):
    """Gradients of large targets overflow until the scaler has found its scale."""
    train(
        tmp_path,
        **labelled,
        precision="fp16",
        norm_pix=False,
        std=(1e-3,) * 3,
        mean=(0.5,) * 3,
    )
    rows, scaler = records(tmp_path), last(tmp_path)["scaler"]
    skipped = sum(r["skipped"] for r in rows)
    assert 0 < skipped < 20 and scaler["scale"] == 65536 / 2**skipped
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())
    words = capsys.readouterr().out.splitlines()
    assert (
        sum("skipped 1" in line for line in words if line.startswith("step")) == skipped
    )
    made = {int(s["step"]) for s in last(tmp_path)["optimizer"]["state"].values()}
    assert made == {24 - skipped}


@pytest.mark.parametrize(
    "bad, kind, workers", [(1, "truncated", 0), (2, "text", 2), (3, "text", 0)]
)
def test_unreadable_pictures(bad, kind, workers, ask, tmp_path):
    """1 % of 200 goes on; more stops the run."""
    folder = tmp_path / "pictures"
    make_pictures(folder, 200, size=(12, 12))
    names = [f"{i:03d}.png" for i in (7, 70, 170)[:bad]]
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(
            content[: len(content) // 2] if kind == "truncated" else b"text"
        )
    settings = {
        "guidance": "none",
        "epochs": 1,
        "batch_size": 50,
        "workers": workers,
        "data": str(folder),
    }
    run = Process(ask, tmp_path / "out", TINY | settings)
    code, words, errors = run.wait()
    assert set(re.findall(r"\d+\.png", errors)) == set(names)
    assert "Traceback" not in errors
    if bad > 2:
        assert code == 1 and not (run.out / "last.pt").exists()
        assert re.search("^attg_mae.py: error: --data.* 1 %.* 3 ", errors, re.M)
    else:
        assert code == 0 and records(run.out)[-1]["unreadable"] == bad
        assert (
            f"unreadable {bad}"
            in [line for line in words.splitlines() if line.startswith("step")][-1]
        )


def test_all_kinds_of_pictures_train(tmp_path, capsys):
    grey = np.random.default_rng(0).random((20, 20))
    pictures = {"grey.png": np.uint8(255 * grey), "wide.png": np.uint16(65535 * grey)}
    pictures = {name: Image.fromarray(pixels) for name, pixels in pictures.items()}
    for name, mode in (
        ("rgba.png", "RGBA"),
        ("cmyk.jpg", "CMYK"),
        ("palette.png", "P"),
        ("bits.png", "1"),
    ):
        pictures[name] = pictures["grey.png"].convert(mode)
    (tmp_path / "pictures").mkdir()
    for name, picture in pictures.items():
        picture.save(tmp_path / "pictures" / name)
    modes = {name: Image.open(tmp_path / "pictures" / name).mode for name in pictures}
    assert modes["wide.png"].startswith("I")
    assert modes["cmyk.jpg"] == "CMYK"
    assert modes["grey.png"] == "L"
    result = train(
        tmp_path / "out",
        data=str(tmp_path / "pictures"),
        guidance="none",
        batch_size=6,
        epochs=2,
    )
    assert result["step"] == 2
    assert [r["unreadable"] for r in records(tmp_path / "out")] == [0, 0]


def damage(kind, data, folder):
    """Settings with a data set or a map file that is not in order, and the words that
    the error must hold.
    """
    empty, maps = folder / "empty", folder / "maps.npy"
    empty.mkdir()
    if kind == "missing folder":
        return {"data": str(folder / "absent")}, ["--data", "absent", "train/CLASS"]
    if kind == "empty folder":
        return {"data": str(empty)}, ["--data", "empty", "train/CLASS"]
    if kind == "empty train folder":
        (empty / "train").mkdir()
        return {"data": str(empty)}, ["--data", "empty", "train/CLASS"]
    if kind == "no maps":
        return {"maps": None}, [
            "--data",
            data["data"],
            "object_discovery.py",
            "--guidance none",
        ]
    if kind == "missing maps":
        return {"maps": str(maps)}, ["--maps", str(maps), "object_discovery.py"]
    for path in (Path(data["maps"]), Path(data["maps"]).with_suffix(".json")):
        shutil.copy(path, maps.with_suffix(path.suffix))
    if kind == "maps of other data":
        make_pictures(empty, 25)
        make_maps(maps, empty)
        return {"maps": str(maps)}, ["--maps", str(maps), "other data", "--data"]
    values = np.load(maps)
    np.save(
        maps,
        values[:-1]
        if kind == "short maps"
        else np.where(np.arange(25)[:, None, None] == 3, np.nan, values),
    )
    return {"maps": str(maps)}, [
        "--maps",
        str(maps),
        *(["24"] if kind == "short maps" else ["NaN", "number 3"]),
    ]


DAMAGES = [
    "missing folder",
    "empty folder",
    "empty train folder",
    "no maps",
    "missing maps",
    "maps of other data",
]


@pytest.mark.parametrize("kind", [*DAMAGES, "short maps", "maps with NaN"])
def test_errors_on_the_command_line(kind, labelled, tmp_path, monkeypatch, capsys):
    """One line that Python prints before it ends with exit code 1; no run folder."""
    change, words = damage(kind, labelled, tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [SCRIPT, *command(TINY | labelled | change | {"out": str(tmp_path / "out")})],
    )
    with pytest.raises(SystemExit) as error:
        runpy.run_path(SCRIPT, run_name="__main__")
    message = error.value.code
    assert message.startswith("attg_mae.py: error: ") and len(message.splitlines()) == 1
    assert not [word for word in words if word not in message]
    assert not (tmp_path / "out").exists() and capsys.readouterr() == ("", "")


def assert_close_run(out, reference, lr=1e-3):
    """Losses to 1e-5, weights to 1 % of lr * steps; the losses of consecutive steps are
    further apart.
    """
    a, b = ([[r["loss"], r["mse"]] for r in records(x)] for x in (out, reference))
    a, b = np.array(a), np.array(b)
    assert a.shape == b.shape and len(a) >= 20
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not np.isclose(a[1:], b[:-1], rtol=1e-5).any()
    a, b = last(out), last(reference)
    assert a["step"] == b["step"] == len(records(out))
    for key, value in a["model"].items():
        # The gradient of the key's is zero, and what AdamW makes of its noise is
        # anything
        if key.endswith("qkv.bias"):
            value, b["model"][key] = (
                x.clone().view(3, -1)[::2] for x in (value, b["model"][key])
            )
        torch.testing.assert_close(
            value, b["model"][key], rtol=0, atol=1e-2 * lr * a["step"]
        )


def test_two_processes_equal_one(ask, labelled, distributed, tmp_path):
    one = Process(ask, tmp_path / "one", TINY | labelled | {"eval_every": 2})
    assert one.wait()[0] == 0
    assert_close_run(distributed, one.out)
    ours, reference = records(distributed, "knn"), records(one.out, "knn")
    for a, b in zip(ours, reference, strict=True):
        assert a["val_mse"] == pytest.approx(b["val_mse"], rel=1e-5)
    assert [r["step"] for r in ours] == [r["step"] for r in reference] == [12, 24]
    for a, b in zip(ours, reference, strict=True):
        for name, value in b["knn"].items():
            # One picture may turn over
            assert abs(a["knn"][name] - value) <= 100 / 15 + 1e-3
            # But features in another order would do no better than chance
            assert value > 50


EVALUATIONS = {
    "eval_knn": {"k": 5},
    "eval_linear": {"epochs": 20},
    "eval_linear mae": {"protocol": "mae", "epochs": 15, "batch_size": 8, "blr": 200},
    "eval_finetune": {"label_fraction": 1, "epochs": 12, "batch_size": 8, "blr": 0.05},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_by_two_processes(name, ask, labelled, distributed, tmp_path):
    """Each scores its share of the 15 test images, none twice; one of them writes."""
    script = [
        str(Path(SCRIPT).with_name(f"{name.split()[0]}.py")),
        str(distributed / "encoder.pt"),
    ]
    settings = {"data": labelled["data"], "device": "cpu"} | EVALUATIONS[name]
    trained = name in ("eval_linear mae", "eval_finetune")
    save = [
        {"save": tmp_path / k} if trained else {"save_features": tmp_path / k}
        for k in ("one.pt", "two.pt")
    ]
    pair = ranks(ask, tmp_path / "two", settings | save[1], script)
    runs = [Process(ask, tmp_path / "one", settings | save[0], script=script), *pair]
    (code, one, _), (code0, two, errors), (code1, silent, _) = (
        run.wait() for run in runs
    )
    assert (code, code0, code1) == (0, 0, 0), errors
    one, two = (json.loads(words.splitlines()[-1])["results"] for words in (one, two))
    written = [json.loads(line) for line in (tmp_path / "two").read_text().splitlines()]
    assert len(written) == 1 and written[0]["results"] == two and not silent
    a, b = (torch.load(tmp_path / k, weights_only=True) for k in ("one.pt", "two.pt"))
    if trained:
        assert a["step"] == b["step"]
        assert [r["test"] for r in one] == [r["test"] for r in two]
        right = [r["top-1"] * 15 / 100 for r in one + two]  # images
        assert all(n > 7.5 and abs(n - round(n)) < 1e-6 for n in right), right
        # Finished: scored again
        pair = ranks(ask, tmp_path / "two", settings | save[1], script)
        assert [run.wait()[0] for run in pair] == [0, 0]
        first, again = (
            json.loads(line)["results"]
            for line in (tmp_path / "two").read_text().splitlines()
        )
        assert first == again
    else:
        assert one == two and (one[0]["top-1"] > 50 or one[1]["top-1"] > 50)
        for split in ("train", "test"):
            assert all(
                torch.allclose(a[split][k], b[split][k], atol=1e-5)
                for k in ("class_token", "patch_mean")
            )
            assert a[split]["labels"].equal(b[split]["labels"])
            assert len(a[split]["labels"]) in (25, 15)


@pytest.mark.parametrize("guidance", ["none", "attg"])
def test_accumulation_on_two_processes_equals_one(guidance, ask, guided, tmp_path):
    settings = TINY | guided(guidance) | {"epochs": 4}
    runs = [
        *ranks(ask, tmp_path / "two", settings | {"accum": 2}),
        Process(ask, tmp_path / "one", settings),
    ]
    assert [run.wait()[0] for run in runs] == [0, 0, 0]
    assert_close_run(tmp_path / "two", tmp_path / "one")


def test_two_machines_without_a_shared_folder(ask, labelled, whole, trained, tmp_path):
    """The first process decides what is continued, and the other takes its weights,
    whatever lies in a folder of the same name there.
    """
    settings = TINY | labelled
    with after_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tmp_path / "out", **labelled)
    there = shutil.copytree(trained, tmp_path / "there")
    files = {p.name: p.read_bytes() for p in there.iterdir()}
    runs = ranks(ask, tmp_path / "out", settings, elsewhere=there)
    assert [run.wait()[0] for run in runs] == [0, 0]
    assert_close_run(tmp_path / "out", whole())
    assert {p.name: p.read_bytes() for p in there.iterdir()} == files
    # What the first one refuses ends both, and none waits for the other.
    runs = ranks(ask, tmp_path / "out", settings | {"seed": 1}, elsewhere=there)
    for code, _, errors in [run.wait() for run in runs]:
        assert code == 1 and "Traceback" not in errors
        assert f"{tmp_path / 'out' / 'last.pt'} is of another run: --seed" in errors


def test_signal_to_one_of_two_processes(ask, labelled, long, tmp_path):
    """They agree, and the same processes continue."""
    runs = ranks(ask, tmp_path / "out", long)
    assert runs[0].until(lambda: runs[0].steps() >= 5)
    os.kill(runs[1].pid, signal.SIGTERM)
    assert [run.wait()[0] for run in runs] == [128 + signal.SIGTERM] * 2
    step = last(tmp_path / "out")["step"]
    assert 5 <= step < 60 and step == records(tmp_path / "out")[-1]["step"]


def test_torchrun_stops_and_continues(ask, labelled, distributed, tmp_path):
    """A launch by torchrun, stopped by SIGTERM and continued, equals the processes
    above bit for bit.
    """
    out, settings = tmp_path / "out", TINY | labelled | {"eval_every": 2}
    # The script with slower steps, to be stopped in the middle
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import runpy, sys, time; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})\n"
        "from torch.optim.optimizer import register_optimizer_step_post_hook\n"
        "register_optimizer_step_post_hook(lambda *_: time.sleep(0.2))\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    )
    argv = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc_per_node=2".split(),
        slow,
    ]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": tmp_path,
    }
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*argv, *command(settings | {"out": str(out)})], **options
    ) as launch:
        while launch.poll() is None and not (
            (out / "log.jsonl").exists() and len(records(out)) >= 3
        ):
            time.sleep(0.01)
        launch.send_signal(signal.SIGTERM)
        words, errors = launch.communicate()
    step = last(out)["step"]
    assert launch.returncode, errors
    assert 3 <= step < 24, errors
    assert [r["step"] for r in records(out)] == [*range(1, step + 1)], errors
    assert words.count(f"stopped by a signal after step {step}") == 1
    runs = ranks(ask, out, settings)
    assert [run.wait()[0] for run in runs] == [0, 0]
    assert_same_run(out, distributed)


def test_command_from_elsewhere_without_git_or_terminal(labelled, tmp_path):
    (tmp_path / "bin").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "bin")}  # no git in it
    argv = command(TINY | labelled | {"epochs": 1})
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, SCRIPT, *argv], env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert "attg_mae unknown, python" in done.stdout and "img/s" in done.stdout
    # No progress bars
    assert "\r" not in done.stdout
    assert done.stderr == ""
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data-vit_micro-attg"]
    files = {"config.json", "log.jsonl", "last.pt", "encoder.pt", "reconstructions.png"}
    folder = tmp_path / "out" / "data-vit_micro-attg"
    assert {p.name for p in folder.iterdir()} == files | {"curves.png"}


def test_importing_has_no_effect(tmp_path):
    code = f"""
import signal, sys, torch
sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
before = signal.getsignal(signal.SIGINT), torch.get_rng_state(), torch.get_num_threads()
def query(*_): raise AssertionError("CUDA query")
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
    setattr(torch.cuda, name, query)
import attg_mae, bench, eval_finetune, eval_knn, eval_linear, kernels, object_discovery
after = signal.getsignal(signal.SIGINT), torch.get_rng_state(), torch.get_num_threads()
assert before[0] == after[0] and before[1].equal(after[1]) and before[2] == after[2]
assert not torch.distributed.is_initialized()
"""
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-B", "-c", code, "--not_a_flag"], **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
