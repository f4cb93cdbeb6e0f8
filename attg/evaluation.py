"""Flags of the evaluation programs, and the way from their settings to results."""

import contextlib
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import torch

from attg.cli import check_unused, flag, make_folder, print_table
from attg.datasets import open_labeled, resolve_dataset, shot_indices
from attg.distributed import exclusive_run, processes
from attg.features import SOURCE, make_features, read_features
from attg.loader import default_workers

# -- Flags -----------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class EvalFlags:
    """Evaluation."""

    checkpoint: str | None = flag(
        None, "file with an encoder", positional=True, resume="free"
    )
    img_size: int | None = flag(None, "in pixels [the checkpoint's]", 1, 8192)
    out: str | None = flag(
        None,
        "append results to this file [PROGRAM.jsonl beside the input]",
        resume="free",
    )


@dataclasses.dataclass(kw_only=True)
class LabelFlags:
    """Labeled images."""

    val: tuple[str, ...] = flag(
        ("test",),
        "test sets: test, other folders of the same classes, or variants of toy",
        resume="free",
    )


@dataclasses.dataclass(kw_only=True)
class FeatureFlags:
    """Features."""

    batch_size: int = flag(256, "images per batch", 1, 10**7)
    precision: str = flag("fp32", "of the encoder", choices=("fp32", "bf16"))
    features: str | None = flag(None, "use this file of --save_features")
    save_features: str | None = flag(None, "write the features to this file")
    shots: tuple[int, ...] = flag((), "labeled images per class", 1, 10**7)
    seeds: int = flag(5, "number of draws of the --shots", 1, 10**6)


def check_source(settings):
    """ValueError unless the settings have one source of features, and no training set."""
    if getattr(settings, "features", None):
        names = {*SOURCE, "max_pixels", "save_features"} - {"precision"}
        check_unused(settings, names, "has no effect with --features")
    elif not settings.checkpoint:
        raise ValueError("checkpoint: missing; give the file of an encoder")
    if "train" in getattr(settings, "val", ()):
        raise ValueError("--val train: this is the training set; choose test sets")


# -- Data ------------------------------------------------------------------------------


def open_sets(settings, data, cfg, **options):
    """The training set and {name: test set} for an encoder's Config; see open_labeled."""
    options |= {"classes": settings.classes, "max_pixels": settings.max_pixels}
    options |= {"channels": cfg.in_chans}
    return open_labeled(data, settings.val, cfg.size, **options)


def labeled_features(load_encoder, settings, data, dist_info):
    """Features of the training set, labeled images only, and of the test sets.

    They are read from --features, or computed with load_encoder(checkpoint, img_size=...).
    Returns the dict of make_features.
    """
    if settings.features:
        parts = read_features(settings.features)
        train = parts["train"]
        labelled = train["labels"] >= 0
        if not labelled.any() or len(parts) < 3:
            raise ValueError(
                f"--features {settings.features}: must hold labeled images and a test set"
            )
        parts["train"] = {name: x[labelled] for name, x in train.items()}
        return parts
    encoder = load_encoder(settings.checkpoint, img_size=settings.img_size)
    train_set, tests = open_sets(settings, data, encoder.cfg)
    for shots in settings.shots:
        # An error here, before the features, which take much longer.
        shot_indices(train_set.labels, shots, 0)
    sets = {"train": train_set, **tests}
    return make_features(encoder.to(dist_info[0]), sets, settings, dist_info)


# -- From settings to results ----------------------------------------------------------


def evaluate(program, settings, protocol, data=None):
    """Run protocol(settings, data, dist_info) -> (results, record) and report it.

    results: dicts of metrics, which are returned; record: all settings, as a dict. Rank 0
    prints both and appends them to --out. data: dict of data sets by split to use instead
    of --data, which is its name then (see open_data).
    """
    start = time.perf_counter()
    check_source(settings)
    source = Path(getattr(settings, "features", None) or settings.checkpoint)
    out = Path(settings.out or source.parent / f"{program}.jsonl")
    data = resolve_dataset(data, settings.data)
    with processes(settings.device, settings.timeout) as dist_info:
        device, rank, world = dist_info
        if rank == 0:
            check_outputs(out, settings)
        lock, save = contextlib.nullcontext(), getattr(settings, "save", None)
        if save:
            lock = exclusive_run(f"{save}.lock", f"--save {save}", rank, world)
        if settings.workers is None:
            settings.workers = default_workers(device)
        with lock:
            results, record = protocol(settings, data, dist_info)
        if rank == 0:
            seconds = round(time.perf_counter() - start, 1)
            report(results, record | {"seconds": seconds}, out)
    return results


def check_outputs(out, settings):
    """Fail early, with OSError, if an output path is not writable."""
    paths = {"out": settings.out}
    # By default it lies beside the checkpoint, whose name may be wrong.
    if out.parent.is_dir():
        paths["out"] = out
    paths |= {name: getattr(settings, name, None) for name in ("save", "save_features")}
    for name, path in paths.items():
        if path:
            make_folder(name, Path(path).parent)
            if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
                raise OSError(f"--{name} {path}: not writable; choose another file")


def mean_and_deviation(runs):
    """Metrics of [[top-1, top-5] of each seed]; the deviation of a single seed is 0."""
    top1, top5 = zip(*runs, strict=True)
    deviation = statistics.stdev(top1) if len(top1) > 1 else 0.0
    return {
        "top-1": statistics.mean(top1),
        "+-": deviation,
        "top-5": statistics.mean(top5),
    }


def without_nan(result):
    """A dict for JSON, which has no NaN: None in its place."""
    return {k: None if v != v else v for k, v in result.items()}


def report(results, settings, path):
    """Print results as a table and, with the settings, as the line of JSON in the file."""
    record = {"settings": settings, "torch": torch.__version__}
    record["results"] = [without_nan(result) for result in results]
    line = json.dumps(record, allow_nan=False)
    # Before anything is printed: a closed pipe ends the program.
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(line + "\n")
    print_table(results)
    print(line)
