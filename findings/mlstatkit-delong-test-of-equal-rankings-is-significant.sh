#!/usr/bin/env bash
# MLstatkit: DeLong's test of two models that rank the images alike, or that are both perfect, gives
# z = 0 and p = 0.
#
# Versions: MLstatkit 0.1.91, scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6.
# Expected: two AUCs that are equal on all data are no difference: p = 1, or nan for 0 / 0.
# Behavior: if the difference has no variance, Delong_test changes to a bootstrap, as the README
# says. Its p is twice the smaller of the shares of differences <= 0 and > 0. All of them are 0, so
# the second share is none and p = 0. A check of logits against probabilities, of a model before
# and after temperature scaling, of a converted checkpoint against the first one, or of two models
# that separate an easy class, comes out as significant at any level; in a table of p-values it is
# the smallest. No message; z = 0 and the equal AUCs are the only hint, and the default call in a
# loop over classes returns them together with p. Permutation_test of the same package gives 1.
# Workaround: p = 1 where z is 0.
#
# Output seen (500 images; p of DeLong's test, and of the permutation test for the AUC):
#   logits, probabilities           AUC 0.727 0.727  z +0.00  p 0.000   permutations 1.00
#   before, after scaling           AUC 0.727 0.727  z +0.00  p 0.000   permutations 1.00
#   a model and itself              AUC 0.727 0.727  z +0.00  p 0.000   permutations 1.00
#   two models, an easy class       AUC 1.000 1.000  z +0.00  p 0.000   permutations 1.00
#   one pair of images swapped      AUC 0.727 0.727  z -0.71  p 0.480   permutations 0.46
#   another model                   AUC 0.727 0.772  z +1.42  p 0.155   permutations 0.10
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 MLstatkit==0.1.91
TQDM_DISABLE=1 "$dir/venv/bin/python" - <<'EOF_PYTHON'
import numpy as np
from MLstatkit import Delong_test, Permutation_test
from scipy.special import expit
from sklearn.metrics import roc_auc_score

random = np.random.default_rng(0)
labels = random.integers(0, 2, 500)
logits, other = labels + random.normal(0, 1, (2, 500))
easy, easy_too = labels + random.random((2, 500)) / 2

order = np.argsort(logits)
rank = next(i for i in range(499) if labels[order[i]] == 0 and labels[order[i + 1]] == 1)
swapped = logits.copy()
swapped[order[[rank, rank + 1]]] = logits[order[[rank + 1, rank]]]

for name, first, second in (
    ("logits, probabilities", logits, expit(logits)),
    ("before, after scaling", expit(logits), expit(logits / 1.7)),
    ("a model and itself", logits, logits),
    ("two models, an easy class", easy, easy_too),
    ("one pair of images swapped", logits, swapped),
    ("another model              ", logits, other),
):
    z, p, _, _, *aucs, info = Delong_test(labels, first, second, n_boot=300, random_state=0)
    # Ranks, as the permutation test exchanges the scores of the two models image by image.
    ranks = [scores.argsort().argsort() / len(scores) for scores in (first, second)]
    permuted = Permutation_test(labels, *ranks, metric_str="roc_auc", n_bootstraps=100)[2]
    print(f"{name:31} AUC {aucs[0]:.3f} {aucs[1]:.3f}  z {z:+.2f}  p {p:.3f}", end="   ")
    print(f"permutations {permuted:.2f}")
    assert np.allclose(aucs, [roc_auc_score(labels, scores) for scores in (first, second)])
    if info["method"] == "bootstrap":
        assert z == 0 and p == 0 and aucs[0] == aucs[1]
    else:
        assert p > 0.1 and name.split()[0] in ("one", "another")
EOF_PYTHON
