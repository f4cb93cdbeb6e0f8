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
import typing
from importlib.util import find_spec
from pathlib import Path

# -- Flags -----------------------------------------------------------------------------


def flag(
    default,
    help,
    *,
    low=None,
    high=None,
    choices=None,
    resume="open",
    positional=False,
    **options,
):
    """A dataclass field that is a flag of the command line, too.

    low, high: inclusive range of its number, or of each of its numbers. resume: whether a
    run that resumes may change it: "fixed" (never), "open" (until the run has ended) or
    "free" (always). options: further ones of argparse's add_argument.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "choices": choices,
            "resume": resume,
            "positional": positional,
            "options": options,
        },
    )


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
        None,
        "file that lists the class folders to keep, one a line (ImageNet-100)",
        resume="fixed",
    )
    max_pixels: int = flag(
        100_000_000,
        "skip images with more pixels than this",
        low=1,
        high=10**12,
        resume="free",
    )


@dataclasses.dataclass(kw_only=True)
class RunFlags:
    """Running."""

    device: str | None = flag(
        None, "cuda, mps or cpu [the first available]", resume="free"
    )
    workers: int | None = flag(
        None,
        "loader workers per process [CPU 0, GPU up to 16]",
        low=0,
        high=1024,
        resume="free",
    )
    timeout: float = flag(
        30, "distributed timeout in minutes", low=0.01, high=10**6, resume="free"
    )


# Types that a field also accepts, and how messages name a type.
ACCEPTED = {int: numbers.Integral, float: numbers.Real, str: os.PathLike, tuple: list}
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string"}
TYPE_NAMES |= {tuple: "values", bool: "true or false", type(None): "None"}


def validate(settings):
    """Check types, choices and ranges of all fields of a dataclass.

    Raises ValueError that names the first wrong flag, its value and what it must be.
    """
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        check_type(name, value, field.type)
        choices = field.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ValueError(f"--{name} {value}: must be one of {', '.join(choices)}")
        for item in value if isinstance(value, tuple | list) else [value]:
            check_range(name, item, field)


def check_type(name, value, annotation):
    """Raise ValueError unless value is of the annotated type."""
    kinds = typing.get_args(annotation) or (annotation,)
    accepted = kinds + tuple(ACCEPTED.get(kind, kind) for kind in kinds)
    # bool is a subclass of int.
    right = isinstance(value, accepted) and (type(value) is not bool or bool in kinds)
    if not right:
        names = " or ".join(TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
        raise ValueError(f"--{name} {value!r}: must be {names}")


def check_range(name, value, field):
    """Raise ValueError unless a number of a flag is within the flag's range."""
    low, high = field.metadata.get("low"), field.metadata.get("high")
    # None, and a string such as "auto", are checked as types.
    if (
        low is None
        or value is None
        or isinstance(value, str)
        and str in kinds_of(field)
    ):
        return
    whole = int in (value_type(field), *kinds_of(field))
    kind = numbers.Integral if whole else numbers.Real
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        raise ValueError(
            f"--{name} {value}: must be a {'whole number' if whole else 'number'} "
            f"from {low:g} to {high:g}"
        )


def kinds_of(field):
    """Types that a field's annotation allows: int | None -> (int, NoneType)."""
    return typing.get_args(field.type) or (field.type,)


def value_type(field):
    """Type of a flag's value on the command line, of each value if it takes several."""
    kinds = kinds_of(field)
    default = int_or_word if {int, str} <= set(kinds) else kinds[0]
    return field.metadata["options"].get("type", default)


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
    """Parser whose flags accept hyphens for underscores.

    It answers a mistake in three lines.
    """

    def names(self):
        """{name with underscores: name} of all flags."""
        found = re.findall(r"--[\w-]+", self.format_usage())
        return {underscored(name): name for name in found}

    def parse_args(self, args=None, namespace=None):
        names = self.names()
        normalized = []
        for arg in sys.argv[1:] if args is None else args:
            name, equals, value = arg.partition("=")
            normalized.append(names.get(underscored(name), name) + equals + value)
        return super().parse_args(normalized, namespace)

    def error(self, message):
        lines = [f"{self.prog}: error: {message}"]
        nearest = self.nearest(message)
        if nearest:
            lines.append(f"Did you mean {nearest}?")
        # A module names its whole command, python -m MODULE.
        command = self.prog
        if not command.startswith("python"):
            command = f"python {command}"
        lines.append(f"{command} --help lists every flag")
        self.exit(2, "\n".join(lines) + "\n")

    def nearest(self, message):
        """The flag most similar to the first unknown one in the message, or None."""
        if not message.startswith("unrecognized"):
            return None
        names = self.names()
        for arg in message.split():
            unknown = underscored(arg.partition("=")[0])
            if not arg.startswith("-") or unknown in names:
                continue
            close = difflib.get_close_matches(unknown, names, n=1)
            if close:
                return names[close[0]]
        return None


def underscored(name):
    """--with-hyphens -> --with_hyphens; anything else is returned unchanged."""
    if not name.startswith("--"):
        return name
    return "--" + name[2:].replace("-", "_")


def parse(kind, description, argv=None, prog=None):
    """An instance of the dataclass `kind` from a command line, validated.

    There is a flag for each field. --help groups inherited fields by their class.
    prog: how messages name the command [the file's name].
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
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    settings = kind(**values)
    # A dataclass with __post_init__ validates itself there.
    if not hasattr(kind, "__post_init__"):
        validate(settings)
    return settings


def add_flag(parser, field):
    """Add the flag of a dataclass field to a parser or argument group."""
    metadata = field.metadata
    options = {"help": metadata["help"], "choices": metadata["choices"]}
    options |= metadata["options"]
    if isinstance(field.default, tuple) and field.default:
        options["help"] += f" [{' '.join(map(str, field.default))}]"
    elif field.default not in (None, ()) and field.type is not bool:
        options["help"] += " [%(default)s]"
    if metadata["positional"]:
        parser.add_argument(field.name, nargs="?", default=field.default, **options)
        return
    if field.type is bool:
        options = {"help": options["help"], "action": argparse.BooleanOptionalAction}
    else:
        options.setdefault("type", value_type(field))
    parser.add_argument(f"--{field.name}", default=field.default, **options)


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
