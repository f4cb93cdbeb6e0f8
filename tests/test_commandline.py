"""
Flags, their ranges, and how a program ends: attg/cli.py.
"""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._utils import ExceptionWrapper

import attg_mae
from attg import cli
from attg.cli import Parser, check_numbers, end, make_folder, progress, say
from attg.loader import make_loader
from tests.helpers import ROOT
from tests.processes import SCRIPT


def parser():
    result = Parser(prog="program.py")
    result.add_argument("--batch_size", type=int, default=1)
    result.add_argument("--mask_ratio", type=float, nargs="+")
    result.add_argument("--plain-name", action="store_true")
    group = result.add_argument_group("more")
    group.add_argument("--guidance", choices=("attg", "none"))
    return result


def test_hyphens_and_underscores_are_the_same():
    for flags in ("--batch_size 3 --plain-name", "--batch-size=3 --plain_name"):
        args = parser().parse_args(flags.split())
        assert (args.batch_size, args.plain_name) == (3, True)
    # Values stay as they are, negative numbers too.
    args = parser().parse_args("--mask-ratio -1 -2.5".split())
    assert args.mask_ratio == [-1, -2.5]


def test_flags_of_training_with_hyphens(monkeypatch):
    seen = []
    monkeypatch.setattr(attg_mae, "train", seen.append)
    attg_mae.main("--no-norm-pix --mask-ratio 0.5 --img-size 16 32".split())
    assert (seen[0].norm_pix, seen[0].mask_ratio) == (False, 0.5)
    assert seen[0].size == (16, 32)
    attg_mae.main("--norm_pix --img_size 16".split())
    assert seen[1].norm_pix and seen[1].img_size == 16


@pytest.mark.parametrize(
    "flags, first, second",
    [
        ("--bacth_size 3", "unrecognized arguments: --bacth_size 3", "--batch_size"),
        ("--bacth-size=3", "unrecognized arguments: --bacth-size=3", "--batch_size"),
        ("-guidance none", "unrecognized arguments: -guidance none", "--guidance"),
        ("--xyz 3", "unrecognized arguments: --xyz 3", None),
        ("--guidance no", "argument --guidance: invalid choice: ", None),
        ("--batch_size x", "argument --batch_size: invalid int value: ", None),
    ],
)
def test_a_mistake_is_answered_in_three_lines(flags, first, second, capsys):
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(flags.split())
    out, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert exit.value.code == 2 and out == ""
    assert lines[0].startswith(f"program.py: error: {first}")
    assert lines[1:-1] == ([f"Did you mean {second}?"] if second else [])
    assert lines[-1] == "python program.py --help lists every flag"


def test_ranges():
    """Of every flag with a number; both ends will do."""
    tables = cli.WHOLE_NUMBERS | cli.NUMBERS
    for name, (least, most) in tables.items():
        check_numbers({name: least})
        check_numbers({name: [most, least]})
        step = 1 if name in cli.WHOLE_NUMBERS else 1e-7 + abs(least) * 0.01
        for wrong in (least - step, math.nan, math.inf, -math.inf, "3", True):
            with pytest.raises(ValueError, match=f"^--{name} {wrong}: must"):
                check_numbers({name: wrong})
    check_numbers({"unknown": math.nan, "epochs": None, "accum": "auto"})
    # A program may have its own.
    with pytest.raises(ValueError, match="--epochs 0: must be at least 1"):
        check_numbers({"epochs": 0}, epochs=(1, 10))


def test_every_number_of_the_configuration_has_a_range():
    """So that no new flag is forgotten."""
    kinds = (int, float, tuple, int | None, float | None, int | tuple | None)
    ranged = {*cli.WHOLE_NUMBERS, *cli.NUMBERS}
    fields = dataclasses.fields(attg_mae.Config)
    assert {field.name for field in fields if field.type in kinds} <= ranged


def ending(main, **options):
    """Code or message by which the process would end."""
    with pytest.raises(SystemExit) as exit:
        end(main, **options)
    return exit.value.code


def raising(error):
    def main():
        raise error

    return main


def test_ends_with_a_line_and_a_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/where/program.py"])
    assert ending(lambda: None) == 0
    assert ending(lambda: [{"top-1": 3}]) == 0
    assert ending(lambda: {"stopped": None}) == 0
    assert ending(lambda: {"stopped": signal.SIGTERM}) == 143
    assert ending(raising(ValueError("--k 0"))) == "program.py: error: --k 0"
    assert ending(raising(OSError("full"))) == "program.py: error: full"
    # Of another pipe, say of a worker
    gone = BrokenPipeError(32, "Broken pipe")
    assert ending(raising(gone)) == "program.py: error: [Errno 32] Broken pipe"
    assert capsys.readouterr() == ("\n", "")
    assert ending(raising(KeyboardInterrupt()), interrupted="go on") == 130
    assert capsys.readouterr().err == "program.py: go on\n"
    with pytest.raises(RuntimeError, match="a fault of ours"):
        end(raising(RuntimeError("a fault of ours")))


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory"),
        (MemoryError(), "memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "[enforce fail] DefaultCPUAllocator: can't allocate memory",
        ),
    ],
    ids=["GPU", "Python", "CPU"],
)
def test_out_of_memory_names_what_helps(error, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    message = ending(raising(error), memory="raise --accum")
    assert message == f"program.py: error: out of memory ({words}); raise --accum"


def test_really_out_of_memory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    message = ending(lambda: torch.empty(2**60))
    assert "out of memory" in message and message.endswith("; lower --batch_size")


def start(*argv):
    """A program whose Ctrl-C is not ignored, as it may be in a background job."""

    def default():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *argv]
    return subprocess.Popen(command, cwd=ROOT, text=True, preexec_fn=default, **pipes)


def test_ctrl_c_during_the_imports(tmp_path):
    with start(SCRIPT, "--out", str(tmp_path / "out")) as run:
        maps = Path(f"/proc/{run.pid}/maps")
        while run.poll() is None and "torch" not in maps.read_text():
            pass
        run.send_signal(signal.SIGINT)
        assert run.communicate() == ("", "")
    # In a shell that is 130.
    assert run.returncode == -signal.SIGINT and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["say('x')", "print('x')", "print('x'), exit()"])
def test_closed_pipe(words):
    """As of `python attg_mae.py | head -n 1`, also where the last words are too late."""
    imports = "from attg.cli import end, say"
    with start("-c", f"{imports}; input(); end(lambda: [{words}])") as run:
        run.stdout.close()
        run.stdin.write("go\n")
        run.stdin.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


def test_without_tqdm(monkeypatch, capsys):
    """Lines are enough."""
    assert list(progress(range(3), desc="x")) == [0, 1, 2]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    steps = range(3)
    assert progress(steps, desc="x") is steps
    say("a line")
    assert capsys.readouterr().out == "a line\n"


def raising_in_worker(error):
    """As a DataLoader does, whose wrapper this is; a loader itself takes 10 s to end."""

    def main():
        try:
            raise error
        except Exception:
            caught = ExceptionWrapper(where="in DataLoader worker process 0")
        caught.reraise()

    return main


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("--data: of 4 pictures: none"), "--data: of 4 pictures: none"),
        (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
        (ValueError("first line\nlast line"), "last line"),
    ],
)
def test_errors_of_workers_are_one_line(error, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    assert ending(raising_in_worker(error)) == f"program.py: error: {words}"
    # A fault of ours keeps its traceback.
    with pytest.raises(KeyError, match="Original Traceback"):
        end(raising_in_worker(KeyError("x")))


class Killed(torch.utils.data.Dataset):
    """Its workers end without a word."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_workers_say_what_helps(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    message = ending(lambda: list(make_loader(Killed(), workers=1)))
    assert re.fullmatch(r"program.py: error: DataLoader worker \(pid.*", message)
    assert message.endswith("fewer --workers, or --workers 0") and "\n" not in message


def test_commands_of_modules(capsys):
    with pytest.raises(SystemExit):
        Parser(prog="python -m docs.idea").parse_args(["--x"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "python -m docs.idea --help lists every flag"
    text = "Two\n\n    lines"
    assert text in Parser(description=text).format_help()


def test_folders_name_their_flag(tmp_path):
    make_folder("out", tmp_path / "a" / "b")
    make_folder("out", tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=f"--out {path}: this folder cannot be made"):
            make_folder("out", path)


PROGRAMS = [path for path in ROOT.glob("*.py") if path.name[:4] not in ("conf", "test")]
PROGRAMS += [
    ROOT / "attg/toy.py",
    ROOT / "docs/idea.py",
    ROOT / "docs/walkthrough.py",
]


@pytest.mark.parametrize("path", PROGRAMS, ids=[path.name for path in PROGRAMS])
def test_every_program_begins_and_ends_alike(path):
    text = path.read_text()
    first, last = text.split('\nif __name__ == "__main__":\n')[1:]
    assert "    ignore_sigint_during_import()\n" in first
    assert last.strip().startswith("end(main") and last.strip().endswith(")")
    assert not re.search(r"^import|^from", text[: text.index("__name__")], re.M)


def test_nothing_is_there_twice():
    """Parsers and progress bars are made in one file."""
    made = []
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        text = path.read_text()
        if path.parent.name != "tests" and re.search(
            r"import tqdm|ArgumentParser", text
        ):
            made.append(path.name)
    assert made == ["cli.py"]
