"""
Published figures are those of the logs in results/: the README's tables, calculated anew.
"""

import json
import re

import pytest

import study
from tests.helpers import ROOT

RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
STUDIES = sorted(path.parent for path in RESULTS.glob("study/*/table.md"))
# Of which the README and docs/study.md tell.
assert {"imagenette64", "toy"} <= {path.name for path in STUDIES}


@pytest.mark.parametrize("folder", STUDIES, ids=[path.name for path in STUDIES])
def test_tables_of_the_studies_follow_from_their_logs(folder):
    rows = study.table_rows(study.read_study(folder))
    assert rows
    assert study.markdown(rows) == (folder / "table.md").read_text()


@pytest.mark.parametrize("folder", STUDIES, ids=[path.name for path in STUDIES])
def test_each_run_of_a_study_names_its_command_commit_and_seed(folder):
    commits = {}
    for run in sorted(folder.glob("*-seed*")):
        seed = run.name.rpartition("-seed")[2]
        assert json.loads((run / "config.json").read_text())["seed"] == int(seed)
        log = (run / "log.txt").read_text()
        command = re.search(
            r"^\$ python attg_mae.py .*--seed (\d+) .*# (\w+)$", log, re.M
        )
        assert command[1] == seed
        commits.setdefault(seed, set()).add(command[2])
        # The last k-NN of the log is that of the evaluation.
        figures = study.figures_of_run(run)
        last = [x for x in study.read_lines(run / "log.jsonl") if "knn" in x][-1]
        for feature in study.FEATURES:
            assert abs(figures["k-NN, k = 20", feature] - last["knn"][feature]) < 0.05
    # Paired runs are of the same commit.
    assert all(len(of_seed) == 1 for of_seed in commits.values())


def rows_of_study(name):
    """{(arm, measure, feature): row of study.table_rows}"""
    rows = study.table_rows(study.read_study(RESULTS / "study" / name))
    return {(row["arm"], row["measure"], row["feature"]): row for row in rows}


def mean(row):
    return f"{row['mean']:.1f} ± {row['sd']:.1f}"


def difference(row):
    return f"{row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"


def test_the_first_table_of_the_readme():
    rows = rows_of_study("imagenette64")
    vanilla, guided, differences = [], [], []
    for measure in ("k-NN, k = 20", "linear probe"):
        for feature in study.FEATURES:
            vanilla.append(mean(rows["none", measure, feature]))
            guided.append(mean(rows["cnn-tokencut", measure, feature]))
            differences.append(difference(rows["cnn-tokencut", measure, feature]))
    for cells in (vanilla, guided, differences):
        assert f"| {' | '.join(cells)} |" in README
    guided = [row for row in rows.values() if row["arm"] == "cnn-tokencut"]
    assert {(row["n"], row["pairs"]) for row in guided} == {(5, 5)}
    assert len(guided) == 12 and "5 seeds, top-1" in README
    # What is said of them: every interval holds 0.
    assert all(row["low"] < 0 < row["high"] for row in guided)
    toy = rows_of_study("toy")
    for arm in ("masks", "none"):
        both = [mean(toy[arm, "k-NN, k = 20", feature]) for feature in study.FEATURES]
        assert " / ".join(both) in README


def cells_of_page(first):
    """{first cells: other cells} of docs/study.md, in lines whose first cells are given."""
    lines = {}
    for line in (ROOT / "docs" / "study.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        lines[tuple(cells[: len(first)])] = cells[len(first) :]
    return lines[tuple(first)]


def test_the_tables_of_the_page_on_the_study():
    rows = rows_of_study("imagenette64")
    names = {"k-NN, 10 shots": "k-NN, 10 labelled images a class, k = 5"}
    names["transfer, k = 20"] = "k-NN, k = 20, on 12 classes of flowers"
    for measure in ("k-NN, k = 5", "k-NN, k = 20", "linear probe", *names):
        for feature in study.FEATURES:
            key = measure, feature
            guided = rows["cnn-tokencut", *key]
            want = [mean(rows["none", *key]), mean(guided), difference(guided)]
            first = [names.get(measure, measure), study.in_words(feature)]
            assert cells_of_page(first) == want

    page = (ROOT / "docs" / "study.md").read_text()
    for feature in study.FEATURES:
        row = rows["gaussian", "k-NN, k = 20", feature]
        assert row["pairs"] == 5 and difference(row) in page

    rows = rows_of_study("toy")
    names = {"none": "vanilla", "masks": "exact masks", "self": "own encoder (`self`)"}
    names["masks+inverted"] = "exact masks, inverted"
    names["pixels"] = "TokenCut of colours (`pixels`)"
    names["gaussian"] = "a centred Gaussian, the control"
    assert {arm for arm, _, _ in rows} == set(names)
    for arm, name in names.items():
        want = []
        for measure in ("k-NN, k = 20", "linear probe"):
            row = rows[arm, measure, "patch_mean"]
            want += [mean(row), difference(row) if arm != "none" else ""]
        assert cells_of_page([name, str(row["n"])]) == want


def test_the_quick_start_is_that_of_its_log():
    log = (RESULTS / "quickstart" / "log.txt").read_text()
    line = re.search(r"^step 1248: k-NN .*$", README, re.M)[0]
    assert line in log


@pytest.mark.parametrize("data", ["toy", "daffodils"])
def test_the_quality_of_maps_is_that_of_the_logs(data):
    logs = (RESULTS / "maps" / f"quality-{data}.txt").read_text()
    text = (ROOT / "docs" / "maps.md").read_text()
    table = text.partition("| | toy: IoU")[2].partition("\n\n")[0]
    figures = re.findall(r"IoU ([\d.]+), CorLoc ([\d.]+), AUROC ([\d.]+)", logs)
    known = {", ".join(three) for three in figures}
    columns = {"toy": 2, "daffodils": 3}
    cells = [line.split("|")[columns[data]] for line in table.splitlines()[2:]]
    told = set(re.findall(r"\d+\.\d, \d+\.\d, \d+\.\d", " ".join(cells)))
    assert len(told) > 5 and told <= known


def rows_of_evaluations(name):
    """{(protocol, k or None, test, feature): row of what the evaluations wrote}"""
    rows = {}
    for line in (RESULTS / "eval" / f"{name}.jsonl").read_text().splitlines():
        record = json.loads(line)
        for row in record["results"]:
            protocol = row["protocol"]
            if protocol == "finetune":
                protocol += f" {record['settings']['fraction']}"
            key = (protocol, row.get("k"), row.get("test", "test"), row["feature"])
            assert key not in rows
            rows[key] = row
    return rows


EVALUATIONS = {  # line of the table: protocol, k, test set
    "k-NN, k = 20": ("k-NN", 20, "test"),
    "k-NN, 10 labelled images a class, k = 5": ("10 shots", 5, "test"),
    "linear probe": ("linear", None, "test"),
    "linear, 10 labelled images a class": ("10 shots", None, "test"),
    "linear, 50 labelled images a class": ("50 shots", None, "test"),
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


def test_the_table_of_evaluations():
    page = (RESULTS / "README.md").read_text()
    runs = [rows_of_evaluations(name) for name in ("toy-none", "toy-masks")]
    for line, key in EVALUATIONS.items():
        cells = []
        for rows in runs:
            figures = []
            for feature in study.FEATURES:
                row = rows.get((*key, feature))
                if row and "+-" in row:
                    figures.append(f"{row['top-1']:.1f} ± {row['+-']:.1f}")
                elif row:
                    figures.append(f"{row['top-1']:.1f}")
            cells.append(" / ".join(figures))
        assert f"| {line} | {' | '.join(cells)} |" in page
