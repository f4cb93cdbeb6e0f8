"""Flags of the evaluation programs, and the way from their settings to results."""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch

from attg.backbones import is_named, open_backbone, weights_sha256
from attg.cli import DataFlags, WeightFlags, check_unused, flag
from attg.datasets import open_labeled, resolve_dataset, shot_indices
from attg.distributed import exclusive_run, processes
from attg.features import SOURCE, make_features, read_features
from attg.figures import class_names, save_confusion, save_neighbors
from attg.files import path_in_errors, sha256
from attg.loader import default_workers
from attg.log import log_line, print_table


@dataclasses.dataclass(kw_only=True)
class EvalFlags(WeightFlags):
    """Evaluation."""

    checkpoint: str | None = flag(
        None, "encoder: a file, timm:NAME or hf:NAME", positional=True, resume="free"
    )
    img_size: int | None = flag(None, "in pixels [the checkpoint's]", 1, 8192)
    heads: int | None = flag(None, "attention heads [by file or width]", 1, 1024)
    out: str | None = flag(
        None, "append results here [PROGRAM.jsonl beside the input]", resume="free"
    )
    # Not flags: checksum of the checkpoint, line that describes the data.
    sha256: str | None = None
    header: str = ""


@dataclasses.dataclass(kw_only=True)
class CheckpointDataFlags(DataFlags):
    """Images, by default those that the checkpoint was trained on."""

    data: str | None = flag(
        None, "toy, torchvision name, or folder [the checkpoint's]", resume="fixed"
    )


@dataclasses.dataclass(kw_only=True)
class LabelFlags(CheckpointDataFlags):
    """Labeled images."""

    val: tuple[str, ...] = flag(
        ("test",), "test, folders of the same classes, toy's variants", resume="free"
    )
    show: bool = flag(
        False,
        "save OUT.confusion.png (to 50 classes), OUT.neighbors.png",
        resume="free",
    )


@dataclasses.dataclass(kw_only=True)
class FeatureFlags:
    """Features."""

    batch_size: int = flag(256, "images per batch", 1, 10**7)
    precision: str = flag("fp32", "of the encoder", choices=("fp32", "bf16"))
    features: str | None = flag(None, "read features from this --save_features file")
    save_features: str | None = flag(None, "write the features to this file")
    shots: tuple[int, ...] = flag((), "labeled images per class", 1, 10**7)
    seeds: int = flag(5, "number of draws of the --shots", 1, 10**6)


def check_source(settings):
    """Path of the source of features, which must be the only one; or ValueError."""
    features = getattr(settings, "features", None)
    if features:
        names = {*SOURCE, "max_pixels", "verify", "save_features"}
        check_unused(settings, names, "has no effect with --features")
    elif not settings.checkpoint:
        raise ValueError("checkpoint: missing; give the file of an encoder")
    if "train" in getattr(settings, "val", ()):
        raise ValueError("--val train: this is the training set; choose test sets")
    # Results of named models go to the current folder.
    named = is_named(settings.checkpoint)
    return Path(features or ("named" if named else settings.checkpoint))


def fill_defaults(settings, **defaults):
    """Set the flags that were not given."""
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def open_sets(settings, data, cfg, fraction=1.0, **options):
    """Training images (a fraction of each class), {name: test set}; see open_labeled."""
    default_data(settings, vars(cfg), settings.checkpoint)
    fill_defaults(settings, white=cfg.white)
    options |= {"channels": cfg.in_chans, "verify": settings.verify == "full"}
    train_set, tests = open_images(settings, data, cfg.size, **options)
    if fraction < 1:
        rows = shot_indices(train_set.labels, fraction, settings.seed)
        train_set = train_set.subset(rows.sort().values)
    sizes = {}
    for name, dataset in {"train": train_set, **tests}.items():
        # "test" is the folder val/, even if there is a test/, too.
        folder = Path(dataset.root).name
        name += f" ({folder}/)" if folder not in ("", *name.split("/")) else ""
        sizes[name] = len(dataset)
    describe(settings, sizes, train_set.num_classes, train_set.known_labels)
    return train_set, tests


def open_images(settings, data, size, **options):
    """open_labeled for the settings."""
    options |= {name: getattr(settings, name) for name in ("classes", "max_pixels")}
    data = resolve_dataset(data, settings.data)
    return open_labeled(data, settings.val, size, white=settings.white, **options)


def default_data(settings, config, checkpoint):
    """Without --data, take data and classes of the checkpoint's config, a dict."""
    if settings.data is None:
        if not config.get("data"):
            reason = f"{checkpoint} does not say what it was trained on"
            raise ValueError(f"--data: missing, and {reason}; name a data set")
        settings.data = config["data"]
        settings.classes = settings.classes or config.get("classes")
        log_line(f"no --data: {settings.data}, which {checkpoint} was trained on")


def describe(settings, sizes, classes, labels):
    """Log a line on the data and keep it as the header of the results.

    labels: of the training images, if they are known. ValueError if they are all alike.
    """
    images = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
    largest = ""
    if labels is not None:
        counts = torch.as_tensor(labels).bincount()
        share = counts.max().item() / len(labels)
        if share == 1:
            reason = f"all training images have the label {int(labels[0])}"
            raise ValueError(f"--data {settings.data}: {reason}; below 0 is no label")
        # Subsets from Python have only some of the classes.
        classes = counts.count_nonzero().item()
        largest = f", the largest has {100 * share:.3g} %"
    chance = f"{classes} classes, chance {100 / classes:.3g} %{largest}"
    settings.header = f"data {settings.data}, images: {images}; {chance}"
    log_line(settings.header)


def open_encoder(load_encoder, settings, only_files=False, **options):
    """The encoder that settings.checkpoint names; settings.sha256 is that of its weights.

    load_encoder: attg_mae's; options replace its arguments.
    """
    source, names = settings.checkpoint, {"heads", "weights_key", "weights_prefix"}
    if is_named(source):
        if only_files:
            raise ValueError(f"checkpoint {source}: this program takes files only")
        check_unused(settings, names, "has no effect on timm: and hf:")
        encoder = open_backbone(source, settings.img_size)
        settings.sha256 = weights_sha256(encoder)
    else:
        arguments = {name: getattr(settings, name) for name in {"img_size", *names}}
        encoder = load_encoder(source, **arguments | options)
        settings.sha256 = sha256(source)
    cfg = encoder.cfg
    if not getattr(cfg, "data", None):  # other people's
        size = " x ".join(map(str, cfg.size))
        log_line(f"{source}: images of {size}, mean {cfg.mean}, std {cfg.std}")
    return encoder


def labeled_features(load_encoder, settings, data, dist_info):
    """Features of the labeled training images, and {name: features} of the test sets.

    They are read from --features, whose SOURCE becomes that of the settings, or computed
    by the encoder. Each is a dict of features (n, D) and "labels" (n,).
    """
    if settings.features:
        parts, source = read_features(settings.features)
        vars(settings).update(source)
        path = Path(source["checkpoint"] or "")
        if path.is_file() and sha256(path) != source["sha256"]:
            log_line(f"--features {settings.features}: {path} has changed since then")
    else:
        encoder = open_encoder(load_encoder, settings)
        train_set, tests = open_sets(settings, data, encoder.cfg)
        sets = {"train": train_set, **tests}
        parts = make_features(encoder.to(dist_info[0]), sets, settings, dist_info)
    sizes = {name: len(part["labels"]) for name, part in parts.items()}
    train = parts.pop("train")
    if settings.features:
        describe(settings, sizes, int(train["labels"].max()) + 1, train["labels"])
    return train, parts


def draw_shots(labels, settings, name):
    """{protocol: [training images for each seed]} of --shots, or {name: [all images]}."""
    draws = {} if settings.shots else {name: [slice(None)]}
    for shots in settings.shots:
        seeds = range(settings.seeds)
        draws[f"{shots} shots"] = [shot_indices(labels, shots, seed) for seed in seeds]
    return draws


def evaluate(program, settings, protocol, data=None):
    """Run protocol(settings, data, dist_info), which returns the results, and report it.

    The results are dicts of metrics; the protocol also fills in the settings that were
    not given. Rank 0 prints both and appends them to --out. data: dict of data sets by
    split to use instead of --data, which is its name then (see open_data).
    """
    start = time.perf_counter()
    source = check_source(settings)
    with processes(settings.device, settings.timeout) as dist_info:
        device, rank, world = dist_info
        if world > 1 and getattr(settings, "show", False):
            raise ValueError(f"--show: {world} processes; use one, or leave it out")
        if rank == 0:
            check_outputs(settings)
        fill_defaults(settings, out=str(source.with_name(f"{program}.jsonl")))
        fill_defaults(settings, workers=default_workers(device))
        save = getattr(settings, "save", None)
        lock = exclusive_run(f"{save}.lock", f"--save {save}")
        with lock if save else contextlib.nullcontext():
            results = protocol(settings, data, dist_info)
        if rank == 0:
            seconds = round(time.perf_counter() - start, 1)
            report(results, dataclasses.asdict(settings) | {"seconds": seconds})
    return results


def save_figures(settings, data, truth, guesses, title, features=None):
    """Draw the figures of --show: OUT.confusion.png and, of k-NN, OUT.neighbors.png.

    truth, guesses (n,): classes of the first test set. title: the feature that they are
    of. features: (bank, queries) of k-NN.
    """
    out = Path(settings.out)
    title = f"{out.stem}: {title.replace('_', ' ')}, {settings.val[0]}"
    train_set, tests = open_images(settings, data, 32)
    numbers = len(train_set), len(tests[settings.val[0]])
    if features and numbers != tuple(map(len, features)):
        reason = f"--data {settings.data} has changed since, to {numbers} images"
        raise ValueError(f"--features {settings.features}: {reason}; write it again")
    classes = train_set.num_classes
    if classes <= 50:
        counts = (truth * classes + guesses).bincount(minlength=classes**2)
        path, names = out.with_suffix(".confusion.png"), class_names(train_set)
        save_confusion(path, counts.view(classes, classes), names, title)
    if features:
        path = out.with_suffix(".neighbors.png")
        save_neighbors(path, train_set, tests[settings.val[0]], *features, title)
        log_line(f"neighbors: {path}")


def check_outputs(settings):
    """Fail early, with OSError, if an output path is not writable."""
    for name in ("out", "save", "save_features"):
        path = getattr(settings, name, None)
        if path:
            path = Path(path)
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
            # --out may be a device, such as /dev/stdout; the other files are replaced.
            special = path.exists() and not path.is_file()
            wrong = special and (path.is_dir() or name != "out")
            writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
            if wrong or not writable:
                raise OSError(f"--{name} {path}: not writable; choose another file")


def topk_correct(classes, truth):
    """Numbers (..., 2) of images that are correct in top-1 and in top-5.

    classes (..., B, up to 5), best first; truth (B,).
    """
    correct = classes == truth[:, None]
    counts = correct[..., 0].sum(dim=-1), correct.any(dim=-1).sum(dim=-1)
    return torch.stack(counts, dim=-1)


def topk_accuracy(classes, truth):
    """topk_correct in percent, as a list."""
    return (100 * topk_correct(classes, truth).double() / len(truth)).tolist()


def mean_and_std(runs):
    """Metrics of [[top-1, top-5] of each seed]; a single one has no std."""
    top1, top5 = zip(*runs, strict=True)
    std = {"std": statistics.stdev(top1)} if len(runs) > 1 else {}
    return {"top-1": statistics.mean(top1), **std, "top-5": statistics.mean(top5)}


def report(results, settings):
    """Print results as a table; append them, with the settings, to --out as a JSON line."""
    record = {"settings": settings, "torch": torch.__version__}
    # JSON has no NaN.
    record["results"] = [
        {k: v if v == v else None for k, v in r.items()} for r in results
    ]
    line = json.dumps(record, allow_nan=False)
    # Write the file even if printing fails (closed pipe, full disk behind stdout).
    try:
        log_line(settings["header"])
        print_table([as_row(result) for result in results])
        log_line(f"with all settings: {settings['out']}")
    finally:
        with path_in_errors(settings["out"]), open(settings["out"], "a") as file:
            file.write(line + "\n")


def as_row(result):
    """A result as it is printed: top-1 with its standard error, that of a binomial."""
    row = {name: x for name, x in result.items() if name != "held_out"}  # which is long
    if "test_images" in row:
        p = row["top-1"]
        error = math.sqrt(p * (100 - p) / row["test_images"])
        row["top-1"] = f"{p:.2f} +- {error:.2f}"
    return row
