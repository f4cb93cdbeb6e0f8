"""
attg/checkpoint.py and the lock of a run: damaged and hostile files, two runs at once.
"""

import contextlib
import errno
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from PIL import Image

import attg_mae
import eval_finetune
import eval_linear
import object_discovery
from attg import distributed
from attg.checkpoint import (
    check_resume,
    load_state,
    read_run,
    restore,
)
from attg.distributed import exclusive_run
from attg.figures import save_sheet
from attg.finetuning import read_saved, save
from attg.log import Log, log_line
from tests.fuzz import RANDOM, damaged_checkpoint, within
from tests.helpers import TINY, same, train
from tests.processes import ranks


def resumed(path, cfg):
    """[weights, moments] with which a run resumes."""
    cfg = replace(cfg, resume=str(path))
    parts = read_run(path)
    check_resume(cfg, parts, 10**6)
    model = attg_mae.build_model(cfg)
    load_state(model, parts["model"], path)
    groups = attg_mae.param_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    restore(optimizer, torch.amp.GradScaler("cpu"), parts)
    # Hyperparameters of the file are not used, whatever they are.
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    return [model.state_dict(), optimizer.state_dict()["state"]]


def load_parts(path):
    """The content of a file of save_checkpoint, without its checksums."""
    parts = torch.load(path, weights_only=True)
    del parts["checksums"]
    return parts


@pytest.fixture(scope="module")
def small(labelled, tmp_path_factory):
    """(Config, path of last.pt) of a run of two steps with a model of width 8."""
    out = tmp_path_factory.mktemp("small") / "out"
    settings = TINY | labelled | {"guidance": "none", "maps": None, "epochs": 1}
    settings |= {"width": 8, "decoder_width": 8, "batch_size": 12, "out": str(out)}
    cfg = attg_mae.Config(**settings)
    attg_mae.train(cfg)
    return attg_mae.resolve(cfg), out / "last.pt"


@given(rng=RANDOM)
def test_damaged_checkpoints(small, tmp_path, rng):
    """Loading gives the same weights and moments, or one error that names the file."""
    cfg, path = small
    damaged = tmp_path / "a.pt"
    kind, content = damaged_checkpoint(path.read_bytes(), rng)
    damaged.write_bytes(content)
    for read in (
        lambda path: resumed(path, cfg),
        lambda path: attg_mae.load_encoder(path).state_dict(),
    ):
        try:
            with within(20):
                got = read(damaged)
        except (ValueError, OSError) as error:
            assert str(damaged) in str(error)
        else:
            # Tensors that have changed places are always noticed. The oldest format has
            # no checksums.
            assert kind != "swap" and (kind == "old" or same(got, read(path)))


@pytest.mark.parametrize("change", [{"step": 4}, {"step": True}, {"settings": 1}])
def test_damaged_files_of_save(change, tmp_path):
    """A probe or fine-tuning stops with one error that names the file."""
    path, model, settings = tmp_path / "w.pt", torch.nn.Linear(3, 2), {"epochs": 3}
    save(path, model, torch.optim.AdamW(model.parameters()), settings, 1, "ab")
    assert read_saved(path, settings, 3)["step"] == 1
    parts = load_parts(path)
    for wrong in (parts | change, {k: x for k, x in parts.items() if k not in change}):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=f"{path}: "):
            read_saved(path, settings, 3)


SCALER = torch.amp.GradScaler("cpu").state_dict()
FOREIGN = {  # what the error names: change of the states, of AdamW's parameter 3
    "parameter 3: exp_avg": {"exp_avg": torch.zeros(1)},
    "parameter 3: exp_avg_sq": {"exp_avg_sq": torch.zeros(32, dtype=torch.float64)},
    "parameter 3: exp_avg is not finite": {"exp_avg": torch.full((24, 8), math.nan)},
    "parameter 3: step": {"step": torch.tensor(3.0)},
    "state of 1 parameters": {},
    "only one has .*extra": {"extra": torch.zeros(2)},
    "scaler: scale must be": {"scale": -1.0},
    "scaler: growth_factor must be": {"growth_factor": math.inf},
}


@pytest.mark.parametrize("message", FOREIGN)
def test_states_of_another_run(message, small, tmp_path):
    """PyTorch's fused AdamW would write beyond the end of a moment that is too small."""
    (cfg, path), change = small, FOREIGN[message]
    parts = load_parts(path)
    state = parts["optimizer"]["state"]
    if "parameter 3" in message:
        state[3] |= change
    elif "extra" in message:
        parts["model"] |= change
    elif "scaler" in message:
        parts["scaler"] = SCALER | change
    else:
        parts["optimizer"]["state"] = {0: state[0]}
    torch.save(parts, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        resumed(tmp_path / "a.pt", cfg)


def test_small_files_of_large_tensors_and_endless_lists(tmp_path):
    path, endless, twice = tmp_path / "a.pt", [], []
    endless.append(endless)
    for _ in range(40):
        twice = [twice, twice]
    for x, message in (
        (torch.zeros(8).expand(10**7, 8), "has the shape .* but 32 bytes"),
        (torch.zeros(10**9, device="meta"), "on the device meta"),
        (torch.zeros(4, 4).to_sparse(), "is a torch.sparse_coo tensor"),
        (endless, "too many values"),
        (twice, "too many values"),
    ):
        torch.save({"a": x}, path)
        assert path.stat().st_size < 10**6
        with (
            within(20),
            pytest.raises(ValueError, match=rf"a\.pt: damaged: .*{message}"),
        ):
            attg_mae.load_checkpoint(path)


def test_checksums_cover_names_types_and_shapes(tmp_path):
    """Bytes, names and values may each stay the same while another changes."""
    w = torch.arange(6, dtype=torch.float32).view(2, 3)
    path, parts = tmp_path / "a.pt", {"w": w, "m": 1, "n": 2}
    attg_mae.save_checkpoint(path, **parts)
    assert same(attg_mae.load_checkpoint(path), parts)
    checksums = torch.load(path)["checksums"]
    for changed in (
        parts | {"w": w.view(torch.int32)},
        parts | {"w": w.view(3, 2)},
        parts | {"w": w + 1},
        {"w": w, "m": 1, "x": 2},
        {"x": w, "m": 1, "n": 2},
        {"w": w, "m": 1},
        {"m": 1, "n": 2},
    ):
        torch.save(changed | {"checksums": checksums}, path)
        with pytest.raises(ValueError, match="changed since they were written"):
            attg_mae.load_checkpoint(path)


def test_links_are_followed_and_devices_refused(tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "last.pt", tmp_path / "disk" / "last.pt"
    link.symlink_to(target)
    for step in (1, 2):
        attg_mae.save_checkpoint(link, step=step)
        assert link.is_symlink() and attg_mae.load_checkpoint(target) == {"step": step}
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "null", tmp_path / "disk"):
        with pytest.raises(ValueError, match=f"{path}: a folder or device"):
            attg_mae.save_checkpoint(path, step=1)
    with pytest.raises(ValueError, match="disk: a folder; .* such as last.pt"):
        attg_mae.load_checkpoint(tmp_path / "disk")
    flags = ["x.pt", "--save", str(tmp_path / "null"), "--device", "cpu"]
    with pytest.raises(OSError, match="--save .*null: not writable"):
        eval_finetune.main(flags)
    assert Path("/dev/null").is_char_device()
    assert not list(tmp_path.glob("**/*.tmp"))


def test_full_disks_are_named(tmp_path, monkeypatch):
    """Errors of writing name no file by themselves; the earlier file stays."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    sheet = tmp_path / "sheet.png"
    columns = [("image", torch.rand(2, 3, 16, 16))]
    save_sheet(sheet, columns)
    content = sheet.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left on device: .*sheet.png"):
        save_sheet(sheet, columns)
    assert sheet.read_bytes() == content
    log = tmp_path / "log.jsonl"
    log.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*log.jsonl"):
        Log(True, [], [], log).write({"step": 1}, "a line")
    full = open("/dev/full", "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="on device: 'standard output'"):
            log_line("a line")
    with pytest.raises(OSError):
        full.close()


def test_file_systems_without_fsync(tmp_path, monkeypatch):
    path, number = tmp_path / "a.pt", [errno.EINVAL]

    def fail(_):
        raise OSError(number[0], "Invalid argument")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(UserWarning, match="fsync: Invalid argument"):
        attg_mae.save_checkpoint(path, step=1)
    number[0] = errno.EIO
    with pytest.raises(OSError, match=f"{path} could not be written"):
        attg_mae.save_checkpoint(path, step=2)
    assert attg_mae.load_checkpoint(path) == {"step": 1}


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(f"process {os.getpid()} on a machine", end="", file=file, flush=True)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def holder(lock, seconds):
    """A process that holds the lock during the block, for so many seconds at most."""
    argv = [sys.executable, "-c", HOLD, str(lock), str(seconds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_locked(tmp_path, monkeypatch, capsys):
    lock = tmp_path / "new" / ".lock"
    with exclusive_run(lock, "--out new"):
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []  # nothing was written there
    lock.parent.mkdir()
    with holder(lock, 20) as process:
        message = f"--out new: process {process.pid} on a machine"
        with (
            pytest.raises(ValueError, match=message),
            exclusive_run(lock, "--out new"),
        ):
            raise AssertionError("two at once")
        process.kill()
        process.wait()
        # A lock ends with its process.
        with exclusive_run(lock, "--out new"):
            pass
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as patch, holder(lock, 1):
            patch.setenv(name, "1")
            began = time.monotonic()
            with exclusive_run(lock, "--out new"):
                assert time.monotonic() - began > 0.3
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(distributed, "fcntl", None)
    with exclusive_run(lock, "--out new"):
        pass
    assert "--out new: not locked" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others(number, ask, long, tmp_path):
    runs = ranks(ask, tmp_path / "out", long | {"timeout": 0.05})
    assert runs[0].until(lambda: runs[0].steps() >= 3)
    os.kill(runs[1].pid, number)
    code, _, errors = runs[0].wait()
    assert code == 1 and "Traceback" not in errors
    assert "rank 0 ends: one of 2 ranks has exited, or has not answered" in errors
    os.kill(runs[1].pid, signal.SIGKILL)
    runs[1].wait()


def test_outputs_are_locked(labelled, copy, trained, tmp_path, monkeypatch):
    out, settings = copy
    with holder(out / ".lock", 30), pytest.raises(ValueError, match=f"{out}: process"):
        train(**settings)
    monkeypatch.chdir(tmp_path)
    data = ["--data", labelled["data"], "--device", "cpu"]
    with holder("m.npy.lock", 30), pytest.raises(ValueError, match="--out m.npy: proc"):
        object_discovery.main([*data, "--backbone", "pixels", "--out", "m.npy"])
    probe = [str(trained / "last.pt"), *data, "--protocol", "mae", "--save", "p.pt"]
    with holder("p.pt.lock", 30), pytest.raises(ValueError, match="--save p.pt: proc"):
        eval_linear.main(probe)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.pt"))
