"""
The published metrics are those of the logs in results/: tables are computed again.
"""

import json
import re
from itertools import permutations, product

import numpy as np
import pytest

import study
from attg.features import FEATURES
from tests.helpers import ROOT

RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
STUDY = (ROOT / "docs" / "study.md").read_text()
STUDIES = sorted(path.parent for path in RESULTS.glob("study/*/table.md"))
# The README and docs/study.md report these.
assert {"imagenette64", "toy"} <= {path.name for path in STUDIES}


@pytest.mark.parametrize("folder", STUDIES, ids=[path.name for path in STUDIES])
def test_studies_follow_from_their_logs(folder):
    """The table; each run's seed; the last k-NN of its log."""
    rows = study.table_rows(study.read_study(folder))
    assert rows and study.markdown(rows) == (folder / "table.md").read_text()
    for run in sorted(folder.glob("*-seed*")):
        seed = run.name.rpartition("-seed")[2]
        assert json.loads((run / "config.json").read_text())["seed"] == int(seed)
        metrics = study.read_metrics(run)
        last = [x for x in study.read_lines(run / "log.jsonl") if "knn" in x][-1]
        for feature in FEATURES:
            assert abs(metrics["k-NN, k = 20", feature] - last["knn"][feature]) < 0.05


def test_contrasts_follow_from_the_logs():
    """Those of docs/study.md's design, whether or not all runs have finished."""
    rows = study.contrast_rows(RESULTS / "study")
    table = (RESULTS / "study" / "contrasts.md").read_text()
    assert len(rows) == 5 and study.markdown_table(rows) == table
    for row in rows:
        variant, control = row["contrast"].split(" - ")
        cells = row["study"].removesuffix("-new-seeds").removesuffix("64")
        assert f"| {row['question']} | {cells} | `{variant}` - `{control}` |" in STUDY


def rows_of_study(name):
    """{(variant, metric, feature): row of study.table_rows}"""
    rows = study.table_rows(study.read_study(RESULTS / "study" / name))
    return {(row["variant"], row["metric"], row["feature"]): row for row in rows}


def texts(row):
    """Mean and paired difference of a row, as the pages show them; "" for vanilla."""
    mean = f"{row['mean']:.1f} ± {row['sd']:.1f}"
    if row["variant"] == "none":
        return mean, ""
    return mean, f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"


def assert_line(page, *cells):
    """A table of the page has a line with these cells."""
    line = f"| {' | '.join(cells)} |".replace("|  |", "| |")
    assert line in page, line


KNN, LINEAR = "k-NN, k = 20", "linear probe"
# Names on the page of metrics of imagenette64, and of variants of toy.
METRICS = {name: name for name in ("k-NN, k = 5", KNN, LINEAR)}
METRICS["k-NN, 10 shots"] = "k-NN, 10 labeled images per class, k = 5"
METRICS["transfer, k = 20"] = "k-NN, k = 20, on 12 classes of flowers"
VARIANTS = {"none": "vanilla", "masks": "exact masks", "self": "own encoder (`self`)"}
VARIANTS["masks+inverted"] = "exact masks, inverted"
VARIANTS["pixels"] = "TokenCut of colors (`pixels`)"
VARIANTS["gaussian"] = "a centered Gaussian, the control"


def test_tables_of_the_pages():
    rows = rows_of_study("imagenette64")
    columns = [], [], []  # of the README, whose columns are the metrics
    for (metric, name), feature in product(METRICS.items(), FEATURES):
        vanilla, guided = (rows[x, metric, feature] for x in ("none", "cnn-tokencut"))
        cells = texts(vanilla)[0], *texts(guided)
        assert_line(STUDY, name, feature.replace("_", " "), *cells)
        # As the README says, every interval includes 0.
        assert guided["pairs"] == 5 and guided["low"] < 0 < guided["high"]
        if metric in (KNN, LINEAR):
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
    for column in columns:
        assert_line(README, *column)

    rows = rows_of_study("toy")
    assert {variant for variant, _, _ in rows} == set(VARIANTS)
    for variant, name in VARIANTS.items():
        knn, linear = (texts(rows[variant, x, "patch_mean"]) for x in (KNN, LINEAR))
        assert_line(STUDY, name, "3", *knn, *linear)
    for variant in ("masks", "none"):
        assert texts(rows[variant, KNN, "class_token"])[0] in README
    new = rows_of_study("toy-new-seeds")["self", KNN, "patch_mean"]
    assert texts(new)[1] in README and new["pairs"] == 10


def top1_by_seed(runs, variant, metric, features=FEATURES):
    """Top-1 (n,) of the runs of a variant, averaged over features."""
    by_seed = [runs[variant][seed] for seed in sorted(runs[variant])]
    return np.array([np.mean([x[metric, f] for f in features]) for x in by_seed])


def mean_text(top1):
    return f"{top1.mean():.1f} ± {top1.std(ddof=1):.1f}"


def difference_text(top1, control):
    mean, low, high, _ = study.interval(top1 - control)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


@pytest.mark.parametrize("name", ["tinymid30", "tinybox20"])
def test_tables_of_photographs(name):
    """Averages of both features."""
    runs, grey = study.read_study(RESULTS / "study" / name), "grey"
    variants = [("box", "none")]
    if name == "tinymid30":
        grey = "**grey (questions 1, 2)**"
        variants += ("gaussian", "none"), ("box", "gaussian")
    cells = {"all": "", grey: f"{name}/grey: "}
    for test_set in ("original", "same class", "other class"):
        cells[test_set] = f"{name}/{test_set.replace(' ', '_')}: "
    for test_set, prefix in cells.items():
        line = [test_set]
        for metric in (prefix + KNN, prefix + LINEAR):
            line.append(mean_text(top1_by_seed(runs, "none", metric)))
            for pair in variants:
                pair = (top1_by_seed(runs, x, metric) for x in pair)
                line.append(difference_text(*pair))
        assert_line(STUDY, *line)


def test_table_of_new_seeds_on_imagenette():
    runs = study.read_study(RESULTS / "study" / "imagenette64-new-seeds")
    for (metric, name), feature in product(METRICS.items(), FEATURES):
        name = name.removesuffix(", k = 5") if "labeled" in name else name
        variants = ("none", "cnn-tokencut", "gaussian")
        values = (top1_by_seed(runs, x, metric, [feature]) for x in variants)
        none, guided, gaussian = values
        line = [f"{name}, {feature.replace('_', ' ')}", *map(mean_text, (none, guided))]
        line += difference_text(guided, none), difference_text(gaussian, none)
        assert_line(STUDY, *line, difference_text(guided, gaussian))


def add_derived(folder, runs):
    """Add metrics: k-NN - linear probe, and k-NN's growth in a run; and a control of zeros."""
    for variant, seeds in runs.items():
        for seed, metrics in seeds.items():
            log = study.read_lines(folder / f"{variant}-seed{seed}" / "log.jsonl")
            first, *_, last = [x["knn"] for x in log if "knn" in x]
            for x in FEATURES:
                metrics["gap", x] = metrics[KNN, x] - metrics[LINEAR, x]
                metrics["growth", x] = last[x] - first[x]
    runs["zeros"] = {seed: dict.fromkeys(x, 0) for seed, x in runs["none"].items()}


def test_every_interval_follows_from_the_logs():
    """Paired differences of two variants in a metric of one feature, or of both averaged."""
    known = set()
    for folder in STUDIES:
        runs = study.read_study(folder)
        add_derived(folder, runs)
        for variant, control in permutations(runs, 2):
            seeds = sorted(runs[variant].keys() & runs[control].keys())
            if len(seeds) < 3:
                continue
            pairs = [(runs[variant][seed], runs[control][seed]) for seed in seeds]
            metrics = {metric for metric, _ in pairs[0][0]}
            for metric, features in product(metrics, [*zip(FEATURES), FEATURES]):
                differences = [
                    sum(a[metric, x] - b[metric, x] for x in features) / len(features)
                    for a, b in pairs
                    if all((metric, x) in a and (metric, x) in b for x in features)
                ]
                looks = [differences]
                if len(seeds) == 10:
                    looks += differences[:5], differences[5:], differences[:7]
                elif len(seeds) == 5:  # also without one of them
                    looks += [differences[:i] + differences[i + 1 :] for i in range(5)]
                forms = (0.95, "+.1f"), (0.95, "+.2f"), (0.975, "+.2f")
                for values, (level, spec) in product(looks, forms):
                    mean, *ends, _ = study.interval(values, level)
                    low, high = (format(end, spec) for end in ends)
                    known.add(f"{mean:{spec}} [{low}, {high}]")
    form = r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]"
    known |= set(re.findall(form, (RESULTS / "study" / "contrasts.md").read_text()))
    published = set(re.findall(form, (README + STUDY).replace("\n", " ")))
    assert len(published) > 50 and published <= known, published - known


def test_quick_start_is_that_of_its_log():
    log = (RESULTS / "quickstart" / "log.txt").read_text()
    line = re.search(r"^step 1248: .*k-NN.*$", README, re.M)[0]
    assert line in log


def column(page, heading, number):
    """Cells of a column of the table with this heading, without the first two lines."""
    table = page.read_text().partition(heading)[2].partition("\n\n")[0]
    return [line.split("|")[number].strip() for line in table.splitlines()[2:]]


@pytest.mark.parametrize(("data", "number"), [("toy", 2), ("daffodils", 3)])
def test_quality_of_maps_is_that_of_the_logs(data, number):
    logs = (RESULTS / "maps" / f"quality-{data}.txt").read_text()
    logged = re.findall(r"IoU ([\d.]+), CorLoc ([\d.]+), AUROC ([\d.]+)", logs)
    cells = " ".join(column(ROOT / "docs" / "maps.md", "| | toy: IoU", number))
    published = set(re.findall(r"\d+\.\d, \d+\.\d, \d+\.\d", cells))
    assert len(published) > 5 and published <= {", ".join(three) for three in logged}


@pytest.mark.parametrize(("name", "number"), [("toy-none", 2), ("toy-masks", 3)])
def test_table_of_evaluations(name, number):
    """Its cells, class token / patch mean, are pairs of the logs."""
    pairs = {}
    for i, record in enumerate(study.read_lines(RESULTS / "eval" / f"{name}.jsonl")):
        for row in record["results"]:
            spread = f" ± {row['+-']:.1f}" if "+-" in row else ""
            key = (i, row["protocol"], row.get("k"), row.get("test"))
            pairs.setdefault(key, []).append(f"{row['top-1']:.1f}{spread}")
    published = column(RESULTS / "README.md", "| class token / mean of patch", number)
    assert len(published) > 10
    assert set(published) <= {" / ".join(pair) for pair in pairs.values()}
