"""
Command lines: flags generated from dataclasses, exit codes.

    @dataclasses.dataclass(kw_only=True)
    class Settings(DataFlags, RunFlags):
        k: int = flag(20, "number of neighbors", low=1, high=10**7)

    settings = parse(Settings, __doc__, argv)

Only the standard library is imported here, so that this can come before torch.
"""

import argparse
import dataclasses
import numbers
import os
import signal
import sys
import traceback
import types
import typing
from pathlib import Path

from attg.files import path_in_errors


def flag(
    default, help, low=None, high=None, *, choices=None, resume="open", positional=False
):
    """Dataclass field that is also a flag, or with positional an unnamed argument.

    low, high: inclusive range of its numbers. resume: whether a resumed run may change
    it: "fixed" (never), "open" (until the run has ended) or "free" (always).
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    metadata |= {"resume": resume, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def resume_class(kind, name):
    """Names of the flags of a dataclass whose resume class is `name`."""
    fields = dataclasses.fields(kind)
    return {f.name for f in fields if f.metadata.get("resume") == name}


@dataclasses.dataclass(kw_only=True)
class DataFlags:
    """Images."""

    data: str = flag("toy", "toy, torchvision name, or folder", resume="fixed")
    classes: str | None = flag(None, "file of class folders to keep", resume="fixed")
    max_pixels: int = flag(10**8, "skip images above this", 1, 10**12, resume="free")
    verify: str = flag(
        "sample",
        "contents of the files to check above 10,000 files: of 1,000, or all",
        choices=("sample", "full"),
        resume="free",
    )
    white: float | None = flag(
        None, "white level of gray above 8 bits [by type]", 1e-9, 1e9, resume="fixed"
    )


@dataclasses.dataclass(kw_only=True)
class WeightFlags:
    """Weights of other code bases."""

    weights_key: str | None = flag(None, "entry that holds the weights [EMA first]")
    weights_prefix: str | None = flag(None, "prefix of the encoder, if several match")


@dataclasses.dataclass(kw_only=True)
class RunFlags:
    """Running."""

    device: str | None = flag(None, "cuda, mps or cpu [the first found]", resume="free")
    workers: int | None = flag(
        None, "loader workers per process [CPU 0, GPU up to 16]", 0, 1024, resume="free"
    )
    timeout: float = flag(30, "distributed timeout (min)", 0.01, 10**6, resume="free")


# Types that a field accepts, and how messages name a type.
ACCEPTED = {int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)}
ACCEPTED |= {tuple: (tuple, list)}
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
    """Check types, choices and ranges of all fields of a dataclass, and make them plain.

    Checkpoints hold no numbers of NumPy and no paths. Raises ValueError that names the
    first wrong flag, its value and what it must be.
    """
    for field in dataclasses.fields(settings):
        low, high, choices = map(field.metadata.get, ("low", "high", "choices"))
        kinds, item = field_types(field)
        values = [(getattr(settings, field.name), kinds)]
        if isinstance(values[0][0], tuple | list):
            values += [(one, (item,)) for one in values[0][0]]
        for value, allowed in values:
            right = isinstance(
                value, tuple(ACCEPTED.get(kind, kind) for kind in allowed)
            )
            # bool is a subclass of int.
            right = right and (bool in allowed or not isinstance(value, bool))
            if right and low is not None and isinstance(value, numbers.Real):
                right = low <= value <= high
            if right and choices and value is not None:
                right = value in choices
            if right:
                continue
            expected = " or ".join(
                TYPE_NAMES.get(kind, kind.__name__) for kind in kinds
            )
            if choices:
                expected = f"one of {', '.join(choices)}"
            if low is not None:
                expected = f"{TYPE_NAMES[item]} from {low:g} to {high:g}"
            raise ValueError(f"--{field.name} {value}: must be {expected}")
        value = values[0][0]
        if field.metadata and value is not None:
            many = isinstance(value, tuple | list)
            plain = tuple(map(item, value)) if many else item(value)
            setattr(settings, field.name, plain)


def check_unused(settings, names, reason):
    """ValueError with the reason if one of these flags is not at its default."""
    for field in dataclasses.fields(settings):
        if field.name in names and getattr(settings, field.name) != field.default:
            dashes = "" if field.metadata["positional"] else "--"
            raise ValueError(f"{dashes}{field.name}: {reason}; leave it out")


def parse(kind, description, argv=None):
    """An instance of the dataclass `kind` from a command line, validated.

    There is a flag for each field with metadata.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--FLAG VALUE ...], --help lists all flags",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed would be --seeds, where there is no --seed
    )
    for field in dataclasses.fields(kind):
        metadata, (kinds, item) = field.metadata, field_types(field)
        if not metadata:
            continue
        options = {"help": metadata["help"], "default": field.default}
        if isinstance(field.default, tuple) and field.default:
            options["help"] += f" [{' '.join(map(str, field.default))}]"
        elif field.default not in (None, ()) and item is not bool:
            options["help"] += " [%(default)s]"
        if item is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["choices"] = metadata["choices"]
            options["type"] = item
            if tuple in kinds:
                options["nargs"] = "+"
        if metadata["positional"]:
            parser.add_argument(field.name, nargs="?", **options)
        else:
            parser.add_argument(f"--{field.name}", **options)
    values = vars(parser.parse_args(argv)).items()
    for name, value in values:
        if value == "" or isinstance(value, list) and "" in value:
            # An unset variable of a shell.
            parser.error(f"--{name}: is empty; leave it out, or pass a value")
    settings = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})
    # A dataclass with __post_init__ validates itself there.
    if not hasattr(kind, "__post_init__"):
        validate(settings)
    return settings


def quiet_sigint_during_import():
    """From here to run_cli, Ctrl-C ends the process at once and without a traceback.

    Imports can take many seconds, so a line says that the program has started.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in ("stdout", "stderr"):
        # Closed by >&-. Otherwise the next file that is opened would take its number.
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
    if os.environ.get("RANK", "0") == "0" and not {"-h", "--help"} & set(sys.argv):
        print(f"{Path(sys.argv[0]).name}: importing PyTorch", flush=True)


def run_cli(main, memory_hint="lower --batch_size", interrupted="interrupted"):
    """Run main() and exit the process, with one line instead of a traceback for errors.

    Exit codes: 0; 1 after a ValueError, an OSError, or out of memory (the line ends with
    memory_hint); 2 for wrong flags (argparse); 130 after Ctrl-C, 143 after SIGTERM; 141 after
    `| head` has closed the pipe; 128 + number if main() returns {"stopped": number}.
    """

    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    # No handler would run while a rank of torchrun waits for the others.
    alone = "RANK" not in os.environ
    for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, interrupt)
    name = Path(sys.argv[0]).name
    try:
        try:
            result = main()
        finally:
            # A closed pipe must raise here, where it is handled. --help passes by, too.
            with path_in_errors("standard output"):
                sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"{name}: {interrupted}", file=sys.stderr)
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))
    except (ValueError, OSError, EOFError) as error:
        if is_worker_killed(error):
            sys.exit(f"{name}: error: {WORKER_KILLED}")
        if stdout_is_closed(error):
            # Python flushes the rest at exit, which needs a file that takes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # SIGPIPE's number, which Windows does not define.
            sys.exit(128 + 13)
        sys.exit(f"{name}: error: {message_of(error)}")
    except (RuntimeError, MemoryError) as error:
        if is_worker_killed(error):
            sys.exit(f"{name}: error: {WORKER_KILLED}")
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0] or "memory"
        sys.exit(f"{name}: error: out of memory ({reason}); {memory_hint}")
    stopped = result.get("stopped") if isinstance(result, dict) else None
    sys.exit(128 + stopped if stopped else 0)


WORKER_KILLED = "a loader worker was killed; if memory is short: fewer --workers"


def is_worker_killed(error):
    """Whether an error came from receiving what a loader worker should have sent.

    Depending on the moment that is a RuntimeError of PyTorch, or an OSError or EOFError of
    a pipe, which would blame a file or the network.
    """
    if str(error).startswith("DataLoader worker (pid"):
        return True
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    received = any("multiprocessing" in Path(file).parts for file in files)
    return received and any(file.endswith("dataloader.py") for file in files)


def message_of(error):
    """The message of an error, without the traceback that PyTorch adds in a worker."""
    message = str(error)
    if "Original Traceback" not in message:
        return message
    # ValueError: --data: none of ...
    return message.strip().splitlines()[-1].partition(": ")[2]


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
    # Messages of PyTorch's allocators, for GPUs and for CPUs.
    messages = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(x in str(error) for x in messages)
