"""
Flags generated from dataclasses, their ranges, and how a program exits: attg/cli.py.
"""

import ast
import dataclasses
import importlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from attg.checkpoint import load_checkpoint, save_checkpoint
from attg.cli import (
    WORKER_KILLED,
    DataFlags,
    RunFlags,
    check_unused,
    field_types,
    flag,
    parse,
    resume_class,
    run_cli,
    validate,
)
from attg.loader import make_loader
from attg.log import progress
from tests.helpers import ROOT
from tests.processes import SCRIPT


@dataclasses.dataclass(kw_only=True)
class Settings(DataFlags, RunFlags):
    """Flags of each kind."""

    batch_size: int = flag(1, "images", 1, 64)
    accum: int | None = flag(None, "steps", 1, 8)
    ratios: tuple[float, ...] = flag((0.5,), "several", 0, 1)
    guidance: str = flag("attg", "mode", choices=("attg", "none"), resume="free")
    norm_pix: bool = flag(True, "normalize")
    checkpoint: str | None = flag(None, "a file", positional=True)


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/program.py"])


def test_flags_are_generated_from_fields(capsys):
    assert parse(Settings, "", []) == Settings()
    command = "x.pt --batch_size=3 --accum 2 --ratios 1 0.25 --no-norm_pix"
    expected = {"checkpoint": "x.pt", "batch_size": 3, "accum": 2}
    expected |= {"ratios": (1.0, 0.25), "norm_pix": False}
    assert parse(Settings, "", command.split()) == Settings(**expected)
    assert resume_class(Settings, "fixed") == {"data", "classes", "white"}
    with pytest.raises(SystemExit):
        parse(Settings, "Two\n\n    lines", ["--help"])
    text = capsys.readouterr().out
    order = ["Two\n\n    lines", "--device", "--data", "[0.5]", "[attg]", "--norm_pix"]
    assert [text.index(x) for x in order] == sorted(text.index(x) for x in order)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--bacth_size 3", "unrecognized arguments: --bacth_size"),
        ("--ratio 1", "unrecognized arguments: --ratio"),
        ("--guidance no", "argument --guidance: invalid choice: "),
        ("--batch_size x", "argument --batch_size: invalid int value: "),
        ("--data=", "--data: is empty"),  # --data="$UNSET"
    ],
)
def test_mistakes_are_named_in_two_lines(flags, message, program, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Settings, "", flags.split())
    out, errors = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    first, second = errors.splitlines()
    assert "program.py" in first and "--help" in first
    assert second.startswith(f"program.py: error: {message}")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"guidance": "no"}, "--guidance no: must be one of attg, none"),
        ({"guidance": 3}, "--guidance 3: must be one of"),
        ({"data": 3}, "--data 3: must be a string"),
        ({"norm_pix": 1}, "--norm_pix 1: must be true or false"),
        ({"batch_size": True}, "--batch_size True: must be a whole number"),
        ({"ratios": (0.5, "x")}, "--ratios x: must be a number from 0 to 1"),
        ({"accum": 9}, "--accum 9: must be a whole number from 1 to 8"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        validate(Settings(**wrong))


def test_values_become_plain(tmp_path):
    """So that a checkpoint that holds them loads."""
    numbers = np.array([0.25, 1.0])
    wanted = Settings(batch_size=3, ratios=(0.25, 1.0), data="here", white=0.5)
    given = {"batch_size": np.int64(3), "ratios": tuple(numbers), "data": Path("here")}
    settings = Settings(**given, white=np.float32(0.5))
    validate(settings)
    save_checkpoint(tmp_path / "a.pt", config=dataclasses.asdict(settings))
    config = load_checkpoint(tmp_path / "a.pt")["config"]
    assert config == dataclasses.asdict(wanted)
    kinds = [type(x) for x in (config["batch_size"], *config["ratios"])]
    assert kinds == [int, float, float]


def test_flags_without_effect_are_refused():
    settings = Settings(batch_size=2, checkpoint="x.pt")
    check_unused(settings, ["accum", "ratios"], "not used")
    for name, shown in (("batch_size", "--batch_size"), ("checkpoint", "checkpoint")):
        with pytest.raises(ValueError, match=f"^{shown}: not used; leave it out"):
            check_unused(settings, ["accum", name], "not used")


PROGRAMS = {"attg_mae": "Config", "object_discovery": "Settings"}
PROGRAMS |= dict.fromkeys(
    ("eval_knn", "eval_retrieval", "eval_linear", "eval_finetune", "study", "bench"),
    "Settings",
)


def settings_class(program):
    return getattr(importlib.import_module(program), PROGRAMS[program])


def numeric_fields(kind):
    fields = [field for field in dataclasses.fields(kind) if field.metadata]
    return [f for f in fields if field_types(f)[1] in (int, float)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_has_a_range(program):
    """Both ends of it are valid; what lies beyond, NaN and text are refused by name."""
    fields = numeric_fields(settings_class(program))
    assert fields
    for field in fields:
        low, high = field.metadata["low"], field.metadata["high"]
        several = tuple in field_types(field)[0]
        one = (field.name, field.type, field.default)
        kind = dataclasses.make_dataclass("One", [one])
        kind.__dataclass_fields__[field.name].metadata = field.metadata
        for right in (low, high):
            validate(kind((right, right) if several else right))
        for wrong in (low - max(1, abs(low)), 2 * high + 1, math.nan, -math.inf, True):
            message = re.escape(f"--{field.name} {wrong}: must")
            with pytest.raises(ValueError, match=message):
                validate(kind((low, wrong) if several else wrong))
        with pytest.raises(ValueError, match=f"--{field.name} .*: must"):
            parse(kind, "", [f"--{field.name}={2 * high + 1}"])


def test_flags_with_choices():
    """parse and validate refuse other values, see above."""
    fields = [f for x in PROGRAMS for f in dataclasses.fields(settings_class(x))]
    names = "benchmark device guidance map_norm method model precision protocol sign"
    names = {*names.split(), "tau_schedule", "verify"}
    assert {f.name for f in fields if f.metadata.get("choices")} == names


def exit_of(result, **options):
    """Exit code or message of run_cli; result: a function, or the error that main raises."""

    def main():
        raise result

    with pytest.raises(SystemExit) as exit:
        run_cli(result if callable(result) else main, **options)
    return exit.value.code


def test_exit_codes(program, capsys):
    assert exit_of(lambda: None) == 0
    assert exit_of(lambda: {"stopped": None}) == 0
    assert exit_of(lambda: {"stopped": signal.SIGTERM}) == 143
    assert exit_of(ValueError("--k 0")) == "program.py: error: --k 0"
    # A pipe other than stdout, such as a worker's.
    broken = BrokenPipeError(32, "Broken pipe")
    assert exit_of(broken) == "program.py: error: [Errno 32] Broken pipe"
    assert capsys.readouterr() == ("\n", "")
    assert exit_of(KeyboardInterrupt(), interrupted="go on") == 130
    assert capsys.readouterr().err == "program.py: go on\n"
    assert exit_of(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    with pytest.raises(RuntimeError, match="a bug"):
        exit_of(RuntimeError("a bug"))


def test_out_of_memory_names_a_remedy(program):
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to")
    for result, reason in (
        (gpu, "CUDA out of memory"),
        (MemoryError(), "memory"),
        (lambda: torch.empty(2**60), ".*"),
    ):
        message = exit_of(result, memory_hint="raise --accum")
        expected = rf"program.py: error: out of memory \({reason}\); raise --accum"
        assert re.fullmatch(expected, message)


def start(*argv):
    """A program whose Ctrl-C is not ignored, as it may be in a background job."""

    def default():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *argv]
    return subprocess.Popen(command, cwd=ROOT, text=True, preexec_fn=default, **pipes)


def test_ctrl_c_during_the_imports(tmp_path):
    with start(SCRIPT, "--out", str(tmp_path / "out")) as run:
        # Torch is imported after it.
        assert run.stdout.readline() == "attg_mae.py: importing PyTorch\n"
        run.send_signal(signal.SIGINT)
        assert run.communicate() == ("", "")
    # A shell reports 130.
    assert run.returncode == -signal.SIGINT and not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["log_line('x')", "print('x')", "print('x'), exit()"])
def test_closed_pipe(code):
    """As in `python attg_mae.py | head -n 1`, also if the output comes at exit."""
    imports = "from attg.cli import run_cli; from attg.log import log_line"
    with start("-c", f"{imports}; input(); run_cli(lambda: [{code}])") as run:
        run.stdout.close()
        run.stdin.write("go\n")
        run.stdin.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


def test_progress_without_a_terminal(monkeypatch, capsys):
    """Lines after 5 s and after twice as long, on rank 0 and with a description."""
    monkeypatch.setattr(
        sys.modules["attg.log"].time, "monotonic", itertools.count().__next__
    )
    assert list(progress(range(20), desc="maps")) == list(range(20))
    assert capsys.readouterr().out.splitlines() == [
        "maps: 4 of 20, 20 s left",
        "maps: 14 of 20, 6 s left",
    ]
    steps = range(3)
    assert progress(steps) is steps
    monkeypatch.setenv("RANK", "1")
    assert progress(steps, desc="x") is steps


def raising_in_worker(error):
    """Raise as a DataLoader does; a loader itself takes 10 s to end."""

    def main():
        try:
            raise error
        except Exception:
            caught = ExceptionWrapper(where="in DataLoader worker process 0")
        caught.reraise()

    return main


def test_errors_of_workers_are_one_line(program):
    for error, line in (
        (ValueError("--data: of 4 images: none"), "--data: of 4 images: none"),
        (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
    ):
        assert exit_of(raising_in_worker(error)) == f"program.py: error: {line}"
    # A bug keeps its traceback.
    with pytest.raises(KeyError, match="Original Traceback"):
        exit_of(raising_in_worker(KeyError("x")))


class Killed(torch.utils.data.Dataset):
    """Its workers are killed."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_workers_name_a_remedy(program):
    message = exit_of(lambda: list(make_loader(Killed(), workers=1)))
    assert message == f"program.py: error: {WORKER_KILLED}" and "--workers" in message
    # If it dies while it sends an image, the error comes from a pipe.
    scope = {}
    receive = (
        "def receive(): raise ConnectionResetError(104, 'Connection reset by peer')"
    )
    fetch = "def fetch(): receive()"
    for code, path in (
        (receive, "multiprocessing/x.py"),
        (fetch, "data/dataloader.py"),
    ):
        exec(compile(code, f"/lib/{path}", "exec"), scope)
    assert exit_of(scope["fetch"]) == message
    assert "Connection reset" in exit_of(scope["receive"])


SCRIPTS = [ROOT / f"{name}.py" for name in PROGRAMS if name != "attg_mae"]


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_every_program_begins_and_ends_alike(path):
    """Ctrl-C is quiet from the first import on, and errors are one line."""
    docstring, first, *_, last = ast.parse(path.read_text()).body
    assert "quiet_sigint_during_import()" in ast.unparse(first)
    last = ast.unparse(last)
    assert last.startswith("if __name__ == '__main__':") and "run_cli(main" in last
