"""
The published metrics are those of the logs in results/: tables are computed again.
"""

import json
import re

import pytest

import study
from tests.helpers import ROOT

RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
STUDY = (ROOT / "docs" / "study.md").read_text()
STUDIES = sorted(path.parent for path in RESULTS.glob("study/*/table.md"))
# The README and docs/study.md report these.
assert {"imagenette64", "toy"} <= {path.name for path in STUDIES}


@pytest.mark.parametrize("folder", STUDIES, ids=[path.name for path in STUDIES])
def test_studies_follow_from_their_logs(folder):
    """The table; each run's seed and commit; the last k-NN of its log."""
    rows = study.table_rows(study.read_study(folder))
    assert rows and study.markdown(rows) == (folder / "table.md").read_text()
    commits = {}
    for run in sorted(folder.glob("*-seed*")):
        seed = run.name.rpartition("-seed")[2]
        assert json.loads((run / "config.json").read_text())["seed"] == int(seed)
        log = (run / "log.txt").read_text()
        command = r"^\$ python attg_mae.py .*--seed (\d+) .*# (\w+)$"
        logged = re.search(command, log, re.M)
        assert logged[1] == seed
        commits.setdefault(seed, set()).add(logged[2])
        metrics = study.read_metrics(run)
        last = [x for x in study.read_lines(run / "log.jsonl") if "knn" in x][-1]
        for feature in study.FEATURES:
            assert abs(metrics["k-NN, k = 20", feature] - last["knn"][feature]) < 0.05
    # Paired runs are of the same commit.
    assert all(len(of_seed) == 1 for of_seed in commits.values())


def rows_of_study(name):
    """{(variant, metric, feature): row of study.table_rows}"""
    rows = study.table_rows(study.read_study(RESULTS / "study" / name))
    return {(row["variant"], row["metric"], row["feature"]): row for row in rows}


def mean(row):
    return f"{row['mean']:.1f} ± {row['sd']:.1f}"


def difference(row):
    return f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"


def test_first_table_of_the_readme():
    rows = rows_of_study("imagenette64")
    cells = {"none": [], "cnn-tokencut": [], "difference": []}
    for metric in ("k-NN, k = 20", "linear probe"):
        for feature in study.FEATURES:
            for variant in ("none", "cnn-tokencut"):
                cells[variant].append(mean(rows[variant, metric, feature]))
            guided = rows["cnn-tokencut", metric, feature]
            cells["difference"].append(difference(guided))
    assert all(f"| {' | '.join(line)} |" in README for line in cells.values())
    guided = [row for row in rows.values() if row["variant"] == "cnn-tokencut"]
    assert {(row["n"], row["pairs"]) for row in guided} == {(5, 5)}
    assert len(guided) == 12 and "5 seeds, top-1" in README
    # As the text says, every interval includes 0.
    assert all(row["low"] < 0 < row["high"] for row in guided)
    toy = rows_of_study("toy")
    for variant in ("masks", "none"):
        both = [mean(toy[variant, "k-NN, k = 20", x]) for x in study.FEATURES]
        assert " / ".join(both) in README


def cells_of(page, *first):
    """Cells of the table line of a page that begins with these cells."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(cells[: len(first)]) == first:
            return cells[len(first) :]
    raise AssertionError(first)


def test_tables_of_the_study_page():
    rows = rows_of_study("imagenette64")
    names = {"k-NN, 10 shots": "k-NN, 10 labeled images a class, k = 5"}
    names["transfer, k = 20"] = "k-NN, k = 20, on 12 classes of flowers"
    for metric in ("k-NN, k = 5", "k-NN, k = 20", "linear probe", *names):
        for feature in study.FEATURES:
            guided = rows["cnn-tokencut", metric, feature]
            vanilla = rows["none", metric, feature]
            cells = cells_of(
                STUDY, names.get(metric, metric), feature.replace("_", " ")
            )
            assert cells == [mean(vanilla), mean(guided), difference(guided)]
    for feature in study.FEATURES:
        assert difference(rows["gaussian", "k-NN, k = 20", feature]) in STUDY

    rows = rows_of_study("toy")
    names = {"none": "vanilla", "masks": "exact masks", "self": "own encoder (`self`)"}
    names["masks+inverted"] = "exact masks, inverted"
    names["pixels"] = "TokenCut of colors (`pixels`)"
    names["gaussian"] = "a centered Gaussian, the control"
    assert {variant for variant, _, _ in rows} == set(names)
    for variant, name in names.items():
        expected = []
        for metric in ("k-NN, k = 20", "linear probe"):
            row = rows[variant, metric, "patch_mean"]
            expected += [mean(row), difference(row) if variant != "none" else ""]
        assert cells_of(STUDY, name, str(row["n"])) == expected


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


def rows_of_evaluations(name):
    """{(protocol, k or None, test, feature): result}"""
    rows = {}
    for record in study.read_lines(RESULTS / "eval" / f"{name}.jsonl"):
        for row in record["results"]:
            protocol = row["protocol"]
            if protocol == "finetune":
                protocol += f" {record['settings']['fraction']}"
            key = (protocol, row.get("k"), row.get("test", "test"), row["feature"])
            assert key not in rows
            rows[key] = row
    return rows


# Line of the table: protocol, k, test set.
EVALUATIONS = {
    "k-NN, k = 20": ("k-NN", 20, "test"),
    "k-NN, 10 labeled images a class, k = 5": ("10 shots", 5, "test"),
    "linear probe": ("linear", None, "test"),
    "linear, 10 labeled images a class": ("10 shots", None, "test"),
    "linear, 50 labeled images a class": ("50 shots", None, "test"),
    "`--protocol mae` (few epochs)": ("mae", None, "test"),
    "fine-tuning, 1 % of the labels": ("finetune 0.01", None, "test"),
    "fine-tuning, 10 %": ("finetune 0.1", None, "test"),
    "linear, objects on black (`only_fg`)": ("linear", None, "only_fg"),
    "linear, backgrounds of the class (`mixed_same`)": ("linear", None, "mixed_same"),
    "linear, random backgrounds (`mixed_rand`)": ("linear", None, "mixed_rand"),
    "linear, backgrounds of the next class (`mixed_next`)": (
        "linear",
        None,
        "mixed_next",
    ),
}


def test_table_of_evaluations():
    page = (RESULTS / "README.md").read_text()
    runs = [rows_of_evaluations(name) for name in ("toy-none", "toy-masks")]
    for line, key in EVALUATIONS.items():
        cells = []
        for rows in runs:
            found = [rows.get((*key, feature)) for feature in study.FEATURES]
            texts = []
            for row in filter(None, found):
                spread = f" ± {row['+-']:.1f}" if "+-" in row else ""
                texts.append(f"{row['top-1']:.1f}{spread}")
            cells.append(" / ".join(texts))
        assert f"| {line} | {' | '.join(cells)} |" in page
