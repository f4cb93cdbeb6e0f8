#!/usr/bin/env bash
# scikit-learn: normalize and Normalizer turn float16 features longer than 256 into zeros.
#
# Versions: scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6.
# Expected: features stored in half precision are normalized as the same numbers in single
# precision, up to rounding; a length of 300 is far from float16's largest number, 65504.
# Behavior: the sum of squares is a float16. From a length of 256 on it is infinite, and the row
# divided by infinity is zero: no warning, no nan. In 768 dimensions a standard deviation of 9.3
# is enough; patch tokens of high norm and features before the last LayerNorm get there. The
# zero rows are each other's nearest neighbors (distance 0, all others 1), so k-NN and linear
# probe guess. cosine_similarity and metric="cosine" convert to float64 and are right.
# Workaround: features.astype(np.float32) first.
#
# Output seen (features of ten classes, 768 dimensions, lengths from 100 to 500):
#   float16: 59% of rows are zero; accuracy 0.47 by k-NN, 0.47 by a linear probe
#   float32:  0% of rows are zero; accuracy 1.00 by k-NN, 1.00 by a linear probe
#   float16, metric="cosine": accuracy 1.00 by k-NN
#   zero rows are exactly the rows of a length from 256 on: True
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
"$dir/venv/bin/python" -W error - <<'EOF'
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, normalize

CLASSES, DIMENSIONS = 10, 768
random = np.random.default_rng(0)
means = random.normal(size=(CLASSES, DIMENSIONS))


def features(count):
    labels = random.integers(CLASSES, size=count)
    x = means[labels] + random.normal(size=(count, DIMENSIONS))
    x *= random.uniform(100, 500, (count, 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16), labels


bank, bank_labels = features(1000)
queries, labels = features(500)
results = {}
for dtype in (np.float16, np.float32):
    scores = []
    for classifier in (KNeighborsClassifier(10), LogisticRegression()):
        probe = make_pipeline(Normalizer(), classifier)
        probe.fit(bank.astype(dtype), bank_labels)
        scores.append(probe.score(queries.astype(dtype), labels))
    zero = ~normalize(queries.astype(dtype)).any(axis=1)
    results[dtype] = zero, scores
    print(
        f"{dtype.__name__}: {zero.mean():3.0%} of rows are zero; accuracy {scores[0]:.2f} by "
        f"k-NN, {scores[1]:.2f} by a linear probe"
    )
cosine = KNeighborsClassifier(10, metric="cosine").fit(bank, bank_labels).score(queries, labels)
print(f'float16, metric="cosine": accuracy {cosine:.2f} by k-NN')
lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
zero, scores = results[np.float16]
exact = bool((zero == (lengths >= 256)).all())
print("zero rows are exactly the rows of a length from 256 on:", exact)
assert exact and zero.mean() > 0.4 and max(scores) < 0.65, (exact, scores)
zero, scores = results[np.float32]
assert not zero.any() and min(scores) > 0.95 and cosine > 0.95
assert np.allclose(cosine_similarity(queries).diagonal(), 1)
EOF
