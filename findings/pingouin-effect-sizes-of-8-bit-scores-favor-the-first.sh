#!/usr/bin/env bash
# pingouin: for scores in unsigned integers mwu and wilcoxon give the right p value, next to an
# effect size by which the first model is nearly always the better one, whichever is the first.
#
# Versions: pingouin 0.7.0, scipy 1.17.1, pandas 3.1.1, numpy 2.4.6.
# Expected: SciPy's rank tests, which pingouin calls, are right for scores of any type; so are the
# effect sizes in the same row.
# Behavior: p is SciPy's, but the effect sizes are calculated from differences x - y in the type
# of the scores. In uint8 no difference is negative. So CLES, the share of pairs in which x is
# larger, counts all pairs that are not equal: in both orders it is near 0.9 for ratings by five
# stars and near 1 for gray values. In wilcoxon the rank-biserial correlation RBC is 1 at all times.
# A small p with an RBC of 1 or a CLES of 0.9 reads as a clear gain, and is a loss where the second
# model is better. In mwu, RBC is taken from U and right; CLES has to be (1 + RBC) / 2 and is not.
# Right as well are compute_effsize(eftype="CLES") and pairwise_tests. The paired ttest passes on
# SciPy's wrong sign of t, with an interval around 90 for a mean difference of ratings from 1 to 5.
# There is no warning, and the reference pages do not mention types.
# Workaround: astype(float) first, or compute_effsize.
#
# Output seen (each test in both orders; the second model or region is the higher one):
#   wilcoxon, ratings     float: p 3e-06 RBC -1.00 CLES 0.42  uint8: p 3e-06 RBC +1.00 CLES 0.89
#   wilcoxon, ratings     float: p 3e-06 RBC +1.00 CLES 0.58  uint8: p 3e-06 RBC +1.00 CLES 0.89
#   mwu, gray values      float: p 1e-06 RBC -0.28 CLES 0.36  uint8: p 1e-06 RBC -0.28 CLES 0.99
#   mwu, gray values      float: p 1e-06 RBC +0.28 CLES 0.64  uint8: p 1e-06 RBC +0.28 CLES 0.99
#   pairwise_tests, ratings uint8: p 3e-06 CLES 0.42
#   paired ttest, ratings   uint8: interval [ 61.49 125.51]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q pingouin==0.7.0 scipy==1.17.1 pandas==3.1.1 numpy==2.4.6
"$dir/venv/bin/python" -W error::RuntimeWarning - <<'EOF'
import numpy as np
import pandas as pd
import pingouin
from scipy.stats import mannwhitneyu

random = np.random.default_rng(0)
first = random.integers(1, 5, 60).astype(np.uint8)  # ratings of 60 images by stars
second = first + (random.random(60) < 0.4).astype(np.uint8)
gray = random.normal(120, 25, (2, 200)).round()  # gray values of the pixels of two regions
dark, bright = (gray - [[10], [0]]).clip(0, 255).astype(np.uint8)


def row(test, a, b):
    result = test(a, b).iloc[0]
    return np.array([result.p_val, result.RBC, result.CLES])


def both_types(name, test, a, b):
    exact, short = row(test, a.astype(float), b.astype(float)), row(test, a, b)
    print(f"{name:20}", end="")
    for text, (p, rbc, cles) in (("float", exact), ("uint8", short)):
        print(f"  {text}: p {p:.0e} RBC {rbc:+.2f} CLES {cles:.2f}", end="")
    print()
    assert exact[0] == short[0] < 0.01, "p is right in both types"
    other = pingouin.compute_effsize(a, b, eftype="CLES")
    assert np.isclose(other, exact[2]), "compute_effsize is right in both types"
    return exact, short


for a, b, sign in ((first, second, -1), (second, first, 1)):
    exact, short = both_types("wilcoxon, ratings", pingouin.wilcoxon, a, b)
    assert exact[1] == sign and short[1] == 1 and short[2] > 0.85, short
for a, b, sign in ((dark, bright, -1), (bright, dark, 1)):
    exact, short = both_types("mwu, gray values", pingouin.mwu, a, b)
    share = mannwhitneyu(a, b).statistic / len(a) / len(b)
    assert np.isclose(share, exact[2]) and np.isclose((1 + short[1]) / 2, share)
    assert sign * (share - 0.5) > 0.05 and short[2] > 0.95, short

table = pd.DataFrame({"rating": np.concatenate([first, second]), "image": [*range(60)] * 2})
table["model"] = ["first"] * 60 + ["second"] * 60
options = dict(dv="rating", within="model", subject="image", parametric=False, effsize="CLES")
pairs = pingouin.pairwise_tests(table, **options).iloc[0]
print(f"pairwise_tests, ratings uint8: p {pairs.p_unc:.0e} CLES {pairs.CLES:.2f}")
assert np.isclose(pairs.CLES, row(pingouin.wilcoxon, first.astype(float), second)[2])

interval = pingouin.ttest(first, second, paired=True).iloc[0].CI95
print(f"paired ttest, ratings   uint8: interval {interval}")
assert interval[0] > 5
EOF
