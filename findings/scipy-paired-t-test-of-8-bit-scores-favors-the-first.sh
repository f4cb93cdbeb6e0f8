#!/usr/bin/env bash
# SciPy: the paired t-test of scores in unsigned integers finds the first model better, whichever
# model that is.
#
# Versions: scipy 1.17.1, scikit-learn 1.9.1, numpy 2.4.6.
# Expected: statistics are calculated in float64, so the type of the scores is of no importance.
# Behavior: ttest_rel subtracts in the type that it gets and converts only the differences. In
# uint8 the difference 0 - 1 is 255, so t is positive in both orders: with one flag an image, 1
# for a right class, the worse model wins with p < 1e-24. Flags in bool raise an error, which is
# what leads to uint8. The same holds for ratings, areas, and counts in unsigned integers. The
# independent t-test, Wilcoxon's, and correlations are right. In scikit-learn median_absolute_error
# and max_error have the same fault, its other errors not. No reference page mentions a type.
# Workaround: convert scores and maps with astype(float) first.
#
# Output seen (scikit-learn: an 8-bit map that is off by at most 10):
#   accuracy of 1000 images: first 0.681, second 0.741
#   ttest_rel(first, second)  float64     -5.06 p 5e-07     uint8    +10.67 p 3e-25
#   ttest_rel(second, first)  float64     +5.06 p 5e-07     uint8     +6.68 p 3.9e-11
#   ttest_ind(first, second)  float64     -2.96 p 0.0031    uint8     -2.96 p 0.0031
#   5-star ratings: ttest_rel float64     -6.49 p 1.9e-08   uint8     +6.49 p 1.9e-08
#   mean_absolute_error       float64   5.2  uint8   5.2
#   mean_squared_error        float64  36.7  uint8  36.7
#   median_absolute_error     float64   5.0  uint8  10.0
#   max_error                 float64  10.0  uint8 255.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from scipy import stats
from sklearn import metrics

random = np.random.default_rng(0)
# The models agree on most images, as two checkpoints of one architecture do.
difficulty = random.random(1000)
first = (difficulty + random.normal(0, 0.1, 1000) < 0.70).astype(np.uint8)
second = (difficulty + random.normal(0, 0.1, 1000) < 0.75).astype(np.uint8)
print(f"accuracy of 1000 images: first {first.mean():.3f}, second {second.mean():.3f}")


def compare(text, test, a, b):
    exact, short = test(a.astype(float), b.astype(float)), test(a, b)
    print(f"{text:25}", end="")
    for name, result in (("float64", exact), ("uint8", short)):
        print(f" {name} {result.statistic:+9.2f} p {result.pvalue:<9.2g}", end="")
    print()
    return exact, short


exact, short = compare("ttest_rel(first, second)", stats.ttest_rel, first, second)
assert exact.statistic < -4 and short.statistic > 4 and short.pvalue < 1e-9, (exact, short)
exact, short = compare("ttest_rel(second, first)", stats.ttest_rel, second, first)
assert exact.statistic > 4 and short.statistic > 4 and short.pvalue < 1e-9, (exact, short)
for test in (stats.ttest_ind, stats.wilcoxon, stats.pearsonr):
    exact, short = compare(f"{test.__name__}(first, second)", test, first, second)
    assert np.allclose((exact.statistic, exact.pvalue), (short.statistic, short.pvalue))

stars = random.integers(1, 5, 60).astype(np.uint8)
better = stars + (random.random(60) < 0.4).astype(np.uint8)
exact, short = compare("5-star ratings: ttest_rel", stats.ttest_rel, stars, better)
assert exact.statistic < -5 and short.statistic > 5 and short.pvalue < 1e-5, (exact, short)

truth = random.integers(20, 230, 10000).astype(np.uint8)
found = (truth + random.integers(-10, 11, 10000)).astype(np.uint8)
for error in ("mean_absolute_error", "mean_squared_error", "median_absolute_error", "max_error"):
    function = getattr(metrics, error)
    exact, short = function(truth.astype(float), found.astype(float)), function(truth, found)
    print(f"{error:25} float64 {exact:5.1f}  uint8 {short:5.1f}")
    assert (short > 1.5 * exact) == (error in ("median_absolute_error", "max_error")), error
EOF
