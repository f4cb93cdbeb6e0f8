"""
What every program does on a command line: flags and the ranges of their numbers, lines
and progress bars, how it ends.

    if __name__ == "__main__":
        from attg.cli import ignore_sigint_during_import

        ignore_sigint_during_import()

    import torch
    ...
    if __name__ == "__main__":
        end(main)

Only the standard library is imported here, so that this can come before torch.
"""

import argparse
import dataclasses
import difflib
import numbers
import os
import re
import signal
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

# -- Ranges ----------------------------------------------------------------------------

# (least, most) of the numeric flags, where both will do. An upper end keeps a slip of
# the finger from taking all memory.
WHOLE_NUMBERS = {
    "epochs": (0, 10**6),
    "batch_size": (1, 10**7),
    "accum": (1, 10**7),
    "img_size": (1, 8192),
    "patch_size": (1, 1024),
    "in_chans": (1, 1024),
    "max_pixels": (1, 10**12),
    "width": (4, 32768),
    "depth": (1, 1024),
    "heads": (1, 1024),
    "decoder_width": (4, 32768),
    "decoder_depth": (1, 1024),
    "decoder_heads": (1, 1024),
    "workers": (0, 1024),
    "seed": (-(2**63), 2**63 - 1),
    "eval_every": (0, 10**6),
    "save_every": (1, 10**6),
    "keep_ckpt_every": (0, 10**6),
    "log_every": (1, 10**9),
    "k": (1, 10**7),
    "shots": (1, 10**7),
    "objects": (1, 1000),
    "grid": (1, 1024),
    "show": (0, 10**4),
    "jobs": (1, 1024),
}
NUMBERS = {
    "tau": (1e-6, 1e6),
    "tau_end": (1e-6, 1e6),
    "mask_ratio": (0, 1),
    "lr": (0, 1e38),
    "blr": (0, 1e38),
    "warmup_epochs": (0, 1e6),
    "weight_decay": (0, 1e6),
    "clip_grad": (0, 1e38),
    "mean": (-1e6, 1e6),
    "std": (1e-38, 1e6),
    "fraction": (1e-6, 1),
    "layer_decay": (1e-6, 1),
    "drop_path": (0, 0.99),
    "cut": (-1, 1),
    "timeout": (0.01, 10**6),
}


def check_numbers(settings, **own):
    """ValueError names the first flag whose number, or one of them, is out of range.

    settings: {flag: value}, also with flags that are none of these; None is not given.
    own: {flag: (least, most)} where a program differs from the tables above.
    """
    for name, value in settings.items():
        limits = own.get(name) or WHOLE_NUMBERS.get(name) or NUMBERS.get(name)
        if limits is None or value is None:
            continue
        kind = numbers.Integral if name in WHOLE_NUMBERS else numbers.Real
        values = value if isinstance(value, list | tuple) else [value]
        for number in values:
            check_number(name, number, kind, *limits)


def check_number(name, number, kind, least, most):
    if name == "accum" and number == "auto":
        return
    right = isinstance(number, kind) and not isinstance(number, bool)
    if right and least <= number <= most:
        return
    what = "a whole number" if kind is numbers.Integral else "a number"
    words = f"must be {what} from {least:g} to {most:g}"
    if right and number < least:
        words = f"must be at least {least:g}"
        if least == 0:
            words = "must not be negative"
        elif least <= 1e-6:
            words = "must be above 0"
    raise ValueError(f"--{name} {number}: {words}")


# What else a value of a type may be, and the type in words.
ALSO = {int: numbers.Integral, float: numbers.Real, str: os.PathLike, tuple: list}
IN_WORDS = {int: "a whole number", float: "a number", str: "a text", tuple: "values"}
IN_WORDS |= {bool: "true or false", type(None): "nothing"}


def check_types(settings):
    """ValueError names the first field of a dataclass whose value is not of its type.

    The command line makes no others; a damaged file may hold any.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        # int | None -> int, None
        kinds = typing.get_args(field.type) or (field.type,)
        allowed = kinds + tuple(ALSO.get(kind, kind) for kind in kinds)
        # True is a number for Python.
        right = isinstance(value, allowed) and (
            type(value) is not bool or bool in kinds
        )
        if not right:
            words = " or ".join(IN_WORDS[kind] for kind in kinds)
            raise ValueError(f"--{field.name} {value!r}: must be {words}")


# -- Flags -----------------------------------------------------------------------------


def count_or_auto(text):
    """The type of a flag, for argparse: a whole number or the word auto."""
    return text if text == "auto" else int(text)


class Parser(argparse.ArgumentParser):
    """Flags may have hyphens for underscores; a mistake is answered in three lines.

    --help shows the description as it is written.
    """

    def __init__(self, **options):
        raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**(raw | options))

    def names(self):
        """{name with underscores: name} of all flags."""
        found = re.findall(r"--[\w-]+", self.format_usage())
        return {plain(name): name for name in found}

    def parse_args(self, args=None, namespace=None):
        if args is None:
            args = sys.argv[1:]
        names = self.names()
        words = []
        for word in args:
            flag, equals, value = word.partition("=")
            words.append(names.get(plain(flag), flag) + equals + value)
        return super().parse_args(words, namespace)

    def error(self, message):
        lines = [f"{self.prog}: error: {message}"]
        near = self.nearest(message)
        if near:
            lines.append(f"Did you mean {near}?")
        # A module names its whole command, python -m MODULE.
        command = self.prog
        if not command.startswith("python"):
            command = f"python {command}"
        lines.append(f"{command} --help lists every flag")
        self.exit(2, "\n".join(lines) + "\n")

    def nearest(self, message):
        """The flag that looks most like the first unknown one in the message, or None."""
        if not message.startswith("unrecognized"):
            return None
        names = self.names()
        for word in message.split():
            flag = plain(word.partition("=")[0])
            if not word.startswith("-") or flag in names:
                continue
            near = difflib.get_close_matches(flag, names, n=1)
            if near:
                return names[near[0]]
        return None


def parse_settings(kind, description, argv=None):
    """The dataclass `kind` of a command line, with a flag for each of its fields.

    A field's metadata are the options of its flag; its type is the field's.
    """
    parser = Parser(description=description)
    for field in dataclasses.fields(kind):
        options = {"default": field.default, **field.metadata}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif "type" not in options:
            # int | None -> int
            options["type"] = (typing.get_args(field.type) or (field.type,))[0]
        parser.add_argument(f"--{field.name}", **options)
    return kind(**vars(parser.parse_args(argv)))


def make_folder(name, path):
    """Makes the folder of the flag --name, and those above; OSError names the flag."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--{name} {path}: this folder cannot be made ({error.strerror}); name "
            "another"
        ) from error


def plain(flag):
    """--with-hyphens -> --with_hyphens; other words stay as they are."""
    if not flag.startswith("--"):
        return flag
    return "--" + flag[2:].replace("-", "_")


# -- Lines and bars --------------------------------------------------------------------


def say(text):
    """Prints a line at once, above a progress bar if there is one."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text)
    else:
        tqdm.tqdm.write(text)
    # Or a log that is piped to a file would come in pieces of 8 KB.
    sys.stdout.flush()


def progress(steps, **options):
    """The steps, under a progress bar in a terminal, if tqdm is there; options: its."""
    if find_spec("tqdm") is None:
        return steps
    from tqdm import tqdm

    # disable=None shows it in terminals only.
    return tqdm(steps, **({"disable": None, "leave": False} | options))


# -- The end ---------------------------------------------------------------------------


def ignore_sigint_during_import():
    """From here to `end`, Ctrl-C ends the process at once and without a traceback.

    For the imports, which take seconds; nothing is written in them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(main, memory="lower --batch_size", interrupted="interrupted"):
    """Runs main() and ends the process, with a line instead of a traceback.

    Exit codes: 0; 1 after a ValueError, an OSError, or out of memory, where `memory` is
    the advice; 2 for wrong flags (argparse); 130 after Ctrl-C; 141 after the end of a
    pipe was closed, as by `| head`; 128 + number if main() returns {"stopped": number},
    a signal that ended it well.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = Path(sys.argv[0]).name
    try:
        try:
            result = main()
        finally:
            # Here, where a closed pipe has an answer. --help comes by as well.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        if pipe_is_closed(error):
            # What is left is written when Python ends, and must go somewhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # SIGPIPE's, which Windows does not have.
            sys.exit(128 + 13)
        sys.exit(f"{name}: error: {words_of(error)}")
    except (RuntimeError, MemoryError) as error:
        if worker_was_killed(error):
            advice = "if it is short of memory: fewer --workers, or --workers 0"
            sys.exit(f"{name}: error: {error}; {advice}")
        if not out_of_memory(error):
            raise
        first_words = str(error).partition(". ")[0] or "memory"
        sys.exit(f"{name}: error: out of memory ({first_words}); {memory}")
    stopped = result.get("stopped") if isinstance(result, dict) else None
    sys.exit(128 + stopped if stopped else 0)


def words_of(error):
    """The message of an error; of one that a loader's worker raised, its last line.

    PyTorch puts the worker's whole traceback into the message.
    """
    words = str(error)
    if not words.startswith("Caught ") or "Original Traceback" not in words:
        return words
    # ValueError: --data: none of ...
    last_line = words.strip().splitlines()[-1]
    return last_line.partition(": ")[2] or last_line


def worker_was_killed(error):
    """Whether a loader's worker ended without a word, as the system's signals end it."""
    return str(error).startswith("DataLoader worker (pid")


def pipe_is_closed(error):
    """Whether the error came of printing to a pipe that nobody reads any more."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        # An empty line tells.
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def out_of_memory(error):
    """Of the GPU (torch.OutOfMemoryError) or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # What PyTorch's allocators of the CPU and of MPS say.
    words = str(error)
    return "can't allocate memory" in words or "out of memory" in words


def print_table(rows):
    """Prints rows, dicts, with a column for every key that any of them has."""
    keys = []
    for row in rows:
        for key in row:
            if key not in keys:
                keys.append(key)

    lines = [keys]
    for row in rows:
        line = []
        for key in keys:
            value = row.get(key, "")
            line.append(f"{value:.2f}" if isinstance(value, float) else str(value))
        lines.append(line)

    widths = []
    for column in zip(*lines, strict=True):
        widths.append(max(len(text) for text in column))
    for line in lines:
        padded = []
        for text, width in zip(line, widths, strict=True):
            padded.append(text.ljust(width))
        print("  ".join(padded).rstrip())
