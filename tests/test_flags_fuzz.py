"""
Numbers of all kinds for the numeric flags of all programs: settings, or an error that
names the flag; never another error.
"""

import argparse
import random
import re

import pytest

import attg_mae
import bench
import eval_finetune
import eval_knn
import eval_linear
import object_discovery
import study
from attg.cli import NUMBERS, WHOLE_NUMBERS, Parser, parse_settings

NUMERIC = {*WHOLE_NUMBERS, *NUMBERS, "seeds", "lrs", *bench.RANGES}
VALUES = ("0", "-1", "1", "2", "7", "0.5", "1e300", "-1e300", "nan", "inf", "-inf")
VALUES += (
    "1e-300",
    "x",
    "",
    "9" * 30,
    "1e9",
    "1000000000",
    "0x10",
    "1_000",
    "½",
    "auto",
)

# The flags without which a program asks for something else, and its reader of flags.
PROGRAMS = {
    "attg_mae": ([], lambda argv: parse_settings(attg_mae.Config, "", argv)),
    "eval_knn": (["encoder.pt"], eval_knn.arguments),
    "eval_linear": (["encoder.pt"], eval_linear.arguments),
    "eval_finetune": (["encoder.pt"], eval_finetune.arguments),
    "object_discovery": (["--backbone", "pixels"], object_discovery.arguments),
    "study": ([], study.arguments),
    "bench": (["kernel"], bench.parse),
}


def numeric_flags(read, monkeypatch):
    """The numeric flags of the parser that `read` makes."""
    seen = []

    class Seen(Exception):
        pass

    def parse_args(self, args=None, namespace=None):
        seen.append(self)
        raise Seen

    with monkeypatch.context() as patch, pytest.raises(Seen):
        patch.setattr(Parser, "parse_args", parse_args)
        read([])
    flags = [action.dest for action in seen[0]._actions]
    return [flag for flag in flags if flag in NUMERIC]


def tried(read, argv):
    """What a reader makes of a command line, or the error; any other is raised."""
    try:
        return read(argv)
    except SystemExit as exit_:
        assert exit_.code == 2
        return exit_
    except ValueError as error:
        return error


@pytest.mark.parametrize("program", PROGRAMS)
def test_random_numbers(program, fuzz, monkeypatch, capsys):
    usual, read = PROGRAMS[program]
    flags = numeric_flags(read, monkeypatch)
    refused, passed = 0, 0
    for seed in range(fuzz):
        rng = random.Random(seed)
        argv = list(usual)
        chosen = rng.sample(flags, k=min(len(flags), rng.choice((1, 1, 2, 3))))
        for flag in chosen:
            values = rng.choices(VALUES, k=rng.choice((1, 1, 1, 2, 3)))
            name = rng.choice((flag, flag.replace("_", "-")))
            # With a sign of equality -1 cannot be taken for a flag.
            argv += [f"--{name}={values[0]}", *values[1:]]
        result = tried(read, argv)
        said = capsys.readouterr().err
        if isinstance(result, ValueError):
            assert set(re.findall(r"--(\w+)", str(result))) & set(chosen), argv
            refused += 1
        elif isinstance(result, SystemExit):
            assert len(said.splitlines()) <= 3 and "error: " in said, argv
        else:
            check_settings(result)
            passed += 1
    assert refused > fuzz / 50 and passed > fuzz / 50


def check_settings(settings):
    """What passed is finite, and within the tables."""
    values = vars(settings)
    for name, limits in (WHOLE_NUMBERS | NUMBERS).items():
        several = values.get(name)
        if not isinstance(several, list | tuple):
            several = [several]
        for value in several:
            if isinstance(value, int | float):
                assert limits[0] <= value <= limits[1], (name, value)
    if isinstance(settings, attg_mae.Config):
        rows, columns = settings.grid
        assert 0 < int(rows * columns * (1 - settings.mask_ratio)) < rows * columns
        assert settings.width % settings.heads == 0
    else:
        assert isinstance(settings, argparse.Namespace)
