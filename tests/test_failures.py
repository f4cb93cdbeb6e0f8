"""
Faults of a run: signals, kill -9, a full disk, values that are not finite, unreadable
images, lost ranks. Runs of the command line are processes of their own.
"""

import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import attg_mae
from attg.loader import ResumableBatchSampler
from tests.helpers import (
    TINY,
    assert_same_run,
    content,
    last,
    make_images,
    python,
    records,
    stop_after,
    train,
)
from tests.processes import SCRIPT, Process, command, members, ranks


def test_ctrl_c_saves(ask, long, tmp_path):
    run = Process(ask, tmp_path / "out", long | {"workers": 2})
    assert run.until(lambda: run.steps() >= 8)
    os.killpg(run.pid, signal.SIGINT)  # reaches the workers, too
    code, output, errors = run.wait()
    step = last(run.out)["step"]
    assert code == 128 + signal.SIGINT and "Traceback" not in errors
    assert f"stopped by a signal after step {step}; the same command resumes" in output
    assert 8 <= step < 60 and len(records(run.out)) == step
    assert not members(run.pid) and not (run.out / "encoder.pt").exists()


def test_kill_9_at_any_moment(ask, long, finished, tmp_path):
    """Between steps, and while a checkpoint is written, which leaves its temporary file."""
    out = tmp_path / "out"
    temporaries = lambda: [*out.glob("last.pt.*.tmp")]  # noqa: E731
    sessions, torn, rng = [], 0, random.Random(0)
    for kill in range(5):
        for path in temporaries():
            path.unlink()
        run = Process(ask, out, long | {"workers": 2 * (kill == 0)})
        sessions.append(run.pid)
        before, pause = run.steps(), rng.uniform(0, 0.05)
        if kill % 2:
            run.until(temporaries)
        elif run.until(lambda: run.steps() > before):  # noqa: B023
            time.sleep(pause)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        torn += len(temporaries())
        assert not (out / "last.pt").exists() or last(out)["step"] % 6 == 0
    assert torn, "no kill has hit the writing of a checkpoint"
    assert not (out / "encoder.pt").exists(), "there was nothing left to resume"
    code, output, _ = Process(ask, out, long).wait()
    assert code == 0 and "resuming" in output
    assert_same_run(out, finished)
    assert records(out, "knn") == records(finished, "knn") and not temporaries()
    for _ in range(300):  # workers look for their parent every 5 s
        time.sleep(0.1 * any(map(members, sessions)))
    assert not any(map(members, sessions))


def test_disk_full(ask, long, finished, tmp_path):
    """A limit on the size of files makes torch.save fail as a full disk does."""
    run = Process(ask, tmp_path / "out", long)
    path = run.out / "last.pt"
    assert run.until(lambda: run.steps() > 0)
    # The log is smaller.
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10**6, 10**6))
    code, _, errors = run.wait()
    assert code == 1 and "Traceback" not in errors
    assert f"error: {path} could not be written: [Errno 27] File too large" in errors
    assert f"the earlier {path} is intact" in errors
    assert not list(run.out.glob("*.tmp")) and last(run.out)["step"] % 6 == 0
    assert Process(ask, run.out, long).wait()[0] == 0
    assert_same_run(run.out, finished)


@pytest.mark.parametrize("redirection", ["| head -1", "2>&1 | head -1", ">&-"])
def test_closed_output(redirection, long, finished, tmp_path):
    """A reader that has ended stops the run, which saves; a closed output does not."""
    argv = [sys.executable, SCRIPT, *command(long | {"out": str(tmp_path / "out")})]
    shell = f"{shlex.join(argv)} {redirection}; exit ${{PIPESTATUS[0]}}"
    options = {"capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", shell], **options)
    if redirection == ">&-":
        assert (done.returncode, done.stderr) == (0, "")
        assert_same_run(tmp_path / "out", finished)
        return
    assert (done.returncode, done.stdout.count("\n")) == (128 + 13, 1)
    # With 2>&1 nobody reads the message.
    message = "the reader of the output has ended: saving\n"
    assert done.stderr == ("" if "2>&1" in redirection else message)
    assert last(tmp_path / "out")["step"] == len(records(tmp_path / "out")) < 60


NOT_FINITE = {  # change, log_every, first bad step, part
    "huge lr": ({"lr": 1e30}, 1, 8, "prediction or input"),
    "gradient": ({"gradient": math.inf}, 20, 8, "gradient"),
    "small tau": ({"tau": 1e-3, "tau_end": 1e-3}, 20, 7, "patch weight"),
    "no std": ({"std": (1e-37,) * 3, "norm_pix": False}, 1, 7, "prediction or input"),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_not_finite(name, copy, monkeypatch):
    """The run stops and names the step, wherever the log line is; the checkpoint stays."""
    (out, settings), content = copy, (copy[0] / "last.pt").read_bytes()
    change, log_every, step, part = NOT_FINITE[name]

    def build(cfg):
        model = attg_mae.MAE(cfg)
        factors = iter([1.0, math.inf, 1.0, 1.0, 1.0, 1.0])
        model.decoder_pred.bias.register_hook(lambda grad: grad * next(factors))
        return model

    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        if name == "gradient":
            change = {}
            patch.setattr(attg_mae, "build_model", build)
        train(**settings | change, log_every=log_every)
    (record,) = records(out, "not_finite")
    ids = ResumableBatchSampler(25, 4, 0, 12, seed=0).indices(step - 1).tolist()
    assert record == {"step": step, "not_finite": part, "indices": ids}
    assert str(error.value).startswith(f"step {step}: {part}")
    assert str(ids) in str(error.value)
    assert (out / "last.pt").read_bytes() == content
    assert len(records(out)) == (step - 1 if log_every == 1 else 6)
    train(**settings)
    assert not records(out, "not_finite")
    assert [r["step"] for r in records(out)] == [*range(1, 13)]


def test_fp16_counts_skipped_steps(labelled, tmp_path, capsys):
    """Gradients of large targets overflow until the scaler has found its scale."""
    targets = {"norm_pix": False, "std": (1e-3,) * 3, "mean": (0.5,) * 3}
    train(tmp_path, **labelled, precision="fp16", **targets)
    skipped = sum(r["skipped"] for r in records(tmp_path))
    assert capsys.readouterr().out.count(" skipped 1\n") == skipped
    assert 0 < skipped < 20
    assert last(tmp_path)["scaler"]["scale"] == 65536 / 2**skipped
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())
    made = {int(s["step"]) for s in last(tmp_path)["optimizer"]["state"].values()}
    assert made == {24 - skipped}


@pytest.mark.parametrize("bad, workers", [(2, 2), (3, 0)])
def test_unreadable_images(bad, workers, ask, tmp_path):
    """1 % of 200 images are replaced, in each epoch; more stop the run."""
    folder = tmp_path / "images"
    make_images(folder, 200, size=(12, 12))
    names = [f"{i:03d}.png" for i in (7, 70, 170)[:bad]]
    for i, name in enumerate(names):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"text" if i else content[: len(content) // 2])
    settings = {"guidance": "none", "epochs": 2, "batch_size": 50, "workers": workers}
    run = Process(ask, tmp_path / "out", TINY | settings | {"data": str(folder)})
    code, output, errors = run.wait()
    assert set(re.findall(r"\d+\.png", errors)) == set(names)
    assert "Traceback" not in errors
    if bad > 2:
        assert code == 1 and last(run.out)["step"] == 0
        assert re.search("^attg_mae.py: error: --data.* 1 %.* 3 ", errors, re.M)
    else:
        assert code == 0 and records(run.out)[-1]["unreadable"] == bad
        lines = [line for line in output.splitlines() if "img/s" in line]
        assert lines[-1].endswith(f"unreadable {bad}")


def test_evaluation_in_a_run_on_two_processes(distributed, whole):
    """The training of `distributed` is written out in test_reference_run.py."""
    ours, theirs = records(distributed, "knn"), records(whole(eval_every=2), "knn")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [12, 24]
    for a, b in zip(ours, theirs, strict=True):
        assert a["val_mse"] == pytest.approx(b["val_mse"], rel=1e-5)
        for name, value in b["knn"].items():
            # One of 15 images may turn over, but features in another order would be at
            # chance.
            assert abs(a["knn"][name] - value) <= 100 / 15 + 1e-3 and value > 50


EVALUATIONS = {
    "eval_knn": {"k": 5},
    "eval_linear mae": {"protocol": "mae", "epochs": 15, "batch_size": 8, "blr": 200},
    "eval_finetune": {"label_fraction": 1, "epochs": 12, "batch_size": 8, "blr": 0.05},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_by_two_processes(name, ask, labelled, distributed, tmp_path):
    """Each scores its share of the 15 test images, none twice; one of them writes."""
    program = Path(SCRIPT).with_name(f"{name.split()[0]}.py")
    script = [str(program), str(distributed / "encoder.pt")]
    settings = {"data": labelled["data"], "device": "cpu"} | EVALUATIONS[name]
    runs = [Process(ask, tmp_path / "one", settings, script=script)]
    runs += ranks(ask, tmp_path / "two", settings, script)
    ended = [run.wait() for run in runs]
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert ended[2][1] == ""  # rank 1 is silent
    (one,), (two,) = ((tmp_path / x).read_text().splitlines() for x in ("one", "two"))
    one, two = (json.loads(line)["results"] for line in (one, two))
    assert [r["feature"] for r in one] == [r["feature"] for r in two]
    right = [r["top-1"] * 15 / 100 for r in one + two]  # images
    assert all(n > 7.5 and abs(n - round(n)) < 1e-6 for n in right), right
    assert name != "eval_knn" or one == two


def test_two_machines_without_a_shared_folder(ask, labelled, whole, trained, tmp_path):
    """Rank 0 decides what is resumed, whatever is in a folder of that name elsewhere."""
    settings, out = TINY | labelled, tmp_path / "out"
    with stop_after(8):
        train(out, **labelled)
    there = shutil.copytree(trained, tmp_path / "there")
    files = content(there)
    runs = ranks(ask, out, settings, elsewhere={"out": there})
    assert [run.wait()[0] for run in runs] == [0, 0]
    a, b = ([row["loss"] for row in records(x)] for x in (out, whole()))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert content(there) == files
    # What rank 0 refuses ends both, and none waits for the other.
    runs = ranks(ask, out, settings | {"seed": 1}, elsewhere={"out": there})
    for code, _, errors in [run.wait() for run in runs]:
        assert code == 1 and f"{out / 'last.pt'} is of another run: --seed" in errors


def test_machines_with_other_images_are_refused(ask, labelled, tmp_path):
    """Ranks would train on other images, or other numbers of steps."""
    copy = shutil.copytree(labelled["data"], tmp_path / "data")
    for split in ("train", "test"):
        file = next(copy.glob(f"{split}/*/*.png"))
        content = file.read_bytes()
        file.unlink()
        settings = TINY | labelled | {"guidance": "none", "maps": None, "timeout": 0.2}
        runs = ranks(ask, tmp_path / split, settings, elsewhere={"data": copy})
        (code, _, _), (other, _, errors) = (run.wait() for run in runs)
        assert (
            (code, other) == (1, 1)
            and f"--data {copy}: " in errors
            and "rank 0" in errors
        )
        file.write_bytes(content)


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import attg_mae
from attg import trainer

def main():
    result = attg_mae.main()
    last = attg_mae.load_checkpoint(Path(result["out"], "last.pt"))
    print("saved", last["step"] == result["step"])
    return result

save = trainer.save_checkpoint
trainer.save_checkpoint = lambda *args, **parts: time.sleep(2) or save(*args, **parts)
attg_mae.run_cli(main)
"""


def test_signal_to_one_of_two_processes(ask, long, tmp_path):
    """They agree on the step after which both stop, and end when it is saved.

    torchrun passes on a signal that a rank may have received already, and kills all once
    one has exited.
    """
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(Path(SCRIPT).parent)))
    runs = ranks(ask, tmp_path / "out", long, [str(script)])
    assert runs[0].until(lambda: runs[0].steps() >= 5)
    for _ in range(2):
        os.kill(runs[1].pid, signal.SIGTERM)
        time.sleep(0.3)
    ended = [run.wait() for run in runs]
    assert [code for code, _, _ in ended] == [128 + signal.SIGTERM] * 2
    assert ended[1][1] == "saved True\n"
    step = last(tmp_path / "out")["step"]
    assert 5 <= step < 60 and step == records(tmp_path / "out")[-1]["step"]


def test_torchrun_stops_and_resumes(ask, long, finished, tmp_path):
    """Stopped by SIGTERM and resumed, it equals one process."""
    out, settings = tmp_path / "out", long | {"accum": 2}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv += ["--nproc_per_node=2", SCRIPT, *command(settings | {"out": str(out)})]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(argv, **pipes, cwd=tmp_path, env=environment) as launch:
        log = out / "log.jsonl"
        while launch.poll() is None and not (log.exists() and len(records(out)) >= 3):
            time.sleep(0.01)
        launch.send_signal(signal.SIGTERM)
        output, errors = launch.communicate()
    step = last(out)["step"]
    assert launch.returncode and 3 <= step < 60, errors
    assert len(records(out)) == step, errors
    assert output.count(f"stopped by a signal after step {step}") == 1
    runs = ranks(ask, out, settings)
    assert [run.wait()[0] for run in runs] == [0, 0]
    got, want = ([row["loss"] for row in records(x)] for x in (out, finished))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_command_from_elsewhere_without_git_or_terminal(labelled, tmp_path):
    (tmp_path / "bin").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "bin")}  # no git in it
    argv = command(TINY | labelled | {"epochs": 1})
    done = python(SCRIPT, *argv, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attg_mae.py: importing PyTorch\n")
    assert "attg_mae unknown, python" in done.stdout and "img/s" in done.stdout
    # No progress bars
    assert "\r" not in done.stdout
    assert done.stderr == ""
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data-vit_micro-attg"]
    files = {"config.json", "log.jsonl", "last.pt", "encoder.pt", "reconstructions.png"}
    folder = tmp_path / "out" / "data-vit_micro-attg"
    assert {p.name for p in folder.iterdir()} == files | {"curves.png"}


def test_importing_has_no_effect(tmp_path):
    """--help needs no torchvision, whose import takes as long as that of torch."""
    code = f"""
import signal, sys, torch
sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
before = signal.getsignal(signal.SIGINT), torch.get_rng_state(), torch.get_num_threads()
def query(*_): raise AssertionError("CUDA query")
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
    setattr(torch.cuda, name, query)
import attg_mae, bench, eval_knn, eval_linear, kernels, object_discovery
assert "torchvision" not in sys.modules
import eval_finetune
after = signal.getsignal(signal.SIGINT), torch.get_rng_state(), torch.get_num_threads()
assert before[0] == after[0] and before[1].equal(after[1]) and before[2] == after[2]
assert not torch.distributed.is_initialized()
"""
    done = python("-B", "-c", code, "--not_a_flag", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
