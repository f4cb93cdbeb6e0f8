#!/usr/bin/env bash
# deepsig: bonferroni_correction returns the corrected p-values in the wrong order; the correction
# of aso for several comparisons gets weaker the more of them there are.
#
# Versions: deepsig 1.2.8, statsmodels 0.15.0, scipy 1.17.1, pandas 3.1.1, numpy 2.4.6.
# Expected: corrected p-values in the order of those given. "Unsort p-values again", says the
# source; the README offers it for several data sets. num_comparisons=M is alpha / M, as the README
# says: more comparisons, a stricter test.
# Behavior: the sorted values are indexed by the permutation that sorted them, not put back by its
# inverse. Sorted values and swaps are right, as in a test with two of them; in most other orders
# p-values change places, and the data set with p = 0.9 becomes significant (below). The values are
# Holm's, but for one step. For M comparisons aso raises the confidence level by alpha / M, to
# 0.95 + 0.05 / M, in place of 1 - 0.05 / M: the same for M = 2, less from 3 on, and nearly 0.95, no
# correction at all, for the 45 pairs of ten models. multi_aso does so by default. No message.
# Workaround: statsmodels' multipletests; num_comparisons=1 with confidence_level=1 - 0.05 / M, and
# use_bonferroni=False.
#
# Output seen:
#   p-values             0.04    0.001   0.9     0.02    0.3
#   deepsig              0.08    0.6     0.005   0.9     0.12
#   statsmodels          0.12    0.005   0.9     0.08    0.6
#   of all orders of these five, 78% are shuffled
#   aso, minimal epsilon (smaller: surer that the first is better)
#      1 comparisons: 0.520, with 1 - 0.05 / M 0.520
#      2 comparisons: 0.601, with 1 - 0.05 / M 0.601
#      3 comparisons: 0.569, with 1 - 0.05 / M 0.645
#     10 comparisons: 0.533, with 1 - 0.05 / M 0.760
#     45 comparisons: 0.523, with 1 - 0.05 / M 0.885
#   multi_aso of A and B among five models: 0.173, right 0.263
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q deepsig==1.2.8 statsmodels==0.15.0 scipy==1.17.1 pandas==3.1.1 \
    numpy==2.4.6
"$dir/venv/bin/python" - <<'EOF_PYTHON'
import itertools

import numpy as np
from deepsig import aso, bonferroni_correction, multi_aso
from statsmodels.stats.multitest import multipletests

p_values = np.array([0.04, 0.001, 0.9, 0.02, 0.3])
corrected = bonferroni_correction(p_values)
holm = multipletests(p_values, method="holm")[1]
for name, values in (("p-values", p_values), ("deepsig", corrected), ("statsmodels", holm)):
    print(f"{name:20}", *(f"{value:<7.3g}" for value in values))
assert np.allclose(sorted(corrected), sorted(holm))
assert corrected[2] < 0.01 and corrected[1] > 0.5
assert np.allclose(bonferroni_correction(np.sort(p_values)), np.sort(holm))

orders = list(itertools.permutations(p_values))
wrong = np.mean([not np.allclose(bonferroni_correction(np.array(order)),
                                 multipletests(order, method="holm")[1]) for order in orders])
print(f"of all orders of these five, {wrong:.0%} are shuffled")
assert wrong > 0.75

random = np.random.default_rng(0)
first, second = random.normal(0.5, 1, 20), random.normal(0, 1, 20)
options = {"seed": 0, "show_progress": False, "num_bootstrap_iterations": 100, "dt": 0.02}
print("aso, minimal epsilon (smaller: surer that the first is better)")
results = {}
for comparisons in (1, 2, 3, 10, 45):
    found = aso(first, second, num_comparisons=comparisons, **options)
    right = aso(first, second, confidence_level=1 - 0.05 / comparisons, **options)
    print(f"  {comparisons:2} comparisons: {found:.3f}, with 1 - 0.05 / M {right:.3f}")
    results[comparisons] = found
    assert np.isclose(found, right) == (comparisons < 3)
assert results[2] > results[3] > results[10] > results[45] > results[1]

models = {name: random.normal(0, 1, 10) for name in "ABCDE"}  # ten pairs
options["num_bootstrap_iterations"] = 20
default = multi_aso(models, **options)
weak, strict = (
    multi_aso(models, use_bonferroni=False, confidence_level=level, **options)
    for level in (0.95 + 0.05 / 10, 1 - 0.05 / 10)
)
print(f"multi_aso of A and B among five models: {default[0, 1]:.3f}, right {strict[0, 1]:.3f}")
assert np.allclose(default, weak) and not np.allclose(default, strict)
EOF_PYTHON
