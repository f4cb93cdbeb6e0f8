"""
Command lines: flags from dataclasses, ranges, log lines and progress bars, exit codes.

    if __name__ == "__main__":
        from attg.cli import ignore_sigint_during_import

        ignore_sigint_during_import()

    import torch
    ...

    @dataclasses.dataclass(kw_only=True)
    class Settings(DataFlags, RunFlags):
        k: int = flag(20, "number of neighbors", low=1, high=10**7)

    def main(argv=None):
        settings = parse(Settings, __doc__, argv)

    if __name__ == "__main__":
        run_cli(main)

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
import types
import typing
from importlib.util import find_spec
from pathlib import Path

# -- Flags -----------------------------------------------------------------------------


def flag(default, help, low=None, high=None, *, choices=None, resume="open", **options):
    """A dataclass field that is a flag of the command line, too.

    low, high: inclusive range of its number, or of each of its numbers. resume: whether a
    run that resumes may change it: "fixed" (never), "open" (until the run has ended) or
    "free" (always). options: further ones of argparse's add_argument; positional=True: an
    argument without a name.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    metadata |= {"resume": resume, "positional": options.pop("positional", False)}
    return dataclasses.field(default=default, metadata=metadata | {"options": options})


def resume_class(kind, name):
    """Names of the flags of a dataclass whose resume class is `name`."""
    fields = dataclasses.fields(kind)
    return {f.name for f in fields if f.metadata.get("resume") == name}


@dataclasses.dataclass(kw_only=True)
class DataFlags:
    """Images."""

    data: str = flag(
        "toy", "toy, a torchvision name, or a folder of images", resume="fixed"
    )
    classes: str | None = flag(
        None, "file that lists the class folders to keep, one a line", resume="fixed"
    )
    max_pixels: int = flag(10**8, "skip larger images", 1, 10**12, resume="free")


@dataclasses.dataclass(kw_only=True)
class RunFlags:
    """Running."""

    device: str | None = flag(None, "cuda, mps or cpu [the first found]", resume="free")
    workers: int | None = flag(
        None, "loader workers per process [CPU 0, GPU up to 16]", 0, 1024, resume="free"
    )
    timeout: float = flag(
        30, "distributed timeout in minutes", 0.01, 10**6, resume="free"
    )


# Types that a field also accepts, and how messages name a type.
ACCEPTED = {int: numbers.Integral, float: numbers.Real, str: os.PathLike, tuple: list}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string"}
TYPE_NAMES |= {tuple: "values", bool: "true or false", type(None): "None"}


def field_types(field):
    """(types that a field may have, type of one value).

    int | tuple[int, ...] | None -> (int, tuple, NoneType), int.
    """
    union = (field.type,)
    if isinstance(field.type, types.UnionType):
        union = typing.get_args(field.type)
    first = typing.get_args(union[0]) or union
    return tuple(typing.get_origin(kind) or kind for kind in union), first[0]


def validate(settings):
    """Check types, choices and ranges of all fields of a dataclass.

    Raises ValueError that names the first wrong flag, its value and what it must be.
    """
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        kinds, item = field_types(field)
        accepted = kinds + tuple(ACCEPTED.get(kind, kind) for kind in kinds)
        # bool is a subclass of int.
        if not isinstance(value, accepted) or type(value) is bool and bool not in kinds:
            names = " or ".join(TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise ValueError(f"--{name} {value!r}: must be {names}")
        choices = field.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ValueError(f"--{name} {value}: must be one of {', '.join(choices)}")
        # A string such as "auto" has no range.
        if field.metadata.get("low") is not None and not isinstance(value, str | None):
            for number in value if isinstance(value, tuple | list) else [value]:
                check_range(name, number, item, field.metadata)


def check_range(name, value, kind, metadata):
    """Raise ValueError unless a number of a flag is of the kind and within the range."""
    low, high = metadata["low"], metadata["high"]
    right = isinstance(value, ACCEPTED[kind]) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        raise ValueError(
            f"--{name} {value}: must be {TYPE_NAMES[kind]} from {low:g} to {high:g}"
        )


def int_or_word(text):
    """Type of a flag such as --accum, a whole number or auto."""
    return int(text) if text.lstrip("-").isdecimal() else text


def check_unused(settings, names, reason):
    """Raise ValueError if one of these flags is not at its default.

    reason: why the flag has no effect.
    """
    for field in dataclasses.fields(settings):
        if field.name in names and getattr(settings, field.name) != field.default:
            dashes = "" if field.metadata["positional"] else "--"
            raise ValueError(f"{dashes}{field.name}: {reason}; leave it out")


class Parser(argparse.ArgumentParser):
    """Parser that answers a mistake in three lines."""

    def error(self, message):
        lines = [f"{self.prog}: error: {message}"]
        unknown = re.match(r"unrecognized arguments: (?:[^-].*? )?(-[\w-]+)", message)
        names = re.findall(r"--\w[\w-]*", self.format_usage())
        close = difflib.get_close_matches(unknown[1], names, n=1) if unknown else []
        if close:
            lines.append(f"Did you mean {close[0]}?")
        # A module names its whole command, python -m MODULE.
        command = self.prog if self.prog.startswith("python") else f"python {self.prog}"
        lines.append(f"{command} --help lists every flag")
        self.exit(2, "\n".join(lines) + "\n")


def parse(kind, description, argv=None, prog=None):
    """An instance of the dataclass `kind` from a command line, validated.

    There is a flag for each field, with underscores or hyphens. --help groups inherited
    fields by their class. prog: how messages name the command [the file's name].
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=description, formatter_class=formatter)
    groups = {}
    for base in kind.__mro__[1:-1]:
        title = (base.__doc__ or base.__name__).partition(".")[0].lower()
        group = parser.add_argument_group(title)
        groups |= dict.fromkeys(base.__dict__.get("__annotations__", ()), group)
    for field in dataclasses.fields(kind):
        # A field without metadata is not a flag.
        if field.metadata:
            add_flag(groups.get(field.name, parser), field)
    argv = sys.argv[1:] if argv is None else argv
    values = vars(parser.parse_args([with_underscores(x) for x in argv]))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    settings = kind(**values)
    # A dataclass with __post_init__ validates itself there.
    if not hasattr(kind, "__post_init__"):
        validate(settings)
    return settings


def with_underscores(arg):
    """--batch-size=3 -> --batch_size=3; --no-norm-pix -> --no-norm_pix, as argparse's."""
    name, equals, value = arg.partition("=")
    if not name.startswith("--"):
        return arg
    name = "--" + name[2:].replace("-", "_")
    return re.sub("^--no_", "--no-", name) + equals + value


def add_flag(parser, field):
    """Add the flag of a dataclass field to a parser or argument group."""
    metadata, (kinds, item) = field.metadata, field_types(field)
    options = {"help": metadata["help"], "default": field.default}
    if isinstance(field.default, tuple) and field.default:
        options["help"] += f" [{' '.join(map(str, field.default))}]"
    elif field.default not in (None, ()) and item is not bool:
        options["help"] += " [%(default)s]"
    if item is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["choices"] = metadata["choices"]
        options["type"] = int_or_word if {int, str} <= set(kinds) else item
        if tuple in kinds:
            options["nargs"] = "+"
    options |= metadata["options"]
    if metadata["positional"]:
        parser.add_argument(field.name, nargs="?", **options)
    else:
        parser.add_argument(f"--{field.name}", **options)


def make_folder(name, path):
    """Create the folder of the flag --name with its parents; OSError names the flag."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--{name} {path}: cannot create this folder ({error.strerror}); choose "
            "another"
        ) from error


# -- Output ----------------------------------------------------------------------------


def log_line(text):
    """Print a line at once, above a progress bar if there is one."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text)
    else:
        tqdm.tqdm.write(text)
    # Without it, output that is piped to a file arrives in blocks of 8 KB.
    sys.stdout.flush()


def progress(steps, **options):
    """The steps under a progress bar, in a terminal and if tqdm is installed.

    options: tqdm's.
    """
    if find_spec("tqdm") is None:
        return steps
    from tqdm import tqdm

    # disable=None shows the bar in terminals only.
    return tqdm(steps, **({"disable": None, "leave": False} | options))


def print_table(rows):
    """Print dicts as the rows of a table with a column for each key of any of them."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys]
    for row in rows:
        values = [row.get(key, "") for key in keys]
        lines.append([f"{v:.2f}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


# -- Exit ------------------------------------------------------------------------------


def ignore_sigint_during_import():
    """From here to run_cli, Ctrl-C ends the process at once and without a traceback.

    Imports take seconds, and nothing is written during them.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_cli(main, memory_hint="lower --batch_size", interrupted="interrupted"):
    """Run main() and exit the process, with one line instead of a traceback for errors.

    Exit codes: 0; 1 after a ValueError, an OSError, or out of memory (the line ends with
    memory_hint); 2 for wrong flags (argparse); 130 after Ctrl-C; 141 after the reader of a
    pipe has closed it, as `| head` does; 128 + number if main() returns
    {"stopped": number}, the signal that stopped it after it had saved.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = Path(sys.argv[0]).name
    try:
        try:
            result = main()
        finally:
            # A closed pipe must raise here, where it is handled. --help passes by, too.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        if stdout_is_closed(error):
            # Python flushes the rest at exit, which needs a file that takes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # SIGPIPE's number, which Windows does not define.
            sys.exit(128 + 13)
        sys.exit(f"{name}: error: {message_of(error)}")
    except (RuntimeError, MemoryError) as error:
        # A loader worker that a signal killed.
        if str(error).startswith("DataLoader worker (pid"):
            hint = "if memory is short: fewer --workers, or --workers 0"
            sys.exit(f"{name}: error: {error}; {hint}")
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0] or "memory"
        sys.exit(f"{name}: error: out of memory ({reason}); {memory_hint}")
    stopped = result.get("stopped") if isinstance(result, dict) else None
    sys.exit(128 + stopped if stopped else 0)


def message_of(error):
    """The message of an error; its last line if a loader worker raised it.

    PyTorch puts the worker's whole traceback into the message.
    """
    message = str(error)
    if not message.startswith("Caught ") or "Original Traceback" not in message:
        return message
    # ValueError: --data: none of ...
    last_line = message.strip().splitlines()[-1]
    return last_line.partition(": ")[2] or last_line


def stdout_is_closed(error):
    """Whether an error came from printing to a pipe without a reader."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def is_out_of_memory(error):
    """Whether an error means that the GPU or the machine is out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # Messages of PyTorch's allocators for CPU and MPS.
    message = str(error)
    return "can't allocate memory" in message or "out of memory" in message
