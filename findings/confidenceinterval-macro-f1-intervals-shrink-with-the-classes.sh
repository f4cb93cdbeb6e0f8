#!/usr/bin/env bash
# confidenceinterval: the 95% interval of the macro F1 is twice the right width for 2 classes and a
# third of it for 50; those of precision and recall are nan there; the report keeps to 95%.
#
# Versions: confidenceinterval 1.0.5, scikit-learn 1.9.1, statsmodels 0.15.0, scipy 1.17.1,
# pandas 3.1.1, numpy 2.4.6.
# Expected: f1_score(y_true, y_pred, average="macro") follows the formula of Takahashi et al. and
# covers the true F1 in 95 of 100 experiments; classification_report_with_ci takes its
# confidence_level, "the confidence interval level", for all of its intervals.
# Behavior: the formula is for shares of a confusion matrix. It gets counts, has a sum in place of
# a product, and b[i] + b[j] in place of b[i] * b[j]. What is left is the square root of a constant
# over classes times images, so the interval shrinks with the number of classes. For macro
# precision and recall the covariance of the shares lacks an outer product (a vector is transposed,
# which does nothing): somewhat too narrow, and nan with many classes, where NumPy warns of a square
# root. In the report confidence_level reaches the F1 of single classes only; all else is at 95%.
# f1_score(..., confidence_interval=0.99), as in the README, is swallowed by **kwargs.
# Workaround: method="bootstrap_percentile" or "bootstrap_bca", with confidence_level.
#
# Output seen (1000 images, accuracy about 0.7):
#   macro F1        covers the truth  mean width  width by bootstrap  precision
#      2 classes         1.00            0.096           0.044           0.047
#     10 classes         0.85            0.045           0.055           0.054
#     50 classes         0.39            0.021           0.056             nan
#   report            Class 0: F1, precision, recall       macro: F1, precision, recall
#     level 0.95       0.072  0.084  0.086                    0.082  0.052  0.052
#     level 0.50       0.025  0.084  0.086                    0.082  0.052  0.052
#   f1_score, width: level 0.95 0.081, confidence_level=0.5 0.028, confidence_interval=0.5 0.081
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q confidenceinterval==1.0.5 scikit-learn==1.9.1 statsmodels==0.15.0 \
    scipy==1.17.1 pandas==3.1.1 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'EOF_PYTHON'
import confidenceinterval as ci
import numpy as np

random = np.random.default_rng(0)


def experiment(classes, images=1000):
    """Labels and predictions; precision, recall and F1 of each class are 0.7 + 0.3 / classes."""
    labels, guesses = random.integers(classes, size=(2, images))
    return labels, np.where(random.random(images) < 0.7, labels, guesses)


def interval(function, data, **options):
    _, (low, high) = function(*data, average="macro", **options)
    return low, high


def width(*arguments, **options):
    low, high = interval(*arguments, **options)
    return high - low


print("macro F1        covers the truth  mean width  width by bootstrap  precision")
for classes in (2, 10, 50):
    truth = 0.7 + 0.3 / classes
    intervals = np.array([interval(ci.f1_score, experiment(classes)) for _ in range(100)])
    low, high = intervals.T
    covers, mean = ((low <= truth) & (truth <= high)).mean(), (high - low).mean()
    data = experiment(classes)
    reference = width(
        ci.f1_score, data, method="bootstrap_percentile", n_resamples=300, random_state=0
    )
    precision = width(ci.precision_score, data)
    print(f"  {classes:2} classes {covers:12.2f} {mean:16.3f} {reference:15.3f} {precision:15.3f}")
    assert 0.035 < reference < 0.07
    if classes == 2:
        assert covers == 1 and mean > 2 * reference
    elif classes == 50:
        assert covers < 0.75 and mean < 0.5 * reference and np.isnan(precision)

data = experiment(3)
print("report            Class 0: F1, precision, recall       macro: F1, precision, recall")
seen = {}
for level in (0.95, 0.5):
    report = ci.classification_report_with_ci(*data, confidence_level=level).set_index("Class")
    columns = ("F1-Score CI", "Precision CI", "Recall CI")
    widths = [np.diff(report.loc[row, c])[0] for row in ("Class 0", "macro") for c in columns]
    print(f"  level {level:.2f}     ", *(f"{w:6.3f}" for w in widths[:3]), " " * 15, end="")
    print("  ", *(f"{w:6.3f}" for w in widths[3:]))
    seen[level] = np.array(widths)
changed = seen[0.5] < seen[0.95]
assert changed.tolist() == [True] + 5 * [False], changed

usual = width(ci.f1_score, data)
half = width(ci.f1_score, data, confidence_level=0.5)
readme = width(ci.f1_score, data, confidence_interval=0.5)
print(f"f1_score, width: level 0.95 {usual:.3f}, confidence_level=0.5 {half:.3f},", end=" ")
print(f"confidence_interval=0.5 {readme:.3f}")
assert half < 0.5 * usual and readme == usual
EOF_PYTHON
