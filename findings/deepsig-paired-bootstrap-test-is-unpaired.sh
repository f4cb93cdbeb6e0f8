#!/usr/bin/env bash
# deepsig: the "paired bootstrap test" draws the images of the two models independently of each
# other; a clear gain on the same images gets p = 0.38.
#
# Versions: deepsig 1.2.8, scipy 1.17.1, pandas 3.1.1, numpy 2.4.6.
# Expected: bootstrap_test, "Implementation of paired bootstrap test", draws images and takes both
# models' scores of each, like a paired t-test and like permutation_test of the same package. Scores
# of different lengths are refused, as for a paired test.
# Behavior: np.random.choice is called once for each of the two lists, so the difficulty of the
# images, which both models share and pairing is to remove, stays in. The p-value is that of a test
# of independent samples: the order of the scores is of no importance. For IoUs or hits of single
# images the power is gone, and as a bare p of 0.4 is nothing unusual, no one looks for a reason.
# Without the usual + 1 p can be 0, too. The README has "the paired-bootstrap". No message.
# Workaround: permutation_test, or scipy.stats.bootstrap(..., paired=True).
#
# Output seen:
#   mean IoU 0.529 and 0.523
#                              p      p, one list shuffled   p < 0.05 in 20 experiments
#     deepsig bootstrap_test   0.383          0.390                   0.00
#     independent t-test       0.374          0.374                   0.00
#     deepsig permutation_test 0.003          0.385                   1.00
#     paired t-test            0.000          0.373                   1.00
#     paired bootstrap         0.000          0.380                   1.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q deepsig==1.2.8 scipy==1.17.1 pandas==3.1.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PYTHON'
import numpy as np
from deepsig import bootstrap_test, permutation_test
from scipy import stats

random = np.random.default_rng(0)


def paired_bootstrap(a, b):
    """The same test with one draw of images for both models."""
    difference = a - b
    draws = random.integers(len(a), size=(1000, len(a)))
    return (difference[draws].mean(1) >= 2 * difference.mean()).mean()


def t_test(a, b):
    return stats.ttest_rel(a, b, alternative="greater").pvalue


def independent_t_test(a, b):
    return stats.ttest_ind(a, b, alternative="greater").pvalue


TESTS = {
    "deepsig bootstrap_test": lambda a, b: bootstrap_test(a, b, num_samples=300, seed=1),
    "independent t-test": independent_t_test,
    "deepsig permutation_test": lambda a, b: permutation_test(a, b, num_samples=300, seed=1),
    "paired t-test": t_test,
    "paired bootstrap": paired_bootstrap,
}


def ious(gain):
    """IoUs of two models on 200 images, which are easy or hard for both of them."""
    difficulty = random.beta(2, 2, 200)
    noise = random.normal(0, 0.02, (2, 200))
    return difficulty + gain + noise[0], difficulty + noise[1]


first, second = ious(0.01)
shuffled = random.permutation(second)
experiments = [ious(0.01) for _ in range(20)]
print(f"mean IoU {first.mean():.3f} and {second.mean():.3f}")
print("                           p      p, one list shuffled   p < 0.05 in 20 experiments")
for name, test in TESTS.items():
    p, p_shuffled = test(first, second), test(first, shuffled)
    power = np.mean([test(*scores) < 0.05 for scores in experiments])
    print(f"  {name:24} {p:.3f} {p_shuffled:14.3f} {power:22.2f}")
    if name in ("deepsig bootstrap_test", "independent t-test"):
        assert p > 0.2 and abs(p_shuffled - p) < 0.1 and power < 0.2
    else:
        assert p < 0.01 and p_shuffled > 0.2 and power > 0.9
PYTHON
