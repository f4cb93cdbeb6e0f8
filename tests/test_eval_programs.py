"""
attg/evaluation.py: what the three evaluation programs have in common. Their files are
tried first, and they end without a traceback.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attg_mae
import eval_finetune
import eval_knn
import eval_linear
import object_discovery
from attg.cli import end
from attg.datasets import open_data
from attg.evaluation import check_shots
from tests.fuzz import within
from tests.helpers import ROOT, SMALL
from tests.processes import Process

PROGRAMS = [eval_knn, eval_linear, eval_finetune]
NAMES = [program.__name__ for program in PROGRAMS]


OUTPUTS = [(program, "out") for program in PROGRAMS]
OUTPUTS += [(eval_knn, "save_features"), (eval_linear, "save_features")]
OUTPUTS += [(eval_linear, "save"), (eval_finetune, "save")]


@pytest.mark.parametrize(("program", "flag"), OUTPUTS)
def test_outputs_are_tried_before_the_work(program, flag, wrong, labelled):
    flags = ["--data", labelled["data"], "--device", "cpu"]
    if program is eval_linear and flag == "save":
        flags += ["--protocol", "mae"]
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    # The weights are missing as well: nobody has looked for them yet.
    for path in ("text.pt/x", "folder"):
        with pytest.raises(OSError, match=f"--{flag} {path}: cannot be written .*"):
            program.main(["missing.pt", *flags, f"--{flag}", path])
    assert sorted(Path().rglob("*")) == before
    with pytest.raises((ValueError, OSError), match="missing.pt"):
        program.main(["missing.pt", *flags, f"--{flag}", "deep/new"])
    assert not Path("deep/new").exists()
    # Without the flag no folder is made for a name that is wrong.
    with pytest.raises((ValueError, OSError), match="nowhere/missing.pt"):
        program.main(["nowhere/missing.pt", *flags])
    assert not Path("nowhere").exists()


def test_trying_leaves_what_is_there(encoder, labelled, tmp_path):
    kept = tmp_path / "results.jsonl"
    kept.write_text("a line\n")
    flags = ["--data", labelled["data"], "--device", "cpu", "--out", str(kept)]
    eval_knn.main([encoder, *flags])
    first, second = kept.read_text().splitlines()
    assert first == "a line" and second.startswith('{"settings"')


def test_check_shots(capsys):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, -1])
    check_shots(labels, [1, 2], rank=0)
    words = "--shots 2: 1 of 3 classes have fewer images, the smallest 1;"
    assert capsys.readouterr().out.startswith(words)
    check_shots(labels, [2], rank=1)
    assert capsys.readouterr().out == ""
    for bad, shots in ((labels, 0), (labels[labels != 1], 1), (labels[-1:], 1)):
        with pytest.raises(ValueError, match=f"--shots {shots} of .* classes"):
            check_shots(bad, [shots], rank=0)


def test_ctrl_c_in_a_run(ask, encoder, labelled, tmp_path):
    script = (ROOT / "eval_finetune.py", encoder)
    settings = {"data": labelled["data"], "device": "cpu", "epochs": 10**6}
    settings |= {"batch_size": 8, "save": tmp_path / "w.pt"}
    run = Process(ask, tmp_path / "out.jsonl", settings, script=[*map(str, script)])
    log = run.logs / "stdout"
    # From the second epoch on the file of the first is there.
    assert run.until(lambda: log.exists() and "epoch 2/" in log.read_text())
    os.kill(run.pid, signal.SIGINT)
    code, out, err = run.wait()
    assert code == 130 and "Traceback" not in out + err
    assert err.endswith("eval_finetune.py: interrupted\n")
    steps = torch.load(tmp_path / "w.pt")["step"]
    assert steps > 0 and steps % (len(open_data(labelled["data"])) // 8) == 0
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("program", [eval_knn, object_discovery, attg_mae])
def test_a_process_that_does_not_come(program, tmp_path, monkeypatch):
    """The other one gives it up after --timeout, and names the flag."""
    monkeypatch.chdir(tmp_path)
    checkpoint = ["none.pt"] if program is eval_knn else []
    place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for key, value in place.items():
        monkeypatch.setenv(key, str(value))
    began = time.perf_counter()
    with within(60), pytest.raises(ConnectionError, match="--timeout 0.01: .* all 2 "):
        program.main([*checkpoint, "--device", "cpu", "--timeout", "0.01"])
    assert time.perf_counter() - began > 0.5
    assert not torch.distributed.is_initialized() and not list(tmp_path.iterdir())


def test_ctrl_c_in_the_imports():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = []
    for name in NAMES:
        command = [sys.executable, f"{name}.py", "--help"]
        runs.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
    for run in runs:
        # From here on torch takes seconds to load.
        maps = Path(f"/proc/{run.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert run.poll() is None
            time.sleep(0.005)
        run.send_signal(signal.SIGINT)
    for run in runs:
        assert run.communicate() == ("", "") and run.returncode == -signal.SIGINT


def test_closed_pipe():
    """In a forked process, which need not import anything."""
    reading, writing = os.pipe()
    os.close(reading)
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            os.dup2(writing, 1)
            sys.stdout = open(1, "w")
            end(lambda: print("a line"))
        except SystemExit as exit_:
            # As Python does at exit
            sys.stdout.flush()
            code = exit_.code
        finally:
            os._exit(code)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 141


@pytest.mark.parametrize("program", PROGRAMS)
def test_unreadable_pictures(program, encoder, labelled, tmp_path, capsys):
    """One is replaced and named; more than 1 % end the evaluation."""
    data = shutil.copytree(labelled["data"], tmp_path / "data")
    argv = [encoder, "--data", str(data), "--device", "cpu"]
    if program is not eval_knn:
        argv += ["--epochs", "1"]
    for bad, count in (("000.png", 1), ("001.png", 2)):
        path = data / "test" / "g" / bad
        path.write_bytes(b"no picture")
        if count == 1:
            assert len(program.main(argv)) >= 1
        else:
            with pytest.raises(ValueError, match="2 of 15 images are unreadable"):
                program.main(argv)
        assert capsys.readouterr().err.count(f"replaces it: {path} (") == 1


def test_large_pictures_are_refused(encoder, labelled):
    argv = [encoder, "--data", labelled["data"], "--device", "cpu", "--max-pixels"]
    assert eval_knn.main([*argv, str(48 * 40)])
    with pytest.raises(ValueError, match="none of the 25 .*above --max_pixels 1919"):
        eval_knn.main([*argv, "1919"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_data_sets_of_ones_own(program, encoder, labelled, tmp_path):
    """The figures of their files; the name stands in the results."""
    own = {}
    for split in ("train", "test"):
        files = open_data(labelled["data"], split)
        own[split] = [files.read(i) for i in range(len(files))]
    argv = [encoder, "--device", "cpu", "--out", str(tmp_path / "o.jsonl")]
    if program is not eval_knn:
        argv += ["--epochs", "1"]
    want = program.main([*argv, "--data", labelled["data"]])
    assert program.main([*argv, "--data", "mine"], own) == want
    last = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])
    assert last["settings"]["data"] == "mine"
    with pytest.raises(ValueError, match="needs a name of its own, .* --data NAME"):
        program.main(argv, own)
    with pytest.raises(ValueError, match="needs labelled"):
        program.main([*argv, "--data", "mine"], own["train"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_test_sets_of_a_folder_of_classes(program, encoder, labelled, tmp_path):
    """--data and --val of the layout CLASS/*.png, without train/ and test/."""
    argv = [encoder, "--device", "cpu", "--out", str(tmp_path / "o.jsonl")]
    if program is not eval_knn:
        argv += ["--epochs", "1"]
    want = program.main([*argv, "--data", labelled["data"]])
    val = f"{labelled['data']}/test"
    rows = program.main([*argv, "--data", f"{labelled['data']}/train", "--val", val])
    assert {row.pop("test") for row in rows} == {val}
    assert rows == [{k: v for k, v in row.items() if k != "test"} for row in want]
    with pytest.raises(ValueError, match="needs labelled images.* for --val"):
        program.main([*argv, "--data", val])


@pytest.mark.parametrize("program", PROGRAMS)
def test_grey_encoders_see_grey_pictures(program, labelled, tmp_path, monkeypatch):
    grey = {"in_chans": 1, "mean": (0.5,), "std": (0.25,)}
    model = attg_mae.build_model(attg_mae.Config(**SMALL | grey))
    config = dataclasses.asdict(model.cfg)
    encoder = str(tmp_path / "grey.pt")
    attg_mae.save_checkpoint(encoder, model=model.state_dict(), config=config)
    seen, normalize = [], attg_mae.normalize

    def spy(imgs, cfg):
        seen.append(imgs)
        return normalize(imgs, cfg)

    monkeypatch.setattr(attg_mae, "normalize", spy)
    argv = [encoder, "--data", labelled["data"], "--device", "cpu"]
    if program is not eval_knn:
        argv += ["--epochs", "1"]
    assert program.main(argv)
    picture = open_data(labelled["data"], "test", 32, channels=1)[0].image
    pictures = torch.cat(seen)
    assert pictures.shape[1] == 1 and any(x.equal(picture) for x in pictures)


IDLE = [
    (eval_knn, "encoder.pt --gnd x", "--gnd: does nothing without --retrieval"),
    (eval_knn, "--features x --val y", "--val: does nothing beside --features"),
    (eval_knn, "x --features y", "checkpoint: does nothing beside --features"),
    (eval_knn, "x --retrieval roxford5k --k 3", "--k: does nothing beside --retrieval"),
    (eval_linear, "--features x --img-size 32", "--img_size: does nothing beside"),
    (eval_linear, "--features x --save_features y", "--save_features: does nothing"),
]


@pytest.mark.parametrize(("program", "flags", "words"), IDLE)
def test_flags_that_do_nothing_are_refused(program, flags, words):
    with pytest.raises(ValueError, match=f"^{words}.*; leave it out$"):
        program.main(flags.split())
