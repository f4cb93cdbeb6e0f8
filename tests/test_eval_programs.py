"""
common/evaluation.py: what the three evaluation programs have in common. Their files are
tried first, and they end without a traceback.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_finetune
import eval_knn
import eval_linear
from common.commandline import end
from common.evaluation import check_shots
from tests.helpers import ROOT
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
    assert run.until((tmp_path / "w.pt").exists)
    os.kill(run.pid, signal.SIGINT)
    code, out, err = run.wait()
    assert code == 130 and "Traceback" not in out + err
    assert err.endswith("eval_finetune.py: interrupted\n")
    assert torch.load(tmp_path / "w.pt")["step"] > 0
    assert not (tmp_path / "out.jsonl").exists()


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
