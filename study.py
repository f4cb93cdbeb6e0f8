"""
The paper's ablations in small: variants x seeds on one data set, each compared with the
vanilla MAE of the same seed (Sick et al., arXiv 2402.15172, Tables 9 to 11).

    python study.py --variants masks masks+guidance=inverted gaussian --seeds 0 1 2
    python study.py --out out/photos --data DIR --maps cut=cut.npy cam=cam.npy \\
        --variants cut cam cut+tau=0.7+tau_schedule=constant self --seeds 0 1 2 3 4 \\
        -- --img_size 64 --patch_size 8 --epochs 30 --eval_every 5
    python study.py --table out/photos                 # the table of finished runs
    python study.py --compare out/a out/b              # any runs of attg_mae.py

Flags after -- are those of attg_mae.py, for all runs. A variant is the source of the maps,
and +FLAG=VALUE for each flag of attg_mae.py that differs. Sources:

    none        vanilla MAE              masks       the maps that the data set brings
    NAME        the file of --maps       self        TokenCut of the vanilla run's encoder
    gaussian    a centered Gaussian, the same for each image: a control

Runs of a seed start from the same weights and see the same images, crops and masks in the
same order, so their differences are paired. The table in --out is updated after each run.
The same command resumes an interrupted study. To use several machines or cores, give each
its own --seeds.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from attg.cli import flag, log_line, parse, print_table, run_cli
from attg.datasets import open_data
from attg.figures import PANELS, append_images, panels_of, plot_panels
from attg.files import replacing
from attg.log import read_log, rename, revision
from attg.maps import save_maps
from attg_mae import Config

ROOT = Path(__file__).resolve().parent
SOURCES = ("none", "masks", "self", "gaussian")
STUDY_FLAGS = {"--data", "--maps", "--seed", "--out", "--guidance", "--resume"}
# File of a run with the results of an evaluation: name of its metric.
METRICS = {"knn": "k-NN, k = {k}", "shots": "k-NN, {protocol}"}
METRICS |= {"linear": "linear probe", "transfer": "transfer, k = {k}"}


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of a study; train holds the flags of attg_mae.py."""

    data: str = flag("toy", "data set with labels and a test split, see attg_mae.py")
    variants: tuple[str, ...] = flag(("masks",), "besides none, see above")
    # A folder VARIANT-seedN ends with its seed, so it has no sign.
    seeds: tuple[int, ...] = flag((0, 1, 2), "one run each", 0, 2**63 - 1)
    maps: tuple[str, ...] = flag((), "NAME=FILE ...: map files of the variants NAME")
    val: tuple[str, ...] = flag(("test",), "test sets, see eval_knn.py")
    out: str = flag("out/study", "folder of the runs and the table")
    table: str | None = flag(None, "only write the table of this folder")
    compare: tuple[str, ...] = flag((), "only compare these run folders")
    train: tuple = ()


def variant_flags(variant):
    """(source of the maps, flags of attg_mae.py) of a variant."""
    source, *changes = variant.split("+")
    guidance = ["--guidance=none"] if source == "none" else []
    return source, guidance + [f"--{change}" for change in changes]


def check_settings(settings):
    """{NAME: FILE} of --maps. Raises ValueError for settings that cannot work."""
    files = dict(text.partition("=")[::2] for text in settings.maps)
    for name, file in files.items():
        if not Path(file).is_file() or name in SOURCES:
            remedy = "must be NAME=FILE, a new name and a map file"
            raise ValueError(f"--maps {name}={file}: {remedy}")
    for name in STUDY_FLAGS & {word.partition("=")[0] for word in settings.train}:
        raise ValueError(f"{name} after --: set by the study; use the study's flags")
    for variant in settings.variants:
        source, flags = variant_flags(variant)
        parse(Config, "", [*settings.train, *flags])
        if source not in (*SOURCES, *files):
            raise ValueError(
                f"--variants {variant}: no such maps; give their file, --maps "
                f"{source}=FILE.npy, or choose from {', '.join((*SOURCES, *files))}"
            )
    return files


def gaussian_maps(path, data):
    """Write a map file of one centered Gaussian, sigma a quarter of the side."""
    dataset = open_data(data, "train")
    axis = (np.arange(14) + 0.5) / 14 - 0.5
    bell = np.exp(-(axis**2) / (2 * 0.25**2))
    maps = np.broadcast_to(np.outer(bell, bell), (len(dataset), 14, 14))
    save_maps(path, maps, dataset, method="gaussian", sigma=0.25)


def run_program(output, log, program, *flags):
    """Run `python program flags` unless the file `output`, which it writes last, exists.

    Command and messages are appended to the file log. Raises ChildProcessError if the
    program fails.
    """
    if output.exists():
        return
    flags = [str(flag) for flag in flags]
    command = f"python {program} {shlex.join(flags)}"
    with open(log, "a") as file:
        print(f"$ {command}    # {revision()}", file=file, flush=True)
        argv = [sys.executable, ROOT / program, *flags]
        code = subprocess.call(argv, stdout=file, stderr=subprocess.STDOUT)
    if code != 0:
        raise ChildProcessError(f"{command}: exit code {code}; messages: {log}")


def train(settings, files, variant, seed):
    """Make the maps of a run if needed, and train it. Returns its folder."""
    out = Path(settings.out)
    folder = out / f"{variant}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    log, data = folder / "log.txt", ("--data", settings.data)
    source, flags = variant_flags(variant)
    maps = files.get(source)
    if source == "gaussian":
        maps = out / "gaussian.npy"
        if not maps.with_suffix(".json").exists():
            gaussian_maps(maps, settings.data)
    if source == "self":
        maps = folder / "maps.npy"
        discovery = ["--backbone", out / f"none-seed{seed}" / "encoder.pt", *data]
        done = maps.with_suffix(".json")
        run_program(done, log, "object_discovery.py", *discovery, "--out", maps)
    if maps:
        flags += ["--maps", maps]
    flags = [*data, *settings.train, "--seed", seed, *flags, "--out", folder]
    run_program(folder / "encoder.pt", log, "attg_mae.py", *flags)
    return folder


def evaluate(settings, folder):
    """Evaluate the encoder of a run."""
    encoder, features = folder / "encoder.pt", folder / "features.pt"
    data = ("--data", settings.data, "--val", *settings.val)
    programs = {
        "knn": ("eval_knn", encoder, *data, "--k", 5, 20, "--save_features", features),
        "shots": ("eval_knn", "--features", features, "--shots", 10),
        "linear": ("eval_linear", "--features", features),
    }
    for name, (program, *flags) in programs.items():
        out = folder / f"{name}.jsonl"
        log = folder / "eval.txt"
        run_program(out, log, f"{program}.py", *flags, "--out", out)


def run_study(settings):
    """Train and evaluate all runs, one after the other."""
    files = check_settings(settings)
    # self needs the encoder of the vanilla run.
    variants = sorted({"none", *settings.variants}, key=lambda x: x.startswith("self"))
    # All variants of a seed before the next seed.
    for seed, variant in itertools.product(settings.seeds, variants):
        folder = train(settings, files, variant, seed)
        evaluate(settings, folder)
        write_table(Path(settings.out))
        log_line(f"{folder}: done")


def read_lines(path):
    """The JSON lines of a file, [] if it does not exist."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def read_metrics(folder):
    """{(metric, feature): top-1 in percent} of a run's evaluations, of the last lines."""
    metrics = {}
    for name, metric in METRICS.items():
        lines = read_lines(folder / f"{name}.jsonl")
        for row in lines[-1]["results"] if lines else []:
            label = metric.format(**row)
            if row.get("test", "test") != "test":
                label += f", {row['test']}"
            metrics[label, row["feature"]] = row["top-1"]
    return metrics


def read_study(folder):
    """{variant: {seed: read_metrics}} of the runs VARIANT-seedN in a folder."""
    runs = {}
    for run in sorted(folder.glob("*-seed[0-9]*")):
        variant, _, seed = run.name.rpartition("-seed")
        if metrics := read_metrics(run):
            runs.setdefault(variant, {})[int(seed)] = metrics
    return runs


# Quantiles of Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
T_975 += (2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009)


def interval(values):
    """(mean, low, high): 95 % interval of the mean by Student's t, NaN for one value.

    Above 19 values it is slightly too wide.
    """
    mean, n = statistics.fmean(values), len(values)
    half = math.nan
    if n > 1:
        quantile = T_975[min(n - 1, len(T_975)) - 1]
        half = quantile * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def table_rows(runs):
    """A dict for each variant, metric and feature of read_study's `runs`.

    mean and sd are over the n seeds; difference, low and high are the paired difference
    from the vanilla runs (variant none) of the same seeds and its 95 % interval, over
    `pairs` seeds.
    """
    vanilla = runs.get("none", {})
    metrics = [metrics for by_seed in runs.values() for metrics in by_seed.values()]
    keys = dict.fromkeys(key for run in metrics for key in run)
    # Vanilla first.
    variants = sorted(runs, key=lambda name: (name != "none", name))
    rows = []
    for variant, key in itertools.product(variants, keys):
        values = {s: m[key] for s, m in sorted(runs[variant].items()) if key in m}
        if not values:
            continue
        top1 = list(values.values())
        sd = statistics.stdev(top1) if len(top1) > 1 else math.nan
        row = {"variant": variant, "metric": key[0], "feature": key[1]}
        row |= {"n": len(top1), "mean": statistics.fmean(top1), "sd": sd}
        row["values"] = values
        pairs = [seed for seed in values if key in vanilla.get(seed, {})]
        if pairs and variant != "none":
            differences = [values[seed] - vanilla[seed][key] for seed in pairs]
            names = ("difference", "low", "high")
            row |= dict(zip(names, interval(differences), strict=True))
            row["pairs"] = len(pairs)
        rows.append(row)
    return rows


def markdown(rows):
    """The rows as two Markdown tables: means, and paired differences from vanilla."""
    means, differences = {}, {}
    for row in rows:
        column = f"{row['metric']}, {row['feature'].replace('_', ' ')}"
        cells = means.setdefault((row["variant"], row["n"]), {})
        cells[column] = "{mean:.2f} ± {sd:.2f}".format(**row)
        if "difference" in row:
            cells = differences.setdefault((row["variant"], row["pairs"]), {})
            cells[column] = "{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row)
    return (
        "Top-1 in percent, mean ± standard deviation over n seeds.\n\n"
        + markdown_table(means)
        + "\nPaired differences from the vanilla runs of the same n seeds, with the 95 % "
        + "interval of their mean.\n\n"
        + markdown_table(differences)
    )


def markdown_table(cells):
    """A Markdown table of {(variant, n): {column: text}}."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [["variant", "n", *columns], ["---"] * (2 + len(columns))]
    for (variant, n), row in cells.items():
        lines.append([variant, str(n), *(row.get(column, "") for column in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table(folder):
    """Write table.md of the runs in a folder. Returns its rows, see table_rows."""
    rows = table_rows(read_study(folder))
    if not rows:
        raise ValueError(f"{folder}: no results of runs in folders VARIANT-seedN")
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(markdown(rows))
    return rows


def compare(folders):
    """Print the settings that differ between runs and their last metrics.

    Draws compare.png beside the first: curves over each other, and reconstructions.
    """
    settings, metrics, panels = {}, {}, {}
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())
        for name, value in rename(config).items():
            settings.setdefault(name, {})[str(folder)] = str(value)
        log, last = read_log(folder / "log.jsonl"), {}
        for record in log:
            last |= record | record.get("knn", {})
        last = {name: last[name] for name in ("step", *PANELS) if name in last}
        last |= {", ".join(key): top1 for key, top1 in read_metrics(folder).items()}
        for name, value in last.items():
            metrics.setdefault(name, {})[str(folder)] = f"{value:.4g}"
        name = "/".join(folder.parts[-2:])
        for title, curves in panels_of(log, name).items():
            panels.setdefault(title, {}).update(curves)
    changed = {k: row for k, row in settings.items() if len({*row.values()}) > 1}
    print_table([{"setting": name} | row for name, row in changed.items()])
    print_table([{"metric": name} | row for name, row in metrics.items()])
    path = Path(folders[0]).with_name("compare.png")
    plot_panels(path, panels)
    append_images(path, [Path(folder, "reconstructions.png") for folder in folders])
    log_line(f"figure: {path}")


def main(argv=None):
    """Run a study. Returns the rows of its table, see table_rows."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    settings = parse(Settings, __doc__, argv[:end])
    settings.train = tuple(argv[end + 1 :])
    if settings.compare:
        return compare(settings.compare)
    folder = Path(settings.table or settings.out)
    if not settings.table:
        run_study(settings)
    rows = write_table(folder)
    log_line((folder / "table.md").read_text())
    return rows


if __name__ == "__main__":
    run_cli(main, interrupted="interrupted; the same command resumes")
