"""
What the evaluation programs share: flags, and the way from them to the results.
"""

import contextlib
import json
import time
from pathlib import Path

import torch

from attg.cli import check_numbers, print_table, say
from attg.datasets import resolve_dataset, shot_indices
from attg.distributed import add_timeout, default_workers, exclusive_run, processes
from attg.files import require
from attg.images import MAX_PIXELS

# -- Flags -----------------------------------------------------------------------------


def add_data(flag, checkpoint="file with an encoder", data="as for attg_mae.py"):
    """flag: add_argument of a parser. checkpoint, data: the help of these two."""
    flag("checkpoint", nargs="?", help=checkpoint)
    flag("--data", default="toy", help=f"{data} [%(default)s]")
    flag(
        "--classes",
        help="file with the class folders to keep, one a line (ImageNet-100)",
    )
    text = "a picture with more is unreadable [%(default)s]"
    flag("--max_pixels", type=int, default=MAX_PIXELS, help=text)


def add_val(flag):
    flag(
        "--val",
        nargs="+",
        default=["test"],
        help="test sets: test, folders of the same classes, or toy's variants",
    )


def add_training_data(flag):
    """The flags of programs that train a classifier."""
    add_val(flag)
    flag(
        "--fraction",
        type=float,
        default=1.0,
        help="share of each class's training images to use [%(default)s]",
    )
    flag(
        "--seed",
        type=int,
        default=0,
        help="of --fraction, order, augmentation [%(default)s]",
    )
    flag(
        "--save",
        help="file for the trained weights, written after each epoch; the same command "
        "continues from it",
    )


def add_shots(flag, use):
    flag(
        "--shots",
        type=int,
        nargs="+",
        default=[],
        help=f"labelled images a class, all of a class that has fewer{use}",
    )
    flag(
        "--seeds",
        type=int,
        default=5,
        help="random choices of the --shots [%(default)s]",
    )


def add_running(flag, beside):
    """beside: what the file of results lies beside, in words."""
    flag("--img_size", type=int, help="input size in pixels [the checkpoint's]")
    text = "loader processes of each process [CPU 0, GPU up to 16]"
    flag("--workers", type=int, help=text)
    flag("--device", help="cuda, mps or cpu [the first there is]")
    add_timeout(flag)
    flag(
        "--out",
        help="file that the results are added to [named after the program, beside "
        f"{beside}]",
    )


def check_flags(args):
    """ValueError for numbers out of range, and for a test set that is trained on."""
    check_numbers(vars(args), epochs=(1, 10**6), seeds=(1, 10**6), lrs=(1e-38, 1e38))
    require(
        "train" not in getattr(args, "val", ()),
        "--val train: that is what is trained on; name test sets",
    )


# Flags that say how features are made.
MAKING = ("checkpoint", "classes", "val", "img_size", "max_pixels", "save_features")


def refuse_idle(parser, args, names, why):
    """ValueError for the flags of these names, if one is given; why: in words."""
    for name in names:
        if getattr(args, name) == parser.get_default(name):
            continue
        flag = name if name == "checkpoint" else f"--{name}"
        raise ValueError(f"{flag}: {why}; leave it out")


def view_of(args, cfg):
    """How open_labelled opens the pictures of a command line for an encoder's Config."""
    return {
        "size": cfg.size,
        "classes": args.classes,
        "channels": cfg.in_chans,
        "max_pixels": args.max_pixels,
    }


def check_shots(labels, all_shots, rank):
    """Says which of these numbers of shots some class does not have, of labels (n,).

    ValueError for those that cannot be drawn. Only the first process says it.
    """
    counts = labels[labels >= 0].bincount()
    for shots in all_shots:
        shot_indices(labels, shots, 0)
        fewer = int((counts < shots).sum())
        if fewer and rank == 0:
            say(
                f"--shots {shots}: {fewer} of {len(counts)} classes have fewer images, "
                f"the smallest {counts.min()}; they give all they have"
            )


# -- A program from its flags to its results -------------------------------------------


def evaluate(program, args, protocol, data=None):
    """The rows of figures of protocol(args, settings, place) -> (rows, settings).

    The first process prints them as a table and, with all settings, as a line of JSON,
    which is added to --out. place: (device, rank, world). data: of one's own, a dict of
    data sets by split (see data.open_data); --data is its name then.
    """
    began = time.perf_counter()
    source = Path(getattr(args, "features", None) or args.checkpoint)
    out = Path(args.out or source.parent / f"{program}.jsonl")
    with processes(args.device, args.timeout) as place:
        device, rank, world = place
        if rank == 0:
            try_outputs(out, args)
        alone = contextlib.nullcontext()
        save = getattr(args, "save", None)
        if save:
            alone = exclusive_run(f"{save}.lock", f"--save {save}", rank, world)
        if args.workers is None:
            args.workers = default_workers(device)
        settings = vars(args) | {"sha256": None}
        args.data = resolve_dataset(data, args.data)
        with alone:
            rows, settings = protocol(args, settings, place)
        if rank == 0:
            settings["seconds"] = round(time.perf_counter() - began, 1)
            report(rows, settings, out)
    return rows


def try_outputs(out, args):
    """OSError, before hours of work, if a file could not be written at their end."""
    outputs = []
    # Without --out it lies beside a file that is there, unless that name is wrong.
    if args.out or out.parent.is_dir():
        outputs.append(("out", out))
    for flag in ("save", "save_features"):
        path = getattr(args, flag, None)
        if path:
            # Written beside its place first (attg.files.replacing).
            outputs += [(flag, Path(path)), (flag, Path(f"{path}.tmp"))]
    for flag, path in outputs:
        is_there = path.exists()
        try:
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
            # Appending nothing leaves a file that is there as it is.
            try:
                with open(path, "ab"):
                    pass
            finally:
                # Also after Ctrl-C just here: an empty file would count as damaged.
                if not is_there:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"--{flag} {path}: cannot be written ({error.strerror}); name a file in "
                "a folder that takes one"
            ) from error


def without_nan(row):
    """A dict for JSON, which has no NaN, the one value that differs from itself."""
    return {key: value if value == value else None for key, value in row.items()}


def report(rows, settings, path):
    """
    Prints rows, dicts of figures, as a table, then all of it as a line of JSON, which
    is also added to the file.
    """
    results = [without_nan(row) for row in rows]
    record = {"settings": settings, "torch": torch.__version__, "results": results}
    line = json.dumps(record, allow_nan=False)
    # First the file: a closed pipe ends the program when it prints.
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(line + "\n")
    print_table(rows)
    print(line)
