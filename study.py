"""
The paper's ablations at small scale: variants x seeds on one data set, each compared
with the vanilla MAE of the same seed (Sick et al., arXiv 2402.15172, Tables 9 to 11).

    python study.py --variants masks masks+guidance=inverted gaussian --seeds 0 1 2
    python study.py --out out/photos --data DIR --maps cut=cut.npy cam=cam.npy \\
        --variants cut cam cut+tau=0.7+tau_schedule=constant self --seeds 0 1 2 3 4 \\
        -- --img_size 64 --patch_size 8 --epochs 30 --eval_every 5
    python study.py --table out/photos                 # the table of finished runs
    python study.py --table results/study              # the contrasts of contrasts.json
    python study.py --compare out/a out/b              # any runs of attg_mae.py

Flags after -- are those of attg_mae.py, for all runs. A variant is the source of the maps,
and +FLAG=VALUE for each flag of attg_mae.py that differs. Sources:

    none        vanilla MAE              masks       the maps that the data set brings
    NAME        the file of --maps       self        TokenCut of the vanilla run's encoder
    gaussian    a centered Gaussian, the same for each image: a control
    self-shuffled    the maps of self, each given to another image: a control

Runs of a seed start from the same weights and see the same images, crops and masks in the
same order, so their differences are paired. The table in --out is updated after each run.
The same command resumes an interrupted study. To use several machines or cores, give each
its own --seeds.
"""

if __name__ == "__main__":
    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()

import dataclasses
import importlib.util
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from attg.checkpoint import check_data, read_run
from attg.cli import flag, parse, run_cli
from attg.datasets import open_data
from attg.figures import PANELS, append_images, panels_of, plot_panels
from attg.files import atomic_write
from attg.log import log_line, print_table, read_log, rename_settings, revision
from attg.maps import load_maps, read_manifest, save_maps
from attg_mae import Config

ROOT = Path(__file__).resolve().parent
SOURCES = ("none", "masks", "self", "self-shuffled", "gaussian")
STUDY_FLAGS = {"--data", "--maps", "--seed", "--out", "--guidance", "--resume"}
# Results file of an evaluation: format of its metric's name.
METRICS = {"knn": "k-NN, k = {k}", "shots": "k-NN, {protocol}"}
METRICS |= {"linear": "linear probe", "transfer": "transfer, k = {k}"}
DIFFERENCE = "{difference:+.2f} [{low:+.2f}, {high:+.2f}]"


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Settings of a study; train holds the flags of attg_mae.py."""

    data: str = flag("toy", "data set with labels and a test split, see docs/data.md")
    variants: tuple[str, ...] = flag(("masks",), "besides none, see above")
    # A folder VARIANT-seedN ends with its seed, so it has no sign.
    seeds: tuple[int, ...] = flag((0, 1, 2), "one run each", 0, 2**63 - 1)
    maps: tuple[str, ...] = flag((), "NAME=FILE ...: map files of the variants NAME")
    val: tuple[str, ...] = flag(("test",), "test sets, see eval_knn.py")
    out: str = flag("out/study", "folder of the runs and the table")
    table: str | None = flag(None, "only write the table of this folder, see above")
    compare: tuple[str, ...] = flag((), "only compare these run folders")
    train: tuple = ()


def variant_flags(variant):
    """(source of the maps, flags of attg_mae.py) of a variant."""
    source, *changes = variant.split("+")
    guidance = ["--guidance=none"] if source == "none" else []
    return source, guidance + [f"--{change}" for change in changes]


def check_variants(settings):
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


def open_images(settings):
    """The training images of all runs."""
    cfg = parse(Config, "", ["--data", settings.data, *settings.train])
    return open_data(cfg.data, classes=cfg.classes)


def gaussian_maps(path, dataset):
    """Write a map file of one centered Gaussian, sigma a quarter of the side."""
    axis = (np.arange(14) + 0.5) / 14 - 0.5
    bell = np.exp(-(axis**2) / (2 * 0.25**2))
    maps = np.broadcast_to(np.outer(bell, bell), (len(dataset), 14, 14))
    save_maps(path, maps, dataset, method="gaussian", sigma=0.25)


def shuffle(maps, seed):
    """Give the map of each image to another image: a random cycle through all of them."""
    order = np.random.default_rng(seed).permutation(len(maps))
    shuffled = np.empty_like(maps)
    shuffled[order] = maps[np.roll(order, 1)]
    return shuffled


def run_program(output, log, program, *flags):
    """Run `python program flags` unless the file `output`, which it writes last, exists.

    Command and messages are appended to the file log. Raises ChildProcessError if the
    program fails, ValueError if output is there, but not by this command.
    """
    flags = [str(flag) for flag in flags]
    command = f"python {program} {shlex.join(flags)}"
    if output.exists():
        if f"$ {command}    #" not in log.read_text():
            raise ValueError(f"{output} was not made by {command}; change --out")
        return
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
    log = folder / "log.txt"
    source, flags = variant_flags(variant)
    maps = files.get(source)
    if source == "gaussian":
        maps = out / "gaussian.npy"
        if not maps.with_suffix(".json").exists():
            gaussian_maps(maps, open_images(settings))
    if source == "self":
        maps = folder / "maps.npy"
        # Data and classes are those of the encoder.
        discovery = ["--backbone", out / f"none-seed{seed}" / "encoder.pt"]
        done = maps.with_suffix(".json")
        run_program(done, log, "object_discovery.py", *discovery, "--out", maps)
    if source == "self-shuffled":
        maps, dataset = folder / "maps.npy", open_images(settings)
        own, _ = load_maps(out / f"self-seed{seed}" / "maps.npy", dataset)
        save_maps(maps, shuffle(own, seed), dataset, "self, shuffled", seed=seed)
    if maps:
        flags += ["--maps", maps]
    flags = [*settings.train, "--seed", seed, *flags, "--out", folder]
    flags = ["--data", settings.data, *flags]
    if (folder / "last.pt").exists():
        # Otherwise the seeds of one variant would differ in their images or maps.
        cfg = parse(Config, "", list(map(str, flags)))
        maps_id = read_manifest(Path(maps))["checksum"] if maps else None
        images = open_images(settings)
        check_data(cfg, read_run(folder / "last.pt"), images, maps_id)
    run_program(folder / "encoder.pt", log, "attg_mae.py", *flags)
    return folder


def evaluate(settings, folder):
    """Evaluate the encoder of a run."""
    encoder, features = folder / "encoder.pt", folder / "features.pt"
    val = ("--val", *settings.val)  # data and classes are those of the encoder
    programs = {
        "knn": ("eval_knn", encoder, *val, "--k", 5, 20, "--save_features", features),
        "shots": ("eval_knn", "--features", features, "--shots", 10),
        "linear": ("eval_linear", "--features", features),
    }
    for name, (program, *flags) in programs.items():
        out = folder / f"{name}.jsonl"
        log = folder / "eval.txt"
        run_program(out, log, f"{program}.py", *flags, "--out", out)


def run_study(settings):
    """Train and evaluate all runs, one after the other."""
    files = check_variants(settings)
    variants = {"none", *settings.variants}
    if any(variant.startswith("self-shuffled") for variant in variants):
        variants.add("self")
    # All variants of a seed before the next seed. In this order self finds the encoder of
    # none, and self-shuffled the maps of self.
    for seed, variant in itertools.product(settings.seeds, sorted(variants)):
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
                label = f"{row['test']}: {label}"
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


def interval(values, level=0.95):
    """(mean, low, high, p): interval of the mean, and its two-sided p-value against 0.

    By Student's t. All but the mean are NaN for one value. Needs scipy.
    """
    from scipy import stats

    if len(values) == 1:
        return values[0], math.nan, math.nan, math.nan
    test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(level)
    # NaN if all differences are 0.
    p = float(np.nan_to_num(test.pvalue, nan=1.0))
    return statistics.fmean(values), float(low), float(high), p


def table_rows(runs):
    """A dict for each variant, metric and feature of read_study's `runs`.

    mean and sd are over the n seeds; difference, low, high and p are the paired difference
    from the vanilla runs (variant none) of the same seeds, its 95 % interval and p-value,
    over `pairs` seeds.
    """
    vanilla = runs.get("none", {})
    metrics = [metrics for by_seed in runs.values() for metrics in by_seed.values()]
    keys = dict.fromkeys(key for run in metrics for key in run)
    # All metrics of a test set together.
    keys = sorted(keys, key=lambda key: key[0].rpartition(": ")[0])
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
            names = ("difference", "low", "high", "p")
            row |= dict(zip(names, interval(differences), strict=True))
            row["pairs"] = len(pairs)
        rows.append(row)
    return rows


def markdown(rows):
    """The rows as two Markdown tables: means, and paired differences from vanilla."""
    text = "Top-1 in percent, mean ± standard deviation over n seeds.\n\n"
    text += pivot(rows, "{variant}, n = {n}", "{mean:.2f} ± {sd:.2f}")
    if paired := [row for row in rows if "difference" in row]:
        text += (
            "\nPaired differences from the vanilla runs of the same n seeds, with the "
        )
        text += "95 % interval of their mean (a single seed has none).\n\n"
        text += pivot(paired, "{variant}, n = {pairs}", DIFFERENCE)
    return text


def pivot(rows, column, cell):
    """A Markdown table with a line for each metric and feature.

    column, cell: formats of the heading and the text of a cell.
    """
    table = {}
    for row in rows:
        names = {"metric": row["metric"], "feature": row["feature"].replace("_", " ")}
        cells = table.setdefault((row["metric"], row["feature"]), names)
        # A single seed has no deviation and no interval.
        text = cell.format(**row).replace(" ± nan", "").replace(" [+nan, +nan]", "")
        cells[column.format(**row)] = text
    return markdown_table(table.values())


def markdown_table(rows):
    """A Markdown table of dicts, with a column for each key of any of them."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def contrast_row(folder, contrast):
    """The result of an entry of contrasts.json, a row of contrasts.md.

    The entry: question, study (a folder), variant, control, metric, features
    (averaged), and looks, lists of seeds. If a look's interval contains 0, the next
    look follows. For k looks, intervals are of 1 - 0.05 / k and p is multiplied by k. A
    look gives no answer before all its runs have finished.
    """
    runs = read_study(folder / contrast["study"])
    pair, looks = (contrast["variant"], contrast["control"]), contrast["looks"]
    keys = [(contrast["metric"], feature) for feature in contrast["features"]]
    row = {name: contrast[name] for name in ("question", "study", "metric")}
    row["features"] = ", ".join(contrast["features"]).replace("_", " ")
    row["contrast"] = " - ".join(pair)

    def top1(name, seed):
        run = runs.get(name, {}).get(seed, {})
        return statistics.fmean(run.get(key, math.nan) for key in keys)

    for seeds in looks:
        values = np.array([[top1(name, seed) for seed in seeds] for name in pair])
        finished = np.isfinite(values).sum()
        row["answer"] = f"open, {finished} of {values.size} runs"
        if finished < values.size:
            return row
        differences, level = (values[0] - values[1]).tolist(), 1 - 0.05 / len(looks)
        mean, low, high, p = interval(differences, level)
        row |= {"n": len(seeds), "interval": f"{level:.1%}"}
        row["difference"] = DIFFERENCE.format(difference=mean, low=low, high=high)
        if not low <= 0 <= high:
            break
    side = "above 0" if mean > 0 else "below 0"
    row["answer"] = "undecided" if low <= 0 <= high else side
    row["p"] = min(1, len(looks) * p)
    return row


def contrast_rows(folder):
    """The rows of contrasts.md: the results of contrasts.json.

    p, Holm: adjusted for all contrasts; open ones count as p = 1.
    """
    contrasts = json.loads((folder / "contrasts.json").read_text())
    rows = [contrast_row(folder, contrast) for contrast in contrasts]
    answered, adjusted = [row for row in rows if "p" in row], 0
    for i, row in enumerate(sorted(answered, key=lambda row: row["p"])):
        adjusted = max(adjusted, min(1, (len(rows) - i) * row["p"]))
        row |= {"p": f"{row['p']:.2g}", "p, Holm": f"{adjusted:.2g}"}
    return rows


def write_table(folder):
    """Write table.md of the runs in a folder, or contrasts.md if it has contrasts.json.

    Returns (rows, text): those of table_rows or contrast_rows.
    """
    name, rows = "table.md", table_rows(read_study(folder))
    text = markdown(rows)
    if (folder / "contrasts.json").exists():
        name, rows = "contrasts.md", contrast_rows(folder)
        text = markdown_table(rows)
    if not rows:
        raise ValueError(f"{folder}: no results of runs in folders VARIANT-seedN")
    with atomic_write(folder / name) as temporary:
        temporary.write_text(text)
    return rows, text


def compare(folders):
    """Print the settings that differ between runs and their last metrics.

    Draws compare.png beside the first: curves over each other, and reconstructions.
    """
    settings, metrics, panels = {}, {}, {}
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())
        for name, value in rename_settings(config).items():
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
    if path.exists():
        log_line(f"figure: {path}")


def main(argv=None):
    """Run a study. Returns the rows of its table, see write_table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    settings = parse(Settings, __doc__, argv[:end])
    settings.train = tuple(argv[end + 1 :])
    if settings.compare:
        return compare(settings.compare)
    if not importlib.util.find_spec("scipy"):
        raise ValueError("intervals need scipy: pip install scipy")
    folder = Path(settings.table or settings.out)
    if not settings.table:
        run_study(settings)
    rows, text = write_table(folder)
    log_line(text)
    return rows


if __name__ == "__main__":
    run_cli(main, interrupted="interrupted; the same command resumes")
