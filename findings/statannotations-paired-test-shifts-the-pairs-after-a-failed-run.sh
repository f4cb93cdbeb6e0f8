#!/usr/bin/env bash
# statannotations: in a table of runs, one failed run in each of two methods shifts the pairs of
# the paired test; the stars in the figure vanish.
#
# Versions: statannotations 0.7.2, seaborn 0.13.2, matplotlib 3.11.2, pandas 3.1.1,
# scipy 1.17.1, numpy 2.4.6.
# Expected: a row of the table is a seed and a column a method, so the paired t-test under the
# boxes compares runs of one seed; a seed that one method lacks is left out.
# Behavior: the annotator drops the nan of each column by itself and pairs what is left by its
# position. If both columns miss as many runs, of different seeds, all pairs between the two
# gaps are of different seeds, without a warning; nan_policy="omit" is too late to help. Two
# failed runs of 24 move p from 8e-06 to 0.08. (If one column misses more, SciPy raises.) In a
# long table the pairs follow the order of the rows, as the runs finished.
# Workaround: table.dropna() of the compared columns; sort a long table by seed.
#
# Output seen (accuracy of two methods for 12 seeds):
#   all runs           annotated p = 8e-06 **** by seed: 8e-06
#   seeds 2, 9 failed  annotated p = 0.08 ns   by seed: 3e-05
#   with nan_policy    annotated p = 0.08 ns   by seed: 3e-05
#   rows as finished   annotated p = 0.4 ns   by seed: 8e-06
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 pandas==3.1.1 matplotlib==3.11.2 \
    seaborn==0.13.2 statannotations==0.7.2
MPLBACKEND=Agg "$dir/venv/bin/python" -W ignore::DeprecationWarning - <<'EOF'
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy.stats import ttest_rel
from statannotations.Annotator import Annotator

SEEDS, PAIR = 12, ("MAE", "guided")


def annotate(name, by_seed, options={}, **data):
    """The p value that the annotator writes into a box plot, and that of the pairs by seed."""
    axes = sns.boxplot(**data, ax=plt.figure().add_subplot())
    annotator = Annotator(axes, [PAIR], **data)
    annotator.configure(test="t-test_paired", verbose=0)
    _, (annotation,) = annotator.apply_test(**options).annotate()
    both = by_seed.dropna()
    expected = ttest_rel(both["MAE"], both["guided"]).pvalue
    p = annotation.data.pvalue
    print(f"{name:18} annotated p = {p:.1g} {annotation.text:4} by seed: {expected:.1g}")
    return p, expected


random = np.random.default_rng(0)
mae = random.normal(70, 3, SEEDS)
runs = pd.DataFrame({"MAE": mae, "guided": mae + random.normal(1, 0.4, SEEDS)})
p, expected = annotate("all runs", runs, data=runs)
assert np.isclose(p, expected) and p < 1e-4, p

failed = runs.copy()
failed.loc[2, "MAE"] = failed.loc[9, "guided"] = np.nan
p, expected = annotate("seeds 2, 9 failed", failed, data=failed)
assert p > 0.05 and expected < 1e-4, (p, expected)
omit, _ = annotate("with nan_policy", failed, {"nan_policy": "omit"}, data=failed)
assert omit == p, omit

long = runs.melt(var_name="method", value_name="accuracy").sample(frac=1, random_state=0)
p, expected = annotate("rows as finished", runs, data=long, x="method", y="accuracy")
assert p > 0.05 and expected < 1e-4, (p, expected)
EOF
