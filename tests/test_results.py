"""
The published metrics are those of the logs in results/: tables are computed again.
"""

import json
import re

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


def mean(row):
    return f"{row['mean']:.1f} ± {row['sd']:.1f}"


def difference(row):
    return f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"


def assert_line(page, *cells):
    """A table of the page has a line with these cells."""
    assert f"| {' | '.join(cells)} |" in page, cells


def test_first_table_of_the_readme():
    rows = rows_of_study("imagenette64")
    cells = {"none": [], "cnn-tokencut": [], "difference": []}
    for metric in ("k-NN, k = 20", "linear probe"):
        for feature in FEATURES:
            for variant in ("none", "cnn-tokencut"):
                cells[variant].append(mean(rows[variant, metric, feature]))
            guided = rows["cnn-tokencut", metric, feature]
            cells["difference"].append(difference(guided))
    for line in cells.values():
        assert_line(README, *line)
    guided = [row for row in rows.values() if row["variant"] == "cnn-tokencut"]
    assert {(row["n"], row["pairs"]) for row in guided} == {(5, 5)}
    assert len(guided) == 12 and "5 seeds, top-1" in README.replace("\n", " ")
    # As the text says, every interval includes 0.
    assert all(row["low"] < 0 < row["high"] for row in guided)

    toy = rows_of_study("toy")
    for variant in ("masks", "none"):
        assert mean(toy[variant, "k-NN, k = 20", FEATURES[0]]) in README
    new = rows_of_study("toy-new-seeds")["self", "k-NN, k = 20", "patch_mean"]
    assert difference(new) in README and new["pairs"] == 10


def test_tables_of_the_study_page():
    rows = rows_of_study("imagenette64")
    names = {name: name for name in ("k-NN, k = 5", "k-NN, k = 20", "linear probe")}
    names["k-NN, 10 shots"] = "k-NN, 10 labeled images a class, k = 5"
    names["transfer, k = 20"] = "k-NN, k = 20, on 12 classes of flowers"
    for metric, name in names.items():
        for feature in FEATURES:
            vanilla = mean(rows["none", metric, feature])
            guided = rows["cnn-tokencut", metric, feature]
            cells = (feature.replace("_", " "), vanilla, mean(guided))
            assert_line(STUDY, name, *cells, difference(guided))
    for feature in FEATURES:
        assert difference(rows["gaussian", "k-NN, k = 20", feature]) in STUDY

    rows = rows_of_study("toy")
    names = {"none": "vanilla", "masks": "exact masks", "self": "own encoder (`self`)"}
    names["masks+inverted"] = "exact masks, inverted"
    names["pixels"] = "TokenCut of colors (`pixels`)"
    names["gaussian"] = "a centered Gaussian, the control"
    assert {variant for variant, _, _ in rows} == set(names)
    for variant, name in names.items():
        line = f"| {name} | 3 |"
        for metric in ("k-NN, k = 20", "linear probe"):
            row = rows[variant, metric, "patch_mean"]
            line += f" {mean(row)} |"
            line += f" {difference(row)} |" if variant != "none" else " |"
        assert line in STUDY


KNN, LINEAR = "k-NN, k = 20", "linear probe"
TOKEN, MEAN = FEATURES
# Study, variant, control, and the metrics and features that are averaged.
CONTRASTS = [
    ("imagenette64", "cnn-tokencut", "none", [(KNN, TOKEN), (KNN, MEAN)]),
    ("imagenette64", "gaussian", "none", [(KNN, TOKEN), (KNN, MEAN)]),
    ("imagenette64", "cnn-tokencut", "gaussian", [(KNN, TOKEN)]),
    ("imagenette64", "cnn-tokencut", "gaussian", [(KNN, MEAN)]),
    ("toy-new-seeds", "self", "none", [(KNN, MEAN)]),
    ("toy-new-seeds", "self", "gaussian", [(KNN, MEAN)]),
    ("toy-new-seeds", "self", "gaussian", [(KNN, TOKEN)]),
    ("toy-new-seeds", "gaussian", "none", [(KNN, MEAN)]),
    ("toy-new-seeds", "self", "none", [("k-NN, 10 shots", TOKEN)]),
    ("toy-new-seeds", "self", "none", [(LINEAR, MEAN)]),
    ("toy", "masks", "gaussian", [(LINEAR, MEAN)]),
    ("toy", "masks", "gaussian", [(KNN, MEAN)]),
    ("toy", "self", "gaussian", [(KNN, MEAN)]),
    ("toy", "masks", "masks+inverted", [(KNN, TOKEN)]),
    ("toy", "masks", "masks+inverted", [(KNN, MEAN)]),
]


@pytest.mark.parametrize(("name", "variant", "control", "keys"), CONTRASTS)
def test_other_contrasts_of_the_study_page(name, variant, control, keys):
    runs = study.read_study(RESULTS / "study" / name)
    differences = [
        sum(run[key] - runs[control][seed][key] for key in keys) / len(keys)
        for seed, run in runs[variant].items()
    ]
    mean, low, high, _ = study.interval(differences)
    assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" in STUDY


def test_quick_start_is_that_of_its_log():
    log = (RESULTS / "quickstart" / "log.txt").read_text()
    line = re.search(r"^step 1248: .*k-NN.*$", README, re.M)[0]
    assert line in log


@pytest.mark.parametrize(("data", "column"), [("toy", 2), ("daffodils", 3)])
def test_quality_of_maps_is_that_of_the_logs(data, column):
    logs = (RESULTS / "maps" / f"quality-{data}.txt").read_text()
    page = (ROOT / "docs" / "maps.md").read_text()
    table = page.partition("| | toy: IoU")[2].partition("\n\n")[0]
    logged = re.findall(r"IoU ([\d.]+), CorLoc ([\d.]+), AUROC ([\d.]+)", logs)
    cells = " ".join(line.split("|")[column] for line in table.splitlines()[2:])
    published = set(re.findall(r"\d+\.\d, \d+\.\d, \d+\.\d", cells))
    assert len(published) > 5 and published <= {", ".join(three) for three in logged}


@pytest.mark.parametrize(("name", "column"), [("toy-none", 2), ("toy-masks", 3)])
def test_table_of_evaluations(name, column):
    """Its cells, class token / patch mean, are pairs of the logs."""
    logged = set()
    for record in study.read_lines(RESULTS / "eval" / f"{name}.jsonl"):
        pairs = {}
        for row in record["results"]:
            spread = f" ± {row['+-']:.1f}" if "+-" in row else ""
            key = (row["protocol"], row.get("k"), row.get("test"))
            pairs.setdefault(key, []).append(f"{row['top-1']:.1f}{spread}")
        logged |= {" / ".join(pair) for pair in pairs.values()}
    page = (RESULTS / "README.md").read_text()
    table = page.partition("| class token / mean of patch")[2].partition("\n\n")[0]
    published = {x.split("|")[column].strip() for x in table.splitlines()[2:]}
    assert len(published) > 10 and published <= logged
