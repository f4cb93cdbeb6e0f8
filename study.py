"""
The paper's ablations in small: variants x seeds on one data set, each compared with the
vanilla MAE of the same seed (Sick et al., arXiv 2402.15172, Tables 9 to 11).

    python study.py --name toy --variants none masks masks+inverted gaussian --seeds 0 1 2
    python study.py --name photos --data DIR --maps cut=cut.npy cam=cam.npy \\
        --variants none cut cam cut+tau0.7+constant self --seeds 0 1 2 3 4 \\
        -- --img_size 64 --patch_size 8 --epochs 30 --eval_every 5
    python study.py --table results/study/photos       # the table of finished runs

Flags after -- are those of attg_mae.py, for all runs. A variant is the source of the maps
and changes to their use, joined by +:

    none        vanilla MAE              masks       the maps that the data set brings
    NAME        the file of --maps       self        TokenCut of the vanilla run's encoder
    gaussian    a centered Gaussian, the same for each image: a control
    +inverted +foreground +background +input_masking     uses of the map (Table 10)
    +tau0.7 +constant                                    temperature and schedule (Table 11)

Runs of a seed start from the same weights and see the same images, crops and masks in the
same order, so their differences are paired. Each run is followed by k-NN (k = 5, 20),
k-NN with few labels and the linear probe (--evaluate). Runs lie in --out; their logs and
metrics are copied to --results, where the table is updated after each run and the curves
are drawn at the end. The same command resumes an interrupted study. To use several
machines or cores, give each its own --seeds.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from attg.cli import flag, log_line, make_folder, parse, run_cli
from attg.datasets import open_data
from attg.evaluation import without_nan
from attg.features import FEATURES
from attg.files import replacing
from attg.log import revision
from attg.maps import save_maps

ROOT = Path(__file__).resolve().parent
USES = ("inverted", "foreground", "background", "input_masking")
SOURCES = ("none", "masks", "self", "gaussian")
EVALUATIONS = ("knn", "shots", "linear", "transfer")


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of a study; train holds the flags of attg_mae.py."""

    name: str = flag("toy", "name of the study and its folders")
    data: str = flag("toy", "data set with labels and a test split, see attg_mae.py")
    variants: tuple[str, ...] = flag(("none", "masks"), "see above")
    # A folder VARIANT-seedN ends with its seed, so it has no sign.
    seeds: tuple[int, ...] = flag((0, 1, 2), "one run each", 0, 2**63 - 1)
    maps: tuple[str, ...] = flag((), "NAME=FILE ...: map files of the variants NAME")
    self_flags: str = flag("", "flags of object_discovery.py for the variant self")
    evaluate: tuple[str, ...] = flag(EVALUATIONS, "evaluations, knn first")
    shots: tuple[int, ...] = flag((10,), "labeled images per class", 1, 10**7)
    transfer: str | None = flag(None, "another data set, for k-NN of the same encoders")
    out: str | None = flag(None, "folder of the runs [out/study/NAME]")
    results: str | None = flag(None, "folder of logs and table [results/study/NAME]")
    table: str | None = flag(None, "only write table and curves of this folder")
    train: tuple = ()


# -- Variants --------------------------------------------------------------------------


def variant_flags(name):
    """(source of the maps, flags of attg_mae.py) of a variant.

    Raises ValueError for a change that does not exist.
    """
    source, *changes = name.split("+")
    flags = ["--guidance", "none"] if source == "none" else []
    if source == "none" and changes:
        raise ValueError(f"--variants {name}: a vanilla MAE has no map to change")
    for change in changes:
        tau = re.fullmatch(r"tau(\d*\.?\d+)", change)
        if change in USES:
            flags += ["--guidance", change]
        elif change == "constant":
            flags += ["--tau_schedule", "constant"]
        elif tau:
            flags += ["--tau", tau[1]]
        else:
            known = ", ".join((*USES, "constant", "tau0.7"))
            raise ValueError(f"--variants {name}: +{change} is not one of {known}")
    return source, flags


def gaussian_maps(path, data):
    """Write a map file of one centered Gaussian, sigma a quarter of the side."""
    dataset = open_data(data, "train")
    axis = (np.arange(14) + 0.5) / 14 - 0.5
    bell = np.exp(-(axis**2) / (2 * 0.25**2))
    maps = np.broadcast_to(np.outer(bell, bell), (len(dataset), 14, 14))
    save_maps(path, maps, dataset, method="gaussian", sigma=0.25)


def map_files(settings):
    """{NAME: Path} of --maps. ValueError for settings that cannot work."""
    files = {}
    for text in settings.maps:
        name, _, file = text.partition("=")
        if (
            not Path(file).is_file()
            or "+" in name
            or "-seed" in name
            or name in SOURCES
        ):
            raise ValueError(f"--maps {text}: must be a new NAME=FILE, a map file")
        files[name] = Path(file)
    for name in settings.variants:
        source, _ = variant_flags(name)
        if source not in (*SOURCES, *files):
            raise ValueError(
                f"--variants {name}: no such maps; give their file, --maps "
                f"{source}=FILE.npy, or choose from {', '.join((*SOURCES, *files))}"
            )
        if source == "self" and "none" not in settings.variants:
            raise ValueError(
                f"--variants {name}: add none, whose encoder makes its maps"
            )
    unknown = set(settings.evaluate) - set(EVALUATIONS)
    if unknown or "knn" not in settings.evaluate:
        raise ValueError(
            f"--evaluate {' '.join(settings.evaluate)}: some of {', '.join(EVALUATIONS)}; "
            "always knn, which keeps the features for the others"
        )
    ours = ("--data", "--maps", "--seed", "--out", "--guidance", "--resume")
    for word in settings.train:
        if word.partition("=")[0] in ours:
            raise ValueError(
                f"{word} after --: set by the study; use the study's flags"
            )
    return files


# -- Runs ------------------------------------------------------------------------------


def run_program(log, program, *flags):
    """Run `python program flags` and append command and output to the file log.

    Raises ChildProcessError with the command and its last line if it fails. If it is
    interrupted, the program is terminated, which lets it save first.
    """
    flags = [str(flag) for flag in flags]
    command = f"python {program} {shlex.join(flags)}"
    with open(log, "a") as file:
        file.write(f"$ {command}    # {revision()}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            [sys.executable, ROOT / program, *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code != 0:
        output = Path(log).read_bytes()[begin:].decode(errors="replace")
        lines = output.strip().splitlines() or ["no output"]
        errors = [line for line in lines if "error: " in line]
        raise ChildProcessError(
            f"{command}: exit code {code}, {(errors or lines)[-1]} (all in {log})"
        )


def train_run(settings, files, variant, seed, out):
    """Make the maps of a run if needed, then train it; resumes by itself."""
    folder = out / f"{variant}-seed{seed}"
    folder.mkdir(exist_ok=True)
    source, flags = variant_flags(variant)
    maps = files.get(source)
    if source == "gaussian":
        maps = out / "gaussian.npy"
        if not maps.with_suffix(".json").is_file():
            gaussian_maps(maps, settings.data)
    if source == "self":
        maps = folder / "maps.npy"
        encoder = out / f"none-seed{seed}" / "encoder.pt"
        discovery = ["--backbone", encoder, "--data", settings.data, "--out", maps]
        discovery += shlex.split(settings.self_flags)
        if not maps.with_suffix(".json").is_file():
            run_program(folder / "log.txt", "object_discovery.py", *discovery)
    flags = ["--data", settings.data, *settings.train, "--seed", seed, *flags]
    if maps:
        flags += ["--maps", maps]
    # Written at the end of a run.
    if not (folder / "encoder.pt").exists():
        run_program(folder / "log.txt", "attg_mae.py", *flags, "--out", folder)
    return folder


def evaluate_run(settings, folder):
    """Evaluate the encoder of a run; what has its results already is skipped."""
    features = ["--features", folder / "features.pt"]
    encoder = [folder / "encoder.pt", "--k", 5, 20, "--data"]
    saving = ["--save_features", folder / "features.pt"]
    programs = {
        "knn": ("eval_knn.py", [*encoder, settings.data, *saving]),
        "shots": ("eval_knn.py", [*features, "--shots", *settings.shots]),
        "linear": ("eval_linear.py", features),
        "transfer": ("eval_knn.py", [*encoder, settings.transfer]),
    }
    for name, (program, flags) in programs.items():
        out = folder / f"{name}.jsonl"
        wanted = name in settings.evaluate and (name != "transfer" or settings.transfer)
        if wanted and not out.exists():
            run_program(folder / "eval.txt", program, *flags, "--out", out)


def run_study(settings):
    """Run all runs, one after the other; a failed run does not stop the others.

    Raises ChildProcessError at the end if any has failed.
    """
    files = map_files(settings)
    out = Path(settings.out or f"out/study/{settings.name}")
    results = Path(settings.results or f"results/study/{settings.name}")
    make_folder("out", out)
    make_folder("results", results)
    # All variants of a seed before the next seed; self needs the vanilla run's encoder.
    variants = sorted(settings.variants, key=lambda name: name.startswith("self"))
    failed = []
    for seed, variant in itertools.product(settings.seeds, variants):
        try:
            folder = train_run(settings, files, variant, seed, out)
            evaluate_run(settings, folder)
        except ChildProcessError as error:
            log_line(f"failed: {error}")
            failed.append(error)
            continue
        copy = results / folder.name
        copy.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.suffix in (".json", ".jsonl", ".txt") and path.stem != "maps":
                shutil.copyfile(path, copy / path.name)
        write_table(results)
        log_line(f"{folder.name}: done, see {copy}")
    if failed:
        raise ChildProcessError(
            f"{len(failed)} runs failed, the first: {failed[0]}; the same command tries "
            "them again"
        )
    return results


# -- Metrics of the runs ---------------------------------------------------------------


def read_lines(path):
    """The JSON lines of a file, [] if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(folder):
    """{(metric, feature): top-1 in percent} of a run's evaluations, of the last lines."""
    metrics = {}
    for name in EVALUATIONS:
        lines = read_lines(folder / f"{name}.jsonl")
        for row in lines[-1]["results"] if lines else []:
            metric = {
                "knn": f"k-NN, k = {row.get('k')}",
                "shots": f"k-NN, {row['protocol']}",
                "linear": "linear probe",
                "transfer": f"transfer, k = {row.get('k')}",
            }[name]
            if row.get("test", "test") != "test":
                metric += f", {row['test']}"
            metrics[metric, row["feature"]] = row["top-1"]
    return metrics


def read_study(results):
    """{variant: {seed: read_metrics}} of the folders VARIANT-seedN in `results`."""
    runs = {}
    for folder in sorted(results.glob("*-seed*")):
        variant, _, seed = folder.name.rpartition("-seed")
        metrics = read_metrics(folder)
        if metrics and seed.isdigit():
            runs.setdefault(variant, {})[int(seed)] = metrics
    return runs


# Quantiles of Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
T_975 += (2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009)
T_975 += (2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518)
T_975 += (2.0484, 2.0452, 2.0423)


def mean_and_std(values):
    """(mean, sample standard deviation); the deviation of one value is NaN."""
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), std


def interval(values):
    """(mean, low, high): 95 % interval of the mean by Student's t, NaN for one value.

    Above 31 values it is slightly too wide.
    """
    mean, std = mean_and_std(values)
    freedom = min(len(values) - 1, len(T_975))
    half = T_975[freedom - 1] * std / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table_rows(runs):
    """A dict for each variant, metric and feature of read_study's `runs`.

    mean and sd are over the n seeds; difference, low and high are the paired difference
    from the vanilla runs (variant none) of the same seeds and its 95 % interval, over
    `pairs` seeds.
    """
    vanilla = runs.get("none", {})
    seeds = [metrics for by_seed in runs.values() for metrics in by_seed.values()]
    keys = list(dict.fromkeys(key for metrics in seeds for key in metrics))
    rows = []
    # Vanilla first.
    for variant in sorted(runs, key=lambda name: (name != "none", name)):
        for key in keys:
            values = {s: m[key] for s, m in sorted(runs[variant].items()) if key in m}
            if not values:
                continue
            mean, std = mean_and_std(list(values.values()))
            row = {"variant": variant, "metric": key[0], "feature": key[1]}
            row |= {"n": len(values), "mean": mean, "sd": std, "values": values}
            differences = [
                value - vanilla[seed][key]
                for seed, value in values.items()
                if variant != "none" and key in vanilla.get(seed, {})
            ]
            if differences:
                mean, low, high = interval(differences)
                row |= {"pairs": len(differences), "difference": mean}
                row |= {"low": low, "high": high}
            rows.append(row)
    return rows


def markdown(rows):
    """The rows as two Markdown tables: means, and paired differences from vanilla."""
    means, differences = {}, {}
    for row in rows:
        column = f"{row['metric']}, {row['feature'].replace('_', ' ')}"
        spread = f" ± {row['sd']:.2f}" if row["n"] > 1 else ""
        cells = means.setdefault((row["variant"], row["n"]), {})
        cells[column] = f"{row['mean']:.2f}{spread}"
        if "difference" in row:
            spread = (
                f" [{row['low']:+.2f}, {row['high']:+.2f}]" if row["pairs"] > 1 else ""
            )
            cells = differences.setdefault((row["variant"], row["pairs"]), {})
            cells[column] = f"{row['difference']:+.2f}{spread}"
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


def write_table(results):
    """Write table.md and table.jsonl of the runs in the folder `results`."""
    rows = table_rows(read_study(results))
    with replacing(results / "table.md") as temporary:
        temporary.write_text(markdown(rows))
    with replacing(results / "table.jsonl") as temporary:
        lines = [json.dumps(without_nan(row)) for row in rows]
        temporary.write_text("\n".join(lines) + "\n")


def draw_curves(results):
    """Draw curves.png: k-NN accuracy over the epochs, the mean of each variant.

    Skipped without matplotlib, or if the logs have no k-NN.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log_line("no curves.png: matplotlib is not installed")
        return
    curves = {}
    for folder in sorted(results.glob("*-seed*")):
        points = [x for x in read_lines(folder / "log.jsonl") if "knn" in x]
        if points and (folder / "config.json").is_file():
            epochs = json.loads((folder / "config.json").read_text())["epochs"]
            per_step = epochs / points[-1]["step"]
            by_epoch = {round(x["step"] * per_step, 6): x["knn"] for x in points}
            curves.setdefault(folder.name.rpartition("-seed")[0], []).append(by_epoch)
    if not curves:
        return
    figure = Figure((10, 4), layout="constrained")
    for axes, feature in zip(figure.subplots(1, 2), FEATURES, strict=True):
        for number, (variant, runs) in enumerate(curves.items()):
            color, epochs = f"C{number}", sorted(set.intersection(*map(set, runs)))
            for run in runs:
                values = [run[epoch][feature] for epoch in run]
                axes.plot(list(run), values, color=color, alpha=0.25, linewidth=1)
            means = [statistics.fmean(run[e][feature] for run in runs) for e in epochs]
            axes.plot(epochs, means, color=color, label=f"{variant} (n = {len(runs)})")
        title = feature.replace("_", " ")
        axes.set(title=title, xlabel="epoch", ylabel="k-NN, k = 20, top-1 %")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    with replacing(results / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def report(results):
    """Write table and curves of the folder `results`, print and return the table."""
    rows = table_rows(read_study(results))
    if not rows:
        raise ValueError(f"{results}: no results of runs in folders VARIANT-seedN")
    write_table(results)
    draw_curves(results)
    log_line((results / "table.md").read_text())
    return rows


# -- Command line ----------------------------------------------------------------------


def main(argv=None):
    """Run a study. Returns the rows of its table, see table_rows."""
    argv, train = list(sys.argv[1:] if argv is None else argv), []
    if "--" in argv:
        argv, train = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    settings = parse(Settings, __doc__, argv)
    settings.train = tuple(train)
    if settings.table:
        return report(Path(settings.table))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return report(run_study(settings))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run_cli(main, interrupted="interrupted; the same command resumes")
