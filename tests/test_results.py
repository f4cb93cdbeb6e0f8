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


def cells_of_study(name, arm, measures):
    """(means ± deviations, differences with their intervals, numbers of seeds).

    The first two are cells of a Markdown table, class token before patch mean.
    """
    rows = study.table_rows(study.read_study(RESULTS / "study" / name))
    found = {(r["arm"], r["measure"], r["feature"]): r for r in rows}
    cells, differences, numbers = [], [], set()
    for measure in measures:
        for feature in study.FEATURES:
            row = found[arm, measure, feature]
            numbers.add(row["n"])
            cells.append(f"{row['mean']:.1f} ± {row['sd']:.1f}")
            if "difference" in row:
                low, high = row["low"], row["high"]
                differences.append(
                    f"{row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
                )
    return " | ".join(cells), " | ".join(differences), numbers


def test_the_first_table_of_the_readme():
    measures = ("k-NN, k = 20", "linear probe")
    vanilla, _, n = cells_of_study("imagenette64", "none", measures)
    guided, difference, m = cells_of_study("imagenette64", "cnn-tokencut", measures)
    assert n == m and f"{min(n)} seeds" in README
    assert f"| {vanilla} |" in README
    assert f"| {guided} |" in README
    assert f"| {difference} |" in README


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
